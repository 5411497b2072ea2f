"""``reserve_mem=``: named regions of memory that keep their address and content.

Models ``mm/memblock.c`` @ 7.3: ``reserve_mem``, ``reserve_mem_kho_revive``, ``prepare_kho_fdt``,
``reserved_mem_preserve``, ``reserve_mem_find_by_name``, ``reserve_mem_release_by_name``; and
``reserve_mem_kho_finalize`` @ 6.16 to 6.18, where a notifier preserves the regions. A region is
found again in the predecessor's "memblock" subtree, or allocated anew with the kernel's reason
printed. On a handover boot a new region comes from scratch, as in the kernel.
"""

from __future__ import annotations

import errno
import struct
from functools import partial
from typing import TYPE_CHECKING

from khosim.abi import fdt
from khosim.abi.memblock import (
    MEMBLOCK_KHO_FDT,
    MEMBLOCK_KHO_NODE_COMPATIBLE,
    RESERVE_MEM_KHO_NODE_COMPATIBLE,
)
from khosim.errors import KernelError
from khosim.kernel.kho_fdt import child_props, memblock_fdt
from khosim.kernel.kho_in import FDT_MAX_BYTES
from khosim.units import memparse

if TYPE_CHECKING:
    from collections.abc import Callable

    from khosim.kernel.kernel import Kernel

__all__ = ("ReserveMem",)

_MAX_ENTRIES = 8
_NAME_SIZE = 16
_SMP_CACHE_BYTES = 64
_SPACE = " \t\n\v\f\r\xa0"  # isspace
_U64_LE = struct.Struct("<Q")
_U32 = (1 << 32) - 1


class ReserveMem:
    """``reserved_mem_table``: ``regions`` are ``[name, start, size]``, addresses in bytes."""

    __slots__ = ("_fdt_phys", "_kernel", "_tree_phys", "regions")

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._fdt_phys: int | None = None
        self._tree_phys = 0
        self.regions: list[tuple[str, int, int]] = []

    # -- boot parameter -------------------------------------------------------------------------

    def parse(self, text: str) -> int:
        """``reserve_mem``: one parameter ``size:align:name``; 1, or a negative errno."""
        kernel = self._kernel
        if len(self.regions) >= _MAX_ENTRIES:
            kernel.printk("reserve_mem: no more room for reserved memory")
            return -errno.EBUSY
        size, at = memparse(text)
        if not size or not at or text[at : at + 1] != ":":
            return self._malformed()
        align, at = memparse(text, at + 1)
        if text[at : at + 1] != ":":
            return self._malformed()
        align = max(align, _SMP_CACHE_BYTES)
        if kernel.release.fix_region_tail:
            page = kernel.arch.page_size
            size, align = -(-size // page) * page, max(align, page)
        name = text[at + 1 :]
        if not name or len(name) >= _NAME_SIZE or not name.strip(_SPACE):
            return self._malformed()
        if kernel.release.fix_region_name and "@" in name:
            return self._malformed()
        if self.find_by_name(name) is not None:
            kernel.printk(f'reserve_mem: name "{name}" was already used')
            return -errno.EBUSY
        if self._kho_revive(name, size, align):
            return 1
        if kernel.release.fix_region_in_scratch and kernel.memblock.kho_scratch_only:
            kernel.printk(f'reserve_mem: "{name}" cannot be new on a handover boot')
            return -errno.EBUSY
        start = kernel.memblock.memblock_phys_alloc_range(size, align, 0, 0)
        if not start:
            kernel.printk("reserve_mem: memblock allocation failed")
            return -errno.ENOMEM
        self.regions.append((name, start, size))
        if kernel.trace is not None:
            kernel.emit("reserve_mem", {"name": name, "size": size, "align": align}, start)
        return 1

    def _malformed(self) -> int:
        self._kernel.printk("reserve_mem: empty or malformed parameter")
        return -errno.EINVAL

    def _retrieve_fdt(self) -> memoryview | None:
        # reserve_mem_kho_retrieve_fdt
        kernel = self._kernel
        if self._fdt_phys:
            return kernel.fdt_at(self._fdt_phys)[:FDT_MAX_BYTES]
        try:
            phys, _ = kernel.kho_in.retrieve_subtree(MEMBLOCK_KHO_FDT)
        except KernelError as refused:
            if refused.errno != errno.ENOENT:
                kernel.printk(
                    f"failed to retrieve FDT '{MEMBLOCK_KHO_FDT}' from KHO: {-refused.errno}"
                )
            return None
        tree = kernel.fdt_at(phys)[:FDT_MAX_BYTES]
        error = fdt.fdt_node_check_compatible(tree, 0, MEMBLOCK_KHO_NODE_COMPATIBLE, addr=phys)
        if error:
            kernel.printk(
                f"FDT '{MEMBLOCK_KHO_FDT}' is incompatible with "
                f"'{MEMBLOCK_KHO_NODE_COMPATIBLE}': {error}"
            )
            return None
        self._fdt_phys = phys
        return tree

    def _kho_revive(self, name: str, size: int, align: int) -> bool:
        # reserve_mem_kho_revive
        kernel = self._kernel
        tree = self._retrieve_fdt()
        if tree is None:
            return False
        offset, props = child_props(tree, name, ("start", "size"))
        if offset < 0:
            kernel.printk(f"FDT '{MEMBLOCK_KHO_FDT}' has no child '{name}': {offset}")
            return False
        error = fdt.fdt_node_check_compatible(tree, offset, RESERVE_MEM_KHO_NODE_COMPATIBLE)
        if error:
            kernel.printk(
                f"Node '{name}' is incompatible with '{RESERVE_MEM_KHO_NODE_COMPATIBLE}': {error}"
            )
            return False
        (start_bytes, start_length), (size_bytes, size_length) = props
        if start_bytes is None or start_length != 8 or size_bytes is None or size_length != 8:
            return False
        start = int(_U64_LE.unpack(start_bytes)[0])
        old_size = int(_U64_LE.unpack(size_bytes)[0])
        if start & (align - 1):
            kernel.printk(
                f"KHO reserve-mem '{name}' has wrong alignment ({align:#x}, {start:#x})"
            )
            return False
        if old_size != size:
            kernel.printk(f"KHO reserve-mem '{name}' has wrong size ({old_size:#x} != {size:#x})")
            return False
        self.regions.append((name, start, size))
        kernel.printk(f"Revived memory reservation '{name}' from KHO")
        if kernel.trace is not None:
            kernel.emit("reserve_mem_kho_revive", {"name": name, "size": size}, start)
        return True

    # -- users ----------------------------------------------------------------------------------

    def find_by_name(self, name: str) -> tuple[int, int] | None:
        """``reserve_mem_find_by_name``: ``(start, size)`` in bytes, or None."""
        for known, start, size in self.regions:
            if size and known == name:
                return start, size
        return None

    def release_by_name(self, name: str) -> bool:
        """``reserve_mem_release_by_name``: free the region's whole pages; whether it existed.

        What the successor is told of the region stays: its node in the subtree and the preserved
        pages, which others may use by then.
        """
        kernel = self._kernel
        for i, (known, start, size) in enumerate(self.regions):
            if size and known == name:
                kernel.virt(start, size)
                if kernel.release.fix_region_release and self._tree_phys:
                    self._forget(name, start, size)
                kernel.free_reserved_area(start, start + size, f"reserve_mem:{name}", 0)
                self.regions[i] = (known, start, 0)
                return True
        return False

    def _forget(self, name: str, start: int, size: int) -> None:
        kernel = self._kernel
        page_size, shift = kernel.arch.page_size, kernel.arch.page_shift
        by = kernel.by("reserve_mem_release_by_name")
        tree = kernel.ram.writable_mv(self._tree_phys, page_size, by)
        offset = fdt.fdt_subnode_offset(tree, 0, name)
        if offset >= 0:
            fdt.fdt_del_node(tree, offset)
        kernel.kho_out.unpreserve_pages(start >> shift, size >> shift)

    # -- handing over ---------------------------------------------------------------------------

    def init(self) -> int:
        """``reserve_mem_init``: describe and preserve the regions; 0 or a negative errno."""
        kernel = self._kernel
        if kernel.release.fix_region_unclaimed:
            self._free_unclaimed()
        if not kernel.kho_enable or not self.regions:
            return 0
        in_notifier = kernel.release.reserve_mem_in_notifier
        error = self._prepare_for_notifier() if in_notifier else self._prepare_kho_fdt()
        if error:
            kernel.printk(f"failed to prepare memblock FDT for KHO: {error}")
        return error

    def _free_unclaimed(self) -> None:
        kernel = self._kernel
        tree = self._retrieve_fdt() if kernel.is_kho_boot else None
        offset = -1 if tree is None else fdt.fdt_first_subnode(tree, 0)
        shift = kernel.arch.page_shift
        claimed = {start for _, start, _ in self.regions}
        while tree is not None and offset >= 0:
            places = [fdt.fdt_getprop(tree, offset, name)[0] for name in ("start", "size")]
            start, size = (int(_U64_LE.unpack(place)[0]) if place else 0 for place in places)
            nr_pages = size >> shift
            offset = fdt.fdt_next_subnode(tree, offset)
            if start in claimed or kernel.kho_in.restore_pages(start, nr_pages) is None:
                continue
            for pfn in range(start >> shift, (start >> shift) + nr_pages):
                kernel.pages.free_pages(pfn, 0)

    def _prepare_for_notifier(self) -> int:
        # prepare_kho_fdt and register_kho_notifier @ 6.16 to 6.18: the tree is written once, all
        # else has to wait for reserve_mem_kho_finalize.
        kernel = self._kernel
        symbol = "prepare_kho_fdt"
        pfn = kernel.pages.alloc_pages(0, symbol)
        if pfn is None:
            return -errno.ENOMEM
        phys = pfn << kernel.arch.page_shift
        error = self._write_fdt(
            kernel.ram.writable_mv(phys, kernel.arch.page_size, kernel.by(symbol))
        )
        if error:
            kernel.pages.free_pages(pfn, 0)
            return error
        kernel.kho_out.notifiers.append(lambda action: self._notified(action, phys))
        return 0

    def _notified(self, action: str, fdt_phys: int) -> int:
        # reserve_mem_kho_finalize: all of it is tried, errors are or-ed together.
        kernel = self._kernel
        if action != "KEXEC_KHO_FINALIZE":
            return 0
        out, shift = kernel.kho_out, kernel.arch.page_shift
        tries: list[Callable[[], None]] = []
        for _, start, size in self.regions:
            if kernel.release.has("kho_preserve_phys"):
                tries.append(partial(out.preserve_phys, start, size))
            else:
                tries.append(partial(out.preserve_pages, start >> shift, size >> shift & _U32))
        tries.append(partial(out.preserve_folio, fdt_phys >> shift, 0))
        tries.append(partial(out.add_subtree, MEMBLOCK_KHO_FDT, fdt_phys, 0))
        error = 0
        for attempt in tries:
            try:
                attempt()
            except KernelError as refused:
                error |= -refused.errno
        return error

    def _prepare_kho_fdt(self) -> int:
        kernel = self._kernel
        out = kernel.kho_out
        symbol = "prepare_kho_fdt"
        fdt_pfn = kernel.pages.alloc_pages(0, symbol)
        if fdt_pfn is None:
            return -errno.ENOMEM
        try:
            out.preserve_pages(fdt_pfn, 1)
        except KernelError as refused:
            kernel.pages.free_pages(fdt_pfn, 0)
            return -refused.errno
        phys = fdt_pfn << kernel.arch.page_shift
        buf = kernel.ram.writable_mv(phys, kernel.arch.page_size, kernel.by(symbol))
        error = self._write_fdt(buf)
        unwinds = kernel.release.reserve_mem_unwinds
        if not error:
            try:
                out.add_subtree(MEMBLOCK_KHO_FDT, phys, fdt.fdt_totalsize(buf))
            except KernelError as refused:
                error = -refused.errno
            else:
                error = self._preserve_regions()
                self._tree_phys = 0 if error else phys
                if error and unwinds:
                    out.remove_subtree(phys)
        if error and unwinds:
            out.unpreserve_pages(fdt_pfn, 1)
            kernel.pages.free_pages(fdt_pfn, 0)
        return error

    def _write_fdt(self, buf: memoryview) -> int:
        error, buf[:] = memblock_fdt(self._kernel.arch.page_size, tuple(self.regions))
        return error

    def _preserve_regions(self) -> int:
        # reserved_mem_preserve; nr_pages is an unsigned int there.
        shift = self._kernel.arch.page_shift
        done: list[tuple[int, int]] = []
        for _, start, size in self.regions:
            pfn, nr_pages = start >> shift, (size >> shift) & _U32
            try:
                self._kernel.kho_out.preserve_pages(pfn, nr_pages)
            except KernelError as refused:
                if not self._kernel.release.reserve_mem_unwinds:
                    return -refused.errno
                for done_pfn, done_pages in done:
                    self._kernel.kho_out.unpreserve_pages(done_pfn, done_pages)
                return -refused.errno
            done.append((pfn, nr_pages))
        return 0
