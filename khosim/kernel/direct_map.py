"""How a kernel reaches memory: its direct map, and which pages have a struct page.

Models ``arch/{x86,arm64}/include/asm``'s ``phys_to_virt``, ``mm/sparse.c``'s present sections and
``pfn_to_online_page`` @ 7.3. What the real CPU answers with a page fault is a
:class:`~khosim.errors.KernelPanic` here. Left out: page tables themselves.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from khosim.errors import KernelPanic

if TYPE_CHECKING:
    from khosim.kernel.arch import Arch
    from khosim.kernel.page_alloc import PageAllocator
    from khosim.machine.ram import Ram

__all__ = ("DirectMap",)

_MAX_FDT_BYTES = 2 << 20  # MAX_FDT_SIZE

class DirectMap:
    """The addresses of one kernel; a base of :class:`~khosim.kernel.kernel.Kernel`."""

    __slots__ = ("_mapped_ends", "_mapped_starts", "_present_ends", "_present_starts")

    arch: Arch
    generation: int
    pages: PageAllocator
    ram: Ram
    boot_fdt_phys: int
    present_sections: list[tuple[int, int]]

    def __init__(self) -> None:
        self._present_starts: list[int] = []
        self._present_ends: list[int] = []
        self._mapped_starts: list[int] = []
        self._mapped_ends: list[int] = []

    def set_mapped(self, ranges: list[tuple[int, int]]) -> None:
        """The direct map covers these ``(start, end)``, in any order, neighbours merged."""
        starts: list[int] = []
        ends: list[int] = []
        for start, end in sorted(ranges):
            if ends and start <= ends[-1]:
                ends[-1] = max(end, ends[-1])
            else:
                starts.append(start)
                ends.append(end)
        self._mapped_starts, self._mapped_ends = starts, ends

    def virt(self, phys: int, len_bytes: int) -> int:
        """``phys_to_virt`` and a first access: ``phys``, or the panic of an unmapped page."""
        i = bisect_right(self._mapped_starts, phys) - 1
        if i < 0 or phys + len_bytes > self._mapped_ends[i]:
            raise KernelPanic(
                f"BUG: unable to handle page fault for address: phys {phys:#x} is not mapped",
                self.generation,
            )
        return phys

    def is_mapped(self, start: int, end: int) -> bool:
        """``pfn_range_is_mapped``: one piece of the direct map covers [start, end)."""
        i = bisect_right(self._mapped_starts, start) - 1
        return i >= 0 and end <= self._mapped_ends[i]

    def fdt_at(self, phys: int) -> memoryview:
        """The FDT at ``phys`` as libfdt in this kernel sees it: through the direct map."""
        self.virt(phys, 40)
        size = int.from_bytes(self.ram.read(phys + 4, 4), "big")
        i = bisect_right(self._mapped_starts, phys) - 1
        end = min(phys + max(size, 40), self._mapped_ends[i])
        return self.ram.view(phys, end - phys).data

    def fdt_totalsize(self, phys: int) -> int:
        """``fdt_totalsize`` of the tree at ``phys``, in bytes."""
        return int.from_bytes(self.ram.read(phys + 4, 4), "big")

    def boot_fdt(self) -> memoryview:
        """``initial_boot_params``: the device tree this kernel was started with (arm64).

        The fixmap has it for good, also where ``mem=`` has cut its memory off.
        """
        phys = self.boot_fdt_phys
        size = min(max(self.fdt_totalsize(phys), 40), _MAX_FDT_BYTES)
        return self.ram.view(phys, size).data

    # -- struct pages ---------------------------------------------------------------------------

    def note_present_sections(self) -> None:
        """Merge ``present_sections`` so that struct pages can be looked up."""
        shift = self.arch.section_bytes.bit_length() - 1 - self.arch.page_shift
        self._present_starts, self._present_ends = [], []
        for first, end in sorted(self.present_sections):
            if self._present_ends and self._present_ends[-1] == first << shift:
                self._present_ends[-1] = end << shift
            else:
                self._present_starts.append(first << shift)
                self._present_ends.append(end << shift)

    def first_missing_struct_page(self, start_pfn: int, end_pfn: int) -> int | None:
        """The first pfn of a range that has no ``struct page``, or None."""
        while start_pfn < end_pfn:
            i = bisect_right(self._present_starts, start_pfn) - 1
            if i < 0 or start_pfn >= self._present_ends[i]:
                return start_pfn
            start_pfn = self._present_ends[i]
        return None

    def struct_pages_exist(self, pfn: int, nr_pages: int) -> bool:
        """Whether every page of a range has a ``struct page``."""
        return self.first_missing_struct_page(pfn, pfn + nr_pages) is None

    def pfn_to_online_page(self, pfn: int) -> bool:
        """``pfn_to_online_page``: whether the section of ``pfn`` is online."""
        i = bisect_right(self._present_starts, pfn) - 1
        return i >= 0 and pfn < self._present_ends[i]

    def early_page_initialised(self, pfn: int) -> bool:
        """``early_page_initialised`` for a pfn that memblock may not know."""
        zone = self.pages.zone_of(pfn)
        nodes = self.memory_nodes()
        nid = zone.nid if zone is not None else (nodes[0] if nodes else 0)
        return self.pages.is_initialised(pfn, nid)

    def nid_of_pfn(self, pfn: int) -> int:
        """``pfn_to_nid``: the node of a page; 0 where memblock knew none.

        Panics without a struct page.
        """
        zone = self.pages.zone_of(pfn)
        if zone is not None:
            return zone.nid
        if not self.pfn_to_online_page(pfn):
            raise KernelPanic(
                f"BUG: unable to handle page fault for address: struct page of pfn {pfn:#x}",
                self.generation,
            )
        return 0

    def memory_nodes(self) -> list[int]:
        """``N_MEMORY``: nodes that have memory, ascending."""
        return sorted({zone.nid for zone in self.pages.zones})
