"""Range arithmetic beside sets of integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim.checks.ranges import holds, merged, minus, page_ranges, sweep, where

if TYPE_CHECKING:
    from khosim.checks.ranges import Ranges

pieces = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=12)


def ranges_of(drawn: list[tuple[int, int]]) -> Ranges:
    """Return drawn (start, length) pairs as ranges, in the order drawn."""
    starts = np.array([start for start, _ in drawn], dtype=np.int64)
    return starts, starts + np.array([length + 1 for _, length in drawn], dtype=np.int64)


def frames(ranges: Ranges) -> list[int]:
    """Return every frame of the ranges, with repeats."""
    return [
        pfn
        for start, end in zip(*(part.tolist() for part in ranges), strict=True)
        for pfn in range(start, end)
    ]


def is_canonical(ranges: Ranges) -> bool:
    """Whether ranges are sorted, filled, disjoint and do not touch."""
    starts, ends = ranges
    return bool((starts < ends).all() and (starts[1:] > ends[:-1]).all())


@settings(max_examples=80)
@given(pieces, pieces)
def test_merged_and_minus(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    """Union and difference hold the frames that sets of integers hold, in as few ranges."""
    left, right = merged(ranges_of(one)), merged(ranges_of(other))
    for result, expected in (
        (left, set(frames(ranges_of(one)))),
        (merged(ranges_of(one), ranges_of(other)), {*frames(left), *frames(right)}),
        (minus(left, right), set(frames(left)) - set(frames(right))),
    ):
        assert frames(result) == sorted(expected)
        assert is_canonical(result)


@settings(max_examples=80)
@given(pieces, st.lists(st.integers(0, 80), max_size=20))
def test_holds(one: list[tuple[int, int]], asked: list[int]) -> None:
    """Membership is that of the set."""
    inside = set(frames(ranges_of(one)))
    assert holds(merged(ranges_of(one)), asked) == [pfn in inside for pfn in asked]


@settings(max_examples=80)
@given(pieces, pieces)
def test_sweep(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    """A sweep counts each frame of both sets, each in its own field."""
    starts, ends = (
        np.concatenate(parts) for parts in zip(ranges_of(one), ranges_of(other), strict=True)
    )
    weights = np.array([1] * len(one) + [1000] * len(other), dtype=np.int64)
    edges, levels = sweep(starts, ends, weights)
    counted: dict[int, int] = {}
    for low, high, level in zip(edges.tolist(), edges.tolist()[1:], levels.tolist(), strict=False):
        counted.update(dict.fromkeys(range(low, high), level))
    first, second = frames(ranges_of(one)), frames(ranges_of(other))
    for pfn in range(80):
        assert counted.get(pfn, 0) == first.count(pfn) + 1000 * second.count(pfn)
    assert not len(levels) or levels[-1] == 0
    assert frames(where(edges, levels >= 1000)) == sorted(set(second))


def test_page_ranges_round_outwards() -> None:
    """A page that is touched in part counts."""
    starts, ends = page_ranges([(0, 1), (4095, 4097), (8192, 12288)], 12)
    assert starts.tolist() == [0, 0, 2]
    assert ends.tolist() == [1, 2, 3]
