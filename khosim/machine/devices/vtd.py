"""A DMA remapping unit in the manner of Intel's VT-d, legacy mode.

Root table, context entries and second-stage page tables lie in RAM in the real formats and are read
when they are used; context entries and translations are cached until software invalidates them.
Registers are in :mod:`khosim.machine.devices.vtd_registers`.

Left out: scalable mode, device TLBs, page requests, protected memory regions, several units in one
segment, checks of reserved bits in table entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from khosim.machine.devices.bdf import Bdf
from khosim.machine.devices.events import EventLog
from khosim.machine.devices.iotlb import Iotlb
from khosim.machine.devices.vtd_tables import (
    ADDR_MASK,
    READ,
    WRITE,
    ContextEntry,
    Irte,
    unpack_context,
    unpack_irte,
)
from khosim.machine.devices.walk import VTD, walk
from khosim.machine.ram import Ram

__all__ = ("Fault", "Remapper", "Resolved")

# Fault reasons of the specification; dmar_remap... names: drivers/iommu/intel/dmar.c @ 7.3.
ROOT_ABSENT, CONTEXT_ABSENT, CONTEXT_BAD, BEYOND_WIDTH = 1, 2, 3, 4
NO_WRITE, NO_READ, TABLE_ACCESS, ROOT_ACCESS, CONTEXT_ACCESS = 5, 6, 7, 8, 9
IRTE_INDEX, IRTE_ABSENT, IRTE_ACCESS, COMPATIBILITY, IRTE_SOURCE = 0x21, 0x22, 0x23, 0x25, 0x26


class Fault(NamedTuple):
    """A request that the unit refused; ``reason`` is the number of VT-d's specification."""

    reason: int
    rid: int
    iova: int
    write: bool


class Resolved(NamedTuple):
    """(physical address, bytes) in the order of the I/O addresses, and what stopped them."""

    runs: tuple[tuple[int, int], ...]
    fault: Fault | None


class Remapper:
    """What the unit does with requests. ``root_phys`` and the flags are set by registers."""

    form = VTD

    __slots__ = (
        "caches",
        "contexts",
        "extended_dest",
        "faults",
        "iotlb",
        "irq_entries",
        "irq_table_bits",
        "irq_table_phys",
        "is_ram",
        "log",
        "ram",
        "remaps_irqs",
        "root_phys",
        "segment",
        "translates",
    )

    def __init__(
        self,
        ram: Ram,
        is_ram: Callable[[int, int], bool],
        segment: int,
        log: EventLog,
        caches: bool,
    ) -> None:
        self.ram, self.is_ram = ram, is_ram
        self.segment, self.log, self.caches = segment, log, caches
        self.faults: list[Fault] = []
        self.iotlb = Iotlb()
        self.contexts: dict[int, ContextEntry] = {}
        self.irq_entries: dict[int, Irte] = {}
        self.power_on()

    def power_on(self) -> None:
        """Everything off, nothing cached."""
        self.translates = self.remaps_irqs = self.extended_dest = False
        self.root_phys = self.irq_table_phys = 0
        self.irq_table_bits = 1
        self.iotlb.invalidate()
        self.contexts.clear()
        self.irq_entries.clear()

    # -- DMA --------------------------------------------------------------------------------------

    def translate(self, rid: int, iova: int, len_bytes: int, write: bool) -> Resolved:
        """Where a device's request goes. Uses caches and fills them; records a fault."""
        if not self.translates:
            return Resolved(((iova, len_bytes),), None)
        context = self.contexts.get(rid) if self.caches else None
        if context is None:
            found = self.context(rid)
            if isinstance(found, int):
                return self._refuse((), found, rid, iova, write, False)
            context = found
            if self.caches:
                self.contexts[rid] = context
        return self._resolve(context, rid, iova, len_bytes, write, self.caches)

    def walk(self, rid: int, iova: int, len_bytes: int, write: bool) -> Resolved:
        """The same by what stands in RAM now: no cache is used or filled, nothing recorded."""
        if not self.translates:
            return Resolved(((iova, len_bytes),), None)
        context = self.context(rid)
        if isinstance(context, int):
            return Resolved((), Fault(context, rid, iova, write))
        silent = context._replace(fault_silent=True)
        return self._resolve(silent, rid, iova, len_bytes, write, False)

    def context(self, rid: int) -> ContextEntry | int:
        """The context entry in RAM of a requester, or the reason why there is none."""
        root = self.root_phys + (rid >> 8) * 16
        if not self.is_ram(root, 16):
            return ROOT_ACCESS
        low = self.ram.read_u64(root)
        if not low & 1:
            return ROOT_ABSENT
        at = (low & ADDR_MASK) + (rid & 0xFF) * 16
        if not self.is_ram(at, 16):
            return CONTEXT_ACCESS
        context = unpack_context(self.ram.read_u64(at), self.ram.read_u64(at + 8))
        if context is None:
            return CONTEXT_ABSENT
        return context if context.levels else CONTEXT_BAD

    def _resolve(
        self,
        context: ContextEntry,
        rid: int,
        iova: int,
        len_bytes: int,
        write: bool,
        cached: bool,
    ) -> Resolved:
        wanted = WRITE if write else READ
        if context.pass_through and context.rights & wanted:
            return Resolved(((iova, len_bytes),), None)
        frame, end = iova >> 12, iova + len_bytes + 4095 >> 12
        limit = 1 << 9 * context.levels
        runs: list[tuple[int, int]] = []
        reason = BEYOND_WIDTH if not context.pass_through else NO_WRITE if write else NO_READ
        end_here = min(end, limit)
        while frame < end_here:
            extent, until = None, end_here
            if cached:
                extent, until = self.iotlb.look_up(context.did, frame, end_here)
            if extent is not None and extent.rights & wanted:
                extents, stop = [extent], extent.end
            else:
                if extent is not None:
                    until = extent.end  # it lacks the right: look whether the table has it by now
                extents, stop = walk(
                    self.ram,
                    self.is_ram,
                    context.table_phys,
                    context.levels,
                    frame,
                    until,
                    self.form,
                    context.rights,
                )
                if cached:
                    self.iotlb.fill(context.did, extents)
            for first, last, delta, rights, _ in extents:
                if not rights & wanted:
                    stop, until = first, last
                    break
                start = max(iova, first << 12)
                stop_byte = min(iova + len_bytes, last << 12)
                phys = start + (delta << 12)
                if runs and sum(runs[-1]) == phys:
                    runs[-1] = runs[-1][0], runs[-1][1] + stop_byte - start
                else:
                    runs.append((phys, stop_byte - start))
                frame = last
            if frame < until:
                reason = TABLE_ACCESS if stop < 0 else NO_WRITE if write else NO_READ
                break
        if frame >= end:
            return Resolved(tuple(runs), None)
        at = max(iova, frame << 12)
        silent = context.fault_silent
        return self._refuse(tuple(runs), reason, rid, at, write, silent)

    def _refuse(
        self,
        runs: tuple[tuple[int, int], ...],
        reason: int,
        rid: int,
        iova: int,
        write: bool,
        silent: bool,
    ) -> Resolved:
        fault = Fault(reason, rid, iova, write)
        if not silent:
            self.record(fault)
        return Resolved(runs, fault)

    def record(self, fault: Fault) -> None:
        """Keep a fault; the registers show the first ones."""
        self.faults.append(fault)
        name = str(Bdf.of_rid(self.segment, fault.rid))
        self.log.add("fault", name, **fault._asdict())

    def record_rmp(self, rid: int, phys: int) -> None:
        """A write was stopped by the reverse map table: AMD's units log it."""

    # -- interrupts -------------------------------------------------------------------------------

    def irte(self, rid: int, address: int, data: int) -> Irte | None:
        """The entry for a message in remappable format; None, and a fault recorded, where none."""
        index = address >> 5 & 0x7FFF | (address >> 2 & 1) << 15
        if address >> 3 & 1:
            index += data & 0xFFFF
        if not address >> 4 & 1:
            return self._refuse_irq(COMPATIBILITY, rid, 0)
        if index >= 1 << self.irq_table_bits:
            return self._refuse_irq(IRTE_INDEX, rid, index)
        entry = self.irq_entries.get(index)
        if entry is None:
            at = self.irq_table_phys + 16 * index
            if not self.is_ram(at, 16):
                return self._refuse_irq(IRTE_ACCESS, rid, index)
            low, high = self.ram.read_u64(at), self.ram.read_u64(at + 8)
            entry = unpack_irte(low, high)
            if entry is None:
                return self._refuse_irq(IRTE_ABSENT, rid, index)
            if self.caches:
                self.irq_entries[index] = entry
        # SQ: how many of the low bits of the function number do not matter, from bit 2 on.
        ignored = {0: 0, 1: 4, 2: 6, 3: 7}[entry.qualifier]
        if entry.check == 1 and (rid ^ entry.sid) & ~ignored & 0xFFFF:
            return self._refuse_irq(IRTE_SOURCE, rid, index)
        if entry.check == 2 and not entry.sid >> 8 <= rid >> 8 <= entry.sid & 0xFF:
            return self._refuse_irq(IRTE_SOURCE, rid, index)
        return entry

    def _refuse_irq(self, reason: int, rid: int, index: int) -> Irte | None:
        self.record(Fault(reason, rid, index << 48, False))
        return None

    # -- state ------------------------------------------------------------------------------------

    def remapper_state(self) -> list[Any]:
        """Flags and caches as plain data."""
        flags = [self.translates, self.remaps_irqs, self.extended_dest]
        tables = [self.root_phys, self.irq_table_phys, self.irq_table_bits]
        contexts = [[rid, list(entry)] for rid, entry in self.contexts.items()]
        entries = [[index, list(entry)] for index, entry in self.irq_entries.items()]
        return [flags, tables, self.iotlb.state(), contexts, entries, [*map(list, self.faults)]]

    def restore_remapper(self, state: list[Any]) -> None:
        """Become what :meth:`remapper_state` described."""
        flags, tables, iotlb, contexts, entries, faults = state
        self.translates, self.remaps_irqs, self.extended_dest = flags
        self.root_phys, self.irq_table_phys, self.irq_table_bits = tables
        self.iotlb.restore(iotlb)
        self.contexts.clear()
        self.contexts.update((rid, ContextEntry(*entry)) for rid, entry in contexts)
        self.irq_entries.clear()
        self.irq_entries.update((index, Irte(*entry)) for index, entry in entries)
        self.faults[:] = [Fault(*fault) for fault in faults]
