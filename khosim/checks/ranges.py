"""Arithmetic on sets of page frames: sorted ranges as arrays, and sums over many sets at once.

One primitive does all of it. :func:`sweep` adds up the weights of overlapping ranges along the
number line; with one bit field of the sum for each set, a single pass tells for every page which
sets it is in and how often. Costs what there is of ranges, never what there is of pages.

All ranges are half-open and in page frame numbers, as int64 arrays of starts and ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    I64: TypeAlias = NDArray[np.int64]
    Ranges: TypeAlias = tuple[I64, I64]

__all__ = (
    "both",
    "frames_of",
    "holds",
    "merged",
    "minus",
    "page_ranges",
    "pairs",
    "same",
    "sweep",
    "where",
)

_EMPTY = np.empty(0, dtype=np.int64)
_FEW = 32  # ranges up to here are dealt with one by one
_OTHER = np.int64(1 << 32)


def page_ranges(ranges: Iterable[tuple[int, int]], page_shift: int) -> Ranges:
    """The pages that ``(start_phys, end_phys)`` ranges touch, in the same order."""
    slack = (1 << page_shift) - 1
    listed = list(ranges)
    return (
        np.array([start >> page_shift for start, _ in listed], dtype=np.int64),
        np.array([(end + slack) >> page_shift for _, end in listed], dtype=np.int64),
    )


def sweep(starts: I64, ends: I64, weights: I64) -> tuple[I64, I64]:
    """``(edges, levels)``: from ``edges[i]`` to the next edge, the weights add up to ``levels[i]``.

    The edges ascend and are distinct; the last level is 0.
    """
    edges = np.concatenate((starts, ends))
    by_edge = edges.argsort(kind="stable")
    edges = edges[by_edge]
    levels = np.concatenate((weights, -weights))[by_edge].cumsum()
    last = np.empty(len(edges), dtype=np.bool_)
    last[-1:] = True
    np.not_equal(edges[1:], edges[:-1], out=last[:-1])
    return edges[last], levels[last]


def where(edges: I64, chosen: NDArray[np.bool_]) -> Ranges:
    """The ranges of a sweep in which ``chosen`` holds (not behind the last edge); joined."""
    fenced = np.zeros(len(chosen) + 2, dtype=np.bool_)
    fenced[1:-1] = chosen
    turns = (fenced[1:] != fenced[:-1]).nonzero()[0]
    return edges[turns[::2]], edges[turns[1::2]]


def merged(*sets: Ranges) -> Ranges:
    """The union of range sets, sorted, disjoint, and as few ranges as possible."""
    filled = [part for part in sets if len(part[0])]
    if not filled:
        return _EMPTY, _EMPTY
    starts, ends = filled[0]
    if len(filled) > 1:
        starts = np.concatenate([part[0] for part in filled])
        ends = np.concatenate([part[1] for part in filled])
    if len(starts) == 1:
        return starts, ends
    if len(starts) <= _FEW:
        return _merged_few(starts, ends)
    by_start = starts.argsort(kind="stable")
    starts, ends = starts[by_start], np.maximum.accumulate(ends[by_start])
    fenced = np.empty(len(starts) + 1, dtype=np.bool_)
    fenced[0] = fenced[-1] = True
    np.greater(starts[1:], ends[:-1], out=fenced[1:-1])
    return starts[fenced[:-1]], ends[fenced[1:]]


def _merged_few(starts: I64, ends: I64) -> Ranges:
    # The same without arrays, which cost more to set up than a few numbers to look at.
    listed = list(zip(starts.tolist(), ends.tolist(), strict=True))
    listed.sort()
    lows, highs = [], []
    begin, past = listed[0]
    for start, end in listed:
        if start > past:
            lows.append(begin)
            highs.append(past)
            begin, past = start, end
        elif end > past:
            past = end
    lows.append(begin)
    highs.append(past)
    return np.array(lows, dtype=np.int64), np.array(highs, dtype=np.int64)


def both(these: Ranges, those: Ranges) -> Ranges:
    """What is in both of two disjoint sets of ranges."""
    if not len(those[0]) or not len(these[0]):
        return _EMPTY, _EMPTY
    edges, levels = _paired(these, those)
    return where(edges, levels > _OTHER)


def minus(these: Ranges, those: Ranges) -> Ranges:
    """What of one disjoint set of ranges is not in another set."""
    if not len(those[0]) or not len(these[0]):
        return these
    if len(these[0]) + len(those[0]) <= _FEW:
        return _minus_few(these, those)
    edges, levels = _paired(these, those)
    return where(edges, levels == 1)


def _minus_few(these: Ranges, those: Ranges) -> Ranges:
    holes = sorted(zip(those[0].tolist(), those[1].tolist(), strict=True))
    left: list[tuple[int, int]] = []
    for start, end in zip(these[0].tolist(), these[1].tolist(), strict=True):
        for low, high in holes:
            if high <= start or low >= end:
                continue
            if start < low:
                left.append((start, low))
            start = high
        if start < end:
            left.append((start, end))
    lows: list[int] = []
    highs: list[int] = []
    for start, end in sorted(left):
        if highs and highs[-1] == start:
            highs[-1] = end
        else:
            lows.append(start)
            highs.append(end)
    return np.array(lows, dtype=np.int64), np.array(highs, dtype=np.int64)


def _paired(these: Ranges, those: Ranges) -> tuple[I64, I64]:
    weights = np.ones(len(these[0]) + len(those[0]), dtype=np.int64)
    weights[len(these[0]) :] = _OTHER
    return sweep(
        np.concatenate((these[0], those[0])), np.concatenate((these[1], those[1])), weights
    )


def pairs(ranges: Ranges, nr_max: int) -> list[tuple[int, int]]:
    """The first ``nr_max`` ranges as pairs of ints."""
    starts, ends = ranges
    return list(zip(starts[:nr_max].tolist(), ends[:nr_max].tolist(), strict=True))


def frames_of(ranges: Ranges) -> I64:
    """Every page frame of a set of ranges, in its order."""
    lengths = ranges[1] - ranges[0]
    past = lengths.cumsum()
    if not len(past):
        return _EMPTY
    frames: I64 = np.arange(past[-1], dtype=np.int64)
    frames += np.repeat(ranges[0] - past + lengths, lengths)
    return frames


def same(one: Ranges, other: Ranges) -> bool:
    """Whether two sets have the same ranges, in the same order."""
    return one[0].tobytes() == other[0].tobytes() and one[1].tobytes() == other[1].tobytes()


def holds(ranges: Ranges, pfns: Sequence[int] | I64) -> list[bool]:
    """For each page frame, whether a sorted, disjoint set of ranges covers it."""
    starts, ends = ranges
    if not len(starts):
        return [False] * len(pfns)
    frames = np.asarray(pfns, dtype=np.int64)
    at = starts.searchsorted(frames, side="right") - 1
    inside: list[bool] = ((at >= 0) & (frames < ends[at])).tolist()
    return inside
