"""memblock's arrays growing, and what happens when they cannot."""

from __future__ import annotations

from errno import ENOMEM
from typing import Any

import pytest

from khosim.errors import KernelPanic
from khosim.kernel.memblock import (
    MEMBLOCK_RSRV_KERN,
    NUMA_NO_NODE,
    Memblock,
)

K = 1 << 10
M = 1 << 20
G = 1 << 30
PAGE = 4096


def machine(**options: Any) -> Memblock:
    """1 GiB of memory on node 0 but for its first page."""
    memblock = Memblock(**options)
    memblock.memblock_add_node(PAGE, G - PAGE, 0, 0)
    return memblock


def test_full_array_panics_before_resizing_is_allowed() -> None:
    """The 129th region kills a kernel that may not yet grow its arrays."""
    said: list[str] = []
    memblock = machine(on_message=said.append, generation=3)
    for k in range(128):
        assert memblock.memblock_reserve(M + 2 * k * PAGE, PAGE) == 0
    assert memblock.memblock_reserve(M, PAGE) == 0  # nothing new: no room needed
    with pytest.raises(KernelPanic) as caught:
        memblock.memblock_reserve(4 * M, PAGE)
    assert caught.value.generation == 3
    assert said == ["memblock: cannot resize reserved array"]
    with pytest.raises(KernelPanic, match="cannot resize reserved"):
        memblock.memblock_phys_free(M, PAGE)  # isolating wants room for two


def test_doubling_takes_memory_and_returns_the_old_array() -> None:
    """256 regions of 24 bytes take two pages at the top, 512 three; the two pages come back."""
    said: list[str] = []
    memblock = machine(on_message=said.append, debug=True)
    memblock.memblock_allow_resize()
    for k in range(129):
        memblock.memblock_reserve(M + 2 * k * PAGE, PAGE)
    first = G - 2 * PAGE
    assert memblock.reserved.max == 256
    assert memblock.reserved.rows()[-1] == (first, 2 * PAGE, MEMBLOCK_RSRV_KERN, NUMA_NO_NODE)
    for k in range(129, 257):
        memblock.memblock_reserve(M + 2 * k * PAGE, PAGE)
    second = first - 3 * PAGE
    assert memblock.reserved.max == 512
    assert memblock.reserved.rows()[-1][:2] == (second, 3 * PAGE)
    assert memblock.allocations == [(first, 2 * PAGE), (second, 3 * PAGE)]
    assert memblock.memblock_discard() == [(second, 3 * PAGE)]
    assert said == [
        f"memblock: reserved is doubled to 256 at [0x{first:016x}-0x{first + 6143:016x}]",
        f"memblock: reserved is doubled to 512 at [0x{second:016x}-0x{second + 12287:016x}]",
    ]


def test_doubling_avoids_the_area_about_to_be_reserved() -> None:
    """Above the new area if there is room, else below it."""
    memblock = Memblock(reserved_max=3)
    memblock.memblock_add_node(0, 16 * PAGE, 0, 0)
    memblock.memblock_allow_resize()
    for k in (2, 4, 6):
        memblock.memblock_reserve(k * PAGE, PAGE)
    assert memblock.memblock_reserve(8 * PAGE, 7 * PAGE) == 0
    assert memblock.reserved.array_phys == 15 * PAGE
    memblock = Memblock(reserved_max=3)
    memblock.memblock_add_node(0, 16 * PAGE, 0, 0)
    memblock.memblock_allow_resize()
    for k in (2, 4, 6):
        memblock.memblock_reserve(k * PAGE, PAGE)
    assert memblock.memblock_reserve(8 * PAGE, 8 * PAGE) == 0
    assert memblock.reserved.array_phys == 7 * PAGE


def test_failing_to_double_is_enomem() -> None:
    """Without a free page the call fails, says so, and changes nothing."""
    said: list[str] = []
    memblock = Memblock(reserved_max=3, on_message=said.append)
    memblock.memblock_add_node(0, 8 * PAGE, 0, 0)
    memblock.memblock_allow_resize()
    for start, size in ((1, 2), (4, 2), (7, 1)):
        memblock.memblock_reserve(start * PAGE, size * PAGE - 64)
    memblock.memblock_set_current_limit(3 * PAGE)
    before = memblock.reserved.rows()
    assert memblock.memblock_reserve(3 * PAGE, 2 * K) == -ENOMEM
    assert memblock.memblock_phys_free(PAGE, 64) == -ENOMEM
    assert memblock.memblock_reserved_mark_kern(PAGE, 64) == -ENOMEM
    assert memblock.memblock_set_node(PAGE, 64, 1, reserved=True) == -ENOMEM
    assert memblock.reserved.rows() == before
    line = "memblock: Failed to double reserved array from 3 to 6 entries !"
    assert said == [line] * 4


def test_memory_array_doubles_too() -> None:
    """Its new array is a reservation as well."""
    memblock = Memblock(memory_max=3)
    memblock.memblock_allow_resize()
    for k in range(4):
        memblock.memblock_add(2 * k * M, M)
    assert memblock.memory.cnt == 4
    assert memblock.memory.max == 6
    assert memblock.reserved.rows() == [(5 * M - PAGE, PAGE, MEMBLOCK_RSRV_KERN, NUMA_NO_NODE)]
    assert memblock.memblock_discard() == [(5 * M - PAGE, PAGE)]


def test_memory_array_may_land_in_what_is_removed() -> None:
    """Only the reserved array avoids the range of the call that grows it."""
    memblock = Memblock(memory_max=3)
    memblock.memblock_allow_resize()
    memblock.memblock_add_node(0, M, 0, 0)
    memblock.memblock_add_node(M, M, 1, 0)
    assert memblock.memblock_remove(M + PAGE, M - PAGE) == 0
    assert memblock.memory.array_phys == 2 * M - PAGE
    assert memblock.memblock_is_reserved(2 * M - PAGE)
    assert not memblock.memblock_is_memory(2 * M - PAGE)


def test_nested_doubling_takes_the_same_place() -> None:
    """Freeing the old memory array may double the reserved array into the new memory array."""
    said: list[str] = []
    memblock = Memblock(memory_max=3, reserved_max=4, on_message=said.append)
    memblock.memblock_allow_resize()
    for k in range(4):
        memblock.memblock_add_node(2 * k * M, M, k, 0)
    assert memblock.memory.array_phys == 5 * M - PAGE
    memblock.memblock_reserve(0, M)
    memblock.memblock_reserve(4 * M, PAGE)
    for k in range(4, 7):
        assert memblock.memblock_add_node(2 * k * M, M, k, 0) == 0
    assert memblock.memory.array_phys == memblock.reserved.array_phys == 11 * M - PAGE
    assert len(said) == 1
    assert said[0].endswith("share memory at 0x0000000000aff000 (kernel bug)")
