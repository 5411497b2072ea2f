"""The keys of the radix tree of preserved memory: one number for a block's address and order.

Models ``kho_encode_radix_key`` and ``kho_decode_radix_key`` of
``kernel/liveupdate/kexec_handover.c`` @ 7.3.
"""

from __future__ import annotations

__all__ = ("key_base", "kho_decode_radix_key", "kho_encode_radix_key")

_U64 = (1 << 64) - 1


def key_base(order: int, page_shift: int) -> int:
    """The order bit of every key of ``order``: the key of the block at address 0."""
    shift = page_shift + order
    return 1 << (64 - shift) if shift <= 64 else 0


def kho_encode_radix_key(phys: int, order: int, page_shift: int) -> int:
    """``kho_encode_radix_key``: one number for a block's address (bytes) and order."""
    return key_base(order, page_shift) | (phys >> (page_shift + order))


def kho_decode_radix_key(key: int, page_shift: int) -> tuple[int, int]:
    """``kho_decode_radix_key``: ``(phys, order)`` of any 64-bit key.

    The shift works as the CPU's does, by its low six bits, and drops what leaves 64 bits. Of a key
    wider than any that can be added the order is negative, where the kernel's is unsigned.
    """
    shift = 65 - key.bit_length()
    return (key << (shift & 63)) & _U64, shift - page_shift
