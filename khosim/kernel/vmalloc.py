"""vmalloc: memory that is contiguous for the kernel and scattered in RAM.

Models ``mm/vmalloc.c``: ``__vmalloc_node_range``, ``vm_area_alloc_pages``, ``vfree``,
``find_vm_area`` and ``struct vm_struct`` @ 7.3. An area stands for its own address: what holds a
pointer in the kernel holds a :class:`VmStruct` here. Pages are kept as runs of neighbours.

Left out: virtual addresses and their exhaustion, guard pages, page tables (mapping takes no pages,
but can be made to fail), KASAN, lazy freeing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from khosim.errors import KernelPanic, KhoSimError
from khosim.kernel.folio_range import put_folio_range
from khosim.kernel.slab import kmalloc

if TYPE_CHECKING:
    from khosim.kernel.arch import Arch
    from khosim.kernel.kernel import Kernel

__all__ = (
    "VM_ALLOC",
    "VM_ALLOW_HUGE_VMAP",
    "VM_MAP",
    "VM_MAP_PUT_PAGES",
    "VM_USERMAP",
    "VmStruct",
    "find_vm_area",
    "get_vm_area",
    "vfree",
    "vmalloc",
)

# include/linux/vmalloc.h
VM_ALLOC = 0x0002
VM_MAP = 0x0004
VM_USERMAP = 0x0008
VM_MAP_PUT_PAGES = 0x0200
VM_ALLOW_HUGE_VMAP = 0x0400

_CONT_PTE_ORDER = {12: 4, 14: 7, 16: 5}  # arm64: CONT_PTE_SHIFT - PAGE_SHIFT


class VmStruct:
    """``struct vm_struct``: one area, and the pointer to it.

    ``runs`` are ``(start_pfn, nr_pages)`` in the order of the area. ``page_order`` is the order of
    the mapping: blocks of that many pages are contiguous and aligned.
    """

    __slots__ = ("_at", "_kernel", "alive", "flags", "free_pages_array", "page_order", "runs")

    def __init__(self, kernel: Kernel, flags: int, page_order: int) -> None:
        self._kernel = kernel
        self._at: list[int] = []
        self.free_pages_array: Callable[[], None] | None = None
        """Gives back the memory of ``vm_struct.pages``; None where the slab has it."""
        self.alive = True
        self.flags = flags
        self.page_order = page_order
        self.runs: list[tuple[int, int]] = []

    def __repr__(self) -> str:
        state = "" if self.alive else ", freed"
        return f"VmStruct({self.nr_pages} pages, order {self.page_order}{state})"

    @property
    def nr_pages(self) -> int:
        """Pages of the area."""
        return self._at[-1] + self.runs[-1][1] if self.runs else 0

    @property
    def len_bytes(self) -> int:
        """Bytes of the area."""
        return self.nr_pages << self._kernel.arch.page_shift

    def add_run(self, start_pfn: int, nr_pages: int) -> None:
        """Append pages to an area under construction."""
        if self.runs and sum(self.runs[-1]) == start_pfn:
            self.runs[-1] = (self.runs[-1][0], self.runs[-1][1] + nr_pages)
        else:
            self._at.append(self.nr_pages)
            self.runs.append((start_pfn, nr_pages))

    def vmalloc_to_pfn(self, index: int) -> int:
        """``vmalloc_to_page``: the pfn of page ``index`` of the area."""
        i = bisect_right(self._at, index) - 1
        if i < 0 or index >= self._at[i] + self.runs[i][1]:
            raise self._fault(index << self._kernel.arch.page_shift)
        return self.runs[i][0] + index - self._at[i]

    def pieces(self, offset: int, len_bytes: int) -> Iterator[tuple[int, int]]:
        """``(phys, len_bytes)`` of contiguous RAM under ``[offset, offset + len_bytes)``."""
        if not self.alive:
            raise KhoSimError(f"{self!r} is used after vfree")
        shift = self._kernel.arch.page_shift
        if offset < 0 or len_bytes < 0 or offset + len_bytes > self.len_bytes:
            raise self._fault(offset + len_bytes)
        end = offset + len_bytes
        i = bisect_right(self._at, offset >> shift) - 1
        while offset < end:
            start_pfn, nr_pages = self.runs[i]
            inside = offset - (self._at[i] << shift)
            piece = min(end - offset, (nr_pages << shift) - inside)
            yield (start_pfn << shift) + inside, piece
            offset += piece
            i += 1

    def read(self, offset: int, len_bytes: int) -> bytes:
        """A copy of ``len_bytes`` bytes at ``offset``."""
        ram = self._kernel.ram
        return b"".join(ram.read(phys, size) for phys, size in self.pieces(offset, len_bytes))

    def write(self, offset: int, data: bytes | bytearray | memoryview, *, by: str = "user") -> None:
        """Store ``data`` at ``offset``, in the name of the function ``by``."""
        kernel = self._kernel
        tag = kernel.by(by)
        view = memoryview(data).cast("B")
        at = 0
        for phys, size in self.pieces(offset, len(view)):
            kernel.ram.write(phys, view[at : at + size], tag)
            at += size

    def zero(self, *, by: str = "user") -> None:
        """Zero the whole area."""
        kernel = self._kernel
        shift = kernel.arch.page_shift
        for start_pfn, nr_pages in self.runs:
            kernel.ram.zero(start_pfn << shift, nr_pages << shift, kernel.by(by))

    def _fault(self, offset: int) -> KernelPanic:
        return KernelPanic(
            f"BUG: unable to handle page fault: {offset:#x} bytes into {self!r}",
            self._kernel.generation,
        )


def _huge_order(arch: Arch, size_bytes: int) -> int:
    # arch_vmap_pmd_supported, arch_vmap_pte_supported_shift
    pmd_order = arch.page_shift - 3
    if size_bytes >= arch.page_size << pmd_order:
        return pmd_order
    if arch.name == "arm64":
        cont_order = _CONT_PTE_ORDER[arch.page_shift]
        if size_bytes >= arch.page_size << cont_order:
            return cont_order
    return 0


def vmalloc(
    kernel: Kernel,
    size_bytes: int,
    *,
    huge: bool = False,
    zero: bool = False,
    vm_flags: int = 0,
    nid: int | None = None,
    owner: str = "vmalloc",
) -> VmStruct | None:
    """``__vmalloc_node_range``: an area of at least ``size_bytes``, or None without memory.

    ``huge`` is ``VM_ALLOW_HUGE_VMAP``: blocks of the largest order that the architecture maps and
    the size allows, single pages where there are no such blocks (the flag stays set).
    """
    kernel.check_alive()
    if not size_bytes:
        kernel.warn_once("WARNING: __vmalloc_node_range: size 0", "vmalloc size 0")
        return None
    if size_bytes >> kernel.arch.page_shift > kernel.total_ram_pages():
        kernel.printk(f"vmalloc error: size {size_bytes}, exceeds total pages")
        return None
    if huge:
        vm_flags |= VM_ALLOW_HUGE_VMAP
    order = _huge_order(kernel.arch, size_bytes) if huge else 0
    area = _vmalloc_order(kernel, size_bytes, order, vm_flags, nid, owner)
    if area is None and order:
        area = _vmalloc_order(kernel, size_bytes, 0, vm_flags, nid, owner)
    if area is not None and zero:
        area.zero(by=owner)
    if kernel.trace is not None:
        args = {"size": size_bytes, "owner": owner}
        kernel.emit("vmalloc", args, None if area is None else area.runs[0][0])
    return area


def get_vm_area(kernel: Kernel, flags: int, page_order: int) -> VmStruct | None:
    """``__get_vm_area_node``: an area without pages, or None without memory for it."""
    if not kmalloc(kernel, "__get_vm_area_node") or not kmalloc(kernel, "alloc_vmap_area"):
        return None
    return VmStruct(kernel, flags, page_order)


def _vmalloc_order(
    kernel: Kernel, size_bytes: int, order: int, vm_flags: int, nid: int | None, owner: str
) -> VmStruct | None:
    # __vmalloc_area_node
    page_size = kernel.arch.page_size
    block = page_size << order
    size_bytes = -(-size_bytes // block) * block
    nr_pages = size_bytes >> kernel.arch.page_shift
    area = get_vm_area(kernel, VM_ALLOC | vm_flags, order)
    if area is None:
        kernel.printk(f"vmalloc error: size {size_bytes}, vm_struct allocation failed")
        return None
    array_bytes = nr_pages * 8
    if array_bytes > page_size:
        array = vmalloc(kernel, array_bytes, nid=nid, owner="vmalloc pages array")
        area.free_pages_array = lambda: vfree(kernel, array)
        found = array is not None
    else:
        found = kmalloc(kernel, "__vmalloc_area_node")
    if not found:
        kernel.printk(
            f"vmalloc error: size {size_bytes}, failed to allocated page array size {array_bytes}"
        )
        return None
    _alloc_pages(kernel, area, order, nr_pages, nid, owner)
    if area.nr_pages != nr_pages:
        if not order:
            kernel.printk(f"vmalloc error: size {size_bytes}, failed to allocate pages")
        vfree(kernel, area)
        return None
    if not kmalloc(kernel, "__vmap_pages_range"):
        kernel.printk(f"vmalloc error: size {size_bytes}, failed to map pages")
        vfree(kernel, area)
        return None
    return area


def _alloc_pages(
    kernel: Kernel, area: VmStruct, order: int, nr_pages: int, nid: int | None, owner: str
) -> None:
    # vm_area_alloc_pages: large blocks first, split up; then blocks of the mapping's order.
    max_attempt = kernel.arch.max_page_order
    large = min(max_attempt, nr_pages.bit_length() - 1)
    left = nr_pages
    while large > order and left:
        wanted = left >> large
        got = _take(kernel, area, large, wanted, nid, owner)
        left -= got << large
        if got < wanted:
            large -= 1
            max_attempt = large
        else:
            large = min(max_attempt, left.bit_length() - 1)
    _take(kernel, area, order, left >> order, nid, owner)
    kernel.pages.nr_vmalloc += area.nr_pages


def _take(
    kernel: Kernel, area: VmStruct, order: int, wanted: int, nid: int | None, owner: str
) -> int:
    if not wanted:
        return 0
    pages = kernel.pages
    got = 0
    for pfn, count in pages.alloc_pages_bulk(order, wanted, owner, nid=nid):
        at, end = pfn, pfn + (count << order)
        area.add_run(at, end - at)
        got += count
        while order and at < end:
            # split_page of one block after the other, several at a time.
            step = (end - at).bit_length() - 1
            pages.split_page(at, step, owner)
            at += 1 << step
    return got


def find_vm_area(area: VmStruct | None) -> VmStruct | None:
    """``find_vm_area``: the area itself; None for NULL and for one that was freed."""
    return area if area is not None and area.alive else None


def vfree(kernel: Kernel, area: VmStruct | None) -> None:
    """``vfree``: drop the area's reference on each page, and the area; NULL is ignored.

    Pages that others refer to live on. An area freed before is warned about.
    """
    kernel.check_alive()
    if area is None:
        return
    if not area.alive:
        kernel.warn(f"WARNING: Trying to vfree() nonexistent vm area ({area!r})")
        return
    area.alive = False
    for start_pfn, nr_pages in area.runs:
        put_folio_range(kernel, start_pfn, nr_pages, 0)
    if not area.flags & VM_MAP_PUT_PAGES:
        kernel.pages.nr_vmalloc -= area.nr_pages  # vm_area_free_pages
    if kernel.trace is not None:
        kernel.emit("vfree", {"nr_pages": area.nr_pages}, None)
    if area.free_pages_array is not None:
        area.free_pages_array()
