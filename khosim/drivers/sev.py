"""The SEV driver: the secure processor, the reverse map table, guests' context pages.

Models ``drivers/crypto/ccp/sev-dev.c`` (``__sev_snp_init_locked``, ``__sev_snp_shutdown_locked``,
``snp_alloc_firmware_page``), ``arch/x86/virt/svm/sev.c`` (``rmp_make_private``,
``rmp_make_shared``) and ``arch/x86/kvm/svm/sev.c`` (``snp_launch_start``,
``snp_decommission_context``) @ 7.3.

Live update of encrypted guests has not been proposed by anybody (``guest_memfd`` preservation v4
leaves such hosts out). khosim's own, as an FLB of KVM's machines: while guests are preserved the
old kernel does not shut the firmware down, and the new one neither initialises it (which would make
every page the hypervisor's) nor enables the table anew. Context pages are preserved where they are.

Left out: SEV and SEV-ES, attestation, the pages that the firmware keeps for itself, WBINVD.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from khosim.abi.snp import (
    SNP_GUEST_SER_BYTES,
    SNP_LUO_FLB_COMPATIBLE,
    SNP_LUO_FLB_VERSION,
    SNP_SER_BYTES,
    SnpGuestSer,
    SnpSer,
)
from khosim.errors import KernelError, KernelPanic
from khosim.kernel.kho_block import KhoBlockSet
from khosim.kernel.liveupdate.flb_ops import Flb, LiveupdateFlbOpArgs
from khosim.kernel.page import Folio

if TYPE_CHECKING:
    from collections.abc import Iterable

    from khosim.kernel.kernel import Kernel
    from khosim.kernel.liveupdate.file_ops import FileHandler
    from khosim.machine.devices.snp import SecureProcessor

__all__ = ("Sev", "SnpFlb", "SnpGuest")

_POLICY = 0x30000
_LARGE = 2 << 20
_ZERO_PAGE, _VMSA_PAGE = 3, 2


class SnpGuest:
    """A guest of the firmware: its context page and ASID; ``outgoing`` is its record (0: none)."""

    __slots__ = ("asid", "gctx_phys", "outgoing")

    def __init__(self, gctx_phys: int, asid: int) -> None:
        self.gctx_phys = gctx_phys
        self.asid = asid
        self.outgoing = 0


class _Outgoing:
    __slots__ = ("block_set", "nr_guests", "ser")

    def __init__(self, ser: Folio, block_set: KhoBlockSet) -> None:
        self.ser = ser
        self.block_set = block_set
        self.nr_guests = 0

    def update(self) -> None:
        ser = SnpSer(SNP_LUO_FLB_VERSION, self.nr_guests, self.block_set.head_pa)
        self.ser.write(0, ser.pack(), by="sev_liveupdate_preserve")


class SnpFlb(Flb):
    """The firmware is at work for the guests in the list."""

    compatible = SNP_LUO_FLB_COMPATIBLE

    def preserve(self, args: LiveupdateFlbOpArgs) -> None:
        """An empty list."""
        ser = args.kernel.kho_alloc_preserve(SNP_SER_BYTES)
        args.obj = _Outgoing(ser, KhoBlockSet(args.kernel, SNP_GUEST_SER_BYTES))
        args.obj.update()
        args.data = ser.phys

    def unpreserve(self, args: LiveupdateFlbOpArgs) -> None:
        """Free it."""
        args.obj.block_set.destroy()
        args.kernel.kho_unpreserve_free(args.obj.ser)

    def retrieve(self, args: LiveupdateFlbOpArgs) -> None:
        """The guests by context page; dies of a version that it does not know."""
        kernel = args.kernel
        ser = SnpSer.unpack(kernel.ram.read(kernel.virt(args.data, SNP_SER_BYTES), SNP_SER_BYTES))
        if ser.version != SNP_LUO_FLB_VERSION:
            raise KernelPanic(
                f"Incoming SEV-SNP state (v{ser.version}) is incompatible with this kernel",
                kernel.generation,
            )
        block_set = KhoBlockSet(kernel, SNP_GUEST_SER_BYTES)
        block_set.restore(ser.guests)
        guests = {}
        it = block_set.iterate()
        while (entry := it.read_entry()) is not None:
            guest = SnpGuestSer.unpack(kernel.ram.read(entry, SNP_GUEST_SER_BYTES))
            if guest.in_use:
                guests[guest.gctx_phys] = guest.asid
        args.obj = guests, block_set, args.data

    def finish(self, args: LiveupdateFlbOpArgs) -> None:
        """Free the list."""
        _, block_set, phys = args.obj
        block_set.destroy()
        args.kernel.kho_restore_free(phys)


class Sev:
    """The SEV driver of one kernel; ``guests`` by context page.

    ``flb`` is None without live update.

    Calls of the firmware that fail raise -EIO with its status.
    """

    __slots__ = ("_incoming", "flb", "guests", "kernel", "nr_preserved", "snp")

    def __init__(self, kernel: Kernel, snp: SecureProcessor, flb: SnpFlb | None) -> None:
        self.kernel = kernel
        self.snp = snp
        self.flb = flb
        self.guests: dict[int, SnpGuest] = {}
        self.nr_preserved = 0
        self._incoming: dict[int, int] = {}

    def _firmware(self, command: str, status: int) -> None:
        if self.kernel.trace is not None:
            self.kernel.emit("sev_do_cmd", {"command": command}, int(status))
        if status:
            raise KernelError(errno.EIO, "sev_do_cmd", f"{command}: {status!r}")

    def _rmpupdate(
        self,
        phys: int,
        len_bytes: int,
        *,
        assigned: bool,
        asid: int = 0,
        gpa: int = 0,
        page_size: int = 4096,
        immutable: bool = False,
    ) -> None:
        error = self.snp.rmp.rmpupdate(
            phys,
            len_bytes,
            assigned=assigned,
            asid=asid,
            gpa=gpa,
            page_size=page_size,
            immutable=immutable,
        )
        if self.kernel.trace is not None:
            args = {"phys": phys, "len_bytes": len_bytes, "assigned": assigned, "asid": asid}
            self.kernel.emit("rmpupdate", args, error)
        if error:
            raise KernelError(errno.EIO, "rmpupdate", f"{phys:#x}: {error}")

    # -- boot and end ---------------------------------------------------------------------------

    def init(self) -> None:
        """``__sev_snp_init_locked``, unless guests came; then the firmware is left as it is."""
        guests = self._get_incoming()
        if guests is not None:
            self._incoming = guests
            for gctx_phys in guests:
                if self.kernel.kho_restore_folio(gctx_phys) is None:
                    raise KernelPanic(
                        f"kernel BUG in sev_liveupdate_retrieve: no page at {gctx_phys:#x}",
                        self.kernel.generation,
                    )
            return
        self.snp.enable()
        self._firmware("SNP_INIT_EX", self.snp.init())
        self._firmware("SNP_DF_FLUSH", self.snp.df_flush())

    def _get_incoming(self) -> dict[int, int] | None:
        if self.flb is None:
            return None
        try:
            guests, _, _ = self.kernel.liveupdate.flb_get_incoming(self.flb)
        except KernelError as refused:
            if refused.errno in (errno.EOPNOTSUPP, errno.ENODATA, errno.ENOENT):
                return None
            raise
        self.kernel.liveupdate.flb_put_incoming(self.flb)
        return dict(guests) or None

    def shutdown(self) -> None:
        """``sp_pci_shutdown``: ``SNP_SHUTDOWN_EX``, unless guests are preserved.

        With live update those that nobody preserved are taken apart first: the table would keep
        their pages from the next kernel (a #PF(RMP) at its first write to one). 7.3 leaves that to
        user space, which has to end its guests.
        """
        if self.flb is not None:
            self._give_up()
        if not self.nr_preserved:
            self._firmware("SNP_DF_FLUSH", self.snp.df_flush())
            self._firmware("SNP_SHUTDOWN_EX", self.snp.shutdown())

    def _give_up(self) -> None:
        # Guests of this kernel, and those of the predecessor's whose session was not finished.
        left = [guest for guest in self.guests.values() if not guest.outgoing]
        left += [SnpGuest(*came) for came in self._incoming.items()]
        for guest in left:
            runs = list(self.snp.rmp.runs())
            mine = [(0, at, end - at) for at, end, it in runs if it.asid == guest.asid]
            try:
                self.free_guest(guest, mine)
            except KernelError as refused:
                self.kernel.printk(f"SEV-SNP: guest at {guest.gctx_phys:#x} stays ({refused})")

    # -- guests ---------------------------------------------------------------------------------

    def create_guest(self) -> SnpGuest:
        """``snp_context_create`` and ``snp_launch_start``: raises -ENOMEM, -EIO, -EBUSY."""
        kernel = self.kernel
        used = {guest.asid for guest in self.guests.values()} | set(self._incoming.values())
        asid = next((n for n in range(1, self.snp.rmp.asids + 1) if n not in used), 0)
        if not asid:
            raise KernelError(errno.EBUSY, "sev_asid_new", "no ASID is free")
        gctx_phys = kernel.alloc_folio(0, owner="snp_context", zero=True).phys
        self._rmpupdate(gctx_phys, kernel.arch.page_size, assigned=True, immutable=True)
        self._firmware("SNP_GCTX_CREATE", self.snp.gctx_create(gctx_phys))
        self._firmware("SNP_LAUNCH_START", self.snp.launch_start(gctx_phys, _POLICY))
        self._firmware("SNP_ACTIVATE", self.snp.activate(gctx_phys, asid))
        guest = self.guests[gctx_phys] = SnpGuest(gctx_phys, asid)
        return guest

    def launch(
        self, guest: SnpGuest, maps: Iterable[tuple[int, int, int]], vmsas: Iterable[int]
    ) -> None:
        """Make memory the guest's, as (gpa, phys, bytes), and its save areas; let it start.

        The guest accepts all of its memory at once (``snp_accept_memory``).
        """
        page = self.kernel.arch.page_size
        for gpa, phys, size in maps:
            for at, length, page_size in _by_page_size(gpa, phys, size, page):
                self._rmpupdate(
                    at,
                    length,
                    assigned=True,
                    asid=guest.asid,
                    gpa=gpa + at - phys,
                    page_size=page_size,
                )
                self._accept(guest, gpa + at - phys, at, length)
        for vmsa in vmsas:
            self._rmpupdate(vmsa, page, assigned=True, asid=guest.asid, immutable=True, gpa=vmsa)
            status = self.snp.launch_update(guest.gctx_phys, vmsa, page, _VMSA_PAGE)
            self._firmware("SNP_LAUNCH_UPDATE", status)
        self._firmware("SNP_LAUNCH_FINISH", self.snp.launch_finish(guest.gctx_phys))

    def _accept(self, guest: SnpGuest, gpa: int, phys: int, length: int) -> None:
        why = self.snp.rmp.pvalidate(guest.asid, gpa, phys, length, True)
        if why:
            raise KernelError(errno.EIO, "pvalidate", why)

    def make_shared(self, phys: int, len_bytes: int) -> None:
        """``rmp_make_shared``: a guest's pages are the hypervisor's again."""
        for start, end, entry in list(self.snp.rmp.runs(phys, phys + len_bytes)):
            self._rmpupdate(start, end - start, assigned=False, page_size=entry.page_size)

    def free_guest(self, guest: SnpGuest, maps: Iterable[tuple[int, int, int]]) -> None:
        """``sev_vm_destroy``: memory and context page are the host's again."""
        kernel = self.kernel
        for _, phys, size in maps:
            self.make_shared(phys, size)
        page = kernel.arch.page_size
        self._firmware("SNP_DECOMMISSION", self.snp.decommission(guest.gctx_phys))
        self._firmware("SNP_PAGE_RECLAIM", self.snp.page_reclaim(guest.gctx_phys, page))
        self._rmpupdate(guest.gctx_phys, page, assigned=False)
        self.guests.pop(guest.gctx_phys, None)
        self._incoming.pop(guest.gctx_phys, None)
        Folio(kernel, guest.gctx_phys >> kernel.arch.page_shift, 0).put()

    # -- live update ----------------------------------------------------------------------------

    def register_flb(self, handler: FileHandler) -> None:
        """Files of ``handler`` may be encrypted guests."""
        if self.flb is not None:
            self.kernel.liveupdate.register_flb(handler, self.flb)

    def preserve(self, guest: SnpGuest) -> None:
        """Keep a guest: its context page and a record. Nothing without live update."""
        if self.flb is None:
            return
        luo, kernel = self.kernel.liveupdate, self.kernel
        outgoing: _Outgoing = luo.flb_get_outgoing(self.flb)
        page = Folio(kernel, guest.gctx_phys >> kernel.arch.page_shift, 0)
        try:
            kernel.kho_preserve_folio(page)
            try:
                guest.outgoing = self._add(outgoing, guest)
            except KernelError:
                kernel.kho_unpreserve_folio(page)
                raise
        finally:
            luo.flb_put_outgoing(self.flb)
        self.nr_preserved += 1

    def _add(self, outgoing: _Outgoing, guest: SnpGuest) -> int:
        kernel = self.kernel
        it = outgoing.block_set.iterate()
        count = 0
        entry: int | None
        while (entry := it.read_entry()) is not None:
            if not SnpGuestSer.unpack(kernel.ram.read(entry, SNP_GUEST_SER_BYTES)).in_use:
                break
            count += 1
        if entry is None:
            outgoing.block_set.grow(count + 1)
            if not count:
                it = outgoing.block_set.iterate()
            entry = it.reserve_entry()
        assert entry is not None
        record = SnpGuestSer(guest.gctx_phys, guest.asid, 1)
        kernel.ram.write(entry, record.pack(), kernel.by("sev_liveupdate_preserve"))
        outgoing.nr_guests += 1
        outgoing.update()
        return entry

    def unpreserve(self, guest: SnpGuest) -> None:
        """Undo :meth:`preserve`."""
        if self.flb is None:
            return
        luo, kernel = self.kernel.liveupdate, self.kernel
        outgoing: _Outgoing = luo.flb_get_outgoing(self.flb)
        by = kernel.by("sev_liveupdate_unpreserve")
        kernel.ram.zero(guest.outgoing, SNP_GUEST_SER_BYTES, by)
        outgoing.nr_guests -= 1
        outgoing.update()
        kernel.kho_unpreserve_folio(Folio(kernel, guest.gctx_phys >> kernel.arch.page_shift, 0))
        guest.outgoing = 0
        self.nr_preserved -= 1
        luo.flb_put_outgoing(self.flb)

    def adopt(self, gctx_phys: int) -> SnpGuest:
        """The guest of a context page that came; raises -EIO where the firmware has none."""
        status, _, asid = self.snp.guest_status(gctx_phys)
        self._firmware("SNP_GUEST_STATUS", status)
        self._incoming.pop(gctx_phys, None)
        guest = self.guests[gctx_phys] = SnpGuest(gctx_phys, asid)
        return guest


def _by_page_size(
    gpa: int, phys: int, size: int, page: int
) -> Iterable[tuple[int, int, int]]:
    # Parts of a range by the largest pages that the table can hold: (phys, bytes, page size).
    end = phys + size
    if (gpa ^ phys) & _LARGE - 1:
        yield phys, size, page
        return
    first = min(end, -(-phys // _LARGE) * _LARGE)
    last = max(first, end // _LARGE * _LARGE)
    for low, high, page_size in ((phys, first, page), (first, last, _LARGE), (last, end, page)):
        if low < high:
            yield low, high - low, page_size
