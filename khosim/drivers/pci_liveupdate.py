"""The PCI core's part in a live update: which functions are not to be disturbed.

Models ``drivers/pci/liveupdate.c`` as proposed in "PCI: liveupdate: PCI core support for Live
Update" v9 (David Matlack, 2026-09-18; no release has it): an FLB with a record of each preserved
function and of the bridges above it. In the successor those functions keep their bus numbers, and
stay bus masters at the next kexec only if they are preserved again. Whatever is wrong with the
records is a panic there: devices are at work that nobody can identify.

Beyond the proposal: sizes of BARs are handed over, so that nobody has to turn decoding off to find
them (it names peer-to-peer as future work). Left out: ACS and ARI settings, locks.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from khosim.abi.pci import (
    PCI_DEV_SER_BYTES,
    PCI_LUO_FLB_COMPATIBLE,
    PCI_LUO_FLB_VERSION,
    PCI_SER_BYTES,
    PciDevSer,
    PciSer,
)
from khosim.errors import KernelError, KernelPanic
from khosim.kernel.kho_block import KhoBlockSet
from khosim.kernel.liveupdate.flb_ops import Flb, LiveupdateFlbOpArgs

if TYPE_CHECKING:
    from khosim.drivers.pci_core import PciDev
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.liveupdate.file_ops import FileHandler
    from khosim.kernel.page import Folio

__all__ = ("PciFlb", "PciLiveupdate")


class Outgoing:
    """``struct pci_flb_outgoing``: the root and the blocks of records."""

    __slots__ = ("block_set", "nr_devices", "ser")

    def __init__(self, ser: Folio, block_set: KhoBlockSet) -> None:
        self.ser = ser
        self.block_set = block_set
        self.nr_devices = 0

    def update(self) -> None:
        """Write the root anew."""
        ser = PciSer(PCI_LUO_FLB_VERSION, self.nr_devices, self.block_set.head_pa)
        self.ser.write(0, ser.pack(), by="pci_liveupdate_preserve")


class Incoming:
    """``struct pci_flb_incoming``: records by ``(segment, requester id)``, as addresses."""

    __slots__ = ("block_set", "entries", "phys")

    def __init__(self, phys: int, block_set: KhoBlockSet) -> None:
        self.phys = phys
        self.block_set = block_set
        self.entries: dict[tuple[int, int], int] = {}


class PciFlb(Flb):
    """``pci_liveupdate_flb``."""

    compatible = PCI_LUO_FLB_COMPATIBLE

    def preserve(self, args: LiveupdateFlbOpArgs) -> None:
        """``pci_flb_preserve``: an empty list."""
        kernel = args.kernel
        ser = kernel.kho_alloc_preserve(PCI_SER_BYTES)
        outgoing = Outgoing(ser, KhoBlockSet(kernel, PCI_DEV_SER_BYTES))
        outgoing.update()
        args.obj, args.data = outgoing, ser.phys

    def unpreserve(self, args: LiveupdateFlbOpArgs) -> None:
        """``pci_flb_unpreserve``."""
        outgoing: Outgoing = args.obj
        if outgoing.nr_devices:
            args.kernel.warn(f"WARNING: pci_flb_unpreserve: {outgoing.nr_devices} devices left")
        outgoing.block_set.destroy()
        args.kernel.kho_unpreserve_free(outgoing.ser)

    def retrieve(self, args: LiveupdateFlbOpArgs) -> None:
        """``pci_flb_retrieve``: read all records, or panic."""
        kernel = args.kernel
        ser = PciSer.unpack(kernel.ram.read(kernel.virt(args.data, PCI_SER_BYTES), PCI_SER_BYTES))
        if ser.version != PCI_LUO_FLB_VERSION:
            raise KernelPanic(
                f"Incoming PCI FLB version (v{ser.version}) is incompatible with this kernel "
                f"(v{PCI_LUO_FLB_VERSION})",
                kernel.generation,
            )
        incoming = Incoming(args.data, KhoBlockSet(kernel, PCI_DEV_SER_BYTES))
        try:
            incoming.block_set.restore(ser.devices)
        except KernelError as refused:
            raise KernelPanic(
                f"Failed to restore devices KHO block set (-{refused.name})", kernel.generation
            ) from refused
        it = incoming.block_set.iterate()
        while (entry := it.read_entry()) is not None:
            dev = PciDevSer.unpack(kernel.ram.read(entry, PCI_DEV_SER_BYTES))
            if not dev.refcount:
                continue
            key = dev.domain, dev.bdf
            if key in incoming.entries:
                raise KernelPanic(
                    f"Failed to insert PCI device {dev.domain:04x}:{dev.bdf:04x} (-EBUSY)",
                    kernel.generation,
                )
            incoming.entries[key] = entry
        args.obj = incoming

    def finish(self, args: LiveupdateFlbOpArgs) -> None:
        """``pci_flb_finish``: panics where a driver forgot a device."""
        kernel, incoming = args.kernel, args.obj
        ser = PciSer.unpack(kernel.ram.read(incoming.phys, PCI_SER_BYTES))
        if ser.nr_devices:
            raise KernelPanic(
                f"{ser.nr_devices} preserved device(s) were never finished!", kernel.generation
            )
        incoming.block_set.destroy()
        kernel.kho_restore_free(incoming.phys)


class PciLiveupdate:
    """The calls of ``drivers/pci/liveupdate.c`` on one kernel.

    ``had_incoming`` stays true for the life of a kernel whose predecessor preserved any function.
    """

    __slots__ = ("flb", "had_incoming", "kernel")

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.flb = PciFlb()
        self.had_incoming = False

    def register_flb(self, handler: FileHandler) -> None:
        """``pci_liveupdate_register_flb``: files of ``handler`` stand for PCI functions."""
        self.kernel.liveupdate.register_flb(handler, self.flb)

    # -- in the old kernel ----------------------------------------------------------------------

    def preserve(self, dev: PciDev) -> None:
        """``pci_liveupdate_preserve``: a function and the bridges above it.

        Raises -EBUSY for one that is preserved already, and what memory refuses; -ENOENT where no
        file that needs the FLB is preserved.
        """
        luo = self.kernel.liveupdate
        outgoing: Outgoing = luo.flb_get_outgoing(self.flb)
        try:
            done: list[PciDev] = []
            try:
                for each in dev.path():
                    self._preserve_one(outgoing, each)
                    done.append(each)
            except KernelError:
                for each in done:
                    self._unpreserve_one(outgoing, each)
                raise
        finally:
            luo.flb_put_outgoing(self.flb)
        if self.kernel.trace is not None:
            self.kernel.emit("pci_liveupdate_preserve", {"bdf": str(dev.bdf)}, 0)

    def _preserve_one(self, outgoing: Outgoing, dev: PciDev) -> None:
        if dev.outgoing and not dev.is_bridge:
            raise KernelError(errno.EBUSY, "pci_liveupdate_preserve", f"{dev.bdf} is preserved")
        if not dev.outgoing:
            dev.outgoing = self._alloc(outgoing)
            outgoing.nr_devices += 1
            outgoing.update()
            self._write(dev.outgoing, dev, 0)
        self._write(dev.outgoing, dev, self._read(dev.outgoing).refcount + 1)

    def _alloc(self, outgoing: Outgoing) -> int:
        # pci_flb_alloc_dev_ser: an entry that was given back, or a new one.
        it = outgoing.block_set.iterate()
        count = 0
        while (entry := it.read_entry()) is not None:
            if not self._read(entry).refcount:
                return entry
            count += 1
        outgoing.block_set.grow(count + 1)
        if not count:
            it = outgoing.block_set.iterate()
        entry = it.reserve_entry()
        if entry is None:
            raise KernelError(errno.ENOSPC, "pci_liveupdate_preserve", "no room for a record")
        return entry

    def unpreserve(self, dev: PciDev) -> None:
        """``pci_liveupdate_unpreserve``."""
        luo = self.kernel.liveupdate
        outgoing: Outgoing = luo.flb_get_outgoing(self.flb)
        for each in dev.path():
            self._unpreserve_one(outgoing, each)
        luo.flb_put_outgoing(self.flb)

    def _unpreserve_one(self, outgoing: Outgoing, dev: PciDev) -> None:
        left = self._read(dev.outgoing).refcount - 1
        if left:
            self._write(dev.outgoing, dev, left)
            return
        self.kernel.ram.zero(
            dev.outgoing, PCI_DEV_SER_BYTES, self.kernel.by("pci_liveupdate_unpreserve")
        )
        outgoing.nr_devices -= 1
        outgoing.update()
        dev.outgoing = 0

    def _read(self, entry: int) -> PciDevSer:
        return PciDevSer.unpack(self.kernel.ram.read(entry, PCI_DEV_SER_BYTES))

    def _write(self, entry: int, dev: PciDev, refcount: int) -> None:
        sizes = [0] * 6
        for i, (_, size) in enumerate(dev.bars):
            sizes[2 * i] = size.bit_length() - 1
        ser = PciDevSer(dev.bdf.segment, dev.bdf.rid, refcount, bytes(sizes))
        self.kernel.ram.write(entry, ser.pack(), self.kernel.by("pci_liveupdate_preserve"))

    # -- in the new kernel ----------------------------------------------------------------------

    def _incoming(self) -> Incoming | None:
        # pci_liveupdate_flb_get_incoming: None where nothing came, or no object of this name.
        luo = self.kernel.liveupdate
        try:
            found: Incoming = luo.flb_get_incoming(self.flb)
        except KernelError as refused:
            if refused.errno in (errno.EOPNOTSUPP, errno.ENODATA, errno.ENOENT):
                return None
            raise KernelPanic(
                f"Failed to retrieve incoming FLB data (-{refused.name})", self.kernel.generation
            ) from refused
        self.had_incoming |= bool(found.entries)
        return found

    def setup_device(self, dev: PciDev) -> None:
        """``pci_liveupdate_setup_device``: is this one of those that came?"""
        incoming = self._incoming()
        if incoming is None:
            return
        entry = incoming.entries.get((dev.bdf.segment, dev.bdf.rid), 0)
        if entry and self._read(entry).refcount:
            dev.incoming = entry
            dev.was_incoming = True
        self.kernel.liveupdate.flb_put_incoming(self.flb)
        if dev.incoming and self.kernel.trace is not None:
            self.kernel.emit("pci_liveupdate_setup_device", {"bdf": str(dev.bdf)}, entry)

    def bar_sizes(self, dev: PciDev) -> list[int] | None:
        """Sizes of the BARs in bytes as they were handed over; None for a function that was not."""
        if not dev.incoming:
            return None
        return [1 << bits if bits else 0 for bits in self._read(dev.incoming).bar_bits]

    def preserve_bus_numbers(self) -> bool:
        """``pci_liveupdate_preserve_bus_numbers``."""
        return self.had_incoming

    def refuses_numbers(self, dev: PciDev, bridges: list[PciDev]) -> bool:
        """``pci_liveupdate_refuse_bus_numbers``.

        A preserved bridge on this bus lost its numbers.
        """
        for bridge in bridges:
            if bridge.was_incoming and bridge.self_bus < 0:
                self.kernel.printk(
                    f"pci {dev.bdf}: Not assigning bus numbers, preserved bridge {bridge.bdf} lost "
                    "its bus number configuration"
                )
                return True
        return False

    def finish(self, dev: PciDev) -> None:
        """``pci_liveupdate_finish``: a function, and the bridges that only it kept."""
        incoming = self._incoming()
        if incoming is None:
            self.kernel.printk(f"pci {dev.bdf}: Cannot finish preserving device without FLB")
            return
        kernel = self.kernel
        by = kernel.by("pci_liveupdate_finish")
        for each in dev.path():
            if not each.incoming:
                break
            old = self._read(each.incoming)
            left = old.refcount - 1
            new = PciDevSer(old.domain, old.bdf, left, old.bar_bits)
            kernel.ram.write(each.incoming, new.pack(), by)
            if left:
                continue
            each.incoming = 0
            ser = PciSer.unpack(kernel.ram.read(incoming.phys, PCI_SER_BYTES))
            ser = PciSer(ser.version, ser.nr_devices - 1, ser.devices)
            kernel.ram.write(incoming.phys, ser.pack(), by)
        kernel.liveupdate.flb_put_incoming(self.flb)
