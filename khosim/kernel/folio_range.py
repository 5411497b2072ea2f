"""Neighbouring folios of one order, a whole range at a time.

What a loop over ``folio_put`` (``include/linux/mm.h``), ``kho_preserve_folio``,
``kho_unpreserve_folio`` or ``kho_restore_folio`` (``kernel/liveupdate/kexec_handover.c`` @ 7.3)
does, for as many folios as one likes: where a range is plain it costs as much as one folio,
elsewhere it is the loop. The order of free lists afterwards is that of one large free.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex, overload

import numpy as np

from khosim.kernel.kho_radix_key import kho_encode_radix_key
from khosim.kernel.page_map import ALLOCATED, INCOMING

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = (
    "FolioRun",
    "RestoredLog",
    "is_plain_incoming",
    "preserve_folio_runs",
    "put_folio_range",
    "restore_folio_range",
    "restore_plain_folio",
    "restored_log",
    "unpreserve_folio_runs",
)

_FEW = 24
"""So many folios are preserved quicker by one call for a run than as part of an array."""


class FolioRun(NamedTuple):
    """``nr_folios`` folios of one order, the first at ``pfn``, each behind the other."""

    pfn: int
    order: int
    nr_folios: int


class RestoredLog(list[tuple[int, int]]):
    """``(pfn, order)`` of every block that was restored, in order, kept as runs.

    A list to those who read it: ``len``, iteration and slices count blocks. ``runs`` are the same
    as ``(pfn, order, nr_blocks)``, which is what to read where there may be millions.
    """

    __slots__ = ("_nr_blocks", "runs")

    def __init__(self, blocks: Iterable[tuple[int, int]] = ()) -> None:
        super().__init__()
        self.runs: list[tuple[int, int, int]] = []
        self._nr_blocks = 0
        for block in blocks:
            self.append(block)

    def append(self, block: tuple[int, int], /) -> None:
        """One block more."""
        self.append_run(*block, 1)

    def append_run(self, pfn: int, order: int, nr_blocks: int) -> None:
        """``nr_blocks`` neighbouring blocks more."""
        if nr_blocks <= 0:
            return
        self._nr_blocks += nr_blocks
        if self.runs:
            first, last_order, count = self.runs[-1]
            if last_order == order and first + (count << order) == pfn:
                self.runs[-1] = (first, order, count + nr_blocks)
                return
        self.runs.append((pfn, order, nr_blocks))

    def __bool__(self) -> bool:
        return bool(self.runs)

    def __len__(self) -> int:
        return self._nr_blocks

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return chain.from_iterable(
            ((head, order) for head in range(pfn, pfn + (count << order), 1 << order))
            for pfn, order, count in self.runs
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list) and list(self) == list(other)

    __hash__ = None

    @overload
    def __getitem__(self, at: SupportsIndex, /) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, at: slice, /) -> list[tuple[int, int]]: ...
    def __getitem__(self, at: SupportsIndex | slice, /) -> tuple[int, int] | list[tuple[int, int]]:
        if isinstance(at, slice):
            start, stop, step = at.indices(self._nr_blocks)
            if step > 0:
                return list(islice(iter(self), start, stop, step))
            return list(self)[at]
        index = at.__index__()
        if index < 0:
            index += self._nr_blocks
        for pfn, order, count in self.runs:
            if 0 <= index < count:
                return pfn + (index << order), order
            index -= count
        raise IndexError("no such restored block")


# -- references ---------------------------------------------------------------------------------


def put_folio_range(kernel: Kernel, pfn: int, nr_folios: int, order: int) -> None:
    """``folio_put`` of ``nr_folios`` neighbours: those without other references are freed."""
    pages = kernel.pages
    end_pfn = pfn + (nr_folios << order)
    if nr_folios == 1 or not _plain(kernel, pfn, end_pfn, ALLOCATED, order):
        for head in range(pfn, end_pfn, 1 << order):
            pages.free_pages(head, order)
        return
    for head in _within(pages.pages.refs, pfn, end_pfn):
        pages.free_range(pfn, head)
        pages.free_pages(head, order)
        pfn = head + (1 << order)
    pages.free_range(pfn, end_pfn)


def _within(sparse: dict[int, int], start: int, end: int) -> list[int]:
    if not sparse:
        return []
    if end - start < len(sparse):
        return [pfn for pfn in range(start, end) if pfn in sparse]
    return sorted(pfn for pfn in sparse if start <= pfn < end)


def _plain(kernel: Kernel, pfn: int, end_pfn: int, kind: str, order: int) -> bool:
    # Whether the page map knows the whole range as blocks of this kind and order.
    if pfn & ((1 << order) - 1):
        return False
    page_map = kernel.pages.pages
    at = pfn
    while at < end_pfn:
        run = page_map.find(at)
        if run is None or run.state.kind != kind or run.state.order != order:
            return False
        at = run.end_pfn
    return True


# -- preserving ---------------------------------------------------------------------------------


def preserve_folio_runs(
    kernel: Kernel, runs: Iterable[FolioRun], symbol: str = "kho_preserve_folio"
) -> tuple[int, int]:
    """``kho_preserve_folio`` for every folio of ``runs``, in order, until one is refused.

    Returns ``(error, folios preserved)``: 0, or the negative errno of the first refusal. What was
    preserved before it stays preserved. ``symbol`` is what the trace calls it: blocks that are
    aligned and on one node are the same to ``kho_preserve_pages``.
    """
    done = 0
    batch: list[FolioRun] = []
    for run in runs:
        if run.nr_folios < _FEW:
            batch.append(run)
            continue
        for some in (batch, [run]):
            error, got = _preserve(kernel, some, symbol)
            done += got
            if error:
                return error, done
        batch = []
    error, got = _preserve(kernel, batch, symbol)
    return error, done + got


def _preserve(kernel: Kernel, runs: list[FolioRun], symbol: str) -> tuple[int, int]:
    if not runs:
        return 0, 0
    shift = kernel.arch.page_shift
    tree = kernel.kho_out.tree
    allowed, error = _allowed(kernel, runs, symbol)
    if len(runs) == 1:
        pfn, order, _ = runs[0]
        first = kho_encode_radix_key(pfn << shift, order, shift)
        refused, done = tree.add_run(first, allowed)
    else:
        keys = np.fromiter(islice(_keys(runs, shift), allowed), dtype=np.int64, count=allowed)
        refused, done = tree.add_many(keys)
    error = refused or error
    if kernel.trace is not None:
        for pfn, order, nr_folios in runs:
            args = {"pfn": pfn, "order": order, "nr_folios": nr_folios}
            kernel.emit(symbol, args, error)
    return error, done


def _keys(runs: list[FolioRun], shift: int) -> Iterator[int]:
    for pfn, order, nr_folios in runs:
        first = kho_encode_radix_key(pfn << shift, order, shift)
        yield from range(first, first + nr_folios)


def _allowed(kernel: Kernel, runs: list[FolioRun], symbol: str) -> tuple[int, int]:
    # CONFIG_KEXEC_HANDOVER_DEBUG: the folios before the first one that overlaps scratch, -EINVAL.
    total = sum(run.nr_folios for run in runs)
    if not kernel.config.debug:
        return total, 0
    shift = kernel.arch.page_shift
    allowed = 0
    for pfn, order, nr_folios in runs:
        if kernel.kho_scratch_overlap(pfn << shift, nr_folios << order << shift):
            for head in range(pfn, pfn + (nr_folios << order), 1 << order):
                if kernel.kho_scratch_overlap(head << shift, 1 << order << shift):
                    kernel.warn(f"WARNING: {symbol}: pfn {head:#x} overlaps scratch")
                    return allowed, -errno.EINVAL
                allowed += 1
        else:
            allowed += nr_folios
    return total, 0


def unpreserve_folio_runs(kernel: Kernel, runs: Iterable[FolioRun]) -> None:
    """``kho_unpreserve_folio`` for every folio of ``runs``."""
    shift = kernel.arch.page_shift
    tree = kernel.kho_out.tree
    for pfn, order, nr_folios in runs:
        key = kho_encode_radix_key(pfn << shift, order, shift)
        if nr_folios == 1:
            tree.del_key(key)
        else:
            tree.del_run(key, nr_folios)
        if kernel.trace is not None:
            args = {"pfn": pfn, "order": order, "nr_folios": nr_folios}
            kernel.emit("kho_unpreserve_folio", args, None)


# -- restoring ----------------------------------------------------------------------------------


def restore_folio_range(
    kernel: Kernel, pfn: int, nr_folios: int, order: int, *, as_pages: bool = False
) -> int:
    """``kho_restore_folio`` for ``nr_folios`` blocks of ``order``, ``1 << order`` pages apart.

    Returns how many were restored before the first refusal. With ``as_pages`` each block becomes
    single pages, as ``kho_restore_pages`` does it. A block whose order turns out to be another is
    restored with that order, as the kernel would.
    """
    end_pfn = pfn + (nr_folios << order)
    if (
        nr_folios == 1
        or not _restores_plainly(kernel, order, as_pages)
        or not is_plain_incoming(kernel, pfn, nr_folios, order)
    ):
        shift = kernel.arch.page_shift
        kho_in = kernel.kho_in
        for done in range(nr_folios):
            phys = (pfn + (done << order)) << shift
            if as_pages:
                restored = kho_in.restore_pages(phys, 1 << order) is not None
            else:
                restored = kho_in.restore_folio(phys) is not None
            if not restored:
                return done
        return nr_folios
    pages = kernel.pages
    compound = order > 0 and not as_pages
    pages.pages.set(pfn, end_pfn, pages.restored_state(0 if as_pages else order, compound))
    for low, high, zone in pages.pieces_in(pfn, end_pfn):
        zone.managed_pages += high - low
    restored_log(kernel).append_run(pfn, order, nr_folios)
    if kernel.trace is not None:
        symbol = "kho_restore_pages" if as_pages else "kho_restore_folio"
        args = {"phys": pfn << kernel.arch.page_shift, "order": order, "nr_blocks": nr_folios}
        kernel.emit(symbol, args, pfn)
    return nr_folios


def restore_plain_folio(kernel: Kernel, pfn: int) -> int | None:
    """``kho_restore_folio`` of a folio that waits for it, in releases like the newest: its order.

    None, and nothing done, for all else: :meth:`KhoIn.restore_folio` knows. Neither is it entered
    in the record of what was restored.
    """
    pages = kernel.pages
    state = pages.pages.state(pfn)
    if state is None or state.kind != INCOMING or pages.pages.private:
        return None
    order = state.order
    nr_pages = 1 << order
    if (
        pfn & (nr_pages - 1)
        or order > kernel.arch.max_page_order
        or not _restores_plainly(kernel, order, False)
        or not kernel.pfn_to_online_page(pfn)
    ):
        return None
    pages.pages.set(pfn, pfn + nr_pages, pages.restored_state(order, order > 0))
    pages.adjust_managed_page_count(pfn, nr_pages)
    return order


def _restores_plainly(kernel: Kernel, order: int, as_pages: bool) -> bool:
    # Whether kho_restore_page does what it does in the newest releases.
    release = kernel.release
    return (
        release.page_magic
        and not kernel.pages.uninitialised
        and release.restore_clears_private
        and release.restore_inits_refcounts
        and not (release.restore_pages_compound and as_pages)
        and not (release.restore_order_cap and order > kernel.arch.max_page_order)
    )


def is_plain_incoming(kernel: Kernel, pfn: int, nr_folios: int, order: int) -> bool:
    """Whether all of a range waits to be restored, as blocks of exactly this order."""
    end_pfn = pfn + (nr_folios << order)
    return (
        _plain(kernel, pfn, end_pfn, INCOMING, order)
        and not _within(kernel.pages.pages.private, pfn, end_pfn)
        and kernel.struct_pages_exist(pfn, end_pfn - pfn)
    )


def restored_log(kernel: Kernel) -> RestoredLog:
    """The kernel's record of what was restored, in a form that takes whole ranges."""
    log = kernel.kho_in.restored
    if not isinstance(log, RestoredLog):
        log = RestoredLog(log)
        kernel.kho_in.restored = log
    return log
