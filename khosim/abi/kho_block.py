"""KHO blocks: pages of equal entries, chained by physical address.

Layout of ``include/linux/kho/abi/block.h:struct kho_block_header_ser`` @ 7.2 .. 7.3, versioned by
the root FDT's compatible string (kho-v4): u64 ``next`` (physical address, 0: the last), u64
``count``, then ``count`` entries, packed. A block is one page.
"""

from __future__ import annotations

import dataclasses
import struct

__all__ = (
    "KHO_BLOCK_HEADER_BYTES",
    "KhoBlockHeaderSer",
    "kho_block_capacity",
    "pack_kho_block_header",
    "unpack_kho_block_header",
)

_LAYOUT = struct.Struct("<QQ")
KHO_BLOCK_HEADER_BYTES = _LAYOUT.size


@dataclasses.dataclass(frozen=True, slots=True)
class KhoBlockHeaderSer:
    """``struct kho_block_header_ser``: ``next`` is a physical address."""

    next: int
    count: int


def pack_kho_block_header(header: KhoBlockHeaderSer) -> bytes:
    """The 16 bytes of a header."""
    return _LAYOUT.pack(header.next, header.count)


def unpack_kho_block_header(data: bytes, offset: int = 0) -> KhoBlockHeaderSer:
    """The header at ``data[offset:]``."""
    return KhoBlockHeaderSer(*_LAYOUT.unpack_from(data, offset))


def kho_block_capacity(page_size: int, entry_bytes: int) -> int:
    """Entries of ``entry_bytes`` that one block holds."""
    return (page_size - KHO_BLOCK_HEADER_BYTES) // entry_bytes
