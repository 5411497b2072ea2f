"""The checkers' reader of the radix tree that holds the preserved-memory map since kho-v2.

Reads the pages that ``kernel/liveupdate/kexec_handover.c:kho_radix_add_key`` filled and yields
what ``kho_radix_walk_tree`` would call back with, in its order (ascending keys), from
``include/linux/kho/abi/kexec_handover.h`` (``enum kho_radix_consts``, the key's layout) @ 7.3.

The kernel trusts a tree it was handed; this reader does not. Pointers that are unaligned or lead
out of RAM, pages reached twice, and keys that stand for no block become problems and are passed
over. Each page is read once, and the numbers of pages, runs and broken entries are capped, so a
hostile tree costs bounded time and memory.

Left out: whether blocks lie in RAM and whether they overlap (``khosim.checks.preserved``), and the
shallower tree that kernels with 16 KiB pages built before 7.1.
"""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from khosim.checks.preserved import Preserved
from khosim.checks.reader import ProblemLog, page_shift
from khosim.errors import RamFault

if TYPE_CHECKING:
    from khosim.checks.preserved import I64
    from khosim.checks.reader import Reader

__all__ = ("Geometry", "bit_runs", "decode_preserved", "geometry")

_MAX_TABLE_PAGES = 1 << 18
_MAX_RUNS = 1 << 22
_MAX_REJECTS = 1 << 16
_FEW_RUNS = 32
_FEW_TABLES = 32  # of one level, read at once
_FEW_WORDS = 6  # leaves with up to this many non-zero words are scanned without unpacking bits
_PHYS_BITS = 52  # no x86-64 or arm64 machine addresses more; a block as large cannot be
_IMPOSSIBLE_KEYS = 1 << (64 - _PHYS_BITS + 1)
_ALL_ONES = (1 << 64) - 1
_WORD = np.dtype("<u8")


class Geometry(NamedTuple):
    """Shape of the tree for one page size."""

    page_shift: int
    key_width: int  # bits of a key: a page frame number and the bit that tells the order
    table_shift: int  # log2 of the entries of a table
    leaf_shift: int  # log2 of the bits of a leaf
    depth: int  # levels, the leaves included

    def level_shift(self, level: int) -> int:
        """How far a key is shifted right to index a table of ``level``, counted from the leaf."""
        return (level - 1) * self.table_shift + self.leaf_shift


def geometry(page_size: int) -> Geometry:
    """Shape of the tree for pages of ``page_size`` bytes."""
    shift = page_shift(page_size)
    width, table, leaf = 64 - shift + 1, shift - 3, shift + 3
    return Geometry(shift, width, table, leaf, -(-(width - leaf) // table) + 1)


def decode_preserved(
    reader: Reader,
    map_phys: int,
    page_size: int,
    *,
    max_table_pages: int = _MAX_TABLE_PAGES,
    max_runs: int = _MAX_RUNS,
) -> Preserved:
    """Decode the tree whose root table is at ``map_phys``.

    Never raises on the contents. Where a cap is reached, the walk ends with a problem
    ``radix-budget`` and the result holds what was found until then.
    """
    geo = geometry(page_size)
    log = ProblemLog()
    runs = _Runs(geo, log)
    tables: list[int] = []
    if map_phys == 0:
        log.add("radix-root", 0, "the map has no root table")
    elif map_phys & (page_size - 1):
        log.add("radix-unaligned", map_phys, "the root table does not start on a page")
    else:
        small = None
        if min(max_table_pages, max_runs) >= _MAX_TABLE_PAGES:
            small = _small_sound_tree(reader, geo, map_phys)
        if small is None:
            walk = _Walk(reader, geo, page_size, log, runs, tables)
            walk.run(map_phys, max_table_pages, max_runs)
        else:
            tables, leaves = small
            for phys, page, key in leaves:
                runs.leaf(phys, page, key)
    order, start_pfn, nr_blocks = runs.arrays()
    for array in (order, start_pfn, nr_blocks):
        array.flags.writeable = False
    return Preserved(page_size, order, start_pfn, nr_blocks, tuple(tables), log.done())


def _small_sound_tree(
    reader: Reader, geo: Geometry, root: int
) -> tuple[list[int], list[tuple[int, bytes, int]]] | None:
    """``(tables, leaves)`` as :class:`_Walk` finds them, or None where it has more to say.

    Reads a level of tables at a time, while they are few and there is nothing wrong with them. The
    leaves are ``(phys, content, key of the first bit)`` with ascending keys.
    """
    nodes, keys = [root], [0]
    in_page = (1 << geo.page_shift) - 1
    found: list[tuple[int, int, int]] = []  # in this order: (key, levels above, address)
    for depth in range(geo.depth):
        found += zip(keys, repeat(depth), nodes)
        try:
            pages = [reader.read(phys, in_page + 1) for phys in nodes]
        except RamFault:
            return None
        level = geo.depth - 1 - depth
        if not level:
            break
        filled, nodes = _filled_words(b"".join(pages) if len(pages) > 1 else pages[0])
        if not filled:
            pages, keys = [], []
            break
        shift, table_mask = geo.level_shift(level), (1 << geo.table_shift) - 1
        keys = [
            keys[at >> geo.table_shift] | (at & table_mask) << shift for at in filled
        ]
        if len(nodes) > _FEW_TABLES or keys[-1] >> geo.key_width:
            return None
        for phys in nodes:
            if phys & in_page:
                return None
    if len({phys for _, _, phys in found}) < len(found):
        return None
    found.sort()
    zeros = bytes(in_page + 1)
    leaves = [leaf for leaf in zip(nodes, pages, keys, strict=True) if leaf[1] != zeros]
    return [phys for _, _, phys in found], leaves


class _Walk:
    """Depth-first over the tables, with an explicit stack of pages still to be read."""

    __slots__ = ("geo", "log", "page_size", "reader", "rejects", "runs", "seen", "stack", "tables")

    def __init__(
        self,
        reader: Reader,
        geo: Geometry,
        page_size: int,
        log: ProblemLog,
        runs: _Runs,
        tables: list[int],
    ) -> None:
        self.reader = reader
        self.geo = geo
        self.page_size = page_size
        self.log = log
        self.runs = runs
        self.tables = tables
        self.rejects = 0
        self.seen: set[int] = set()
        self.stack: list[tuple[int, int, int]] = []

    def run(self, root: int, max_pages: int, max_runs: int) -> None:
        """Read pages until none is left or a cap is reached."""
        stack, seen, runs, page_size = self.stack, self.seen, self.runs, self.page_size
        read, tables = self.reader.read, self.tables
        zeros = bytes(page_size)
        seen.add(root)
        stack.append((root, self.geo.depth - 1, 0))
        while stack:
            phys, level, key = stack.pop()
            try:
                page = read(phys, page_size)
            except RamFault as fault:
                self.log.add("radix-unreadable", phys, f"level {level} table: {fault}")
                continue
            tables.append(phys)
            if page == zeros:
                continue
            if level:
                self.table(phys, page, level, key)
            else:
                runs.leaf(phys, page, key)
            if len(seen) > max_pages or self.rejects > _MAX_REJECTS or runs.count > max_runs:
                self.log.add("radix-budget", phys, f"gave up after {len(tables)} table pages")
                return

    def table(self, phys: int, page: bytes, level: int, key: int) -> None:
        """Put what a table points to on the stack, the lowest index on top."""
        geo, seen, stack = self.geo, self.seen, self.stack
        filled, entries = _filled_words(page)
        shift = geo.level_shift(level)
        offset_mask = self.page_size - 1
        if len(filled) == 1:  # as in most tables
            child, child_key = entries[0], key | filled[0] << shift
            if not (child & offset_mask or child_key >> geo.key_width or child in seen):
                seen.add(child)
                stack.append((child, level - 1, child_key))
                return
        first = len(stack)
        for index, child in zip(filled, entries, strict=True):
            child_key = key | index << shift
            if child & offset_mask:
                self.reject("radix-unaligned", phys, index, f"{child:#x} is not a page's address")
            elif child_key >> geo.key_width:
                self.reject("radix-key", phys, index, f"keys from {child_key:#x} are too wide")
            elif child in seen:
                self.reject("radix-shared", phys, index, f"table page {child:#x} has another owner")
            else:
                seen.add(child)
                stack.append((child, level - 1, child_key))
        if len(stack) > first + 1:
            stack[first:] = stack[first:][::-1]

    def reject(self, code: str, phys: int, index: int, cause: str) -> None:
        """Note an entry that is passed over."""
        self.rejects += 1
        self.log.add(code, phys + index * 8, f"entry {index}: {cause}")


class _Runs:
    """Collects runs of consecutive keys in ascending order."""

    __slots__ = ("count", "geo", "lengths", "log", "ones", "parts", "past", "starts")

    def __init__(self, geo: Geometry, log: ProblemLog) -> None:
        self.geo = geo
        self.log = log
        self.ones = b"\xff" * (1 << geo.page_shift)
        self.count = 0
        self.past = -1  # end of the last run in `starts`
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.parts: list[tuple[I64, I64]] = []

    def add(self, start: int, count: int) -> None:
        """Add keys; they join the last run unless the order changes between the two."""
        if start == self.past and start & (start - 1):
            self.lengths[-1] += count
        else:
            self.starts.append(start)
            self.lengths.append(count)
            self.count += 1
        self.past = start + count

    def leaf(self, phys: int, page: bytes, key: int) -> None:
        """Add the set bits of the leaf page whose first bit stands for ``key``."""
        if key == 0:
            self.lowest_leaf(phys, page)
        elif page == self.ones:
            self.add(key, 1 << self.geo.leaf_shift)
        else:
            filled, words = _filled_words(page)
            if len(filled) <= _FEW_WORDS:
                for index, word in zip(filled, words, strict=True):
                    self.word(key + index * 64, word)
            else:
                starts, ends = bit_runs(page, filled[0] * 8, filled[-1] * 8 + 8)
                self.flush()
                self.parts.append((starts + key, ends - starts))
                self.count += len(starts)

    def word(self, key: int, word: int) -> None:
        """Add the set bits of one 64-bit word."""
        if word == _ALL_ONES:
            self.add(key, 64)
            return
        while word:
            skip = (word & -word).bit_length() - 1
            word >>= skip
            key += skip
            ones = (~word & (word + 1)).bit_length() - 1
            self.add(key, ones)
            word >>= ones
            key += ones

    def lowest_leaf(self, phys: int, page: bytes) -> None:
        """Add the one leaf in which each power of two begins another order."""
        self.flush()
        starts, ends = bit_runs(page, 0, len(page))
        for low, past in zip(starts.tolist(), ends.tolist(), strict=True):
            start = low
            if start < _IMPOSSIBLE_KEYS:
                stop = min(past, _IMPOSSIBLE_KEYS)
                self.log.add("radix-order", phys + start // 8, f"keys {start:#x} to {stop - 1:#x}")
                start = stop
            while start < past:
                stop = min(past, 1 << start.bit_length())
                self.add(start, stop - start)
                start = stop

    def flush(self) -> None:
        """Turn the runs of the lists into arrays."""
        if self.starts:
            self.parts.append(
                (np.array(self.starts, dtype=np.int64), np.array(self.lengths, dtype=np.int64))
            )
            self.starts, self.lengths = [], []
        self.past = -1

    def arrays(self) -> tuple[I64, I64, I64]:
        """``(order, start_pfn, nr_blocks)`` of all runs."""
        self.flush()
        if not self.parts:
            empty = np.empty(0, dtype=np.int64)
            return empty, empty.copy(), empty.copy()
        starts, lengths = self.parts[0]
        if len(self.parts) > 1:
            starts = np.concatenate([part[0] for part in self.parts])
            lengths = np.concatenate([part[1] for part in self.parts])
            starts, lengths = _join(starts, lengths)
        elif len(starts) <= _FEW_RUNS:
            return self.few(starts.tolist(), lengths)
        # A key's top bit tells the order. Keys have at most 53 bits, which a double holds exactly.
        order_bit = np.frexp(starts.astype(np.float64))[1].astype(np.int64) - 1
        order = (64 - self.geo.page_shift) - order_bit
        return order, (starts ^ (np.int64(1) << order_bit)) << order, lengths

    def few(self, keys: list[int], lengths: I64) -> tuple[I64, I64, I64]:
        """:meth:`arrays` key by key, for as few as are in most maps."""
        orders, pfns = [], []
        for key in keys:
            width = key.bit_length()
            order = 65 - self.geo.page_shift - width
            orders.append(order)
            pfns.append((key ^ (1 << (width - 1))) << order)
        return np.array(orders, dtype=np.int64), np.array(pfns, dtype=np.int64), lengths


def _filled_words(page: bytes) -> tuple[list[int], list[int]]:
    """Index and value of each 64-bit word of a page that is not zero."""
    words = np.frombuffer(page, _WORD)
    filled = words.astype(np.bool_).nonzero()[0]  # faster than of the words themselves
    indices: list[int] = filled.tolist()
    if len(indices) <= _FEW_WORDS:
        return indices, [words.item(index) for index in indices]
    return indices, words[filled].tolist()


def bit_runs(page: bytes, start: int, end: int) -> tuple[I64, I64]:
    """First and past-the-last bit number of each run of ones in ``page[start:end]``."""
    bits = np.zeros((end - start) * 8 + 2, dtype=np.uint8)
    bits[1:-1] = np.unpackbits(
        np.frombuffer(page, dtype=np.uint8, count=end - start, offset=start), bitorder="little"
    )
    edges = np.flatnonzero(bits[1:] != bits[:-1]) + start * 8
    return edges[::2], edges[1::2]


def _join(starts: I64, lengths: I64) -> tuple[I64, I64]:
    """Join runs that follow each other, except where a power of two begins another order."""
    follows = (starts[1:] == starts[:-1] + lengths[:-1]) & ((starts[1:] & (starts[1:] - 1)) != 0)
    if not follows.any():
        return starts, lengths
    first = np.concatenate(([0], np.flatnonzero(~follows) + 1))
    return starts[first], np.add.reduceat(lengths, first)
