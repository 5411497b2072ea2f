"""Reserving preserved blocks one after the other, as releases before 7.2 do it.

Models ``deserialize_bitmap`` (``kernel/kexec_handover.c`` @ 6.16 to 7.0) and
``kho_preserved_memory_reserve`` @ 7.1: memblock, the noinit mark, and order (with the magic, where
the release has one) in ``page->private`` of the head page. Nothing checks whether a block can be
memory at all: the first without a ``struct page`` is a page fault.

The size of a block is an ``int`` there: at 2 GiB it is negative, so that all memory above is
reserved, and larger ones wrap to a few bytes. Fixed by 3a0b8fa2eb36 ("kho: fix size calculation in
kho_preserved_memory_reserve()") in 7.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from khosim.errors import KernelPanic
from khosim.kernel.page_map import INCOMING, PageState

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("leave_uninitialised", "reserve_blocks")

_U64 = (1 << 64) - 1
_WIDE = 31
_VMEMMAP_START = 0xFFFFEA0000000000
_STRUCT_PAGE_BYTES = 64
_PRIVATE_OFFSET = 40  # offsetof(struct page, private)


def reserve_blocks(kernel: Kernel, runs: Iterable[tuple[int, int, int]], symbol: str) -> None:
    """Reserve ``(phys, order, blocks)`` runs in order; panics at a block without a struct page."""
    plain: list[tuple[int, int, int]] = []
    shift = kernel.arch.page_shift
    for phys, order, nr_blocks in runs:
        width = order + shift
        fits = width < _WIDE or not kernel.release.reserve_size_is_int
        if fits and not phys & ((1 << width) - 1) and _heads_exist(kernel, phys, order, nr_blocks):
            plain.append((phys, order, nr_blocks))
            if kernel.trace is not None:
                args = {"phys": phys, "order": order, "nr_blocks": nr_blocks}
                kernel.emit(symbol, args, None)
            continue
        _reserve_plain(kernel, plain)
        plain = []
        for n in range(nr_blocks):
            _reserve_odd(kernel, phys + (n << width), order, symbol)
    _reserve_plain(kernel, plain)


def _fault(kernel: Kernel, pfn: int) -> str:
    # What the kernel prints at the store to page->private. Without KASLR and with four levels of
    # page tables x86-64 has its struct pages at a known address.
    address = f"{_VMEMMAP_START + pfn * _STRUCT_PAGE_BYTES + _PRIVATE_OFFSET:016x}"
    if kernel.arch.name == "x86_64":
        return f"BUG: unable to handle page fault for address: {address}"
    return "Unable to handle kernel paging request"


def _heads_exist(kernel: Kernel, phys: int, order: int, nr_blocks: int) -> bool:
    pfn = phys >> kernel.arch.page_shift
    return kernel.struct_pages_exist(pfn, nr_blocks << order)


def _state(order: int) -> PageState:
    return PageState(INCOMING, order, False, "predecessor")


def _reserve_plain(kernel: Kernel, runs: list[tuple[int, int, int]]) -> None:
    # Whole runs at once: aligned blocks of sane sizes whose struct pages are all there.
    if not runs:
        return
    shift = kernel.arch.page_shift
    starts = [phys for phys, _, _ in runs]
    ends = [phys + (nr_blocks << order + shift) for phys, order, nr_blocks in runs]
    kernel.memblock.memblock_reserve_many(starts, ends)
    page_map = kernel.pages.pages
    fresh = []
    for (_, order, _), start, end in zip(runs, starts, ends, strict=True):
        fresh.append((start >> shift, end >> shift, _state(order)))
    if not _overlap(fresh) and not any(page_map.overlapping(*run[:2]) for run in fresh):
        page_map.add_many(fresh)
        return
    for first, last, state in fresh:
        _set(kernel, first, last, state)


def _overlap(runs: list[tuple[int, int, PageState]]) -> bool:
    covered_to = -1
    for first, last, _ in sorted(runs):
        if first < covered_to:
            return True
        covered_to = last
    return False


def _set(kernel: Kernel, first: int, last: int, state: PageState) -> None:
    # Blocks over blocks, of a misread map: an older head that is no head of the new blocks, which
    # are counted from ``first``, keeps what its struct page says.
    page_map = kernel.pages.pages
    heads = [pfn for pfn in page_map.private if first <= pfn < last]
    for start, end, old in page_map.overlapping(first, last):
        if old.kind == INCOMING:
            step = 1 << old.order
            heads += range(-(-start // step) * step, end, step)
    new_step, magic = 1 << state.order, kernel.kho_page_magic
    kept = {head: page_map.page_private(head, magic) for head in heads if (head - first) % new_step}
    page_map.set(first, last, state)
    page_map.private.update(kept)


def _reserve_odd(kernel: Kernel, phys: int, order: int, symbol: str) -> None:
    shift = kernel.arch.page_shift
    width = order + shift
    size = 1 << (width & 63)
    if kernel.release.reserve_size_is_int:
        size = 1 << (width & 31)
        if size >> 31:
            size = (size - (1 << 32)) & _U64
    kernel.memblock.memblock_reserve(phys, size)
    if kernel.trace is not None:
        kernel.emit(symbol, {"phys": phys, "order": order, "nr_blocks": 1}, None)
    kernel.memblock.memblock_reserved_mark_noinit(phys, size)
    pfn = phys >> shift
    if not kernel.pfn_to_online_page(pfn):
        raise KernelPanic(
            f"{_fault(kernel, pfn)}, struct page of pfn {pfn:#x} in {symbol}: no memory is there",
            kernel.generation,
        )
    end_pfn = (phys + size + kernel.arch.page_size - 1) >> shift
    end_pfn = min(end_pfn, kernel.memblock.memblock_end_of_DRAM() >> shift)
    sane = order if order <= shift * 3 else 0
    _set(kernel, pfn, max(end_pfn, pfn + 1), _state(sane))
    # Only the head's struct page was written to.
    page_map = kernel.pages.pages
    step = 1 << sane
    for head in range((pfn // step + 1) * step, end_pfn, step):
        page_map.private.setdefault(head, 0)
    page_map.private[pfn] = kernel.kho_page_magic << 32 | order


def leave_uninitialised(kernel: Kernel) -> None:
    """What comes of preserved blocks' struct pages where initialisation is deferred, up to 7.1.

    Nobody sets them up: ``memmap_init_reserved_pages`` leaves noinit regions out, and
    ``deferred_init_memmap`` all that is reserved. One word of them is written, ``private``.
    """
    if not kernel.release.deferred_struct_pages or kernel.release.preserved_pages_initialised:
        return
    pages = kernel.pages
    for start_pfn, end_pfn, state in pages.pages.runs():
        if state.kind != INCOMING:
            continue
        for low, high, zone in pages.pieces_in(start_pfn, end_pfn):
            first = max(low, pages.first_deferred_pfn.get(zone.nid, high))
            if first < high:
                pages.uninitialised.append((first, high))
