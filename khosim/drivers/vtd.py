"""The VT-d driver: one remapping unit, its root and context tables, and its interrupt table.

Models ``drivers/iommu/intel/iommu.c`` (``init_dmars``, ``iommu_alloc_root_entry``,
``iommu_set_root_entry``, ``domain_context_mapping_one``, ``domain_context_clear``,
``intel_iommu_shutdown``), ``dmar.c`` (``dmar_enable_qi``, ``qi_submit_sync``) and
``irq_remapping.c`` (``intel_setup_irq_remapping``, ``iommu_set_irq_remapping``) @ 7.3, and what
``drivers/iommu/intel/liveupdate.c`` is proposed to do ("iommu: Add live update state preservation"
v5). Without that a kexec turns translation off, and the next kernel begins with an empty root
table.

Left out: scalable mode, several units, identity domains (a function without a domain is blocked),
fault reporting. The interrupt table has 256 entries; the kernel's has 65536.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

from khosim.abi.iommu import IOMMU_INTEL
from khosim.abi.vtd import (
    CONTEXT_ENTRY_BYTES,
    IRTE_BYTES,
    ROOT_ENTRY_BYTES,
    address_of,
    context_entry,
    is_present,
    posted_irte,
    root_entry,
)
from khosim.drivers.iommu_unit import IommuUnit
from khosim.drivers.page_table import LEVELS, VTD_FORMAT
from khosim.errors import KernelError

if TYPE_CHECKING:
    from khosim.drivers.page_table import PageTable
    from khosim.kernel.kernel import Kernel
    from khosim.machine.devices import Devices

__all__ = ("IntelIommu",)

_GCMD, _GSTS, _RTADDR, _IQT, _IQA, _IRTA = 0x18, 0x1C, 0x20, 0x88, 0x90, 0xB8
_TE, _SRTP, _QIE, _IRE, _SIRTP = 1 << 31, 1 << 30, 1 << 26, 1 << 25, 1 << 24
_CONTEXT, _IOTLB, _IEC, _GLOBAL, _BY_DOMAIN, _BY_DEVICE = 1, 2, 4, 1 << 4, 2 << 4, 3 << 4
_IRTA_BITS = 7  # 2 ** (7 + 1) entries
_NR_IRTES = 256


class IntelIommu(IommuUnit):
    """``struct intel_iommu``: a unit as one kernel drives it. ``base`` is its registers' address.

    ``domain_ids`` are those in use; ``irtes`` tells which entries of the interrupt table are.
    """

    type = IOMMU_INTEL
    format = VTD_FORMAT
    posts_interrupts = True

    __slots__ = ("_queue", "_tail", "irq_table", "irtes")

    def __init__(self, kernel: Kernel, devices: Devices, base: int) -> None:
        super().__init__(kernel, devices, base)
        self.irq_table = 0
        self.irtes: set[int] = set()
        self._queue = 0
        self._tail = 0

    # -- registers ------------------------------------------------------------------------------

    def _read(self, offset: int, size: int = 4) -> int:
        return self.devices.mmio_read(self.base + offset, size)

    def _write(self, offset: int, value: int, size: int = 4) -> None:
        self.devices.mmio_write(self.base + offset, value, size)
        if self.kernel.trace is not None:
            self.kernel.emit("dmar_writeq", {"offset": offset}, value)

    def _command(self, set_bits: int = 0, clear_bits: int = 0) -> None:
        # GCMD is written with all that is to stay on.
        status = self._read(_GSTS) & (_TE | _QIE | _IRE)
        self._write(_GCMD, (status | set_bits) & ~clear_bits)

    @property
    def translates(self) -> bool:
        """``DMA_GSTS_TES``."""
        return bool(self._read(_GSTS) & _TE)

    # -- coming up ------------------------------------------------------------------------------

    @property
    def root_value(self) -> int:
        """What the root table address register holds, in legacy mode."""
        return self.root

    def bring_up(
        self, last_bdf: int, *, root: int = 0, irta: int = 0, domain_ids: set[int] | None = None
    ) -> None:
        """``init_dmars`` and ``intel_setup_irq_remapping``; ``last_bdf`` is of no concern.

        ``root`` and ``irta`` are tables that the predecessor preserved, ``domain_ids`` those that
        stand in them: then translation goes on all the while. Else it is turned off where it was
        on, and begins anew with empty tables.
        """
        kernel = self.kernel
        restored = bool(root)
        if not restored and self.translates:
            self._command(clear_bits=_TE | _IRE)
            kernel.printk("DMAR: Translation was enabled for dmar0 but we are not in kdump mode")
        self._enable_qi()
        self.root = root or self._alloc()
        self.domain_ids = set(domain_ids or ())
        self._write(_RTADDR, self.root, 8)
        self._command(_SRTP)
        self.flush()
        self.irq_table = address_of(irta) or self._alloc()
        if irta:
            self.irtes = set(self._used_irtes())
        self._write(_IRTA, self.irq_table | _IRTA_BITS, 8)
        self._command(_SIRTP)
        self._submit(_IEC, 0)
        self._command(_TE | _IRE)
        if kernel.trace is not None:
            kernel.emit("init_dmars", {"restored": restored}, self.root)

    def _enable_qi(self) -> None:
        # intel_iommu_init_qi: a predecessor's queue is turned off, and one of our own on.
        if self._read(_GSTS) & _QIE:
            self._command(clear_bits=_QIE)
        self._queue = self._alloc()
        self._tail = 0
        self._write(_IQT, 0, 8)
        self._write(_IQA, self._queue, 8)
        self._command(_QIE)

    def _submit(self, low: int, high: int) -> None:
        # qi_submit_sync: one descriptor; this unit is done with it when the tail is written.
        kernel = self.kernel
        entry = low.to_bytes(8, "little") + high.to_bytes(8, "little")
        kernel.ram.write(self._queue + self._tail, entry, kernel.by("qi_submit_sync"))
        self._tail = (self._tail + len(entry)) % 4096
        self._write(_IQT, self._tail, 8)

    def flush(self, domain_id: int | None = None) -> None:
        """Forget cached contexts and translations: of one domain, or all."""
        if domain_id is None:
            self._submit(_CONTEXT | _GLOBAL, 0)
            self._submit(_IOTLB | _GLOBAL, 0)
        else:
            self._submit(_IOTLB | _BY_DOMAIN | domain_id << 16, 0)

    # -- devices --------------------------------------------------------------------------------

    def context_table(self, bus: int) -> int:
        """The context table of a bus, or 0."""
        entry = self.kernel.ram.read_u64(self.root + bus * ROOT_ENTRY_BYTES)
        return address_of(entry) if is_present(entry) else 0

    def set_context(self, rid: int, table: PageTable, domain_id: int) -> None:
        """``domain_context_mapping_one``: a function translates through ``table`` from now on."""
        kernel = self.kernel
        by = kernel.by("domain_context_mapping_one")
        bus = rid >> 8
        contexts = self.context_table(bus)
        if not contexts:
            contexts = self._alloc()
            kernel.ram.write(self.root + bus * ROOT_ENTRY_BYTES, root_entry(contexts), by)
        at = contexts + (rid & 0xFF) * CONTEXT_ENTRY_BYTES
        if is_present(kernel.ram.read_u64(at)):
            raise KernelError(errno.EBUSY, "domain_context_mapping_one", f"requester {rid:#x}")
        kernel.ram.write(at, context_entry(table.top_phys, LEVELS, domain_id), by)
        if kernel.trace is not None:
            kernel.emit("domain_context_mapping_one", {"rid": rid, "did": domain_id}, 0)

    def clear_context(self, rid: int) -> None:
        """``domain_context_clear``: a function is blocked from now on."""
        kernel = self.kernel
        contexts = self.context_table(rid >> 8)
        if not contexts:
            return
        at = contexts + (rid & 0xFF) * CONTEXT_ENTRY_BYTES
        low, high = kernel.ram.read_u64(at), kernel.ram.read_u64(at + 8)
        if not is_present(low):
            return
        kernel.ram.zero(at, CONTEXT_ENTRY_BYTES, kernel.by("domain_context_clear"))
        did = high >> 8 & 0xFFFF
        self._submit(_CONTEXT | _BY_DEVICE | did << 16 | rid << 32, 0)
        self.flush(did)
        if kernel.trace is not None:
            kernel.emit("domain_context_clear", {"rid": rid}, 0)

    def contexts(self) -> Iterator[tuple[int, int]]:
        """Requester id and domain id of every function that has a context entry."""
        ram = self.kernel.ram
        for bus in range(256):
            table = self.context_table(bus)
            for devfn in range(256) if table else ():
                at = table + devfn * CONTEXT_ENTRY_BYTES
                if is_present(ram.read_u64(at)):
                    yield bus << 8 | devfn, ram.read_u64(at + 8) >> 8 & 0xFFFF

    # -- interrupts -----------------------------------------------------------------------------

    def _used_irtes(self) -> Iterator[int]:
        table = self.kernel.ram.read(self.irq_table, _NR_IRTES * IRTE_BYTES)
        return (i for i in range(_NR_IRTES) if table[i * IRTE_BYTES] & 1)

    def post_interrupt(self, rid: int, pi_desc: int, vector: int, index: int | None = None) -> int:
        """``intel_ir_set_vcpu_affinity``: interrupts of a function go to a vCPU; the entry's index.

        Writes entry ``index`` anew, or the first free one; raises -ENOSPC.
        """
        kernel = self.kernel
        if index is None:
            index = next((i for i in range(_NR_IRTES) if i not in self.irtes), None)
            if index is None:
                raise KernelError(errno.ENOSPC, "alloc_irte", f"{_NR_IRTES} entries")
        self.irtes.add(index)
        entry = posted_irte(pi_desc, vector, rid)
        at = self.irq_table + index * IRTE_BYTES
        kernel.ram.write(at, entry, kernel.by("modify_irte"))
        self._submit(_IEC, 0)
        if kernel.trace is not None:
            kernel.emit("modify_irte", {"index": index, "rid": rid}, 0)
        return index

    def clear_irte(self, index: int) -> None:
        """``clear_entries``."""
        kernel = self.kernel
        kernel.ram.zero(self.irq_table + index * IRTE_BYTES, IRTE_BYTES, kernel.by("clear_irte"))
        self.irtes.discard(index)
        self._submit(_IEC, 0)

    # -- live update ----------------------------------------------------------------------------

    def unit_tables(self) -> list[tuple[int, int]]:
        """(physical address, order) of root and interrupt table."""
        return [(self.root, 0), (self.irq_table, 0)]

    def bus_tables(self, bus: int) -> list[tuple[int, int]]:
        """(physical address, order) of the context table of a bus, if there is one."""
        table = self.context_table(bus)
        return [(table, 0)] if table else []

    def shutdown(self, preserved: set[int] | None, buses: set[int]) -> None:
        """``intel_iommu_shutdown``: translation off; or, where requesters are ``preserved``, on.

        Then only context entries of others are cleared, and root entries of buses whose table is
        not preserved; everything cached is forgotten.
        """
        if preserved is None:
            self._command(clear_bits=_TE | _IRE)
        else:
            for rid, _ in list(self.contexts()):
                if rid not in preserved:
                    self.clear_context(rid)
            by = self.kernel.by("clear_unpreserved_context_root_entries")
            for bus in range(256):
                if self.context_table(bus) and bus not in buses:
                    self.kernel.ram.zero(self.root + bus * ROOT_ENTRY_BYTES, ROOT_ENTRY_BYTES, by)
            self.flush()
        if self.kernel.trace is not None:
            self.kernel.emit("intel_iommu_shutdown", {}, preserved is not None)
