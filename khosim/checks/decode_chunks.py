"""The checkers' reader of the chunk list that held the preserved-memory map of kho-v1.

A chunk is a page: the next chunk's address, an order, and up to 255 (with 4 KiB pages) pairs of an
address and a bitmap for the blocks of that order from there on
(``kernel/kexec_handover.c:khoser_mem_chunk`` @ 6.16 to 7.0).

Bitmaps had 4096 bits at first and as many as fit on a page since 6.18, with nothing in the
handover to tell. Short ones came from the slab, so that hardly any begins on a page, and their
addresses lie closer: the first of either settles it.

Left out: chunks and bitmaps of machines that are not little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from khosim.checks.decode_radix import bit_runs
from khosim.checks.preserved import Preserved
from khosim.checks.reader import ProblemLog, page_shift
from khosim.errors import RamFault

if TYPE_CHECKING:
    from khosim.checks.preserved import I64
    from khosim.checks.reader import Reader

__all__ = ("Chunk", "ChunkMap", "Element", "decode_chunks")

_HEADER = Struct("<QII")
_ELEMENT = Struct("<QQ")
_SHORT_BITS = 4096
_PHYS_BITS = 52
_MAX_CHUNKS = 1 << 16


class Element(NamedTuple):
    """One bitmap: the address its first bit stands for, its own address, how many bits are set."""

    phys_start: int
    bitmap: int
    nr_set: int


class Chunk(NamedTuple):
    """One page of the list. ``nr_elements`` is what it says it has."""

    phys: int
    next_phys: int
    order: int
    nr_elements: int
    elements: list[Element]


@dataclass(frozen=True, slots=True, eq=False)
class ChunkMap(Preserved):
    """The preserved set, and the chunks that it was read from.

    ``preserve_bits`` is the number of bits of a bitmap.
    """

    chunks: tuple[Chunk, ...]
    preserve_bits: int


def decode_chunks(
    reader: Reader, map_phys: int, page_size: int, preserve_bits: int | None = None
) -> ChunkMap:
    """Decode the list whose first chunk is at ``map_phys``; at 0 there is none, and no problem.

    ``preserve_bits`` is found out where it is None. Never raises on the contents.
    """
    log = ProblemLog()
    shift = page_shift(page_size)
    raw = _read_chunks(reader, map_phys, page_size, log)
    if preserve_bits is None:
        preserve_bits = _guess_bits(raw, page_size)
    chunks: list[Chunk] = []
    orders: list[I64] = []
    starts: list[I64] = []
    counts: list[I64] = []
    pages = dict.fromkeys(chunk.phys for chunk in raw)
    for chunk in raw:
        elements: list[Element] = []
        window = preserve_bits << chunk.order + shift if chunk.elements else 0
        for element in chunk.elements:
            path = f"/chunks[{len(chunks)}]/bitmaps[{len(elements)}]"
            nr_set = 0
            bits = _read_bitmap(reader, chunk.phys, element, window, preserve_bits, path, log)
            if bits is not None:
                first, past = bit_runs(bits, 0, len(bits))
                nr_set = int((past - first).sum())
                orders.append(np.full(len(first), chunk.order, dtype=np.int64))
                starts.append((first << chunk.order) + (element.phys_start >> shift))
                counts.append(past - first)
                pages[element.bitmap & -page_size] = None
            elements.append(element._replace(nr_set=nr_set))
        chunks.append(chunk._replace(elements=elements))
    none = np.empty(0, dtype=np.int64)
    return ChunkMap(
        page_size,
        np.concatenate((none, *orders)),
        np.concatenate((none, *starts)),
        np.concatenate((none, *counts)),
        tuple(pages),
        log.done(),
        tuple(chunks),
        preserve_bits,
    )


def _read_chunks(reader: Reader, head: int, page_size: int, log: ProblemLog) -> list[Chunk]:
    """The chunks with their elements, bitmaps not looked at."""
    found: list[Chunk] = []
    seen: set[int] = set()
    capacity = (page_size - _HEADER.size) // _ELEMENT.size
    phys, at = head, head
    while phys:
        path = f"/chunks[{len(found)}]"
        if phys % page_size or phys in seen or len(found) == _MAX_CHUNKS:
            expected = "the address of a chunk page that was not read before"
            log.add("chunk-pointer", at, f"{phys:#x}", path, expected)
            break
        seen.add(phys)
        try:
            page = reader.read(phys, page_size)
        except RamFault as fault:
            log.add("chunk-unreadable", at, f"{phys:#x} ({fault.cause})", path, "readable memory")
            break
        following, order, nr_elements = _HEADER.unpack_from(page)
        if nr_elements > capacity:
            log.add("chunk-count", phys + 12, f"{nr_elements}", path, f"at most {capacity}")
        if order > _PHYS_BITS - page_size.bit_length():
            log.add("chunk-order", phys + 8, f"{order}", path, "an order that a machine can hold")
            nr_elements = 0
        past = _HEADER.size + min(nr_elements, capacity) * _ELEMENT.size
        pairs = _ELEMENT.iter_unpack(page[_HEADER.size : past])
        elements = [Element(phys_start, bitmap, 0) for phys_start, bitmap in pairs]
        found.append(Chunk(phys, following, order, nr_elements, elements))
        at, phys = phys, following
    return found


def _guess_bits(chunks: list[Chunk], page_size: int) -> int:
    """Bits of a bitmap: what alignment of bitmaps and of their ranges allows."""
    full = page_size * 8
    for chunk in chunks:
        window = full * page_size << chunk.order if chunk.elements else 0
        for phys_start, bitmap, _ in chunk.elements:
            if bitmap % page_size or phys_start % window:
                return _SHORT_BITS
    return full


def _read_bitmap(
    reader: Reader, at: int, element: Element, window: int, nr_bits: int, path: str, log: ProblemLog
) -> bytes | None:
    """A bitmap's bytes; None, after a problem, where it cannot be one."""
    phys_start, bitmap, _ = element
    if phys_start % window or phys_start >> _PHYS_BITS:
        expected = f"a multiple of {window:#x} below {1 << _PHYS_BITS:#x}"
        log.add("chunk-range", at, f"{phys_start:#x}", path, expected)
        return None
    try:
        return reader.read(bitmap, nr_bits // 8)
    except RamFault as fault:
        log.add("chunk-bitmap", at, f"{bitmap:#x} ({fault.cause})", path, "readable memory")
        return None
