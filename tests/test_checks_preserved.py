"""Questions about coverage, answered beside plain sets of pages."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim.checks.preserved import (
    Preserved,
    blocks_covering,
    blocks_crossing,
    covered_ranges,
    covers,
    expand,
    intersect,
    overlaps,
)
from khosim.errors import InputError


def preserved(*runs: tuple[int, int, int]) -> Preserved:
    """A set from ``(order, start_pfn, nr_blocks)`` runs."""
    table = np.array(runs, dtype=np.int64).reshape(-1, 3)
    return Preserved(4096, table[:, 0], table[:, 1], table[:, 2], (), ())


def blocks_of(case: Preserved) -> list[tuple[int, int]]:
    """All blocks as ``(pfn, order)``, the slow way."""
    found = []
    runs = zip(case.order.tolist(), case.start_pfn.tolist(), case.nr_blocks.tolist(), strict=True)
    for order, start, count in runs:
        found += [(start + n * 2**order, order) for n in range(count)]
    return found


def pages_of(case: Preserved) -> Counter[int]:
    """How often each page is covered, the slow way."""
    return Counter(pfn + n for pfn, order in blocks_of(case) for n in range(2**order))


runs = st.tuples(st.integers(0, 4), st.integers(0, 30), st.integers(1, 4)).map(
    lambda run: (run[0], run[1] << run[0], run[2])
)
cases = st.lists(runs, max_size=8).map(lambda found: preserved(*found))
ranges = st.lists(
    st.tuples(st.integers(0, 500), st.integers(0, 90)).map(lambda r: (r[0], r[0] + r[1])),
    max_size=6,
)


@settings(max_examples=150)
@given(case=cases)
def test_expanding_and_counting(case: Preserved) -> None:
    """Blocks are listed in the order of the runs and counted right."""
    assert expand(case) == [(pfn * 4096, order) for pfn, order in blocks_of(case)]
    assert case.total_blocks == len(blocks_of(case))
    assert case.total_pages == pages_of(case).total()


def test_expanding_has_a_limit() -> None:
    """A set too large to list is refused before memory is spent."""
    case = preserved((0, 0, 1 << 50))
    with pytest.raises(InputError, match="are more than 4194304"):
        expand(case)
    assert len(expand(preserved((0, 0, 5)), limit=5)) == 5


@settings(max_examples=150)
@given(case=cases)
def test_covered_ranges(case: Preserved) -> None:
    """Ranges are sorted, apart from each other, and cover the same pages."""
    starts, ends = covered_ranges(case)
    assert (ends > starts).all()
    assert (starts[1:] > ends[:-1]).all()
    covered = [pfn for s, e in zip(starts, ends, strict=True) for pfn in range(s, e)]
    assert covered == sorted(pages_of(case))


@settings(max_examples=100)
@given(case=cases)
def test_covers(case: Preserved) -> None:
    """Each page is told to be inside or outside."""
    pages = pages_of(case)
    asked = list(range(600))
    assert covers(case, asked).tolist() == [pfn in pages for pfn in asked]


@settings(max_examples=200)
@given(case=cases)
def test_overlaps(case: Preserved) -> None:
    """Exactly the pages covered more than once lie in the overlaps, each shared by both runs."""
    doubled = {pfn for pfn, count in pages_of(case).items() if count > 1}
    found = overlaps(case)
    assert {pfn for o in found for pfn in range(o.start_pfn, o.end_pfn)} == doubled
    for first, second, start, end in found:
        assert first != second
        for run in (first, second):
            assert case.start_pfn[run] <= start < end <= case.end_pfn[run]


@settings(max_examples=150)
@given(case=cases, pfn=st.integers(0, 500))
def test_blocks_of_a_page(case: Preserved, pfn: int) -> None:
    """The blocks around a page, and of these the ones that begin before it."""
    around = [(p, order) for p, order in blocks_of(case) if p <= pfn < p + 2**order]
    assert blocks_covering(case, pfn) == around
    assert blocks_crossing(case, pfn) == [(p, order) for p, order in around if p != pfn]


@settings(max_examples=150)
@given(case=cases, others=ranges)
def test_intersect(case: Preserved, others: list[tuple[int, int]]) -> None:
    """The common part of two range lists holds the pages that are in both."""
    found = intersect(*covered_ranges(case), [s for s, _ in others], [e for _, e in others])
    assert found == sorted(found)
    assert all(start < end for start, end in found)
    there = {pfn for start, end in others for pfn in range(start, end)}
    assert [pfn for s, e in found for pfn in range(s, e)] == sorted(there & set(pages_of(case)))


def test_the_largest_blocks_fit() -> None:
    """Blocks at the end of the 64-bit address space keep exact numbers."""
    case = preserved((0, (1 << 52) - 1, 1), (38, 1 << 51, 1))
    assert expand(case) == [((1 << 64) - 4096, 0), (1 << 63, 38)]
    assert covers(case, [(1 << 52) - 1, (1 << 52) - 2]).tolist() == [True, False]
