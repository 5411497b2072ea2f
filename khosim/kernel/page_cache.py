"""The pages of one file: which folio is where, and in what state.

Models ``include/linux/fs.h:struct address_space`` and ``mm/filemap.c`` @ 7.3 as far as shmem needs
them. Folios are kept as runs of neighbours in the file that are neighbours in memory too, of one
order and one state, so a terabyte that was populated in one go is a few runs. Left out: reference
counts of the page cache (a folio here has the one reference that ``kernel.page(pfn)`` shows,
whatever its order, and pins are counted beside it), swap entries, locks, the LRU.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

__all__ = ("AddressSpace", "CacheRun")


class CacheRun:
    """``nr_folios`` folios of one order: the first at page ``index`` of the file and at ``pfn``.

    ``pins`` counts the ``FOLL_PIN`` references on each of them.
    """

    __slots__ = ("dirty", "index", "nr_folios", "order", "pfn", "pins", "uptodate")

    def __init__(
        self,
        index: int,
        pfn: int,
        order: int,
        nr_folios: int,
        *,
        dirty: bool = False,
        uptodate: bool = False,
        pins: int = 0,
    ) -> None:
        self.index = index
        self.pfn = pfn
        self.order = order
        self.nr_folios = nr_folios
        self.dirty = dirty
        self.uptodate = uptodate
        self.pins = pins

    def __repr__(self) -> str:
        flags = "D" * self.dirty + "U" * self.uptodate + f"p{self.pins}" * bool(self.pins)
        return (
            f"CacheRun(index={self.index:#x}, pfn={self.pfn:#x}, order={self.order}, "
            f"nr_folios={self.nr_folios}, {flags})"
        )

    @property
    def nr_pages(self) -> int:
        """Pages of all folios of the run."""
        return self.nr_folios << self.order

    @property
    def end(self) -> int:
        """The page of the file behind the run."""
        return self.index + (self.nr_folios << self.order)

    def pfn_of(self, index: int) -> int:
        """Where page ``index`` of the file lies."""
        return self.pfn + index - self.index

    def clip(self, first: int, end: int) -> tuple[int, int]:
        """The folios that hold a page of [first, end), which overlaps: their pages in the file."""
        order = self.order
        low = self.index + max(0, (first - self.index) >> order << order)
        high = self.index + (-(-(end - self.index) >> order) << order)
        return low, min(high, self.index + (self.nr_folios << order))

    def part(self, first: int, end: int) -> CacheRun:
        """A copy of the folios at pages [first, end) of the file, both on folio borders."""
        nr_folios = (end - first) >> self.order
        return CacheRun(
            first,
            self.pfn + first - self.index,
            self.order,
            nr_folios,
            dirty=self.dirty,
            uptodate=self.uptodate,
            pins=self.pins,
        )

    def joins(self, following: CacheRun) -> bool:
        """Whether ``following`` continues this run in file, memory and state."""
        nr_pages = self.nr_folios << self.order
        return (
            self.index + nr_pages == following.index
            and self.pfn + nr_pages == following.pfn
            and self.order == following.order
            and self.dirty == following.dirty
            and self.uptodate == following.uptodate
            and self.pins == following.pins
        )


class AddressSpace:
    """``struct address_space``: the folios of a file by their page in the file."""

    __slots__ = ("_runs", "_starts", "nrpages")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._runs: list[CacheRun] = []
        self.nrpages = 0

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[CacheRun]:
        return iter(self._runs)

    def find(self, index: int) -> CacheRun | None:
        """The run that holds page ``index``, or None in a hole."""
        i = bisect_right(self._starts, index) - 1
        if i >= 0:
            run = self._runs[i]
            if index < run.index + (run.nr_folios << run.order):
                return run
        return None

    def next_start(self, index: int) -> int | None:
        """The first page at or behind ``index`` where a run begins, or None."""
        i = bisect_left(self._starts, index)
        return self._starts[i] if i < len(self._starts) else None

    def prev_end(self, index: int) -> int:
        """Where the last run that begins before ``index`` ends; 0 without one."""
        i = bisect_left(self._starts, index) - 1
        return self._runs[i].end if i >= 0 else 0

    def overlapping(self, first: int, end: int) -> list[CacheRun]:
        """The runs that hold a page of [first, end), ascending, as they are."""
        i = bisect_right(self._starts, first) - 1
        if i < 0 or self._runs[i].end <= first:
            i += 1
        return self._runs[i : bisect_left(self._starts, end, i)]

    def holes(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of [first, end) without folios, ascending."""
        at = first
        for run in self.overlapping(first, end):
            if run.index > at:
                yield at, run.index
            at = run.end
        if at < end:
            yield at, end

    def splice(self, first: int, end: int, new: list[CacheRun]) -> list[CacheRun]:
        """Put the runs ``new`` in the place of all folios that hold a page of [first, end).

        ``new`` is ascending and keeps to the room of what goes; returns what was there. Costs one
        pass, however many runs come and go.
        """
        starts, runs = self._starts, self._runs
        i = bisect_right(starts, first) - 1
        if i < 0 or runs[i].end <= first:
            i += 1
        j = bisect_left(starts, end, i)
        taken: list[CacheRun] = []
        pieces: list[CacheRun] = []
        if i < j:
            low, high = runs[i], runs[j - 1]
            low_cut, high_cut = low.clip(first, end)[0], high.clip(first, end)[1]
            taken = [run.part(max(run.index, low_cut), min(run.end, high_cut)) for run in runs[i:j]]
            if low_cut > low.index:
                pieces.append(low.part(low.index, low_cut))
            pieces.extend(new)
            if high_cut < high.end:
                pieces.append(high.part(high_cut, high.end))
            self.nrpages -= sum(run.nr_folios << run.order for run in taken)
        else:
            pieces.extend(new)
        self.nrpages += sum(run.nr_folios << run.order for run in new)
        if pieces and i and runs[i - 1].joins(pieces[0]):
            i -= 1
            pieces.insert(0, runs[i])
        if pieces and j < len(runs) and pieces[-1].joins(runs[j]):
            pieces.append(runs[j])
            j += 1
        joined: list[CacheRun] = []
        for run in pieces:
            if joined and joined[-1].joins(run):
                joined[-1].nr_folios += run.nr_folios
            else:
                joined.append(run)
        starts[i:j] = [run.index for run in joined]
        runs[i:j] = joined
        return taken

    def insert(self, run: CacheRun) -> None:
        """Add folios where there are none."""
        self.splice(run.index, run.index + 1, [run])

    def take(self, first: int, end: int) -> list[CacheRun]:
        """Remove and return the folios that hold a page of [first, end), whole folios always."""
        return self.splice(first, end, [])

    def replace(self, pieces: list[CacheRun]) -> None:
        """Put ``pieces``, ascending, in the place of the folios at the same pages of the file."""
        if not pieces:
            return
        first, end = pieces[0].index, pieces[-1].end
        new: list[CacheRun] = []
        waiting = iter(pieces)
        piece = next(waiting, None)
        for run in self.overlapping(first, end):
            at = max(run.index, first)
            stop = min(run.end, end)
            while piece is not None and piece.index < stop:
                if at < piece.index:
                    new.append(run.part(at, piece.index))
                new.append(piece)
                at = piece.end
                piece = next(waiting, None)
            if at < stop:
                new.append(run.part(at, stop))
        self.splice(first, end, new)

    def mark(
        self,
        first: int,
        end: int,
        *,
        dirty: bool = False,
        uptodate: bool = False,
        pins: int = 0,
    ) -> None:
        """Set flags of the folios that hold a page of [first, end), and add to their pins."""
        found = self.overlapping(first, end)
        if not pins and all(
            (run.dirty or not dirty) and (run.uptodate or not uptodate) for run in found
        ):
            return
        new = []
        for run in found:
            changed = run.part(*run.clip(first, end))
            changed.dirty |= dirty
            changed.uptodate |= uptodate
            changed.pins += pins
            new.append(changed)
        self.splice(first, end, new)
