"""Preserving vmalloc areas across kexec.

Models ``kernel/liveupdate/kexec_handover.c`` @ 7.3: ``kho_preserve_vmalloc``,
``kho_unpreserve_vmalloc``, ``kho_restore_vmalloc`` and ``new_vmalloc_chunk``. The pages' addresses
stand in chunk pages, which are preserved themselves and linked; the caller keeps a descriptor of 16
bytes (:class:`KhoVmallocSlot`) wherever it likes.

Some of what the kernel does here is worth knowing:

* The descriptor's ``order`` is written only when all went well. An area of huge blocks that fails
  half way is therefore unwound with the order that the descriptor had before: with 0, the first
  page of each block is "forgotten", which it never was by itself, and the block stays preserved.
* A chunk that becomes full is always followed by another one, even if that stays empty.
* A restore that fails frees nothing: pages restored by then have no owner any more, the others stay
  reserved.
* Flags that this kernel does not know are ignored when an area is restored.

Left out: KASAN, allocation tags.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from khosim.abi.kho_vmalloc import (
    KHO_VMALLOC_ALLOC,
    KHO_VMALLOC_BYTES,
    KHO_VMALLOC_HDR_BYTES,
    KHO_VMALLOC_HUGE_VMAP,
    KhoVmalloc,
    kho_vmalloc_size,
    pack_kho_vmalloc,
    unpack_kho_vmalloc,
)
from khosim.errors import KernelError
from khosim.kernel.folio_range import FolioRun, preserve_folio_runs, restore_folio_range
from khosim.kernel.kho_out import int_shift
from khosim.kernel.kvmalloc import Buffer, kvfree, kvmalloc
from khosim.kernel.slab import kmalloc
from khosim.kernel.vmalloc import (
    VM_ALLOC,
    VM_ALLOW_HUGE_VMAP,
    VmStruct,
    find_vm_area,
    get_vm_area,
)

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = (
    "KhoVmallocSlot",
    "kho_preserve_vmalloc",
    "kho_restore_vmalloc",
    "kho_unpreserve_vmalloc",
)

_SUPPORTED_FLAGS = VM_ALLOC | VM_ALLOW_HUGE_VMAP
_U64 = (1 << 64) - 1
_NEXT = 0  # offset of hdr.next
_NO_CHUNK = 1


class KhoVmallocSlot:
    """A ``struct kho_vmalloc`` where its owner keeps it: at ``phys`` in RAM, or on the stack.

    A descriptor on the stack begins with the bytes ``stack``: what an uninitialised one happens to
    hold, which a failing preserve call reads.
    """

    __slots__ = ("_kernel", "_stack", "phys")

    def __init__(self, kernel: Kernel, phys: int = 0, *, stack: bytes = b"") -> None:
        self._kernel = kernel
        self.phys = phys
        self._stack = KhoVmalloc(0, 0, 0, 0)
        if stack:
            self._stack = unpack_kho_vmalloc(stack)

    def load(self) -> KhoVmalloc:
        """The descriptor as it is now."""
        if not self.phys:
            return self._stack
        return unpack_kho_vmalloc(self._kernel.ram.read(self.phys, KHO_VMALLOC_BYTES))

    def store(self, descriptor: KhoVmalloc) -> None:
        """Write the descriptor, in the name of ``kho_preserve_vmalloc``."""
        self._stack = descriptor
        if self.phys:
            data = pack_kho_vmalloc(descriptor)
            self._kernel.ram.write(self.phys, data, self._kernel.by("kho_preserve_vmalloc"))


# -- preserving ---------------------------------------------------------------------------------


def kho_preserve_vmalloc(kernel: Kernel, area: VmStruct | None, slot: KhoVmallocSlot) -> None:
    """``kho_preserve_vmalloc``: preserve the pages of ``area``; ``slot`` then describes them.

    Raises -EINVAL for what is no area, -EOPNOTSUPP for one with flags other than ``VM_ALLOC`` and
    ``VM_ALLOW_HUGE_VMAP``, -ENOMEM, and the errors of ``kho_preserve_pages`` for its pages.
    """
    kernel.check_call("kho_preserve_vmalloc")
    symbol = "kho_preserve_vmalloc"
    vm = find_vm_area(area)
    if vm is None:
        raise KernelError(errno.EINVAL, symbol, "not a vmalloc area")
    if vm.flags & ~_SUPPORTED_FLAGS:
        raise KernelError(errno.EOPNOTSUPP, symbol, f"flags {vm.flags:#x}")
    chunk = _new_vmalloc_chunk(kernel, 0)
    if not chunk:
        raise KernelError(errno.ENOMEM, symbol, "the first chunk")
    order = vm.page_order if kernel.release.fix_vmalloc_unwind else slot.load().order
    slot.store(slot.load()._replace(first=chunk, order=order))
    error = _preserve_blocks(kernel, vm, chunk)
    chunk_is_missing = error == _NO_CHUNK
    if chunk_is_missing:
        # 412a32f0e53f ("kho_preserve_vmalloc(): don't return 0 when ENOMEM") in 6.19.
        error = -errno.ENOMEM if kernel.release.vmalloc_enomem_told else 0
    if kernel.trace is not None:
        kernel.emit(symbol, {"nr_pages": vm.nr_pages, "order": vm.page_order}, error)
    if error or chunk_is_missing:
        _free_chunks(kernel, slot)
        if not error:
            return  # and the descriptor leads to a chunk that is free
        raise KernelError(-error, symbol, repr(vm))
    flags = KHO_VMALLOC_ALLOC if vm.flags & VM_ALLOC else 0
    if vm.flags & VM_ALLOW_HUGE_VMAP:
        flags |= KHO_VMALLOC_HUGE_VMAP
    slot.store(KhoVmalloc(chunk, vm.nr_pages & 0xFFFFFFFF, flags, vm.page_order))


def _new_vmalloc_chunk(kernel: Kernel, cur: int) -> int:
    # new_vmalloc_chunk: the address of a zeroed, preserved chunk, linked behind cur; 0 without.
    symbol = "new_vmalloc_chunk"
    pfn = kernel.pages.alloc_pages(0, symbol)
    if pfn is None:
        return 0
    chunk = pfn << kernel.arch.page_shift
    by = kernel.by(symbol)
    kernel.ram.zero(chunk, kernel.arch.page_size, by)
    try:
        kernel.kho_out.preserve_pages(pfn, 1)
    except KernelError:
        kernel.pages.free_pages(pfn, 0)
        return 0
    if cur:
        kernel.ram.write_u64(cur + _NEXT, chunk, by)
    return chunk


def _preserve_blocks(kernel: Kernel, vm: VmStruct, chunk: int) -> int:
    # One chunk after the other; a full one is followed by another at once, needed or not.
    per_chunk = kho_vmalloc_size(kernel.arch.page_size)
    order = vm.page_order
    runs: list[FolioRun] = []
    room = per_chunk
    for start_pfn, nr_pages in vm.runs:
        pfn, left = start_pfn, -(-nr_pages >> order)
        while left:
            taken = min(left, room)
            runs.append(FolioRun(pfn, order, taken))
            pfn += taken << order
            left -= taken
            room -= taken
            if room:
                continue
            error = _fill_chunk(kernel, chunk, runs)
            if error:
                return error
            chunk = _new_vmalloc_chunk(kernel, chunk)
            if not chunk:
                return _NO_CHUNK
            runs, room = [], per_chunk
    return _fill_chunk(kernel, chunk, runs)


def _fill_chunk(kernel: Kernel, chunk: int, runs: list[FolioRun]) -> int:
    error, done = preserve_folio_runs(kernel, runs, "kho_preserve_pages")
    if not done:
        return error
    shift = kernel.arch.page_shift
    by = kernel.by("kho_preserve_vmalloc")
    entries = kernel.ram.writable(chunk + KHO_VMALLOC_HDR_BYTES, done * 8, by).view("<u8")
    at = 0
    for pfn, order, nr_blocks in runs:
        count = min(nr_blocks, done - at)
        step = 1 << (order + shift)
        first = pfn << shift
        if count == 1:
            entries[at] = first
        else:
            entries[at : at + count] = first + np.arange(count) * step
        at += count
        if at == done:
            break
    return error


# -- unpreserving -------------------------------------------------------------------------------


def kho_unpreserve_vmalloc(kernel: Kernel, slot: KhoVmallocSlot) -> None:
    """``kho_unpreserve_vmalloc``: forget the pages that ``slot`` describes and free the chunks.

    Each listed address stands for as many pages as the descriptor's ``order`` says now.
    """
    kernel.check_call("kho_unpreserve_vmalloc")
    _free_chunks(kernel, slot)


def _free_chunks(kernel: Kernel, slot: KhoVmallocSlot) -> None:
    descriptor = slot.load()
    chunk = descriptor.first
    page_size = kernel.arch.page_size
    while chunk:
        kernel.virt(chunk, page_size)
        pfn = chunk >> kernel.arch.page_shift
        kernel.kho_out.unpreserve_pages(pfn, 1)
        for head, nr_blocks in _block_runs(kernel, chunk, 1 << (descriptor.order & 31)):
            if kernel.release.vmalloc_unpreserves_blocks:
                _unpreserve_blocks(kernel, head, nr_blocks, descriptor.order)
                continue
            # Until 7ecd2e439d12 ("kho: fix unpreservation of higher-order vmalloc ...") in 6.18.
            for n in range(nr_blocks):
                kernel.kho_out.unpreserve_pages(head + (n << descriptor.order), 1)
        chunk = kernel.ram.read_u64(chunk + _NEXT)
        kernel.pages.free_pages(pfn, 0)
    if kernel.trace is not None:
        kernel.emit("kho_unpreserve_vmalloc", {"first": descriptor.first}, None)


def _unpreserve_blocks(kernel: Kernel, pfn: int, nr_blocks: int, order: int) -> None:
    # __kho_unpreserve(pfn, pfn + (1 << order)) for each block: one key, if it is a block at all.
    step = int_shift(order)
    is_block = order < 31 and not pfn & (step - 1) and pfn
    last = pfn + nr_blocks * step - 1
    if nr_blocks > 1 and is_block and kernel.nid_of_pfn(pfn) == kernel.nid_of_pfn(last):
        kernel.kho_out.unpreserve_folio_range(pfn, nr_blocks, order)
        return
    for head in range(pfn, last + 1, step) if step > 0 else [pfn] * nr_blocks:
        kernel.kho_out.unpreserve_pages(head, step)


def _block_runs(kernel: Kernel, chunk: int, step: int) -> list[tuple[int, int]]:
    """The blocks a chunk lists as ``(first pfn, blocks)``, neighbours joined, up to the first 0."""
    size = kernel.arch.page_size - KHO_VMALLOC_HDR_BYTES
    phys = kernel.ram.view(chunk + KHO_VMALLOC_HDR_BYTES, size).view("<u8")
    if not phys[-1]:
        phys = phys[: int(np.argmin(phys != 0))]
    elif not kernel.release.vmalloc_chunk_bounded:
        phys = np.concatenate((phys, _words_behind(kernel, chunk + kernel.arch.page_size)))
    if not len(phys):
        return []
    pfns: npt.NDArray[np.uint64] = phys >> np.uint64(kernel.arch.page_shift)
    cuts = np.flatnonzero(np.diff(pfns) != step) + 1
    starts = [0, *cuts.tolist()]
    ends = [*starts[1:], len(pfns)]
    heads = pfns[starts].tolist()
    return [(head, end - start) for head, start, end in zip(heads, starts, ends, strict=True)]


def _words_behind(kernel: Kernel, phys: int) -> npt.NDArray[np.uint64]:
    # The loop over a full chunk goes on to the first zero, on whatever page that is.
    page_size = kernel.arch.page_size
    found: list[npt.NDArray[np.uint64]] = []
    while True:
        words = kernel.ram.view(kernel.virt(phys, page_size), page_size).view("<u8")
        zeros = np.flatnonzero(words == 0)
        if len(zeros):
            return np.concatenate((*found, words[: zeros[0]]))
        found.append(words)
        phys += page_size


# -- restoring ----------------------------------------------------------------------------------


def kho_restore_vmalloc(kernel: Kernel, slot: KhoVmallocSlot) -> VmStruct | None:
    """``kho_restore_vmalloc``: an area of the pages that ``slot`` describes, or None.

    The area's own order is 0 whatever the blocks' was: preserved again, it is a list of single
    pages.
    """
    kernel.check_call("kho_restore_vmalloc")
    descriptor = slot.load()
    pages = kvmalloc(kernel, descriptor.total_pages * 8, "kho_restore_vmalloc")
    if pages is None:
        return None
    area = _restore_area(kernel, descriptor, pages)
    if kernel.trace is not None:
        args = {"first": descriptor.first, "total_pages": descriptor.total_pages}
        kernel.emit("kho_restore_vmalloc", args, area is not None)
    if area is None:
        kvfree(kernel, pages)
    return area


def _restore_area(kernel: Kernel, descriptor: KhoVmalloc, pages: Buffer) -> VmStruct | None:
    restored = VmStruct(kernel, 0, 0)
    first = kernel.release.fix_vmalloc_restore
    area = _new_area(kernel, descriptor) if first else None
    if first and area is None:
        return None
    chunk = descriptor.first
    while chunk:
        kernel.virt(chunk, kernel.arch.page_size)
        if not _restore_blocks(kernel, descriptor, chunk, restored):
            return None
        pfn = kernel.kho_in.restore_pages(chunk, 1)
        if pfn is None:
            return None
        chunk = kernel.ram.read_u64(chunk + _NEXT)
        kernel.pages.free_pages(pfn, 0)
    if restored.nr_pages != descriptor.total_pages or not restored.nr_pages:
        return None
    area = area or _new_area(kernel, descriptor)
    if area is None:
        return None
    for start_pfn, nr_pages in restored.runs:
        if kernel.release.vmalloc_fills_pages or not descriptor.order:
            area.add_run(start_pfn, nr_pages)
            continue
        # Until 4bc84cd539df ("kho: kho_restore_vmalloc: fix initialization of pages array").
        for head in range(start_pfn, start_pfn + nr_pages, 1 << descriptor.order):
            for _ in range(1 << descriptor.order):
                area.add_run(head, 1)
    area.free_pages_array = lambda: kvfree(kernel, pages)
    if kernel.release.fix_vmalloc_count:
        kernel.pages.nr_vmalloc += area.nr_pages
    return area


def _new_area(kernel: Kernel, descriptor: KhoVmalloc) -> VmStruct | None:
    # __get_vm_area_node and vmap_pages_range: what else needs memory.
    flags = VM_ALLOC if descriptor.flags & KHO_VMALLOC_ALLOC else 0
    if descriptor.flags & KHO_VMALLOC_HUGE_VMAP:
        flags |= VM_ALLOW_HUGE_VMAP
    area = get_vm_area(kernel, flags, descriptor.order if kernel.release.fix_vmalloc_order else 0)
    return None if area is None or not kmalloc(kernel, "vmap_pages_range") else area


def _restore_blocks(kernel: Kernel, descriptor: KhoVmalloc, chunk: int, restored: VmStruct) -> bool:
    order = descriptor.order
    contig_pages = int_shift(order) & _U64
    for pfn, nr_blocks in _block_runs(kernel, chunk, 1 << (order & 31)):
        room = max(0, descriptor.total_pages - restored.nr_pages) // contig_pages
        wanted = min(nr_blocks, room)
        done = _restore_range(kernel, pfn, wanted, order)
        if done:
            restored.add_run(pfn, done * contig_pages)
        if done < nr_blocks:
            return False
    return True


def _restore_range(kernel: Kernel, pfn: int, nr_blocks: int, order: int) -> int:
    if not nr_blocks:
        return 0
    if order < 31:
        return restore_folio_range(kernel, pfn, nr_blocks, order, as_pages=True)
    return 0
