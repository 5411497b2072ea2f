"""``setup_arch`` on x86-64: from boot parameters to a NUMA-aware memblock.

Models ``arch/x86/kernel/setup.c``, ``ebda.c``, ``arch/x86/realmode/init.c``,
``arch/x86/mm/{init,numa}.c`` and ``mm/numa_memblks.c`` @ 7.3. Left out: EFI, MTRRs, ACPI and MP
tables (in memory that is not RAM), indirect setup_data, 1 GiB pages in the direct map, KASLR; nodes
are read from the machine where Linux reads the SRAT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.abi.boot_params import (
    BOOT_PARAMS_BYTES,
    E820_RAM,
    E820_RESERVED,
    KHO_DATA_BYTES,
    SETUP_DATA_BYTES,
    SETUP_KEXEC_KHO,
    BootParams,
    SetupData,
    parse_boot_params,
    parse_kho_data,
    parse_setup_data,
)
from khosim.errors import KernelPanic
from khosim.kernel import boot_memory, e820
from khosim.kernel.boot_cma import dma_contiguous_reserve
from khosim.kernel.boot_crashkernel import reserve_crashkernel
from khosim.kernel.corruption_check import setup_bios_corruption_check
from khosim.kernel.early_ioremap import early_fault, early_memremap
from khosim.kernel.memtest import early_memtest

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("setup_arch", "trap_init")

_MIB = 1 << 20
_GIB_SHIFT = 30
_PMD_SHIFT = 21
_PMD_BYTES = 1 << _PMD_SHIFT
_PAGE = 4096
_COMMAND_LINE_SIZE = 2048
_REALMODE_BYTES = 24576
_BIOS_RAM_SIZE_KB_PTR, _EBDA_PTR = 0x413, 0x40E
_BIOS_START_MIN, _BIOS_START_MAX = 0x20000, 0x9F000
_SETUP_DATA_MAX = 4096
_MAXMEM = 1 << 46
_CPU_ENTRY_AREA_BYTES = 0x3B000
_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1


def setup_arch(kernel: Kernel, entry: int, params_phys: int) -> None:
    """``setup_arch``: ends with memblock knowing memory, nodes and all that is taken."""
    if not kernel.hardware.is_ram(params_phys, BOOT_PARAMS_BYTES):
        raise KernelPanic(f"boot parameters at {params_phys:#x}: no RAM there")
    params = parse_boot_params(kernel.ram.read(params_phys, BOOT_PARAMS_BYTES))
    kernel.cmdline = _read_cmdline(kernel, params.cmd_line_ptr)
    kernel.kernel_range = (entry, entry + kernel.config.kernel_bytes)
    setup_data = _early_reserve_memory(kernel, params)
    table = e820.memory_setup(params)
    kernel.firmware_map = table

    kernel.phase = "parse_setup_data"
    for phys, data in setup_data:
        if data.type == SETUP_KEXEC_KHO:
            _add_kho(kernel, phys, data.len_bytes + SETUP_DATA_BYTES & _U32)

    kernel.phase = "parse_early_param"
    options = kernel.options
    options.parse_early(
        kernel.cmdline,
        lambda text: kernel.scratch_sizes.parse(text, kernel.printk, kernel.release),
        kernel.printk,
    )
    kernel.kho_enable = options.kho
    kernel.memblock.debug = options.memblock_debug
    table = _usable_e820(kernel, table)
    kernel.memblock.memblock_reserve_kern(kernel.kernel_range[1], kernel.config.brk_bytes)

    _memblock_setup(kernel, table)
    setup_bios_corruption_check(kernel)
    kernel.phase = "reserve_real_mode"
    if not kernel.memblock.memblock_phys_alloc_range(_REALMODE_BYTES, _PAGE, 0, _MIB):
        kernel.printk(f"No memory below 0x{_MIB:016x} for the real-mode trampoline")
    kernel.memblock.memblock_reserve(0, _MIB)
    kernel.memblock.memblock_clear_kho_scratch(0, _MIB)

    _init_mem_mapping(kernel, e820.end_of_ram(table))
    kernel.phase = "setup_log_buf"
    boot_memory.setup_log_buf(kernel, early=True)
    _reserve_initrd(kernel, params)
    _initmem_init(kernel)
    kernel.phase = "dma_contiguous_reserve"
    dma_contiguous_reserve(kernel, kernel.memblock.current_limit)  # the end of mapped memory
    kernel.phase = "reserve_crashkernel"
    reserve_crashkernel(kernel)
    kernel.phase = "e820__reserve_resources"
    # acpi_boot_init, io_apic_init_mappings and e820__reserve_resources: resources and their names.
    boot_memory.memblock_alloc_or_panic(kernel, 148 + 64 * len(table), "e820__reserve_resources")
    kernel.system_ram = [(addr, addr + size) for addr, size, kind in table if kind == E820_RAM]


def trap_init(kernel: Kernel) -> None:
    """``trap_init``: page tables for the CPU entry areas."""
    nr_tables = 2 + -(-kernel.config.nr_cpus * _CPU_ENTRY_AREA_BYTES // _PMD_BYTES)
    if not kernel.memblock.memblock_alloc(nr_tables * _PAGE, _PAGE):
        raise KernelPanic(f"set_pte_phys: could not allocate page for {nr_tables} page tables")


# -- before there is memory -----------------------------------------------------------------------


def _read_cmdline(kernel: Kernel, phys: int) -> str:
    # copy_bootdata: 2 KiB of whatever is there, through a direct map that grows with its faults.
    if not phys:
        return ""
    if phys + _COMMAND_LINE_SIZE > _MAXMEM:
        raise early_fault(kernel, phys, "command line")
    raw = early_memremap(kernel, phys, _COMMAND_LINE_SIZE) or b""
    return bytes(raw[: _COMMAND_LINE_SIZE - 1]).split(b"\0", 1)[0].decode("ascii", "replace")


def _early_reserve_memory(kernel: Kernel, params: BootParams) -> list[tuple[int, SetupData]]:
    # Returns the setup_data list as (address, header).
    memblock = kernel.memblock
    memblock.memblock_reserve_kern(kernel.kernel_range[0], kernel.config.kernel_bytes)
    memblock.memblock_reserve(0, 64 << 10)
    image, size = params.ramdisk_image, params.ramdisk_size
    if params.type_of_loader and image and size:
        memblock.memblock_reserve_kern(image, (image + size + _PAGE - 1 & -_PAGE & _U64) - image)
    found: list[tuple[int, SetupData]] = []
    seen: set[int] = set()
    phys = params.setup_data
    while phys:
        if phys in seen or len(found) >= _SETUP_DATA_MAX:
            # A cyclic list, which the kernel walks before it can print anything.
            raise KernelPanic("the kernel hangs on an endless setup_data list", kernel.generation)
        seen.add(phys)
        header = early_memremap(kernel, phys, SETUP_DATA_BYTES)
        if header is None:
            # parse_setup_data does not look before it leaps.
            kernel.printk("setup: failed to memremap setup_data entry")
            raise early_fault(kernel, phys, "setup_data")
        data = parse_setup_data(_first_bytes(kernel, header, SETUP_DATA_BYTES, phys))
        memblock.memblock_reserve_kern(phys, SETUP_DATA_BYTES + data.len_bytes)
        found.append((phys, data))
        phys = data.next
    start = _bios_start(kernel)
    memblock.memblock_reserve(start, _MIB - start)  # reserve_bios_regions
    return found


def _bios_start(kernel: Kernel) -> int:
    data = kernel.ram.read(0x400, 0x100)
    kilobytes = int.from_bytes(data[_BIOS_RAM_SIZE_KB_PTR - 0x400 :][:2], "little")
    start = kilobytes << 10
    if not _BIOS_START_MIN <= start <= _BIOS_START_MAX:
        start = _BIOS_START_MAX
    ebda = int.from_bytes(data[_EBDA_PTR - 0x400 :][:2], "little") << 4
    return ebda if _BIOS_START_MIN <= ebda < start else start


def _add_kho(kernel: Kernel, phys: int, data_len: int) -> None:
    # Maps what setup_data says is there and reads a struct kho_data from it, however long it is.
    addr, size = phys + SETUP_DATA_BYTES & _U64, data_len - SETUP_DATA_BYTES & _U64
    data = early_memremap(kernel, addr, size)
    if data is None:
        kernel.printk(f"setup: failed to memremap kho data (0x{addr:x}, 0x{size:x})")
        return
    kernel.kho_in.populate(*parse_kho_data(_first_bytes(kernel, data, KHO_DATA_BYTES, addr)))


def _first_bytes(kernel: Kernel, window: memoryview, len_bytes: int, phys: int) -> bytes:
    if len(window) < len_bytes:
        raise early_fault(kernel, phys + len(window), "setup_data")
    return bytes(window[:len_bytes])


def _usable_e820(kernel: Kernel, table: e820.Entries) -> e820.Entries:
    # parse_memopt, e820__finish_early_params, e820_add_kernel_range, trim_bios_range.
    limit = kernel.options.mem_limit_bytes
    if limit is not None and kernel.release.fix_mem_limit and kernel.is_kho_boot:
        kernel.printk("KHO: mem= is ignored after a handover")
    elif limit is not None:
        table = e820.update_table(e820.range_remove(table, limit, _U64, E820_RAM))
    start, end = kernel.kernel_range[0], kernel.kernel_range[1] + kernel.config.brk_bytes
    if not e820.mapped_all(table, start, end, E820_RAM):
        kernel.printk(".text .data .bss are not marked as E820_TYPE_RAM!")
        table = [*e820.range_remove(table, start, end), (start, end - start, E820_RAM)]
    bios = [
        (addr, min(size, _PAGE - addr), E820_RESERVED)
        for addr, size, type_ in table
        if addr < _PAGE and type_ == E820_RAM
    ]
    table = [*bios, *e820.range_remove(table, 0, _PAGE, E820_RAM)]
    return e820.update_table(e820.range_remove(table, 0xA0000, _MIB, E820_RAM))


def _memblock_setup(kernel: Kernel, table: e820.Entries) -> None:
    kernel.phase = "e820__memblock_setup"
    memblock = kernel.memblock
    # Direct-mapped memory ends at 1 MiB until the real page tables are up.
    memblock.memblock_set_current_limit(_MIB)
    memblock.memblock_allow_resize()
    for addr, size, type_ in table:
        if type_ == E820_RAM and addr + size <= _U64:
            memblock.memblock_add(addr, size)
    memblock.memblock_mark_kho_scratch(0, _MIB)
    memblock.memblock_trim_memory(_PAGE)
    if not memblock.memory.cnt:
        raise KernelPanic("no memory in the e820 map")


# -- the direct map -------------------------------------------------------------------------------


def _init_mem_mapping(kernel: Kernel, end_of_ram: int) -> None:
    # Nothing above the end of RAM in the E820 map is mapped, whatever memblock knows there.
    kernel.phase = "init_mem_mapping"
    memblock = kernel.memblock
    ranges = [
        (max(start << 12, _MIB), min(end << 12, end_of_ram))
        for start, end, _ in memblock.for_each_mem_pfn_range()
    ]
    ranges = [(start, end) for start, end in ranges if start < end]
    max_end = ranges[-1][1] if ranges else _MIB
    tables = _PageTables(kernel, ranges)
    # memory_map_top_down: a mapped PMD at the top first, then ever larger steps downwards.
    top = memblock.memblock_phys_alloc_range(_PMD_BYTES, _PMD_BYTES, _MIB, max_end)
    if top:
        memblock.memblock_phys_free(top, _PMD_BYTES)
        real_end = top + _PMD_BYTES
    else:
        kernel.printk("Failed to release memory for alloc_low_pages()")
        real_end = max(_MIB, max_end & -_PMD_BYTES)
    step, mapped, last = _PMD_BYTES, 0, real_end
    max_mapped, min_mapped = 0, real_end
    while last > _MIB:
        start = max((last - 1) & -step, _MIB) if last > step else _MIB
        mapped += tables.map_range(start, last, min_mapped, max_mapped)
        max_mapped = max_mapped or min(real_end, max_end)
        last = min_mapped = start
        if mapped >= step:
            step <<= 8
    if real_end < max_end:
        tables.map_range(real_end, max_end, min_mapped, max_mapped)
    kernel.set_mapped([(0, _MIB), *ranges])
    early_memtest(kernel, 0, max_end)
    memblock.memblock_set_current_limit(max_end)


class _PageTables:
    """The tables of the direct map: the first from the brk area, the others from memblock."""

    __slots__ = ("_brk", "_brk_left", "_kernel", "_lower", "_ranges", "_upper")

    def __init__(self, kernel: Kernel, ranges: list[tuple[int, int]]) -> None:
        self._kernel = kernel
        self._ranges = ranges
        # early_alloc_pgt_buf takes all of brk; mapping the first MiB took a PUD, PMD and PTE table.
        brk = kernel.kernel_range[1]
        self._brk = (brk + 3 * _PAGE, brk + kernel.config.brk_bytes)
        self._brk_left = (kernel.config.brk_bytes >> 12) - 3
        self._upper = {(0, 39), (0, _GIB_SHIFT)}
        self._lower = {0}

    def map_range(self, start: int, end: int, min_mapped: int, max_mapped: int) -> int:
        """``init_range_memory_mapping`` of [start, end): bytes mapped."""
        mapped = 0
        for range_start, range_end in self._ranges:
            low, high = max(range_start, start), min(range_end, end)
            if low >= high:
                continue
            mapped += high - low
            from_brk = max(low, self._brk[0]) >= min(high, self._brk[1])
            wanted = self._new_tables(low, high)
            if from_brk:
                used = min(wanted, self._brk_left)
                self._brk_left -= used
                wanted -= used
            self._alloc_low_pages(wanted, min_mapped, max_mapped)
        return mapped

    def _new_tables(self, start: int, end: int) -> int:
        # Tables at the edges may be shared with another range, those between cannot be.
        wanted = 0
        for shift in (39, _GIB_SHIFT):
            first, last = start >> shift, (end - 1) >> shift
            edges = {(first, shift), (last, shift)}
            wanted += last - first + 1 - len(edges & self._upper)
            self._upper |= edges
        for edge in (start, end):
            if edge & (_PMD_BYTES - 1) and edge >> _PMD_SHIFT not in self._lower:
                self._lower.add(edge >> _PMD_SHIFT)
                wanted += 1
        return wanted

    def _alloc_low_pages(self, nr_pages: int, low: int, high: int) -> None:
        # One table after the other, as many at once as fit side by side.
        kernel = self._kernel
        while nr_pages:
            gap = boot_memory.top_gap(kernel, _PAGE, -1, max(low, _PAGE), high)
            if low >= high or gap is None:
                raise KernelPanic("alloc_low_pages: can not alloc memory")
            start, end = gap
            fit = min(nr_pages, (end - start) // _PAGE)
            phys = kernel.memblock.memblock_phys_alloc_range(fit * _PAGE, _PAGE, start, end)
            if not phys:
                raise KernelPanic("alloc_low_pages: can not alloc memory")
            if not kernel.hardware.is_ram(phys, fit * _PAGE):
                # A table of ones maps nothing: the kernel dies before it has made many of them.
                raise early_fault(kernel, phys, "page table")
            nr_pages -= fit


def _reserve_initrd(kernel: Kernel, params: BootParams) -> None:
    start, size = params.ramdisk_image, params.ramdisk_size
    if not params.type_of_loader or not start or not size:
        return
    end = start + size + _PAGE - 1 & -_PAGE
    if end >> 64:
        # The wrapped end looks mapped to pfn_range_is_mapped, and whoever unpacks it faults.
        raise KernelPanic(f"BUG: unable to handle page fault: initrd at {start:#x}")
    kernel.initrd = (start, start + size)
    if kernel.is_mapped(start, end):
        return
    kernel.phase = "relocate_initrd"
    # mem= left it outside of the direct map.
    area = size + _PAGE - 1 & -_PAGE
    memblock = kernel.memblock
    phys = memblock.memblock_phys_alloc_range(area, _PAGE, 0, memblock.current_limit)
    if not phys:
        raise KernelPanic(f"Cannot find place for new RAMDISK of size {size}")
    for ram_start, ram_end in kernel.hardware.ram_ranges:
        # Left out: the ones that are read where there is no RAM.
        low, high = max(start, ram_start), min(start + size, ram_end)
        if low < high:
            kernel.ram.copy(low, phys + low - start, high - low, kernel.by("relocate_initrd"))
    kernel.printk(
        f"Move RAMDISK from [mem {start:#012x}-{start + size - 1:#012x}] to "
        f"[mem {phys:#012x}-{phys + size - 1:#012x}]"
    )
    kernel.initrd = (phys, phys + size)
    memblock.memblock_phys_free(start, end - start)


def _initmem_init(kernel: Kernel) -> None:
    kernel.phase = "initmem_init"
    memblock = kernel.memblock
    low, high = memblock.memblock_start_of_DRAM(), memblock.memblock_end_of_DRAM()
    # numa_cleanup_meminfo: cut to memory, neighbours of one node joined.
    blocks: list[tuple[int, int, int]] = []
    for start, end, nid in kernel.hardware.memory_map.node_ranges:
        if not memblock.memblock_overlaps_region(memblock.memory, start, end - start):
            continue
        start, end = max(start, low), min(end, high)
        if blocks and blocks[-1][2] == nid:
            start = blocks.pop()[0]
        blocks.append((start, end, nid))
    everything = [(0, memblock.current_limit, 0)]  # dummy_numa_init: up to the end of RAM
    if not _numa_init(kernel, blocks) and not _numa_init(kernel, everything):
        # Memory above, such as scratch of a hostile handover, leaves all nodes offline.
        raise KernelPanic(
            "BUG: kernel NULL pointer dereference: no NUMA node is online", kernel.generation
        )
    nodes = {nid for _, _, nid in memblock.for_each_mem_pfn_range() if nid >= 0}
    boot_memory.alloc_node_data(kernel, sorted(nodes))


def _numa_init(kernel: Kernel, blocks: list[tuple[int, int, int]]) -> bool:
    # Up to numa_register_nodes, which wants a node for all memory but 1 MiB.
    memblock = kernel.memblock
    for start, end, nid in blocks:
        memblock.memblock_set_node(start, end - start, nid)
    # numa_clear_kernel_node_hotplug: reserved memory gets the node of its memory.
    for start, end, nid in blocks:
        memblock.memblock_set_node(start, end - start, nid, True)
    return memblock.memblock_validate_numa_coverage(_MIB)
