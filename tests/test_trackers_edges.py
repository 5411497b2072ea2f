"""Corners of the trackers that only a changed tracker shows: each was once untested."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from khosim import KernelPanic, Machine
from khosim.abi.kho_v1 import ChunkHdr, Element, pack_chunk_hdr, pack_element
from khosim.kernel.image import KernelConfig
from khosim.kernel.kernel import Kernel
from khosim.kernel.kho_chunks import KhoChunks
from khosim.kernel.kho_radix import KhoRadixTree
from khosim.kernel.kho_radix_key import kho_encode_radix_key
from khosim.kernel.kho_tracker import BlockTracker, no_memory
from khosim.kernel.release import Release, find_release

KEYS = [(0x40, 0), (0x41, 0), (0x43, 0), (0x48, 1), (0x50, 1), (0x52, 1), (0x40000, 0)]
"""Blocks as (pfn, order): neighbours, a gap, another order, one that needs a second bitmap."""


class Refusing:
    """Refuses the n-th request for memory and all after it."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, order: int, owner: str) -> bool:
        """As ``kernel.pages.fail``."""
        self.left -= 1
        return self.left <= 0


class SetTracker(BlockTracker):
    """A set of blocks, with nothing written down."""

    __slots__ = ("held",)

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.held: set[tuple[int, int]] = set()

    def add_block(self, pfn: int, order: int) -> int:
        """Mark; the third block is one too many."""
        if len(self.held) == 3:
            return no_memory()
        self.held.add((pfn, order))
        return 0

    def del_block(self, pfn: int, order: int) -> bool:
        """Unmark."""
        self.held.discard((pfn, order))
        return True

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Each block by itself."""
        for pfn, order in sorted(self.held):
            yield pfn << 12, order, 1

    def table_pages(self) -> list[int]:
        """A page of its own, for statistics."""
        return [0x7000]


def booted(release: str | Release) -> Kernel:
    """A kernel of a release with the chunk tracker."""
    return Machine("64M").boot(release=release, cmdline="kho=on")


def keys_of(blocks: list[tuple[int, int]]) -> list[int]:
    """The keys of blocks, in their order."""
    return [kho_encode_radix_key(pfn << 12, order, 12) for pfn, order in blocks]


@pytest.mark.parametrize("n", range(1, 10))
@pytest.mark.parametrize("is_reversed", [False, True])
def test_an_array_is_marked_as_single_blocks_are(n: int, is_reversed: bool) -> None:
    """However far memory goes, an array of all sorts of keys comes as far, and to the same map."""
    keys = [*keys_of(KEYS), (1 << 50) - 1, 1 << 50]  # the last block of an order, the first of one
    keys = keys[::-1] if is_reversed else keys
    many, single = (KhoChunks(booted("6.18")) for _ in range(2))
    for tracker in (many, single):
        tracker.kernel.pages.fail = Refusing(n)
    expected = (0, len(keys))
    for done, key in enumerate(keys):
        error = single.add_key(key)
        if error:
            expected = (error, done)
            break
    assert many.add_many(np.array(keys, dtype=np.int64)) == expected
    assert list(many.marked()) == list(single.marked())
    assert expected[0] in (0, -errno.ENOMEM)


def test_the_first_chunk_is_linked_from_nowhere() -> None:
    """A list of chunks is written into the chunks alone, not to address 0 before the first."""
    tracker = KhoChunks(booted("6.18"))
    before = tracker.kernel.ram.read(0, 4096)
    assert tracker.add_block(0x40, 0) == 0
    error, first = tracker.serialize()
    assert (error, bool(first)) == (0, True)
    assert tracker.kernel.ram.read(0, 4096) == before


@pytest.mark.parametrize(("is_debug", "is_checked"), [(1, 1), (1, 0), (0, 1)])
def test_a_bitmap_in_scratch(
    monkeypatch: pytest.MonkeyPatch, is_debug: int, is_checked: int
) -> None:
    """Only a debug kernel whose release looks refuses a bitmap that lies in scratch."""
    release = find_release("6.19").evolve(scratch_overlap_checked=bool(is_checked))
    config = KernelConfig(release=release, debug=bool(is_debug))
    kernel = Machine("64M").boot(release, config=config, cmdline="kho=on")
    tracker = KhoChunks(kernel)
    free = kernel.pages.nr_free_pages()
    monkeypatch.setattr(Kernel, "kho_scratch_overlap", lambda self, phys, size: True)
    told = len(kernel.messages)
    if is_debug and is_checked:
        assert tracker.add_block(0x40, 0) == -errno.EINVAL
        assert "overlaps scratch" in kernel.messages[told]
        assert kernel.pages.nr_free_pages() == free
    else:
        assert tracker.add_block(0x40, 0) == 0
        assert len(kernel.messages) == told


def test_nothing_is_marked_when_finalized() -> None:
    """Up to 6.18 marking is -EBUSY once the handover is finalized."""
    kernel = booted("6.18")
    tracker = KhoChunks(kernel)
    kernel.finalize()
    assert tracker.add_block(0x40, 0) == -errno.EBUSY
    assert tracker.add_run(*keys_of([(0x40, 0)]), 3) == (-errno.EBUSY, 0)
    assert list(tracker.marked()) == []


def test_a_tracker_of_four_methods_can_do_the_rest() -> None:
    """Runs and arrays of a designer's tracker are made of single blocks, errors included."""
    tracker = SetTracker(booted("7.3"))
    (key,) = keys_of([(0x40, 1)])
    assert tracker.add_run(key, 0) == (0, 0)
    assert tracker.add_run(key, 2) == (0, 2)
    assert tracker.held == {(0x40, 1), (0x42, 1)}
    assert tracker.add_many(np.array(keys_of([(0x50, 0), (0x51, 0)]))) == (-errno.ENOMEM, 1)
    assert tracker.add_run(key, 2) == (-errno.ENOMEM, 0)
    found = list(tracker.walk())
    assert found == [(0, 0x7000), *((1, key) for key in keys_of([(0x40, 1), (0x42, 1), (0x50, 0)]))]
    tracker.del_run(key, 2)
    assert tracker.held == {(0x50, 0)}


def test_clearing_in_no_tree_clears_nothing() -> None:
    """Without a root there is a warning, once, and memory stays as it is."""
    kernel = booted("7.3")
    tree = KhoRadixTree(kernel, depth=kernel.arch.tree_depth)
    kernel.ram.write(0, bytes([0xFF]) * 4096, (0, "test"))
    told = len(kernel.messages)
    for key in (*keys_of(KEYS), 0, 1, 63):
        tree.del_key(key)
    assert kernel.ram.read(0, 4096) == bytes([0xFF]) * 4096
    assert len(kernel.messages) == told + 1
    assert "kho_radix_del_key" in kernel.messages[told]


def test_an_array_of_keys_says_who_wrote_the_leaves() -> None:
    """Whoever asks who wrote a leaf is told of the call that set its bits; no page besides."""
    kernel = booted("7.3")
    tree = kernel.kho_out.tree
    others = kernel.ram.last_writers(range(64))
    (first,) = keys_of([(0x100000, 0)])
    assert tree.add_many(np.arange(first, first + 40_000, dtype=np.int64)) == (0, 40_000)
    walked = list(tree.walk())
    leaves = [
        page
        for (nr, page), (_, key) in pairwise(walked)
        if not nr and first <= key < first + 40_000
    ]
    writers = kernel.ram.last_writers([phys >> 12 for phys in leaves])
    assert len(leaves) == 2
    assert {by and by[1] for by in writers} == {"kho_radix_add_key"}
    assert kernel.ram.last_writers(range(64)) == others


def moved(kernel: Kernel, tree: KhoRadixTree, to_phys: int) -> KhoRadixTree:
    """``tree`` with its root table copied to an address that is no page's."""
    kernel.ram.write(to_phys, bytes(kernel.ram.read(tree.root, 4096)), (0, "test"))
    return KhoRadixTree(kernel, to_phys, depth=kernel.arch.tree_depth)


def test_a_root_table_at_an_odd_address() -> None:
    """Each entry is read where it is, over the end of a page or before the end of memory."""
    kernel = booted("7.3")
    keys = keys_of(KEYS)
    tree = kernel.kho_out.tree
    assert isinstance(tree, KhoRadixTree)
    for key in keys:
        assert tree.add_key(key) == 0
    free = kernel.alloc_folio(1).phys
    odd = moved(kernel, tree, free + 2048)
    walked = list(tree.walk())
    assert list(odd.walk()) == [(0, free + 2048), *walked[1:]]
    assert [odd.has_key(key) for key in (*keys, keys[0] + 5)] == [True] * len(keys) + [False]
    odd.del_key(keys[1])
    assert not tree.has_key(keys[1])
    assert odd.add_key(keys[1]) == 0
    assert tree.has_key(keys[1])
    assert odd.add_many(np.array(keys, dtype=np.int64)) == (0, len(keys))
    assert list(tree.walk()) == walked
    # Half a table: its lower entries are there.
    end = kernel.ram.size_bytes
    kernel.ram.write(end - 2048, bytes(kernel.ram.read(tree.root, 2048)), (0, "test"))
    cut = KhoRadixTree(kernel, end - 2048, depth=kernel.arch.tree_depth)
    assert all(cut.has_key(key) for key in keys)
    with pytest.raises(KernelPanic):
        list(cut.walk())


@pytest.mark.parametrize("nr_repeats", [2, 40])
def test_a_leaf_that_several_entries_share(nr_repeats: int) -> None:
    """It is walked once for each entry, few or many, and its bits are keys of each."""
    kernel = booted("7.3")
    tree = KhoRadixTree(kernel, depth=kernel.arch.tree_depth)
    assert tree.init_tree() == 0
    (first,) = keys_of([(0x100000, 0)])
    assert [tree.add_key(first), tree.add_key(first + 7)] == [0, 0]
    *tables, leaf = [page for nr, page in tree.walk() if not nr]
    at = tables[-1] + 8 * (first >> 15 & 511)
    assert kernel.ram.read_u64(at) == leaf
    for n in range(nr_repeats):
        kernel.ram.write_u64(at + 8 * n, leaf, (0, "test"))
    expected = [(0, table) for table in tables]
    for n in range(nr_repeats):
        span = first + (n << 15)
        expected += [(0, leaf), (1, span), (1, span + 7)]
    assert list(tree.walk()) == expected
    pairs: list[tuple[int, int]] = []
    for counts, values in tree.walk_arrays():
        pairs += zip(counts.tolist(), values.tolist(), strict=True)
    assert pairs == expected
    assert list(tree.runs()) == [item for item in expected if item[0]]


@pytest.mark.parametrize(
    ("start", "order", "first"),
    [
        (0x1000, 0, [0x1000, 0x2000, 0x4000]),
        (2**64 - 0x2000, 0, [2**64 - 0x2000, 2**64 - 0x1000, 0x1000]),
        (2**64 - 0x1000, 0, [2**64 - 0x1000, 0, 0x2000]),
        (0x1000, 51, [0x1000, 0x1000 + 2**63, 0x1000 + 2**63]),
        (0x1000, 52, [0x1000, 0x1001, 0x1003]),
    ],
)
def test_a_bitmap_whose_addresses_wrap(start: int, order: int, first: list[int]) -> None:
    """Sums wrap at 64 bits, and shifts count modulo 64, as the CPU's do."""
    kernel = booted("6.18")
    tracker = KhoChunks(kernel)
    phys = kernel.alloc_folio(1).phys
    chunk = pack_chunk_hdr(ChunkHdr(0, order, 1)) + pack_element(Element(start, phys + 4096))
    kernel.ram.write(phys, chunk, (0, "test"))
    kernel.ram.write(phys + 4096, b"\x0b".ljust(4096, b"\0"), (0, "test"))
    tracker.root = phys
    blocks = [(at, of, nr) for at, of, nr in tracker.blocks()]
    each = [at + (n << order + 12) for at, _, nr in blocks for n in range(nr)]
    assert each == first
    assert {of for _, of, _ in blocks} == {order}
