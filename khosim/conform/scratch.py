"""The handover's own part of a boot: scratch reserved, scratch extended, preserved memory reserved.

Runs :func:`~khosim.kernel.kho_scratch.kho_reserve_scratch` and ``kho_extend_scratch``, the kernel's
``kho_memory_init`` and ``kho_memory_init_early`` @ 7.3 (and 7.2, which extends nothing and has no
huge pages to leave out), on a hypothesis's memblock. Both make their calls all at once; the calls
are written down as :data:`~khosim.conform.state.Expected`, to be found in the log one by one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from khosim.conform.boot_facts import BootFacts
from khosim.conform.dmesg_calls import Event, Free, Request, Reserve, symbol_of
from khosim.conform.predecessor import Predecessor, PreservedBlock
from khosim.conform.start import subtract
from khosim.conform.state import Expected, State
from khosim.kernel.arch import find_arch
from khosim.kernel.kho_scratch import kho_reserve_scratch, read_scratch_array
from khosim.kernel.memblock import MEMBLOCK_RSRV_KERN, numa_valid_node
from khosim.kernel.release import RELEASES
from khosim.machine.ram import MAX_PHYS, Ram

__all__ = (
    "expected_calls",
    "extend_from_node_ranges",
    "extend_scratch",
    "is_kho_init",
    "is_kho_radix",
    "reserve_preserved",
    "reserve_scratch",
)

_U64 = (1 << 64) - 1
_GIB_SHIFT = 30
_BY = (0, "replay")
_INIT = ("kho_memory_init", "kho_reserve_scratch")
_RADIX = ("kho_radix", "__kho_radix", "kho_ext", "kho_memory_init_early")


def is_kho_init(event: Event) -> bool:
    """Whether an allocation is one of ``kho_memory_init``."""
    if not isinstance(event, Request):
        return False
    symbol = symbol_of(event.caller)
    return symbol.startswith(_INIT) and not symbol.startswith("kho_memory_init_early")


def is_kho_radix(event: Event) -> bool:
    """Whether an allocation is one of the tree of busy blocks."""
    return isinstance(event, Request) and symbol_of(event.caller).startswith(_RADIX)


def reserve_scratch(state: State, facts: BootFacts, events: list[Event]) -> None:
    """Run ``kho_reserve_scratch``; leaves ``state.scratch`` and the calls to expect."""
    memblock = state.memblock
    arch = find_arch(facts.arch, facts.page_size)
    aligns = [
        event.align
        for event in events
        if isinstance(event, Request)
        and is_kho_init(event)
        and event.symbol == "memblock_phys_alloc_range"
    ]
    # MAX_ORDER_NR_PAGES is a matter of the build, and the log says which it was.
    align = max(aligns, default=arch.scratch_align_bytes)
    arch = dataclasses.replace(
        arch,
        low_address_limit=facts.low_limit,
        max_page_order=(align // arch.page_size).bit_length() - 1,
    )
    nodes = sorted({nid for nid in memblock.memory.nid if numa_valid_node(nid)}) or [0]
    ram = Ram(min(MAX_PHYS, memblock.memblock_end_of_DRAM()), page_size=facts.page_size)
    state.record = []
    said: list[str] = []
    array, count, done = kho_reserve_scratch(
        memblock, ram, arch, RELEASES["7.3"], facts.scratch_sizes, nodes, _BY, said.append
    )
    state.said = tuple(said)
    state.expected.extend(expected_calls(state.record))
    state.record = None
    state.scratch = read_scratch_array(ram.read(array, 16 * count)) if done else []


def extend_scratch(state: State, predecessor: Predecessor) -> bool:
    """Run ``kho_extend_scratch`` with the predecessor's tree; whether it has one."""
    state.record = []
    done = predecessor.extend_scratch(state.memblock)
    calls = [call for call in state.record if call[0] != "memblock_mark_kho_scratch"]
    state.expected.extend(expected_calls(calls))
    state.record = None
    return done


def reserve_preserved(state: State, blocks: list[PreservedBlock]) -> None:
    """Run ``kho_preserved_memory_reserve`` for every block."""
    state.memblock.memblock_reserve_many(
        [phys for phys, _ in blocks], [phys + size for phys, size in blocks]
    )
    state.expected.extend(
        Reserve(0, phys, phys + size & _U64, -1, 0, "kho_preserved_memory_reserve")
        for phys, size in blocks
    )


def expected_calls(record: list[tuple[str, tuple[Any, ...], Any]]) -> list[Expected]:
    """Traced memblock calls as the log prints them."""
    calls: list[Expected] = []
    for symbol, args, result in record:
        nid = -1
        if symbol == "memblock_phys_free":
            calls.append(Free(0, args[0], args[0] + args[1] & _U64, ""))
            continue
        if symbol == "memblock_alloc_try_nid":
            size, align, start, end, nid = args
            calls.append(Request(0, symbol, size, align, start, end, nid, False, ""))
        elif symbol == "memblock_phys_alloc_range":
            size, align, start, end = args
            calls.append(Request(0, symbol, size, align, start, end, -1, False, ""))
        elif symbol == "memblock_alloc_range_nid":
            size, nid = args[0], args[4]
        else:
            continue
        if result:
            end = result + size & _U64
            calls.append(Reserve(0, result, end, nid, MEMBLOCK_RSRV_KERN, symbol))
    return calls


def extend_from_node_ranges(
    state: State, facts: BootFacts, incoming: list[tuple[int, int]], events: list[Event]
) -> None:
    """The extension without the predecessor's tree, from where the log says memory is split.

    ``free_area_init`` prints a range for each run of memory of one node and equal flags. A range
    that holds more than an incoming area is scratch; one beside such a range is not; what that
    leaves open follows from its 1 GiB block, or from the blocks that were preserved there.
    """
    memblock = state.memblock
    areas = [(base, base + size) for base, size in incoming]
    ranges = [(start, end, nid) for _, start, end, nid in facts.node_ranges]
    extended = [
        any(start < high and low < end for low, high in areas) for start, end, _nid in ranges
    ]
    busy: list[tuple[int, int]] = []
    free: list[tuple[int, int]] = []
    for i, (start, end, nid) in enumerate(ranges):
        if extended[i]:
            free += [_blocks(*more) for more in subtract([(start, end)], areas)]
        elif any(
            extended[j] and ranges[j][2] == nid and (ranges[j][1] == start or ranges[j][0] == end)
            for j in (i - 1, i + 1)
            if 0 <= j < len(ranges)
        ):
            busy.append(_blocks(start, end))
    busy += [
        _blocks(event.base, event.end)
        for event in events
        if isinstance(event, Reserve) and symbol_of(event.caller).startswith("kho_preserved")
    ]
    last = memblock.memblock_end_of_DRAM()
    for start, end in [*subtract([(0, last)], sorted(set(busy))), *free]:
        if start < min(end, last):
            memblock.memblock_mark_kho_scratch(start, min(end, last) - start)


def _blocks(start: int, end: int) -> tuple[int, int]:
    """[start, end) and all else of the 1 GiB blocks that it meets."""
    return start >> _GIB_SHIFT << _GIB_SHIFT, (end - 1 >> _GIB_SHIFT) + 1 << _GIB_SHIFT
