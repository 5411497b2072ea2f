"""The preserved-memory map of kho-v1: a list of chunks that point at bitmaps.

Bytes of ``struct khoser_mem_chunk`` and ``struct khoser_mem_bitmap_ptr``
(``kernel/kexec_handover.c`` @ 6.16 to 6.18, ``kernel/liveupdate/kexec_handover.c`` @ 6.19 and 7.0).
A chunk is a page, its bitmaps are all of one order. Left out: kernels that are not little-endian.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

__all__ = (
    "CHUNK_HDR_BYTES",
    "ELEMENT_BYTES",
    "SHORT_BITMAP_BYTES",
    "ChunkHdr",
    "Element",
    "chunk_capacity",
    "pack_chunk_hdr",
    "pack_element",
    "unpack_chunk_hdr",
    "unpack_element",
)

_HDR = Struct("<QII")
_ELEMENT = Struct("<QQ")
CHUNK_HDR_BYTES = _HDR.size
ELEMENT_BYTES = _ELEMENT.size
SHORT_BITMAP_BYTES = 512
"""A bitmap of 6.16 and 6.17; later ones fill a page."""


class ChunkHdr(NamedTuple):
    """``struct khoser_mem_chunk_hdr``: ``next_phys`` in bytes, 0 at the end of the list."""

    next_phys: int
    order: int
    num_elms: int


class Element(NamedTuple):
    """``struct khoser_mem_bitmap_ptr``: what bit 0 stands for, and where the bitmap is."""

    phys_start: int
    bitmap_phys: int


def chunk_capacity(page_size: int) -> int:
    """``KHOSER_BITMAP_SIZE``: elements of one chunk."""
    return (page_size - CHUNK_HDR_BYTES) // ELEMENT_BYTES


def pack_chunk_hdr(hdr: ChunkHdr) -> bytes:
    """The 16 bytes of a chunk's header."""
    return _HDR.pack(*hdr)


def unpack_chunk_hdr(data: bytes) -> ChunkHdr:
    """Read a chunk's header."""
    return ChunkHdr(*_HDR.unpack(data))


def pack_element(element: Element) -> bytes:
    """The 16 bytes of an element."""
    return _ELEMENT.pack(*element)


def unpack_element(data: bytes) -> Element:
    """Read an element."""
    return Element(*_ELEMENT.unpack(data))
