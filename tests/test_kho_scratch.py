"""Scratch: what kho_scratch= may say, how large the areas get, where they go, and the extension."""

from __future__ import annotations

import errno

import pytest

from khosim import Machine
from khosim.kernel.arch import find_arch
from khosim.kernel.kho_radix import KhoRadixTree
from khosim.kernel.kho_radix_key import kho_encode_radix_key
from khosim.kernel.kho_scratch import (
    ScratchSizes,
    kho_extend_scratch,
    kho_reserve_scratch,
    read_scratch_array,
)
from khosim.kernel.memblock import MEMBLOCK_KHO_SCRATCH, MEMBLOCK_RSRV_HUGETLB, Memblock
from khosim.kernel.release import find_release
from khosim.machine.ram import Ram, Writer

X86 = find_arch("x86_64", 4096)
ARM_16K = find_arch("arm64", 16384)
RELEASE = find_release("7.3")
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
U64 = 1 << 64
BY = Writer(0, "test")
DISABLED = "KHO: Failed to reserve scratch area, disabling kexec handover"


# -- kho_scratch= ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "percent"),
    [("200%", 200), ("0%", 0), ("+50%", 50), ("0050%", 50), ("1%", 1), ("50\n%", 50)],
)
def test_scale(text, percent):
    """A decimal number of up to ten characters, a plus sign and a newline allowed."""
    sizes, said = ScratchSizes(), []
    assert sizes.parse(text, said.append) == 0
    assert sizes.scale_percent == percent
    assert said == [f"KHO: scratch scale is {percent}%"]


def test_scale_is_printed_as_a_signed_number():
    """An unsigned int, but %d in the message."""
    sizes, said = ScratchSizes(), []
    assert sizes.parse("4294967295%", said.append) == 0
    assert sizes.scale_percent == 4294967295
    assert said == ["KHO: scratch scale is -1%"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, errno.EINVAL),
        ("", errno.EINVAL),
        ("%", errno.EINVAL),
        ("+%", errno.EINVAL),
        ("-5%", errno.EINVAL),
        ("0x10%", errno.EINVAL),
        ("5 %", errno.EINVAL),
        ("5%%", errno.EINVAL),
        ("1K%", errno.EINVAL),
        ("\u0665%", errno.EINVAL),
        ("4294967296%", errno.ERANGE),
        ("9999999999%", errno.ERANGE),
        ("00000000001%", errno.EINVAL),  # eleven digits, whatever they say
        ("64M", errno.EINVAL),
        ("64M,64M", errno.EINVAL),
        ("64M,64M,", errno.EINVAL),
        (",64M,64M", errno.EINVAL),
        ("64M,,64M", errno.EINVAL),
        ("64M;64M;64M", errno.EINVAL),
        ("64M,64M,64M,64M", errno.EINVAL),
        ("64M,64M,64M ", errno.EINVAL),
        ("64M,64M,64MB", errno.EINVAL),
        ("M,1,1", errno.EINVAL),
        ("0,0,0", errno.EINVAL),
        ("8E,4E,4E", errno.EINVAL),  # the sum wraps to 0
    ],
)
def test_malformed_values_change_nothing(text, error):
    """Every rejection with its errno; the default scale stays."""
    sizes, said = ScratchSizes(), []
    assert sizes.parse(text, said.append) == -error
    assert sizes.scale_percent == 200
    assert (sizes.lowmem_bytes, sizes.global_bytes, sizes.pernode_bytes) == (0, 0, 0)
    assert said == []


@pytest.mark.parametrize(
    ("text", "sizes", "mib"),
    [
        ("64M,128M,32M", (64 * MIB, 128 * MIB, 32 * MIB), (64, 128, 32)),
        ("1,0,0", (1, 0, 0), (0, 0, 0)),
        ("0x100000,010,1G", (MIB, 8, GIB), (1, 0, 1024)),
        ("1p,1E,1k", (1 << 50, 1 << 60, KIB), (1 << 30, 1 << 40, 0)),
    ],
)
def test_three_sizes(text, sizes, mib):
    """Lowmem, global and per-node, each as memparse reads it; the scale goes."""
    parsed, said = ScratchSizes(), []
    assert parsed.parse(text, said.append) == 0
    assert (parsed.lowmem_bytes, parsed.global_bytes, parsed.pernode_bytes) == sizes
    assert parsed.scale_percent == 0
    assert said == [
        "KHO: scratch areas: lowmem: {}MiB global: {}MiB pernode: {}MiB".format(*mib)
    ]


def test_a_scale_after_sizes_wins():
    """Unless it is 0%, which leaves the sizes in force."""
    sizes = ScratchSizes()
    sizes.parse("64M,128M,32M", lambda line: None)
    sizes.parse("0%", lambda line: None)
    assert (sizes.scale_percent, sizes.lowmem_bytes) == (0, 64 * MIB)
    sizes.parse("10%", lambda line: None)
    assert sizes.scale_percent == 10


# -- sizes ----------------------------------------------------------------------------------------


def a_memblock(*memory, page_size=4096):
    """memblock with (start, end, nid) of memory."""
    memblock = Memblock(page_size=page_size)
    memblock.memblock_allow_resize()
    for start, end, nid in memory:
        memblock.memblock_add(start, end - start)
        memblock.memblock_set_node(start, end - start, nid)
    return memblock


def test_default_sizes_by_hand():
    """Twice what boot took below 4 GiB, the rest of twice all of it, and twice each node's own."""
    memblock = a_memblock((0, 2 * GIB, 0), (4 * GIB, 6 * GIB, 1))
    memblock.memblock_reserve_kern(16 * MIB, 10 * MIB)
    memblock.memblock_set_node(16 * MIB, 10 * MIB, 0, True)
    memblock.memblock_reserve_kern(5 * GIB, 3 * MIB)
    memblock.memblock_set_node(5 * GIB, 3 * MIB, 1, True)
    memblock.memblock_reserve(64 * MIB, 100 * MIB)  # the firmware's: does not count
    sizes = ScratchSizes()
    sizes.update(memblock, X86, RELEASE)
    assert sizes.lowmem_bytes == 20 * MIB
    assert sizes.global_bytes == 8 * MIB  # 26 - 20, rounded up to 4 MiB
    assert sizes.node_bytes(memblock, 0, X86, RELEASE) == 20 * MIB
    assert sizes.node_bytes(memblock, 1, X86, RELEASE) == 8 * MIB
    assert sizes.node_bytes(memblock, 2, X86, RELEASE) == 0


def test_an_allocation_without_a_node_counts_for_no_node():
    """It is in the lowmem or global size only."""
    memblock = a_memblock((0, GIB, 0))
    memblock.memblock_reserve_kern(16 * MIB, 10 * MIB)
    sizes = ScratchSizes()
    sizes.update(memblock, X86, RELEASE)
    assert sizes.lowmem_bytes == 20 * MIB
    assert sizes.node_bytes(memblock, 0, X86, RELEASE) == 0


def test_the_scale_divides_last():
    """size * percent / 100, in 64 bits, cut, and only then rounded up."""
    memblock = a_memblock((0, GIB, 0))
    memblock.memblock_reserve_kern(16 * MIB, 4 * MIB + 1)
    sizes = ScratchSizes()
    sizes.parse("100%", lambda line: None)
    sizes.update(memblock, X86, RELEASE)
    assert sizes.lowmem_bytes == 8 * MIB
    sizes = ScratchSizes()
    sizes.parse("99%", lambda line: None)
    sizes.update(memblock, X86, RELEASE)
    assert sizes.lowmem_bytes == 4 * MIB


def test_the_scale_wraps_at_64_bits():
    """A product beyond 2**64 loses its top: a huge scale can mean a small area."""
    memblock = a_memblock((0, GIB, 0))
    memblock.memblock_reserve_kern(512 * MIB, 512 * MIB)
    sizes = ScratchSizes()
    assert sizes.parse("4294967295%", lambda line: None) == 0
    product = 512 * MIB * 4294967295
    assert product < U64  # half a GiB is not enough to wrap ...
    sizes.update(memblock, X86, RELEASE)
    assert sizes.lowmem_bytes == -(-(product // 100) // (4 * MIB)) * 4 * MIB
    memblock = a_memblock((0, 16 * GIB, 0))
    memblock.memblock_reserve_kern(4 * GIB, 8 * GIB)
    sizes.scale_percent = 4294967295
    sizes.lowmem_bytes = 0
    sizes.update(memblock, X86, RELEASE)
    assert sizes.lowmem_bytes == 0
    everything = 8 * GIB * 4294967295 - U64  # ... 8 GiB wrap once
    assert 0 < everything < U64
    assert sizes.global_bytes == -(-(everything // 100) // (4 * MIB)) * 4 * MIB


def test_boot_time_huge_pages_do_not_count():
    """They never come from scratch, so that they need no room in the next one."""
    memblock = a_memblock((0, 8 * GIB, 0))
    memblock.memblock_reserve_kern(16 * MIB, 10 * MIB)
    assert memblock.memblock_alloc_hugetlb(GIB, 0, False, lambda phys, size: False)
    assert any(flags & MEMBLOCK_RSRV_HUGETLB for flags in memblock.reserved.flags)
    sizes = ScratchSizes()
    sizes.update(memblock, X86, RELEASE)
    assert (sizes.lowmem_bytes, sizes.global_bytes) == (20 * MIB, 0)
    assert sizes.node_bytes(memblock, 0, X86, RELEASE) == 0
    counted = RELEASE.evolve(scratch_excludes_hugetlb=False)
    sizes = ScratchSizes()
    sizes.update(memblock, X86, counted)
    assert sizes.global_bytes == 2 * GIB


@pytest.mark.parametrize(("arch", "align"), [(X86, 4 * MIB), (ARM_16K, 32 * MIB)])
def test_fixed_sizes_are_rounded_up_too(arch, align):
    """To the largest block of the buddy allocator; 0 stays 0."""
    sizes = ScratchSizes()
    sizes.parse(f"1,{align},{align + 1}", lambda line: None)
    memblock = a_memblock((0, GIB, 0), page_size=arch.page_size)
    sizes.update(memblock, arch, RELEASE)
    assert (sizes.lowmem_bytes, sizes.global_bytes) == (align, align)
    assert sizes.node_bytes(memblock, 0, arch, RELEASE) == 2 * align
    sizes = ScratchSizes()
    sizes.parse("0,1,0", lambda line: None)
    sizes.update(memblock, arch, RELEASE)
    assert (sizes.lowmem_bytes, sizes.global_bytes) == (0, align)
    assert sizes.node_bytes(memblock, 0, arch, RELEASE) == 0


# -- places ---------------------------------------------------------------------------------------


OLDER = RELEASE.evolve(
    scratch_alignment="pageblock",
    scratch_rounds_first=True,
    scratch_explicit_rounded=False,
    scratch_excludes_hugetlb=False,
)
"""How 6.16 to 7.1 size scratch."""


def test_older_releases_take_off_the_rounded_size():
    """Pageblocks of 2 MiB, and global is what is left of twice all after lowmem was rounded."""
    memblock = a_memblock((0, 2 * GIB, 0), (4 * GIB, 6 * GIB, 0))
    memblock.memblock_reserve_kern(16 * MIB, 10 * MIB + 4 * KIB)
    memblock.memblock_reserve_kern(5 * GIB, 3 * MIB - 4 * KIB)
    sizes = ScratchSizes()
    sizes.update(memblock, X86, OLDER)
    # Twice: 20 MiB + 8 KiB in low memory, 26 MiB in all.
    assert (sizes.lowmem_bytes, sizes.global_bytes) == (22 * MIB, 4 * MIB)
    newer = ScratchSizes()
    newer.update(memblock, X86, RELEASE)
    assert (newer.lowmem_bytes, newer.global_bytes) == (24 * MIB, 8 * MIB)


def test_older_releases_may_take_off_too_much():
    """Less than nothing is left for global: rounding it up wraps to 0 again."""
    memblock = a_memblock((0, 2 * GIB, 0))
    memblock.memblock_reserve_kern(16 * MIB, 10 * MIB + 4 * KIB)
    sizes = ScratchSizes()
    sizes.update(memblock, X86, OLDER)
    assert (sizes.lowmem_bytes, sizes.global_bytes) == (22 * MIB, 0)


def test_older_releases_round_no_explicit_size_but_the_nodes():
    """kho_scratch=1M,3M,1M: lowmem and global as they are, a node's to a whole pageblock."""
    memblock = a_memblock((0, GIB, 0))
    sizes = ScratchSizes()
    sizes.parse("1M,3M,1M", lambda line: None)
    sizes.update(memblock, X86, OLDER)
    assert (sizes.lowmem_bytes, sizes.global_bytes) == (MIB, 3 * MIB)
    assert sizes.node_bytes(memblock, 0, X86, OLDER) == 2 * MIB
    ram = Ram(GIB, page_size=4096)
    array, count, done = kho_reserve_scratch(
        memblock, ram, X86, OLDER, sizes, [0], BY, lambda line: None
    )
    assert done
    areas = read_scratch_array(ram.read(array, 16 * count))
    assert areas == [(GIB - 2 * MIB, MIB), (GIB - 6 * MIB, 3 * MIB), (GIB - 8 * MIB, 2 * MIB)]


def reserve(memblock, text, nodes, ram_bytes=64 * MIB):
    """kho_reserve_scratch with kho_scratch=text; areas, messages, success, array address."""
    sizes, said = ScratchSizes(), []
    assert sizes.parse(text, lambda line: None) == 0
    ram = Ram(ram_bytes)
    array, count, success = kho_reserve_scratch(
        memblock, ram, X86, RELEASE, sizes, nodes, BY, said.append
    )
    areas = read_scratch_array(ram.read(array, count * 16)) if array else []
    return areas, said, success, array


def test_areas_by_hand_on_one_node():
    """The array takes the top page, then the areas stack up below it, aligned to 4 MiB."""
    memblock = a_memblock((MIB, 64 * MIB, 0))
    areas, said, success, array = reserve(memblock, "8M,12M,5M", [0])
    assert success
    assert said == []
    assert array == 64 * MIB - 4096
    assert areas == [
        (52 * MIB, 8 * MIB),  # the last 4 MiB hold the array
        (40 * MIB, 12 * MIB),
        (32 * MIB, 8 * MIB),
    ]
    reserved = list(zip(memblock.reserved.base, memblock.reserved.end, strict=True))
    assert reserved[0][0] == 32 * MIB
    assert memblock.memblock_reserved_size() == 28 * MIB + 48


def test_lowmem_is_below_4_gib_and_nodes_have_their_own():
    """The global area goes to the very top, each node's area to its own memory."""
    memblock = a_memblock((MIB, 3 * GIB, 0), (4 * GIB, 5 * GIB, 1))
    sizes = ScratchSizes()
    sizes.parse("64M,64M,64M", lambda line: None)

    class Recorder:
        def __init__(self):
            self.written = {}

        def zero(self, phys, size, by):
            self.written = {phys: bytes(size)}

        def write(self, phys, data, by):
            self.written[phys] = data

    ram = Recorder()
    array, count, success = kho_reserve_scratch(
        memblock, ram, X86, RELEASE, sizes, [0, 1], BY, lambda line: None
    )
    assert success
    assert count == 4
    assert array == 5 * GIB - 4096
    areas = [read_scratch_array(ram.written[array + i * 16])[0] for i in range(4)]
    assert areas == [
        (3 * GIB - 64 * MIB, 64 * MIB),
        (5 * GIB - 68 * MIB, 64 * MIB),
        (3 * GIB - 128 * MIB, 64 * MIB),
        (5 * GIB - 132 * MIB, 64 * MIB),
    ]


def test_an_area_of_nothing_has_an_address():
    """memblock finds a place for 0 bytes, here at the very end of memory; the entry is kept."""
    memblock = a_memblock((MIB, 64 * MIB, 0))
    areas, _, success, _ = reserve(memblock, "8M,0,4M", [0])
    assert success
    assert [size for _, size in areas] == [8 * MIB, 0, 4 * MIB]
    assert areas[1][0] == 64 * MIB


@pytest.mark.parametrize(
    ("text", "what"),
    [("1G,4M,4M", "lowmem"), ("4M,1G,4M", "global"), ("4M,4M,1G", "nid 0"), ("0,0,1G", "nid 0")],
)
def test_what_does_not_fit_is_said_and_undone(text, what):
    """The failing area by name, everything given back, KHO off."""
    memblock = a_memblock((MIB, 64 * MIB, 0))
    areas, said, success, array = reserve(memblock, text, [0])
    assert not success
    assert said == [f"KHO: Failed to reserve {what} scratch buffer", DISABLED]
    assert memblock.memblock_reserved_size() == 0
    # The kernel's pointer and counter stay, at memory that is free now.
    assert array == 64 * MIB - 4096
    assert len(areas) == 3


def test_a_node_may_be_too_small():
    """Its area comes from no other node."""
    memblock = a_memblock((MIB, 64 * MIB, 0), (64 * MIB, 72 * MIB, 7))
    _, said, success, _ = reserve(memblock, "4M,4M,16M", [0, 7], 128 * MIB)
    assert not success
    assert said == ["KHO: Failed to reserve nid 7 scratch buffer", DISABLED]
    assert memblock.memblock_reserved_size() == 0


def test_no_room_for_the_array():
    """48 bytes are not to be had: nothing is reserved, the pointer is NULL, the counter is not."""
    memblock = a_memblock((MIB, 64 * MIB, 0))
    memblock.memblock_reserve(MIB, 63 * MIB)
    sizes, said = ScratchSizes(), []
    sizes.parse("4M,4M,4M", lambda line: None)
    array, count, success = kho_reserve_scratch(
        memblock, Ram(64 * MIB), X86, RELEASE, sizes, [0], BY, said.append
    )
    assert (array, count, success) == (0, 3, False)
    assert said == ["KHO: Failed to reserve scratch array", DISABLED]


def test_a_partial_entry_is_no_area():
    """read_scratch_array takes whole pairs only."""
    assert read_scratch_array(bytes(16) + b"\1" * 15) == [(0, 0)]
    assert read_scratch_array(b"") == []


# -- whole boots ----------------------------------------------------------------------------------


def test_a_failure_turns_kho_off_for_good():
    """No debugfs, no outgoing FDT, no CMA, and boot goes on."""
    machine = Machine("64M")
    kernel = machine.boot(cmdline="kho=on kho_scratch=1G,4M,4M")
    assert "KHO: Failed to reserve lowmem scratch buffer" in kernel.messages
    assert not kernel.kho_enable
    assert kernel.scratch_areas() == []
    assert kernel.debugfs.files() == []
    assert sum(zone.cma_pages for zone in kernel.pages.zones) == 0


def test_a_failure_leaves_traces_in_late_memory():
    """The freed array is still asked for the type of pageblocks initialised late in boot."""
    machine = Machine("1G")
    kernel = machine.boot(cmdline="kho=on kho_scratch=64M,16G,4M")
    assert "KHO: Failed to reserve global scratch buffer" in kernel.messages
    stale, _ = kernel.stale_scratch
    addr, size = read_scratch_array(kernel.ram.read(stale, 16))[0]
    assert size == 64 * MIB
    assert kernel.page(addr >> 12).migratetype == 2  # MIGRATE_CMA
    assert kernel.page((addr + size) >> 12).migratetype == 1
    assert sum(zone.cma_pages for zone in kernel.pages.zones) == 0


def test_memoryless_nodes_get_no_area():
    """N_MEMORY only: two nodes with memory, four areas, though node 1 is online."""
    machine = Machine("512M", nodes=["256M", "256M"], memoryless=[5])
    kernel = machine.boot(cmdline="kho=on")
    assert len(kernel.scratch_areas()) == 4
    assert kernel.memory_nodes() == [0, 1]


def test_a_kdump_kernel_reserves_nothing():
    """It says so, and KHO is off whatever the command line wants."""
    machine = Machine("64M")
    kernel = machine.boot(cmdline="kho=on elfcorehdr=0x1000000")
    assert "KHO: disabled in the kdump kernel" in kernel.messages
    assert not kernel.kho_enable
    assert kernel.scratch_areas() == []


def test_overlap_is_of_half_open_ranges():
    """A neighbour does not overlap, one byte does, and an empty range does inside only."""
    kernel = Machine("64M").boot(cmdline="kho=on kho_scratch=4M,0,0")
    (addr, size), *_ = kernel.scratch_areas()
    overlap = kernel.kho_scratch_overlap
    assert not overlap(addr - 4096, 4096)
    assert overlap(addr - 4096, 4097)
    assert overlap(addr, 1)
    assert overlap(addr + size - 1, 1)
    assert not overlap(addr + size, 4096)
    assert overlap(addr + 1, 0)
    assert not overlap(addr, 0)
    assert overlap(0, 64 * MIB)


# -- kho_extend_scratch ---------------------------------------------------------------------------


class Nodes:
    """Where trees live in these tests: pages from ``at`` upwards, ``left`` of them."""

    def __init__(self, ram, at, left=1 << 20):
        self.ram, self.arch, self.at, self.left = ram, X86, at, left
        self.freed: list[int] = []

    def kho_radix_alloc_node(self):
        if not self.left:
            return 0
        self.left -= 1
        self.at += 4096
        self.ram.zero(self.at - 4096, 4096, BY)
        return self.at - 4096

    def kho_radix_alloc_nodes(self, nr_nodes):
        return [phys for _ in range(nr_nodes) if (phys := self.kho_radix_alloc_node())]

    def kho_radix_free_node(self, phys):
        self.freed.append(phys)

    def virt(self, phys, len_bytes):
        return phys

    def warn(self, message):
        raise AssertionError(message)

    def by(self, symbol):
        return BY


def extended(blocks, *, end=16 * GIB, tree_at=0, holes=(), left=1 << 20, scratch=()):
    """Scratch-flagged memory after the extension, in GiB, with ``(phys, order)`` blocks preserved.

    The predecessor's tables lie from ``tree_at`` on, those of the extension from 8 MiB on.
    """
    ram = Ram(end)
    tree = KhoRadixTree(Nodes(ram, tree_at or 4096))
    assert tree.init_tree() == 0
    for phys, order in blocks:
        assert tree.add_key(kho_encode_radix_key(phys, order, 12)) == 0
    memblock = a_memblock((0, end, 0))
    for start, stop in holes:
        memblock.memblock_remove(start, stop - start)
    for start, stop in scratch:
        memblock.memblock_mark_kho_scratch(start, stop - start)
    said: list[str] = []
    busy = Nodes(ram, 8 * MIB, left)
    kho_extend_scratch(memblock, busy, tree, said.append)
    assert len(busy.freed) == (busy.at - 8 * MIB) // 4096  # the busy tree is given back
    marked = [
        (start / GIB, stop / GIB)
        for start, stop, flags in zip(
            memblock.memory.base, memblock.memory.end, memblock.memory.flags, strict=True
        )
        if flags & MEMBLOCK_KHO_SCRATCH
    ]
    return marked, said


def test_without_preserved_memory_only_the_tables_are_in_the_way():
    """The tree's own pages make their GiB busy; all else becomes scratch."""
    assert extended([]) == ([(1, 16)], [])
    assert extended([], tree_at=5 * GIB) == ([(0, 5), (6, 16)], [])


def test_one_page_makes_a_gib_busy():
    """Every block between busy ones is marked, and what follows the last."""
    assert extended([(3 * GIB + 4096, 0), (9 * GIB, 0)])[0] == [(1, 3), (4, 9), (10, 16)]
    assert extended([(16 * GIB - 4096, 0)])[0] == [(1, 15)]


def test_a_block_of_a_gib_and_more():
    """A block of exactly 1 GiB is one busy block; of 4 GiB, four."""
    assert extended([(2 * GIB, 18)])[0] == [(1, 2), (3, 16)]
    assert extended([(4 * GIB, 20)])[0] == [(1, 4), (8, 16)]


def test_neighbouring_keys_are_taken_as_one_run():
    """512 MiB blocks side by side: the same busy blocks as one by one."""
    blocks = [(2 * GIB + i * 512 * MIB, 17) for i in range(5)]
    assert extended(blocks)[0] == [(1, 2), (5, 16)]


def test_holes_are_marked_over():
    """Flags lie on memory only; a hole in a free block changes nothing."""
    marked, _ = extended([(9 * GIB, 0)], holes=[(3 * GIB, 4 * GIB)])
    assert marked == [(1, 3), (4, 9), (10, 16)]


def test_everything_busy():
    """Nothing is marked, and nothing is said."""
    assert extended([(i * GIB, 0) for i in range(16)]) == ([], [])


def test_the_end_of_memory_need_not_be_a_whole_gib():
    """The rest after the last busy block counts to the last byte of memory."""
    assert extended([(GIB, 0)], end=2 * GIB + 512 * MIB)[0] == [(2, 2.5)]
    assert extended([(2 * GIB, 0)], end=2 * GIB + 512 * MIB)[0] == [(1, 2)]


def test_a_tree_in_scratch_is_overwritten_while_it_is_read():
    """Of a tree where the busy one comes to lie, the walk finds what is left when it gets there.

    The second page of the busy tree is taken when the root of the other is told, before a look at
    what it holds. Elsewhere in scratch nothing is lost.
    """
    block, scratch = [(9 * GIB, 0)], [(0, 64 * MIB)]
    lost, _ = extended(block, tree_at=8 * MIB + 4096, scratch=scratch)
    assert lost == [(0, 1 / 16), (1, 16)]
    kept, _ = extended(block, tree_at=10 * MIB, scratch=scratch)
    assert kept == [(0, 1 / 16), (1, 9), (10, 16)]


@pytest.mark.parametrize("left", [0, 1, 3])
def test_no_memory_for_the_busy_tree(left):
    """Reported, and boot goes on without an extension."""
    marked, said = extended([(9 * GIB, 0)], left=left)
    assert marked == []
    assert said == ["KHO: Failed to extend scratch: -ENOMEM"]


def test_no_memory_after_some_blocks():
    """Tables for the first busy block, none for one far away: what was not marked stays so."""
    marked, said = extended([(9 * GIB, 0), (60 << 40, 0)], end=61 << 40, left=6)
    assert said == ["KHO: Failed to extend scratch: -ENOMEM"]
    assert marked == []
