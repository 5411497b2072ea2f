"""E820 tables, huge pages and the crash kernel's region: what the command line does to memory."""

from __future__ import annotations

import struct

import pytest

from khosim import Machine
from khosim.abi.boot_params import parse_boot_params
from khosim.kernel import e820
from khosim.kernel.image import KernelConfig
from khosim.kernel.memblock import MEMBLOCK_RSRV_HUGETLB
from khosim.kernel.release import find_release

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
LIMIT = 254 * MIB
"""The end of RAM in a machine of 256 MiB, in whole pageblocks."""


def boot(cmdline="kho=on", ram="64M", *, arch="x86_64", page_size=4096, **options):
    """A machine and its first kernel; small image and initrd."""
    machine = Machine(ram, arch=arch, page_size=page_size, **options)
    return machine, machine.boot(cmdline=cmdline, kernel_size="4M", initrd="1M")


def reserved(kernel):
    """(start, end, flags) of memblock.reserved."""
    array = kernel.memblock.reserved
    return list(zip(array.base, array.end, array.flags, strict=True))


# -- E820 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "table"),
    [
        ([(0, 10, 1)], [(0, 10, 1)]),
        ([(0, 10, 1), (20, 10, 1)], [(0, 10, 1), (20, 10, 1)]),
        ([(20, 10, 1), (0, 10, 1)], [(0, 10, 1), (20, 10, 1)]),
        ([(0, 10, 1), (10, 10, 1)], [(0, 20, 1)]),
        ([(0, 10, 1), (10, 0, 2), (10, 10, 2)], [(0, 10, 1), (10, 10, 2)]),
        ([(0, 30, 1), (10, 10, 2)], [(0, 10, 1), (10, 10, 2), (20, 10, 1)]),
        ([(10, 10, 2), (0, 15, 1)], [(0, 10, 1), (10, 10, 2)]),
        ([(0, 10, 1), (5, 10, 1)], [(0, 15, 1)]),
        ([(0, 10, 1), ((1 << 64) - 5, 10, 1)], [(0, 10, 1), ((1 << 64) - 5, 10, 1)]),
    ],
)
def test_e820_tables_are_put_in_order(entries, table):
    """Sorted, the higher type wins an overlap, neighbours are joined; a wrap stops all that."""
    assert e820.update_table(entries) == table


def test_e820_ranges_can_be_cut_out():
    """At the edges, in the middle, wholly, of one type or of all."""
    table = [(0, 100, 1), (100, 100, 2), (200, 100, 1)]
    assert e820.range_remove(table, 50, 250) == [(0, 50, 1), (250, 50, 1)]
    assert e820.range_remove(table, 50, 250, 1) == [(0, 50, 1), (100, 100, 2), (250, 50, 1)]
    assert e820.range_remove(table, 20, 30) == [(0, 20, 1), (30, 70, 1), *table[1:]]
    assert e820.range_remove(table, 0, 300) == []


def test_e820_coverage():
    """Neighbours of one type cover together; a gap or another type does not."""
    table = [(0, 100, 1), (100, 100, 1), (200, 100, 2)]
    assert e820.mapped_all(table, 10, 200, 1)
    assert not e820.mapped_all(table, 10, 201, 1)
    assert e820.mapped_all(table, 250, 300, 2)


def test_without_an_e820_map_the_kernel_guesses():
    """The boot loader's count of KiB above 1 MiB, and 636 KiB below; an entry that wraps: same."""
    page = bytearray(4096)
    page[0x1E0:0x1E4] = (3 << 10).to_bytes(4, "little")
    guess = [(0, 0x9F000, 1), (MIB, 3 * MIB, 1)]
    assert e820.memory_setup(parse_boot_params(bytes(page))) == guess
    page[0x002:0x004] = (2 << 10).to_bytes(2, "little")  # the larger of both counts
    assert e820.memory_setup(parse_boot_params(bytes(page))) == guess
    page[0x1E8] = 2
    page[0x2D0:0x2E4] = struct.pack("<QQI", 0, 0x1000, 1)
    page[0x2E4:0x2F8] = struct.pack("<QQI", (1 << 64) - 0x1000, 0x2000, 2)
    assert e820.memory_setup(parse_boot_params(bytes(page))) == guess
    page[0x2E4:0x2F8] = struct.pack("<QQI", (1 << 64) - 0x1000, 0x1000, 2)
    assert e820.memory_setup(parse_boot_params(bytes(page))) == [
        (0, 0x1000, 1),
        ((1 << 64) - 0x1000, 0x1000, 2),
    ]


def test_the_end_of_ram_in_the_e820_map():
    """Whole pages of RAM or ACPI data; nothing above 64 TiB."""
    assert e820.end_of_ram([(0, 0x1FFF, 1), (0x5000, 0x1000, 2)]) == 0x1000
    assert e820.end_of_ram([(0x2000, 0x1000, 1), (0, 0x1000, 1)]) == 0x3000
    assert e820.end_of_ram([(0, 0x1000, 1), (0x4000, 0x1234, 3)]) == 0x5000
    assert e820.end_of_ram([(0, 0x1000, 1), (1 << 46, 0x1000, 1)]) == 0x1000
    assert e820.end_of_ram([(0, 0x1000, 1), ((1 << 46) - 0x1000, 0x2000, 1)]) == 1 << 46


# -- huge pages -----------------------------------------------------------------------------------


def hugetlb(kernel):
    """The kernel's words about huge pages."""
    return [line for line in kernel.messages if line.startswith("HugeTLB")]


def test_huge_pages_from_the_buddy_allocator():
    """2 MiB pages, from the nodes in turn, as folios of the pool."""
    _, kernel = boot("kho=on hugepages=6", "512M", nodes=["256M", "256M"])
    assert hugetlb(kernel) == [
        "HugeTLB: registered 2.00 MiB page size, pre-allocated 6 pages",
    ]
    runs = [run for run in kernel.pages.pages.runs() if run.state.owner == "hugetlb"]
    heads = [pfn for run in runs for pfn in range(run.start_pfn, run.end_pfn, 512)]
    assert len(heads) == 6
    assert sorted(kernel.nid_of_pfn(pfn) for pfn in heads) == [0, 0, 0, 1, 1, 1]


def test_huge_pages_on_named_nodes():
    """node:count,node:count; a node that runs short is reported."""
    _, kernel = boot("kho=off hugepages=0:2,1:5000", "512M", nodes=["256M", "256M"])
    report = hugetlb(kernel)
    assert report[0].startswith(
        "HugeTLB: allocating 5000 of page size 2.00 MiB failed node1.  Only allocated "
    )
    runs = [run for run in kernel.pages.pages.runs() if run.state.owner == "hugetlb"]
    nodes = [kernel.nid_of_pfn(p) for r in runs for p in range(r.start_pfn, r.end_pfn, 512)]
    assert nodes.count(0) == 2
    assert 50 < nodes.count(1) < 128


def test_gigantic_pages_come_from_memblock():
    """Before the page allocator, outside of scratch, and they do not count for scratch."""
    _, plain = boot("kho=on", "8G")
    machine, kernel = boot("kho=on hugepagesz=1G hugepages=2", "8G")
    assert "HugeTLB: registered 1.00 GiB page size, pre-allocated 2 pages" in hugetlb(kernel)
    pages = [entry for entry in reserved(kernel) if entry[2] & MEMBLOCK_RSRV_HUGETLB]
    assert sum(end - start for start, end, _ in pages) == 2 * GIB
    assert [size for _, size in kernel.scratch_areas()] == [
        size for _, size in plain.scratch_areas()
    ]
    assert kernel.gigantic_pages
    for pfn, nr_pages in kernel.gigantic_pages:
        assert pfn % nr_pages == 0
        assert kernel.page(pfn).owner == "hugetlb"
        assert not kernel.kho_scratch_overlap(pfn << 12, nr_pages << 12)
    assert machine.check() == []


def test_gigantic_pages_from_the_nodes_in_turn():
    """Node 0, 1, 0; or all from the one that is named."""
    _, kernel = boot("hugepagesz=1G hugepages=3", "10G", nodes=["6G", "4G"])
    nodes = [kernel.nid_of_pfn(pfn) for pfn, _ in kernel.gigantic_pages]
    assert nodes == [0, 1, 0]
    _, kernel = boot("hugepagesz=1G hugepages=1:2", "10G", nodes=["6G", "4G"])
    assert [kernel.nid_of_pfn(pfn) for pfn, _ in kernel.gigantic_pages] == [1, 1]


def test_the_largest_page_that_is_not_gigantic():
    """32 MiB with pages of 16 KiB: as large as the buddy allocator's largest block."""
    _, kernel = boot("hugepagesz=32M hugepages=2", "1G", arch="arm64", page_size=16 * KIB)
    assert "HugeTLB: registered 32.0 MiB page size, pre-allocated 2 pages" in hugetlb(kernel)
    assert kernel.gigantic_pages == []
    owned = [run for run in kernel.pages.pages.runs() if run.state.owner == "hugetlb"]
    assert {run.state.order for run in owned} == {11}
    assert sum(run.end_pfn - run.start_pfn for run in owned) == 2 << 11


def test_gigantic_pages_on_a_handover_boot():
    """In memory that the extension of scratch opened, but never in a scratch area itself."""
    machine, kernel = boot("kho=on", "8G")
    successor = kernel.kexec(cmdline="kho=on hugepagesz=1G hugepages=2")
    assert "HugeTLB: registered 1.00 GiB page size, pre-allocated 2 pages" in hugetlb(successor)
    for pfn, nr_pages in successor.gigantic_pages:
        assert not successor.kho_scratch_overlap(pfn << 12, nr_pages << 12)
    assert machine.check() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("hugepagesz=3M hugepages=1", ["unsupported hugepagesz=3M", "does not follow a valid"]),
        ("hugepages=1 hugepages=2", ["specified twice without interleaving"]),
        ("hugepages=x", ["Invalid hugepages parameter x"]),
        ("hugepages=0:1,x", ["Invalid hugepages parameter x"]),
        ("hugepages=9:1", ["Invalid hugepages parameter 9:1"]),
        ("hugepagesz=2M hugepagesz=2M", ["hugepagesz=2M specified twice"]),
        ("default_hugepagesz=2M default_hugepagesz=1G", ["previously specified, ignoring 1G"]),
        ("default_hugepagesz=7", ["unsupported default_hugepagesz=7"]),
    ],
)
def test_huge_page_options_that_are_refused(options, words):
    """The kernel's words, and no page."""
    _, kernel = boot(f"kho=off {options}", "64M")
    said = hugetlb(kernel)
    for part, line in zip(words, said, strict=False):
        assert part in line
    assert not any("pre-allocated 2 pages" in line for line in said)


def test_a_default_huge_page_size():
    """hugepages= in front of default_hugepagesz= is for that size."""
    _, kernel = boot("kho=off hugepages=1 default_hugepagesz=1G", "4G")
    assert hugetlb(kernel) == ["HugeTLB: registered 1.00 GiB page size, pre-allocated 1 pages"]
    _, kernel = boot("kho=off default_hugepagesz=1G hugepages=1", "4G")
    assert hugetlb(kernel) == ["HugeTLB: registered 1.00 GiB page size, pre-allocated 1 pages"]


# -- the crash kernel's region --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size", "start"),
    [
        ("32M", 32 * MIB, None),
        ("32M@64M", 32 * MIB, 64 * MIB),
        ("64M-128M:16M,128M-:32M", 32 * MIB, None),
        ("64M-:16M@80M", 16 * MIB, 80 * MIB),
        ("16M,high", 16 * MIB, None),
    ],
)
def test_crashkernel(text, size, start):
    """size, size@offset, ranges of RAM, and high that falls back to low."""
    _, kernel = boot(f"kho=off crashkernel={text}", "256M")
    ((low, high),) = kernel.crashk_res
    assert high - low == size
    assert low % (16 * MIB) == 0
    assert start is None or low == start
    line = f"crashkernel reserved: 0x{low:016x} - 0x{high:016x} ({size >> 20} MB)"
    assert line in kernel.messages


@pytest.mark.parametrize(
    ("arch", "text", "window"),
    [
        ("x86_64", "64M", (0, 4 * GIB)),
        ("x86_64", "64M,high", (4 * GIB, 9 * GIB)),
        ("x86_64", "3500M", (4 * GIB, 9 * GIB)),  # does not fit below
        ("arm64", "64M", (8 * GIB, 9 * GIB)),
        ("arm64", "64M,high", (8 * GIB, 9 * GIB)),  # above 4 PiB; so low, which is everywhere
    ],
)
def test_where_crash_memory_lies(arch, text, window):
    """As high as possible below 4 GiB, or above it."""
    _, kernel = boot(f"kho=off crashkernel={text}", "8G", arch=arch)
    ((low, high),) = kernel.crashk_res
    assert window[0] <= low
    assert high <= window[1]


@pytest.mark.parametrize(
    ("text", "low_bytes"),
    [
        ("64M,high", 256 * MIB),
        ("64M,high crashkernel=32M,low", 32 * MIB),
        ("64M,high crashkernel=0,low", 0),
        ("3500M", 256 * MIB),  # does not fit below, and needs a little there
        ("64M", 0),
    ],
)
def test_a_crash_kernel_above_4_gib_gets_some_memory_below(text, low_bytes):
    """reserve_crashkernel_low, by default large enough for bounce buffers."""
    _, kernel = boot(f"kho=off crashkernel={text}", "8G")
    if not low_bytes:
        assert kernel.crashk_low_res == []
        return
    ((low, high),) = kernel.crashk_low_res
    assert (high - low, low % (16 * MIB)) == (low_bytes, 0)
    assert high <= 4 * GIB
    line = f"crashkernel low memory reserved: 0x{low:08x} - 0x{high:08x} ({low_bytes >> 20} MB)"
    assert line in kernel.messages


def test_no_room_below_for_a_crash_kernel_above():
    """All of it is given back."""
    _, kernel = boot("kho=off crashkernel=64M,high crashkernel=3500M,low", "8G")
    assert (kernel.crashk_res, kernel.crashk_low_res) == ([], [])
    assert "cannot allocate crashkernel low memory (size:0xdac00000)." in kernel.messages
    assert not any(size == 64 * MIB for _, size in held(kernel))


def held(kernel):
    """(start, size) of what memblock has reserved for the kernel."""
    return [(start, end - start) for start, end, flags in reserved(kernel) if flags & 0x20]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "crashkernel: memory value expected"),
        ("32Mx", "crashkernel: unrecognized char: x"),
        ("32M@16M", "crashkernel reservation failed - memory is in use."),
        ("250M", "cannot allocate crashkernel (size:0xfa00000)"),
        ("0", None),
        ("1T", None),
        ("1-:x", "crashkernel: Memory value expected"),
        ("1:2", "crashkernel: '-' expected"),
        ("2M-1M:16M", "crashkernel: end <= start"),
        ("1M-2M", None),
        ("1M-x:16M", "crashkernel: Memory value expected"),
        ("1M-2Mx:16M", "crashkernel: ':' expected"),
        ("1M-:1T", "crashkernel: invalid size"),
        ("1M-2M:16M", "crashkernel size resulted in zero bytes"),
        ("1M-:16M@x", "crashkernel: Memory value expected after '@'"),
    ],
)
def test_crashkernel_refusals(text, message):
    """The kernel's words; nothing is reserved."""
    _, kernel = boot(f"kho=off crashkernel={text}", "256M")
    assert kernel.crashk_res == []
    said = [line for line in kernel.messages if "crashkernel" in line]
    assert said == ([message] if message else said)


# -- contiguous memory ----------------------------------------------------------------------------


def boot_cma(cma_bytes, cmdline="kho=off", ram="256M", *, arch="x86_64", **changes):
    """A kernel built with a default area of ``cma_bytes``."""
    config = KernelConfig(release=find_release("7.3"), cma_bytes=cma_bytes, **changes)
    return Machine(ram, arch=arch, checks=False).boot(cmdline=cmdline, config=config)


def cma_lines(kernel):
    """What the kernel said of it."""
    return [line for line in kernel.messages if line.startswith("cma:")]


@pytest.mark.parametrize(
    ("cma_bytes", "word", "ram", "expected"),
    [
        (None, "cma=32M", "256M", []),
        (0, "", "256M", []),
        (32 * MIB, "cma=0", "256M", []),
        (32 * MIB, "", "8G", ["cma: Reserved 32 MiB at 0x0000000100000000"]),
        (0, "cma=16M@64M", "256M", ["cma: Reserved 16 MiB at 0x0000000004000000"]),
        (0, "cma=16M@63M-80M", "256M", ["cma: Reserved 16 MiB at 0x0000000004000000"]),
        (
            0,
            "cma=16M@63M",
            "256M",
            [
                "cma: Region at 0x0000000003f00000 must be aligned to 0x0000000000200000 bytes",
                "cma: Failed to reserve 16 MiB",
            ],
        ),
        (0, "cma=16M@0x1000000", "256M", ["cma: Failed to reserve 16 MiB"]),  # the kernel is there
        (
            0,
            "cma=1G",
            "256M",
            [
                f"cma: Size (0x{GIB:016x}) of region at 0x{0:016x} exceeds limit (0x{LIMIT:016x})",
                "cma: Failed to reserve 1024 MiB",
            ],
        ),
    ],
)
def test_cma(cma_bytes, word, ram, expected):
    """Built in or asked for; above 4 GiB where there is room, or where cma= says."""
    assert cma_lines(boot_cma(cma_bytes, f"kho=off {word}", ram)) == expected


def test_cma_counts_when_scratch_is_sized_but_for_no_node():
    """It is reserved after reserved memory got its nodes."""
    with_cma = boot_cma(32 * MIB, "kho=on", "512M").scratch_areas()
    without = boot_cma(None, "kho=on", "512M").scratch_areas()
    grown = [a[1] - b[1] for a, b in zip(with_cma, without, strict=True)]
    assert grown == [64 * MIB, 0, 0]


@pytest.mark.parametrize(
    ("ram", "zone_dma", "low_end"),
    [("8G", True, 4 * GIB), ("8G", False, 1 << 52), ("1G", True, 2 * GIB)],
)
def test_low_memory_of_arm64(ram, zone_dma, low_end):
    """With ZONE_DMA it ends at 4 GiB or with memory; CMA, bounce buffers and lowmem lie there."""
    kernel = boot_cma(32 * MIB, "kho=on", ram, arch="arm64", zone_dma=zone_dma)
    assert kernel.arch.low_address_limit == low_end - 1
    assert kernel.scratch_areas()[0][0] < low_end
    names = {zone.name for zone in kernel.pages.zones}
    assert ("DMA" in names) == zone_dma
    assert ("Normal" in names) == (ram == "8G" or not zone_dma)
    (line,) = cma_lines(kernel)
    assert int(line.split()[-1], 16) < low_end
