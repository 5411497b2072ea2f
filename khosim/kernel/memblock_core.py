"""memblock's state, and the work on one array that all its calls come down to.

Source: ``mm/memblock.c:memblock_add_range``, ``memblock_isolate_range``, ``memblock_remove_range``,
``memblock_setclr_flag``, ``memblock_double_array``, ``memblock_find_in_range_node`` @ 7.3.

Addresses and sizes are bytes, taken modulo 2**64 as the kernel's ``phys_addr_t``; a range that
would pass the end of the address space is cut there. Left out: kmemleak, accepting memory for
confidential guests, arrays doubled from the slab allocator.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from errno import ENOMEM
from typing import Any

from khosim.errors import KernelPanic
from khosim.kernel.memblock_iter import find_bottom_up, find_top_down
from khosim.kernel.memblock_regions import (
    MEMBLOCK_KHO_SCRATCH,
    MEMBLOCK_MIRROR,
    MEMBLOCK_NONE,
    MEMBLOCK_RSRV_KERN,
    NUMA_NO_NODE,
    PHYS_ADDR_MAX,
    REGION_LEN_BYTES,
    RegionArray,
)

__all__ = ("MEMBLOCK_ALLOC_ACCESSIBLE", "MEMBLOCK_ALLOC_NOLEAKTRACE", "MemblockCore")

MEMBLOCK_ALLOC_ACCESSIBLE = 0
MEMBLOCK_ALLOC_NOLEAKTRACE = 1

_INIT_MEMBLOCK_REGIONS = 128


class MemblockCore:
    """The arrays and switches of one generation; see :class:`~khosim.kernel.memblock.Memblock`."""

    __slots__ = (
        "allocations",
        "bottom_up",
        "can_resize",
        "current_limit",
        "debug",
        "generation",
        "kho_scratch_only",
        "memory",
        "mirrored_kernelcore",
        "movable_node",
        "no_room_to_grow",
        "on_message",
        "page_size",
        "reserved",
        "smp_cache_bytes",
        "system_has_some_mirror",
        "trace",
    )

    def __init__(
        self,
        *,
        page_size: int = 4096,
        smp_cache_bytes: int = 64,
        max_regions: int = _INIT_MEMBLOCK_REGIONS,
        memory_max: int | None = None,
        reserved_max: int | None = None,
        movable_node: bool = False,
        mirrored_kernelcore: bool = False,
        debug: bool = False,
        generation: int = -1,
        on_message: Callable[[str], None] | None = None,
        trace: Callable[[str, tuple[Any, ...], Any], None] | None = None,
    ) -> None:
        """An empty memblock.

        ``max_regions`` is the length of both static arrays unless ``memory_max`` or
        ``reserved_max`` says otherwise. ``on_message`` gets each line that the kernel would print
        as a warning, error or BUG, and with ``debug`` (``memblock=debug``) the line of a doubling.
        ``trace`` gets ``(symbol, arguments, result)`` of each public call. ``generation`` is what a
        :class:`KernelPanic` names.
        """
        self.page_size = page_size
        self.smp_cache_bytes = smp_cache_bytes
        self.memory = RegionArray("memory", memory_max or max_regions)
        self.reserved = RegionArray("reserved", reserved_max or max_regions)
        self.movable_node = movable_node
        self.mirrored_kernelcore = mirrored_kernelcore
        self.debug = debug
        self.generation = generation
        self.on_message = on_message
        self.trace = trace
        self.allocations: list[tuple[int, int]] = []
        self.bottom_up = False
        self.can_resize = False
        self.current_limit = PHYS_ADDR_MAX
        self.kho_scratch_only = False
        self.no_room_to_grow = False
        """Doubling has failed, and free memory only shrinks for now: do not search again."""
        self.system_has_some_mirror = False

    # What the kernel says

    def _say(self, line: str) -> None:
        if self.on_message is not None:
            self.on_message(line)

    def _panic(self, line: str) -> KernelPanic:
        self._say(line)
        return KernelPanic(line, self.generation)

    # Growing

    def memblock_double_array(
        self, array: RegionArray, new_area_start: int = 0, new_area_size: int = 0
    ) -> int:
        """Double ``array`` in memory taken from memblock. 0 or -1.

        [``new_area_start``, + ``new_area_size``) is about to be reserved and must not be used.
        :class:`KernelPanic` before :meth:`memblock_allow_resize`. Takes two attempts: above the
        area, then below it. An area that starts at 0 or 1 turns the second limit into "anywhere",
        as in the kernel.

        The kernel reserves the new array only after it freed the old one. If freeing makes it
        double the reserved array, that may take the same place, and the two arrays overwrite each
        other. Here they stay apart, and a message says what happened.
        """
        if not self.can_resize:
            raise self._panic(f"memblock: cannot resize {array.name} array")
        old_len_bytes = array.max * REGION_LEN_BYTES
        page_mask = self.page_size - 1
        alloc_len_bytes = (2 * old_len_bytes + page_mask) & ~page_mask
        if array is not self.reserved:
            new_area_start = new_area_size = 0
        addr = 0
        if not self.no_room_to_grow:
            limit = self.current_limit
            addr = self._find_in_range(
                (new_area_start + new_area_size) & PHYS_ADDR_MAX, limit, alloc_len_bytes
            )
            if not addr and new_area_size:
                addr = self._find_in_range(0, min(new_area_start, limit), alloc_len_bytes)
        if not addr:
            self._say(
                f"memblock: Failed to double {array.name} array from {array.max}"
                f" to {array.max * 2} entries !"
            )
            return -1
        if self.debug:
            self._say(
                f"memblock: {array.name} is doubled to {array.max * 2} at"
                f" [0x{addr:016x}-0x{addr + 2 * old_len_bytes - 1:016x}]"
            )
        old_phys = array.array_phys
        array.array_phys = addr
        array.max *= 2
        if old_phys:
            self._remove_range(self.reserved, old_phys, (old_len_bytes + page_mask) & ~page_mask)
            other = self.reserved if array is self.memory else self.memory
            other_end = other.array_phys + other.max * REGION_LEN_BYTES
            if addr < other_end and other.array_phys < addr + alloc_len_bytes:
                self._say(
                    f"memblock: {self.memory.name} and {self.reserved.name} arrays share memory"
                    f" at 0x{max(addr, other.array_phys):016x} (kernel bug)"
                )
        kern = MEMBLOCK_RSRV_KERN
        if self._add_range(self.reserved, addr, alloc_len_bytes, NUMA_NO_NODE, kern):
            raise self._panic("kernel BUG at mm/memblock.c:520!")
        self.allocations.append((addr, alloc_len_bytes))
        if self.trace is not None:
            self.trace("memblock_double_array", (array.name, array.max), addr)
        return 0

    def has_room_to_grow(self, array: RegionArray) -> bool:
        """Whether a doubling of ``array`` would find a place, whatever is being reserved."""
        len_bytes = (2 * array.max * REGION_LEN_BYTES + self.page_size - 1) & -self.page_size
        return bool(self._find_in_range(0, self.current_limit, len_bytes))

    # Inside: one array at a time

    def _choose_flags(self) -> int:
        if self.kho_scratch_only:
            return MEMBLOCK_KHO_SCRATCH
        return MEMBLOCK_MIRROR if self.system_has_some_mirror else MEMBLOCK_NONE

    def _find_in_range(self, start: int, end: int, size: int) -> int:
        flags = self._choose_flags()
        while True:
            found = self._find_node(size, self.page_size, start, end, NUMA_NO_NODE, flags)
            if found or not flags & MEMBLOCK_MIRROR:
                return found
            self._say(f"Could not allocate 0x{size:016x} bytes of mirrored memory")
            flags &= ~MEMBLOCK_MIRROR

    def _find_node(self, size: int, align: int, start: int, end: int, nid: int, flags: int) -> int:
        if end <= MEMBLOCK_ALLOC_NOLEAKTRACE:
            end = self.current_limit
        if start < self.page_size:
            start = self.page_size
        if end < start:
            end = start
        find = find_bottom_up if self.bottom_up else find_top_down
        return find(
            self.memory, self.reserved, start, end, size, align, nid, flags, self.movable_node
        )

    def _add_range(self, array: RegionArray, base: int, size: int, nid: int, flags: int) -> int:
        base &= PHYS_ADDR_MAX
        size &= PHYS_ADDR_MAX
        if base + size > PHYS_ADDR_MAX:
            size = PHYS_ADDR_MAX - base
        if not size:
            return 0
        end = base + size
        if not array.base:
            if array.total_size:
                self._say("WARNING: mm/memblock.c:625 at memblock_add_range")
            array.set_only(base, end, nid, flags)
            return 0
        counted = False
        while True:
            cnt = len(array.base)
            idx = bisect_right(array.end, base)
            if idx == cnt or array.base[idx] >= end:
                if cnt < array.max:
                    array.insert_merged(idx, base, end, nid, flags)
                    return 0
                nr_new = 1
            else:
                last = bisect_left(array.base, end, idx)
                piece, first_new, end_new = array.fill(idx, last, base, end, nid, flags)
                nr_new = piece.cnt - (last - idx)
                if not nr_new:
                    return 0
                # The kernel counts before it inserts unless there is plenty of room.
                fits = cnt + nr_new <= array.max
                warned = 2 if fits and not counted and 2 * cnt + 1 > array.max else 1
                for _ in range(warned):
                    self._warn_mixed(array, idx, last, base, nid, flags)
                if fits:
                    array.splice(idx, last, piece)
                    array.merge(first_new, end_new)
                    return 0
            counted = True
            while len(array.base) + nr_new > array.max:
                if self.memblock_double_array(array, base, size) < 0:
                    return -ENOMEM

    def _warn_mixed(
        self, array: RegionArray, idx: int, last: int, cursor: int, nid: int, flags: int
    ) -> None:
        # WARN_ONs for regions that cut off a lower part of the new one and differ from it.
        if self.on_message is None:
            return
        for k in range(idx, last):
            if array.base[k] > cursor:
                if nid != array.nid[k]:
                    self._say("WARNING: mm/memblock.c:668 at memblock_add_range")
                if flags and flags != array.flags[k]:
                    self._say("WARNING: mm/memblock.c:670 at memblock_add_range")
            cursor = array.end[k]

    def _isolate(self, array: RegionArray, base: int, size: int) -> tuple[int, int] | None:
        base &= PHYS_ADDR_MAX
        size &= PHYS_ADDR_MAX
        if base + size > PHYS_ADDR_MAX:
            size = PHYS_ADDR_MAX - base
        if not size:
            return 0, 0
        while len(array.base) + 2 > array.max:
            if self.memblock_double_array(array, base, size) < 0:
                return None
        return array.isolate(base, base + size)

    def _remove_range(self, array: RegionArray, base: int, size: int) -> int:
        span = self._isolate(array, base, size)
        if span is None:
            return -ENOMEM
        self._remove_regions(array, span[0], span[1])
        return 0

    def _remove_regions(self, array: RegionArray, start_rgn: int, end_rgn: int) -> None:
        if start_rgn < end_rgn:
            array.remove(start_rgn, end_rgn)
            if not array.base and array.total_size:
                self._say("WARNING: mm/memblock.c:373 at memblock_remove_region")

    def _mark(self, symbol: str, array: RegionArray, base: int, size: int, flag: int) -> int:
        ret = self._setclr_flag(array, base, size, flag, 0)
        if self.trace is not None:
            self.trace(symbol, (base, size), ret)
        return ret

    def _clear(self, symbol: str, array: RegionArray, base: int, size: int, flag: int) -> int:
        ret = self._setclr_flag(array, base, size, 0, flag)
        if self.trace is not None:
            self.trace(symbol, (base, size), ret)
        return ret

    def _setclr_flag(
        self, array: RegionArray, base: int, size: int, to_set: int, to_clear: int
    ) -> int:
        span = self._isolate(array, base, size)
        if span is None:
            return -ENOMEM
        start_rgn, end_rgn = span
        keep = ~to_clear
        array.flags[start_rgn:end_rgn] = [
            (flags | to_set) & keep for flags in array.flags[start_rgn:end_rgn]
        ]
        array.merge(start_rgn, end_rgn)
        return 0

    def _set_node(self, array: RegionArray, base: int, size: int, nid: int) -> int:
        span = self._isolate(array, base, size)
        if span is None:
            return -ENOMEM
        start_rgn, end_rgn = span
        array.nid[start_rgn:end_rgn] = [nid] * (end_rgn - start_rgn)
        array.merge(start_rgn, end_rgn)
        return 0
