"""The checkers' reader of preserved vmalloc areas.

``struct kho_vmalloc`` names the first of a list of chunk pages, which list the areas that make up
the mapping, each ``1 << order`` pages (``include/linux/kho/abi/kexec_handover.h``,
``kernel/liveupdate/kexec_handover.c:kho_preserve_vmalloc`` @ 7.3). A chunk is full, or ends with a
zero and is the last one.

Left out: the virtual mapping, which the next kernel makes anew.
"""

from __future__ import annotations

from struct import Struct, unpack_from
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from khosim.checks.decode_walk import Walk

__all__ = ("VMALLOC_BYTES", "Vmalloc", "decode_vmalloc", "read_vmalloc")

_VMALLOC = Struct("<QIHH")
VMALLOC_BYTES = _VMALLOC.size
_KNOWN_FLAGS = 0x3  # KHO_VMALLOC_ALLOC, KHO_VMALLOC_HUGE_VMAP
_MAX_ORDER = 18  # PUD-sized mappings with 4 KiB pages


class Vmalloc(NamedTuple):
    """One area: ``areas`` are the physical addresses of its pieces, ``1 << order`` pages each.

    ``sound`` tells whether these are all pages it should have.
    """

    total_pages: int
    flags: int
    order: int
    areas: list[int]
    sound: bool


def decode_vmalloc(walk: Walk, raw: bytes, phys: int, path: str) -> Vmalloc:
    """Decode the ``struct kho_vmalloc`` in ``raw``, which lies at ``phys``."""
    first, total_pages, flags, order = _VMALLOC.unpack(raw)
    if flags & ~_KNOWN_FLAGS:
        expected = f"bits of {_KNOWN_FLAGS:#x}"
        walk.note("vmalloc-flags", phys + 12, f"{flags:#x}", f"{path}/flags", expected)
    if order > _MAX_ORDER:
        expected = f"at most {_MAX_ORDER}"
        walk.note("vmalloc-order", phys + 14, f"order {order}", f"{path}/order", expected)
        return Vmalloc(total_pages, flags, order, [], False)
    chunks: list[int] = []
    areas: list[int] = []
    sound = _chunks(walk, first, phys, path, chunks, areas)
    per_chunk = walk.page_size // 8 - 1
    for index, area in enumerate(areas):
        at = chunks[index // per_chunk] + 8 + index % per_chunk * 8
        if not walk.take(area, f"{path}/areas[{index}]", at, order=order):
            del areas[index:]
            sound = False
            break
    if sound and len(areas) << order != total_pages:
        found = f"{len(areas) << order} pages in its chunks"
        walk.note("vmalloc-pages", phys + 8, found, path, f"{total_pages} pages")
        sound = False
    return Vmalloc(total_pages, flags, order, areas, sound)


def read_vmalloc(walk: Walk, area: Vmalloc, len_bytes: int, path: str) -> bytes:
    """The first ``len_bytes`` bytes of an area, or what there is of them."""
    piece = walk.page_size << area.order
    parts: list[bytes] = []
    have = 0
    for index, phys in enumerate(area.areas):
        if have >= len_bytes:
            break
        size = min(piece, len_bytes - have)
        part = walk.read(phys, size, f"{path}/areas[{index}]", phys)
        if part is None:
            break
        parts.append(part)
        have += size
    return b"".join(parts)


def _chunks(
    walk: Walk, first: int, at: int, path: str, chunks: list[int], areas: list[int]
) -> bool:
    """Follow the chunks from the pointer at ``at``; False where they do not end well."""
    phys = first
    nr_words = walk.page_size // 8
    if phys == 0:
        walk.note("vmalloc-chunk", at, "0", f"{path}/first", "the address of a chunk page")
        return False
    while phys:
        where = f"{path}/chunks[{len(chunks)}]"
        page = walk.page(phys, where, at)
        if page is None:
            return False
        following, *words = unpack_from(f"<{nr_words}Q", page)
        used = words.index(0) if 0 in words else len(words)
        chunks.append(phys)
        areas += words[:used]
        if used == len(words) and not following:
            walk.note("vmalloc-chunk", phys, "no next chunk", where, "one after a full chunk")
            return False
        if following and used < len(words):
            expected = f"{len(words)} areas in all chunks but the last"
            walk.note("vmalloc-chunk", phys, f"{used} areas", where, expected)
            return False
        at, phys = phys, following
    return True
