"""Who wrote each page last, and which pages were written at all.

A shadow beside RAM, in the spirit of ``mm/page_owner.c @ 7.3``: for every page the last
:class:`Writer` (generation and kernel symbol), and whether the page may hold anything but zeroes.
Nothing in the machine depends on it; reports and invariants ask it "who overwrote this page?".

Two stores share the work. A dict holds one stamp per page for small writes; an ordered list of
disjoint runs holds one stamp for a large write of any length. A stamp carries a sequence number, so
a large write does not have to visit the pages below it: where both stores know a page, the
higher number is right (the dict on a tie). Memory grows with what is written, never with RAM.

Left out: a history of earlier writers, and anything finer than a page.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Generic, NamedTuple, TypeVar

import numpy as np

__all__ = ("RunMap", "Stamp", "Writer", "WriterShadow")

_DIRECT_PAGES = 32  # up to here, looking at each page beats setting up arrays
_NEAR_PAGES = 3  # so little between two pages costs less to clear as well than to tell apart
_FEW_PAGES = 256  # a dict of so many is searched faster without arrays, if little is found


class Writer(NamedTuple):
    """Who wrote: the kernel's generation (-1: none, the firmware or the simulator) and symbol."""

    generation: int
    symbol: str


Stamp = tuple[int, Writer, bool]
"""(sequence number, writer, whether the page may hold data: False after it was zeroed)."""

T = TypeVar("T")
_I64 = np.ndarray[tuple[int], np.dtype[np.int64]]
_SEQ, _TOUCHED = itemgetter(0), itemgetter(2)


class RunMap(Generic[T]):
    """An ordered map from disjoint half-open runs of frames to a value; the newest assign wins."""

    __slots__ = ("_shared", "ends", "starts", "values")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.values: list[T] = []
        self._shared = False

    def share(self) -> tuple[list[int], list[int], list[T]]:
        """The present state, kept intact by whatever this map does later (copy on write)."""
        self._shared = True
        return self.starts, self.ends, self.values

    def restore(self, state: tuple[list[int], list[int], list[T]]) -> None:
        """Go back to a state that :meth:`share` returned."""
        self.starts, self.ends, self.values = state
        self._shared = True

    def find(self, pfn: int) -> int:
        """The index of the run that holds ``pfn``, or -1."""
        index = bisect_right(self.starts, pfn) - 1
        return index if index >= 0 and pfn < self.ends[index] else -1

    def assign(self, first: int, end: int, value: T) -> None:
        """Give the frames [first, end) the value, and merge with equal neighbours."""
        if self._shared:
            self.starts, self.ends = self.starts[:], self.ends[:]
            self.values = self.values[:]
            self._shared = False
        starts, ends, values = self.starts, self.ends, self.values
        parts = [(first, end, value)]
        low = bisect_left(starts, first)
        if low and ends[low - 1] >= first:
            if values[low - 1] == value:
                low -= 1
                parts[0] = (starts[low], end, value)
            elif ends[low - 1] > first:
                low -= 1
                parts.insert(0, (starts[low], first, values[low]))
        high = bisect_left(starts, end, low)
        if high < len(starts) and starts[high] == end and values[high] == value:
            high += 1
        if low < high and ends[high - 1] > end:
            if values[high - 1] == value:
                parts[-1] = (parts[-1][0], ends[high - 1], value)
            else:
                parts.append((end, ends[high - 1], values[high - 1]))
        starts[low:high] = [part[0] for part in parts]
        ends[low:high] = [part[1] for part in parts]
        values[low:high] = [part[2] for part in parts]

    def overlapping(self, first: int, end: int) -> Iterator[tuple[int, int, T]]:
        """The runs inside [first, end), clipped to it, in order."""
        starts, ends = self.starts, self.ends
        index = max(0, bisect_right(starts, first) - 1)
        for i in range(index, bisect_left(starts, end, index)):
            if ends[i] > first:
                yield max(first, starts[i]), min(end, ends[i]), self.values[i]

    def gaps(self, first: int, end: int) -> list[tuple[int, int]]:
        """The parts of [first, end) that no run holds, in order."""
        gaps = []
        for start, stop, _ in self.overlapping(first, end):
            if first < start:
                gaps.append((first, start))
            first = stop
        if first < end:
            gaps.append((first, end))
        return gaps


class WriterShadow:
    """The stamps of all pages of one machine; frames are counted from physical address 0."""

    __slots__ = ("_open", "_seq", "pages", "runs")

    def __init__(self) -> None:
        self.pages: dict[int, Stamp] = {}
        self.runs: RunMap[Stamp] = RunMap()
        self._seq = 0
        self._open = False  # a stamp for single pages was issued under the present number

    def page_stamp(self, by: tuple[int, str], touched: bool) -> Stamp:
        """A stamp for writes of single pages, good until the next :meth:`assign`."""
        self._open = True
        return self._seq, by if isinstance(by, Writer) else Writer(*by), touched

    def assign(self, first: int, end: int, by: tuple[int, str], touched: bool) -> None:
        """Stamp the frames [first, end) in one step, whatever their number."""
        if self._open:
            self._seq += 1
            self._open = False
        writer = by if isinstance(by, Writer) else Writer(*by)
        self.runs.assign(first, end, (self._seq, writer, touched))

    def stamp_of(self, pfn: int) -> Stamp | None:
        """The newest stamp of one page, or None where nothing was ever written."""
        stamp = self.pages.get(pfn)
        if self.runs.starts:
            index = self.runs.find(pfn)
            if index >= 0 and (stamp is None or stamp[0] < self.runs.values[index][0]):
                return self.runs.values[index]
        return stamp

    def touched(self, pfn: int) -> bool:
        """Whether the page was written and not zeroed since."""
        # stamp_of, without its calls: every page that is zeroed asks.
        stamp = self.pages.get(pfn)
        runs = self.runs
        index = bisect_right(runs.starts, pfn) - 1
        if index >= 0 and pfn < runs.ends[index]:
            run_stamp = runs.values[index]
            if stamp is None or stamp[0] < run_stamp[0]:
                return run_stamp[2]
        return stamp is not None and stamp[2]

    def _known_pages(self, first: int, end: int) -> tuple[_I64, Iterable[Stamp]]:
        """The frames of [first, end) that the dict knows, in no order, and their stamps."""
        pages = self.pages
        if end - first < len(pages) or len(pages) < _FEW_PAGES:
            if end - first < len(pages):
                known = [pfn for pfn in range(first, end) if pfn in pages]
            else:
                known = [pfn for pfn in pages if first <= pfn < end]
            return np.array(known, dtype=np.int64), map(pages.__getitem__, known)
        pfn = np.fromiter(pages, dtype=np.int64, count=len(pages))
        inside = (pfn >= first) & (pfn < end)
        if inside.all():
            return pfn, pages.values()
        pfn = pfn[inside]
        return pfn, map(pages.__getitem__, pfn.tolist())

    def touched_runs(self, first: int, end: int, shift: int = 0) -> list[tuple[int, int]]:
        """The touched frames of [first, end) as ordered, disjoint, not adjoining runs.

        The answer counts frames, or with ``shift`` units of 1 / 2**shift of a frame. Costs what
        was written (or the length of a short range), not the length of a long one.
        """
        if end - first <= _DIRECT_PAGES:
            near = [pfn for pfn in range(first, end) if self.touched(pfn)]
            return _joined((pfn << shift, (pfn + 1) << shift) for pfn in near)
        runs = list(self.runs.overlapping(first, end))
        pfn, stamps = self._known_pages(first, end)
        if not len(pfn):
            return _joined((a << shift, b << shift) for a, b, stamp in runs if stamp[2])
        if len(pfn) <= _FEW_PAGES and len(runs) <= 1:
            return self._touched_few(pfn.tolist(), stamps, runs, shift)
        if not runs:
            touched = np.fromiter(map(_TOUCHED, stamps), dtype=bool, count=len(pfn))
            return _runs_of_frames(pfn[touched], shift)
        stamps = list(stamps)
        now = np.fromiter(map(_TOUCHED, stamps), dtype=bool, count=len(pfn))
        seq = np.fromiter(map(_SEQ, stamps), dtype=np.int64, count=len(pfn))
        # A page that its run overwrote later counts as the run says; the others change the run's
        # answer by one step up or down at the page's edges.
        run_start = np.array([run[0] for run in runs], dtype=np.int64)
        run_end = np.array([run[1] for run in runs], dtype=np.int64)
        run_seq = np.array([run[2][0] for run in runs], dtype=np.int64)
        run_touched = np.array([run[2][2] for run in runs], dtype=bool)
        index = np.maximum(np.searchsorted(run_start, pfn, side="right") - 1, 0)
        inside = (pfn >= run_start[index]) & (pfn < run_end[index])
        below = inside & run_touched[index]
        now = np.where(inside & (seq < run_seq[index]), below, now)
        changed = pfn[now != below]
        step = np.where(now[now != below], 1, -1)
        start, stop = run_start[run_touched], run_end[run_touched]
        one = np.ones(len(start), dtype=np.int64)
        return _runs_of_steps(
            np.concatenate((start, stop, changed, changed + 1)),
            np.concatenate((one, -one, step, -step)),
            shift,
        )

    def _touched_few(
        self,
        frames: list[int],
        stamps: Iterable[Stamp],
        runs: list[tuple[int, int, Stamp]],
        shift: int,
    ) -> list[tuple[int, int]]:
        # touched_runs of few pages and one run at most, without arrays.
        start, end, below = runs[0] if runs else (0, 0, None)
        single: list[int] = []
        holes: list[int] = []
        for pfn, stamp in sorted(zip(frames, stamps, strict=True)):
            if below is None or not start <= pfn < end:
                if stamp[2]:
                    single.append(pfn)
            elif stamp[0] >= below[0] and stamp[2] != below[2]:
                (single if stamp[2] else holes).append(pfn)
        pieces = [(pfn, pfn + 1) for pfn in single]
        if below is not None and below[2]:
            for hole in holes:
                pieces.append((start, hole))
                start = hole + 1
            pieces.append((start, end))
            pieces.sort()
        return _joined((a << shift, b << shift) for a, b in pieces if a < b)

    def ever_touched(self, shift: int) -> list[tuple[int, int]]:
        """Ordered, disjoint runs, as of :meth:`touched_runs`, outside of which all pages are zero.

        Inside some are zero as well: pages between frames that nearly adjoin, and what a large
        write zeroed later. That is enough for whoever throws everything away, and quickly told.
        """
        touched = sorted([pfn for pfn, stamp in self.pages.items() if stamp[2]])
        runs: list[tuple[int, int]] = []
        first = end = touched[0] if touched else 0
        for pfn in touched:
            if pfn > end + _NEAR_PAGES:
                runs.append((first << shift, end << shift))
                first = pfn
            end = pfn + 1
        if touched:
            runs.append((first << shift, end << shift))
        large = self.runs
        if any(map(_TOUCHED, large.values)):
            columns = zip(large.starts, large.ends, large.values, strict=True)
            runs += [(first << shift, end << shift) for first, end, stamp in columns if stamp[2]]
            runs = _united(runs)
        return runs

    def touched_frames(self, starts: _I64, ends: _I64) -> _I64 | None:
        """The touched frames of some ordered, disjoint ranges, ascending.

        None where a large write reached one of them: then :meth:`touched_runs` tells. Costs what
        was written page by page.
        """
        for start, end in zip(self.runs.starts, self.runs.ends, strict=True):
            if starts.searchsorted(end) > ends.searchsorted(start, side="right"):
                return None
        pages = self.pages
        pfn = np.fromiter(pages, dtype=np.int64, count=len(pages))
        pfn = pfn[starts.searchsorted(pfn, side="right") > ends.searchsorted(pfn, side="right")]
        touched = [pages[frame][2] for frame in pfn.tolist()]
        if not all(touched):
            pfn = pfn[touched]
        pfn.sort()
        return pfn

    def written_runs(self, first: int, end: int) -> list[tuple[int, int, Writer]]:
        """The writers of [first, end) as ordered runs (first, end, writer); gaps: never written."""
        found: list[tuple[int, int, Writer]] = []

        def emit(start: int, stop: int, writer: Writer) -> None:
            if found and found[-1][1] == start and found[-1][2] == writer:
                found[-1] = (found[-1][0], stop, writer)
            elif start < stop:
                found.append((start, stop, writer))

        known = sorted(self._known_pages(first, end)[0].tolist())
        known = [pfn for pfn in known if self.stamp_of(pfn) is self.pages[pfn]]
        at = 0
        for start, stop, stamp in [*self.runs.overlapping(first, end), (end, end, None)]:
            while at < len(known) and known[at] < start:
                emit(known[at], known[at] + 1, self.pages[known[at]][1])
                at += 1
            while stamp is not None and at < len(known) and known[at] < stop:
                emit(start, known[at], stamp[1])
                emit(known[at], known[at] + 1, self.pages[known[at]][1])
                start = known[at] + 1
                at += 1
            if stamp is not None:
                emit(start, stop, stamp[1])
        return found


def _joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _united(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    united: list[tuple[int, int]] = []
    for start, stop in sorted(runs):
        if united and start <= united[-1][1]:
            united[-1] = (united[-1][0], max(stop, united[-1][1]))
        else:
            united.append((start, stop))
    return united


def _runs_of_frames(frame: _I64, shift: int) -> list[tuple[int, int]]:
    """Distinct frames in any order, as runs."""
    if not len(frame):
        return []
    frame = np.sort(frame)
    cut = np.flatnonzero(frame[1:] != frame[:-1] + 1) + 1
    firsts = (frame[np.append(0, cut)] << shift).tolist()
    ends = ((frame[np.append(cut - 1, len(frame) - 1)] + 1) << shift).tolist()
    return list(zip(firsts, ends, strict=True))


def _runs_of_steps(edge: _I64, up: _I64, shift: int) -> list[tuple[int, int]]:
    """Runs where the sum of all steps at or before a frame is 1 (it is 0 or 1 everywhere)."""
    if not len(edge):
        return []
    order = np.argsort(edge, kind="stable")
    edge = edge[order]
    level = np.cumsum(up[order])
    last = np.append(edge[1:] != edge[:-1], True)
    edge, level = edge[last], level[last]
    turn = np.append(level[:1] != 0, level[1:] != level[:-1])
    bounds = (edge[turn] << shift).tolist()
    return list(zip(bounds[::2], bounds[1::2], strict=True))
