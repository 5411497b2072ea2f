"""Every page of memory has one place: free, waiting to be initialised, or in somebody's hands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.checks.invariants.base import REPORTED_MAX, Invariant
from khosim.checks.look import AT_ANY_TIME, BOOTED, JUMP
from khosim.checks.ranges import minus, pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.checks.kernel_view import KernelView
    from khosim.checks.look import Look
    from khosim.checks.ranges import Ranges
    from khosim.checks.violation import Violation

__all__ = ("INVARIANTS",)

_MIGRATE_TYPES = ("Unmovable", "Movable", "CMA")


def _one_owner(look: Look) -> Sequence[Violation]:
    census, kernel = look.census, look.kernel
    if census is None or kernel is None or not census.bad:
        return ()
    name, shift = "one-owner-per-page", look.page_shift
    found = []
    for start, nr_pages in _ranges(census.pages("twice")):
        owners = ", ".join(_claims(kernel, start))
        text = f"page {start << shift:#x} (pfn {start:#x}, {nr_pages} pages) is held by {owners}"
        found.append(look.says(name, text, start << shift, look.owner(start)))
    handed = look.handed
    for start, nr_pages in _ranges(census.pages("stolen")):
        now = ", ".join(_claims(kernel, start)) or "nobody"
        text = (
            f"page {start << shift:#x} (pfn {start:#x}, {nr_pages} pages) was preserved and not "
            f"restored, but is held by {now}"
        )
        owner = (handed.owner(start) if handed is not None else "") or "nobody"
        found.append(look.says(name, text, start << shift, owner))
    return found


def _page_budget(look: Look) -> Sequence[Violation]:
    census, kernel = look.census, look.kernel
    if census is None or kernel is None:
        return ()
    name, shift = "page-budget", look.page_shift
    found = []
    for start, nr_pages in _ranges(census.pages("lost")) if census.bad else ():
        text = (
            f"page {start << shift:#x} (pfn {start:#x}, {nr_pages} pages) is lost: neither free "
            "nor in anybody's hands"
        )
        found.append(look.says(name, text, start << shift, "nobody"))
    outside = census.pages("outside") if census.bad else None
    if outside is not None and look.handed is not None:
        # What was preserved may lie in memory that this kernel was told not to use.
        outside = minus(outside, look.handed.covered)
    for start, nr_pages in _ranges(outside) if outside is not None else ():
        who = ", ".join(_claims(kernel, start))
        text = (
            f"page {start << shift:#x} (pfn {start:#x}, {nr_pages} pages) is no memory, but is "
            f"held by {who}"
        )
        found.append(look.says(name, text, start << shift, look.owner(start)))
    for zone, migratetype, counted, listed in census.free_errors:
        text = (
            f"zone {zone.name} counts {counted} free pages of type {_MIGRATE_TYPES[migratetype]}, "
            f"its lists hold {listed}"
        )
        found.append(look.says(name, text, -1))
    closes = census.managed_pages == census.found_pages
    if not closes and not found and not census.has("twice") and not census.has("outside"):
        text = (
            f"the zones manage {census.managed_pages} pages, but {census.found_pages} are free or "
            "handed out"
        )
        found.append(look.says(name, text, -1))
    return found


def _own_zone(look: Look) -> Sequence[Violation]:
    census, kernel = look.census, look.kernel
    if census is None or kernel is None or not census.strays:
        return ()
    shift = look.page_shift
    return [
        look.says(
            "free-in-own-zone",
            f"page {pfn << shift:#x} (pfn {pfn:#x}) is on a free list of zone {zone.name}, pfns "
            f"{zone.start_pfn:#x} to {zone.end_pfn:#x}",
            pfn << shift,
            "nobody",
        )
        for zone, pfn in census.strays
        if any(other.start_pfn <= pfn < other.end_pfn for other in kernel.pages.zones)
    ]


def _ranges(pages: Ranges) -> list[tuple[int, int]]:
    return [(start, end - start) for start, end in pairs(pages, REPORTED_MAX)]


def _claims(kernel: KernelView, pfn: int) -> list[str]:
    """Everybody who claims a page. Looks everywhere: asked only where things are wrong."""
    found = []
    for zone in kernel.pages.zones:
        for lists in zone.free:
            for order, blocks in enumerate(lists):
                if pfn & -(1 << order) in blocks:
                    found.append(f"the free list of order {order} in zone {zone.name}")
        for runs in zone.max_runs:
            for start, nr_blocks in runs:
                if start <= pfn < start + (nr_blocks << zone.max_order):
                    found.append(f"the free list of order {zone.max_order} in zone {zone.name}")
    starts, ends, states = kernel.pages.pages.columns()
    found += [
        f"{state.owner} ({state.kind})"
        for start, end, state in zip(starts, ends, states, strict=True)
        if start <= pfn < end
    ]
    if any(start <= pfn < end for start, end, _ in kernel.pages.deferred):
        found.append("deferred initialisation")
    return found


_RUNNING = frozenset((BOOTED, JUMP, AT_ANY_TIME))

INVARIANTS = (
    Invariant(
        "one-owner-per-page",
        "A page is in one place: on one free list, in one owner's hands, or waiting to be "
        "restored.",
        _RUNNING,
        _one_owner,
    ),
    Invariant(
        "page-budget",
        "Every page of memory is accounted for: nothing is lost, nothing is counted twice.",
        _RUNNING,
        _page_budget,
    ),
    Invariant(
        "free-in-own-zone",
        "A free page is on a list of the zone and node that it belongs to.",
        _RUNNING,
        _own_zone,
    ),
)
