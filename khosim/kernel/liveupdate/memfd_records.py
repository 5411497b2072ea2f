"""The records of a memfd's folios, written and read by whole runs.

Stands for the loops over ``struct memfd_luo_folio_ser`` in ``mm/memfd_luo.c`` @ 7.3. A record
does not tell its folio's order: that is what ``struct page`` says of it. Runs of records whose
folios follow each other in file and memory are kept together, however many there are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from khosim.abi.memfd import (
    MEMFD_LUO_FOLIO_DIRTY,
    MEMFD_LUO_FOLIO_SER_BYTES,
    MEMFD_LUO_FOLIO_UPTODATE,
    MEMFD_LUO_PFN_BITS,
)
from khosim.kernel.folio_range import is_plain_incoming, put_folio_range, restore_folio_range

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.page_cache import CacheRun
    from khosim.kernel.vmalloc import VmStruct

__all__ = (
    "RecordRun",
    "discard_folios",
    "folio_runs",
    "read_records",
    "record_number",
    "write_records",
)

Words = np.ndarray[tuple[int], np.dtype[np.uint64]]
Table = np.ndarray[tuple[int, int], np.dtype[np.uint64]]

_PFN_MASK = (1 << MEMFD_LUO_PFN_BITS) - 1
_CHUNK = 1 << 14
"""Records handled at once: what a CPU's cache holds."""
_FEW = 8
"""Up to so many records plain Python is quicker than numpy."""
_RECORD = struct.Struct("<QQ")
_FAR = np.uint64(1 << 48)  # no folio is so large: a larger step is one backwards


class RecordRun(NamedTuple):
    """``nr_folios`` records of one kind, folio i at ``pfn + (i << order)``.

    ``pgoff`` is the first folio's page in the file; the others follow likewise.
    """

    pfn: int
    pgoff: int
    flags: int
    order: int
    nr_folios: int

    def tail(self, nr_folios: int) -> RecordRun:
        """The records behind the first ``nr_folios``."""
        skipped = nr_folios << self.order
        return self._replace(
            pfn=self.pfn + skipped,
            pgoff=self.pgoff + skipped,
            nr_folios=self.nr_folios - nr_folios,
        )


def _flags_of(run: CacheRun) -> int:
    dirty = MEMFD_LUO_FOLIO_DIRTY if run.dirty else 0
    return dirty | (MEMFD_LUO_FOLIO_UPTODATE if run.uptodate else 0)


def write_records(
    kernel: Kernel, area: VmStruct, runs: Iterable[CacheRun], flags: int | None
) -> None:
    """Fill ``area`` with a record for every folio of ``runs``, all with these ``flags``.

    None is for the flags that the folios have themselves.
    """
    symbol = "memfd_luo_preserve_folios"
    forward: dict[int, Words] = {}
    few = bytearray()
    offset = 0
    for run in runs:
        order, pfn, index = run.order, run.pfn, run.index
        high = (_flags_of(run) if flags is None else flags) << MEMFD_LUO_PFN_BITS
        if run.nr_folios < _FEW:
            for at in range(0, run.nr_folios << order, 1 << order):
                few += _RECORD.pack(pfn + at | high, index + at)
            continue
        area.write(offset, few, by=symbol)
        offset += len(few)
        few.clear()
        if order not in forward:
            forward[order] = np.arange(_CHUNK, dtype=np.uint64) << np.uint64(order)
        size = run.nr_folios * MEMFD_LUO_FOLIO_SER_BYTES
        for phys, piece in area.pieces(offset, size):
            for start in range(phys, phys + piece, _CHUNK * MEMFD_LUO_FOLIO_SER_BYTES):
                some = min(phys + piece - start, _CHUNK * MEMFD_LUO_FOLIO_SER_BYTES)
                count = some // MEMFD_LUO_FOLIO_SER_BYTES
                records = kernel.ram.writable(start, some, kernel.by(symbol))
                table = records.view("<u8").reshape(-1, 2)
                np.add(forward[order][:count], np.uint64(pfn | high), out=table[:, 0])
                np.add(forward[order][:count], np.uint64(index), out=table[:, 1])
                pfn += count << order
                index += count << order
        offset += size
    area.write(offset, few, by=symbol)


def read_records(
    kernel: Kernel, area: VmStruct, nr_folios: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """The records in ``area`` as runs ``(pfn, index, flags, step, count)``, in order.

    ``step`` is the distance of the folios of a run in pages, 0 for a single one. Records with pfn 0
    are holes and left out. Panics where the records reach behind the area.
    """
    ram = kernel.ram
    room = min(_CHUNK, nr_folios)
    pfn_steps, index_steps = np.empty(room, dtype=np.uint64), np.empty(room, dtype=np.uint64)
    for phys, piece in area.pieces(0, nr_folios * MEMFD_LUO_FOLIO_SER_BYTES):
        while piece:
            some = min(piece, _CHUNK * MEMFD_LUO_FOLIO_SER_BYTES)
            words = ram.view(phys, some).view("<u8").reshape(-1, 2)
            phys += some
            piece -= some
            if len(words) <= _FEW:
                yield from _singles(words)
                continue
            np.subtract(words[1:, 0], words[:-1, 0], out=pfn_steps[: len(words) - 1])
            np.subtract(words[1:, 1], words[:-1, 1], out=index_steps[: len(words) - 1])
            yield from _runs(words, pfn_steps[: len(words) - 1], index_steps[: len(words) - 1])


def record_number(kernel: Kernel, area: VmStruct, nr_folios: int, pfn: int, pgoff: int) -> int:
    """Which of the records in ``area`` is the first of the folio at ``pfn`` and page ``pgoff``."""
    done = 0
    for phys, size_bytes in area.pieces(0, nr_folios * MEMFD_LUO_FOLIO_SER_BYTES):
        words = kernel.ram.view(phys, size_bytes).view("<u8").reshape(-1, 2)
        is_it = (words[:, 0] & np.uint64(_PFN_MASK) == pfn) & (words[:, 1] == pgoff)
        found = np.flatnonzero(is_it)
        if len(found):
            return done + int(found[0])
        done += len(words)
    raise ValueError(f"no record of pfn {pfn:#x} at page {pgoff:#x}")


def _runs(
    words: Table, pfn_steps: Words, index_steps: Words
) -> Iterator[tuple[int, int, int, int, int]]:
    count = len(words)
    step = pfn_steps[0]
    if step < _FAR and (pfn_steps == step).all() and (index_steps == step).all():
        starts, ends = [0], [count]
    else:
        joined = (pfn_steps == index_steps) & (pfn_steps < _FAR) & (pfn_steps > 0)
        # A run ends where a step does not belong to it, or where the step changes.
        cut = ~joined
        cut[1:] |= joined[:-1] & (pfn_steps[1:] != pfn_steps[:-1])
        cuts = (np.flatnonzero(cut) + 1).tolist()
        starts, ends = [0, *cuts], [*cuts, count]
    firsts = words[starts].tolist()
    for start, end, (word, index) in zip(starts, ends, firsts, strict=True):
        pfn = word & _PFN_MASK
        if not pfn:
            # Holes are never joined to what follows but by chance: take such runs apart.
            yield from _singles(words[start:end])
        else:
            along = int(pfn_steps[start]) if end - start > 1 else 0
            yield pfn, index, word >> MEMFD_LUO_PFN_BITS, along, end - start


def _singles(words: Table) -> Iterator[tuple[int, int, int, int, int]]:
    for word, index in words.tolist():
        if word & _PFN_MASK:
            yield word & _PFN_MASK, index, word >> MEMFD_LUO_PFN_BITS, 0, 1


def folio_runs(kernel: Kernel, area: VmStruct, nr_folios: int) -> Iterator[RecordRun]:
    """The records in ``area`` cut where the folios' order changes, as ``struct page`` says now.

    Pages that are nobody's count as single pages.
    """
    find = kernel.pages.pages.find
    for pfn, index, flags, step, count in read_records(kernel, area, nr_folios):
        while count:
            known = find(pfn)
            order = 0 if known is None else known.state.order
            some = 1
            if known is not None and step == 1 << order:
                some = max(1, min(count, (known.end_pfn - pfn) >> order))
            yield RecordRun(pfn, index, flags, order, some)
            pfn += some * step
            index += some * step
            count -= some


def discard_folios(kernel: Kernel, runs: Iterable[RecordRun], *, warn: bool) -> None:
    """Restore and free the folios of ``runs``; those that cannot be restored are passed over."""
    shift = kernel.arch.page_shift
    for pfn, _, _, order, nr_folios in runs:
        if nr_folios > 1 and is_plain_incoming(kernel, pfn, nr_folios, order):
            restore_folio_range(kernel, pfn, nr_folios, order)
            put_folio_range(kernel, pfn, nr_folios, order)
            continue
        for head in range(pfn, pfn + (nr_folios << order), 1 << order):
            restored = kernel.kho_in.restore_folio(head << shift)
            if restored is not None:
                kernel.pages.free_pages(*restored)
            elif warn:
                phys = head << shift
                kernel.printk(f"memfd_luo: Unable to restore folio at physical address: {phys:x}")
