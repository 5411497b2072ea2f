"""Bytes that must survive: preserved memory, the handover itself, ``reserve_mem`` regions.

A page is the business of one of the three at a time. Until the successor has read the handover,
the pages that hold it are ``handover-intact``'s; a region that lives on is ``reserve-mem-stable``'s
until its owner may write to it again; all other preserved memory is ``preserved-content``'s until
it is restored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.checks.invariants.base import REPORTED_MAX, Invariant
from khosim.checks.look import AT_ANY_TIME, BOOTED, IN_BETWEEN, JUMP, TAKEOVER
from khosim.checks.ranges import holds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.checks.history import Handed
    from khosim.checks.look import Look
    from khosim.checks.violation import Violation

__all__ = ("INVARIANTS",)


def _changed(look: Look, name: str, handed: Handed, pfns: list[int], what: str) -> list[Violation]:
    shift = look.page_shift
    found = [
        look.says(
            name,
            f"page {pfn << shift:#x} (pfn {pfn:#x}) {what} changed after generation "
            f"{handed.generation} handed it over",
            pfn << shift,
            handed.owner(pfn) or "nobody",
        )
        for pfn in pfns[:REPORTED_MAX]
    ]
    if len(pfns) > REPORTED_MAX:
        first = pfns[REPORTED_MAX]
        more = f"{len(pfns) - REPORTED_MAX} more pages changed, from {first << shift:#x}"
        found.append(look.says(name, more, first << shift, handed.owner(first) or "nobody"))
    return found


def _preserved_content(look: Look) -> Sequence[Violation]:
    changed, handed = look.by_kernels(look.changed()), look.handed
    if not changed or handed is None or look.refused:
        return ()
    preserved = holds(handed.covered, changed)
    in_regions = handed.in_revived(changed, wholly=False)
    pfns = [
        pfn
        for pfn, is_preserved, in_region in zip(changed, preserved, in_regions, strict=True)
        if is_preserved and not in_region and pfn not in handed.metadata
    ]
    return _changed(look, "preserved-content", handed, pfns, "was preserved but")


def _handover_intact(look: Look) -> Sequence[Violation]:
    changed, handed = look.changed(), look.handed
    if not changed or handed is None or not handed.metadata:
        return ()
    pfns = [pfn for pfn in changed if pfn in handed.metadata]
    kernel = look.kernel
    if look.refused and kernel is not None:
        # The kernel that refused owes the pages nothing; whoever wrote before it does.
        writers = look.hardware.ram.last_writers(pfns)
        pfns = [
            pfn
            for pfn, by in zip(pfns, writers, strict=True)
            if by is None or by[0] != kernel.generation
        ]
    return _changed(look, "handover-intact", handed, pfns, "holds the handover and")


def _reserve_mem_stable(look: Look) -> Sequence[Violation]:
    handed, kernel = look.handed, look.kernel
    if handed is None or kernel is None or look.refused or not handed.regions:
        return ()
    name = "reserve-mem-stable"
    found = list(_moved(look, name, handed)) if look.stage == TAKEOVER else []
    for region, phys in handed.changed_edges():
        text = f"byte {phys:#x} of reserve_mem region {region.name!r} changed in the handover"
        found.append(look.says(name, text, phys, f"reserve_mem {region.name}"))
    changed = look.changed()
    if changed and handed.revived:
        inside = handed.in_revived(changed, wholly=True)
        pfns = [pfn for pfn, is_inside in zip(changed, inside, strict=True) if is_inside]
        found += _changed(look, name, handed, pfns, "of a reserve_mem region")
    return found


def _moved(look: Look, name: str, handed: Handed) -> list[Violation]:
    kernel = look.kernel
    if kernel is None or handed.failed_reserve_mem:
        return []
    now = {region: start for region, start, size in kernel.reserve_mem.regions if size}
    sizes = {region: size for region, _, size in kernel.reserve_mem.regions}
    found = []
    for region in handed.regions:
        start = now.get(region.name, region.start)
        if start == region.start or sizes[region.name] != region.size:
            continue
        if _told_why(kernel.messages, region.name):
            continue
        text = (
            f"reserve_mem region {region.name!r} of {region.size} bytes moved from "
            f"{region.start:#x} to {start:#x} and the kernel did not say why"
        )
        found.append(look.says(name, text, region.start, f"reserve_mem {region.name}"))
    return found


def _told_why(messages: Sequence[str], name: str) -> bool:
    # The kernel names the region that it does not take over, or gives up on the whole subtree.
    return any(
        (f"'{name}'" in message and "Revived" not in message)
        or ("FDT 'memblock'" in message and ("retrieve" in message or "incompat" in message))
        for message in messages
    )


INVARIANTS = (
    Invariant(
        "preserved-content",
        "A page that was preserved has the same bytes in the successor until it is restored.",
        frozenset((IN_BETWEEN, TAKEOVER, BOOTED, JUMP, AT_ANY_TIME)),
        _preserved_content,
    ),
    Invariant(
        "handover-intact",
        "Root FDT, preserved-memory map and subtrees stay as they were written until they are "
        "read.",
        frozenset((IN_BETWEEN, TAKEOVER)),
        _handover_intact,
    ),
    Invariant(
        "reserve-mem-stable",
        "A reserve_mem region keeps its address and every byte across the handover.",
        frozenset((TAKEOVER, BOOTED)),
        _reserve_mem_stable,
    ),
)
