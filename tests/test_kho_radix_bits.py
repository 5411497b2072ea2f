"""Whole arrays of leaves: what one leaf after the other, and one bit after the other, would say."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

import khosim
from khosim.errors import KernelPanic
from khosim.kernel.kernel import Kernel
from khosim.kernel.kho_radix import KhoRadixTree
from khosim.kernel.kho_radix_bits import set_bits

BITS = 1 << 15  # of a leaf of 4 KiB
BASE = 1 << 40


def tree_of(nr_leaves: int) -> tuple[Kernel, KhoRadixTree, list[int]]:
    """A kernel's tree of its own with neighbouring leaves, and these; leaf i begins with i + 1."""
    kernel = khosim.Machine("64M", checks=False).boot(cmdline="kho=on")
    tree = KhoRadixTree(kernel)
    assert tree.init_tree() == 0
    for leaf in range(nr_leaves):
        tree.add_run(BASE | leaf * BITS, leaf + 1)
    leaves = [value for (_, value), (after, _) in pairwise(tree.walk()) if after]
    assert len(leaves) == nr_leaves
    return kernel, tree, leaves


def runs_of(kernel: Kernel, leaf: int, first_key: int) -> list[tuple[int, int]]:
    """The page of a leaf and its runs, from its bytes as a text of ones and zeros."""
    bits = "".join(f"{octet:08b}"[::-1] for octet in kernel.ram.read(leaf, 4096))
    found, at = [(0, leaf)], bits.find("1")
    while at >= 0:
        end = (bits + "0").find("0", at)
        found.append((end - at, first_key | at))
        at = bits.find("1", end)
    return found


def test_many_leaves_are_walked_as_each_of_them() -> None:
    """Sparse, dense, full and empty leaves side by side, and runs that end where a leaf does."""
    kernel, tree, leaves = tree_of(150)
    rng = random.Random(3)
    for leaf, phys in enumerate(leaves):
        octets = bytearray(4096)
        kind = leaf % 5
        if kind == 0:
            octets = bytearray(b"\xff" * 4096)
        elif kind == 1:
            octets[rng.randrange(4096)] = octets[4095] = 0x81
        elif leaf % 25 == 2:
            octets = bytearray(rng.randbytes(4096))
        elif kind == 3:
            octets[:700] = octets[3000:] = b"\xff" * 700
        kernel.ram.write(phys, bytes(octets), (0, "test"))
    walked = list(tree.walk())
    expected = [(0, value) for _, value in walked[:5]]
    for leaf, phys in enumerate(leaves):
        expected += runs_of(kernel, phys, BASE | leaf * BITS)
    assert walked == expected
    parts = list(tree.walk_arrays())
    assert [count for counts, _ in parts for count in counts.tolist()] == [n for n, _ in expected]
    assert [value for _, values in parts for value in values.tolist()] == [v for _, v in expected]
    assert all(counts.dtype == np.int64 and values.dtype == np.uint64 for counts, values in parts)


@pytest.mark.parametrize("at", [0, 1, 37, 92, 93, 99])
@pytest.mark.parametrize("what", ["nowhere", "unaligned", "shared", "table"])
def test_an_odd_leaf_among_many_has_its_turn(what: str, at: int) -> None:
    """All before it is told; then it is read as the bytes are, or the walk dies of it."""
    kernel, tree, leaves = tree_of(100)
    before = list(tree.walk())
    table = before[4][1]
    pointer = {"nowhere": 1 << 44, "unaligned": leaves[50] + 8, "shared": leaves[50]}.get(
        what, table
    )
    kernel.ram.write_u64(table + 8 * at, pointer, (0, "fault"))
    tree = KhoRadixTree(kernel, tree.root)
    steps: list[tuple[int, int]] = []
    if what == "nowhere":
        with pytest.raises(KernelPanic):
            steps.extend(tree.walk())
        assert steps == [*before[: 5 + 2 * at], (0, pointer)]
        return
    expected = [*before[: 5 + 2 * at], *runs_of(kernel, pointer, BASE | at * BITS)]
    assert list(tree.walk()) == expected + before[7 + 2 * at :]


def test_leaves_that_repeat_each_other_end_in_a_panic() -> None:
    """Every leaf again and again: the walk counts them one by one and gives up."""
    kernel, tree, leaves = tree_of(100)
    kernel.ram.write(leaves[0], b"\x55" * 4096, (0, "fault"))
    table = next(tree.walk())[1]
    for _, value in list(tree.walk())[1:5]:
        table = value
    for at in range(512):
        kernel.ram.write_u64(table + 8 * at, leaves[0], (0, "fault"))
    with pytest.raises(KernelPanic, match="runs in circles"):
        list(tree.walk())


def test_bits_are_set_beside_those_that_are() -> None:
    """Repeats and neighbours in one byte; what was set stays."""
    rng = np.random.default_rng(2)
    octets, bits = rng.integers(0, 50, 300), rng.integers(0, 8, 300)
    data = rng.integers(0, 256, 60, dtype=np.uint8)
    expected = data.tolist()
    for octet, bit in zip(octets.tolist(), bits.tolist(), strict=True):
        expected[octet] |= 1 << bit
    set_bits(data, octets, bits)
    assert data.tolist() == expected
    set_bits(data, octets[:0], bits[:0])
    assert data.tolist() == expected
