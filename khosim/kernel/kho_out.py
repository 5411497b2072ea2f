"""KHO, the outgoing side: what this kernel preserves for its successor.

Models ``kernel/liveupdate/kexec_handover.c`` @ 7.3: ``kho_preserve_*``, ``kho_unpreserve_*``,
``kho_alloc_preserve``, ``kho_unpreserve_free``, ``kho_add_subtree``, ``kho_remove_subtree``,
``kho_out_fdt_setup`` and ``kho_out_kexec_metadata``. Refusals raise
:class:`~khosim.errors.KernelError` with the kernel's errno. Left out: locks.

As in the kernel, ``1 << order`` is a C int in the loops over page ranges: from order 31 on (blocks
of 8 TiB with 4 KiB pages) the step is wrong. Shift counts wrap at 32 as the CPUs do it.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from khosim.abi import fdt
from khosim.abi.kexec_metadata import KHO_METADATA_NODE_NAME, pack_kexec_metadata
from khosim.errors import KernelError, KernelPanic, KhoSimError
from khosim.kernel.kho_fdt import new_root_fdt, with_subtree
from khosim.kernel.kho_radix import KhoRadixTree, Pfns
from khosim.kernel.kho_radix_key import key_base, kho_encode_radix_key
from khosim.kernel.kho_scratch import blocks_of_run
from khosim.kernel.kho_tracker import make_tracker

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.kho_tracker import Tracker
    from khosim.kernel.page import Folio

__all__ = ("KhoNotifier", "KhoOut", "int_shift", "root_fdt")

_U64_LE = struct.Struct("<Q")
KhoNotifier: TypeAlias = Callable[[str], int]
"""Called with what happens; 0, or a negative errno that ends it."""


def int_shift(order: int) -> int:
    """``1 << order`` as a C int that is added to an unsigned long."""
    step = 1 << (order & 31)
    return step - (1 << 32) if step >> 31 else step


def root_fdt(kernel: Kernel, symbol: str) -> memoryview:
    """The page of the outgoing root FDT, for ``symbol`` to write to."""
    phys = kernel.kho_out.fdt_phys
    if not phys:
        # Callers are to ask kho_is_enabled first.
        raise KernelPanic(
            f"BUG: kernel NULL pointer dereference: {symbol} without a root FDT",
            kernel.generation,
        )
    return kernel.ram.writable_mv(phys, kernel.arch.page_size, kernel.by(symbol))


def append_subtree(kernel: Kernel, name: str, phys: int) -> None:
    """``kho_add_subtree`` of 6.16 to 6.18: append a node to the root FDT that is being written.

    Only a notifier can: it alone is given the serialization object. Raises libfdt's codes or-ed
    together as if they were errnos, as the kernel returns them, and -EEXIST of debugfs.
    """
    if not kernel.kho_out.is_finalizing:
        raise KhoSimError(
            f"kho_add_subtree of Linux {kernel.release.name} can be called by finalize notifiers "
            "only (register_kho_notifier)"
        )
    buf = root_fdt(kernel, "kho_add_subtree")
    error = fdt.fdt_begin_node(buf, name)
    error |= fdt.fdt_property(buf, kernel.release.subtree_phys_prop, _U64_LE.pack(phys))
    error |= fdt.fdt_end_node(buf)
    if not error:
        size_bytes = kernel.fdt_totalsize(kernel.virt(phys, 8))
        error = kernel.debugfs.blob_add("out", name, phys, size_bytes)
    if kernel.trace is not None:
        kernel.emit("kho_add_subtree", {"name": name, "phys": phys}, error)
    if error:
        raise KernelError(-error, "kho_add_subtree", f"subtree {name!r}")


class KhoOut:
    """``struct kho_out``: ``fdt_phys`` is the root FDT's page, ``tree`` the preserved memory."""

    __slots__ = ("_kernel", "fdt_phys", "finalized", "is_finalizing", "notifiers", "tree")

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.tree: Tracker = make_tracker(kernel)
        self.fdt_phys = 0
        self.finalized = False
        """``kho_out.finalized``, in the releases that have it."""
        self.is_finalizing = False
        """Notifiers are being called: only they have what ``kho_add_subtree`` wants."""
        self.notifiers: list[KhoNotifier] = []
        """``kho_out.chain_head``, in the order of registration."""

    @property
    def handover_phys(self) -> int:
        """Where the root FDT is that an image would be given now; 0 where there is none yet."""
        is_ready = self.finalized or not self._kernel.release.finalize
        return self.fdt_phys if is_ready else 0

    # -- the root FDT ---------------------------------------------------------------------------

    def fdt_setup(self) -> int:
        """``kho_out_fdt_setup``: write the root FDT; libfdt's errors or-ed together."""
        kernel = self._kernel
        page_size = kernel.arch.page_size
        buf = kernel.ram.writable_mv(self.fdt_phys, page_size, kernel.by("kho_out_fdt_setup"))
        release = kernel.release
        error, buf[:] = new_root_fdt(
            page_size, release.kho_compatible, release.memory_map_prop, self.tree.root
        )
        return error

    def kexec_metadata(self, kexec_count: int) -> int:
        """``kho_out_kexec_metadata``: tell the successor who this is; 0 or a negative errno."""
        kernel = self._kernel
        blob = pack_kexec_metadata(kernel.release.uname, kexec_count)
        try:
            folio = self.alloc_preserve(len(blob))
        except KernelError as refused:
            return -refused.errno
        kernel.ram.write(folio.phys, blob, kernel.by("kho_out_kexec_metadata"))
        try:
            self.add_subtree(KHO_METADATA_NODE_NAME, folio.phys, len(blob))
        except KernelError as refused:
            self.unpreserve_free(folio)
            return -refused.errno
        return 0

    def add_subtree(self, name: str, phys: int, size_bytes: int) -> None:
        """``kho_add_subtree``: record the blob at ``phys`` under ``name`` in the root FDT.

        Raises -EEXIST for a name in use and -ENOMEM when the FDT's page is full (or unusable).
        """
        kernel = self._kernel
        release = kernel.release
        if release.finalize == "notifiers":
            append_subtree(kernel, name, phys)
            return
        if (release.fix_subtree_name and "@" in name) or (release.fix_subtree_empty and not name):
            raise KernelError(errno.EINVAL, "kho_add_subtree", f"subtree {name!r}")
        buf = root_fdt(kernel, "kho_add_subtree")
        props = [(release.subtree_phys_prop, phys)]
        if release.subtree_size_prop:
            props.append((release.subtree_size_prop, size_bytes))
        unwinds = release.add_subtree_unwinds
        error, buf[:] = with_subtree(buf.tobytes(), name, tuple(props), unwinds=unwinds)
        if error is None:
            raise KernelError(errno.ENOMEM, "kho_add_subtree", "the root FDT is damaged")
        if not error:
            if not release.subtree_size_prop:
                size_bytes = kernel.fdt_totalsize(phys)
            failed = kernel.debugfs.blob_add("out", name, phys, size_bytes)
            if failed and not release.fix_subtree_debugfs:
                kernel.warn_once(
                    "WARNING: kho_add_subtree: the blob is not in debugfs", "kho_add_subtree"
                )
        fdt.fdt_pack(buf)
        if kernel.trace is not None:
            kernel.emit("kho_add_subtree", {"name": name, "phys": phys, "size": size_bytes}, -error)
        if error:
            raise KernelError(error, "kho_add_subtree", f"subtree {name!r}")

    def remove_subtree(self, phys: int) -> None:
        """``kho_remove_subtree``: drop the node whose blob lies at ``phys``, if there is one."""
        kernel = self._kernel
        page_size = kernel.arch.page_size
        buf = root_fdt(kernel, "kho_remove_subtree")
        if fdt.fdt_open_into(buf, buf, page_size) < 0:
            return
        wanted = _U64_LE.pack(phys)
        offset = fdt.fdt_first_subnode(buf, 0)
        while offset >= 0:
            value, _ = fdt.fdt_getprop(buf, offset, kernel.release.subtree_phys_prop)
            if value is not None and bytes(value) == wanted:
                fdt.fdt_del_node(buf, offset)
                kernel.debugfs.blob_remove("out", phys)
                break
            offset = fdt.fdt_next_subnode(buf, offset)
        fdt.fdt_pack(buf)
        if kernel.trace is not None:
            kernel.emit("kho_remove_subtree", {"phys": phys}, None)

    # -- preserving -----------------------------------------------------------------------------

    def preserve_folio(self, pfn: int, order: int) -> None:
        """``kho_preserve_folio``: raises -EINVAL (DEBUG, in scratch), -ENOMEM or -ERANGE."""
        kernel = self._kernel
        shift = kernel.arch.page_shift
        if kernel.config.debug:
            self._check_debug("kho_preserve_folio", pfn, 1 << order)
        is_kept_out = kernel.release.fix_preserve_in_scratch
        if is_kept_out and kernel.kho_scratch_overlap(pfn << shift, 1 << shift + order):
            error = -errno.EINVAL
        else:
            error = self._add_key(kho_encode_radix_key(pfn << shift, order, shift))
        if kernel.trace is not None:
            kernel.emit("kho_preserve_folio", {"pfn": pfn, "order": order}, error)
        if error:
            raise KernelError(-error, "kho_preserve_folio", f"pfn {pfn:#x} order {order}")

    def preserve_folios(self, pfns: Pfns, order: int) -> None:
        """:meth:`preserve_folio` for every pfn of an int64 array, all of one order.

        On a refusal the folios before it stay preserved, as after a caller's loop.
        """
        kernel = self._kernel
        if kernel.config.debug and kernel.release.scratch_overlap_checked:
            for pfn in pfns.tolist():
                self._check_debug("kho_preserve_folio", pfn, 1 << order)
        keys = (pfns >> order) | np.int64(key_base(order, kernel.arch.page_shift))
        error, done = self.tree.add_many(keys)
        if kernel.trace is not None:
            kernel.emit("kho_preserve_folio", {"nr_folios": done, "order": order}, error)
        if error:
            raise KernelError(-error, "kho_preserve_folio", f"after {done} folios")

    def preserve_folio_range(self, pfn: int, nr_folios: int, order: int) -> None:
        """:meth:`preserve_folio` for ``nr_folios`` neighbouring folios of one order."""
        kernel = self._kernel
        self._check_debug("kho_preserve_folio", pfn, nr_folios << order)
        first = kho_encode_radix_key(pfn << kernel.arch.page_shift, order, kernel.arch.page_shift)
        error, done = self.tree.add_run(first, nr_folios)
        if kernel.trace is not None:
            args = {"pfn": pfn, "order": order, "nr_folios": done}
            kernel.emit("kho_preserve_folio", args, error)
        if error:
            raise KernelError(-error, "kho_preserve_folio", f"after {done} folios")

    def unpreserve_folio(self, pfn: int, order: int) -> None:
        """``kho_unpreserve_folio``: forget a folio; a warning where it never was preserved."""
        kernel = self._kernel
        shift = kernel.arch.page_shift
        self.tree.del_key(kho_encode_radix_key(pfn << shift, order, shift))
        if kernel.trace is not None:
            kernel.emit("kho_unpreserve_folio", {"pfn": pfn, "order": order}, None)

    def unpreserve_folio_range(self, pfn: int, nr_folios: int, order: int) -> None:
        """:meth:`unpreserve_folio` for ``nr_folios`` neighbouring folios of one order."""
        kernel = self._kernel
        shift = kernel.arch.page_shift
        self.tree.del_run(kho_encode_radix_key(pfn << shift, order, shift), nr_folios)
        if kernel.trace is not None:
            args = {"pfn": pfn, "order": order, "nr_folios": nr_folios}
            kernel.emit("kho_unpreserve_folio", args, None)

    def preserve_pages(self, pfn: int, nr_pages: int) -> None:
        """``kho_preserve_pages``: a range as the largest aligned blocks that keep to one node.

        Raises the errors of :meth:`preserve_folio`; what was added is taken back first.
        """
        nr_pages &= (1 << self._kernel.release.nr_pages_bits) - 1
        self._check_debug("kho_preserve_pages", pfn, nr_pages)
        self._preserve_range(pfn, pfn + nr_pages, "kho_preserve_pages")

    def preserve_phys(self, phys: int, size_bytes: int) -> None:
        """``kho_preserve_phys`` of 6.16 and 6.17: a range of bytes, which must be whole pages."""
        kernel = self._kernel
        symbol, shift = "kho_preserve_phys", kernel.arch.page_shift
        if self.finalized:
            raise KernelError(errno.EBUSY, symbol, "finalized")
        if (phys | size_bytes) & (kernel.arch.page_size - 1):
            raise KernelError(errno.EINVAL, symbol, f"{phys:#x}+{size_bytes:#x} is not whole pages")
        self._preserve_range(phys >> shift, (phys + size_bytes) >> shift, symbol)

    def _preserve_range(self, pfn: int, end_pfn: int, symbol: str) -> None:
        kernel = self._kernel
        shift = kernel.arch.page_shift
        splits = kernel.release.preserve_splits_at_nodes
        at, error = pfn, 0
        while at < end_pfn:
            order = self._pages_order(at, end_pfn, splits)
            error = self._add_key(kho_encode_radix_key(at << shift, order, shift))
            if error:
                self._unpreserve(pfn, at)
                break
            at = (at + int_shift(order)) & ((1 << 64) - 1)
        nr_pages = end_pfn - pfn
        if kernel.trace is not None:
            kernel.emit(symbol, {"pfn": pfn, "nr_pages": nr_pages}, error)
        if error:
            raise KernelError(-error, symbol, f"pfn {pfn:#x} nr_pages {nr_pages}")

    def unpreserve_pages(self, pfn: int, nr_pages: int) -> None:
        """``kho_unpreserve_pages``: forget a range; it must be the one that was preserved."""
        nr_pages &= (1 << self._kernel.release.nr_pages_bits) - 1
        self._unpreserve(pfn, pfn + nr_pages)
        if self._kernel.trace is not None:
            self._kernel.emit("kho_unpreserve_pages", {"pfn": pfn, "nr_pages": nr_pages}, None)

    def _unpreserve(self, pfn: int, end_pfn: int) -> None:
        shift = self._kernel.arch.page_shift
        splits = self._kernel.release.unpreserve_splits_at_nodes
        while pfn < end_pfn:
            order = self._pages_order(pfn, end_pfn, splits)
            key = kho_encode_radix_key(pfn << shift, order, shift)
            if self.tree.del_key(key) is False:
                return
            pfn = (pfn + int_shift(order)) & ((1 << 64) - 1)

    def _add_key(self, key: int) -> int:
        tree, release = self.tree, self._kernel.release
        if isinstance(tree, KhoRadixTree):
            if release.fix_preserve_twice and tree.has_key(key):
                return -errno.EEXIST
            if release.fix_preserve_overlap and self._is_within(tree, key):
                return -errno.EEXIST
        return tree.add_key(key)

    def _is_within(self, tree: KhoRadixTree, key: int) -> bool:
        # Whether a page of this block is in a preserved block of another order.
        if tree.has_key(key):
            return False
        shift = self._kernel.arch.page_shift
        ((start, end),) = blocks_of_run(key, 1, shift)
        spans = (
            span for nr_keys, first in tree.runs() for span in blocks_of_run(first, nr_keys, shift)
        )
        return any(low < end and high > start for low, high in spans)

    def _pages_order(self, start_pfn: int, end_pfn: int, splits_at_nodes: bool) -> int:
        if not start_pfn:
            raise KernelPanic(
                "kho_preserve_pages: pfn 0 has no alignment, the kernel shifts by -1 here",
                self._kernel.generation,
            )
        order = (start_pfn & -start_pfn).bit_length() - 1
        order = min(order, (end_pfn - start_pfn).bit_length() - 1)
        if splits_at_nodes:
            nid_of_pfn = self._kernel.nid_of_pfn
            nid = nid_of_pfn(start_pfn)
            while order and nid != nid_of_pfn(start_pfn + (1 << order) - 1):
                order -= 1
        return order

    def _check_debug(self, symbol: str, pfn: int, nr_pages: int) -> None:
        # CONFIG_KEXEC_HANDOVER_DEBUG only: WARN_ON(kho_scratch_overlap(...)).
        kernel = self._kernel
        if not kernel.config.debug or not kernel.release.scratch_overlap_checked:
            return
        shift = kernel.arch.page_shift
        if kernel.kho_scratch_overlap(pfn << shift, nr_pages << shift):
            kernel.warn(f"WARNING: {symbol}: {nr_pages} pages from pfn {pfn:#x} overlap scratch")
            raise KernelError(errno.EINVAL, symbol, "the range overlaps scratch")

    # -- allocating -----------------------------------------------------------------------------

    def alloc_preserve(self, size_bytes: int) -> Folio:
        """``kho_alloc_preserve``: a zeroed, preserved folio of at least ``size_bytes``.

        Raises -EINVAL for size 0, -E2BIG above the largest order, -ENOMEM.
        """
        kernel = self._kernel
        symbol = "kho_alloc_preserve"
        if not size_bytes:
            raise KernelError(errno.EINVAL, symbol, "size 0")
        order = ((size_bytes - 1) >> kernel.arch.page_shift).bit_length()
        if order > kernel.arch.max_page_order:
            raise KernelError(errno.E2BIG, symbol, f"order {order}")
        folio = kernel.alloc_folio(order, owner=symbol, zero=True)
        try:
            self.preserve_folio(folio.pfn, order)
        except KernelError as refused:
            folio.put()
            raise KernelError(refused.errno, symbol, refused.detail) from refused
        return folio

    def unpreserve_free(self, folio: Folio) -> None:
        """``kho_unpreserve_free``: undo :meth:`alloc_preserve`."""
        self.unpreserve_folio(folio.pfn, folio.order)
        folio.put()

