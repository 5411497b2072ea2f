"""A set of preserved blocks as run-length arrays, and questions about what it covers.

Holds what a walk over a preserved-memory map yields (``kernel/liveupdate/kexec_handover.c:
kho_radix_walk_tree`` @ 7.3 calls back once per block): a block is ``1 << order`` pages at a page
frame number that is a multiple of that. Blocks of one order that follow each other without a gap
are one run.

Left out: whether a block lies in RAM, in scratch or on one node. The functions here take ranges
and leave such judgements to the invariants. All ranges are half-open and in page frame numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from khosim.checks.ranges import merged
from khosim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from khosim.checks.reader import Problem

    I64: TypeAlias = NDArray[np.int64]

__all__ = (
    "Overlap",
    "Preserved",
    "block_orders",
    "blocks_covering",
    "blocks_crossing",
    "covered_ranges",
    "covers",
    "expand",
    "intersect",
    "orders_of",
    "overlaps",
)

_EXPAND_LIMIT = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Preserved:
    """The preserved set in the order in which the kernel walks it.

    Entry ``i`` of the int64 arrays ``order``, ``start_pfn`` and ``nr_blocks`` is one run:
    ``nr_blocks`` blocks of ``1 << order`` pages each, the first at ``start_pfn``.
    ``table_pages`` are the physical addresses of the map's own pages, in walk order.
    """

    page_size: int
    order: I64
    start_pfn: I64
    nr_blocks: I64
    table_pages: tuple[int, ...]
    problems: tuple[Problem, ...]

    @property
    def end_pfn(self) -> I64:
        """End of each run."""
        return self.start_pfn + (self.nr_blocks << self.order)

    @property
    def total_blocks(self) -> int:
        """How many blocks are preserved, which is how many keys the map holds."""
        return int(self.nr_blocks.sum())

    @property
    def total_pages(self) -> int:
        """How many pages the blocks have together (a page in two blocks counts twice)."""
        return int((self.nr_blocks << self.order).sum())


class Overlap(NamedTuple):
    """Pages that two runs share: run indices ``first`` and ``second``, and the shared range."""

    first: int
    second: int
    start_pfn: int
    end_pfn: int


def expand(preserved: Preserved, *, limit: int = _EXPAND_LIMIT) -> list[tuple[int, int]]:
    """Every block as ``(phys, order)``, in walk order.

    Meant for small sets; :class:`InputError` where there are more than ``limit`` blocks.
    """
    total = preserved.total_blocks
    if total > limit:
        raise InputError("expand", f"{total} blocks are more than {limit}")
    page_size = preserved.page_size
    return [
        (phys, order)
        for order, pfn, count in zip(
            preserved.order.tolist(),
            preserved.start_pfn.tolist(),
            preserved.nr_blocks.tolist(),
            strict=True,
        )
        for phys in range(pfn * page_size, (pfn + (count << order)) * page_size, page_size << order)
    ]


def covered_ranges(preserved: Preserved) -> tuple[I64, I64]:
    """``(start_pfn, end_pfn)`` arrays: sorted, disjoint, and as few as possible."""
    return _merge(preserved.start_pfn, preserved.end_pfn)


def covers(preserved: Preserved, pfns: Sequence[int] | I64) -> NDArray[np.bool_]:
    """For each page frame number, whether any block covers it."""
    starts, ends = covered_ranges(preserved)
    at = np.searchsorted(starts, pfns, side="right") - 1
    inside: NDArray[np.bool_] = at >= 0
    inside[inside] = np.asarray(pfns)[inside] < ends[at[inside]]
    return inside


def overlaps(preserved: Preserved) -> list[Overlap]:
    """Pairs of runs that share pages; empty where every page has one key at most.

    Each page that is covered more than once lies in at least one of the returned ranges.
    """
    ends = preserved.end_pfn
    if not (np.sort(preserved.start_pfn)[1:] < np.sort(ends)[:-1]).nonzero()[0].size:
        return []  # never more begun than one that has not ended
    by_start = np.lexsort((preserved.order, preserved.start_pfn))
    starts, ends = preserved.start_pfn[by_start], ends[by_start]
    reach = np.maximum.accumulate(ends)
    hit = np.flatnonzero(starts[1:] < reach[:-1]) + 1
    if not len(hit):
        return []
    farthest = np.where(ends == reach, np.arange(len(ends)), 0)
    farthest = np.maximum.accumulate(farthest)[hit - 1]
    until = np.minimum(ends[hit], reach[hit - 1])
    return [
        Overlap(*found)
        for found in zip(
            by_start[farthest].tolist(),
            by_start[hit].tolist(),
            starts[hit].tolist(),
            until.tolist(),
            strict=True,
        )
    ]


def blocks_covering(preserved: Preserved, pfn: int) -> list[tuple[int, int]]:
    """``(start_pfn, order)`` of each block that the page ``pfn`` lies in, in walk order."""
    runs = np.flatnonzero((preserved.start_pfn <= pfn) & (pfn < preserved.end_pfn))
    found = []
    for run in runs.tolist():
        order, start = int(preserved.order[run]), int(preserved.start_pfn[run])
        found.append((start + ((pfn - start) >> order << order), order))
    return found


def orders_of(preserved: Preserved) -> list[int]:
    """The orders that occur, ascending."""
    found: list[int] = np.flatnonzero(np.bincount(preserved.order)).tolist()
    return found


def block_orders(preserved: Preserved, pfns: I64) -> I64:
    """For each page frame number, the order of the block that begins there, or -1.

    Where blocks of several orders begin at one page, the largest counts.
    """
    found: I64 = np.full(len(pfns), -1, dtype=np.int64)
    for order in orders_of(preserved):
        runs = preserved.order == order
        starts, ends = _merge(preserved.start_pfn[runs], preserved.end_pfn[runs])
        at = np.searchsorted(starts, pfns, side="right") - 1
        inside = (at >= 0) & ((pfns & ((1 << order) - 1)) == 0)
        inside[inside] = pfns[inside] < ends[at[inside]]
        found[inside] = order
    return found


def blocks_crossing(preserved: Preserved, boundary_pfn: int) -> list[tuple[int, int]]:
    """``(start_pfn, order)`` of each block with pages on both sides of a boundary."""
    return [
        (start, order)
        for start, order in blocks_covering(preserved, boundary_pfn)
        if start != boundary_pfn
    ]


def intersect(
    starts: I64, ends: I64, other_starts: Sequence[int] | I64, other_ends: Sequence[int] | I64
) -> list[tuple[int, int]]:
    """Ranges that lie in both of two range lists, sorted.

    The first list is sorted and disjoint as :func:`covered_ranges` returns it; the second may be
    in any order and is merged first.
    """
    lows, highs = _merge(
        np.asarray(other_starts, dtype=np.int64), np.asarray(other_ends, dtype=np.int64)
    )
    found: list[tuple[int, int]] = []
    if not len(starts):
        return found
    first = np.searchsorted(ends, lows, side="right")
    past = np.searchsorted(starts, highs, side="left")
    for low, high, i, j in zip(
        lows.tolist(), highs.tolist(), first.tolist(), past.tolist(), strict=True
    ):
        found += zip(
            np.maximum(starts[i:j], low).tolist(), np.minimum(ends[i:j], high).tolist(), strict=True
        )
    return found


def _merge(starts: I64, ends: I64) -> tuple[I64, I64]:
    """Sort ranges and join those that touch or overlap; empty ones vanish."""
    some = (ends > starts).nonzero()[0]
    if len(some) < len(starts):
        starts, ends = starts[some], ends[some]
    return merged((starts, ends))
