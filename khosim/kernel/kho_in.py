"""KHO, the incoming side: finding, checking and taking over a predecessor's handover.

Models ``kernel/liveupdate/kexec_handover.c`` @ 7.3: ``kho_populate``, ``kho_memory_init_early``,
``kho_mem_retrieve``, ``kho_preserved_memory_reserve``, ``kho_restore_folio``,
``kho_restore_pages``, ``kho_restore_free``, ``kho_retrieve_subtree`` and
``kho_in_kexec_metadata``, with the kernel's messages. Whatever the bytes say ends in an outcome of
the kernel's: a refusal, a warning, a boot without handover, or a panic.

Left out: vmalloc areas, KASAN and allocation tags.
"""

from __future__ import annotations

import errno
import struct
from operator import itemgetter
from typing import TYPE_CHECKING

from khosim.abi import fdt
from khosim.abi.kexec_metadata import (
    KEXEC_METADATA_BYTES,
    KHO_KEXEC_METADATA_VERSION,
    KHO_METADATA_NODE_NAME,
    unpack_kexec_metadata,
)
from khosim.errors import KernelError, KernelPanic
from khosim.kernel.early_ioremap import early_fault, early_memremap
from khosim.kernel.folio_range import restore_plain_folio
from khosim.kernel.kho_fdt import child_props
from khosim.kernel.kho_out import int_shift
from khosim.kernel.kho_radix import KhoRadixTree
from khosim.kernel.kho_radix_key import kho_decode_radix_key
from khosim.kernel.kho_reserve import leave_uninitialised, reserve_blocks
from khosim.kernel.kho_scratch import kho_extend_scratch, read_scratch_array
from khosim.kernel.kho_tracker import make_tracker
from khosim.kernel.page_map import INCOMING, KHO_PAGE_MAGIC, PageState

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.kho_tracker import BlockTracker, Tracker

__all__ = ("FDT_MAX_BYTES", "KHO_PAGE_MAGIC", "KhoIn")

_U64_LE = struct.Struct("<Q")
FDT_MAX_BYTES = 1 << 20
"""Of a handover's FDT no more is looked at, whatever size it claims; the kernel writes a page."""
_INT_MAX = (1 << 31) - 1
_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1
_MAX_ORDER = 40
"""Orders above are no block of any machine: the loop over their pages does not end."""
_HANG_PAGES = 1 << 34
"""Struct pages a loop may visit before the model calls it a hang (minutes on real hardware)."""


class KhoIn:
    """``struct kho_in``: ``fdt_phys`` and ``scratch_phys`` are 0 unless a handover was taken."""

    __slots__ = (
        "_kernel",
        "_states",
        "fdt_phys",
        "kexec_count",
        "previous_release",
        "restored",
        "scratch_phys",
        "tree",
    )

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._states: dict[int, PageState] = {}
        self.fdt_phys = 0
        self.scratch_phys = 0
        self.previous_release = ""
        self.kexec_count = 0
        self.tree: Tracker = make_tracker(kernel)
        self.restored: list[tuple[int, int]] = []
        """``(pfn, order)`` of every block that was restored, in order."""

    # -- early boot -----------------------------------------------------------------------------

    def populate(self, fdt_phys: int, fdt_len: int, scratch_phys: int, scratch_len: int) -> None:
        """``kho_populate``: accept the handover, or say why not and boot without it."""
        kernel = self._kernel
        error = self._populate(fdt_phys, fdt_len, scratch_phys, scratch_len)
        if not error:
            more = " Will skip init for some devices" if kernel.release.skip_init_told else ""
            kernel.printk(f"KHO: found kexec handover data.{more}")
        else:
            number = f": {error}" if kernel.release.revival_errno_told else ""
            kernel.printk(f"KHO: disabling KHO revival{number}")
        if kernel.trace is not None:
            args = {"fdt_phys": fdt_phys, "scratch_phys": scratch_phys, "scratch_len": scratch_len}
            kernel.emit("kho_populate", args, bool(self.fdt_phys))

    def _populate(self, fdt_phys: int, fdt_len: int, scratch_phys: int, scratch_len: int) -> int:
        kernel = self._kernel
        printk = kernel.printk
        tree = early_memremap(kernel, fdt_phys, fdt_len)
        if tree is None:
            printk(f"KHO: setup: failed to memremap FDT ({fdt_phys:#x})")
            return -errno.EFAULT
        error = self._mapped(tree, fdt_phys, fdt.fdt_check_header(tree, addr=fdt_phys))
        if error:
            printk(f"KHO: setup: handover FDT ({fdt_phys:#x}) is invalid: {error}")
            return -errno.EINVAL
        compatible = kernel.release.kho_compatible
        error = fdt.fdt_node_check_compatible(tree, 0, compatible)
        error = self._mapped(tree, fdt_phys, error)
        if error:
            printk(
                f"KHO: setup: handover FDT ({fdt_phys:#x}) is incompatible with "
                f"'{compatible}': {error}"
            )
            return -errno.EINVAL
        release = kernel.release
        if not release.empty_map_accepted and not self._mem_map_phys(tree, fdt_phys):
            return -errno.ENOENT
        array = early_memremap(kernel, scratch_phys, scratch_len)
        if array is None:
            printk(
                f"KHO: setup: failed to memremap scratch (phys={scratch_phys:#x}, "
                f"len={scratch_len - (scratch_len >> 63 << 64)})"
            )
            return -errno.EFAULT
        memblock = kernel.memblock
        # The kernel counts the entries, like the pages it maps, in 32 bits.
        scratch_cnt = (scratch_len >> 4) & _U32
        areas = read_scratch_array(bytes(array[: scratch_cnt << 4]))
        for addr, size in areas:
            memblock.memblock_add(addr, size)
            error = memblock.memblock_mark_kho_scratch(addr, size)
            if error:
                name = errno.errorcode.get(-error, str(error))
                printk(f"KHO: failed to mark the scratch region {addr:#x}+{size:#x}: -{name}")
                return error
        memblock.memblock_reserve(scratch_phys, scratch_len)
        memblock.memblock_set_kho_scratch_only()
        self.fdt_phys = fdt_phys
        self.scratch_phys = scratch_phys
        kernel.kho_scratch_cnt = scratch_cnt
        return 0

    def _mapped(self, tree: memoryview, phys: int, result: int) -> int:
        # libfdt trusts the header's size. Where that is more than the kernel has mapped, reading on
        # is a fault, and not the error that an honest size would have been.
        if result == -fdt.FDT_ERR_TRUNCATED and (
            len(tree) < 40 or len(tree) < fdt.fdt_totalsize(tree) < _INT_MAX
        ):
            raise early_fault(self._kernel, phys + len(tree), "handover FDT")
        return result

    def _mem_map_phys(self, tree: memoryview, phys: int) -> int:
        # kho_get_mem_map_phys
        value, length = fdt.fdt_getprop(tree, 0, self._kernel.release.memory_map_prop)
        self._mapped(tree, phys, length)
        if value is None or length != 8:
            what = "map" if self._kernel.release.tracker != "chunks" else "bitmaps"
            self._kernel.printk(f"KHO: failed to get preserved memory {what}")
            return 0
        return int(_U64_LE.unpack(value)[0])

    def fdt(self) -> memoryview | None:
        """``kho_get_fdt``: the predecessor's root FDT, or None without a handover."""
        if not self.fdt_phys:
            return None
        return self._kernel.fdt_at(self.fdt_phys)[:FDT_MAX_BYTES]

    def memory_init_early(self) -> None:
        """``kho_memory_init_early``: open the predecessor's tree and extend scratch."""
        kernel = self._kernel
        if kernel.release.fix_kho_off and not kernel.kho_enable:
            self.fdt_phys = self.scratch_phys = kernel.kho_scratch_cnt = 0
            kernel.memblock.memblock_clear_kho_scratch_only()
            kernel.printk("KHO: disabled, nothing is taken over")
        tree = self.fdt()
        if tree is None:
            return
        mem_map = self._mem_map_phys(tree, self.fdt_phys)
        if not mem_map and not kernel.release.empty_map_accepted:
            kernel.warn("WARNING: kho_memory_init_early: no memory map")
            self.fdt_phys = self.scratch_phys = 0
            return
        kernel.kho_scratch_phys = self.scratch_phys
        if mem_map:
            self.tree.init_tree(mem_map)
        if kernel.release.scratch_extension and isinstance(self.tree, KhoRadixTree):
            kho_extend_scratch(kernel.memblock, kernel, self.tree, kernel.printk)
        if kernel.trace is not None:
            kernel.emit("kho_memory_init_early", {"mem_map": mem_map}, None)

    def mem_retrieve(self) -> None:
        """``kho_mem_retrieve``: reserve everything that the predecessor preserved."""
        self._mem_retrieve()
        leave_uninitialised(self._kernel)

    def _mem_retrieve(self) -> None:
        if not isinstance(self.tree, KhoRadixTree):
            self._mem_deserialize(self.tree)
            return
        if not self.tree.root:
            # kho_radix_walk_tree refuses a tree without root; KHO users see a cold boot.
            self._kernel.warn("WARNING: kho_radix_walk_tree: tree has no root")
            self.fdt_phys = 0
            return
        runs: list[tuple[int, int, int]] = []
        missing_from = self._kernel.first_missing_struct_page
        shift = self._kernel.arch.page_shift
        for nr_keys, key in self.tree.runs():
            if (key + nr_keys - 1).bit_length() == key.bit_length():
                decoded = [(*kho_decode_radix_key(key, shift), nr_keys)]
            else:  # across an order: no neighbours
                each = (kho_decode_radix_key(one, shift) for one in range(key, key + nr_keys))
                decoded = [(phys, order, 1) for phys, order in each]
            for phys, order, nr_blocks in decoded:
                pfn = phys >> shift
                if (
                    not 0 <= order <= _MAX_ORDER
                    or missing_from(pfn, pfn + (nr_blocks << order)) is not None
                ):
                    self._check_hostile(phys, order, nr_blocks)
            runs += decoded
        if self._kernel.release.reserve_size_is_int:
            reserve_blocks(self._kernel, runs, "kho_preserved_memory_reserve")
        else:
            self._reserve(runs)

    def _mem_deserialize(self, tracker: BlockTracker) -> None:
        # kho_mem_deserialize; with no map at all there is nothing to do, and no word about it.
        kernel = self._kernel
        if tracker.root:
            reserve_blocks(kernel, tracker.blocks(), "deserialize_bitmap")
        if kernel.release.restores_root_fdt and self.restore_folio(self.fdt_phys) is None:
            kernel.printk("KHO: failed to restore folio for KHO fdt")

    def _reserve(self, runs: list[tuple[int, int, int]]) -> None:
        # kho_preserved_memory_reserve for every key, in the walk's order.
        kernel = self._kernel
        shift = kernel.arch.page_shift
        states = {order: self._state(order) for order in {run[1] for run in runs}}
        plain = [
            (phys >> shift, (phys >> shift) + (nr_blocks << order), states[order])
            for phys, order, nr_blocks in runs
        ]
        starts = [phys for phys, _, _ in runs]
        ends = [end_pfn << shift for _, end_pfn, _ in plain]
        kernel.memblock.memblock_reserve_many(starts, ends)
        by_start = sorted(plain, key=itemgetter(0))
        covered_to = -1
        overlapping = False
        for start_pfn, end_pfn, _ in by_start:
            if start_pfn < covered_to:
                overlapping = True
                break
            covered_to = end_pfn
        if not overlapping:
            kernel.pages.pages.add_many(by_start)
        else:
            # Blocks of a hostile tree. Keys come with falling orders, so the head of an older block
            # is one of the newer as well where both hold its page: the newer just wins.
            for start_pfn, end_pfn, state in plain:
                kernel.pages.pages.set(start_pfn, end_pfn, state)
        if kernel.trace is not None:
            for (phys, order, nr_blocks), _ in zip(runs, plain, strict=True):
                args = {"phys": phys, "order": order, "nr_blocks": nr_blocks}
                kernel.emit("kho_preserved_memory_reserve", args, None)

    def _state(self, order: int) -> PageState:
        state = self._states.get(order)
        if state is None:
            state = self._states[order] = PageState(INCOMING, order, False, "predecessor")
        return state

    def _check_hostile(self, phys: int, order: int, nr_blocks: int) -> None:
        # init_deferred_page touches the struct page of every page from first_deferred_pfn on, and
        # page->private that of the head: a page fault where the section has none.
        kernel = self._kernel
        pfn = phys >> kernel.arch.page_shift
        if not 0 <= order <= _MAX_ORDER or (nr_blocks << order) > _HANG_PAGES:
            raise KernelPanic(
                f"kho_preserved_memory_reserve: key for {phys:#x} has impossible order {order}: "
                "the kernel faults or hangs on its struct pages",
                kernel.generation,
            )
        head = pfn
        for _ in range(nr_blocks):
            first_bad = kernel.first_missing_struct_page(head, head + (1 << order))
            if first_bad == head or (
                first_bad is not None and not kernel.early_page_initialised(first_bad)
            ):
                raise KernelPanic(
                    "BUG: unable to handle page fault for address: struct page of pfn "
                    f"{first_bad:#x} in kho_preserved_memory_reserve",
                    kernel.generation,
                )
            head += 1 << order

    # -- restoring ------------------------------------------------------------------------------

    def _restore_page(self, phys: int, is_folio: bool, symbol: str) -> tuple[int, int] | None:
        # kho_restore_page: (pfn, order), or None where the kernel returns NULL.
        kernel = self._kernel
        pages = kernel.pages.pages
        pfn = phys >> kernel.arch.page_shift
        if not kernel.pfn_to_online_page(pfn):
            return None
        release = kernel.release
        private = pages.page_private(pfn, KHO_PAGE_MAGIC if release.page_magic else 0)
        order = private & 0xFFFFFFFF if release.page_magic else private
        too_large = release.restore_order_cap and order > kernel.arch.max_page_order
        if not release.page_magic:
            # Any page will do, until 89a3ecca49ee ("kho: make sure page being restored ...") in
            # 6.18: nothing tells a preserved one.
            if too_large:
                return None
        elif private >> 32 != KHO_PAGE_MAGIC or too_large:
            what = "no magic" if private >> 32 != KHO_PAGE_MAGIC else f"order {order}"
            kernel.warn_once(f"WARNING: kho_restore_page: {what} at {phys:#x}", "kho_magic")
            return None
        nr_pages = int_shift(order)
        if nr_pages < 0:
            raise KernelPanic(
                f"BUG: unable to handle page fault: kho_restore_page of order {order} at "
                f"{phys:#x}: 1 << order is negative",
                kernel.generation,
            )
        if order > kernel.arch.max_page_order and not kernel.struct_pages_exist(pfn, nr_pages):
            raise KernelPanic(
                "BUG: unable to handle page fault for address: struct pages of order "
                f"{order} at {phys:#x} in kho_restore_page",
                kernel.generation,
            )
        compound = order > 0 and (is_folio or release.restore_pages_compound)
        state = kernel.pages.restored_state(order if compound else 0, compound)
        kept: dict[int, int] = {}
        if pages.private:
            inside = range(pfn + 1, pfn + nr_pages)
            kept = {other: value for other, value in pages.private.items() if other in inside}
        pages.set(pfn, pfn + nr_pages, state)
        pages.private.update(kept)
        if not release.restore_clears_private and order:
            pages.private[pfn] = order
        if compound and not is_folio:
            # split_page gives each page a reference, and leaves a compound page what it is.
            pages.refs.update(dict.fromkeys(range(pfn + 1, pfn + nr_pages), 1))
        if release.restore_inits_refcounts or not order:
            kernel.pages.adjust_managed_page_count(pfn, nr_pages)
        else:
            pages.refs.update(dict.fromkeys(range(pfn + 1, pfn + nr_pages), 1))
        kernel.debugfs.restored(phys)
        self.restored.append((pfn, order))
        if kernel.trace is not None:
            kernel.emit(symbol, {"phys": phys, "order": order}, pfn)
        return pfn, order

    def restore_folio(self, phys: int) -> tuple[int, int] | None:
        """``kho_restore_folio``: ``(pfn, order)`` of the folio at ``phys``, None on refusal."""
        kernel, pfn = self._kernel, phys >> self._kernel.arch.page_shift
        if kernel.trace is None and (order := restore_plain_folio(kernel, pfn)) is not None:
            kernel.debugfs.restored(phys)
            self.restored.append((pfn, order))
            return pfn, order
        return self._restore_page(phys, True, "kho_restore_folio")

    def restore_pages(self, phys: int, nr_pages: int) -> int | None:
        """``kho_restore_pages``: the first pfn of pages, None on refusal; nodes do not count."""
        shift = self._kernel.arch.page_shift
        fixed, nid_of_pfn = self._kernel.release.fix_restore_nodes, self._kernel.nid_of_pfn
        pfn = start_pfn = phys >> shift
        while pfn < (end_pfn := start_pfn + nr_pages):
            trailing = (pfn & -pfn).bit_length() - 1
            order = min(trailing, (end_pfn - pfn).bit_length() - 1)
            while fixed and order > 0 and nid_of_pfn(pfn) != nid_of_pfn(pfn + (1 << order) - 1):
                order -= 1
            if self._restore_page(pfn << shift, False, "kho_restore_pages") is None:
                return None
            pfn = (pfn + int_shift(order)) & _U64
        return start_pfn

    def restore_free(self, phys: int) -> None:
        """``kho_restore_free``: take a folio over and free it at once."""
        restored = self.restore_folio(phys)
        if restored is None:
            self._kernel.warn(f"WARNING: kho_restore_free: nothing to restore at {phys:#x}")
        else:
            self._kernel.pages.free_pages(*restored)

    # -- subtrees -------------------------------------------------------------------------------

    def retrieve_subtree(self, name: str) -> tuple[int, int]:
        """``kho_retrieve_subtree``: ``(phys, size in bytes)`` of the blob called ``name``.

        Raises -ENOENT without a handover or without the node, -EINVAL for a broken node.
        """
        kernel = self._kernel
        release = kernel.release
        symbol = "kho_retrieve_subtree"
        tree = self.fdt()
        if tree is None:
            raise KernelError(errno.ENOENT, symbol, "not a KHO boot")
        size_prop = release.subtree_size_prop
        offset, values = child_props(tree, name, (release.subtree_phys_prop, size_prop))
        if offset < 0:
            raise KernelError(errno.ENOENT, symbol, f"no subtree {name!r}")
        value, length = values[0]
        if value is None or length != 8:
            raise KernelError(errno.EINVAL, symbol, f"{name}: {release.subtree_phys_prop}")
        phys = int(_U64_LE.unpack(value)[0])
        if not size_prop:
            # Only the address is handed out; whoever gets it reads the device tree's header.
            return phys, kernel.fdt_totalsize(kernel.virt(phys, 8))
        value, length = values[1]
        if value is None or length != 8:
            kernel.printk(
                f"KHO: broken KHO subnode '{name}': missing or invalid {size_prop} property"
            )
            raise KernelError(errno.EINVAL, symbol, f"{name}: {size_prop}")
        return phys, int(_U64_LE.unpack(value)[0])

    def kexec_metadata(self) -> None:
        """``kho_in_kexec_metadata``: who handed over, and after how many handovers."""
        kernel = self._kernel
        try:
            phys, size_bytes = self.retrieve_subtree(KHO_METADATA_NODE_NAME)
        except KernelError:
            return
        if size_bytes < 4:
            kernel.printk(f"KHO: kexec-metadata blob too small ({size_bytes} bytes)")
            return
        kernel.virt(phys, 4)
        version = kernel.ram.read_u32(phys)
        if version != KHO_KEXEC_METADATA_VERSION:
            kernel.printk(
                f"KHO: kexec-metadata version {version} not supported "
                f"(expected {KHO_KEXEC_METADATA_VERSION})"
            )
            return
        if size_bytes < KEXEC_METADATA_BYTES:
            kernel.printk(
                f"KHO: kexec-metadata blob too small for v{version} "
                f"({size_bytes} < {KEXEC_METADATA_BYTES})"
            )
            return
        kernel.virt(phys, KEXEC_METADATA_BYTES)
        metadata = unpack_kexec_metadata(kernel.ram.read(phys, KEXEC_METADATA_BYTES))
        self.previous_release = metadata.previous_release
        self.kexec_count = metadata.kexec_count
        kernel.printk(f"KHO: exec from: {self.previous_release} (count {self.kexec_count})")
