"""What a booting kernel takes from memblock before the page allocator is up.

Models the boot-time users of ``mm/memblock.c`` @ 7.3 that decide how much scratch a kernel wants:
``kernel/printk/printk.c:setup_log_buf``, ``mm/numa.c:alloc_node_data``, ``mm/sparse.c`` and
``mm/sparse-vmemmap.c`` (the memmap), ``mm/percpu.c:pcpu_embed_first_chunk``,
``mm/mm_init.c:alloc_large_system_hash`` and ``kernel/dma/swiotlb.c``. Sizes follow the kernel's
formulas. Small allocations that follow each other are made as one of their total size; those that
boot gives back at once are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.errors import KernelPanic
from khosim.kernel.memblock import MEMBLOCK_KHO_SCRATCH, MEMBLOCK_NONE

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = (
    "alloc_large_system_hashes",
    "alloc_node_data",
    "alloc_offline_node_data",
    "alloc_units",
    "calc_nr_kernel_pages",
    "memblock_alloc_or_panic",
    "setup_command_line",
    "setup_log_buf",
    "setup_per_cpu_areas",
    "sparse_init",
    "swiotlb_init",
    "top_gap",
)

_SMP_CACHE_BYTES = 64
_STRUCT_PAGE_BYTES = 64
_MEM_SECTION_BYTES = 16
_SUBSECTION_BYTES = 2 << 20
_MAX_PHYSMEM_BITS = {("x86_64", 12): 46, ("arm64", 12): 48, ("arm64", 14): 52, ("arm64", 16): 52}
_PGDAT_BYTES = {"x86_64": 0x30C0, "arm64": 0x1540}
_PRB_AVGBITS = 5
_PRB_DESC_BYTES = 24
_PRINTK_INFO_BYTES = 88
_LOG_CPU_MAX_BUF_BYTES = 1 << 12
_PCPU_MIN_UNIT_BYTES = 32 << 10
_IO_TLB_SHIFT = 11
_IO_TLB_MIN_SLABS = (1 << 20) >> _IO_TLB_SHIFT
_IO_TLB_SEGSIZE = 128
_IO_TLB_SLOT_BYTES = 24
_ADAPT_SCALE_BYTES = 64 << 30
_NOLEAKTRACE = 1


def memblock_alloc_or_panic(kernel: Kernel, size: int, func: str) -> int:
    """``memblock_alloc_or_panic`` of ``size`` bytes with cache line alignment, for ``func``."""
    return kernel.memblock.memblock_alloc_or_panic(size, _SMP_CACHE_BYTES, func)


def setup_log_buf(kernel: Kernel, early: bool) -> None:
    """``setup_log_buf``: a larger log than the built-in one, with its descriptors.

    What cannot be had is given back and tried again when the kernel calls the second time.
    """
    if kernel.log_buf_phys:
        return
    options = kernel.options
    if not early and not options.log_buf_len_bytes and kernel.config.nr_cpus > 1:
        # log_buf_add_cpu
        built_in = 1 << kernel.config.log_buf_shift
        extra = (kernel.config.nr_cpus - 1) * _LOG_CPU_MAX_BUF_BYTES
        if extra > built_in // 2:
            options.grow_log_buf(extra + built_in)
    wanted = options.log_buf_len_bytes
    if not wanted:
        return
    memblock = kernel.memblock
    records = wanted >> _PRB_AVGBITS
    sizes = (
        (wanted, "text"),
        (records * _PRB_DESC_BYTES, "desc"),
        (records * _PRINTK_INFO_BYTES, "info"),
    )
    done: list[tuple[int, int]] = []
    by = kernel.by("setup_log_buf")
    for size, what in sizes:
        phys = memblock.memblock_alloc(size, 8)
        if not phys:
            kernel.printk(f"printk: log_buf_len: {size} {what} bytes not available")
            for start, length in reversed(done):
                memblock.memblock_phys_free(start, length)
            return
        kernel.ram.zero(phys, size, by)
        done.append((phys, size))
    kernel.log_buf_phys = done[0][0]


def alloc_node_data(kernel: Kernel, nodes: list[int]) -> None:
    """``alloc_node_data`` for each of ``nodes``."""
    size = _PGDAT_BYTES[kernel.arch.name]
    for nid in nodes:
        phys = kernel.memblock.memblock_phys_alloc_try_nid(size, _SMP_CACHE_BYTES, nid)
        if not phys:
            raise KernelPanic(f"Cannot allocate {size} bytes for node {nid} data")
        kernel.ram.zero(phys, size, kernel.by("alloc_node_data"))


def alloc_offline_node_data(kernel: Kernel, nodes: list[int]) -> None:
    """``alloc_offline_node_data``: for nodes that setup_arch found no memory on (x86-64)."""
    for _ in nodes:
        size = _PGDAT_BYTES[kernel.arch.name]
        phys = memblock_alloc_or_panic(kernel, size, "alloc_offline_node_data")
        kernel.ram.zero(phys, size, kernel.by("alloc_offline_node_data"))


# -- the memmap ---------------------------------------------------------------------------------


def sparse_init(kernel: Kernel) -> None:
    """``sparse_init``: struct pages for every section that has memory, on its own node."""
    kernel.phase = "sparse_init"
    sections = _memblocks_present(kernel)
    tables = _VmemmapTables(kernel)
    for nid, runs in sections:
        _sparse_init_nid(kernel, nid, runs, tables)


def _memblocks_present(kernel: Kernel) -> list[tuple[int, list[tuple[int, int]]]]:
    # memory_present for each range; returns (nid, runs of sections) as sparse_init walks them.
    arch, memblock = kernel.arch, kernel.memblock
    bits = arch.section_bytes.bit_length() - 1
    per_root = arch.page_size // _MEM_SECTION_BYTES
    roots_total = (1 << (_MAX_PHYSMEM_BITS[arch.name, arch.page_shift] - bits)) // per_root
    memblock_alloc_or_panic(kernel, 8 * roots_total, "memblocks_present")
    pfn_shift = bits - arch.page_shift
    groups: list[tuple[int, list[tuple[int, int]]]] = []
    last = last_root = -1
    for start_pfn, end_pfn, nid in memblock.for_each_mem_pfn_range():
        nid = max(nid, 0)
        first, end = start_pfn >> pfn_shift, ((end_pfn - 1) >> pfn_shift) + 1
        for root in range(max(first // per_root, last_root + 1), (end - 1) // per_root + 1):
            last_root = root
            if not memblock.memblock_alloc_node(arch.page_size, _SMP_CACHE_BYTES, nid):
                raise KernelPanic(
                    f"sparse_index_alloc: Failed to allocate {arch.page_size} bytes nid={nid}"
                )
        first = max(first, last + 1)  # a section belongs to the node of its first range
        if first >= end:
            continue
        kernel.present_sections.append((first, end))
        if groups and groups[-1][0] == nid:
            groups[-1][1].append((first, end))
        else:
            groups.append((nid, [(first, end)]))
        last = end - 1
    kernel.note_present_sections()
    return groups


class _VmemmapTables:
    """Which page tables of the memmap exist already; they are shared by neighbouring sections."""

    __slots__ = ("lower_shift", "seen_lower", "seen_upper", "unit", "upper_shift")

    def __init__(self, kernel: Kernel) -> None:
        arch = kernel.arch
        section_map = (arch.section_bytes >> arch.page_shift) * _STRUCT_PAGE_BYTES
        pmd_shift = 2 * arch.page_shift - 3
        entries_shift = arch.page_shift - 3
        if section_map >= 1 << pmd_shift:
            # vmemmap_populate_hugepages: PMD blocks under a table for each PUD entry.
            self.unit = 1 << pmd_shift
            self.lower_shift = pmd_shift + entries_shift
        else:
            self.unit = arch.page_size
            self.lower_shift = pmd_shift
        self.upper_shift = self.lower_shift + entries_shift
        self.seen_lower = self.seen_upper = -1

    def new_tables(self, start: int, end: int) -> int:
        """How many tables the memmap bytes [start, end) need that are not there yet."""
        first = max(start >> self.lower_shift, self.seen_lower + 1)
        self.seen_lower = (end - 1) >> self.lower_shift
        upper = max(start >> self.upper_shift, self.seen_upper + 1)
        self.seen_upper = (end - 1) >> self.upper_shift
        return max(0, self.seen_lower - first + 1) + max(0, self.seen_upper - upper + 1)


def _sparse_init_nid(
    kernel: Kernel, nid: int, runs: list[tuple[int, int]], tables: _VmemmapTables
) -> None:
    arch = kernel.arch
    nr_sections = sum(end - first for first, end in runs)
    # struct mem_section_usage: rcu head, a bitmap of subsections, a byte for each pageblock.
    blocks = arch.section_bytes >> (arch.page_shift + arch.pageblock_order)
    usage = 16 + arch.section_bytes // _SUBSECTION_BYTES // 8 + (blocks + 7 & -8)
    if not kernel.memblock.memblock_alloc_node(usage * nr_sections, _SMP_CACHE_BYTES, nid):
        raise KernelPanic(f"Failed to allocate usemap for node {nid}")
    section_map = (arch.section_bytes >> arch.page_shift) * _STRUCT_PAGE_BYTES
    unit, page = tables.unit, arch.page_size
    for first, end in runs:
        nr_tables = tables.new_tables(first * section_map, end * section_map)
        wanted = (end - first) * section_map // unit
        left = alloc_units(kernel, page, nr_tables, nid)
        if not left:
            left = alloc_units(kernel, unit, wanted, nid)
            if left and unit > page:
                # No block of a PMD's size any more: base pages and their tables.
                pages = left * (unit // page)
                left = alloc_units(kernel, page, left + pages, nid)
        if left:
            raise KernelPanic(f"Failed to allocate memmap for section {end - 1}")


def alloc_units(
    kernel: Kernel, unit: int, count: int, nid: int, low: int | None = None
) -> int:
    """``count`` allocations of ``unit`` bytes aligned to it, on ``nid`` or elsewhere.

    Wanted above ``low``, by default the memory that old DMA devices reach.

    One call for all that fit side by side: ``n`` units land where ``n`` single calls would, in
    the highest gap that has room. Returns how many could not be had.
    """
    memblock = kernel.memblock
    low = kernel.arch.dma_address if low is None else low
    while count:
        gap = None if count == 1 else top_gap(kernel, unit, nid, low, memblock.current_limit)
        if gap is None:
            # No room above the wanted address, or on this node: the single call falls back.
            if not memblock.memblock_alloc_try_nid_raw(unit, unit, low, _NOLEAKTRACE, nid):
                return count
            count -= 1
            continue
        start, end = gap
        fit = min(count, (end - start) // unit)
        if not memblock.memblock_alloc_range_nid(fit * unit, unit, start, end, nid, True):
            return count
        count -= fit
    return 0


def top_gap(kernel: Kernel, unit: int, nid: int, low: int, high: int) -> tuple[int, int] | None:
    """The highest free range in ``[low, high)`` on ``nid`` (-1: any) for a unit aligned to itself.

    A top-down allocation of one unit goes to its end, and further ones below it.
    """
    memblock = kernel.memblock
    flags = MEMBLOCK_KHO_SCRATCH if memblock.kho_scratch_only else MEMBLOCK_NONE
    for start, end, _nid in memblock.for_each_free_mem_range(nid, flags, True):
        if end > low and start < high:
            start = (max(start, low) + unit - 1) & -unit
            end = min(end, high) & -unit
            if start < end:
                return start, end
    return None


# -- start_kernel -------------------------------------------------------------------------------


def setup_command_line(kernel: Kernel) -> None:
    """``setup_command_line``: the command line, once to keep and once to cut up."""
    size = len(kernel.cmdline) + 1
    memblock_alloc_or_panic(kernel, (size + 63 & -64) + size, "setup_command_line")


def setup_per_cpu_areas(kernel: Kernel) -> None:
    """``pcpu_embed_first_chunk``: per-cpu areas of all CPUs, the unused tails given back."""
    kernel.phase = "setup_per_cpu_areas"
    arch, memblock = kernel.arch, kernel.memblock
    page = arch.page_size
    groups = _cpu_groups(kernel)
    size_sum = (kernel.config.percpu_bytes + page - 1) & -page
    atom = 2 << 20 if arch.name == "x86_64" else page
    unit, per_alloc = _percpu_unit(size_sum, atom, page, [count for _, count in groups])
    info = memblock.memblock_alloc(page, page)
    areas = memblock.memblock_alloc(page, _SMP_CACHE_BYTES)
    placed = []
    for nid, count in groups:
        nr_units = -(-count // per_alloc) * per_alloc
        size = nr_units * unit
        phys = memblock.memblock_alloc_try_nid(size, atom, arch.dma_address, 0, nid)
        if not phys:
            raise KernelPanic("cannot initialize percpu area (err=-12)")
        placed.append((phys, count, nr_units))
    # Units beyond the CPUs and the tails of the others.
    for phys, count, nr_units in placed:
        for i in range(nr_units):
            keep = size_sum if i < count else 0
            if keep < unit:
                memblock.memblock_phys_free(phys + i * unit + keep, unit - keep)
    # pcpu_setup_first_chunk: its maps, lists and the first chunk's bitmaps.
    maps = 64 + 12 * kernel.config.nr_cpus + 16 * len(groups) + size_sum // 64
    memblock_alloc_or_panic(kernel, maps, "pcpu_setup_first_chunk")
    for phys in (info, areas):
        if phys:
            memblock.memblock_phys_free(phys, page)


def _cpu_groups(kernel: Kernel) -> list[tuple[int, int]]:
    """``(node, CPUs)`` in the order in which the nodes' first CPUs come."""
    nr_cpus = kernel.config.nr_cpus
    nodes = list(kernel.config.cpu_nodes[:nr_cpus])
    known = kernel.memory_nodes() or [0]
    nodes += [known[cpu % len(known)] for cpu in range(len(nodes), nr_cpus)]
    groups: dict[int, int] = {}
    for nid in nodes:
        groups[nid] = groups.get(nid, 0) + 1
    return [(nid if nid in known else -1, count) for nid, count in groups.items()]


def _percpu_unit(size_sum: int, atom: int, page: int, counts: list[int]) -> tuple[int, int]:
    """``pcpu_build_alloc_info``: (unit size in bytes, units per allocation of ``atom``)."""
    min_unit = max(size_sum, _PCPU_MIN_UNIT_BYTES)
    alloc = -(-min_unit // atom) * atom
    best = 0
    last_allocs = 1 << 31
    total = sum(counts)
    for units in range(alloc // min_unit, 0, -1):
        if alloc % units or alloc // units % page:
            continue
        allocs = sum(-(-count // units) for count in counts)
        if allocs * units - total > total // 3:
            continue  # wastes more than a third
        if allocs > last_allocs:
            break
        last_allocs, best = allocs, units
    return alloc // best, best


def alloc_large_system_hashes(kernel: Kernel) -> None:
    """``vfs_caches_init_early``: dentry and inode hashes, unless they are spread over nodes."""
    if len(kernel.memory_nodes()) > 1:
        return  # hashdist: allocated by vmalloc later
    page, page_shift = kernel.arch.page_size, kernel.arch.page_shift
    nr_kernel_pages = kernel.nr_kernel_pages
    for scale, bucket, low_limit, name in (
        (13, 8, 2, "Dentry cache"),
        (14, 8, 0, "Inode-cache"),
    ):
        entries = nr_kernel_pages
        per_mib = (1 << 20) >> page_shift
        entries = -(-entries // per_mib) * per_mib
        adapt = _ADAPT_SCALE_BYTES >> page_shift
        while adapt < entries:
            scale += 1
            adapt <<= 2
        entries = entries << page_shift >> scale
        if entries * bucket < page:
            entries = page // bucket
        entries = 1 << (entries - 1).bit_length()
        limit = min((nr_kernel_pages << page_shift >> 4) // bucket, 0x80000000)
        entries = min(max(entries, low_limit), limit)
        size = bucket << (entries.bit_length() - 1)
        while not kernel.memblock.memblock_alloc(size, _SMP_CACHE_BYTES):
            if size <= page:
                raise KernelPanic(f"Failed to allocate {name} hash table")
            size >>= 1


def calc_nr_kernel_pages(kernel: Kernel) -> int:
    """``calc_nr_kernel_pages``: whole pages of memory that nobody has reserved yet."""
    shift, slack = kernel.arch.page_shift, kernel.arch.page_size - 1
    return sum(
        max(0, (end >> shift) - (start + slack >> shift))
        for start, end, _ in kernel.memblock.for_each_free_mem_range()
    )


def swiotlb_init(kernel: Kernel) -> None:
    """``swiotlb_init``: bounce buffers in low memory, smaller where there is no room.

    x86-64 wants them for memory above 4 GiB, arm64 always (1 MiB for each GiB where all memory is
    low).
    """
    memblock, page = kernel.memblock, kernel.arch.page_size
    size = kernel.config.swiotlb_bytes
    low_limit = kernel.arch.low_address_limit
    if kernel.arch.name == "x86_64":
        if memblock.memblock_end_of_DRAM() <= 1 << 32:
            return
    elif memblock.memblock_end_of_DRAM() <= low_limit + 1:
        size = min(size, -(-memblock.memblock_phys_mem_size() // 1024))
    if not size:
        return
    slabs = -(-size // (_IO_TLB_SEGSIZE << _IO_TLB_SHIFT)) * _IO_TLB_SEGSIZE
    while True:
        nr_bytes = (slabs << _IO_TLB_SHIFT) + page - 1 & -page
        if memblock.memblock_alloc_try_nid(nr_bytes, page, 0, low_limit, -1):
            break
        kernel.printk(
            f"software IO TLB: swiotlb_memblock_alloc: Failed to allocate {nr_bytes} bytes tlb "
            "structure"
        )
        if slabs <= _IO_TLB_MIN_SLABS:
            return
        slabs = -(-(slabs >> 1) // _IO_TLB_SEGSIZE) * _IO_TLB_SEGSIZE
    slots = slabs * _IO_TLB_SLOT_BYTES + page - 1 & -page
    if not memblock.memblock_alloc(slots, page):
        kernel.printk(
            f"software IO TLB: swiotlb_init_remap: Failed to allocate {slots} bytes "
            f"align=0x{page:x}"
        )
        return
    memblock.memblock_alloc(16 * kernel.config.nr_cpus, _SMP_CACHE_BYTES)
