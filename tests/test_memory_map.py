"""Memory maps from sizes, against what QEMU and the kernel really showed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from khosim.errors import InputError
from khosim.machine.devices import Endpoint, Transfer
from khosim.machine.hardware import Hardware
from khosim.machine.memory_map import RAM, RESERVED, MemoryMap, NodeRange, Region

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40

# BIOS-e820 and SRAT lines of a QEMU pc with 6 GiB in two nodes, last addresses inclusive.
QEMU_6G = [
    (0x0000000000000000, 0x000000000009FBFF, RAM),
    (0x000000000009FC00, 0x000000000009FFFF, RESERVED),
    (0x00000000000F0000, 0x00000000000FFFFF, RESERVED),
    (0x0000000000100000, 0x00000000BFFDFFFF, RAM),
    (0x00000000BFFE0000, 0x00000000BFFFFFFF, RESERVED),
    (0x00000000FFFC0000, 0x00000000FFFFFFFF, RESERVED),
    (0x0000000100000000, 0x00000001BFFFFFFF, RAM),
    (0x000000FD00000000, 0x000000FFFFFFFFFF, RESERVED),
]
QEMU_6G_NODES = [
    (0x00000000, 0x0009FFFF, 0),
    (0x00100000, 0xBFFFFFFF, 0),
    (0x100000000, 0x1BFFFFFFF, 1),
]


def test_pc_as_qemu_lays_it_out() -> None:
    """The low hole, the PCI hole and the nodes are where QEMU puts them."""
    made = MemoryMap.from_size("6G", nodes=2)
    assert [(start, end - 1, kind) for start, end, kind in made.entries] == QEMU_6G
    assert [(start, end - 1, nid) for start, end, nid in made.node_ranges] == QEMU_6G_NODES
    assert made.end_phys == 7 * GIB
    assert made.ram_bytes == 6 * GIB - (0x100000 - 0x9FC00) - 0x20000
    assert made.online_nodes == (0, 1)


@pytest.mark.parametrize(
    ("size", "ends"),
    [
        ("64M", [0x9FC00, 64 * MIB - 0x20000]),
        ("3G", [0x9FC00, 3 * GIB - 0x20000]),
        (3 * GIB + 4096, [0x9FC00, 3 * GIB - 0x20000, 4 * GIB + 4096]),
        ("16T", [0x9FC00, 3 * GIB - 0x20000, 16 * TIB + GIB]),
    ],
)
def test_pci_hole(size: int | str, ends: list[int]) -> None:
    """RAM that does not fit below 3 GiB goes on at 4 GiB."""
    assert [end for _, end in MemoryMap.from_size(size).ram_ranges] == ends


def test_arm64_has_one_piece_of_ram() -> None:
    """RAM of the arm64 machine begins at 1 GiB and has no holes."""
    made = MemoryMap.from_size("2G", arch="arm64", nodes=2)
    assert made.entries == (Region(GIB, 3 * GIB, RAM),)
    assert made.node_ranges == (NodeRange(GIB, 2 * GIB, 0), NodeRange(2 * GIB, 3 * GIB, 1))


def test_one_node_unless_told() -> None:
    """Without NUMA all addresses are node 0's, and those outside are nobody's."""
    made = MemoryMap.from_size("64M")
    assert made.online_nodes == (0,)
    assert [made.nid_of(phys) for phys in (0, 0xA0000, 63 * MIB, 64 * MIB, -1, 1 << 70)] == [
        0, 0, 0, -1, -1, -1,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "nodes", "cuts"),
    [
        ("64M", 2, [32 * MIB]),
        ("64M", 3, [22 * MIB, 42 * MIB]),
        ("16M", 4, [4 * MIB, 8 * MIB, 12 * MIB]),
        ("1G", 3, [384 * MIB, 640 * MIB]),  # 341.3 and 682.7, to the nearest section
        ("2G", ["512M", "1G", 512 * MIB], [512 * MIB, 1536 * MIB]),
    ],
)
def test_node_cuts(size: str, nodes: int | list[int | str], cuts: list[int]) -> None:
    """Nodes are cut at sections where there are enough, else evenly; lists are taken as given."""
    made = MemoryMap.from_size(size, nodes=nodes)
    starts = [node.start for node in made.node_ranges if node.start not in (0, MIB)]
    assert starts == cuts
    assert made.node_ranges[-1].end == made.end_phys + 0x20000


def test_memoryless_nodes() -> None:
    """Memoryless nodes are online, own nothing, and keep their numbers."""
    made = MemoryMap.from_size("8G", nodes=2, memoryless=(0, 2))
    assert made.online_nodes == (0, 1, 2, 3)
    assert made.memoryless_nodes == (0, 2)
    assert {node.nid for node in made.node_ranges} == {1, 3}
    assert made.nid_of(0) == 1
    assert made.nid_of(5 * GIB) == 3


def test_holes_are_punched_out_of_ram() -> None:
    """A hole splits, cuts or swallows RAM, which shrinks by it."""
    whole = MemoryMap.from_size("1G", arch="arm64")
    made = MemoryMap.from_size(
        "1G",
        arch="arm64",
        holes=[(GIB + 64 * MIB, GIB + 128 * MIB), (2 * GIB - MIB, 3 * GIB), (0, GIB + MIB)],
    )
    assert made.ram_ranges == (
        (GIB + MIB, GIB + 64 * MIB),
        (GIB + 128 * MIB, 2 * GIB - MIB),
    )
    assert whole.ram_bytes - made.ram_bytes == 66 * MIB


BAD_SIZES: list[tuple[Any, dict[str, Any], str]] = [
    (0, {}, "RAM size: none at all"),
    ("15M", {}, "at least 16M"),
    ("17T", {}, "above 16T"),
    (1 << 200, {}, "above 16T"),
    (-5, {}, "negative"),
    ("16 G", {}, "not a size"),
    (None, {}, "neither"),
    ((64 << 20) + 1, {}, "4 KiB pages"),
    ("64M", {"arch": "riscv"}, "architecture"),
    ("64M", {"nodes": 0}, "1 to 64"),
    ("64M", {"nodes": 65}, "1 to 64"),
    ("64M", {"nodes": 32}, "a node of"),
    ("64M", {"nodes": "2"}, "neither a number nor a list"),
    ("64M", {"nodes": []}, "1 to 64"),
    ("64M", {"nodes": ["32M", "31M"]}, "not the size of RAM"),
    ("64M", {"nodes": ["64M", "0"]}, "a node of 0"),
    ("64M", {"memoryless": (64,)}, "memoryless"),
    ("64M", {"memoryless": (-1,)}, "memoryless"),
    ("64M", {"nodes": 2, "memoryless": range(63)}, "65 are more than 64"),
    ("64M", {"holes": [(5 * MIB, 4 * MIB)]}, "no range"),
    ("64M", {"holes": [(5 * MIB, 6 * MIB + 1)]}, "cuts a page"),
    ("64M", {"holes": [(GIB, 2 * GIB)]}, "not in RAM"),
    ("64M", {"holes": [(0, GIB)]}, "none at all"),
]


@pytest.mark.parametrize(("size", "options", "cause"), BAD_SIZES)
def test_bad_sizes_are_refused(size: Any, options: dict[str, Any], cause: str) -> None:
    """Machines that cannot be are bad input, and the error says what is wrong."""
    with pytest.raises(InputError, match=cause):
        MemoryMap.from_size(size, **options)


BAD_MAPS: list[tuple[list[tuple[int, int, str]], dict[str, Any], str]] = [
    ([], {}, "none at all"),
    ([(0, GIB, RESERVED)], {}, "none at all"),
    ([(0, 0, RAM)], {}, "empty"),
    ([(GIB, 0, RAM)], {}, "empty"),
    ([(-GIB, GIB, RAM)], {}, "outside 64 bits"),
    ([(0, 1 << 65, RAM)], {}, "outside 64 bits"),
    ([(0, GIB, RAM), (GIB - 1, 2 * GIB, RAM)], {}, "begins before"),
    ([(GIB, 2 * GIB, RAM), (0, GIB, RAM)], {}, "begins before"),
    ([(0, 17 * TIB, RAM)], {}, "above 16T"),
    ([(70 * TIB, 71 * TIB, RAM)], {}, "above 64 TiB"),
    ([(0, GIB, RAM)], {"node_ranges": ((0, GIB, 64),)}, "node"),
    ([(0, GIB, RAM)], {"node_ranges": ((0, GIB, 0), (GIB - 1, 2 * GIB, 1))}, "node range"),
    ([(0, GIB, RAM)], {"online_nodes": (-1,)}, "node"),
    ([(0, GIB, RAM)], {"arch": "arm"}, "architecture"),
]


@pytest.mark.parametrize(("entries", "options", "cause"), BAD_MAPS)
def test_bad_maps_are_refused(
    entries: list[tuple[int, int, str]], options: dict[str, Any], cause: str
) -> None:
    """So are maps that contradict themselves."""
    with pytest.raises(InputError, match=cause):
        MemoryMap(tuple(Region(*entry) for entry in entries), **options)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.integers(16 * MIB // 4096, 16 * TIB // 4096),
    st.integers(1, 64),
    st.sampled_from(["x86_64", "arm64"]),
    st.sets(st.integers(0, 63), max_size=3),
)
def test_every_size_gives_a_sound_map(
    pages: int, nodes: int, arch: str, memoryless: set[int]
) -> None:
    """Whatever the size: all RAM accounted for, each byte of it on a node, each node with RAM."""
    assume(pages * 4096 // nodes >= 8 * MIB)
    assume(nodes + len(memoryless) <= 64)
    made = MemoryMap.from_size(pages * 4096, nodes=nodes, arch=arch, memoryless=memoryless)
    missing = 0 if arch == "arm64" else (0x100000 - 0x9FC00) + 0x20000
    assert made.ram_bytes == pages * 4096 - missing
    for start, end in made.ram_ranges:
        at = start
        while at < end:
            (node,) = [n for n in made.node_ranges if n.start <= at < n.end]
            assert made.nid_of(at) == node.nid not in memoryless
            at = node.end
    sizes = dict.fromkeys((node.nid for node in made.node_ranges), 0)
    for node in made.node_ranges:
        sizes[node.nid] += node.end - node.start
    assert len(sizes) == nodes
    assert (
        max(sizes.values()) - min(sizes.values())
        <= max(256 * MIB, pages * 4096 // nodes // 2) + MIB
    )
    assert set(made.online_nodes) == set(sizes) | memoryless


def test_maps_go_through_json() -> None:
    """A map described as plain values and made again is the same map."""
    made = MemoryMap.from_size("6G", nodes=2, memoryless=(1,))
    assert MemoryMap.from_dict(made.to_dict()) == made
    damaged: list[Any] = [{}, [], None, {**made.to_dict(), "entries": [[1, 2]]}]
    for damage in damaged:
        with pytest.raises(InputError):
            MemoryMap.from_dict(damage)


# The machine around it


def test_hardware_knows_its_ram() -> None:
    """Holes and the end are not RAM; a range across entries that adjoin is."""
    entries = (
        Region(0, 32 * MIB, RAM),
        Region(32 * MIB, 64 * MIB, RAM),
        Region(80 * MIB, 96 * MIB, RAM),
        Region(96 * MIB, 128 * MIB, RESERVED),
    )
    hardware = Hardware(MemoryMap(entries))
    assert hardware.ram.size_bytes == 96 * MIB
    assert hardware.is_ram(0, 64 * MIB)
    assert hardware.is_ram(32 * MIB - 1, 2)
    assert hardware.is_ram(64 * MIB - 1)
    assert hardware.is_ram(96 * MIB - 8, 8)
    for phys, len_bytes in [
        (64 * MIB - 1, 2), (64 * MIB, 1), (64 * MIB, 0), (70 * MIB, 0),
        (80 * MIB - 1, 2), (96 * MIB - 8, 9), (96 * MIB, 1), (-1, 1), (0, -1),
        (1 << 70, 1), (0, 1 << 70),
    ]:  # fmt: skip
        assert not hardware.is_ram(phys, len_bytes), (phys, len_bytes)


def test_hardware_page_sizes() -> None:
    """x86-64 has one page size, arm64 three; node numbers follow the page size."""
    arm = MemoryMap.from_size("256M", arch="arm64", nodes=2)
    for page_size, shift in ((4096, 12), (16384, 14), (65536, 16)):
        hardware = Hardware(arm, page_size)
        assert (hardware.page_shift, hardware.ram.page_size) == (shift, page_size)
        middle = (GIB + 128 * MIB) >> shift
        assert [hardware.nid_of_pfn(pfn) for pfn in (0, middle - 1, middle)] == [-1, 0, 1]
    with pytest.raises(InputError, match="16384 on x86_64"):
        Hardware(MemoryMap.from_size("64M"), 16384)
    with pytest.raises(InputError, match="8192 on arm64"):
        Hardware(arm, 8192)


def test_devices_work_without_a_kernel() -> None:
    """A tick reaches every device, and what it does to RAM and itself can be rolled back."""
    hardware = Hardware(MemoryMap.from_size("64M"), devices=[Endpoint("00:02.0")])
    devices = hardware.devices
    devices.write_config("00:02.0", 4, 4, 2)
    engine = devices.pci.named("0000:00:02.0").engine
    engine.program([Transfer(0x1000, 8, True, 0x0DDC0FFEE0DDF00D)])
    token = hardware.snapshot()
    hardware.tick()
    assert hardware.ram.read_u64(0x1000) == 0x0DDC0FFEE0DDF00D ^ 1 << 32
    assert engine.steps == 1
    hardware.rollback(token)
    hardware.discard(token)
    assert hardware.ram.read(0x1000, 8) == bytes(8)
    assert (engine.steps, devices.events) == (0, [])
