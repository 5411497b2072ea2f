"""Tables of regions in the log against memblock's arrays at that moment.

The dumps of ``mm/memblock.c:__memblock_dump_all`` and the "Early memory node ranges" of
``mm/mm_init.c:free_area_init`` @ 7.3. Each line that says otherwise is a difference of its own.
"""

from __future__ import annotations

from khosim.conform.boot_facts import BootFacts
from khosim.conform.dmesg_calls import Dump, Row
from khosim.conform.state import State
from khosim.kernel.memblock import RegionArray, numa_valid_node

__all__ = ("compare_dump", "compare_node_range")

_U64 = (1 << 64) - 1
_MOST = 12  # differences of one table that are worth listing


def compare_dump(state: State, dump: Dump, facts: BootFacts) -> None:
    """Note what ``dump`` says otherwise than memblock's arrays."""
    memblock = state.memblock
    sizes, memory, reserved = dump.lines
    head = "MEMBLOCK configuration"
    if dump.memory_size != memblock.memory.total_size & _U64:
        state.differ(
            sizes, f"{head}: memory size", dump.memory_size, memblock.memory.total_size & _U64
        )
    if dump.reserved_size != memblock.reserved.total_size & _U64:
        state.differ(
            sizes, f"{head}: reserved size", dump.reserved_size, memblock.reserved.total_size
        )
    _compare(state, memory, dump.memory_cnt, dump.memory, memblock.memory, facts.numa)
    _compare(state, reserved, dump.reserved_cnt, dump.reserved, memblock.reserved, facts.numa)


def _compare(
    state: State, line: int, count: int, rows: tuple[Row, ...], array: RegionArray, numa: bool
) -> None:
    call = f"MEMBLOCK configuration: {array.name}"
    simulated = [
        (base, base + size, size, nid if numa and numa_valid_node(nid) else -1, flags)
        for base, size, flags, nid in array.rows()
    ]
    logged = [(row.base, row.end, row.size, row.nid if numa else -1, row.flags) for row in rows]
    if logged == simulated and count == len(simulated):
        return
    if len(logged) == len(simulated):
        for row, said, is_ in zip(rows, logged, simulated, strict=True):
            if said != is_:
                real, own = next((a, b) for a, b in zip(said, is_, strict=True) if a != b)
                state.differ(row.line, f"{call} region", real, own)
        if count != len(simulated):
            state.differ(line, f"{call}.cnt", count, len(simulated))
        return
    known = set(simulated)
    extra = [row for row, said in zip(rows, logged, strict=True) if said not in known]
    said_all = set(logged)
    for row in extra[:_MOST]:
        state.differ(row.line, f"{call} region", row.base, None)
    for region in [region for region in simulated if region not in said_all][:_MOST]:
        state.differ(line, f"{call} region", None, region[0])
    state.differ(line, f"{call}.cnt", count, len(simulated))


def compare_node_range(state: State, line: int, start: int, end: int, nid: int, nth: int) -> None:
    """Note if the ``nth`` node range of the log is not memblock's."""
    memblock = state.memblock
    page_size = memblock.page_size
    ranges = list(memblock.for_each_mem_pfn_range())
    call = "Early memory node range"
    if nth >= len(ranges):
        state.differ(line, call, start, None)
        return
    start_pfn, end_pfn, own_nid = ranges[nth]
    own = (start_pfn * page_size, end_pfn * page_size)
    if own != (start, end):
        real, simulated = (start, own[0]) if start != own[0] else (end, own[1])
        state.differ(line, call, real, simulated)
    elif nid != own_nid and numa_valid_node(own_nid):
        state.differ(line, f"{call}: node", nid, own_nid)
