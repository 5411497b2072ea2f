"""Exercise 1: keys for every page size."""

from __future__ import annotations

import pytest
from keys import block_of, key_of

from khosim import Machine

# Worked out by hand, from the rule in the exercise.
BY_HAND = [
    (0x1000, 0, 4096, 0x10000000000001),
    (0x408000, 3, 4096, 0x2000000000081),
    (0x40000000, 9, 4096, 0x80000000200),
    (0x4000, 0, 16384, 0x4000000000001),
    (0x2000000, 11, 16384, 0x8000000001),
    (0x30000, 0, 65536, 0x1000000000003),
]


@pytest.mark.parametrize(("phys", "order", "page_size", "key"), BY_HAND)
def test_blocks_have_their_keys(phys: int, order: int, page_size: int, key: int) -> None:
    """Keys worked out by hand."""
    assert key_of(phys, order, page_size) == key


@pytest.mark.parametrize(("phys", "order", "page_size", "key"), BY_HAND)
def test_keys_have_their_blocks(phys: int, order: int, page_size: int, key: int) -> None:
    """And back."""
    assert block_of(key, page_size) == (phys, order)


@pytest.mark.parametrize(("arch", "page_size"), [("x86_64", 4096), ("arm64", 16384)])
def test_the_kernel_agrees(arch: str, page_size: int) -> None:
    """The bit of a key is set in the leaf that a kernel wrote."""
    machine = Machine("256M", arch=arch, page_size=page_size)
    kernel = machine.boot(cmdline="kho=on")
    block = kernel.alloc_folio(order=2)
    kernel.kho_preserve_folio(block)
    key = key_of(block.phys, 2, page_size)
    leaf_bits = 8 * page_size
    leaf = kernel.kho_out.tree.root
    levels = {4096: 5, 16384: 4}[page_size]
    per_table = page_size // 8
    for level in range(levels, 0, -1):
        entry = key // (leaf_bits * per_table ** (level - 1)) % per_table
        leaf = machine.hardware.ram.read_u64(leaf + 8 * entry)
        assert leaf, f"no table at level {level - 1}"
    byte = machine.hardware.ram.read(leaf + key % leaf_bits // 8, 1)[0]
    assert byte >> key % 8 & 1
