"""The register page of a VT-d unit, and its queue of invalidations.

Offsets and bits are those of the specification and of ``drivers/iommu/intel/iommu.h @ 7.3``. What a
register starts is done at once, so a wait descriptor always finds everything before it finished.
Left out: write buffers (WBF does nothing), cache maintenance for tables, page requests, performance
counters, the device TLB descriptors (taken and ignored).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from khosim.machine.devices.events import EventLog
from khosim.machine.devices.vtd import Fault, Remapper
from khosim.machine.devices.vtd_tables import ADDR_MASK
from khosim.machine.ram import Ram

__all__ = ("VtdUnit",)

VER, CAP, ECAP, GCMD, GSTS, RTADDR, CCMD = 0x00, 0x08, 0x10, 0x18, 0x1C, 0x20, 0x28
FSTS, FECTL, FEDATA, FEADDR, FEUADDR = 0x34, 0x38, 0x3C, 0x40, 0x44
IQH, IQT, IQA, ICS, IRTA = 0x80, 0x88, 0x90, 0x9C, 0xB8
FAULTS, IVA, IOTLB = 0x400, 0x500, 0x508
NR_FAULTS = 8
_NEXT_FAULT = -1  # no register: which of the recording ones is filled next

TE, SRTP, QIE, IRE, SIRTP, CFI = 1 << 31, 1 << 30, 1 << 26, 1 << 25, 1 << 24, 1 << 23
_CAP = (
    6  # 16-bit domain ids
    | 1 << 10  # tables of 4 levels
    | 47 << 16  # 48 bits of address
    | (FAULTS >> 4) << 24
    | 0b11 << 34  # leaves of 2 MiB and 1 GiB
    | 1 << 39  # invalidation of single pages
    | (NR_FAULTS - 1) << 40
    | 18 << 48  # up to 2**18 of them at once
    | 1 << 59  # posted interrupts
)
_ECAP = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | (IVA >> 4) << 8
_BY_UNIT = (-1, "iommu")


class VtdUnit(Remapper):
    """A unit with its registers; ``base`` is where they are in physical memory."""

    size = 4096

    __slots__ = ("_registers", "base", "send")

    def __init__(
        self,
        ram: Ram,
        is_ram: Callable[[int, int], bool],
        segment: int,
        log: EventLog,
        caches: bool,
        *,
        base: int,
        send: Callable[[int, int], None],
    ) -> None:
        self.base = base
        self.send = send
        self._registers: dict[int, int] = {}
        super().__init__(ram, is_ram, segment, log, caches)

    def power_on(self) -> None:
        """All registers as after reset."""
        super().power_on()
        self._registers = {VER: 0x10, CAP: _CAP, ECAP: _ECAP, FECTL: 1 << 31}

    # -- accesses ---------------------------------------------------------------------------------

    def read(self, offset: int, size: int = 4) -> int:
        """A register, or the half of one, of 4 or 8 bytes."""
        if FAULTS <= offset < FAULTS + 16 * NR_FAULTS or size == 8:
            low = self._registers.get(offset, 0)
            if offset & 7:
                return self._registers.get(offset & ~7, 0) >> 32
            return low if size == 8 else low & 0xFFFF_FFFF
        if offset in self._registers:
            return self._registers[offset] & 0xFFFF_FFFF
        if offset & 4 and offset - 4 in (CAP, ECAP, RTADDR, CCMD, IQH, IQT, IQA, IRTA, IVA, IOTLB):
            return self._registers.get(offset - 4, 0) >> 32
        return 0

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Write a register: a 64-bit one acts when its upper half is written."""
        registers = self._registers
        wide = (RTADDR, CCMD, IQT, IQA, IRTA, IVA, IOTLB)
        if FAULTS <= offset < FAULTS + 16 * NR_FAULTS:
            self._clear_fault(offset, value, size)
        elif offset == GCMD:
            self._command(value)
        elif offset == FSTS:
            registers[FSTS] = registers.get(FSTS, 0) & ~(value & 0x71)
        elif offset == FECTL:
            self._mask_fault_event(bool(value >> 31))
        elif offset in (FEDATA, FEADDR, FEUADDR):
            registers[offset] = value & 0xFFFF_FFFF
        elif offset == ICS:
            registers[ICS] = registers.get(ICS, 0) & ~(value & 1)
        elif offset in wide:
            if size == 4:
                value |= registers.get(offset, 0) & ~0xFFFF_FFFF
            registers[offset] = value
            if size == 8 or offset == IQT:
                self._wide(offset, value)
        elif offset - 4 in wide and offset & 4:
            value = registers.get(offset - 4, 0) & 0xFFFF_FFFF | value << 32
            registers[offset - 4] = value
            self._wide(offset - 4, value)

    def _command(self, value: int) -> None:
        status = self._registers.get(GSTS, 0)
        if value & SRTP:
            self.root_phys = self._registers.get(RTADDR, 0) & ADDR_MASK
            status |= SRTP
        if value & SIRTP:
            table = self._registers.get(IRTA, 0)
            self.irq_table_phys = table & ADDR_MASK
            self.irq_table_bits = (table & 0xF) + 1
            self.extended_dest = bool(table >> 11 & 1)
            status |= SIRTP
        if value & QIE and not status & QIE:
            self._registers[IQH] = 0
        kept = TE | QIE | IRE | CFI
        status = status & ~kept | value & kept
        self._registers[GSTS] = status
        self.translates, self.remaps_irqs = bool(status & TE), bool(status & IRE)

    @property
    def passes_compatible(self) -> bool:
        """Whether messages in the old format go through while interrupts are remapped."""
        return bool(self._registers.get(GSTS, 0) & CFI) and not self.extended_dest

    def _wide(self, offset: int, value: int) -> None:
        if offset == CCMD and value >> 63:
            self._invalidate_contexts(
                value >> 61 & 3, value & 0xFFFF, value >> 16 & 0xFFFF, value >> 32 & 3
            )
            granted = value >> 61 & 3
            self._registers[CCMD] = value & ~(1 << 63 | 3 << 59) | granted << 59
        elif offset == IOTLB and value >> 63:
            granted = value >> 60 & 3
            self._invalidate_iotlb(granted, value >> 32 & 0xFFFF, self._registers.get(IVA, 0))
            self._registers[IOTLB] = value & ~(1 << 63 | 3 << 57) | granted << 57
        elif offset == IQT:
            self._run_queue()

    # -- invalidation -----------------------------------------------------------------------------

    def _invalidate_contexts(self, how: int, did: int, sid: int, ignored: int) -> None:
        if how == 1:
            self.contexts.clear()
            return
        mask = ~(0, 4, 6, 7)[ignored] & 0xFFFF
        for rid, entry in list(self.contexts.items()):
            if entry.did == did and (how == 2 or not (rid ^ sid) & mask):
                del self.contexts[rid]

    def _invalidate_iotlb(self, how: int, did: int, address: int) -> None:
        if how == 1:
            self.iotlb.invalidate()
        elif how == 2:
            self.iotlb.invalidate(did)
        elif how == 3:
            count = 1 << (address & 0x3F)
            first = address >> 12 & ~(count - 1)
            self.iotlb.invalidate_pages(did, first, first + count)

    def _run_queue(self) -> None:
        registers = self._registers
        if not registers.get(GSTS, 0) & QIE:
            return
        queue = registers.get(IQA, 0)
        base, size = queue & ADDR_MASK, 4096 << (queue & 7)
        head, tail = registers.get(IQH, 0), registers.get(IQT, 0) & 0x7FFF0
        while head != tail % size:
            if not self.is_ram(base + head, 16):
                registers[FSTS] = registers.get(FSTS, 0) | 1 << 4
                break
            low, high = self.ram.read_u64(base + head), self.ram.read_u64(base + head + 8)
            if not self._descriptor(low, high):
                registers[FSTS] = registers.get(FSTS, 0) | 1 << 4
                break
            head = (head + 16) % size
        registers[IQH] = head

    def _descriptor(self, low: int, high: int) -> bool:
        kind = low & 0xF
        did = low >> 16 & 0xFFFF
        if kind == 1:
            self._invalidate_contexts(low >> 4 & 3, did, low >> 32 & 0xFFFF, low >> 48 & 3)
        elif kind == 2:
            self._invalidate_iotlb(low >> 4 & 3, did, high)
        elif kind == 4:
            if low >> 4 & 1:
                first, count = low >> 32 & 0xFFFF, 1 << (low >> 27 & 0x1F)
                for index in range(first & ~(count - 1), (first & ~(count - 1)) + count):
                    self.irq_entries.pop(index, None)
            else:
                self.irq_entries.clear()
        elif kind == 5:
            if low >> 5 & 1 and self.is_ram(high & ~3, 4):
                Ram.write_u32(self.ram, high & ~3, low >> 32, _BY_UNIT)
            if low >> 4 & 1:
                self._registers[ICS] = 1
        else:
            return kind == 3
        return True

    # -- faults -----------------------------------------------------------------------------------

    def record(self, fault: Fault) -> None:
        """Keep a fault, and put it into the next free recording register."""
        super().record(fault)
        registers = self._registers
        status = registers.get(FSTS, 0)
        if status & 1:
            return
        index = registers.get(_NEXT_FAULT, 0)
        at = FAULTS + 16 * index
        if registers.get(at + 8, 0) >> 63:
            registers[FSTS] = status | 1
            return
        page = fault.iova & ~0xFFF if fault.reason < 0x20 else fault.iova
        registers[at] = page
        registers[at + 8] = 1 << 63 | int(not fault.write) << 62 | fault.reason << 32 | fault.rid
        if not status & 2:
            status = status & ~0xFF00 | 2 | index << 8
        registers[FSTS] = status
        registers[_NEXT_FAULT] = (index + 1) % NR_FAULTS
        if registers[FECTL] >> 31:
            registers[FECTL] |= 1 << 30
        else:
            self.send(registers.get(FEADDR, 0), registers.get(FEDATA, 0))

    def _mask_fault_event(self, is_masked: bool) -> None:
        registers = self._registers
        pending = registers[FECTL] & 1 << 30
        registers[FECTL] = 1 << 31 | pending if is_masked else 0
        if pending and not is_masked:
            self.send(registers.get(FEADDR, 0), registers.get(FEDATA, 0))

    def _clear_fault(self, offset: int, value: int, size: int) -> None:
        top = offset + size == (offset & ~0xF) + 16
        if not top or not value >> (8 * size - 1):
            return
        self._registers[(offset & ~0xF) + 8] &= ~(1 << 63)
        if not any(self._registers.get(FAULTS + 16 * i + 8, 0) >> 63 for i in range(NR_FAULTS)):
            self._registers[FSTS] &= ~2

    # -- state ------------------------------------------------------------------------------------

    def state(self) -> list[Any]:
        """All of it as plain data."""
        return [[[at, value] for at, value in self._registers.items()], self.remapper_state()]

    def restore(self, state: list[Any]) -> None:
        """Become what :meth:`state` described."""
        registers, remapper = state
        self._registers = dict(registers)
        self.restore_remapper(remapper)
