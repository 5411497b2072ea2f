"""The undo log behind snapshots of RAM.

A snapshot copies nothing. The first write to a page after it saves what the page held; rolling back
replays the log from its end. A write to a long range saves the pages that had been touched and
remembers the range: the rest of it was zero and becomes zero again. Time and memory follow what was
written since the snapshot, not the size of RAM.

Snapshots nest. Each has a frame of its own; a write is logged in the newest frame only, so rolling
back to an older snapshot undoes the frames one after the other. Forgetting a snapshot moves its
records to the frame before it, less those that the older frame makes superfluous.

Left out: anything outside RAM and its shadow. Whoever keeps state beside RAM saves it himself.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple

import numpy as np

from khosim.errors import InputError
from khosim.machine.shadow import RunMap, Stamp, WriterShadow

__all__ = ("Backing", "UndoLog")

_GIVE_BACK_PAGES = 64  # runs of zeroed pages from this length on are returned to the host
_MAX_SLACK_PAGES = 4096  # pages zeroed by rollbacks that may stay resident
_U8 = np.ndarray[tuple[int], np.dtype[np.uint8]]


class Backing(NamedTuple):
    """The bytes of one machine's RAM, in the three shapes that the code needs."""

    mapping: mmap.mmap
    data: _U8
    bytes_view: memoryview
    page_shift: int

    def zero_pages(self, first: int, end: int) -> None:
        """Zero the frames [first, end); long runs go back to the host and cost no memory."""
        start, stop = first << self.page_shift, end << self.page_shift
        if end - first < _GIVE_BACK_PAGES:
            self.data[start:stop] = 0
            return
        host = mmap.PAGESIZE
        inner, inner_end = (start + host - 1) // host * host, stop // host * host
        self.data[start:inner] = 0
        self.mapping.madvise(mmap.MADV_DONTNEED, inner, inner_end - inner)
        self.data[inner_end:stop] = 0


class _RangeUndo(NamedTuple):
    """A long range: zero before the snapshot but for the saved pieces (first frame, bytes)."""

    first: int
    end: int
    saved: list[tuple[int, _U8]]


_PageUndo = tuple[int, Stamp | None, bytes | None]
"""(frame, stamp in the shadow's dict, content: None where it was zero or is saved elsewhere)."""


class _Frame:
    """One snapshot's share of the log."""

    __slots__ = ("covered", "log", "runs", "seen", "token")

    def __init__(self, token: int, shadow: WriterShadow) -> None:
        self.token = token
        self.clear(shadow)

    def clear(self, shadow: WriterShadow) -> None:
        self.log: list[_PageUndo | _RangeUndo] = []
        self.seen: set[int] = set()
        self.covered: RunMap[bool] = RunMap()
        self.runs = shadow.runs.share()


class UndoLog:
    """The frames of all active snapshots of one machine's RAM."""

    __slots__ = ("_backing", "_frames", "_log", "_seen", "_shadow", "_slack")

    def __init__(self, backing: Backing, shadow: WriterShadow) -> None:
        self._backing = backing
        self._shadow = shadow
        self._frames: list[_Frame] = []
        self._slack: list[int] = []
        self._log: list[_PageUndo | _RangeUndo] = []
        self._seen: set[int] = set()

    def _use_top(self) -> None:
        if self._frames:
            self._log, self._seen = self._frames[-1].log, self._frames[-1].seen

    def push(self, token: int) -> None:
        """Begin a snapshot."""
        self._frames.append(_Frame(token, self._shadow))
        self._use_top()

    def _index(self, token: int) -> int:
        for index, frame in enumerate(self._frames):
            if frame.token == token:
                return index
        raise InputError("snapshot", f"token {token} is not active: rolled back over or discarded")

    def save_page(self, pfn: int) -> None:
        """Save one page that is about to be written, once per snapshot."""
        if pfn in self._seen:
            return
        self._seen.add(pfn)
        shadow = self._shadow
        content = None
        covered = self._frames[-1].covered
        if covered.find(pfn) < 0 and shadow.touched(pfn):  # else an older record restores it
            shift = self._backing.page_shift
            content = self._backing.bytes_view[pfn << shift : (pfn + 1) << shift].tobytes()
        self._log.append((pfn, shadow.pages.get(pfn), content))

    def save_range(self, first: int, end: int) -> None:
        """Save the frames [first, end) before a write of any length; costs what was touched."""
        shift, data = self._backing.page_shift, self._backing.data
        covered = self._frames[-1].covered
        for gap_first, gap_end in covered.gaps(first, end):
            saved = [
                (run_first, data[run_first << shift : run_end << shift].copy())
                for run_first, run_end in self._shadow.touched_runs(gap_first, gap_end)
            ]
            self._log.append(_RangeUndo(gap_first, gap_end, saved))
        covered.assign(first, end, True)

    def rollback(self, token: int) -> None:
        """Undo every write since the snapshot, which stays active; later ones are gone."""
        index = self._index(token)
        while len(self._frames) > index + 1:
            self._undo(self._frames.pop())
        frame = self._frames[index]
        self._undo(frame)
        frame.clear(self._shadow)
        self._use_top()
        if len(self._slack) > _MAX_SLACK_PAGES:
            self._give_back_slack()

    def discard(self, token: int) -> bool:
        """Forget a snapshot and keep what was written; True while others are active."""
        index = self._index(token)
        child = self._frames.pop(index)
        if index:
            self._merge(child, into=self._frames[index - 1])
        self._use_top()
        return bool(self._frames)

    def _undo(self, frame: _Frame) -> None:
        backing, pages = self._backing, self._shadow.pages
        shift, view = backing.page_shift, backing.bytes_view
        page_size = 1 << shift
        zeroes = bytes(page_size)
        for record in reversed(frame.log):
            if isinstance(record, _RangeUndo):
                backing.zero_pages(record.first, record.end)
                if record.end - record.first < _GIVE_BACK_PAGES:
                    self._slack.extend(range(record.first, record.end))
                for first, content in record.saved:
                    start = first << shift
                    backing.data[start : start + len(content)] = content
                continue
            pfn, stamp, page = record
            if stamp is None:
                pages.pop(pfn, None)
            else:
                pages[pfn] = stamp
            start = pfn << shift
            if page is None:
                view[start : start + page_size] = zeroes
                self._slack.append(pfn)
            else:
                view[start : start + page_size] = page
        self._shadow.runs.restore(frame.runs)

    def _merge(self, child: _Frame, into: _Frame) -> None:
        for record in child.log:
            if isinstance(record, _RangeUndo):
                if into.covered.gaps(record.first, record.end):
                    into.log.append(record)
            elif record[0] not in into.seen:
                into.log.append(record)
        into.seen |= child.seen
        for first, end in zip(child.covered.starts, child.covered.ends, strict=True):
            into.covered.assign(first, end, True)

    def _give_back_slack(self) -> None:
        """Return the pages that rollbacks zeroed and nobody wrote again to the host."""
        page_size = 1 << self._backing.page_shift
        host_pages = max(1, mmap.PAGESIZE // page_size)
        touched = self._shadow.touched
        free = sorted({pfn for pfn in self._slack if not touched(pfn)})
        self._slack = []
        if host_pages > 1:
            return  # a page of the host holds several of ours: leave them zeroed and resident
        start = 0
        for at in range(1, len(free) + 1):
            if at == len(free) or free[at] != free[at - 1] + 1:
                low, length = free[start] * page_size, (at - start) * page_size
                self._backing.mapping.madvise(mmap.MADV_DONTNEED, low, length)
                start = at
