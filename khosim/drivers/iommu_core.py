"""The IOMMU core: domains, who is attached to them, and their part in a live update.

Models ``drivers/iommu/iommu.c`` @ 7.3 (attach, detach) and ``drivers/iommu/liveupdate.c`` as
proposed in "iommu: Add live update state preservation" v2 to v5 (Samiullah Khawaja, 2026; no
release has it): an FLB of iommufd's handler with a record for each unit, domain and attached
function. A function can be preserved only once its domain is. In the successor the unit takes its
tables over before anything else happens to it, and whatever is not there is fatal.

Beyond the proposal: the interrupt remapping table goes with the unit (no series preserves it).
Left out: groups, PASIDs, the default domain, locks.
"""

from __future__ import annotations

import dataclasses
import errno
from typing import TYPE_CHECKING

from khosim.abi.iommu import (
    IOMMU_DEVICE_SER_BYTES,
    IOMMU_DOMAIN_SER_BYTES,
    IOMMU_FLB_SER_BYTES,
    IOMMU_HW_SER_BYTES,
    IOMMU_LUO_FLB_COMPATIBLE,
    IommuDeviceSer,
    IommuDomainSer,
    IommuFlbSer,
    IommuHwSer,
)
from khosim.drivers.iommu_arrays import ObjectArray
from khosim.drivers.page_table import LEVELS, PageTable
from khosim.errors import KernelError
from khosim.kernel.liveupdate.flb_ops import Flb, LiveupdateFlbOpArgs
from khosim.kernel.page import Folio

if TYPE_CHECKING:
    from khosim.drivers.iommu_unit import IommuUnit
    from khosim.drivers.pci_core import PciDev
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.liveupdate.file_ops import FileHandler

__all__ = ("IommuCore", "IommuDomain")


class IommuDomain:
    """``struct iommu_domain``: a page table, its id on the unit, and the functions attached.

    ``outgoing`` and ``incoming`` are its records, as physical addresses (0: none). While
    ``outgoing`` its mappings cannot be changed.
    """

    __slots__ = ("attached", "domain_id", "incoming", "outgoing", "table")

    def __init__(self, table: PageTable, domain_id: int = 0) -> None:
        self.table = table
        self.domain_id = domain_id
        self.attached: list[PciDev] = []
        self.outgoing = 0
        self.incoming = 0


class IommuFlb(Flb):
    """``iommu_liveupdate_flb``: its object is the three arrays, and the root's place."""

    compatible = IOMMU_LUO_FLB_COMPATIBLE

    def preserve(self, args: LiveupdateFlbOpArgs) -> None:
        """Empty arrays."""
        args.obj = _Arrays.make(args.kernel)
        args.data = args.obj.phys

    def unpreserve(self, args: LiveupdateFlbOpArgs) -> None:
        """Free them."""
        args.obj.free_outgoing()

    def retrieve(self, args: LiveupdateFlbOpArgs) -> None:
        """Take them over, or die."""
        args.obj = _Arrays.restore(args.kernel, args.data)

    def finish(self, args: LiveupdateFlbOpArgs) -> None:
        """Free them."""
        args.obj.free_incoming()


class _Arrays:
    """``struct iommu_flb_obj``."""

    __slots__ = ("devices", "domains", "kernel", "phys", "units")

    def __init__(
        self,
        kernel: Kernel,
        phys: int,
        units: ObjectArray,
        domains: ObjectArray,
        devices: ObjectArray,
    ) -> None:
        self.kernel = kernel
        self.phys = phys
        self.units, self.domains, self.devices = units, domains, devices

    @classmethod
    def make(cls, kernel: Kernel) -> _Arrays:
        root = kernel.kho_alloc_preserve(IOMMU_FLB_SER_BYTES)
        made: list[ObjectArray] = []
        try:
            made.extend(  # one by one: a refusal finds those that were made
                ObjectArray.make(kernel, size)
                for size in (IOMMU_HW_SER_BYTES, IOMMU_DOMAIN_SER_BYTES, IOMMU_DEVICE_SER_BYTES)
            )
        except KernelError:
            for array in made:
                array.free_outgoing()
            kernel.kho_unpreserve_free(root)
            raise
        ser = IommuFlbSer(*(array.pages[0] for array in made))
        root.write(0, ser.pack(), by="iommu_liveupdate_flb_preserve")
        return cls(kernel, root.phys, *made)

    @classmethod
    def restore(cls, kernel: Kernel, phys: int) -> _Arrays:
        ser = IommuFlbSer.unpack(
            kernel.ram.read(kernel.virt(phys, IOMMU_FLB_SER_BYTES), IOMMU_FLB_SER_BYTES)
        )
        return cls(
            kernel,
            phys,
            ObjectArray.restore(kernel, IOMMU_HW_SER_BYTES, ser.iommu_array_phys),
            ObjectArray.restore(kernel, IOMMU_DOMAIN_SER_BYTES, ser.iommu_domain_array_phys),
            ObjectArray.restore(kernel, IOMMU_DEVICE_SER_BYTES, ser.device_array_phys),
        )

    def free_outgoing(self) -> None:
        for array in (self.units, self.domains, self.devices):
            array.free_outgoing()
        kernel = self.kernel
        kernel.kho_unpreserve_free(Folio(kernel, self.phys >> kernel.arch.page_shift, 0))

    def free_incoming(self) -> None:
        for array in (self.units, self.domains, self.devices):
            array.free_incoming()
        self.kernel.kho_restore_free(self.phys)


class IommuCore:
    """The IOMMU core of one kernel, with its one unit. ``flb`` is None without live update.

    ``preserved`` are the requester ids of functions that are preserved for the successor, each with
    its record; ``incoming`` the domains of functions that came, by requester id.
    """

    __slots__ = ("_buses", "_hw", "flb", "incoming", "kernel", "preserved", "unit")

    def __init__(self, kernel: Kernel, unit: IommuUnit, flb: IommuFlb | None) -> None:
        self.kernel = kernel
        self.unit = unit
        self.flb = flb
        self.preserved: dict[int, int] = {}
        self.incoming: dict[int, IommuDomain] = {}
        self._hw = 0
        self._buses: set[int] = set()

    # -- boot and end ---------------------------------------------------------------------------

    def init(self, last_bdf: int) -> None:
        """``intel_iommu_init``, ``amd_iommu_init``: bring the unit up.

        With the predecessor's tables if they came; ``last_bdf`` is the last requester id.
        """
        arrays = self._incoming()
        if arrays is None:
            self.unit.bring_up(last_bdf)
            return
        for entry in arrays.units.entries():
            ser = IommuHwSer.unpack(arrays.units.read(entry))
            if ser.type == self.unit.type and ser.token == self.unit.base:
                break
        else:
            self._put_incoming()
            self.unit.bring_up(last_bdf)
            return
        devices = [
            IommuDeviceSer.unpack(arrays.devices.read(at)) for at in arrays.devices.entries()
        ]
        used = {device.attachment_id for device in devices}
        self.unit.bring_up(last_bdf, root=ser.root_table, irta=ser.irta, domain_ids=used)
        self.unit.restore_tables()
        domains: dict[int, IommuDomain] = {}
        for device in devices:
            domain = domains.get(device.domain_phys)
            if domain is None:
                domain = self._restore_domain(arrays, device)
                domains[device.domain_phys] = domain
            self.incoming[device.devid] = domain
        self._put_incoming()

    def _restore_domain(self, arrays: _Arrays, device: IommuDeviceSer) -> IommuDomain:
        # iommu_restore_domain: rebuilt around the table that is in use.
        ser = IommuDomainSer.unpack(arrays.domains.read(device.domain_phys))
        table = PageTable(self.kernel, ser.top_table_phys, format=self.unit.format)
        table.restore()
        domain = IommuDomain(table, device.attachment_id)
        domain.incoming = device.domain_phys
        if self.kernel.trace is not None:
            args = {"top": ser.top_table_phys, "did": device.attachment_id}
            self.kernel.emit("iommu_restore_domain", args, 0)
        return domain

    def shutdown(self) -> None:
        """``iommu_shutdown_noirq``: see :meth:`IommuUnit.shutdown`."""
        self.unit.shutdown(set(self.preserved) if self.preserved else None, self._buses)

    # -- domains --------------------------------------------------------------------------------

    def alloc_domain(self) -> IommuDomain:
        """``iommu_paging_domain_alloc``; raises -ENOMEM."""
        table = PageTable(self.kernel, format=self.unit.format)
        return IommuDomain(table, self.unit.alloc_domain_id())

    def free_domain(self, domain: IommuDomain) -> None:
        """``iommu_domain_free``: nobody is attached any more."""
        self.unit.flush(domain.domain_id)
        self.unit.domain_ids.discard(domain.domain_id)
        domain.table.free()

    def attach(self, domain: IommuDomain, dev: PciDev) -> None:
        """``iommu_attach_device``; raises -EBUSY for a function that has a domain."""
        self.unit.set_context(dev.bdf.rid, domain.table, domain.domain_id)
        domain.attached.append(dev)

    def detach(self, domain: IommuDomain, dev: PciDev) -> None:
        """``iommu_detach_device``: the function is blocked."""
        self.unit.clear_context(dev.bdf.rid)
        domain.attached.remove(dev)

    def reattach(self, dev: PciDev) -> IommuDomain | None:
        """The domain that a function came with: its context entry stands already."""
        domain = self.incoming.get(dev.bdf.rid)
        if domain is not None and dev not in domain.attached:
            domain.attached.append(dev)
        return domain

    def forget(self, domain: IommuDomain) -> list[int]:
        """The update is over for a domain: the requester ids that came with it."""
        rids = [rid for rid, it in self.incoming.items() if it is domain]
        for rid in rids:
            del self.incoming[rid]
        return rids

    # -- live update, old kernel ----------------------------------------------------------------

    def register_flb(self, handler: FileHandler) -> None:
        """``iommu_liveupdate_register_flb``."""
        if self.flb is not None:
            self.kernel.liveupdate.register_flb(handler, self.flb)

    def preserve_domain(self, domain: IommuDomain) -> int:
        """``iommu_domain_preserve``: its tables and a record; where that is. Raises -ENOMEM."""
        assert self.flb is not None
        luo = self.kernel.liveupdate
        arrays: _Arrays = luo.flb_get_outgoing(self.flb)
        try:
            table = domain.table
            ser = IommuDomainSer(1, 0, table.top_phys, LEVELS - 1, table.vasz)
            entry = arrays.domains.add(ser.pack())
            try:
                table.preserve()
            except KernelError:
                arrays.domains.delete(entry)
                raise
        finally:
            luo.flb_put_outgoing(self.flb)
        domain.outgoing = entry
        return entry

    def unpreserve_domain(self, domain: IommuDomain) -> None:
        """``iommu_domain_unpreserve``."""
        assert self.flb is not None
        luo = self.kernel.liveupdate
        arrays: _Arrays = luo.flb_get_outgoing(self.flb)
        domain.table.unpreserve()
        arrays.domains.delete(domain.outgoing)
        domain.outgoing = 0
        luo.flb_put_outgoing(self.flb)

    def preserve_device(self, domain: IommuDomain, dev: PciDev) -> None:
        """``iommu_preserve_device``: that ``dev`` translates through ``domain``, and the unit.

        Raises -EINVAL where the domain is not preserved, -EBUSY for a function that is, -ENOMEM.
        """
        symbol = "iommu_preserve_device"
        if self.flb is None:
            raise KernelError(errno.EOPNOTSUPP, symbol, "no live update of IOMMUs")
        if not domain.outgoing:
            raise KernelError(errno.EINVAL, symbol, "its domain is not preserved")
        if dev.bdf.rid in self.preserved:
            raise KernelError(errno.EBUSY, symbol, str(dev.bdf))
        luo = self.kernel.liveupdate
        arrays: _Arrays = luo.flb_get_outgoing(self.flb)
        try:
            rid = dev.bdf.rid
            self._get_unit(arrays, dev.bdf.bus)
            try:
                ser = IommuDeviceSer(
                    1, 0, rid, dev.bdf.segment, domain.domain_id, domain.outgoing, self._hw
                )
                self.preserved[rid] = arrays.devices.add(ser.pack())
            except KernelError:
                self._put_unit(arrays)
                raise
        finally:
            luo.flb_put_outgoing(self.flb)
        if self.kernel.trace is not None:
            self.kernel.emit(symbol, {"bdf": str(dev.bdf)}, 0)

    def unpreserve_device(self, dev: PciDev) -> None:
        """``iommu_unpreserve_device``."""
        assert self.flb is not None
        luo = self.kernel.liveupdate
        arrays: _Arrays = luo.flb_get_outgoing(self.flb)
        arrays.devices.delete(self.preserved.pop(dev.bdf.rid))
        self._put_unit(arrays)
        luo.flb_put_outgoing(self.flb)

    def _get_unit(self, arrays: _Arrays, bus: int) -> None:
        # iommu_preserve_locked and preserve_context_table: the unit's tables with the first
        # function, the table of each bus with the first one there; a count for each function.
        old = IommuHwSer.unpack(arrays.units.read(self._hw)) if self._hw else None
        unit = self.unit
        tables = [] if old else unit.unit_tables()
        if bus not in self._buses:
            tables += unit.bus_tables(bus)
        done: list[tuple[int, int]] = []
        try:
            for table in tables:
                self.kernel.kho_preserve_folio(self._folio(*table))
                done.append(table)
            if old is None:
                base = unit.base
                old = IommuHwSer(
                    0, 0, base, unit.type, 0, base, unit.root_value, bytes(64), unit.irq_table
                )
                self._hw = arrays.units.add(old.pack())
        except KernelError:
            self._unpreserve(done)
            raise
        self._buses.add(bus)
        self._write_unit(arrays, old, old.ref_count + 1)

    def _write_unit(self, arrays: _Arrays, old: IommuHwSer, count: int) -> None:
        bitmap = sum(1 << 2 * bus for bus in self._buses)
        new = dataclasses.replace(
            old, ref_count=count, context_tables=bitmap.to_bytes(64, "little")
        )
        arrays.units.write(self._hw, new.pack())

    def _put_unit(self, arrays: _Arrays) -> None:
        old = IommuHwSer.unpack(arrays.units.read(self._hw))
        if old.ref_count > 1:
            self._write_unit(arrays, old, old.ref_count - 1)
            return
        tables = self.unit.unit_tables()
        for bus in sorted(self._buses):
            tables += self.unit.bus_tables(bus)
        self._unpreserve(tables)
        arrays.units.delete(self._hw)
        self._hw = 0
        self._buses.clear()

    def _folio(self, phys: int, order: int) -> Folio:
        return Folio(self.kernel, phys >> self.kernel.arch.page_shift, order)

    def _unpreserve(self, tables: list[tuple[int, int]]) -> None:
        for table in tables:
            self.kernel.kho_unpreserve_folio(self._folio(*table))

    # -- live update, new kernel ----------------------------------------------------------------

    def _incoming(self) -> _Arrays | None:
        if self.flb is None:
            return None
        try:
            arrays: _Arrays = self.kernel.liveupdate.flb_get_incoming(self.flb)
        except KernelError as refused:
            if refused.errno in (errno.EOPNOTSUPP, errno.ENODATA, errno.ENOENT):
                return None
            raise
        return arrays

    def _put_incoming(self) -> None:
        assert self.flb is not None
        self.kernel.liveupdate.flb_put_incoming(self.flb)

