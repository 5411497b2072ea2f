"""The life of a page, told from the trace and from RAM's shadow of writers.

Who got the page, who preserved, restored and freed it, in which kernel, and who wrote it last. Left
out: what happened before the witness was there, single pages of calls that the trace tells as a
whole (``alloc_pages_bulk``, ``vmalloc``), and all writers before the last one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from khosim.checks.violation import Violation
    from khosim.kernel.trace import Event
    from khosim.simulator import Machine

__all__ = ("Witness",)

_BY_PFN = frozenset(("alloc_pages", "alloc_pages_exact"))
_BY_PHYS = frozenset(("kho_radix_alloc_node",))
_WORDS = {
    "alloc_pages": "given to {owner}",
    "alloc_pages_exact": "given to {owner}",
    "folio_put": "a reference is dropped",
    "kho_preserve_folio": "preserved",
    "kho_preserve_pages": "preserved",
    "kho_preserved_memory_reserve": "reserved, as the predecessor preserved it",
    "kho_radix_alloc_node": "a table page of the map of preserved memory",
    "kho_restore_folio": "restored",
    "kho_restore_pages": "restored",
    "kho_unpreserve_folio": "not preserved any more",
    "kho_unpreserve_pages": "not preserved any more",
}


class Witness:
    """Listens to ``machine``; only kernels that boot from now on are heard."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._shift = machine.hardware.page_shift
        self._events: list[tuple[int, int, Event]] = []
        machine.listen(self._hear)

    def _hear(self, event: Event) -> None:
        first, count = self._pages(event)
        if count:
            self._events.append((first, first + count, event))

    def _pages(self, event: Event) -> tuple[int, int]:
        # The pages that an event is about: (first pfn, how many); none for most events.
        args, result = event.args, event.result
        if event.symbol in _BY_PFN or event.symbol in _BY_PHYS:
            if not result:
                return 0, 0
            first = result if event.symbol in _BY_PFN else result >> self._shift
        elif "pfn" in args:
            first = args["pfn"]
        elif event.symbol in _WORDS and "phys" in args:
            first = args["phys"] >> self._shift
        else:
            return 0, 0
        blocks = args.get("nr_folios", args.get("nr_blocks", 1))
        return first, args.get("nr_pages", blocks << args.get("order", 0))

    def story(self, phys: int) -> str:
        """What happened to the page at ``phys``, a line for each step, oldest first."""
        pfn = phys >> self._shift
        lines = [f"the life of page {pfn << self._shift:#x} (pfn {pfn:#x})"]
        for first, end, event in self._events:
            if first <= pfn < end:
                lines.append(f"  generation {event.generation}: {_told(event, first, end)}")
        if len(lines) == 1:
            lines.append("  nobody was given it")
        kernel = self.machine.kernel
        if kernel is not None:
            page = kernel.page(pfn)
            owner = f", owner {page.owner}" if page.owner else ""
            lines.append(f"  now, in generation {kernel.generation}: {page.kind}{owner}")
        writer = self.machine.hardware.ram.last_writer(phys)
        if writer is None:
            lines.append("  never written")
        else:
            is_kernel = writer.generation >= 0
            when = f"in generation {writer.generation}" if is_kernel else "by no kernel"
            lines.append(f"  last written by {writer.symbol}, {when}")
        return "\n".join(lines)

    def explain(self, violation: Violation) -> str:
        """What was violated, and the life of the page that it is about."""
        text = f"{violation.invariant}: {violation.message}"
        return f"{text}\n{self.story(violation.phys)}" if violation.phys > 0 else text


def _told(event: Event, first: int, end: int) -> str:
    words = _WORDS.get(event.symbol, "part of it").format(owner=event.args.get("owner", "somebody"))
    if isinstance(event.result, int) and not isinstance(event.result, bool) and event.result < 0:
        words = f"refused with {event.result}"
    elif event.symbol == "folio_put" and event.result:
        words = "freed with its last reference"
    count = end - first
    pages = "" if count == 1 else f", with pfn [{first:#x}-{end:#x})"
    return f"{event.symbol}: {words}{pages}"
