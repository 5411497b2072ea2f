"""How a preserved vmalloc area is described: a descriptor and a chain of chunk pages.

Layout of ``include/linux/kho/abi/kexec_handover.h:struct kho_vmalloc`` and ``struct
kho_vmalloc_chunk`` @ 6.18 .. 7.3, little-endian. The descriptor (16 bytes) lies wherever its owner
keeps it: u64 ``first`` (physical address of the first chunk), u32 ``total_pages``, u16 ``flags``,
u16 ``order``. A chunk is one page: u64 ``next`` (0: the last), then u64 physical addresses of
blocks of ``1 << order`` pages, up to the end of the page or to the first 0.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

__all__ = (
    "KHO_VMALLOC_ALLOC",
    "KHO_VMALLOC_BYTES",
    "KHO_VMALLOC_HDR_BYTES",
    "KHO_VMALLOC_HUGE_VMAP",
    "KhoVmalloc",
    "kho_vmalloc_size",
    "pack_kho_vmalloc",
    "pack_kho_vmalloc_chunk",
    "unpack_kho_vmalloc",
    "unpack_kho_vmalloc_chunk",
)

KHO_VMALLOC_ALLOC = 0x0001
"""The area had ``VM_ALLOC``."""
KHO_VMALLOC_HUGE_VMAP = 0x0002
"""The area had ``VM_ALLOW_HUGE_VMAP``."""
KHO_VMALLOC_HDR_BYTES = 8
_LAYOUT = struct.Struct("<QIHH")
KHO_VMALLOC_BYTES = _LAYOUT.size


class KhoVmalloc(NamedTuple):
    """``struct kho_vmalloc``: ``first`` is a physical address, ``order`` that of each block."""

    first: int
    total_pages: int
    flags: int
    order: int


def pack_kho_vmalloc(vmalloc: KhoVmalloc) -> bytes:
    """The 16 bytes of a descriptor."""
    return _LAYOUT.pack(*vmalloc)


def unpack_kho_vmalloc(data: bytes, offset: int = 0) -> KhoVmalloc:
    """The descriptor at ``data[offset:]``."""
    return KhoVmalloc(*_LAYOUT.unpack_from(data, offset))


def kho_vmalloc_size(page_size: int) -> int:
    """``KHO_VMALLOC_SIZE``: addresses in a chunk (511, 2047 or 8191)."""
    return (page_size - KHO_VMALLOC_HDR_BYTES) // 8


def pack_kho_vmalloc_chunk(next_phys: int, phys: Sequence[int], page_size: int) -> bytes:
    """A chunk page that points at ``next_phys`` and lists ``phys``, the rest zero."""
    nr_empty = kho_vmalloc_size(page_size) - len(phys)
    if nr_empty < 0:
        raise ValueError(f"{len(phys)} addresses do not fit into a chunk of {page_size} bytes")
    return struct.pack(f"<Q{len(phys)}Q", next_phys, *phys) + bytes(8 * nr_empty)


def unpack_kho_vmalloc_chunk(page: bytes) -> tuple[int, list[int]]:
    """``(next_phys, addresses)`` of a chunk page; the list ends before the first 0."""
    next_phys, *phys = struct.unpack(f"<{len(page) // 8}Q", page)
    return next_phys, phys[: phys.index(0)] if 0 in phys else phys
