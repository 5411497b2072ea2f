"""Exercise 1, after lesson 4: keys for every page size.

Lesson 4 made keys for pages of 4096 bytes. arm64 also has pages of 16384 and 65536 bytes. A key is

* the block's address divided by the block's size,
* and above it a single 1, at bit 64 - log2(block's size in bytes).

So the 1 of a block of order 0 is at bit 52, 50 or 48. Write both functions for any page size.
"""

from __future__ import annotations


def key_of(phys: int, order: int, page_size: int) -> int:
    """The key of the block of ``page_size << order`` bytes at ``phys``."""
    raise NotImplementedError


def block_of(key: int, page_size: int) -> tuple[int, int]:
    """``(phys, order)`` of the block that a key stands for."""
    raise NotImplementedError
