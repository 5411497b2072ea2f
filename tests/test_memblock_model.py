"""memblock beside a dumb model that knows each page by itself, and in bulk beside one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim.kernel.memblock import (
    MAX_NUMNODES,
    MEMBLOCK_DRIVER_MANAGED,
    MEMBLOCK_HOTPLUG,
    MEMBLOCK_KHO_SCRATCH,
    MEMBLOCK_NOMAP,
    MEMBLOCK_NONE,
    MEMBLOCK_RSRV_KERN,
    MEMBLOCK_RSRV_NOINIT,
    NUMA_NO_NODE,
    Memblock,
)

PAGE = 4096
UNIT = 1024  # the model's grain: a quarter of a page
NR_UNITS = 96
Units: TypeAlias = dict[int, tuple[int, int]]  # unit → (flags, nid)

spans = st.tuples(st.integers(0, NR_UNITS - 1), st.integers(0, 40)).map(
    lambda span: (span[0], min(span[1], NR_UNITS - span[0]))
)
nids = st.sampled_from([NUMA_NO_NODE, 0, 1, MAX_NUMNODES])
memory_flags = st.sampled_from([0, 0, MEMBLOCK_DRIVER_MANAGED, MEMBLOCK_HOTPLUG, MEMBLOCK_NOMAP])
reserved_flags = st.sampled_from([0, MEMBLOCK_RSRV_KERN, MEMBLOCK_RSRV_NOINIT])

changes = st.one_of(
    st.tuples(st.just("memblock_add"), spans),
    st.tuples(st.just("memblock_add_node"), spans, nids, memory_flags),
    st.tuples(st.just("memblock_reserve_node"), spans, nids, reserved_flags),
    st.tuples(
        st.sampled_from(
            [
                "memblock_remove",
                "memblock_reserve",
                "memblock_reserve_kern",
                "memblock_phys_free",
                "memblock_mark_hotplug",
                "memblock_clear_hotplug",
                "memblock_mark_nomap",
                "memblock_clear_nomap",
                "memblock_mark_kho_scratch",
                "memblock_clear_kho_scratch",
                "memblock_reserved_mark_noinit",
                "memblock_reserved_mark_kern",
            ]
        ),
        spans,
    ),
    st.tuples(st.just("memblock_set_node"), spans, nids, st.booleans()),
)

FLAG_OF = {
    "hotplug": MEMBLOCK_HOTPLUG,
    "nomap": MEMBLOCK_NOMAP,
    "kho_scratch": MEMBLOCK_KHO_SCRATCH,
    "noinit": MEMBLOCK_RSRV_NOINIT,
    "kern": MEMBLOCK_RSRV_KERN,
}


@dataclass
class Model:
    """Two dicts; no regions, no order, no cleverness."""

    memory: Units = field(default_factory=dict)
    reserved: Units = field(default_factory=dict)

    def apply(self, call: str, span: tuple[int, int], *rest: Any) -> None:
        """Do to each unit of ``span`` what ``call`` does to a range."""
        for unit in range(span[0], span[0] + span[1]):
            self._apply(call, unit, *rest)

    def _apply(self, call: str, unit: int, *rest: Any) -> None:
        if call == "memblock_add":
            self.memory.setdefault(unit, (0, MAX_NUMNODES))
        elif call == "memblock_add_node":
            self.memory.setdefault(unit, (rest[1], rest[0]))
        elif call == "memblock_reserve_node":
            self.reserved.setdefault(unit, (rest[1], rest[0]))
        elif call == "memblock_reserve":
            self.reserved.setdefault(unit, (0, NUMA_NO_NODE))
        elif call == "memblock_reserve_kern":
            self.reserved.setdefault(unit, (MEMBLOCK_RSRV_KERN, NUMA_NO_NODE))
        elif call == "memblock_remove":
            self.memory.pop(unit, None)
        elif call == "memblock_phys_free":
            self.reserved.pop(unit, None)
        elif call == "memblock_set_node":
            units = self.reserved if rest[1] else self.memory
            if unit in units:
                units[unit] = (units[unit][0], rest[0])
        else:
            units = self.reserved if call.startswith("memblock_reserved") else self.memory
            _memblock, _, what = call.replace("reserved_", "").partition("_")
            verb, _, name = what.partition("_")
            if unit in units:
                flags, nid = units[unit]
                flag = FLAG_OF[name]
                units[unit] = (flags | flag if verb == "mark" else flags & ~flag, nid)

    def admits(self, unit: int, nid: int, flags: int, movable_node: bool) -> bool:
        """Whether memory at ``unit`` may be handed out to a search for ``nid`` and ``flags``."""
        if unit not in self.memory or unit in self.reserved:
            return False
        has, node = self.memory[unit]
        if nid in (0, 1) and node != nid:
            return False
        if movable_node and has & MEMBLOCK_HOTPLUG and not flags & MEMBLOCK_HOTPLUG:
            return False
        return not (
            has & (MEMBLOCK_NOMAP | MEMBLOCK_DRIVER_MANAGED)
            or (flags & MEMBLOCK_KHO_SCRATCH and not has & MEMBLOCK_KHO_SCRATCH)
        )

    def places(
        self, nr_units: int, align: int, start: int, end: int, nid: int, flags: int, movable: bool
    ) -> list[int]:
        """Every legal place for ``nr_units`` units: aligned, free, in one kind of memory."""
        return [
            place
            for place in range(max(start, PAGE // UNIT), end - nr_units + 1)
            if place % align == 0
            and all(
                self.admits(unit, nid, flags, movable) and self.memory[unit] == self.memory[place]
                for unit in range(place, place + nr_units)
            )
        ]


def rows(units: Units) -> list[tuple[int, int, int, int]]:
    """The fewest regions that say the same as ``units``."""
    regions: list[list[int]] = []
    for unit in sorted(units):
        flags, nid = units[unit]
        if regions and regions[-1][1] == unit and regions[-1][2:] == [flags, nid]:
            regions[-1][1] = unit + 1
        else:
            regions.append([unit, unit + 1, flags, nid])
    return [(low * UNIT, (high - low) * UNIT, flags, nid) for low, high, flags, nid in regions]


def build(sequence: list[Any], **options: Any) -> tuple[Memblock, Model]:
    """Both sides after ``sequence``."""
    memblock, model = Memblock(**options), Model()
    for call, span, *rest in sequence:
        assert getattr(memblock, call)(span[0] * UNIT, span[1] * UNIT, *rest) == 0
        model.apply(call, span, *rest)
    return memblock, model


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(changes, max_size=25))
def test_arrays_say_what_each_unit_says(sequence: list[Any]) -> None:
    """After any calls the arrays are the fewest regions that describe the units."""
    memblock, model = build(sequence)
    assert memblock.memory.rows() == rows(model.memory)
    assert memblock.reserved.rows() == rows(model.reserved)
    assert memblock.memblock_phys_mem_size() == len(model.memory) * UNIT
    assert memblock.memblock_reserved_size() == len(model.reserved) * UNIT
    for unit in range(NR_UNITS):
        assert memblock.memblock_is_memory(unit * UNIT) == (unit in model.memory)
        assert memblock.memblock_is_reserved((unit + 1) * UNIT - 1) == (unit in model.reserved)


allocations = st.tuples(
    st.integers(1, 20),  # units
    st.sampled_from([1, 2, 4, 8, 16]),  # alignment in units
    st.integers(0, NR_UNITS),  # start
    st.integers(1, NR_UNITS + 10),  # end
    nids,
    st.booleans(),  # exact
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.lists(changes, min_size=3, max_size=15),
    st.lists(allocations, min_size=1, max_size=6),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_allocation_takes_the_outermost_legal_place(
    sequence: list[Any], wishes: list[Any], bottom_up: bool, scratch_only: bool, movable: bool
) -> None:
    """Highest (or lowest) place on the node, then on any node, else nothing."""
    big = ("memblock_add_node", (0, NR_UNITS), 0, MEMBLOCK_NONE)
    memblock, model = build([*sequence, big], movable_node=movable)
    memblock.memblock_set_bottom_up(bottom_up)
    flags = MEMBLOCK_NONE
    if scratch_only:
        memblock.memblock_set_kho_scratch_only()
        flags = MEMBLOCK_KHO_SCRATCH
    for nr_units, align, start, end, nid, exact in wishes:
        node = nid
        places = model.places(nr_units, align, start, end, nid, flags, movable)
        if not places and nid in (0, 1) and not exact:
            node = NUMA_NO_NODE
            places = model.places(nr_units, align, start, end, node, flags, movable)
        expected = (places[0] if bottom_up else places[-1]) if places else 0
        found = memblock.memblock_alloc_range_nid(
            nr_units * UNIT, align * UNIT, start * UNIT, end * UNIT, nid, exact
        )
        assert found == expected * UNIT
        if places:
            kern = MEMBLOCK_RSRV_KERN
            model.apply("memblock_reserve_node", (expected, nr_units), node, kern)
    assert memblock.reserved.rows() == rows(model.reserved)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(changes, max_size=20), st.booleans(), st.sampled_from([NR_UNITS, 17]))
def test_free_and_reserved_pages(sequence: list[Any], movable: bool, max_low_pfn: int) -> None:
    """A page is freed if all of it is free memory of one kind; reserved if any of it is."""
    memblock, model = build(sequence, movable_node=movable)
    model.apply("memblock_clear_hotplug", (0, NR_UNITS))
    for unit, (_flags, nid) in model.memory.items():
        model.apply("memblock_set_node", (unit, 1), nid, True)
    per_page = PAGE // UNIT
    free, taken = [], set()
    for pfn in range(NR_UNITS // per_page):
        units = range(pfn * per_page, (pfn + 1) * per_page)
        if (
            pfn < max_low_pfn
            and all(model.admits(unit, NUMA_NO_NODE, 0, movable) for unit in units)
            and len({model.memory[unit] for unit in units}) == 1
        ):
            free.append(pfn)
        for unit in units:
            nomap = unit in model.memory and model.memory[unit][0] & MEMBLOCK_NOMAP
            held = unit in model.reserved and not model.reserved[unit][0] & MEMBLOCK_RSRV_NOINIT
            if nomap or held:
                taken.add(pfn)
    ranges = memblock.free_ranges(max_low_pfn)
    assert [pfn for start, end, _nid in ranges for pfn in range(start, end)] == free
    assert all(model.memory[start * per_page][1] == nid for start, _end, nid in ranges)
    marked = {p for start, end, _, _ in memblock.reserved_ranges() for p in range(start, end)}
    assert marked == taken
    assert memblock.reserved.rows() == rows(model.reserved)


def state(memblock: Memblock) -> tuple[Any, ...]:
    """All that two memblocks must agree on."""
    arrays = (memblock.memory, memblock.reserved)
    return (
        [(a.rows(), a.max, a.total_size, a.array_phys) for a in arrays],
        memblock.allocations,
    )


blocks = st.lists(
    st.tuples(st.integers(1, 3000), st.sampled_from([0, 1, 1, 1, 1, 2, 5])),
    min_size=25,
    max_size=160,
)


@settings(derandomize=True, deadline=None, max_examples=250)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 3000),
            st.integers(1, 3),
            st.sampled_from([NUMA_NO_NODE, 0]),
            reserved_flags,
        ),
        max_size=12,
    ),
    blocks,
    st.sampled_from(["sparse", "dense", "disjoint", "sorted"]),
    st.sampled_from([16, 24, 40, 1000]),
    st.booleans(),
    st.booleans(),
)
def test_reserving_many_is_reserving_each(
    before: list[Any],
    wanted: list[tuple[int, int]],
    shape: str,
    room: int,
    noinit: bool,
    listen: bool,
) -> None:
    """Same arrays, doublings, trace: for overlapping, touching, unsorted and sorted blocks."""
    if shape == "dense":
        wanted = [(1 + pfn % 300, nr) for pfn, nr in wanted]
        before = [(1 + pfn % 300, nr, nid, flags) for pfn, nr, nid, flags in before]
    elif shape in ("disjoint", "sorted"):
        # Distinct blocks of four pages, some reaching the next: they touch and do not overlap.
        slots = dict.fromkeys(pfn % 400 for pfn, _nr in wanted)
        wanted = [(4 + 4 * slot, 4 if slot % 3 else 2) for slot in slots]
        before = [(4 + 4 * (p % 400) + 2, 2, nid, flags) for p, _nr, nid, flags in before]
        if shape == "sorted":
            wanted.sort()
    starts = [pfn * PAGE for pfn, _nr in wanted]
    ends = [(pfn + nr) * PAGE for pfn, nr in wanted]
    sides = []
    for bulk in (False, True):
        heard: list[Any] = []
        memblock = Memblock(reserved_max=room)
        memblock.memblock_add_node(PAGE, 4096 * PAGE, 0, MEMBLOCK_NONE)
        memblock.memblock_allow_resize()
        for pfn, nr, nid, flags in before:
            memblock.memblock_reserve_node(pfn * PAGE, nr * PAGE, nid, flags)
        if listen:
            memblock.trace = lambda *event, heard=heard: heard.append(event)
        if bulk:
            memblock.memblock_reserve_many(np.array(starts), np.array(ends, np.uint64), noinit)
        else:
            for start, end in zip(starts, ends, strict=True):
                memblock.memblock_reserve(start, end - start)
                if noinit:
                    memblock.memblock_reserved_mark_noinit(start, end - start)
        sides.append((state(memblock), heard))
    assert sides[0] == sides[1]
