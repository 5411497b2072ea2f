"""The tracker of kho-v1: bitmaps per order, listed in chunks when the handover is finalized.

Models ``kernel/kexec_handover.c`` @ 6.16 to 6.18 (``kernel/liveupdate/kexec_handover.c`` @ 6.19 and
7.0): ``__kho_preserve_order``, ``__kho_unpreserve``, ``kho_mem_serialize``, ``kho_mem_ser_free``,
``kho_mem_deserialize`` and ``deserialize_bitmap``. Bitmaps are real memory from the first block on;
the chunks that tell of them are written by :meth:`KhoChunks.serialize`. Nothing of either is
preserved: the successor has to be through before it leaves scratch.

A reader knows the size of a bitmap from its own source only. Where the writer had another, it reads
too little, or on into whatever lies behind. Left out: the xarrays' own nodes, locks.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from khosim.abi.kho_v1 import (
    CHUNK_HDR_BYTES,
    ELEMENT_BYTES,
    ChunkHdr,
    Element,
    chunk_capacity,
    pack_chunk_hdr,
    pack_element,
    unpack_chunk_hdr,
    unpack_element,
)
from khosim.errors import KernelPanic
from khosim.kernel.kho_radix import Pfns
from khosim.kernel.kho_radix_bits import bytes_of_bits, fill_bits, runs_of_bits
from khosim.kernel.kho_tracker import BlockTracker
from khosim.kernel.kmalloc_cache import KmallocCache
from khosim.kernel.slab import kmalloc

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("KhoChunks",)

_U64 = (1 << 64) - 1
_SANE_SHIFT = 48
_ENDLESS = 1 << 17  # chunks: no machine has memory for as many


class KhoChunks(BlockTracker):
    """``struct kho_mem_track``; ``root`` is the first chunk, 0 before there is one."""

    __slots__ = ("_bitmap_cache", "_bitmaps", "_bits", "_chunk_cache")

    def __init__(self, kernel: Kernel, root: int = 0) -> None:
        super().__init__(kernel, root)
        size = kernel.release.bitmap_bytes or kernel.arch.page_size
        self._bits = size * 8
        self._bitmaps: dict[int, dict[int, int]] = {}
        """order -> number of the bitmap -> its address"""
        from_slab = kernel.release.metadata_from_slab
        self._bitmap_cache = KmallocCache(kernel, size) if from_slab else None
        page_size = kernel.arch.page_size
        self._chunk_cache = KmallocCache(kernel, page_size) if from_slab else None

    # -- marking --------------------------------------------------------------------------------

    def add_block(self, pfn: int, order: int) -> int:
        """``__kho_preserve_order``: 0, -EBUSY, -ENOMEM, or -EINVAL (DEBUG, bitmap in scratch)."""
        error, at = self._bitmap_of(pfn >> order, order)
        if error:
            return error
        kernel = self.kernel
        bit = (pfn >> order) % self._bits
        word = at + (bit >> 6 << 3)
        by = kernel.by("__kho_preserve_order")
        kernel.ram.write_u64(word, kernel.ram.read_u64(word) | 1 << (bit & 63), by)
        return 0

    def _bitmap_of(self, number: int, order: int) -> tuple[int, int]:
        # (error, address) of the bitmap that has the block of that number, made where missing.
        kernel = self.kernel
        if kernel.kho_out.finalized and kernel.release.busy_when_finalized:
            return -errno.EBUSY, 0
        of_order = self._bitmaps.get(order)
        if of_order is None:
            if not kmalloc(kernel, "__kho_preserve_order"):
                return -errno.ENOMEM, 0
            of_order = self._bitmaps[order] = {}
        at = of_order.get(number // self._bits)
        if at is None:
            error, at = self._alloc(self._bitmap_cache, "xa_load_or_alloc")
            if error:
                return error, 0
            of_order[number // self._bits] = at
        return 0, at

    def _alloc(self, cache: KmallocCache | None, symbol: str) -> tuple[int, int]:
        # A zeroed object or page: (error, address).
        kernel = self.kernel
        if cache is not None:
            phys = cache.kzalloc(symbol)
            return (0, phys) if phys else (-errno.ENOMEM, 0)
        page_size = kernel.arch.page_size
        pfn = kernel.pages.alloc_pages(0, symbol)
        if pfn is None:
            return -errno.ENOMEM, 0
        phys = pfn << kernel.arch.page_shift
        kernel.ram.zero(phys, page_size, kernel.by(symbol))
        checked = kernel.config.debug and kernel.release.scratch_overlap_checked
        if checked and kernel.kho_scratch_overlap(phys, page_size):
            kernel.warn(f"WARNING: {symbol}: {phys:#x} overlaps scratch")
            kernel.pages.free_pages(pfn, 0)
            return -errno.EINVAL, 0
        return 0, phys

    def _give_back(self, cache: KmallocCache | None, phys: int) -> None:
        if cache is not None:
            cache.kfree(phys)
        else:
            self.kernel.pages.free_pages(phys >> self.kernel.arch.page_shift, 0)

    def add_run(self, first_key: int, nr_keys: int) -> tuple[int, int]:
        """:meth:`add_block` for neighbours, a bitmap at a time."""
        if not nr_keys:
            return 0, 0
        pfn, order = self._decode(first_key)
        first = number = pfn >> order
        while number < first + nr_keys:
            stop = min(first + nr_keys, (number // self._bits + 1) * self._bits)
            error, at = self._bitmap_of(number, order)
            if error:
                return error, number - first
            self._fill(at, number % self._bits, (stop - 1) % self._bits + 1)
            number = stop
        return 0, nr_keys

    def _fill(self, at: int, low: int, high: int) -> None:
        by = self.kernel.by("__kho_preserve_order")
        bytes_ = self.kernel.ram.writable(at + (low >> 3), bytes_of_bits(low, high), by)
        fill_bits(bytes_, low, high, is_set=True)

    def add_many(self, keys: Pfns) -> tuple[int, int]:
        """:meth:`add_block` for an array of keys; neighbours in it go together."""
        if not len(keys):
            return 0, 0
        # Consecutive keys are one run unless the order changes with the number of bits.
        is_power = (keys[1:] & (keys[1:] - 1)) == 0
        cuts = np.flatnonzero((np.diff(keys) != 1) | is_power) + 1
        starts = [0, *cuts.tolist()]
        for start, stop in zip(starts, [*starts[1:], len(keys)], strict=True):
            error, done = self.add_run(int(keys[start]), stop - start)
            if error:
                return error, start + done
        return 0, len(keys)

    def del_block(self, pfn: int, order: int) -> bool:
        """``__kho_unpreserve``, one round of it: clear the bit, or do as the release does."""
        kernel = self.kernel
        number = pfn >> order
        at = self._bitmaps.get(order, {}).get(number // self._bits)
        if at is None:
            how = kernel.release.unpreserve_missing
            if how == "loop":
                raise KernelPanic(
                    f"watchdog: BUG: soft lockup in __kho_unpreserve: pfn {pfn:#x} of order "
                    f"{order} was never preserved",
                    kernel.generation,
                )
            message = f"WARNING: __kho_unpreserve: pfn {pfn:#x} order {order} has no bitmap"
            kernel.warn_once(message, "__kho_unpreserve")
            return how != "return"
        bit = number % self._bits
        word = at + (bit >> 6 << 3)
        by = kernel.by("__kho_unpreserve")
        kernel.ram.write_u64(word, kernel.ram.read_u64(word) & ~(1 << (bit & 63)), by)
        return True

    def drop_all(self) -> None:
        """What ``kho_abort`` does first: free every bitmap, so that nothing is marked any more."""
        for order in sorted(self._bitmaps):
            for _, phys in sorted(self._bitmaps[order].items()):
                self._give_back(self._bitmap_cache, phys)
        self._bitmaps.clear()

    def destroy(self) -> None:
        """Free the bitmaps and the chunks."""
        self.drop_all()
        self.free_chunks(self.root)
        self.root = 0

    # -- writing the list -----------------------------------------------------------------------

    def serialize(self) -> tuple[int, int]:
        """``kho_mem_serialize``: ``(error, address of the first chunk)``; 0 of nothing at all."""
        first = chunk = 0
        capacity = chunk_capacity(self.kernel.arch.page_size)
        for order in sorted(self._bitmaps):
            numbers = sorted(self._bitmaps[order])
            for start in range(0, max(len(numbers), 1), capacity):
                error, fresh = self._new_chunk(chunk)
                if error:
                    self.free_chunks(first)
                    return error, 0
                chunk = fresh
                first = first or chunk
                self._write_chunk(chunk, order, numbers[start : start + capacity])
        return 0, first

    def _new_chunk(self, cur: int) -> tuple[int, int]:
        error, chunk = self._alloc(self._chunk_cache, "new_chunk")
        if not error and cur:
            self.kernel.ram.write_u64(cur, chunk, self.kernel.by("new_chunk"))
        return error, chunk

    def _write_chunk(self, chunk: int, order: int, numbers: list[int]) -> None:
        shift = order + self.kernel.arch.page_shift
        of_order = self._bitmaps[order]
        data = [pack_chunk_hdr(ChunkHdr(0, order, len(numbers)))]
        data += [
            pack_element(Element((number * self._bits << shift) & _U64, of_order[number]))
            for number in numbers
        ]
        self.kernel.ram.write(chunk, b"".join(data), self.kernel.by("kho_mem_serialize"))

    def free_chunks(self, chunk: int) -> None:
        """``kho_mem_ser_free``: free a list of chunks."""
        kernel = self.kernel
        while chunk:
            following = kernel.ram.read_u64(kernel.virt(chunk, CHUNK_HDR_BYTES))
            if kernel.release.metadata_kfreed and self._chunk_cache is None:
                # free_large_kmalloc @ 6.18: a page that kmalloc does not know stays where it is.
                kernel.warn_once(
                    f"WARNING: free_large_kmalloc: {chunk:#x}: Not a kmalloc allocation", "kfree"
                )
            else:
                self._give_back(self._chunk_cache, chunk)
            chunk = following

    # -- reading it -----------------------------------------------------------------------------

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """``kho_mem_deserialize``: what each chunk's bitmaps say, with bitmaps of our own size."""
        ram, virt = self.kernel.ram, self.kernel.virt
        chunk, seen = self.root, 0
        while chunk:
            seen += 1
            if seen > _ENDLESS:
                raise self._panic("watchdog: BUG: soft lockup in kho_mem_deserialize")
            at = virt(chunk, CHUNK_HDR_BYTES)
            hdr = unpack_chunk_hdr(ram.read(at, CHUNK_HDR_BYTES))
            for _ in range(hdr.num_elms):
                at += ELEMENT_BYTES
                element = unpack_element(ram.read(virt(at, ELEMENT_BYTES), ELEMENT_BYTES))
                yield from self._bits_of(hdr.order, element)
            chunk = hdr.next_phys

    def _panic(self, message: str) -> KernelPanic:
        return KernelPanic(message, self.kernel.generation)

    def _bits_of(self, order: int, element: Element) -> Iterator[tuple[int, int, int]]:
        kernel = self.kernel
        if not element.bitmap_phys:
            raise self._panic(
                "BUG: kernel NULL pointer dereference: a bitmap at 0 in deserialize_bitmap"
            )
        size = self._bits // 8
        bitmap = kernel.ram.view(kernel.virt(element.bitmap_phys, size), size)
        shift = order + kernel.arch.page_shift
        for nr_bits, bit in runs_of_bits(bitmap.view("<u8"), 0):
            if shift < _SANE_SHIFT and element.phys_start + (bit + nr_bits << shift) <= _U64:
                yield element.phys_start + (bit << shift), order, nr_bits
            else:
                # Shift counts and sums wrap as the CPU's do.
                for one in range(bit, bit + nr_bits):
                    yield (element.phys_start + (one << (shift & 63))) & _U64, order, 1

    # -- questions ------------------------------------------------------------------------------

    def table_pages(self) -> list[int]:
        """The pages that hold bitmaps and chunks."""
        page = -self.kernel.arch.page_size
        found = {phys & page: None for of in self._bitmaps.values() for phys in of.values()}
        chunk = self.root
        while chunk and chunk not in found:
            found[chunk] = None
            chunk = self.kernel.ram.read_u64(chunk)
        return list(found)

    @property
    def nr_bitmaps(self) -> int:
        """How many bitmaps there are."""
        return sum(map(len, self._bitmaps.values()))

    def marked(self) -> Iterator[tuple[int, int, int]]:
        """The blocks whose bits are set now, in the order in which they would be listed."""
        shift = self.kernel.arch.page_shift
        for order in sorted(self._bitmaps):
            for number, phys in sorted(self._bitmaps[order].items()):
                start = number * self._bits << (order + shift)
                yield from self._bits_of(order, Element(start, phys))
