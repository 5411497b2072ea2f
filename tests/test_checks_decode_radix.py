"""The radix tree's reader beside a plain model of the tree, and on trees no kernel would write."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim.checks.decode_radix import decode_preserved, geometry
from khosim.checks.preserved import Preserved, expand
from khosim.checks.reader import PageImage

# page size: log2 of it, of the entries of a table, of the bits of a leaf; levels
SHAPE = {4096: (12, 9, 15, 6), 16384: (14, 11, 17, 5), 65536: (16, 13, 19, 4)}
ROOT = 0x100


class Tree:
    """A tree in loose pages, grown key by key as the format says."""

    def __init__(self, page_size: int = 4096) -> None:
        self.page_size = page_size
        self.shift, self.table_bits, self.leaf_bits, self.levels = SHAPE[page_size]
        self.pages: dict[int, bytearray] = {ROOT: bytearray(page_size)}

    @property
    def root(self) -> int:
        """Physical address of the root table."""
        return ROOT << self.shift

    def add(self, key: int) -> None:
        """Set the bit of one key, making the tables on the way."""
        page = self.pages[ROOT]
        for level in range(self.levels - 1, 0, -1):
            low = (level - 1) * self.table_bits + self.leaf_bits
            at = (key >> low) % (1 << self.table_bits) * 8
            (child,) = struct.unpack_from("<Q", page, at)
            if not child:
                child = (ROOT + len(self.pages)) << self.shift
                self.pages[child >> self.shift] = bytearray(self.page_size)
                struct.pack_into("<Q", page, at, child)
            page = self.pages[child >> self.shift]
        bit = key % (1 << self.leaf_bits)
        page[bit // 8] |= 1 << bit % 8

    def key(self, pfn: int, order: int) -> int:
        """The key of a block."""
        return 1 << (64 - self.shift - order) | pfn >> order

    def path(self, key: int) -> list[int]:
        """Page frame numbers from the root to the leaf of a key."""
        found = [ROOT]
        for level in range(self.levels - 1, 0, -1):
            low = (level - 1) * self.table_bits + self.leaf_bits
            at = (key >> low) % (1 << self.table_bits) * 8
            (child,) = struct.unpack_from("<Q", self.pages[found[-1]], at)
            found.append(child >> self.shift)
        return found

    def read(self, **caps: int) -> Preserved:
        """What the reader under test makes of it."""
        return decode_preserved(
            PageImage(self.pages, self.page_size), self.root, self.page_size, **caps
        )


def codes(preserved: Preserved) -> set[str]:
    """Which kinds of problems were found."""
    return {problem.code for problem in preserved.problems}


@st.composite
def block_lists(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A page size and blocks ``(pfn, order)``: singles, runs, and runs over the ends of leaves."""
    page_size = draw(st.sampled_from(list(SHAPE)))
    shift, _, leaf_bits, _ = SHAPE[page_size]
    blocks: set[tuple[int, int]] = set()
    for _ in range(draw(st.integers(0, 6))):
        order = draw(st.integers(0, 20))
        top = (1 << (52 - shift - order)) - 1
        leaf = draw(st.integers(0, 4))
        first = draw(st.one_of(st.integers(0, top), st.just(leaf << leaf_bits)))
        count = draw(st.sampled_from((1, 2, 7, 64, 65, 200)))
        step = draw(st.sampled_from((1, 1, 2, 63)))
        start = max(0, first - draw(st.integers(0, 100)))
        blocks |= {(n << order, order) for n in range(start, start + count * step, step)}
    return page_size, sorted(blocks)


@settings(max_examples=150)
@given(case=block_lists())
def test_any_set_comes_back(case: tuple[int, list[tuple[int, int]]]) -> None:
    """Blocks put into a tree are read in the order of their keys, in as few runs as can be."""
    page_size, blocks = case
    tree = Tree(page_size)
    by_key = {tree.key(pfn, order): (pfn * page_size, order) for pfn, order in blocks}
    for key in by_key:
        tree.add(key)
    found = tree.read()
    assert found.problems == ()
    assert expand(found) == [by_key[key] for key in sorted(by_key)]
    assert found.total_blocks == len(blocks)
    assert found.total_pages == sum(1 << order for _, order in blocks)
    breaks = sum(key - 1 not in by_key or key & (key - 1) == 0 for key in by_key)
    assert len(found.order) == breaks
    assert sorted(found.table_pages) == [pfn * page_size for pfn in sorted(tree.pages)]


@pytest.mark.parametrize("depth", range(5))
def test_a_pointer_into_the_midst_of_a_page_is_no_table(depth: int) -> None:
    """At no level is it followed, though there is memory to read."""
    tree = Tree()
    for pfn in (3, 0x9000, 0x400000):
        tree.add(tree.key(pfn, 0))
    path = tree.path(tree.key(3, 0))
    spoil = (path[depth + 1] << tree.shift) + 8
    struct.pack_into("<Q", tree.pages[path[depth]], 8 * 511, spoil)
    found = tree.read()
    assert codes(found) <= {"radix-unaligned", "radix-key"}
    assert found.problems
    assert spoil not in found.table_pages


@settings(max_examples=150)
@given(
    case=block_lists(),
    damage=st.lists(st.tuples(st.randoms(use_true_random=False), st.integers(0, 7)), max_size=2),
)
def test_levels_at_once_and_page_by_page(
    case: tuple[int, list[tuple[int, int]]], damage: list[tuple[random.Random, int]]
) -> None:
    """A cap that is never met keeps the reader from its short way: what it finds is the same."""
    page_size, blocks = case
    tree = Tree(page_size)
    for pfn, order in blocks:
        tree.add(tree.key(pfn, order))
    for rng, kind in damage:
        phys = rng.choice(list(tree.pages)) << tree.shift
        other = rng.choice(list(tree.pages)) << tree.shift
        wild = (0, other, phys, other + 8, 5 << tree.shift, rng.randrange(1 << 64), 1 << 63, 1)
        page = tree.pages[phys >> tree.shift]
        struct.pack_into("<Q", page, 8 * rng.randrange(page_size // 8), wild[kind])
    short, long = tree.read(), tree.read(max_table_pages=1 << 17)
    assert short.problems == long.problems
    assert short.table_pages == long.table_pages
    assert expand(short) == expand(long)


@pytest.mark.parametrize("page_size", list(SHAPE))
def test_geometry(page_size: int) -> None:
    """Depths of the three page sizes are those of the format's table."""
    assert geometry(page_size).depth == SHAPE[page_size][3]
    assert geometry(page_size).key_width == 65 - SHAPE[page_size][0]


def test_tables_are_listed_in_walk_order() -> None:
    """A table comes before what it points to, lower indices first; empty leaves count."""
    tree = Tree()
    high, low = tree.key(0x900000, 0), tree.key(0x10, 3)
    tree.add(high)
    tree.add(low)
    leaf = tree.path(low)[-1]
    tree.pages[leaf][:] = bytes(4096)  # as after an unpreserve
    found = tree.read()
    rest = [pfn for pfn in tree.path(high) if pfn not in tree.path(low)]
    assert found.table_pages == tuple(pfn << 12 for pfn in tree.path(low) + rest)
    assert expand(found) == [(0x900000000, 0)]


def test_full_leaves_join() -> None:
    """Three full leaves and a bit on each side are one run."""
    tree = Tree()
    first = tree.key(1 << 15, 0)
    for leaf in range(3):
        tree.add(first + (leaf << 15))
        tree.pages[tree.path(first + (leaf << 15))[-1]][:] = b"\xff" * 4096
    tree.add(first - 1)
    tree.add(first + (3 << 15))
    found = tree.read()
    assert found.start_pfn.tolist() == [(1 << 15) - 1]
    assert found.nr_blocks.tolist() == [(3 << 15) + 2]
    assert found.order.tolist() == [0]


@pytest.mark.parametrize("dense", [False, True])
def test_orders_do_not_join(dense: bool) -> None:
    """The last block of one order and the first of the next have neighbouring keys."""
    tree = Tree()
    border = tree.key(0, 0)
    keys = {border - 1, border}
    if dense:
        keys |= {border - 2 - n * 70 for n in range(20)} | {border + 2 + n * 70 for n in range(20)}
    for key in keys:
        tree.add(key)
    found = tree.read()
    assert {(1 << 63) // 2048 - 2, 0} <= set(found.start_pfn.tolist()) | {(1 << 52) - 2, 0}
    blocks = expand(found)
    assert ((1 << 64) - 8192, 1) in blocks
    assert (0, 0) in blocks
    assert len(blocks) == len(keys)


def test_arrays_are_read_only() -> None:
    """What was decoded cannot be changed by accident."""
    tree = Tree()
    tree.add(tree.key(5, 0))
    with pytest.raises(ValueError, match="read-only"):
        tree.read().start_pfn[0] = 1


@pytest.mark.parametrize(
    ("map_phys", "code"),
    [(0, "radix-root"), (0x100008, "radix-unaligned"), (0x7000000, "radix-unreadable")],
)
def test_no_root(map_phys: int, code: str) -> None:
    """A root that is absent, unaligned or no RAM leaves nothing to read."""
    found = decode_preserved(PageImage(Tree().pages, 4096), map_phys, 4096)
    assert codes(found) == {code}
    assert found.total_blocks == 0
    assert found.table_pages == ()


def spoil_entry(tree: Tree, key: int, depth: int, index: int, value: int) -> None:
    """Overwrite an entry of the table at some depth on a key's path."""
    struct.pack_into("<Q", tree.pages[tree.path(key)[depth]], index * 8, value)


@pytest.mark.parametrize(
    ("depth", "index", "value", "code"),
    [
        (2, 77, 0x123, "radix-unaligned"),
        (0, 77, ROOT << 12, "radix-key"),
        (0, 4, 0x5000000, "radix-key"),
        (0, 3, 0x5000000, "radix-unreadable"),
        (4, 77, 0x5000000, "radix-unreadable"),
        (4, 77, (1 << 64) - 4096, "radix-unreadable"),
        (3, 77, ROOT << 12, "radix-shared"),
        (4, 77, (ROOT + 4) << 12, "radix-shared"),
        (4, 400, (ROOT + 5) << 12, "radix-shared"),
    ],
)
def test_broken_entries_are_passed_over(depth: int, index: int, value: int, code: str) -> None:
    """One entry that leads nowhere or in a circle is named; everything else is still read."""
    tree = Tree()
    key = tree.key(0x900000, 0)
    tree.add(key)
    tree.add(tree.key(0, 0))
    spoil_entry(tree, key, depth, index, value)
    found = tree.read()
    assert codes(found) == {code}
    assert expand(found) == [(0, 0), (0x900000000, 0)]
    if code != "radix-unreadable":  # which stands at the page that is not there
        (problem,) = found.problems
        assert problem.phys == (tree.path(key)[depth] << 12) + index * 8


@pytest.mark.parametrize("page_size", list(SHAPE))
def test_impossible_orders(page_size: int) -> None:
    """Keys for blocks larger than any machine are named, those just below are read."""
    tree = Tree(page_size)
    for key in (0, 1, 2, 4095, 8191, 8192, 16384):
        tree.add(key)
    found = tree.read()
    assert codes(found) == {"radix-order"}
    assert expand(found) == [(0, 51 - tree.shift), (0, 50 - tree.shift)]


def test_orders_change_within_the_lowest_leaf() -> None:
    """In the leaf of the largest blocks, neighbouring keys may be of different orders."""
    tree = Tree()
    for key in range(16382, 16387):
        tree.add(key)
    size = 1 << 51
    assert expand(tree.read()) == [
        (8190 * size % 2**64, 39),
        (8191 * size % 2**64, 39),
        (0, 38),
        (size // 2, 38),
        (size, 38),
    ]


def full_of(page_size: int, phys: int) -> bytearray:
    """A table whose every entry is the same."""
    return bytearray(struct.pack("<Q", phys) * (page_size // 8))


@pytest.mark.parametrize("page_size", list(SHAPE))
def test_all_entries_alike(page_size: int) -> None:
    """Tables that point to themselves, or all to one page, end after that many pages."""
    tree = Tree(page_size)
    tree.pages[ROOT] = full_of(page_size, tree.root)
    found = tree.read()
    assert len(found.table_pages) == 1
    assert len(found.problems) <= 60
    for level in range(1, 7):
        tree.pages[ROOT + level - 1] = full_of(page_size, (ROOT + level) << tree.shift)
        tree.pages[ROOT + level] = bytearray(b"\xff" * page_size)
    began = time.monotonic()
    found = tree.read()
    assert time.monotonic() - began < 2
    assert len(found.table_pages) == tree.levels
    assert {"radix-shared", "more"} <= codes(found)


class Zeros:
    """A machine whose memory reads as zero wherever nothing was written."""

    def __init__(self, pages: dict[int, bytearray], page_size: int) -> None:
        self.pages = pages
        self.page_size = page_size

    def read(self, phys: int, len_bytes: int, /) -> bytes:
        """One whole page."""
        return bytes(self.pages.get(phys // self.page_size, bytes(len_bytes)))

    def view(self, phys: int, len_bytes: int, /) -> np.ndarray:
        """The same as an array."""
        return np.frombuffer(self.read(phys, len_bytes), dtype=np.uint8)


def test_caps_end_the_walk() -> None:
    """Where every pointer leads to RAM, the number of pages read is capped; so are runs."""
    tree = Tree()
    fan = iter(range(0x10000, 0x1000000))
    tables = [ROOT, *(next(fan) for _ in range(1000))]
    for pfn in tables:
        children = [next(fan) << 12 for _ in range(512)]
        tree.pages[pfn] = bytearray(struct.pack("<512Q", *children))
    struct.pack_into("<4Q", tree.pages[ROOT], 0, *(pfn << 12 for pfn in tables[1:5]))
    struct.pack_into("<512Q", tree.pages[tables[1]], 0, *(pfn << 12 for pfn in tables[5:517]))
    found = decode_preserved(Zeros(tree.pages, 4096), tree.root, 4096, max_table_pages=5000)
    assert "radix-budget" in codes(found)
    assert len(found.table_pages) <= 5000 + 512
    dense = Tree()
    for leaf in range(4):
        key = dense.key(leaf << 15, 0)
        dense.add(key)
        dense.pages[dense.path(key)[-1]][:] = b"\x55" * 4096
    found = dense.read(max_runs=20_000)
    assert codes(found) == {"radix-budget"}
    assert found.total_blocks == 2 * 16384


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000))
def test_random_bytes_never_raise(seed: int) -> None:
    """A machine of random pages that often point to each other: always an answer."""
    rng = random.Random(seed)
    pfns: Iterable[int] = range(ROOT, ROOT + 40)
    pages = {}
    for pfn in pfns:
        words = [0] * 512
        for _ in range(rng.choice((1, 5, 100, 512))):
            words[rng.randrange(512)] = rng.choice(
                (rng.getrandbits(64), rng.choice(pfns) << 12, rng.getrandbits(24) << 12, 0)
            )
        pages[pfn] = bytearray(struct.pack("<512Q", *words))
    found = decode_preserved(PageImage(pages, 4096), ROOT << 12, 4096)
    assert len(found.table_pages) == len(set(found.table_pages)) <= 40
    assert (found.order >= 0).all()
    assert (found.order < 40).all()
    assert (found.start_pfn >= 0).all()
    assert (found.end_pfn <= 1 << 52).all()
    assert (found.start_pfn % (1 << found.order) == 0).all()
    assert (found.nr_blocks > 0).all()
