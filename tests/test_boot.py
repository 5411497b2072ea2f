"""Boots, whole: phases, what is taken and given back, and the switches that change them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from khosim import KernelError, KernelPanic, Machine
from khosim.kernel.image import KernelConfig, KernelImage
from khosim.kernel.memblock import MEMBLOCK_RSRV_KERN
from khosim.kernel.release import find_release

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def boot(cmdline="kho=on", ram="64M", *, arch="x86_64", page_size=4096, **options):
    """A machine and its first kernel; small image and initrd."""
    machine = Machine(ram, arch=arch, page_size=page_size, **options)
    return machine, machine.boot(cmdline=cmdline, kernel_size="4M", initrd="1M")


def reserved(kernel):
    """(start, end, flags) of memblock.reserved."""
    array = kernel.memblock.reserved
    return list(zip(array.base, array.end, array.flags, strict=True))


def memory(kernel):
    """(start, end, nid) of memblock.memory."""
    array = kernel.memblock.memory
    return list(zip(array.base, array.end, array.nid, strict=True))


def config(**changes):
    """A small kernel's configuration with some fields changed."""
    return KernelConfig(
        release=find_release("7.3"),
        kernel_bytes=4 * MIB,
        init_offset_bytes=3 * MIB,
        init_bytes=512 * KIB,
        init_size_bytes=5 * MIB,
    ).evolve(**changes)


# -- phases ---------------------------------------------------------------------------------------

EARLY = {
    "x86_64": [
        "setup_arch",
        "parse_setup_data",
        "parse_early_param",
        "e820__memblock_setup",
        "reserve_real_mode",
        "init_mem_mapping",
        "initmem_init",
    ],
    "arm64": [
        "setup_arch",
        "early_init_dt_check_kho",
        "parse_early_param",
        "arm64_memblock_init",
        "paging_init",
        "bootmem_init",
    ],
}
LATE = [
    "mm_core_init_early",
    "sparse_init",
    "setup_per_cpu_areas",
    "parse_args",
    "mm_core_init",
    "kho_memory_init",
    "memblock_free_all",
    "page_alloc_init_late",
    "initcalls",
    "kho_init",
    "initcalls",
    "running",
]


@pytest.mark.parametrize("arch", ["x86_64", "arm64"])
def test_phases_in_the_kernels_order(arch):
    """Events come in the order in which start_kernel calls things, cold and after a kexec."""
    machine = Machine("128M", arch=arch)
    phases: list[tuple[int, str]] = []

    def listen(event):
        if not phases or phases[-1] != (event.generation, event.phase):
            phases.append((event.generation, event.phase))

    machine.listen(listen)
    cmdline = "kho=on reserve_mem=4K:4096:x log_buf_len=256K"
    kernel = machine.boot(cmdline=cmdline, kernel_size="4M", initrd="1M")
    kernel.kexec()
    order = EARLY[arch] + LATE
    for generation in (0, 1):
        seen = [phase for number, phase in phases if number == generation]
        known = [phase for phase in seen if phase in order]
        at = 0
        for phase in known:
            at = order.index(phase, at)
        assert {"kho_memory_init", "memblock_free_all", "kho_init", "parse_args"} <= set(known)
        assert ("running" in known) == (generation == 0)
    assert [phase for number, phase in phases if number == 0][-1] == "machine_kexec"


def test_stages_are_told_to_the_host():
    """takeover, booted, and jump when it leaves."""
    stages = []

    class Watching(Machine):
        def checkpoint(self, kernel, stage):
            stages.append((kernel.generation, stage))
            super().checkpoint(kernel, stage)

    Watching("64M").boot(cmdline="kho=on").kexec()
    assert stages == [
        (0, "takeover"),
        (0, "booted"),
        (0, "jump"),
        (1, "takeover"),
        (1, "booted"),
    ]


def test_kho_tells_of_its_two_steps():
    """kho_memory_init with the areas and whether KHO is on, kho_init with its error."""
    events = []
    machine = Machine("64M")
    machine.listen(events.append)
    kernel = machine.boot(cmdline="kho=on kho_scratch=4M,4M,0", kernel_size="4M", initrd="1M")
    told = {event.symbol: event for event in events if event.symbol.startswith("kho_")}
    early, late = told["kho_memory_init"], told["kho_init"]
    assert (early.phase, early.args, early.result) == (
        "kho_memory_init",
        {"scratch": kernel.scratch_areas()},
        True,
    )
    assert (late.phase, late.args, late.result) == ("kho_init", {}, 0)


def test_a_kernel_that_panics_is_dead():
    """Whoever still holds it cannot use it."""
    held = []

    class Watching(Machine):
        def checkpoint(self, kernel, stage):
            held.append(kernel)
            raise KernelPanic("as if")

    with pytest.raises(KernelPanic, match="as if"):
        Watching("64M").boot(cmdline="kho=on")
    assert not held[0].alive


# -- what the firmware and the boot loader leave --------------------------------------------------


def test_the_first_mib_is_no_memory_for_the_kernel():
    """Reserved as a whole, after the trampoline was allocated in it."""
    _, kernel = boot()
    low = [entry for entry in reserved(kernel) if entry[0] < MIB]
    assert low[0][0] == 0
    assert low[-1][1] == MIB
    assert all(left[1] == right[0] for left, right in pairwise(low))
    trampoline = [entry for entry in low if entry[2] & MEMBLOCK_RSRV_KERN]
    assert trampoline == [(0x99000, 0x9F000, MEMBLOCK_RSRV_KERN)]


@pytest.mark.parametrize(
    ("kilobytes", "ebda", "trampoline_end"),
    [
        (0, 0, 0x9F000),
        (639, 0x9FC0, 0x9F000),
        (600, 0x9FC0, 600 * KIB),
        (127, 0, 0x9F000),  # below 128 KiB: bogus
        (639, 0x9000, 0x90000),
        (600, 0x1000, 600 * KIB),
    ],
)
def test_the_bios_area_is_read_from_its_data(kilobytes, ebda, trampoline_end):
    """BIOS data area at 0x413 and 0x40e, with the kernel's bounds."""
    machine = Machine("64M")
    machine.hardware.ram.write(0x413, kilobytes.to_bytes(2, "little"), (-1, "BIOS"))
    machine.hardware.ram.write(0x40E, ebda.to_bytes(2, "little"), (-1, "BIOS"))
    kernel = machine.boot(cmdline="kho=on")
    trampoline = [e for e in reserved(kernel) if e[1] <= MIB and e[2] & MEMBLOCK_RSRV_KERN]
    assert trampoline[0][1] == trampoline_end


def test_image_initrd_and_brk_are_the_kernels_own():
    """They count when scratch is sized; arm64 reserves image and initrd without that mark."""
    _, kernel = boot()
    start, end = kernel.kernel_range
    assert (start, end) == (16 * MIB, 20 * MIB)
    own = [(low, high) for low, high, flags in reserved(kernel) if flags & MEMBLOCK_RSRV_KERN]
    assert any(low <= start and high >= end + kernel.config.brk_bytes for low, high in own)
    initrd = kernel.initrd
    assert any(low <= initrd[0] and high >= initrd[1] for low, high in own)
    _, arm = boot(arch="arm64")
    own = [(low, high) for low, high, flags in reserved(arm) if flags & MEMBLOCK_RSRV_KERN]
    assert not any(low <= arm.kernel_range[0] < high for low, high in own)


@pytest.mark.parametrize(
    ("arch", "page_size", "freed"),
    [
        (
            "x86_64",
            4096,
            ["Freeing initrd memory: 1024K", "Freeing unused kernel image (initmem) memory: 512K"],
        ),
        ("arm64", 16384, ["Freeing initrd memory: 1024K", "Freeing unused kernel memory: 512K"]),
    ],
)
def test_initrd_and_init_sections_become_free_memory(arch, page_size, freed):
    """All of their pages, with the kernel's words."""
    _, kernel = boot(arch=arch, page_size=page_size, ram="256M")
    assert [line for line in kernel.messages if line.startswith("Freeing")] == freed
    shift = kernel.arch.page_shift
    assert kernel.page(kernel.initrd[0] >> shift).kind == "free"
    start = kernel.kernel_range[0]
    init = start + kernel.config.init_offset_bytes
    assert kernel.page(init >> shift).kind in ("free", "allocated")
    assert kernel.page(start >> shift).kind == "reserved"


def test_the_last_page_of_an_odd_initrd():
    """x86-64 frees it, arm64 keeps it."""
    for arch, size in (("x86_64", 1024), ("arm64", 1020)):
        machine = Machine("64M", arch=arch)
        kernel = machine.boot(cmdline="kho=off", kernel_size="4M", initrd=MIB - 100)
        assert f"Freeing initrd memory: {size}K" in kernel.messages


def test_every_page_is_somebodys():
    """Managed pages are free or allocated; the others are reserved."""
    for cmdline in ("kho=off", "kho=on", "kho=on reserve_mem=64K:4096:x log_buf_len=1M"):
        _, kernel = boot(cmdline, "256M")
        pages = kernel.pages
        allocated = pages.nr_pages("allocated")
        assert pages.nr_free_pages() + allocated == kernel.total_ram_pages()
        everything = sum(end - start for start, end, _ in kernel.memblock.for_each_mem_pfn_range())
        assert kernel.total_ram_pages() + pages.nr_pages("reserved") >= everything
        assert pages.nr_deferred_pages() == 0


# -- KHO on and off -------------------------------------------------------------------------------


def test_kho_is_off_unless_asked_for():
    """CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT=n; kho=on, kho=off, and the default of the build."""
    assert not boot("")[1].kho_enable
    assert boot("kho=on")[1].kho_enable
    image = KernelImage.build("7.3", config=config(enable_default=True))
    assert Machine("64M").boot(cmdline="", image=image).kho_enable
    assert not Machine("64M").boot(cmdline="kho=0", image=image).kho_enable


def test_scratch_is_cma_after_boot():
    """Free for movable pages only."""
    _, kernel = boot()
    areas = kernel.scratch_areas()
    total = sum(size for _, size in areas)
    assert sum(zone.cma_pages for zone in kernel.pages.zones) == total >> 12
    for addr, size in areas:
        if size:
            assert kernel.page(addr >> 12).migratetype == 2
            assert kernel.page((addr + size - 1) >> 12).kind == "free"
    movable = kernel.alloc_folio(0, movable=True)
    assert kernel.kho_scratch_overlap(movable.phys, 4096)


def test_a_second_boot_revives():
    """The same scratch, the same reserve_mem, a count of one."""
    machine, kernel = boot("kho=on reserve_mem=64K:4096:x")
    areas, regions = kernel.scratch_areas(), kernel.reserve_mem.regions
    successor = kernel.kexec()
    assert successor.scratch_areas() == areas
    assert successor.reserve_mem.regions == regions
    assert successor.kho_in.kexec_count == 1
    assert machine.check() == []


def test_kho_off_in_a_successor():
    """The handover is taken over all the same; only the outgoing side stays down."""
    machine, kernel = boot("kho=on reserve_mem=64K:4096:x", "128M")
    folio = kernel.alloc_folio(2)
    folio.write(0, b"state")
    kernel.kho_preserve_folio(folio)
    areas, regions = kernel.scratch_areas(), kernel.reserve_mem.regions
    successor = kernel.kexec(cmdline="kho=off reserve_mem=64K:4096:x")
    assert "KHO: found kexec handover data." in successor.messages
    assert not successor.kho_enable
    assert successor.is_kho_boot
    assert successor.debugfs.files() == []
    assert successor.scratch_areas() == areas
    assert successor.page(areas[0][0] >> 12).migratetype == 2
    assert successor.reserve_mem.regions == regions
    assert "Revived memory reservation 'x' from KHO" in successor.messages
    restored = successor.kho_restore_folio(folio.phys)
    assert restored.read(0, 5) == b"state"
    with pytest.raises(KernelError, match="EINVAL"):
        successor.kho_preserve_folio(restored)
    # The next kexec hands nothing over.
    third = successor.kexec(cmdline="kho=on")
    assert not third.is_kho_boot
    assert third.kho_in.kexec_count == 0
    assert machine.check() == []


def test_a_successor_that_takes_itself_for_a_kdump_kernel():
    """Hazard: any elfcorehdr= leaves what was preserved unprotected, and KHO half alive."""
    _, kernel = boot("kho=on reserve_mem=64K:4096:x", "128M")
    folio = kernel.alloc_folio(2)
    kernel.kho_preserve_folio(folio)
    regions = kernel.reserve_mem.regions
    successor = kernel.kexec(cmdline="kho=on reserve_mem=64K:4096:x elfcorehdr=")
    assert "Malformed early option 'elfcorehdr'" in successor.messages
    assert "KHO: disabled in the kdump kernel" in successor.messages
    assert not successor.kho_enable
    assert successor.is_kho_boot
    assert successor.page(folio.pfn).kind == "free"
    assert successor.kho_restore_folio(folio.phys) is None
    # Revived, but nobody reserved its memory.
    assert successor.reserve_mem.regions == regions
    assert successor.page(regions[0][1] >> 12).kind == "free"


def test_a_larger_successor():
    """As long as it fits into one scratch area; else the load is refused and the kernel lives."""
    _, kernel = boot("kho=on kho_scratch=32M,64M,32M", "256M")
    successor = kernel.kexec(kernel_size="16M", initrd="8M")
    assert successor.kernel_range[1] - successor.kernel_range[0] == 16 * MIB
    with pytest.raises(KernelError) as refused:
        successor.kexec(kernel_size="80M")
    assert refused.value.name == "EADDRNOTAVAIL"
    assert successor.alive
    assert successor.kexec(kernel_size="4M").is_kho_boot


def test_a_successor_that_needs_more_than_scratch_panics():
    """Its early allocations have nowhere to go: the machine is there, the kernel is not."""
    _, kernel = boot("kho=on kho_scratch=16M,0,0", "128M")
    with pytest.raises(KernelPanic) as death:
        kernel.kexec(cmdline="kho=on", initrd="9M")
    assert death.value.generation == 1


def test_a_log_buffer_that_does_not_fit_is_done_without():
    """Said for the piece that fails, what was had given back; tried again later in boot."""
    for size, *refused in (
        ("64M", "67108864 text", "67108864 text"),
        ("16M", "12582912 desc", "16777216 text"),  # by then the memmap has taken its part
    ):
        machine, kernel = boot("kho=on kho_scratch=16M,4M,4M", "256M")
        successor = kernel.kexec(cmdline=f"kho=on log_buf_len={size}")
        lines = [line for line in successor.messages if line.startswith("printk")]
        assert lines == [f"printk: log_buf_len: {what} bytes not available" for what in refused]
        assert successor.log_buf_phys == 0
        assert machine.check() == []


# -- page sizes and nodes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page_size", "ram", "align"),
    [(4096, "128M", 4 * MIB), (16384, "512M", 32 * MIB), (65536, "8G", 512 * MIB)],
    ids=["4K", "16K", "64K"],
)
def test_arm64_with_each_page_size(page_size, ram, align):
    """Scratch aligned to the largest block; a handover of every order of page."""
    machine, kernel = boot(arch="arm64", page_size=page_size, ram=ram)
    for addr, size in kernel.scratch_areas():
        assert addr % align == 0
        assert size % align == 0
    folios = [kernel.alloc_folio(order) for order in (0, 3)]
    for folio in folios:
        folio.write(folio.len_bytes - 4, b"last")
        kernel.kho_preserve_folio(folio)
    successor = kernel.kexec()
    for folio in folios:
        restored = successor.kho_restore_folio(folio.phys)
        assert restored.order == folio.order
        assert restored.read(restored.len_bytes - 4, 4) == b"last"
    assert machine.check() == []


def test_an_image_of_another_page_size():
    """The boot loader says so."""
    machine = Machine("64M", arch="arm64", page_size=16384)
    image = KernelImage.build("7.3", arch="arm64", page_size=4096)
    with pytest.raises(Exception, match="pages have 4096 bytes"):
        machine.boot(image=image)


@pytest.mark.parametrize("arch", ["x86_64", "arm64"])
def test_nodes(arch):
    """memblock, zones and scratch know them; a handover keeps each node's area."""
    machine, kernel = boot(ram="512M", nodes=["256M", "256M"], arch=arch)
    nodes = {nid for start, _, nid in memory(kernel) if start >= MIB}
    assert nodes == {0, 1}
    assert kernel.memory_nodes() == [0, 1]
    areas = kernel.scratch_areas()
    assert len(areas) == 4
    for nid, (addr, size) in enumerate(areas[2:]):
        assert kernel.nid_of_pfn(addr >> 12) == nid
        assert kernel.nid_of_pfn((addr + size - 1) >> 12) == nid
    successor = kernel.kexec()
    assert successor.scratch_areas() == areas
    assert machine.check() == []


@pytest.mark.parametrize("arch", ["x86_64", "arm64"])
def test_a_memoryless_node(arch):
    """It costs its node data, gets no zone and no scratch."""
    _, without = boot(ram="128M", arch=arch)
    machine, kernel = boot(ram="128M", memoryless=[3], arch=arch)
    assert kernel.memory_nodes() == [0]
    assert len(kernel.scratch_areas()) == 3
    more = len(kernel.memblock.allocations) - len(without.memblock.allocations)
    assert more == 1
    kernel.kexec()
    assert machine.check() == []


@pytest.mark.parametrize("arch", ["x86_64", "arm64"])
def test_a_hole_in_ram(arch):
    """No page there is ever handed out; the handover goes around it."""
    base = 0 if arch == "x86_64" else GIB
    hole = (base + 96 * MIB, base + 160 * MIB)
    machine, kernel = boot(ram="256M", holes=[hole], arch=arch)
    assert all(end <= hole[0] or start >= hole[1] for start, end, _ in memory(kernel))
    runs = kernel.alloc_folios(kernel.pages.nr_free_pages() // 2)
    assert all((pfn + count) << 12 <= hole[0] or pfn << 12 >= hole[1] for pfn, count in runs)
    pfn = (hole[0] >> 12) - 1
    kernel.kho_preserve_pages(pfn, 1)
    successor = kernel.kexec()
    assert successor.page(pfn).kind == "incoming"
    assert successor.kho_restore_pages(pfn << 12, 1) == pfn
    assert machine.check() == []


# -- mem= -----------------------------------------------------------------------------------------


def test_the_first_tables_of_the_direct_map():
    """Of 16 GiB: one for each GiB, in the 512 MiB at the top, which were mapped before the rest.

    The brk area has room for one more table: that of the last GiB. Then RAM below 4 GiB needs two
    and one for single pages at its odd end; from 4 to 16 GiB, which is one range, twelve.
    """
    events = []
    machine = Machine("16G")
    machine.listen(events.append)
    machine.boot(cmdline="kho=off", config=config(brk_bytes=4 * 4096))
    allocs = [
        (event.args["args"], event.result)
        for event in events
        if event.phase == "init_mem_mapping" and "alloc" in event.symbol
    ]
    top = 17 * GIB
    assert allocs == [
        ((2 * MIB, 2 * MIB, MIB, top), top - 2 * MIB),
        ((3 * 4096, 4096, top - 512 * MIB, top), top - 3 * 4096),
        ((12 * 4096, 4096, top - 512 * MIB, top - 3 * 4096), top - 15 * 4096),
    ]


def test_mem_on_x86():
    """RAM above the address is gone: no memory, no zone, no direct map."""
    _, kernel = boot("kho=on mem=64M", "128M")
    assert memory(kernel)[-1][1] == 64 * MIB
    assert kernel.total_ram_pages() < 64 * MIB >> 12
    with pytest.raises(KernelPanic, match="not mapped"):
        kernel.virt(64 * MIB, 1)


def test_mem_moves_an_initrd():
    """QEMU puts it at the top of RAM, where mem= leaves nothing: copied to where there is some."""
    machine = Machine("128M")
    kernel = machine.boot(cmdline="kho=off mem=64M", kernel_size="4M", initrd="1M")
    assert any(line.startswith("Move RAMDISK from") for line in kernel.messages)
    assert kernel.initrd[1] <= 64 * MIB
    assert "Freeing initrd memory: 1024K" in kernel.messages


def test_mem_below_the_kernel():
    """x86-64 takes the memory under its own code back in."""
    _, kernel = boot("kho=off mem=24M", "128M")
    assert ".text .data .bss are not marked as E820_TYPE_RAM!" not in kernel.messages
    _, kernel = boot("kho=off mem=18M", "128M")
    assert ".text .data .bss are not marked as E820_TYPE_RAM!" in kernel.messages
    assert memory(kernel)[-1][1] == kernel.kernel_range[1] + kernel.config.brk_bytes


def test_mem_in_a_successor_loses_the_handover():
    """Hazard: the FDT and the tables above the limit are not mapped."""
    _, kernel = boot("kho=on", "256M")
    assert kernel.kho_out.fdt_phys < 1 << 40
    with pytest.raises(KernelPanic):
        kernel.kexec(cmdline="kho=on mem=20M")


def test_mem_on_arm64():
    """An amount from the bottom of RAM; the kernel and its initrd are added back."""
    _, kernel = boot("kho=on mem=64M", "128M", arch="arm64")
    assert "Memory limited to 64MB" in kernel.messages
    assert kernel.initrd == (GIB + 64 * MIB, GIB + 65 * MIB)  # just above the limit
    assert memory(kernel) == [(GIB, GIB + 65 * MIB, 0)]


# -- the configuration ----------------------------------------------------------------------------


def test_more_cpus_take_more_memory():
    """Per-cpu areas, and above 64 CPUs a larger log buffer."""
    few = Machine("512M").boot(cmdline="kho=off", config=config(nr_cpus=2))
    many = Machine("512M").boot(cmdline="kho=off", config=config(nr_cpus=64))
    taken = [sum(size for _, size in kernel.memblock.allocations) for kernel in (few, many)]
    assert taken[1] - taken[0] > 62 * 148 * KIB
    assert many.log_buf_phys


@pytest.mark.parametrize(
    ("arch", "page_size", "size"),
    # 64 bytes for each page of the sections: 4 of 128 MiB; 4 of 128 MiB; one of 512 MiB.
    [("x86_64", 4096, 8 * MIB), ("arm64", 16 * KIB, 2 * MIB), ("arm64", 64 * KIB, 512 * KIB)],
)
def test_the_memmap(arch, page_size, size):
    """A struct page each, beside the tables that map them and small things."""
    events = []
    machine = Machine("512M", arch=arch, page_size=page_size)
    machine.listen(events.append)
    machine.boot(cmdline="kho=off", kernel_size="4M", initrd="1M")
    sizes = [
        event.args["args"][0]
        for event in events
        if event.phase == "sparse_init" and "alloc" in event.symbol
    ]
    unit = min(size, 2 * MIB)
    assert sum(n for n in sizes if n % unit == 0) == size


def test_swiotlb_shrinks_until_it_fits():
    """Half as much each time; none below 1 MiB."""
    machine = Machine("6G")
    _, low, *_ = machine.hardware.ram_ranges
    kernel = machine.boot(cmdline="kho=off", config=config(swiotlb_bytes=8 * GIB))
    tried = [line for line in kernel.messages if line.startswith("software IO TLB")]
    assert [int(line.split()[-4]) for line in tried] == [8 * GIB, 4 * GIB]
    assert low[0] == MIB


def test_the_image_says_which_kernel_it_is():
    """A configuration travels through RAM; another name is refused."""
    wanted = config(nr_cpus=7, cpu_nodes=(0, 0), percpu_bytes=64 * KIB, log_buf_shift=18)
    kernel = Machine("64M").boot(cmdline="kho=off", config=wanted)
    assert kernel.config == wanted
    with pytest.raises(Exception, match="no setting named"):
        wanted.evolve(wheels=4)
