"""Contents for pages: bytes that follow from a key alone, written and verified many at a time.

Each page has a 64-bit key. Pages with different keys differ in every word, so that a page that
ends up in the place of another is noticed as surely as a flipped bit.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from khosim.machine.ram import By, Ram

__all__ = (
    "FILLS",
    "content_pages",
    "damaged_pages",
    "first_keys",
    "next_keys",
    "page_contents",
    "write_pages",
)

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

FILLS = ("none", "ends", "all")
"""How much of a block gets content: nothing, its first and its last page, or every page."""

_CHUNK_BYTES = 4 << 20
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ODD = np.uint64(0xD6E8FEB86659FD93)


def _mixed(values: U64) -> U64:
    # The finaliser of splitmix64.
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def first_keys(seed: int, label: str, count: int) -> U64:
    """Keys of ``count`` new blocks; ``label`` tells equal calls with equal seeds apart."""
    digest = blake2b(f"{seed}:{label}".encode(), digest_size=8).digest()
    base = np.uint64(int.from_bytes(digest, "little"))
    return _mixed(base + np.arange(count, dtype=np.uint64) * _GOLDEN)


def next_keys(keys: U64) -> U64:
    """Keys of the same blocks after they were written anew."""
    return _mixed(keys + _GOLDEN)


def content_pages(pfns: I64, nr_pages: I64, keys: U64, fills: I64) -> tuple[I64, U64]:
    """The pages that carry content, of blocks given by their first pfn and length, and their keys.

    ``fills`` are indexes into :data:`FILLS`.
    """
    some = fills > 0
    pfns, nr_pages, keys, fills = pfns[some], nr_pages[some], keys[some], fills[some]
    counts = np.where(fills == 2, nr_pages, np.minimum(nr_pages, 2))
    block = np.repeat(np.arange(len(pfns)), counts)
    index = np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts)
    page = np.where((fills[block] == 1) & (index == 1), nr_pages[block] - 1, index)
    return pfns[block] + page, keys[block] + page.astype(np.uint64) * _GOLDEN


def _pattern(page_size: int) -> U64:
    return _mixed(np.arange(1, page_size // 8 + 1, dtype=np.uint64) * _GOLDEN)


def _content(pattern: U64, keys: U64) -> U64:
    words: U64 = pattern ^ keys[:, None]
    words *= _ODD
    return words


def page_contents(page_size: int, keys: U64) -> U64:
    """The content of each key: a row of ``page_size`` bytes, as u64."""
    return _content(_pattern(page_size), keys)


def write_pages(ram: Ram, pfns: I64, keys: U64, by: By) -> None:
    """Fill each page with the content of its key."""
    frames = ram.data.view(np.uint64).reshape(-1, ram.page_size // 8)
    pattern = _pattern(ram.page_size)
    step = _CHUNK_BYTES // ram.page_size
    for at in range(0, len(pfns), step):
        chunk = pfns[at : at + step]
        ram.note_writes(chunk, by)
        frames[chunk] = _content(pattern, keys[at : at + step])


def damaged_pages(ram: Ram, pfns: I64, keys: U64) -> I64:
    """The pages that do not hold the content of their key, in the order given."""
    frames = ram.data.view(np.uint64).reshape(-1, ram.page_size // 8)
    pattern = _pattern(ram.page_size)
    step = _CHUNK_BYTES // ram.page_size
    damaged = [pfns[:0]]
    for at in range(0, len(pfns), step):
        chunk = pfns[at : at + step]
        differs = (frames[chunk] != _content(pattern, keys[at : at + step])).any(axis=1)
        damaged.append(chunk[differs])
    return np.concatenate(damaged)
