"""Whole-array work on the leaves of the radix tree: runs of set bits, and keys sorted by leaf.

Serves :mod:`khosim.kernel.kho_radix`, where the kernel takes one bit and one key after the other
(``kernel/liveupdate/kexec_handover.c:kho_radix_walk_leaf`` @ 7.3). Nothing here touches RAM.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = (
    "bytes_of_bits",
    "fill_bits",
    "first_uses",
    "runs_of_bits",
    "runs_of_leaves",
    "set_bits",
    "sparse_runs",
    "used_words",
)

Numbers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
_SPARSE_WORDS = 16
_NARROW = 1 << 22


def used_words(words: Words) -> tuple[list[int], list[int]]:
    """The indexes of the words that are not 0, ascending, and the words."""
    used = words.astype(np.bool_).nonzero()[0]  # faster than of the words themselves
    indexes = used.tolist()
    if len(indexes) == 1:  # as in most tables
        return indexes, [words.item(indexes[0])]
    return indexes, words[used].tolist()


def runs_of_bits(words: Words, base: int) -> list[tuple[int, int]]:
    """``(length, base | first bit)`` of each run of set bits, ascending.

    ``words`` is the bitmap, lowest bit first; ``base`` has no bit in common with a bit's number.
    """
    indexes, values = used_words(words)
    if len(indexes) <= _SPARSE_WORDS:
        return sparse_runs(indexes, values, [base], words.size.bit_length() + 5)
    counts, firsts, _ = runs_of_leaves(words.reshape(1, -1), np.array([base], dtype=np.int64))
    return list(zip(counts.tolist(), firsts.tolist(), strict=True))


def runs_of_leaves(words: Words, bases: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """:func:`runs_of_bits` of many bitmaps, a row of ``words`` each: ``(lengths, firsts, rows)``.

    ``rows`` tells for each run which bitmap it is in, ascending; none goes on in the next.
    """
    width = words.shape[1].bit_length() + 5  # log2 of the bits of a row
    flat = words.ravel()
    used = (flat != 0).nonzero()[0]
    octets = flat[used].view(np.uint8)
    some = (octets != 0).nonzero()[0]
    flags = np.unpackbits(octets[some], bitorder="little").view(np.bool_).nonzero()[0]
    place = some[flags >> 3]
    bits = used[place >> 3] << 6 | (place & 7) << 3 | flags & 7
    begins = np.ones(len(bits) + 1, dtype=np.bool_)
    np.not_equal(bits[1:] - bits[:-1], 1, out=begins[1:-1])
    begins[1:-1] |= bits[1:] & ((1 << width) - 1) == 0
    edges = begins.nonzero()[0]
    firsts = bits[edges[:-1]]
    rows = firsts >> width
    return edges[1:] - edges[:-1], bases[rows] | (firsts & ((1 << width) - 1)), rows


def sparse_runs(
    indexes: list[int], words: list[int], bases: list[int], leaf_bits: int
) -> list[tuple[int, int]]:
    """:func:`runs_of_bits` of bitmaps that lie in a row, from their words that are not 0.

    Each bitmap has ``1 << leaf_bits`` bits and its own one of ``bases``; ``indexes`` count through.
    """
    found: list[tuple[int, int]] = []
    inside = (1 << leaf_bits) - 1
    start = count = 0
    for index, word in zip(indexes, words, strict=True):
        at = index << 6
        while word:
            skip = (word & -word).bit_length() - 1
            word >>= skip
            at += skip
            ones = (~word & (word + 1)).bit_length() - 1
            if count and start + count == at and at & inside:
                count += ones
            else:
                if count:
                    found.append((count, bases[start >> leaf_bits] | (start & inside)))
                start, count = at, ones
            word >>= ones
            at += ones
    if count:
        found.append((count, bases[start >> leaf_bits] | (start & inside)))
    return found


def set_bits(data: npt.NDArray[np.uint8], octets: Numbers, bits: Numbers) -> None:
    """``data[octets] |= 1 << bits`` (bits below 8), repeats allowed.

    One bit number after the other: then a byte that is named twice gets the same value twice.
    """
    octets = octets[np.argsort(bits.astype(np.uint8), kind="stable")]
    past = np.bincount(bits, minlength=8).cumsum().tolist()
    for bit, (start, end) in enumerate(zip([0, *past], past, strict=False)):
        data[octets[start:end]] |= 1 << bit


def first_uses(groups: Numbers) -> tuple[Numbers, Numbers]:
    """Number the distinct values of ``groups``: (number of each, index of each one's first)."""
    low = int(groups.min())
    spread = int(groups.max()) - low + 1
    if spread > _NARROW:
        _, first_use, numbers = np.unique(groups, return_index=True, return_inverse=True)
        return numbers, first_use
    offsets = groups - low
    first_seen = np.full(spread, -1, dtype=np.int64)
    first_seen[offsets[::-1]] = np.arange(len(groups) - 1, -1, -1, dtype=np.int64)
    used = (first_seen >= 0).nonzero()[0]
    number_of = np.empty(spread, dtype=np.int64)
    number_of[used] = np.arange(len(used), dtype=np.int64)
    return number_of[offsets], first_seen[used]


def bytes_of_bits(low: int, high: int) -> int:
    """How many bytes the bits [low, high) of a bitmap lie in."""
    return ((high - 1) >> 3) - (low >> 3) + 1


def fill_bits(bytes_: npt.NDArray[np.uint8], low: int, high: int, *, is_set: bool) -> None:
    """Set or clear the bits [low, high) of a bitmap; ``bytes_`` are those that they lie in."""
    head, tail = 0xFF << (low & 7) & 0xFF, 0xFF >> (7 - ((high - 1) & 7))
    if len(bytes_) == 1:
        edges = [(0, head & tail)]
    else:
        edges = [(0, head), (len(bytes_) - 1, tail)]
        bytes_[1:-1] = 0xFF if is_set else 0
    for i, mask in edges:
        value = int(bytes_[i])
        bytes_[i] = value | mask if is_set else value & ~mask & 0xFF
