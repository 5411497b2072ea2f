"""The radix tree: values worked out by hand, a plain walk of the bytes, and what memory can do."""

from __future__ import annotations

import errno
import json
import random
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import khosim
from khosim.errors import KernelPanic
from khosim.kernel.arch import Arch, find_arch
from khosim.kernel.kho_radix import KhoRadixTree
from khosim.kernel.kho_radix_key import key_base, kho_decode_radix_key, kho_encode_radix_key
from khosim.machine.ram import Ram

GOLDEN = Path(__file__).parent / "golden" / "captures"
CAPTURES = sorted(str(path.parent.relative_to(GOLDEN)) for path in GOLDEN.glob("*/gen*/ram.npz"))
PAGE_SIZES = (4096, 16384, 65536)
# page size: log2 of it, of the entries of a table, of the bits of a leaf; levels
SHAPE = {4096: (12, 9, 15, 6), 16384: (14, 11, 17, 5), 65536: (16, 13, 19, 4)}


def arch_of(page_size: int) -> Arch:
    return find_arch("x86_64" if page_size == 4096 else "arm64", page_size)


class Memory:
    """Pages from an address upwards, the last one freed first; a log of what was asked."""

    def __init__(
        self,
        page_size: int = 4096,
        *,
        first_pfn: int = 16,
        nr_pages: int = 4096,
        ram: Ram | None = None,
        holes: Iterable[tuple[int, int]] = (),
    ) -> None:
        self.arch = arch_of(page_size)
        self.ram = ram or Ram(nr_pages * page_size, page_size=page_size)
        self.free = list(range(nr_pages - 1, first_pfn - 1, -1))
        self.left = nr_pages
        self.log: list[tuple[str, int]] = []
        self.messages: list[str] = []
        self.once: set[str] = set()
        self.starts, self.ends = [0], [self.ram.size_bytes]
        for start, end in holes:
            i = bisect_right(self.starts, start)
            self.starts.insert(i, end)
            self.ends.insert(i - 1, start)

    def kho_radix_alloc_node(self) -> int:
        if not self.left or not self.free:
            self.log.append(("fail", 0))
            return 0
        self.left -= 1
        phys = self.free.pop() * self.arch.page_size
        self.ram.zero(phys, self.arch.page_size, self.by("kho_radix_alloc_node"))
        self.log.append(("alloc", phys))
        return phys

    def kho_radix_alloc_nodes(self, nr_nodes: int) -> list[int]:
        nodes: list[int] = []
        while len(nodes) < nr_nodes and (phys := self.kho_radix_alloc_node()):
            nodes.append(phys)
        return nodes

    def kho_radix_free_node(self, phys: int) -> None:
        self.free.append(phys // self.arch.page_size)
        self.log.append(("free", phys))

    def virt(self, phys: int, len_bytes: int) -> int:
        i = bisect_right(self.starts, phys) - 1
        if i < 0 or phys + len_bytes > self.ends[i]:
            raise KernelPanic(f"page fault at {phys:#x}", 3)
        return phys

    def warn(self, message: str) -> None:
        self.messages.append(message)

    def warn_once(self, message: str, where: str) -> None:
        if where not in self.once:
            self.once.add(where)
            self.messages.append(message)

    def by(self, symbol: str) -> tuple[int, str]:
        return 3, symbol

    def used(self) -> dict[int, bytes]:
        """The pages that are not all zero."""
        size = self.arch.page_size
        found = {}
        for start, end in self.ram.touched_ranges():
            for phys in range(start, end, size):
                page = self.ram.read(phys, size)
                if any(page):
                    found[phys] = page
        return found


def tree_in(memory: Memory) -> KhoRadixTree:
    tree = KhoRadixTree(memory)
    assert tree.init_tree() == 0
    return tree


def plain_walk(ram: Ram, root: int, page_size: int) -> Iterator[tuple[str, int]]:
    """Every table and key in the kernel's order, one entry and one bit at a time."""
    _, table_bits, leaf_bits, levels = SHAPE[page_size]

    def walk(node: int, level: int, start: int) -> Iterator[tuple[str, int]]:
        yield "page", node
        if level == 0:
            bits = int.from_bytes(ram.read(node, page_size), "little")
            while bits:
                low = bits & -bits
                yield "key", start | low.bit_length() - 1
                bits ^= low
            return
        shift = (level - 1) * table_bits + leaf_bits
        for index in range(1 << table_bits):
            child = ram.read_u64(node + 8 * index)
            if child:
                yield from walk(child, level - 1, start | index << shift)

    return walk(root, levels - 1, 0)


def unrolled(walk: Iterable[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """What a walk says, key by key."""
    for nr_keys, value in walk:
        if nr_keys == 0:
            yield "page", value
        for key in range(value, value + nr_keys):
            yield "key", key


def keys_in(tree: KhoRadixTree) -> list[int]:
    return [value for what, value in unrolled(tree.walk()) if what == "key"]


# -- keys ------------------------------------------------------------------------------------

KEYS = [
    # page size, address, order, key
    (4096, 0, 0, 1 << 52),
    (4096, 0x1234_5000, 0, 0x0010_0000_0001_2345),
    (4096, 0x1234_6000, 1, 0x0008_0000_0000_91A3),
    (4096, 0x4000_0000, 9, 0x0000_0800_0000_0200),
    (4096, 0x80_0000_0000, 18, 0x0000_0004_0000_0200),
    (4096, (1 << 52) - 4096, 0, 0x0010_00FF_FFFF_FFFF),
    (4096, 0, 52, 1),
    (16384, 0x4567_8000, 0, 0x0004_0000_0001_159E),
    (16384, 0x4000_0000, 11, 0x0000_0080_0000_0020),
    (65536, 0x1_2345_0000, 0, 0x0001_0000_0001_2345),
    (65536, 0x2000_0000, 13, 0x0000_0008_0000_0001),
]


@pytest.mark.parametrize(("page_size", "phys", "order", "key"), KEYS)
def test_keys_worked_out_by_hand(page_size: int, phys: int, order: int, key: int) -> None:
    """The order bit stands right above the block number, 64 - PAGE_SHIFT - order bits up."""
    shift = SHAPE[page_size][0]
    assert kho_encode_radix_key(phys, order, shift) == key
    assert key_base(order, shift) | phys >> shift + order == key
    if shift + order < 64:
        assert kho_decode_radix_key(key, shift) == (phys, order)


@settings(max_examples=200)
@given(st.sampled_from(PAGE_SIZES), st.data())
def test_decoding_undoes_encoding(page_size: int, data: st.DataObject) -> None:
    """Each block of each order has a key of its own, no wider than a tree can hold."""
    shift = SHAPE[page_size][0]
    order = data.draw(st.integers(0, 63 - shift))
    phys = data.draw(st.integers(0, (1 << 64 - shift - order) - 1)) << shift + order
    key = kho_encode_radix_key(phys, order, shift)
    assert kho_decode_radix_key(key, shift) == (phys, order)
    assert key.bit_length() <= 64 - shift + 1


@pytest.mark.parametrize(
    ("key", "phys", "order"),
    [
        (0, 0, 53),  # fls64(0) - 1 is -1
        (1, 1, 52),  # shifted by 64, which the CPU takes for 0
        (2, 0, 51),
        (1 << 53, 0, -1),
        (1 << 59 | 5, 5 << 5, -7),
        ((1 << 64) - 1, ((1 << 64) - 1) << 1 & (1 << 64) - 1, -11),
    ],
)
def test_keys_that_no_kernel_wrote(key: int, phys: int, order: int) -> None:
    """A hostile leaf can spell any key: shifts go by their low six bits."""
    assert kho_decode_radix_key(key, 12) == (phys, order)


# -- where a key lies ------------------------------------------------------------------------

PLACES = [
    # page size, key, table indices from the root down, byte and bit of the leaf
    (4096, 0x0010_0000_0123_4567, (2, 0, 0, 1, 0x46), 0x8AC, 7),
    (4096, 0x0010_0000_0000_1234, (2, 0, 0, 0, 0), 0x246, 4),
    (4096, 0x0000_0800_0000_0200, (0, 2, 0, 0, 0), 0x40, 0),
    (4096, 0x001F_FFFF_FFFF_FFFF, (3, 511, 511, 511, 511), 0xFFF, 7),
    (4096, 1, (0, 0, 0, 0, 0), 0, 1),
    (16384, 0x0004_0000_0001_159E, (1, 0, 0, 0), 0x22B3, 6),
    (16384, 0x0007_FFFF_FFFF_FFFF, (1, 2047, 2047, 2047), 0x3FFF, 7),
    (16384, 0x0000_0080_0000_0020, (0, 1, 0, 0), 4, 0),
    (65536, 0x0001_0000_0001_2345, (8, 0, 0), 0x2468, 5),
    (65536, 0x0000_0008_0000_0001, (0, 8, 0), 0, 1),
]


@pytest.mark.parametrize(("page_size", "key", "indices", "byte", "bit"), PLACES)
def test_a_key_sets_one_bit_of_one_leaf(
    page_size: int, key: int, indices: tuple[int, ...], byte: int, bit: int
) -> None:
    """Table by table from the root: the entry, and nothing beside it."""
    memory = Memory(page_size)
    tree = tree_in(memory)
    assert tree.add_key(key) == 0
    tables = [phys for _, phys in memory.log]
    assert [phys // page_size for phys in tables] == list(range(16, 17 + len(indices)))
    expected = {}
    for level, index in enumerate(indices):
        page = bytearray(page_size)
        page[8 * index : 8 * index + 8] = tables[level + 1].to_bytes(8, "little")
        expected[tables[level]] = bytes(page)
    leaf = bytearray(page_size)
    leaf[byte] = 1 << bit
    expected[tables[-1]] = bytes(leaf)
    assert memory.used() == expected
    assert list(tree.walk()) == [*((0, phys) for phys in tables), (1, key)]
    assert memory.ram.last_writer(tables[-1]) == (3, "kho_radix_add_key")
    tree.del_key(key)
    assert memory.used() == {phys: expected[phys] for phys in tables[:-1]}
    assert memory.ram.last_writer(tables[-1]) == (3, "kho_radix_del_key")


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_keys_wider_than_the_tree_are_refused(page_size: int) -> None:
    """-ERANGE, and no other key is touched, whatever its low bits alias."""
    memory = Memory(page_size)
    tree = tree_in(memory)
    width = 64 - SHAPE[page_size][0] + 1
    levels = SHAPE[page_size][3]
    wrap = 1 << (levels - 1) * SHAPE[page_size][1] + SHAPE[page_size][2]
    tree.add_key(5)
    before = memory.used()
    for key in (1 << width, wrap | 5, (1 << 64) - 1):
        assert tree.add_key(key) == -errno.ERANGE
        assert not tree.has_key(key)
        tree.del_key(key)
    tree.del_run(wrap | 4, 3)
    assert tree.add_run(wrap | 4, 3) == (-errno.ERANGE, 0)
    assert memory.used() == before
    assert memory.messages == []
    last = (1 << width) - 1
    assert tree.add_run(last - 2, 5) == (-errno.ERANGE, 3)
    assert keys_in(tree) == [5, last - 2, last - 1, last]
    keys = np.arange(last - 99, last + 2, dtype=np.int64)
    assert tree.add_many(keys) == (-errno.ERANGE, 100)
    memory.left = 0
    keys[3:] = np.arange(1 << 40, (1 << 40) + 98)
    keys[-1] = 1 << 62
    assert tree.add_many(keys) == (-errno.ENOMEM, 3)


def test_a_tree_without_root_refuses() -> None:
    """-EINVAL and one warning from each function; a walk sees nothing."""
    memory = Memory()
    tree = KhoRadixTree(memory)
    for _ in range(2):
        assert tree.add_key(1) == -errno.EINVAL
        assert tree.add_run(1, 2) == (-errno.EINVAL, 0)
        assert tree.add_many(np.arange(100)) == (-errno.EINVAL, 0)
        tree.del_key(1)
        tree.del_run(1, 2)
    assert not tree.has_key(1)
    assert list(tree.walk()) == []
    tree.destroy()
    assert [message.split(":")[1] for message in memory.messages] == [
        " kho_radix_add_key",
        " kho_radix_del_key",
    ]
    assert memory.log == []


def test_deleting_what_was_never_there_warns() -> None:
    """Only a missing table is worth a warning; a bit that is clear is cleared silently."""
    memory = Memory()
    tree = tree_in(memory)
    tree.del_key(1 << 52)
    assert len(memory.messages) == 1
    tree.add_key(1 << 52)
    tree.del_key(1 << 52 | 1)
    assert len(memory.messages) == 1
    tree.del_run(1 << 52, 1 << 16)
    assert len(memory.messages) == 2
    assert keys_in(tree) == []


def test_destroying_frees_children_first() -> None:
    """Each table after its children, in the order of their entries; the root last."""
    memory = Memory()
    tree = tree_in(memory)
    for key in (1 << 52, 1 << 43, 1 << 52 | 1 << 15):
        tree.add_key(key)
    root, a1, a2, a3, a4, leaf_a, b1, b2, b3, b4, leaf_b, leaf_c = (p for _, p in memory.log)
    del memory.log[:]
    tree.destroy()
    order = [leaf_b, b4, b3, b2, b1, leaf_a, leaf_c, a4, a3, a2, a1, root]
    assert memory.log == [("free", phys) for phys in order]
    assert tree.root == 0


def test_the_root_may_not_be_had() -> None:
    """-ENOMEM from the very first page; a given root is adopted without one."""
    memory = Memory()
    memory.left = 0
    tree = KhoRadixTree(memory)
    assert tree.init_tree() == -errno.ENOMEM
    assert tree.root == 0
    assert tree.init_tree(0x3000) == 0
    assert tree.root == 0x3000


# -- beside a set, and beside the bytes --------------------------------------------------------


def some_keys(page_size: int) -> st.SearchStrategy[int]:
    """Keys that share leaves, tables or nothing."""
    shift, _, leaf_bits, _ = SHAPE[page_size]
    base = st.sampled_from([1 << 64 - shift, 1 << 63 - shift, 1 << 64 - shift - 9, 1 << 40])
    leaf = st.integers(0, 3).map(lambda n: n << leaf_bits) | st.just(1 << 30)
    edge = (1 << leaf_bits) - 1
    bit = st.sampled_from([0, 1, 62, 63, 64, 127, edge - 1, edge]) | st.integers(0, edge)
    return st.builds(lambda *parts: parts[0] | parts[1] | parts[2], base, leaf, bit)


class TreeMachine(RuleBasedStateMachine):
    """Two trees and a set: one tree gets whole arrays, the other one key at a time."""

    page_size = 4096

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.single = Memory(self.page_size), Memory(self.page_size)
        self.tree, self.plain = tree_in(self.whole), tree_in(self.single)
        self.keys: set[int] = set()

    def draw_key(self, data: st.DataObject) -> int:
        return data.draw(some_keys(self.page_size))

    def add_singly(self, keys: Iterable[int]) -> tuple[int, int]:
        done = 0
        for key in keys:
            error = self.plain.add_key(key)
            if error:
                return error, done
            self.keys.add(key)
            done += 1
        return 0, done

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        key = self.draw_key(data)
        assert (self.tree.add_key(key), 1) == (0, self.add_singly([key])[1])

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        key = self.draw_key(data)
        self.tree.del_key(key)
        self.plain.del_key(key)
        self.keys.discard(key)

    @rule(data=st.data(), left=st.none() | st.integers(0, 9))
    def add_many(self, data: st.DataObject, left: int | None) -> None:
        keys = data.draw(st.lists(some_keys(self.page_size), max_size=20))
        keys *= data.draw(st.sampled_from([1, 10]))
        self.limit(left)
        array = np.array(keys, dtype=np.int64)
        assert self.tree.add_many(array) == self.add_singly(keys)
        self.limit(None)

    @rule(data=st.data(), nr_keys=st.integers(0, 300), left=st.none() | st.integers(0, 9))
    def add_run(self, data: st.DataObject, nr_keys: int, left: int | None) -> None:
        key = self.draw_key(data)
        self.limit(left)
        added = self.add_singly(range(key, key + nr_keys))
        assert self.tree.add_run(key, nr_keys) == added
        self.limit(None)

    @precondition(lambda self: self.keys)
    @rule(data=st.data(), before=st.integers(0, 70), nr_keys=st.integers(0, 300))
    def del_run(self, data: st.DataObject, before: int, nr_keys: int) -> None:
        first = data.draw(st.sampled_from(sorted(self.keys))) - before
        self.tree.del_run(first, nr_keys)
        for key in range(first, first + nr_keys):
            self.plain.del_key(key)
            self.keys.discard(key)

    def limit(self, left: int | None) -> None:
        for memory in (self.whole, self.single):
            memory.left = 10_000 if left is None else left

    @invariant()
    def same_bytes_and_pages(self) -> None:
        assert self.whole.log == self.single.log
        assert self.whole.used() == self.single.used()
        pages = range(self.whole.ram.size_bytes // self.page_size)
        assert self.whole.ram.last_writers(pages) == self.single.ram.last_writers(pages)
        assert bool(self.whole.messages) == bool(self.single.messages)

    @invariant()
    def holds_the_keys(self) -> None:
        walked = list(unrolled(self.tree.walk()))
        assert walked == list(plain_walk(self.whole.ram, self.tree.root, self.page_size))
        pairs = list(self.tree.walk())
        counts = [count for part, _ in self.tree.walk_arrays() for count in part.tolist()]
        values = [value for _, part in self.tree.walk_arrays() for value in part.tolist()]
        assert list(zip(counts, values, strict=True)) == pairs
        assert [value for what, value in walked if what == "key"] == sorted(self.keys)
        for key in self.keys:
            assert self.tree.has_key(key)
            assert self.tree.has_key(key ^ 1) == (key ^ 1 in self.keys)


class TreeMachine16K(TreeMachine):
    """The same with tables of 16 KiB."""

    page_size = 16384


class TreeMachine64K(TreeMachine):
    """The same with tables of 64 KiB."""

    page_size = 65536


TreeMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=10)
TreeMachine16K.TestCase.settings = settings(max_examples=6, stateful_step_count=10)
TreeMachine64K.TestCase.settings = settings(max_examples=4, stateful_step_count=10)
TestTree = TreeMachine.TestCase
TestTree16K = TreeMachine16K.TestCase
TestTree64K = TreeMachine64K.TestCase


@pytest.mark.parametrize("density", [0.001, 0.01, 0.2, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_runs_of_leaves_of_any_density(page_size: int, density: float) -> None:
    """Every run of a leaf is whole, ascending and apart from the next."""
    memory = Memory(page_size)
    tree = tree_in(memory)
    tree.add_key(1 << 40)
    leaf = memory.log[-1][1]
    rng = np.random.default_rng(7)
    bits = rng.random(page_size * 8) < density
    memory.ram.write(leaf, np.packbits(bits, bitorder="little"), (0, "test"))
    runs = [(count, key) for count, key in tree.walk() if count]
    ends = -1
    for count, key in runs:
        assert key > ends
        ends = key + count
    keys = [key for count, first in runs for key in range(first, first + count)]
    assert keys == [1 << 40 | int(bit) for bit in np.flatnonzero(bits)]


def test_a_run_over_the_edge_of_a_word_is_one_run() -> None:
    """Words of 64 bits are how it is stored, not what it says; leaves part runs."""
    tree = tree_in(Memory())
    tree.add_run(1 << 52 | 60, 140)
    tree.add_run((1 << 52 | 1 << 15) - 3, 5)
    runs = [run for run in tree.walk() if run[0]]
    edge = 1 << 52 | 1 << 15
    assert runs == [(140, 1 << 52 | 60), (3, edge - 3), (2, edge)]


# -- no memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_branch_that_cannot_be_finished_is_undone(page_size: int) -> None:
    """Its pages are freed from the top down, and its first entry is zero again."""
    for old in ([], [1 << 40 | 1 << 33], [1 << 40 | 1 << 27], [1 << 40 | 1 << 20]):
        for left in range(SHAPE[page_size][3]):
            memory = Memory(page_size)
            tree = tree_in(memory)
            for key in old:
                tree.add_key(key)
            reachable = list(plain_walk(memory.ram, tree.root, page_size))
            before = {phys: memory.ram.read(phys, page_size) for _, phys in reachable[: -len(old)]}
            del memory.log[:]
            memory.left = left
            error = tree.add_key(1 << 40)
            if not error:
                assert tree.has_key(1 << 40)
                continue
            assert error == -errno.ENOMEM
            made = [phys for what, phys in memory.log if what == "alloc"]
            assert memory.log == [
                *(("alloc", phys) for phys in made),
                ("fail", 0),
                *(("free", phys) for phys in made),
            ]
            assert len(made) == left
            assert list(plain_walk(memory.ram, tree.root, page_size)) == reachable
            for phys, page in before.items():
                assert memory.ram.read(phys, page_size) == page


def outcome(left: int, action: Callable[[KhoRadixTree], tuple[int, int]]) -> object:
    """What an action returned, asked for and left in memory when ``left`` pages can be had."""
    memory = Memory()
    tree = tree_in(memory)
    tree.add_key(1 << 52)
    memory.left = left
    result = action(tree)
    return result, memory.log, memory.used(), memory.ram.writers_in(0, memory.ram.size_bytes)


def test_arrays_fail_where_single_keys_would() -> None:
    """-ENOMEM at every single allocation: the same keys in, the same pages given back."""
    rng = random.Random(4)
    keys = [1 << 52 | rng.randrange(1 << 19) for _ in range(120)]
    keys += [1 << 52 | rng.randrange(1 << 40) for _ in range(15)]
    keys += [1 << 43 | rng.randrange(1 << 17) for _ in range(60)]
    rng.shuffle(keys)
    near = [1 << 52 | rng.randrange(1 << 21) for _ in range(120)]

    def one_by_one(tree: KhoRadixTree, keys: Iterable[int]) -> tuple[int, int]:
        for done, key in enumerate(keys):
            error = tree.add_key(key)
            if error:
                return error, done
        return 0, len(list(keys))

    run = range((1 << 52) - 200, (1 << 52) + 33_000)
    for left in range(70):
        for many in (keys, near):
            expected = outcome(left, lambda tree, many=many: one_by_one(tree, many))
            got = outcome(left, lambda tree, many=many: tree.add_many(np.array(many)))
            assert got == expected
    for left in range(8):
        expected = outcome(left, lambda tree: one_by_one(tree, run))
        assert outcome(left, lambda tree: tree.add_run(run.start, len(run))) == expected


def test_a_real_kernel_gets_its_pages_back() -> None:
    """Each failure inside a branch: the tree's bytes and the free lists are as they were."""
    machine = khosim.Machine("64M", checks=False)
    kernel = machine.boot(cmdline="kho=on")
    tree, shift = kernel.kho_out.tree, kernel.arch.page_shift
    far = kho_encode_radix_key(1 << 50, 3, shift)
    before = list(plain_walk(kernel.ram, tree.root, 4096))
    root = kernel.ram.read(tree.root, 4096)
    free = [kernel.pages.nr_free_pages(), list(kernel.pages.pages.runs())]
    for left in range(5):
        pages = iter(range(left))
        kernel.pages.fail = lambda order, owner, pages=pages: next(pages, None) is None
        assert tree.add_key(far) == -errno.ENOMEM
        assert tree.add_run(far, 70_000) == (-errno.ENOMEM, 0)
        assert list(plain_walk(kernel.ram, tree.root, 4096)) == before
        assert kernel.ram.read(tree.root, 4096) == root
        assert [kernel.pages.nr_free_pages(), list(kernel.pages.pages.runs())] == free
    kernel.pages.fail = None
    assert tree.add_key(far) == 0
    assert list(unrolled(tree.walk())) == list(plain_walk(kernel.ram, tree.root, 4096))
    assert kernel.pages.nr_free_pages() == free[0] - 5


# -- bytes that somebody else wrote ------------------------------------------------------------


def hostile(
    page_size: int = 4096, holes: Iterable[tuple[int, int]] = ()
) -> tuple[Memory, list[int]]:
    """A tree of one key, and the addresses of its pages from the root down."""
    memory = Memory(page_size, holes=holes)
    tree_in(memory).add_key(1 << 40)
    return memory, [phys for _, phys in memory.log]


def walked_until_panic(tree: KhoRadixTree) -> tuple[list[tuple[int, int]], KernelPanic | None]:
    """All that a walk said, and how it died if it did."""
    steps: list[tuple[int, int]] = []
    try:
        steps.extend(tree.walk())
    except KernelPanic as panic:
        return steps, panic
    return steps, None


def poke(memory: Memory, phys: int, value: int) -> None:
    memory.ram.write_u64(phys, value, (0, "fault"))


@pytest.mark.parametrize("pointer", [0x0DEA_D000, 4096 * 4096, (1 << 64) - 4096, 1 << 63, 0x20000])
@pytest.mark.parametrize("level", range(5))
def test_a_pointer_to_nowhere_is_a_page_fault(level: int, pointer: int) -> None:
    """Beyond RAM, in a hole of it or far away: the kernel that follows it dies."""
    memory, pages = hostile(holes=[(0x20000, 0x30000)])
    entry = next(at for at in range(0, 4096, 8) if memory.ram.read_u64(pages[level] + at))
    poke(memory, pages[level] + entry, pointer)
    tree = KhoRadixTree(memory, pages[0])
    seen, panic = walked_until_panic(tree)
    assert panic is not None
    assert seen == [(0, phys) for phys in [*pages[: level + 1], pointer]]
    for call in (tree.add_key, tree.del_key, tree.has_key):
        with pytest.raises(KernelPanic):
            call(1 << 40)
    with pytest.raises(KernelPanic):
        tree.add_many(np.arange(1 << 40, (1 << 40) + 500))
    with pytest.raises(KernelPanic):
        tree.del_run(1 << 40, 500)


@pytest.mark.parametrize("level", range(5))
def test_an_unaligned_pointer_is_followed_to_where_memory_ends(level: int) -> None:
    """The kernel does not care for alignment; only what lies beyond RAM faults."""
    memory, pages = hostile()
    entry = next(at for at in range(0, 4096, 8) if memory.ram.read_u64(pages[level] + at))
    last = memory.ram.size_bytes - 8
    poke(memory, pages[level] + entry, last)
    tree = KhoRadixTree(memory, pages[0])
    with pytest.raises(KernelPanic):
        list(tree.walk())
    beyond = (1 << 40) + 511  # the highest index or bit that lies in another word
    if level == 4:
        assert tree.add_key(1 << 40) == 0
        assert memory.ram.read_u64(last) == 1
        with pytest.raises(KernelPanic):
            tree.add_key(beyond)
        with pytest.raises(KernelPanic):
            tree.add_many(np.arange(1 << 40, beyond))
        with pytest.raises(KernelPanic):
            tree.add_run(1 << 40, 512)
    else:
        shift = 15 + 9 * (3 - level)
        with pytest.raises(KernelPanic):
            tree.add_key(1 << 40 ^ 511 << shift)
    poke(memory, pages[level] + entry, 0x80_0004)
    page = bytearray(4096)
    page[0] = 1
    memory.ram.write(0x80_0004, bytes(page), (0, "fault"))
    assert keys_in(tree) if level == 4 else True


def test_two_ways_to_a_leaf_are_walked_twice() -> None:
    """A shared page is no cycle: the kernel reads it twice and goes on."""
    memory, pages = hostile()
    poke(memory, pages[4] + 8 * 7, pages[5])
    tree = KhoRadixTree(memory, pages[0])
    assert keys_in(tree) == [1 << 40, 1 << 40 | 7 << 15]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("nr_entries", [1, 2, 30, 100_000])
def test_circles_end_in_a_panic_soon(page_size: int, nr_entries: int) -> None:
    """Tables that lead back to themselves: a lockup in the kernel, a moment here."""
    memory, pages = hostile(page_size)
    for phys in (pages[0], pages[1]):
        for at in range(0, min(page_size, 8 * nr_entries), 8):
            poke(memory, phys + at, pages[0] if at % 16 else pages[1])
    tree = KhoRadixTree(memory, pages[0])
    begin = time.monotonic()
    steps, panic = walked_until_panic(tree)
    assert len(steps) < 100_000
    if nr_entries == 1:
        assert panic is None
    if nr_entries > 30:
        assert panic is not None
        assert "kho_radix_walk_tree" in panic.message
        assert panic.generation == 3
    if nr_entries > 30:
        with pytest.raises(KernelPanic):
            tree.destroy()
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("capture", CAPTURES[:1] + CAPTURES[-1:])
def test_damaged_trees_end_as_the_kernel_would(capture: str) -> None:
    """Any byte of any table or leaf: keys, or a panic; never an exception of another kind."""
    memory, decoded, pages = load(capture)
    size = memory.arch.page_size
    rng = random.Random(capture)
    for _ in range(150):
        token = memory.ram.snapshot()
        for _ in range(rng.choice((1, 1, 2, 8))):
            phys = rng.choice(pages) + rng.randrange(size)
            if rng.random() < 0.5:
                memory.ram.write(phys, bytes([rng.randrange(256)]), (0, "fault"))
            else:
                poke(memory, phys & -8, rng.choice(pages) + rng.choice((0, 0, 8, 3)))
        tree = KhoRadixTree(memory, decoded["mem_map"])
        steps, _ = walked_until_panic(tree)
        assert all(nr_keys >= 0 <= value < 1 << 64 for nr_keys, value in steps)
        assert len(steps) < 200_000
        memory.ram.rollback(token)
        memory.ram.discard(token)


# -- what real kernels wrote -------------------------------------------------------------------


def load(capture: str) -> tuple[Memory, dict[str, object], list[int]]:
    """A capture's RAM, its decoded handover and the pages of its tree."""
    decoded = json.loads((GOLDEN / capture / "handover.json").read_text())
    with np.load(GOLDEN / capture / "ram.npz") as pages:
        pfns, data = pages["pfn"].tolist(), pages["data"]
    size = data.shape[1]
    ram = Ram((max(pfns) + 1) * size, page_size=size)
    for pfn, page in zip(pfns, data, strict=True):
        ram.write(pfn * size, page, (0, "predecessor"))
    memory = Memory(size, ram=ram)
    plain = plain_walk(ram, decoded["mem_map"], size)
    return memory, decoded, [value for what, value in plain if what == "page"]


@pytest.mark.parametrize("capture", CAPTURES)
def test_real_trees_are_read_as_their_successor_read_them(capture: str) -> None:
    """The preserved blocks in the kernel's own order, and every table once."""
    memory, decoded, pages = load(capture)
    shift = memory.arch.page_shift
    tree = KhoRadixTree(memory, decoded["mem_map"])
    walked = list(unrolled(tree.walk()))
    blocks = [list(kho_decode_radix_key(key, shift)) for what, key in walked if what == "key"]
    assert blocks == decoded["preserved"]
    assert sum(what == "page" for what, _ in walked) == decoded["radix_nodes"]
    assert [value for what, value in walked if what == "page"] == pages


@pytest.mark.parametrize("capture", CAPTURES)
def test_real_trees_can_be_grown_again(capture: str) -> None:
    """The same keys in any order make the same leaves, and tables of the same shape."""
    memory, decoded, _ = load(capture)
    shift = memory.arch.page_shift
    keys = [kho_encode_radix_key(phys, order, shift) for phys, order in decoded["preserved"]]
    random.Random(capture).shuffle(keys)
    real = contents(memory, decoded["mem_map"])
    for is_array in (False, True):
        ours = Memory(memory.arch.page_size)
        tree = tree_in(ours)
        if is_array:
            assert tree.add_many(np.array(keys * 3)) == (0, 3 * len(keys))
        else:
            assert [tree.add_key(key) for key in keys] == [0] * len(keys)
        # A kernel never frees a table, so a real tree may have empty ones besides.
        grown = contents(ours, tree.root)
        assert grown.keys() <= real.keys()
        for path, page in real.items():
            assert grown.get(path, bytes(len(page))) == page


def contents(memory: Memory, root: int) -> dict[tuple[int, ...], bytes]:
    """By path from the root: leaves as they are, tables as which entries they have."""
    size = memory.arch.page_size
    found: dict[tuple[int, ...], bytes] = {}

    def descend(path: tuple[int, ...], node: int) -> None:
        page = memory.ram.read(node, size)
        if len(path) == SHAPE[size][3] - 1:
            if any(page):
                found[path] = page
            return
        for index in range(size // 8):
            child = int.from_bytes(page[8 * index : 8 * index + 8], "little")
            if child:
                descend((*path, index), child)

    descend((), root)
    return found
