"""An IOMMU in the manner of AMD's: device table, page tables, command buffer and event log in RAM.

Formats of AMD's "I/O Virtualization Technology (IOMMU) Specification" (48882), which
``drivers/iommu/amd/amd_iommu_types.h @ 7.3`` names too. What it has in common with VT-d, the caches
and the way of a request through them, is :class:`Remapper`; a :class:`Fault` has the reasons of
VT-d's specification, and the log the event codes of AMD's.

Left out: interrupt remapping (messages go through as they are), guest tables, peripheral page
requests, device IOTLBs, page sizes other than 4 KiB, 2 MiB and 1 GiB, tables that skip a level, the
unit's own interrupts.
"""

from __future__ import annotations

from typing import Any

from khosim.machine.devices.vtd import (
    CONTEXT_ABSENT,
    CONTEXT_BAD,
    ROOT_ACCESS,
    TABLE_ACCESS,
    Fault,
    Remapper,
)
from khosim.machine.devices.vtd_registers import VtdUnit
from khosim.machine.devices.vtd_tables import ADDR_MASK, ContextEntry
from khosim.machine.devices.walk import AMD
from khosim.machine.ram import Ram

__all__ = ("AmdUnit", "Unit", "unpack_dte")

DEV_TABLE, CMD_BUF, EVT_BUF, CONTROL = 0x0, 0x8, 0x10, 0x18
CMD_HEAD, CMD_TAIL, EVT_HEAD, EVT_TAIL, STATUS = 0x2000, 0x2008, 0x2010, 0x2018, 0x2020
_PLAIN = (DEV_TABLE, CMD_BUF, EVT_BUF, CMD_HEAD, EVT_HEAD, EVT_TAIL)
ENABLE, LOGS, COMMANDS = 1, 1 << 2, 1 << 12
OVERFLOW, WAITED, LOG_RUNS, COMMANDS_RUN = 1, 1 << 2, 1 << 3, 1 << 4
ILLEGAL_DTE, IO_PAGE_FAULT, DTE_ERROR, TABLE_ERROR, ILLEGAL_COMMAND = 1, 2, 3, 4, 5
RMP_FAULT = 0xD
_BY = (-1, "iommu")


def unpack_dte(low: int, high: int) -> ContextEntry | None:
    """The first two words of a device table entry; None where translation is not valid.

    A device whose entry is not valid at all (V clear) passes.
    """
    if not low & 1:
        return ContextEntry(False, True, 0, 0, 0)
    if not low & 2:
        return None
    levels, rights = low >> 9 & 7, low >> 61 & 3
    silent = bool(high >> 33 & 3)
    if levels == 7:
        return ContextEntry(silent, False, 0, 0, high & 0xFFFF)
    table = low & ADDR_MASK
    return ContextEntry(silent, not levels, table, levels, high & 0xFFFF, rights)


class AmdUnit(Remapper):
    """The unit with its registers at ``base``."""

    form = AMD
    size = 1 << 14
    passes_compatible = True

    __slots__ = ("_registers", "base")

    def __init__(self, *arguments: Any, base: int) -> None:
        self.base = base
        self._registers: dict[int, int] = {}
        super().__init__(*arguments)

    def power_on(self) -> None:
        """All registers zero: everything passes."""
        super().power_on()
        self._registers = {}

    # -- tables -----------------------------------------------------------------------------------

    def context(self, rid: int) -> ContextEntry | int:
        """The device table entry in RAM of a requester, or the reason why it is of no use."""
        table = self._registers.get(DEV_TABLE, 0)
        at = (table & ADDR_MASK) + 32 * rid
        if 32 * rid >= (table & 0x1FF) + 1 << 12 or not self.is_ram(at, 32):
            return ROOT_ACCESS
        entry = unpack_dte(self.ram.read_u64(at), self.ram.read_u64(at + 8))
        if entry is None:
            return CONTEXT_ABSENT
        return entry if entry.levels or entry.pass_through else CONTEXT_BAD

    # -- accesses ---------------------------------------------------------------------------------

    def read(self, offset: int, size: int = 4) -> int:
        """A register, or the half of one."""
        value = self._registers.get(offset & ~7, 0)
        if size == 8:
            return value
        return value >> 32 if offset & 4 else value & 0xFFFF_FFFF

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Write a register, or the half of one, which keeps the other half."""
        held = self._registers
        at = offset & ~7
        if size == 4:
            was = held.get(at, 0)
            if offset & 4:
                value = was & 0xFFFF_FFFF | value << 32
            else:
                value |= was >> 32 << 32
        if at == CONTROL:
            held[CONTROL] = value
            self.translates = bool(value & ENABLE)
            runs = (LOG_RUNS if value & LOGS else 0) | (COMMANDS_RUN if value & COMMANDS else 0)
            runs = runs if value & ENABLE else 0
            held[STATUS] = held.get(STATUS, 0) & ~(LOG_RUNS | COMMANDS_RUN) | runs
        elif at == STATUS:
            held[STATUS] = held.get(STATUS, 0) & ~(value & 0x7)
        elif at == CMD_TAIL or at in _PLAIN:
            held[at] = value
            if at in (CMD_BUF, EVT_BUF):
                head = CMD_HEAD if at == CMD_BUF else EVT_HEAD
                held[head] = held[head + 8] = 0
            if at == DEV_TABLE:
                self.root_phys = value & ADDR_MASK
        if at in (CONTROL, CMD_TAIL):
            self._run_commands()

    # -- commands ---------------------------------------------------------------------------------

    def _run_commands(self) -> None:
        held = self._registers
        buffer = held.get(CMD_BUF, 0)
        size = 16 << (buffer >> 56 & 0xF)
        tail = held.get(CMD_TAIL, 0) & 0x7FFF0
        while held.get(STATUS, 0) & COMMANDS_RUN and held.get(CMD_HEAD, 0) != tail % size:
            at = (buffer & ADDR_MASK) + held.get(CMD_HEAD, 0)
            good = self.is_ram(at, 16)
            if not good or not self._command(self.ram.read_u64(at), self.ram.read_u64(at + 8)):
                held[STATUS] &= ~COMMANDS_RUN
                self._log_event(ILLEGAL_COMMAND, 0, 0, 0, at)
                return
            held[CMD_HEAD] = (held.get(CMD_HEAD, 0) + 16) % size

    def _command(self, low: int, high: int) -> bool:
        code = low >> 60
        if code == 1:
            if low & 1:
                at = low & 0xF_FFFF_FFFF_FFF8
                if not self.is_ram(at, 8):
                    return False
                Ram.write_u64(self.ram, at, high, _BY)
            if low & 2:
                self._registers[STATUS] |= WAITED
        elif code == 2:
            self.contexts.pop(low & 0xFFFF, None)
        elif code == 3:
            first, count = high >> 12 & (1 << 40) - 1, 1
            if high & 1:  # the lowest zero of the address says how many pages there are
                count = ((first ^ first + 1) + 1) & (1 << 40) - 1
                first &= ~(count - 1)
            if high >> 63 == 0 and high >> 12 == (1 << 51) - 1 and high & 1:
                self.iotlb.invalidate(low >> 32 & 0xFFFF)
            else:
                self.iotlb.invalidate_pages(low >> 32 & 0xFFFF, first, first + count)
        elif code == 8:
            self.iotlb.invalidate()
            self.contexts.clear()
        else:
            return code in (4, 5)
        return True

    # -- faults -----------------------------------------------------------------------------------

    def record(self, fault: Fault) -> None:
        """Keep a fault, and write it to the log."""
        super().record(fault)
        codes = {
            ROOT_ACCESS: DTE_ERROR,
            CONTEXT_BAD: ILLEGAL_DTE,
            CONTEXT_ABSENT: ILLEGAL_DTE,
            TABLE_ACCESS: TABLE_ERROR,
        }
        context = self.context(fault.rid)
        domain = context.did if isinstance(context, ContextEntry) else 0
        flags = 0x20 if fault.write else 0
        code = codes.get(fault.reason, IO_PAGE_FAULT)
        self._log_event(code, fault.rid, domain, flags, fault.iova)

    def record_rmp(self, rid: int, phys: int) -> None:
        """An RMP_FAULT event."""
        self._log_event(RMP_FAULT, rid, 0, 0x20, phys)

    def _log_event(self, code: int, rid: int, domain: int, flags: int, address: int) -> None:
        held = self._registers
        buffer = held.get(EVT_BUF, 0)
        size = 16 << (buffer >> 56 & 0xF)
        tail = held.get(EVT_TAIL, 0)
        at = (buffer & ADDR_MASK) + tail
        if not held.get(STATUS, 0) & LOG_RUNS or not self.is_ram(at, 16):
            return
        if (tail + 16) % size == held.get(EVT_HEAD, 0):
            held[STATUS] = held[STATUS] & ~LOG_RUNS | OVERFLOW
            return
        Ram.write_u64(self.ram, at, rid | domain << 32 | flags << 48 | code << 60, _BY)
        Ram.write_u64(self.ram, at + 8, address, _BY)
        held[EVT_TAIL] = (tail + 16) % size

    # -- state ------------------------------------------------------------------------------------

    def state(self) -> list[Any]:
        """All of it as plain data."""
        return [[[at, value] for at, value in self._registers.items()], self.remapper_state()]

    def restore(self, state: list[Any]) -> None:
        """Become what :meth:`state` described."""
        registers, remapper = state
        self._registers = dict(registers)
        self.restore_remapper(remapper)


Unit = VtdUnit | AmdUnit
"""Either kind of IOMMU."""
