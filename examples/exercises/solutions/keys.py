"""A solution of exercise 1."""

from __future__ import annotations


def key_of(phys: int, order: int, page_size: int) -> int:
    """The key of the block of ``page_size << order`` bytes at ``phys``."""
    size = page_size << order
    return (1 << 64) // size | phys // size


def block_of(key: int, page_size: int) -> tuple[int, int]:
    """``(phys, order)`` of the block that a key stands for."""
    mark = 1 << key.bit_length() - 1
    size = (1 << 64) // mark
    return (key - mark) * size, (size // page_size).bit_length() - 1
