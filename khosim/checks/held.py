"""Who holds pages, beside what the map in RAM says would be handed over now.

Read as the invariants read it: from RAM and from plain data of the kernel. These are questions
that a user's promises are made of, not invariants: a kernel may preserve what it does not hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.checks.history import History
from khosim.checks.look import AT_ANY_TIME, Look
from khosim.checks.ranges import merged, minus, page_ranges

if TYPE_CHECKING:
    from khosim.checks.kernel_view import KernelView
    from khosim.checks.ranges import Ranges
    from khosim.machine.hardware import Hardware

__all__ = ("held_pages", "outgoing_pages", "preserved_and_free")


def held_pages(kernel: KernelView, *kinds: str) -> Ranges:
    """Pages that are not on a free list: of ``kinds``, or all."""
    starts, ends, states = kernel.pages.pages.columns()
    pieces = [
        (start, end)
        for start, end, state in zip(starts, ends, states, strict=True)
        if not kinds or state.kind in kinds
    ]
    return merged(page_ranges(pieces, 0)) if pieces else merged()


def outgoing_pages(hardware: Hardware, kernel: KernelView) -> Ranges | None:
    """Pages that would be handed over now, by the map in RAM; None where there is no map."""
    outgoing = Look(hardware, kernel, AT_ANY_TIME, History()).outgoing
    return None if outgoing is None else outgoing.covered


def preserved_and_free(kernel: KernelView, outgoing: Ranges) -> Ranges:
    """Pages of ``outgoing``, which would be handed over, that anybody may be given now."""
    return minus(outgoing, held_pages(kernel))
