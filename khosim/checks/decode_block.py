"""The checkers' reader of lists of blocks, in which LUO keeps its sessions and files.

A block is one page: the address of the next, the number of entries, the entries
(``include/linux/kho/abi/block.h`` @ 7.3). ``kernel/liveupdate/kho_block.c:kho_block_set_restore``
drops a whole list for one bad count or a cycle; this reader notes it and keeps what it has.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from khosim.checks.decode_walk import Walk

__all__ = ("decode_blocks",)

_HEADER = Struct("<QQ")
_MAX_BLOCKS = 10_000  # KHO_MAX_BLOCKS


def decode_blocks(
    walk: Walk, head: int, entry_bytes: int, path: str, at: int
) -> list[tuple[int, bytes]]:
    """Address and bytes of each entry of the list whose first block is at ``head``.

    ``at`` is where the pointer to it stands.
    """
    found: list[tuple[int, bytes]] = []
    capacity = (walk.page_size - _HEADER.size) // entry_bytes
    phys, nr_blocks = head, 0
    while phys:
        where = f"{path}/blocks[{nr_blocks}]"
        if nr_blocks == _MAX_BLOCKS:
            walk.note("block-list", at, "one more", where, f"at most {_MAX_BLOCKS} blocks")
            break
        page = walk.page(phys, where, at)
        if page is None:
            break
        following, count = _HEADER.unpack_from(page)
        if not 0 < count <= capacity:
            walk.note("block-count", phys + 8, f"{count}", f"{where}/count", f"1 to {capacity}")
            count = _filled(page, entry_bytes, capacity) if count else 0
        offsets = range(_HEADER.size, _HEADER.size + count * entry_bytes, entry_bytes)
        found += [(phys + offset, page[offset : offset + entry_bytes]) for offset in offsets]
        at, phys = phys, following
        nr_blocks += 1
    return found


def _filled(page: bytes, entry_bytes: int, capacity: int) -> int:
    """How many entries stand before the first that is all zero."""
    for index in range(capacity):
        at = _HEADER.size + index * entry_bytes
        if not any(page[at : at + entry_bytes]):
            return index
    return capacity
