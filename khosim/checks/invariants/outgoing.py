"""What a kernel is about to hand over: judged from its bytes in RAM, before anyone trusts them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from khosim.checks.invariants.base import REPORTED_MAX, Invariant
from khosim.checks.look import AT_ANY_TIME, JUMP
from khosim.checks.preserved import blocks_covering, overlaps
from khosim.checks.ranges import both, holds, merged, page_ranges, pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.checks.look import Look
    from khosim.checks.violation import Violation

__all__ = ("INVARIANTS",)


def _wellformed(look: Look) -> Sequence[Violation]:
    outgoing = look.outgoing
    if outgoing is None or not outgoing.problems:
        return ()
    return [
        look.says(
            "handover-wellformed",
            f"page {problem.phys & -look.page_size:#x}: {problem.detail} [{problem.code}]",
            problem.phys,
            look.owner(problem.phys >> look.page_shift),
        )
        for problem in outgoing.problems[:REPORTED_MAX]
    ]


def _outside_scratch(look: Look) -> Sequence[Violation]:
    outgoing = look.outgoing
    if outgoing is None or not outgoing.scratch:
        return ()
    shift = look.page_shift
    starts, ends = outgoing.covered
    lows, highs = page_ranges([(addr, addr + size) for addr, size in outgoing.scratch], shift)
    if (starts.searchsorted(highs) <= ends.searchsorted(lows, side="right")).all():
        return ()
    found = []
    shared = both((starts, ends), merged((lows, highs)))
    for start, end in pairs(shared, REPORTED_MAX):
        text = (
            f"page {start << shift:#x} (pfn {start:#x}, {end - start} pages) is preserved but lies "
            "in scratch, where the next kernel boots"
        )
        owner = look.owner(start) or "nobody"
        found.append(look.says("preserved-outside-scratch", text, start << shift, owner))
    return found


def _map_outside_scratch(look: Look) -> Sequence[Violation]:
    outgoing = look.outgoing
    if outgoing is None or not outgoing.scratch:
        return ()
    shift = look.page_shift
    areas = merged(page_ranges([(addr, addr + size) for addr, size in outgoing.scratch], shift))
    pfns = [phys >> shift for phys in outgoing.handover.table_pages]
    found = []
    for pfn, is_inside in zip(pfns, holds(areas, pfns), strict=True):
        if is_inside:
            text = (
                f"page {pfn << shift:#x} (pfn {pfn:#x}) holds a part of the preserved-memory map "
                "but lies in scratch, where the next kernel is copied to"
            )
            owner = look.owner(pfn) or "nobody"
            found.append(look.says("map-outside-scratch", text, pfn << shift, owner))
    return found[:REPORTED_MAX]


def _one_key_per_frame(look: Look) -> Sequence[Violation]:
    outgoing = look.outgoing
    if outgoing is None:
        return ()
    preserved = outgoing.handover.preserved
    shift = look.page_shift
    found = []
    for overlap in overlaps(preserved)[:REPORTED_MAX]:
        pfn = overlap.start_pfn
        keys = ", ".join(
            f"order {order} at {start << shift:#x}"
            for start, order in blocks_covering(preserved, pfn)
        )
        text = f"page {pfn << shift:#x} (pfn {pfn:#x}) is in more than one preserved block: {keys}"
        owner = look.owner(pfn) or "nobody"
        found.append(look.says("one-key-per-frame", text, pfn << shift, owner))
    return found


def _one_node_per_block(look: Look) -> Sequence[Violation]:
    nodes = look.hardware.memory_map.node_ranges
    if len(nodes) < 2 or look.outgoing is None:
        return ()
    shift = look.page_shift
    borders = [
        ((low.end - 1) >> shift, high.start >> shift, low.nid, high.nid)
        for low, high in pairwise(nodes)
        if low.nid != high.nid and (low.end - 1) >> shift != high.start >> shift
    ]
    covered = holds(look.outgoing.covered, [border[1] for border in borders])
    found = []
    for (last, first, low_nid, high_nid), is_covered in zip(borders, covered, strict=True):
        if not is_covered:
            continue
        for start, order in blocks_covering(look.outgoing.handover.preserved, first):
            if start <= last:
                text = (
                    f"the block of order {order} at page {start << shift:#x} (pfn {start:#x}) has "
                    f"pages on node {low_nid} and, from {first << shift:#x}, on node {high_nid}"
                )
                owner = look.owner(start) or "nobody"
                found.append(look.says("one-node-per-block", text, start << shift, owner))
    return found


def _metadata_preserved(look: Look) -> Sequence[Violation]:
    outgoing = look.outgoing
    if outgoing is None or not (outgoing.problems or outgoing.handover.map_phys):
        return ()  # not finalized yet: nobody may take it over, see subtrees-reserved
    handover, shift = outgoing.handover, look.page_shift
    tables = set(handover.table_pages)
    pfns = [phys >> shift for phys in handover.metadata_pages if phys not in tables]
    found = []
    for pfn, is_covered in zip(pfns, holds(outgoing.covered, pfns), strict=True):
        if is_covered:
            continue
        what = "the root FDT"
        if pfn != handover.fdt_phys >> shift:
            names = [
                name
                for name, (start, size) in handover.subtrees.items()
                if start >> shift <= pfn < -(-(start + size) >> shift)
            ]
            what = f"subtree {names[0]!r}" if names else "a subtree"
        text = f"page {pfn << shift:#x} (pfn {pfn:#x}) holds {what} but is not preserved"
        owner = look.owner(pfn) or "nobody"
        found.append(look.says("metadata-preserved", text, pfn << shift, owner))
    return found[:REPORTED_MAX]


def _images_in_scratch(look: Look) -> Sequence[Violation]:
    image = look.image
    if image is None or image.kho_scratch is None:
        return ()
    found = []
    for segment in image.segments:
        start, end = segment.mem, segment.mem + segment.memsz
        if start < end and not any(
            addr <= start and end <= addr + size for addr, size in look.scratch
        ):
            text = (
                f"segment {segment.name!r} of the next kernel goes to [{start:#x}-{end:#x}), "
                "which is in no scratch area"
            )
            owner = look.owner(start >> look.page_shift) or "nobody"
            found.append(look.says("images-in-scratch", text, start, owner))
    return found


_LEAVING = frozenset((JUMP, AT_ANY_TIME))

INVARIANTS = (
    Invariant(
        "handover-wellformed",
        "Root FDT, map and subtrees are what a kernel writes, down to the last pointer.",
        _LEAVING,
        _wellformed,
    ),
    Invariant(
        "metadata-preserved",
        "The pages that hold root FDT and subtrees are preserved themselves.",
        _LEAVING,
        _metadata_preserved,
    ),
    Invariant(
        "preserved-outside-scratch",
        "Nothing is preserved in scratch, where the successor boots before it knows of it.",
        _LEAVING,
        _outside_scratch,
    ),
    Invariant(
        "map-outside-scratch",
        "No page of the preserved-memory map lies in scratch, which is overwritten before it is "
        "read.",
        _LEAVING,
        _map_outside_scratch,
    ),
    Invariant(
        "one-key-per-frame",
        "No page frame is covered by two keys of the preserved-memory map.",
        _LEAVING,
        _one_key_per_frame,
    ),
    Invariant(
        "one-node-per-block",
        "No preserved block has pages on two NUMA nodes.",
        _LEAVING,
        _one_node_per_block,
    ),
    Invariant(
        "images-in-scratch",
        "Every segment of the next kernel goes into one scratch area, over nobody's memory.",
        frozenset((JUMP,)),
        _images_in_scratch,
    ),
)
