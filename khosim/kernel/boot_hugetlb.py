"""HugeTLB pages that the command line asks for.

Models ``mm/hugetlb.c`` @ 7.3: ``hugetlb_parse_params`` with ``hugepages_setup``,
``hugepagesz_setup`` and ``default_hugepagesz_setup``, ``hugetlb_bootmem_alloc`` (pages too large
for the buddy allocator, from memblock, never from scratch) and ``hugetlb_init`` (the others, from
the buddy allocator, node by node). On a handover boot the latter may lie in scratch, whose
pageblocks movable allocations can use.

Left out: HugeTLB CMA, vmemmap optimisation, padata threads, the pool's size of 0 being reported
when no option asks for huge pages.
"""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING

from khosim.kernel.page_map import ALLOCATED, PageState
from khosim.units import memparse

if TYPE_CHECKING:
    from khosim.kernel.arch import Arch
    from khosim.kernel.kernel import Kernel

__all__ = ("Hstate", "hugetlb_bootmem_alloc", "hugetlb_init")

_NUMBER = re.compile(r"[ \t\n\v\f\r]*\+?(\d+)")  # sscanf("%lu")
_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
_SIZES = {
    ("x86_64", 4096): (2 * _MIB, _GIB),
    ("arm64", 4096): (64 * _KIB, 2 * _MIB, 32 * _MIB, _GIB),
    ("arm64", 16384): (2 * _MIB, 32 * _MIB, _GIB),
    ("arm64", 65536): (2 * _MIB, 512 * _MIB, 16 * _GIB),
}


class Hstate:
    """``struct hstate``: one huge page size (bytes) and how many pages are wanted where."""

    __slots__ = ("max_huge_pages", "per_node", "size_bytes")

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.max_huge_pages = 0
        self.per_node: dict[int, int] = {}


class _Params:
    """The state that the option handlers share; methods return 0 or what the handler returns."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.hstates: list[Hstate] = []
        self.default = Hstate(hpage_size(kernel.arch))
        """What ``hugepages=`` in front of any ``hugepagesz=`` asks for."""
        self.parsed_default = False
        self._valid_size = True
        self._parsed: Hstate | None = None
        self._last: Hstate | None = None

    def hugepages(self, text: str) -> int:
        """``hugepages_setup``."""
        printk = self._kernel.printk
        if not self._valid_size:
            printk(
                f"HugeTLB: hugepages={text} does not follow a valid hugepagesz, ignoring"
            )
            self._valid_size = True
            return -errno.EINVAL
        hstate = self._parsed or self.default
        if hstate is self._last:
            printk(
                "HugeTLB: hugepages= specified twice without interleaving hugepagesz=, "
                f"ignoring hugepages={text}"
            )
            return 1
        at = 0
        while at < len(text):
            number = _NUMBER.match(text, at)
            if number is None:
                return self._invalid(hstate, text[at:])
            if text[number.end() : number.end() + 1] != ":":
                if at:
                    return self._invalid(hstate, text[at:])
                hstate.max_huge_pages = int(number[1])
                break
            node = int(number[1])
            if node not in online_nodes(self._kernel):
                return self._invalid(hstate, text[at:])
            at = number.end() + 1
            number = _NUMBER.match(text, at)
            if number is None:
                return self._invalid(hstate, text[at:])
            hstate.per_node[node] = int(number[1])
            hstate.max_huge_pages += int(number[1])
            at = number.end()
            if text[at : at + 1] != ",":
                break
            at += 1
        self._last = hstate
        return 0

    def _invalid(self, hstate: Hstate, rest: str) -> int:
        self._kernel.printk(f"HugeTLB: Invalid hugepages parameter {rest}")
        hstate.max_huge_pages = 0
        hstate.per_node.clear()
        return -errno.EINVAL

    def hugepagesz(self, text: str) -> int:
        """``hugepagesz_setup``."""
        self._valid_size = False
        size = memparse(text)[0]
        if size not in valid_sizes(self._kernel.arch):
            self._kernel.printk(f"HugeTLB: unsupported hugepagesz={text}")
            return -errno.EINVAL
        known = next((h for h in self.hstates if h.size_bytes == size), None)
        if known is None:
            self._parsed = Hstate(size)
            self.hstates.append(self._parsed)
        elif not self.parsed_default or known is not self.default or known.max_huge_pages:
            self._kernel.printk(f"HugeTLB: hugepagesz={text} specified twice, ignoring")
            return -errno.EINVAL
        else:
            self._parsed = known
        self._valid_size = True
        return 0

    def default_hugepagesz(self, text: str) -> int:
        """``default_hugepagesz_setup``."""
        self._valid_size = False
        if self.parsed_default:
            self._kernel.printk(
                f"HugeTLB: default_hugepagesz previously specified, ignoring {text}"
            )
            return -errno.EINVAL
        size = memparse(text)[0]
        if size not in valid_sizes(self._kernel.arch):
            self._kernel.printk(f"HugeTLB: unsupported default_hugepagesz={text}")
            return -errno.EINVAL
        hstate = next((h for h in self.hstates if h.size_bytes == size), None)
        if hstate is None:
            hstate = self._parsed = Hstate(size)
            self.hstates.append(hstate)
        self._valid_size = True
        self.parsed_default = True
        if self.default.max_huge_pages:
            hstate.max_huge_pages = self.default.max_huge_pages
            hstate.per_node.update(self.default.per_node)
        self.default = hstate
        return 0


def online_nodes(kernel: Kernel) -> list[int]:
    """``node_online_map`` in early boot: on x86-64 nodes without memory are not online."""
    if kernel.arch.name == "x86_64":
        return kernel.memory_nodes()
    return list(kernel.hardware.memory_map.online_nodes)


def valid_sizes(arch: Arch) -> tuple[int, ...]:
    """``arch_hugetlb_valid_size``: the huge page sizes (bytes) of an architecture."""
    return _SIZES[arch.name, arch.page_size]


def hpage_size(arch: Arch) -> int:
    """``HPAGE_SIZE``: what one entry of the last but one page table level maps, in bytes."""
    return arch.page_size * (arch.page_size // 8)


def _size_text(size_bytes: int) -> str:
    # string_get_size with three digits; huge pages are powers of two.
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size_bytes >> shift:
            count = size_bytes >> shift
            digits = 2 if count < 10 else 1 if count < 100 else 0
            return f"{count:.{digits}f} {unit}"
    return f"{size_bytes} B"


def hugetlb_bootmem_alloc(kernel: Kernel) -> None:
    """``hugetlb_bootmem_alloc``: read the options, allocate the gigantic pages."""
    if not kernel.options.hugetlb:
        return
    params = _Params(kernel)
    for name, text in kernel.options.hugetlb:
        getattr(params, name)(text)
    kernel.hugetlb = params.hstates
    if not params.parsed_default:
        # hugetlb_init settles the default size, before any page of that size is allocated.
        kernel.hugetlb = _with_default(kernel, params)
    for hstate in kernel.hugetlb:
        if hstate.size_bytes > kernel.arch.scratch_align_bytes:
            _alloc_pages(kernel, hstate)


def _with_default(kernel: Kernel, params: _Params) -> list[Hstate]:
    known = next((h for h in params.hstates if h.size_bytes == params.default.size_bytes), None)
    if known is None:
        return [*params.hstates, params.default]
    if params.default.max_huge_pages:
        if known.max_huge_pages:
            kernel.printk(
                f"HugeTLB: Ignoring hugepages={known.max_huge_pages} associated with "
                f"{_size_text(known.size_bytes)} page size"
            )
            kernel.printk(
                f"HugeTLB: Using hugepages={params.default.max_huge_pages} for number of default "
                "huge pages"
            )
        known.max_huge_pages = params.default.max_huge_pages
        known.per_node = params.default.per_node
    return params.hstates


def hugetlb_init(kernel: Kernel) -> None:
    """``hugetlb_init``: the pages that the buddy allocator can give, and the report."""
    for pfn, nr_pages in kernel.gigantic_pages:
        # gather_bootmem_prealloc: frozen memblock pages become folios of the pool.
        order = nr_pages.bit_length() - 1
        kernel.pages.pages.set(pfn, pfn + nr_pages, PageState(ALLOCATED, order, True, "hugetlb"))
        kernel.pages.adjust_managed_page_count(pfn, nr_pages)
    for hstate in kernel.hugetlb:
        if hstate.size_bytes <= kernel.arch.scratch_align_bytes:
            _alloc_pages(kernel, hstate)
    for hstate in kernel.hugetlb:
        kernel.printk(
            f"HugeTLB: registered {_size_text(hstate.size_bytes)} page size, "
            f"pre-allocated {kernel.huge_pages.get(hstate.size_bytes, 0)} pages"
        )


def _alloc_pages(kernel: Kernel, hstate: Hstate) -> None:
    # hugetlb_hstate_alloc_pages: node by node where nodes are named, else round robin.
    size = hstate.size_bytes
    if not hstate.max_huge_pages:
        return
    text = _size_text(size)
    wanted = {nid: count for nid, count in sorted(hstate.per_node.items()) if count}
    total = 0
    for nid, count in wanted.items():
        got = 0
        while got < count and _alloc_one(kernel, size, [nid], True):
            got += 1
        total += got
        if got < count:
            kernel.printk(
                f"HugeTLB: allocating {count} of page size {text} failed node{nid}.  "
                f"Only allocated {got} hugepages."
            )
    if not wanted:
        nodes = _nodes_with_memory(kernel)
        while total < hstate.max_huge_pages and _alloc_one(kernel, size, nodes, False):
            total += 1
        if total < hstate.max_huge_pages:
            kernel.printk(
                f"HugeTLB: allocating {hstate.max_huge_pages} of page size {text} failed.  "
                f"Only allocated {total} hugepages."
            )
    kernel.huge_pages[size] = kernel.huge_pages.get(size, 0) + total


def _nodes_with_memory(kernel: Kernel) -> list[int]:
    return sorted({max(nid, 0) for _, _, nid in kernel.memblock.for_each_mem_pfn_range()})


def _alloc_one(kernel: Kernel, size_bytes: int, nodes: list[int], exact: bool) -> bool:
    arch = kernel.arch
    if size_bytes > arch.scratch_align_bytes:
        return _alloc_gigantic(kernel, size_bytes, nodes, exact)
    order = (size_bytes >> arch.page_shift).bit_length() - 1
    for _ in range(len(nodes)):
        nid = nodes[0]
        nodes.append(nodes.pop(0))
        movable = not kernel.release.fix_huge_pages
        pfn = kernel.pages.alloc_pages(
            order, "hugetlb", movable=movable, compound=True, nid=nid, this_node=True
        )
        if pfn is not None:
            return True
    return False


def _alloc_gigantic(kernel: Kernel, size_bytes: int, nodes: list[int], exact: bool) -> bool:
    # One try on the next node; without a named node memblock goes elsewhere by itself.
    memblock = kernel.memblock
    nid = nodes[0]
    nodes.append(nodes.pop(0))
    if kernel.release.hugetlb_outside_scratch:
        phys = memblock.memblock_alloc_hugetlb(size_bytes, nid, exact, kernel.kho_scratch_overlap)
    elif exact:
        phys = memblock.memblock_alloc_exact_nid_raw(size_bytes, size_bytes, 0, 0, nid)
    else:
        phys = memblock.memblock_alloc_try_nid_raw(size_bytes, size_bytes, 0, 0, nid)
    if not phys:
        return False
    # struct huge_bootmem_page goes to the first bytes; memory is not cleared.
    kernel.ram.write(phys, bytes(32), kernel.by("alloc_bootmem_huge_page"))
    page = kernel.arch.page_size
    memblock.memblock_reserved_mark_noinit(phys + page, size_bytes - page)
    shift = kernel.arch.page_shift
    kernel.gigantic_pages.append((phys >> shift, size_bytes >> shift))
    return True
