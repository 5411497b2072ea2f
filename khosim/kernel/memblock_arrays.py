"""The calls that add, remove, reserve, mark and cut memblock's regions.

Source: ``mm/memblock.c:memblock_add`` to ``memblock_clear_kho_scratch``, ``memblock_set_node``,
``memblock_trim_memory``, ``memblock_enforce_memory_limit``, ``memblock_cap_memory_range``,
``memblock_mem_limit_remove_map``, ``memblock_discard`` @ 7.3.

Calls return 0 or a negative errno, as in the kernel. Left out: what ``memblock_phys_free`` does
once the slab allocator is up (it hands the pages to the buddy lists, which is the caller's affair).
"""

from __future__ import annotations

from khosim.kernel.memblock_core import MemblockCore
from khosim.kernel.memblock_regions import (
    MAX_NUMNODES,
    MEMBLOCK_HOTPLUG,
    MEMBLOCK_KHO_SCRATCH,
    MEMBLOCK_MIRROR,
    MEMBLOCK_NOMAP,
    MEMBLOCK_NONE,
    MEMBLOCK_RSRV_KERN,
    MEMBLOCK_RSRV_NOINIT,
    NUMA_NO_NODE,
    PHYS_ADDR_MAX,
    REGION_LEN_BYTES,
)

__all__ = ("MemblockArrays",)


class MemblockArrays(MemblockCore):
    """Every call that changes the arrays, and the switches."""

    __slots__ = ()

    # Adding and removing

    def memblock_add(self, base: int, size: int) -> int:
        """Add memory without a node. 0 or -ENOMEM."""
        ret = self._add_range(self.memory, base, size, MAX_NUMNODES, MEMBLOCK_NONE)
        if self.trace is not None:
            self.trace("memblock_add", (base, size), ret)
        return ret

    def memblock_add_node(self, base: int, size: int, nid: int, flags: int = MEMBLOCK_NONE) -> int:
        """Add memory of node ``nid`` with ``flags``. 0 or -ENOMEM."""
        ret = self._add_range(self.memory, base, size, nid, flags)
        if self.trace is not None:
            self.trace("memblock_add_node", (base, size, nid, flags), ret)
        return ret

    def memblock_remove(self, base: int, size: int) -> int:
        """Take a range out of memory. 0 or -ENOMEM."""
        ret = self._remove_range(self.memory, base, size)
        if self.trace is not None:
            self.trace("memblock_remove", (base, size), ret)
        return ret

    def memblock_reserve(self, base: int, size: int) -> int:
        """Reserve a range; what is reserved already keeps its attributes. 0 or -ENOMEM."""
        ret = self._add_range(self.reserved, base, size, NUMA_NO_NODE, MEMBLOCK_NONE)
        if self.trace is not None:
            self.trace("memblock_reserve", (base, size), ret)
        return ret

    def memblock_reserve_kern(self, base: int, size: int) -> int:
        """Reserve a range as the kernel's own (``MEMBLOCK_RSRV_KERN``). 0 or -ENOMEM."""
        ret = self._add_range(self.reserved, base, size, NUMA_NO_NODE, MEMBLOCK_RSRV_KERN)
        if self.trace is not None:
            self.trace("memblock_reserve_kern", (base, size), ret)
        return ret

    def memblock_reserve_node(self, base: int, size: int, nid: int, flags: int) -> int:
        """Reserve with node and flags (``__memblock_reserve``). 0 or -ENOMEM."""
        ret = self._add_range(self.reserved, base, size, nid, flags)
        if self.trace is not None:
            self.trace("__memblock_reserve", (base, size, nid, flags), ret)
        return ret

    def memblock_phys_free(self, base: int, size: int) -> int:
        """Undo reservations in a range. 0 or -ENOMEM."""
        ret = self._remove_range(self.reserved, base, size)
        if self.trace is not None:
            self.trace("memblock_phys_free", (base, size), ret)
        return ret

    # Marking

    def memblock_mark_hotplug(self, base: int, size: int) -> int:
        """Set ``MEMBLOCK_HOTPLUG`` on a range of memory. 0 or -ENOMEM."""
        return self._mark("memblock_mark_hotplug", self.memory, base, size, MEMBLOCK_HOTPLUG)

    def memblock_clear_hotplug(self, base: int, size: int) -> int:
        """Clear ``MEMBLOCK_HOTPLUG`` on a range of memory. 0 or -ENOMEM."""
        return self._clear("memblock_clear_hotplug", self.memory, base, size, MEMBLOCK_HOTPLUG)

    def memblock_mark_mirror(self, base: int, size: int) -> int:
        """Set ``MEMBLOCK_MIRROR``; does nothing unless ``mirrored_kernelcore``. 0 or -ENOMEM."""
        if not self.mirrored_kernelcore:
            if self.trace is not None:
                self.trace("memblock_mark_mirror", (base, size), 0)
            return 0
        self.system_has_some_mirror = True
        return self._mark("memblock_mark_mirror", self.memory, base, size, MEMBLOCK_MIRROR)

    def memblock_mark_nomap(self, base: int, size: int) -> int:
        """Set ``MEMBLOCK_NOMAP`` on a range of memory. 0 or -ENOMEM."""
        return self._mark("memblock_mark_nomap", self.memory, base, size, MEMBLOCK_NOMAP)

    def memblock_clear_nomap(self, base: int, size: int) -> int:
        """Clear ``MEMBLOCK_NOMAP`` on a range of memory. 0 or -ENOMEM."""
        return self._clear("memblock_clear_nomap", self.memory, base, size, MEMBLOCK_NOMAP)

    def memblock_mark_kho_scratch(self, base: int, size: int) -> int:
        """Set ``MEMBLOCK_KHO_SCRATCH`` on a range of memory. 0 or -ENOMEM."""
        return self._mark(
            "memblock_mark_kho_scratch", self.memory, base, size, MEMBLOCK_KHO_SCRATCH
        )

    def memblock_clear_kho_scratch(self, base: int, size: int) -> int:
        """Clear ``MEMBLOCK_KHO_SCRATCH`` on a range of memory. 0 or -ENOMEM."""
        return self._clear(
            "memblock_clear_kho_scratch", self.memory, base, size, MEMBLOCK_KHO_SCRATCH
        )

    def memblock_reserved_mark_noinit(self, base: int, size: int) -> int:
        """Set ``MEMBLOCK_RSRV_NOINIT`` on what is reserved in a range. 0 or -ENOMEM."""
        return self._mark(
            "memblock_reserved_mark_noinit", self.reserved, base, size, MEMBLOCK_RSRV_NOINIT
        )

    def memblock_reserved_mark_kern(self, base: int, size: int) -> int:
        """Set ``MEMBLOCK_RSRV_KERN`` on what is reserved in a range. 0 or -ENOMEM."""
        return self._mark(
            "memblock_reserved_mark_kern", self.reserved, base, size, MEMBLOCK_RSRV_KERN
        )

    def memblock_set_node(self, base: int, size: int, nid: int, reserved: bool = False) -> int:
        """Set the node of a range of memory, or of what is reserved in it. 0 or -ENOMEM."""
        ret = self._set_node(self.reserved if reserved else self.memory, base, size, nid)
        if self.trace is not None:
            self.trace("memblock_set_node", (base, size, nid, reserved), ret)
        return ret

    # Cutting

    def memblock_trim_memory(self, align: int) -> None:
        """Shrink each memory region to multiples of ``align``; drop what becomes empty.

        ``total_size`` keeps the bytes shaved off regions that stay (so do the kernel's
        ``memblock_phys_mem_size`` and all that is computed from it). A region in the last ``align``
        bytes of the address space wraps to 0, and what comes of the array then is not modelled.
        """
        memory = self.memory
        low_bits = (align - 1) & PHYS_ADDR_MAX
        idx = 0
        while idx < len(memory.base):
            start = (((memory.base[idx] - 1) & PHYS_ADDR_MAX | low_bits) + 1) & PHYS_ADDR_MAX
            stop = memory.end[idx] & ~low_bits
            if start < stop:
                memory.base[idx] = start
                memory.end[idx] = stop
                idx += 1
            else:
                self._remove_regions(memory, idx, idx + 1)
        if self.trace is not None:
            self.trace("memblock_trim_memory", (align,), None)

    def memblock_enforce_memory_limit(self, limit: int) -> None:
        """Keep the lowest ``limit`` bytes of memory (and no reservation above); 0: no limit."""
        max_addr = self._find_max_addr(limit) if limit else PHYS_ADDR_MAX
        if max_addr != PHYS_ADDR_MAX:
            self._remove_range(self.memory, max_addr, PHYS_ADDR_MAX)
            self._remove_range(self.reserved, max_addr, PHYS_ADDR_MAX)
        if self.trace is not None:
            self.trace("memblock_enforce_memory_limit", (limit,), None)

    def memblock_cap_memory_range(self, base: int, size: int) -> None:
        """Remove memory outside [base, + size) unless NOMAP, and every reservation outside."""
        self._cap_memory_range(base & PHYS_ADDR_MAX, size & PHYS_ADDR_MAX)
        if self.trace is not None:
            self.trace("memblock_cap_memory_range", (base, size), None)

    def memblock_mem_limit_remove_map(self, limit: int) -> None:
        """Keep the lowest ``limit`` bytes of memory and all NOMAP regions; 0: no limit."""
        max_addr = self._find_max_addr(limit) if limit else PHYS_ADDR_MAX
        if max_addr != PHYS_ADDR_MAX:
            self._cap_memory_range(0, max_addr)
        if self.trace is not None:
            self.trace("memblock_mem_limit_remove_map", (limit,), None)

    def _find_max_addr(self, limit: int) -> int:
        for base, end in zip(self.memory.base, self.memory.end, strict=True):
            if limit <= end - base:
                return base + limit
            limit -= end - base
        return PHYS_ADDR_MAX

    def _cap_memory_range(self, base: int, size: int) -> None:
        if not size:
            return
        memory = self.memory
        if not memory.total_size:
            self._say("memblock_cap_memory_range: No memory registered yet")
            return
        span = self._isolate(memory, base, size)
        if span is None:
            return
        start_rgn, end_rgn = span
        for idx in range(memory.cnt - 1, -1, -1):
            if not start_rgn <= idx < end_rgn and not memory.flags[idx] & MEMBLOCK_NOMAP:
                self._remove_regions(memory, idx, idx + 1)
        self._remove_range(self.reserved, 0, base)
        self._remove_range(self.reserved, base + size, PHYS_ADDR_MAX)

    # Switches

    def memblock_allow_resize(self) -> None:
        """From now on full arrays are doubled; before, a full array is a panic."""
        self.can_resize = True
        if self.trace is not None:
            self.trace("memblock_allow_resize", (), None)

    def memblock_set_current_limit(self, limit: int) -> None:
        """Allocate below ``limit`` (a physical address) from now on."""
        self.current_limit = limit
        if self.trace is not None:
            self.trace("memblock_set_current_limit", (limit,), None)

    def memblock_set_bottom_up(self, enable: bool) -> None:
        """Allocate from the bottom up instead of from the top down."""
        self.bottom_up = enable
        if self.trace is not None:
            self.trace("memblock_set_bottom_up", (enable,), None)

    def memblock_set_kho_scratch_only(self) -> None:
        """Allocate from memory marked ``MEMBLOCK_KHO_SCRATCH`` only."""
        self.kho_scratch_only = True
        if self.trace is not None:
            self.trace("memblock_set_kho_scratch_only", (), None)

    def memblock_clear_kho_scratch_only(self) -> None:
        """Allocate from any memory again."""
        self.kho_scratch_only = False
        if self.trace is not None:
            self.trace("memblock_clear_kho_scratch_only", (), None)

    def memblock_discard(self) -> list[tuple[int, int]]:
        """The ``(phys, len_bytes)`` of doubled arrays that the kernel frees late in its boot.

        The reserved array comes before the memory array, as freed. The arrays stay readable here.
        """
        page_mask = self.page_size - 1
        freed = [
            (array.array_phys, (array.max * REGION_LEN_BYTES + page_mask) & ~page_mask)
            for array in (self.reserved, self.memory)
            if array.array_phys
        ]
        if self.trace is not None:
            self.trace("memblock_discard", (), freed)
        return freed
