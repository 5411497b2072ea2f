"""Pageblock types beside a list."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim.kernel.pageblock import CMA, MOVABLE, UNMOVABLE, Pageblocks

ORDER = 2
places = st.integers(0, 400)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(places, st.integers(1, 90), st.sampled_from([UNMOVABLE, MOVABLE, CMA]))),
    places,
    st.integers(1, 400),
)
def test_ranges_colour_every_pageblock_they_touch(
    ranges: list[tuple[int, int, int]], start: int, length: int
) -> None:
    """All from movable; beyond the end of memory nothing is stored and all stays movable."""
    blocks = Pageblocks(ORDER, 300)
    plain = [MOVABLE] * 1000
    for first, size, migratetype in ranges:
        blocks.set(first, first + size, migratetype)
        for pfn in range(first & -4, (first + size + 3) & -4):
            plain[pfn] = migratetype if pfn < 304 else MOVABLE
    assert [blocks.type_of(pfn) for pfn in range(500)] == plain[:500]
    end = min(start + length, 304)
    if start < end:
        runs = blocks.runs(start, end)
        assert [pfn for low, high, _ in runs for pfn in range(low, high)] == list(range(start, end))
        assert all(set(plain[low:high]) == {mt} for low, high, mt in runs)
        assert all(left[2] != right[2] for left, right in pairwise(runs))


@pytest.mark.parametrize("nr_blocks", [1, 5, 40, 1000, 10_000])
def test_long_ranges_are_cut_like_short_ones(nr_blocks: int) -> None:
    """One foreign pageblock at any place is found."""
    blocks = Pageblocks(9, nr_blocks << 9)
    for at in {0, nr_blocks // 2, nr_blocks - 1}:
        blocks.set(at << 9, (at + 1) << 9, CMA)
        runs = blocks.runs(0, nr_blocks << 9)
        assert (at << 9, (at + 1) << 9, CMA) in runs
        assert len(runs) == 1 + (at > 0) + (at < nr_blocks - 1)
        blocks.set(at << 9, (at + 1) << 9, MOVABLE)
    assert blocks.runs(3, nr_blocks << 9) == [(3, nr_blocks << 9, MOVABLE)]
