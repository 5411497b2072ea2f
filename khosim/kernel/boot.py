"""Booting: from the registers of a machine to a running kernel.

Models ``init/main.c:start_kernel`` and ``mm/mm_init.c:mm_core_init_early`` / ``mm_core_init``
@ 7.3 as phases in the kernel's order. What differs between architectures (``setup_arch``) is in
:mod:`~khosim.kernel.boot_x86` and :mod:`~khosim.kernel.boot_arm64`. A boot reads the machine and
nothing else; it ends with a kernel or with :class:`~khosim.errors.KernelPanic`. Left out: freed
init memory is not overwritten with the kernel's poison.
"""

from __future__ import annotations

from khosim.errors import HardwareFault, KernelPanic
from khosim.kernel import boot_arm64, boot_hugetlb, boot_memory, boot_x86
from khosim.kernel.arch import find_arch
from khosim.kernel.boot_cma import cma_init_reserved_areas
from khosim.kernel.boot_crashkernel import reserve_late
from khosim.kernel.image import (
    PREFIX_BYTES,
    KernelConfig,
    config_bytes,
    config_offset,
    read_kernel_config,
)
from khosim.kernel.kernel import Kernel
from khosim.kernel.kfence import kfence_alloc_pool
from khosim.kernel.kho import kho_init, kho_memory_init
from khosim.kernel.kho_scratch import read_scratch_array
from khosim.kernel.memblock import numa_valid_node
from khosim.kernel.page_map import RESERVED, PageState
from khosim.kernel.page_policy import Policy
from khosim.kernel.pageblock import MOVABLE, UNMOVABLE
from khosim.kernel.trace import Host, Initcall, Trace
from khosim.machine.hardware import Hardware

__all__ = ("boot",)

_RESERVED = PageState(RESERVED, 0, False, "memblock")


def boot(
    hardware: Hardware,
    generation: int,
    *,
    policy: Policy | None = None,
    trace: Trace | None = None,
    host: Host | None = None,
    initcall: Initcall | None = None,
) -> Kernel:
    """Start the kernel that the machine's registers point at.

    ``generation`` only labels what this kernel writes; ``policy`` decides which free pages it hands
    out; ``host`` is told of its stages, ``initcall`` brings drivers up. Raises :class:`KernelPanic`
    where the real kernel would die, or where there is none.
    """
    kernel: Kernel | None = None
    try:
        entry_name = "rip" if hardware.arch == "x86_64" else "pc"
        entry = hardware.registers.get(entry_name)
        if entry is None:
            raise KernelPanic("the machine has no kernel to start: load one first", generation)
        config = _find_kernel(hardware, entry)
        arch = find_arch(hardware.arch, hardware.page_size)
        if config.zone_dma and hardware.ram_ranges:
            arch = arch.with_zone_dma(hardware.ram_ranges[0][0], hardware.ram_ranges[-1][1])
        kernel = Kernel(hardware, arch, config, generation, policy=policy, trace=trace, host=host)
        _start_kernel(kernel, entry, initcall)
    except KernelPanic as panic:
        if kernel is not None:
            kernel.alive = False
            kernel.printk(f"Kernel panic - not syncing: {panic.message}")
        panic.generation = generation
        raise
    except HardwareFault as fault:
        if kernel is not None:
            kernel.alive = False
        raise KernelPanic(f"BUG: unable to handle page fault: {fault}", generation) from fault
    return kernel


def _find_kernel(hardware: Hardware, entry: int) -> KernelConfig:
    at = entry + config_offset(hardware.arch)
    if not hardware.is_ram(at, PREFIX_BYTES):
        raise KernelPanic(f"no kernel at the entry point {entry:#x}: no RAM there")
    size = config_bytes(hardware.ram.read(at, PREFIX_BYTES))
    size = min(size, hardware.ram.size_bytes - at)
    return read_kernel_config(hardware.ram.read(at, size))


def _start_kernel(kernel: Kernel, entry: int, initcall: Initcall | None) -> None:
    kernel.phase = "setup_arch"
    x86 = kernel.arch.name == "x86_64"
    if x86:
        boot_x86.setup_arch(kernel, entry, kernel.hardware.registers.get("rsi", 0))
    else:
        boot_arm64.setup_arch(kernel, entry, kernel.hardware.registers.get("x0", 0))
    _mm_core_init_early(kernel)
    kernel.phase = "setup_command_line"
    boot_memory.setup_command_line(kernel)
    boot_memory.setup_per_cpu_areas(kernel)
    kernel.phase = "parse_args"
    for text in kernel.options.reserve_mem:
        kernel.reserve_mem.parse(text)
    kernel.phase = "setup_log_buf"
    boot_memory.setup_log_buf(kernel, early=False)
    kernel.phase = "vfs_caches_init_early"
    boot_memory.alloc_large_system_hashes(kernel)
    if x86:
        kernel.phase = "trap_init"
        boot_x86.trap_init(kernel)
    _mm_core_init(kernel)
    _initcalls(kernel, initcall or (lambda _kernel, _level: None))


def _mm_core_init_early(kernel: Kernel) -> None:
    kernel.phase = "mm_core_init_early"
    kernel.kho_in.memory_init_early()
    _check_nodes(kernel)
    kernel.pages.keeps_cma = kernel.release.scratch_stays_cma
    kernel.pages.free_area_init(
        kernel.memblock.for_each_mem_pfn_range(), deferred=kernel.release.deferred_struct_pages
    )
    if kernel.arch.name == "x86_64":
        known = kernel.memory_nodes()
        offline = [n for n in kernel.hardware.memory_map.online_nodes if n not in known]
        boot_memory.alloc_offline_node_data(kernel, offline)
    kernel.nr_kernel_pages = boot_memory.calc_nr_kernel_pages(kernel)
    kernel.phase = "hugetlb_bootmem_alloc"
    boot_hugetlb.hugetlb_bootmem_alloc(kernel)
    boot_memory.sparse_init(kernel)
    if kernel.kho_scratch_cnt:
        _mark_scratch_pageblocks(kernel)


def _check_nodes(kernel: Kernel) -> None:
    # memmap_init looks the node of each region up in an array. On x86-64 a little memory may be
    # without one, such as scratch that a hostile handover put where no node is.
    for base, nid in zip(kernel.memblock.memory.base, kernel.memblock.memory.nid, strict=True):
        if not numa_valid_node(nid):
            raise KernelPanic(
                f"BUG: unable to handle page fault: memory at {base:#x} has no node in memmap_init"
            )


def _mark_scratch_pageblocks(kernel: Kernel) -> None:
    # kho_scratch_migratetype, asked by memmap_init and deferred init alike.
    shift = kernel.arch.page_shift
    end = kernel.memblock.memblock_end_of_DRAM()
    # An area whose end wraps around 2**64 overlaps no page (kho_scratch_overlap).
    kernel.pages.set_cma_ranges(
        (addr >> shift, -(-min(addr + size, end) >> shift))
        for addr, size in kernel.scratch_areas()
        if addr < end and addr + size < 1 << 64
    )


def _mm_core_init(kernel: Kernel) -> None:
    kernel.phase = "swiotlb_init"
    boot_memory.swiotlb_init(kernel)
    kfence_alloc_pool(kernel)
    kho_memory_init(kernel)
    if kernel.host is not None:
        kernel.host.checkpoint(kernel, "takeover")
    reserve_late(kernel)
    _memblock_free_all(kernel)
    if not any(zone.nr_free[MOVABLE] or zone.nr_free[UNMOVABLE] for zone in kernel.pages.zones):
        # kmem_cache_init: the very first slab needs a page outside of scratch.
        raise KernelPanic("kernel BUG at mm/slub.c:7771!", kernel.generation)
    kernel.slab_available = True


def _memblock_free_all(kernel: Kernel) -> None:
    kernel.phase = "memblock_free_all"
    memblock, pages = kernel.memblock, kernel.pages
    _check_ram(kernel)
    ranges = memblock.free_ranges()
    reserved = [
        (start_pfn, end_pfn, _RESERVED)
        for start_pfn, end_pfn, _nid, _flags in memblock.reserved_ranges()
        if pages.zone_of(start_pfn) is not None or pages.pieces_in(start_pfn, end_pfn)
    ]
    pages.pages.set_each(reserved)
    for start_pfn, end_pfn, nid in ranges:
        pages.memblock_free_pages(start_pfn, end_pfn, nid)


def _check_ram(kernel: Kernel) -> None:
    # Memory without RAM behind it (a hostile scratch area, memory map or device tree) is handed out
    # like any other. Nothing that is written there can be read again, so no kernel that uses it
    # lives for long; which of its structures is hit first is beyond this model.
    memory, is_ram = kernel.memblock.memory, kernel.hardware.is_ram
    for base, end in zip(memory.base, memory.end, strict=True):
        if not is_ram(base, end - base):
            raise KernelPanic(
                f"the kernel dies of memory that is no RAM, in [{base:#x}, {end:#x})",
                kernel.generation,
            )


def _initcalls(kernel: Kernel, initcall: Initcall) -> None:
    kernel.phase = "early_initcalls"
    kernel.liveupdate.early_init()
    kernel.phase = "page_alloc_init_late"
    if kernel.stale_scratch is not None and kernel.pages.deferred:
        _mark_stale_pageblocks(kernel, *kernel.stale_scratch)
    kernel.pages.page_alloc_init_late()
    kernel.phase = "initcalls"
    cma_init_reserved_areas(kernel)  # core_initcall
    initcall(kernel, "subsys")
    boot_hugetlb.hugetlb_init(kernel)  # subsys_initcall
    if kernel.release.kho_init_level == "fs":
        kho_init(kernel)  # fs_initcall
    kernel.phase = "initcalls"
    _free_initrd_mem(kernel)  # rootfs_initcall
    initcall(kernel, "rootfs")
    initcall(kernel, "device")
    # late_initcalls, in the order of linking: kernel/, mm/memblock.c, mm/memfd_luo.c
    if kernel.release.kho_init_level == "late":
        kho_init(kernel)
        kernel.phase = "initcalls"
    kernel.liveupdate.late_init()
    kernel.reserve_mem.init()
    kernel.liveupdate.memfd_init()
    _free_initmem(kernel)
    kernel.phase = "running"
    if kernel.host is not None:
        kernel.host.checkpoint(kernel, "booted")


def _mark_stale_pageblocks(kernel: Kernel, array_phys: int, count: int) -> None:
    # kho_reserve_scratch frees its array on failure but keeps the pointer and the counter, and
    # deferred_init_memmap still asks kho_scratch_migratetype.
    if not array_phys:
        raise KernelPanic("BUG: kernel NULL pointer dereference in kho_scratch_overlap")
    shift = kernel.arch.page_shift
    areas = read_scratch_array(kernel.ram.read(array_phys, count * 16))
    kernel.pages.set_cma_ranges(
        (max(addr >> shift, start), min(addr + size >> shift, end))
        for addr, size in areas
        for start, end, _nid in kernel.pages.deferred
    )


def _free_initrd_mem(kernel: Kernel) -> None:
    # x86-64 frees the last page even where the initrd ends inside of it.
    start, end = kernel.initrd
    if end > start:
        if kernel.arch.name == "x86_64":
            end = -(-end // kernel.arch.page_size) * kernel.arch.page_size
        kernel.free_reserved_area(start, end, "initrd")


def _free_initmem(kernel: Kernel) -> None:
    start = kernel.kernel_range[0] + kernel.config.init_offset_bytes
    end = start + kernel.config.init_bytes
    what = "unused kernel"
    if kernel.arch.name == "x86_64":
        what += " image (initmem)"
    kernel.free_reserved_area(start, end, what)
