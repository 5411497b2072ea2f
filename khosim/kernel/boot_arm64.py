"""``setup_arch`` on arm64: from a device tree to a NUMA-aware memblock.

Models ``arch/arm64/kernel/setup.c``, ``arch/arm64/mm/{init,mmu,fixmap}.c``, ``drivers/of/fdt.c``,
``drivers/of/of_numa.c`` and ``mm/arch_numa.c`` @ 7.3 without ACPI: memory, nodes, command line,
initrd and the handover come from the device tree; of EFI there is ``efi-init.c:reserve_regions``.
The linear map consists of single pages, as it does by default on CPUs that cannot split larger
ones. Left out: the ``reserved-memory`` node, KASLR, distances between nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from khosim.abi import fdt
from khosim.errors import KernelPanic
from khosim.kernel import boot_memory
from khosim.kernel.boot_cma import dma_contiguous_reserve
from khosim.kernel.boot_crashkernel import reserve_crashkernel
from khosim.kernel.early_ioremap import early_fault
from khosim.kernel.memblock_regions import MEMBLOCK_KHO_SCRATCH
from khosim.kernel.memtest import early_memtest

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("setup_arch",)

_PHYS_MASK_SHIFT = 52
_MAX_FDT_BYTES = 2 << 20
_COMMAND_LINE_SIZE = 2048
_MAX_USABLE_RANGES = 2
_MAX_NUMNODES = 64
_MEMSTART_ALIGN = 1 << 30
_LINEAR_BYTES = 1 << 47
"""``PAGE_END - PAGE_OFFSET`` with virtual addresses of 48 bits."""
_U64 = (1 << 64) - 1


def setup_arch(kernel: Kernel, entry: int, dtb_phys: int) -> None:
    """``setup_arch``: ends with memblock knowing memory, nodes and all that is taken."""
    kernel.kernel_range = (entry, entry + kernel.config.kernel_bytes)
    tree = _fixmap_remap_fdt(kernel, dtb_phys)
    kernel.memblock.memblock_reserve(dtb_phys, len(tree))
    if fdt.fdt_check_header(tree):
        raise KernelPanic(f"Error: invalid device tree blob: PA={dtb_phys:#x}")
    kernel.boot_fdt_phys = dtb_phys
    chosen = _scan_nodes(kernel, tree)

    kernel.phase = "parse_early_param"
    options = kernel.options
    options.parse_early(
        kernel.cmdline,
        lambda text: kernel.scratch_sizes.parse(text, kernel.printk, kernel.release),
        kernel.printk,
    )
    kernel.kho_enable = options.kho
    kernel.memblock.debug = options.memblock_debug
    if kernel.config.efi:
        _reserve_regions(kernel)
    _arm64_memblock_init(kernel, tree, chosen)
    _paging_init(kernel)
    # Nodes and properties as structures, several times their size.
    kernel.phase = "unflatten_device_tree"
    boot_memory.memblock_alloc_or_panic(
        kernel, len(tree) * 5 & -8, "early_init_dt_alloc_memory_arch"
    )
    _bootmem_init(kernel, tree)


def _fixmap_remap_fdt(kernel: Kernel, dtb_phys: int) -> memoryview:
    # Also what the kernel does when it gets NULL: it says so and spins.
    size = 0
    if dtb_phys and not dtb_phys % 8 and kernel.hardware.is_ram(dtb_phys, 40):
        raw = kernel.ram.read(dtb_phys, 8)
        if int.from_bytes(raw[:4], "big") == fdt.FDT_MAGIC:
            size = int.from_bytes(raw[4:], "big")
    if not 0 < size <= _MAX_FDT_BYTES or not kernel.hardware.is_ram(dtb_phys, size):
        raise KernelPanic(f"Error: invalid device tree blob: PA={dtb_phys:#x}")
    return memoryview(kernel.ram.read(dtb_phys, size))


def _scan_nodes(kernel: Kernel, tree: memoryview) -> int:
    # early_init_dt_scan_nodes; returns the offset of /chosen, or a negative number.
    memblock = kernel.memblock
    chosen = fdt.fdt_path_offset(tree, "/chosen")
    if chosen < 0:
        chosen = fdt.fdt_path_offset(tree, "/chosen@0")
    cells = _root_cells(tree, kernel.warn)
    for start, length in _addr_sizes(tree, chosen, "linux,elfcorehdr", cells, only=1):
        kernel.options.elfcorehdr_addr = start
        kernel.elfcorehdr_bytes = length
    kernel.cmdline = _text(tree, chosen, "bootargs")
    for start, length, _nid in _memory_nodes(tree, cells):
        _add_memory(kernel, start, length)
    usable = _addr_sizes(tree, chosen, "linux,usable-memory-range", cells)[:_MAX_USABLE_RANGES]
    if usable:
        memblock.memblock_cap_memory_range(*usable[0])
        for start, length in usable[1:]:
            if length:
                memblock.memblock_add(start, length)
    kernel.phase = "early_init_dt_check_kho"
    handover = _addr_sizes(tree, chosen, "linux,kho-fdt", cells, only=1)
    scratch = _addr_sizes(tree, chosen, "linux,kho-scratch", cells, only=1)
    if handover and scratch:
        kernel.kho_in.populate(*handover[0], *scratch[0])
    return chosen


def _reserve_regions(kernel: Kernel) -> None:
    # drivers/firmware/efi/efi-init.c:reserve_regions: forget what the device tree says of memory.
    kernel.phase = "efi_init"
    memory = kernel.memblock.memory
    keeps = kernel.release.efi_keeps_scratch and kernel.is_kho_boot
    for base, end, flags in list(zip(memory.base, memory.end, memory.flags, strict=True)):
        if not (keeps and flags & MEMBLOCK_KHO_SCRATCH):
            kernel.memblock.memblock_remove(base, end - base)
    for start, end in kernel.hardware.ram_ranges:
        _add_memory(kernel, start, end - start)


def _add_memory(kernel: Kernel, base: int, size: int) -> None:
    # early_init_dt_add_memory_arch: whole pages only.
    page = kernel.arch.page_size
    skip = -base % page
    if not size:
        return
    if size < page - base % page:
        kernel.printk(f"OF: fdt: Ignoring memory block 0x{base:x} - 0x{base + size:x}")
        return
    if skip:
        base, size = base + skip, size - skip
    kernel.memblock.memblock_add(base, size & -page)


def _text(tree: memoryview, node: int, name: str) -> str:
    value, _ = fdt.fdt_getprop(tree, node, name) if node >= 0 else (None, 0)
    raw = bytes(value).split(b"\0", 1)[0] if value is not None else b""
    return raw[: _COMMAND_LINE_SIZE - 1].decode("ascii", "replace")


def _root_cells(
    tree: memoryview, warn: Callable[[str], None] | None = None
) -> tuple[int, int]:
    # early_init_dt_scan_root: two C ints, 1 where the tree does not say.
    cells = []
    for name in ("#address-cells", "#size-cells"):
        value, _ = fdt.fdt_getprop(tree, 0, name)
        if value is None and warn is not None:
            warn(f"WARNING: No '{name}' in root node")
        cells.append(1 if value is None else _s32(int.from_bytes(value[:4], "big")))
    return cells[0], cells[1]


def _s32(value: int) -> int:
    return (value + (1 << 31) & (1 << 32) - 1) - (1 << 31)


def _addr_sizes(
    tree: memoryview, node: int, name: str, cells: tuple[int, int], only: int = 0
) -> list[tuple[int, int]]:
    # of_flat_dt_get_addr_size_prop, in C's int arithmetic; ``only``: so many pairs or none. A
    # division by no cells at all gives 0 on arm64, so that no length fits.
    value, length = fdt.fdt_getprop(tree, node, name) if node >= 0 else (None, 0)
    step = _s32(4 * (cells[0] + cells[1]))
    if value is None or length <= 0 or step == 0 or length % step or length // step <= 0:
        return []
    if only and length != only * step:
        return []
    split = 4 * cells[0]
    if not 0 <= split <= step:
        # dt_mem_next_cell counts from there until it has run off the device tree.
        raise KernelPanic(f"Unable to handle kernel paging request: the end of {name}")
    pairs = []
    for at in range(0, length, step):
        start = int.from_bytes(value[at : at + split], "big") & _U64
        pairs.append((start, int.from_bytes(value[at + split : at + step], "big") & _U64))
    return pairs


def _number(tree: memoryview, node: int, name: str) -> int | None:
    # of_read_number: any count of cells, the last two of which stay.
    value, length = fdt.fdt_getprop(tree, node, name) if node >= 0 else (None, 0)
    if value is None:
        return None
    return int.from_bytes(bytes(value)[: length & ~3], "big") & _U64


def _memory_nodes(
    tree: memoryview, cells: tuple[int, int]
) -> list[tuple[int, int, int]]:
    # early_init_dt_scan_memory and of_numa_parse_memory_nodes: (start, size, nid or -1).
    found = []
    node = fdt.fdt_first_subnode(tree, 0)
    while node >= 0:
        if _text(tree, node, "device_type") == "memory" and _is_available(tree, node):
            numa, length = fdt.fdt_getprop(tree, node, "numa-node-id")
            nid = int.from_bytes(numa, "big") if numa is not None and length == 4 else -1
            pieces = _addr_sizes(tree, node, "linux,usable-memory", cells)
            for start, size in pieces or _addr_sizes(tree, node, "reg", cells):
                found.append((start, size, nid))
        node = fdt.fdt_next_subnode(tree, node)
    return found


def _is_available(tree: memoryview, node: int) -> bool:
    status, _ = fdt.fdt_getprop(tree, node, "status")
    return status is None or _text(tree, node, "status") in ("ok", "okay")


def _arm64_memblock_init(kernel: Kernel, tree: memoryview, chosen: int) -> None:
    kernel.phase = "arm64_memblock_init"
    memblock = kernel.memblock
    if not memblock.memory.cnt:
        raise KernelPanic("no memory in the device tree")
    memblock.memblock_remove(1 << _PHYS_MASK_SHIFT, _U64)
    _fit_linear_region(kernel)
    start, end = kernel.kernel_range
    if kernel.options.mem_limit_bytes is not None:
        memblock.memblock_mem_limit_remove_map(kernel.options.mem_limit_bytes)
        memblock.memblock_add(start, end - start)
    _add_initrd(kernel, tree, chosen)
    memblock.memblock_reserve(start, end - start)
    # early_init_fdt_scan_reserved_mem
    header_addr, header_size = kernel.options.elfcorehdr_addr, kernel.elfcorehdr_bytes
    if header_addr is not None and header_size:
        if memblock.memblock_is_region_reserved(header_addr, header_size):
            kernel.printk("OF: reserved mem: elfcorehdr is overlapped")
        else:
            memblock.memblock_reserve(header_addr, header_size)
            kernel.printk(
                f"OF: reserved mem: Reserving {header_size >> 10} KiB of memory at "
                f"0x{header_addr:x} for elfcorehdr"
            )
    for i in range(max(0, fdt.fdt_num_mem_rsv(tree))):
        _, base, size = fdt.fdt_get_mem_rsv(tree, i)
        if not size:
            break
        memblock.memblock_reserve(base, size)


def _fit_linear_region(kernel: Kernel) -> None:
    # What the linear map cannot reach goes: from the top, or else from the bottom.
    memblock = kernel.memblock
    start = memblock.memblock_start_of_DRAM() & -_MEMSTART_ALIGN
    if memblock.memblock_end_of_DRAM() - start <= _LINEAR_BYTES:
        return
    kernel.printk("Memory doesn't fit in the linear mapping, VA_BITS too small")
    memblock.memblock_remove(max(start + _LINEAR_BYTES, kernel.kernel_range[1]), _U64)
    if start + _LINEAR_BYTES < memblock.memblock_end_of_DRAM():
        start = memblock.memblock_end_of_DRAM() - _LINEAR_BYTES + _MEMSTART_ALIGN - 1
        memblock.memblock_remove(0, start & -_MEMSTART_ALIGN)


def _add_initrd(kernel: Kernel, tree: memoryview, chosen: int) -> None:
    start, end = (_number(tree, chosen, f"linux,initrd-{edge}") for edge in ("start", "end"))
    if start is None or end is None or start >= end:
        return
    page = kernel.arch.page_size
    memblock = kernel.memblock
    base = start & -page
    size = ((end + page - 1) & -page) - base
    first = memblock.memblock_start_of_DRAM()
    if base < first or base + size > first + _LINEAR_BYTES:
        kernel.warn(
            "initrd not fully accessible via the linear mapping -- please check your bootloader ..."
        )
        return
    memblock.memblock_add(base, size)
    memblock.memblock_clear_nomap(base, size)
    memblock.memblock_reserve(base, size)
    kernel.initrd = (start, end)


def _paging_init(kernel: Kernel) -> None:
    kernel.phase = "paging_init"
    memblock = kernel.memblock
    page = kernel.arch.page_size
    ranges = [
        (start * page, end * page) for start, end, _nid in memblock.for_each_mem_pfn_range()
    ]
    # map_mem: a table of each level for each piece of the linear map that such a table covers.
    entries = page // 8
    covered = page * entries
    tables = 0
    while covered < 1 << 48:
        pieces = _pieces(ranges, covered)
        tables += pieces
        covered *= entries
    if boot_memory.alloc_units(kernel, page, tables, -1, low=0):
        raise KernelPanic("Failed to allocate page table page")
    if not kernel.hardware.is_ram(memblock.allocations[-1][0], page):
        # Memory that is no RAM, of a hostile scratch array or device tree: an external abort.
        raise early_fault(kernel, memblock.allocations[-1][0], "page table")
    kernel.set_mapped(ranges)
    memblock.memblock_allow_resize()


def _pieces(ranges: list[tuple[int, int]], covered: int) -> int:
    # How many aligned pieces of ``covered`` bytes the ranges touch.
    pieces, last = 0, -1
    for start, end in ranges:
        first = max(start // covered, last + 1)
        last = max(last, (end - 1) // covered)
        pieces += max(0, last - first + 1)
    return pieces


def _bootmem_init(kernel: Kernel, tree: memoryview) -> None:
    kernel.phase = "bootmem_init"
    memblock = kernel.memblock
    cells = _root_cells(tree)
    low, high = memblock.memblock_start_of_DRAM(), memblock.memblock_end_of_DRAM()
    early_memtest(kernel, low, high)
    ranges = sorted(
        (max(start, low), min(start + size, high), nid)
        for start, size, nid in _memory_nodes(tree, cells)
        if nid >= 0 and size
    )
    ranges = [(start, end, nid) for start, end, nid in ranges if start < end]
    nodes = {nid for _, _, nid in ranges} | set(kernel.hardware.memory_map.online_nodes)
    if not _set_nodes(kernel, ranges):
        # dummy_numa_init: everything is node 0.
        memblock.memblock_set_node(0, _U64, -1)
        memblock.memblock_set_node(0, _U64, -1, True)
        nodes = {0}
        _set_nodes(kernel, [(low, high, 0)])
    boot_memory.alloc_node_data(kernel, sorted(nodes))
    kernel.phase = "dma_contiguous_reserve"
    dma_contiguous_reserve(kernel, kernel.arch.low_address_limit + 1)
    kernel.phase = "reserve_crashkernel"
    reserve_crashkernel(kernel)


def _set_nodes(kernel: Kernel, ranges: list[tuple[int, int, int]]) -> bool:
    if not ranges or any(nid >= _MAX_NUMNODES for _, _, nid in ranges):
        return False
    memblock = kernel.memblock
    for reserved in (False, True):
        for start, end, nid in ranges:
            memblock.memblock_set_node(start, end - start, nid, reserved)
    return memblock.memblock_validate_numa_coverage(0)
