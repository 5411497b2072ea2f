"""Trees that are read level by level beside the walk that goes from page to page."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim import Machine
from khosim.kernel.kernel import Kernel
from khosim.kernel.kho_radix import KhoRadixTree

GIB = 1 << 30


def tree_of(kernel: Kernel) -> KhoRadixTree:
    tree = kernel.kho_out.tree
    assert isinstance(tree, KhoRadixTree)
    return tree


def walked(tree: KhoRadixTree) -> tuple[list[int], list[tuple[int, int]]]:
    """The pages, sorted, and the runs that the walk tells."""
    steps = list(tree.walk())
    return sorted(value for count, value in steps if not count), [run for run in steps if run[0]]


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.booleans(), st.integers(1, 70)), min_size=0, max_size=12
    )
)
def test_a_small_tree_is_read_as_it_is_walked(wanted: list[tuple[int, bool, int]]) -> None:
    """Blocks of any orders, alone and in rows: the same pages, the same runs in the same order."""
    with Machine("128M", checks=False) as machine:
        kernel = machine.boot(cmdline="kho=on")
        for order, in_a_row, count in wanted:
            if in_a_row:
                for _ in range(count >> order):
                    kernel.kho_preserve_folio(kernel.alloc_folio(order))
            else:
                kernel.kho_preserve_folio(kernel.alloc_folio(order))
                kernel.alloc_folio(order)
        tree = tree_of(kernel)
        pages, runs = walked(tree)
        found = tree.read_at_once()
        assert found is not None
        assert (sorted(found[0]), found[1]) == (pages, runs)
        assert list(tree.runs()) == runs


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_tree_is_left_to_the_walk(seed: int) -> None:
    """Wild words in the tables: nothing is said, or the very thing that the walk says."""
    rng = random.Random(seed)
    with Machine("128M", checks=False) as machine:
        kernel = machine.boot(cmdline="kho=on")
        for order in range(4):
            kernel.kho_preserve_folio(kernel.alloc_folio(order))
        tree = tree_of(kernel)
        pages, _ = walked(tree)
        spots = [(phys, rng.choice(pages)) for phys in rng.sample(pages, 2)]
        for phys, other in spots:
            wild = (other, phys, 0, rng.randrange(1 << 64), 127 << 20, other + 8, GIB)
            kernel.ram.write_u64(phys + 8 * rng.randrange(512), rng.choice(wild), (0, "damage"))
        found = tree.read_at_once()
        if found is not None:
            assert (sorted(found[0]), found[1]) == walked(tree)


def test_pages_that_are_reached_twice_or_lie_nowhere() -> None:
    """What no kernel builds is told from what it builds, page by page."""
    with Machine("128M", checks=False) as machine:
        kernel = machine.boot(cmdline="kho=on")
        kernel.kho_preserve_folio(kernel.alloc_folio(0))
        tree = tree_of(kernel)
        root = tree.root
        leaf = [value for count, value in tree.walk() if not count][-1]
        for odd in (root, leaf, leaf + 8, 1 << 40, 1 << 63):
            kernel.ram.write_u64(root + 8 * 300, odd, (0, "damage"))
            assert tree.read_at_once() is None, hex(odd)
        kernel.ram.write_u64(root + 8 * 300, 0, (0, "damage"))
        assert tree.read_at_once() is not None


def test_a_run_ends_with_its_leaf() -> None:
    """Neighbouring keys on both sides of a border are two runs, as the walk has them."""
    with Machine("1G", checks=False) as machine:
        kernel = machine.boot(cmdline="kho=on")
        tree = tree_of(kernel)
        border = 1 << 52 | 2 << 15
        assert tree.add_run(border - 3, 5) == (0, 5)
        found = tree.read_at_once()
        assert found is not None
        last = [run for run in found[1] if run[1] >= border - 3]
        assert last == [(3, border - 3), (2, border)]
        assert found[1] == walked(tree)[1]


@pytest.mark.parametrize("ram", ["64M", "3G"])
def test_a_successor_boots_the_same_without_the_short_way(
    ram: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scratch extension and retrieval leave the same memblock and the same trace either way."""

    def second_boot() -> tuple[object, ...]:
        with Machine(ram, seed=3) as machine:
            events: list[object] = []
            machine.listen(events.append)
            kernel = machine.boot(cmdline="kho=on reserve_mem=64K:4096:oops")
            for order in (0, 0, 3, 9, 0, 1):
                kernel.kho_preserve_folio(kernel.alloc_folio(order))
            successor = machine.kexec(kernel)
            rows = successor.memblock.memory.rows(), successor.memblock.reserved.rows()
            return (*rows, list(successor.pages.pages.runs()), list(map(str, events)))

    short = second_boot()
    monkeypatch.setattr(KhoRadixTree, "read_at_once", lambda self: None)
    assert second_boot() == short
