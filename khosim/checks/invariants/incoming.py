"""What a kernel makes of the handover it was given, held against what was seen at the jump."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from khosim.checks.history import PFN_BITS, block_ids, block_runs
from khosim.checks.invariants.base import REPORTED_MAX, Invariant
from khosim.checks.look import AT_ANY_TIME, BOOTED, JUMP, TAKEOVER, contains
from khosim.checks.preserved import overlaps
from khosim.checks.ranges import holds, merged, minus, page_ranges, pairs, same, sweep, where

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.checks.history import Handed
    from khosim.checks.look import Look
    from khosim.checks.ranges import Ranges
    from khosim.checks.violation import Violation

__all__ = ("INVARIANTS",)

_RSRV_NOINIT = 0x10  # include/linux/memblock.h:MEMBLOCK_RSRV_NOINIT
_EXTENSION_SHIFT = 30  # scratch is extended by blocks of 1 GiB
_MIB = 1 << 20
_KNOWN = 1 << 32


def _accepted(look: Look) -> Sequence[Violation]:
    handed, kernel = look.handed, look.kernel
    if handed is None or kernel is None or not look.refused:
        return ()
    if any(
        "disabling KHO revival" in message or message.startswith(("KHO: disabled", "WARNING: kho_"))
        for message in kernel.messages
    ):
        return ()
    pfn = _first_page_of_value(handed)
    if pfn is None:
        return ()
    phys = pfn << look.page_shift
    text = (
        f"page {phys:#x} (pfn {pfn:#x}) and all else that generation {handed.generation} preserved "
        f"is lost: generation {kernel.generation} took no handover over and did not say why"
    )
    return [look.says("handover-accepted", text, phys, handed.owner(pfn) or "nobody")]


def _first_page_of_value(handed: Handed) -> int | None:
    # The first preserved page that is not the handover's own.
    pages = np.array(sorted(handed.metadata), dtype=np.int64)
    starts, _ = minus(handed.covered, (pages, pages + 1))
    return int(starts[0]) if len(starts) else None


def _map_agrees(look: Look) -> Sequence[Violation]:
    handed, kernel = look.handed, look.kernel
    if handed is None or kernel is None or look.refused or not handed.is_sound:
        return ()
    starts, ends, order = look.incoming
    if overlaps(handed.handover.preserved):
        # One page cannot show two blocks: then only the pages must agree.
        told, seen = handed.covered, merged((starts, ends), _taken_back(look, as_pages=True))
    else:
        told = handed.blocks
        seen = merged((block_ids(order, starts), block_ids(order, ends)), _taken_back(look))
    found: list[Violation] = []
    if not same(told, seen):
        lost, phantom = minus(told, seen), minus(seen, told)
        found += _tell_blocks(look, handed, lost, "was preserved but is not reserved")
        found += _tell_blocks(look, handed, phantom, "is reserved but was not preserved")
        return found
    noinit = _noinit_pages(look)
    if not same(handed.covered, noinit):
        for pages, what in (
            (minus(handed.covered, noinit), "was preserved but memblock may hand it out"),
            (minus(noinit, handed.covered), "is kept from memblock but was not preserved"),
        ):
            found += _tell_blocks(look, handed, pages, what)
    return found


def _taken_back(look: Look, *, as_pages: bool = False) -> Ranges:
    # Releases to 6.18 restore the root FDT in the same breath: reserved, but incoming no more.
    assert look.kernel is not None
    pfns, ends, orders = block_runs(look.kernel.kho_in.restored)
    return (pfns, ends) if as_pages else (block_ids(orders, pfns), block_ids(orders, ends))


def _noinit_pages(look: Look) -> Ranges:
    assert look.kernel is not None
    reserved, shift = look.kernel.memblock.reserved, look.page_shift
    columns = zip(reserved.base, reserved.end, reserved.flags, strict=True)
    regions = [(base, end) for base, end, flags in columns if flags & _RSRV_NOINIT]
    kept = merged(page_ranges(regions, shift))
    if not len(look.kernel.gigantic_pages):
        return kept
    # hugetlb_bootmem_alloc leaves the tail pages of its huge pages to hugetlb_init. Releases before
    # 7.3 have no MEMBLOCK_RSRV_HUGETLB to tell them by.
    huge = np.array(look.kernel.gigantic_pages, dtype=np.int64).reshape(-1, 2)
    return minus(kept, merged((huge[:, 0] + 1, huge.sum(axis=1))))


def _tell_blocks(look: Look, handed: Handed, blocks: Ranges, what: str) -> list[Violation]:
    shift = look.page_shift
    found = []
    mask = (1 << PFN_BITS) - 1
    for start, end in pairs(blocks, REPORTED_MAX):
        pfn = start & mask
        order = f", order {63 - (start >> PFN_BITS)}" if start >> PFN_BITS else ""
        text = f"page {pfn << shift:#x} (pfn {pfn:#x}, {end - start} pages{order}) {what}"
        owner = handed.owner(pfn) or "nobody"
        found.append(look.says("map-agrees", text, pfn << shift, owner))
    return found


def _subtrees_reserved(look: Look) -> Sequence[Violation]:
    handed, kernel = look.handed, look.kernel
    if handed is None or kernel is None or look.refused or handed.handover.map_phys:
        return ()  # where there is a map, it is held against what was reserved
    shift = look.page_shift
    tables = {phys >> shift for phys in handed.handover.table_pages}
    pfns = sorted(handed.metadata - tables)
    starts, ends, _ = look.incoming
    kept = holds(merged((starts, ends), _taken_back(look, as_pages=True)), pfns)
    found = []
    for pfn, is_kept in zip(pfns, kept, strict=True):
        if not is_kept:
            text = (
                f"page {pfn << shift:#x} (pfn {pfn:#x}) holds the root FDT or a subtree; "
                f"generation {kernel.generation} believes it, but has not reserved the page"
            )
            owner = handed.owner(pfn) or "nobody"
            found.append(look.says("subtrees-reserved", text, pfn << shift, owner))
    return found[:REPORTED_MAX]


def _early_allocations(look: Look) -> Sequence[Violation]:
    handed, kernel = look.handed, look.kernel
    if handed is None or kernel is None or look.refused:
        return ()
    allowed = _open_to_boot(look, handed, kernel.release.scratch_extension)
    found = []
    for phys, len_bytes in kernel.memblock.allocations:
        if contains(allowed, phys, phys + len_bytes):
            continue
        pfn = phys >> look.page_shift
        text = (
            f"page {phys & -look.page_size:#x} (pfn {pfn:#x}): {len_bytes} bytes were allocated "
            f"early in boot at [{phys:#x}-{phys + len_bytes:#x}), outside of scratch"
        )
        owner = handed.owner(pfn) or "nobody"
        found.append(look.says("early-allocations-in-scratch", text, phys, owner))
    return found[:REPORTED_MAX]


def _open_to_boot(look: Look, handed: Handed, is_extended: bool) -> list[tuple[int, int]]:
    # Where early boot may allocate, in bytes: scratch, and GiB blocks that hold nothing of value.
    shift = look.page_shift
    allowed = [(addr, addr + size) for addr, size in handed.scratch]
    if look.hardware.arch == "x86_64":
        allowed.append((0, _MIB))
    if is_extended:
        to_gib = _EXTENSION_SHIFT - shift
        tables = np.array(handed.handover.table_pages, dtype=np.int64) >> shift
        starts = np.concatenate((handed.covered[0], tables))
        ends = np.concatenate((handed.covered[1], tables + 1))
        busy = merged((starts >> to_gib, ((ends - 1) >> to_gib) + 1))
        low = 0
        for start, end in zip(busy[0].tolist(), busy[1].tolist(), strict=True):
            allowed.append((low << _EXTENSION_SHIFT, start << _EXTENSION_SHIFT))
            low = end
        allowed.append((low << _EXTENSION_SHIFT, 1 << 64))
    joined: list[tuple[int, int]] = []
    for start, end in sorted(piece for piece in allowed if piece[0] < piece[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _scratch_stable(look: Look) -> Sequence[Violation]:
    kernel, known = look.kernel, look.history.scratch
    if kernel is None or known is None or not look.has_scratch or look.scratch == known:
        return ()
    now = look.scratch
    at = next(
        (i for i, pair in enumerate(zip(known, now, strict=False)) if pair[0] != pair[1]),
        min(len(known), len(now)),
    )

    def tell(areas: list[tuple[int, int]]) -> str:
        return f"{areas[at][0]:#x}+{areas[at][1]:#x}" if at < len(areas) else "nothing"

    phys = kernel.kho_scratch_phys + 16 * at
    text = (
        f"page {phys & -look.page_size:#x}: scratch area {at} was {tell(known)} and is {tell(now)} "
        f"in generation {kernel.generation}"
    )
    return [look.says("scratch-stable", text, phys, "kho_scratch")]


def _restored_once(look: Look) -> Sequence[Violation]:
    handed, kernel = look.handed, look.kernel
    if kernel is None or not len(kernel.kho_in.restored):
        return ()
    pfns, ends, orders = block_runs(kernel.kho_in.restored)
    blocks = block_ids(orders, pfns), block_ids(orders, ends)
    odd = (pfns & ((np.int64(1) << np.minimum(orders, PFN_BITS)) - 1)) != 0
    known: Ranges = (pfns[:0], pfns[:0])
    if handed is not None:
        known = handed.blocks
    weights = np.ones(len(pfns) + len(known[0]), dtype=np.int64)
    weights[len(pfns) :] = _KNOWN
    edges, levels = sweep(
        np.concatenate((blocks[0], known[0])), np.concatenate((blocks[1], known[1])), weights
    )
    twice = (levels & (_KNOWN - 1)) > 1
    unknown = (levels > 0) & (levels < _KNOWN)
    found: list[Violation] = []
    if len(unknown.nonzero()[0]) or len(odd.nonzero()[0]):
        what = "was restored, but no such block was handed over"
        found += _tell_restored(look, where(edges, unknown), what)
        found += _tell_restored(look, (blocks[0][odd], blocks[1][odd]), what)
    if len(twice.nonzero()[0]):
        found += _tell_restored(look, where(edges, twice), "was restored more than once")
    return found


def _tell_restored(look: Look, blocks: Ranges, what: str) -> list[Violation]:
    shift, handed = look.page_shift, look.handed
    found = []
    for start, _ in pairs(blocks, REPORTED_MAX):
        pfn, order = start & ((1 << PFN_BITS) - 1), 63 - (start >> PFN_BITS)
        owner = (handed.owner(pfn) if handed is not None else "") or "nobody"
        text = f"page {pfn << shift:#x} (pfn {pfn:#x}) of order {order} {what}"
        found.append(look.says("restored-once", text, pfn << shift, owner))
    return found


INVARIANTS = (
    Invariant(
        "handover-accepted",
        "A kernel that is given preserved memory takes it over, or says why it does not.",
        frozenset((TAKEOVER,)),
        _accepted,
    ),
    Invariant(
        "map-agrees",
        "What the old kernel preserved is what the new one reserves, block by block.",
        frozenset((TAKEOVER,)),
        _map_agrees,
    ),
    Invariant(
        "subtrees-reserved",
        "Who takes a handover over has reserved its root FDT and subtrees.",
        frozenset((TAKEOVER,)),
        _subtrees_reserved,
    ),
    Invariant(
        "early-allocations-in-scratch",
        "Until preserved memory is reserved, the new kernel allocates in scratch only.",
        frozenset((TAKEOVER,)),
        _early_allocations,
    ),
    Invariant(
        "scratch-stable",
        "The scratch areas are the same in every generation of a chain.",
        frozenset((TAKEOVER, BOOTED, JUMP, AT_ANY_TIME)),
        _scratch_stable,
    ),
    Invariant(
        "restored-once",
        "What is restored was handed over, has the order it was preserved with, and is restored "
        "once.",
        frozenset((BOOTED, JUMP, AT_ANY_TIME)),
        _restored_once,
    ),
)
