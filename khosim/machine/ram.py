"""RAM: the bytes that a kexec leaves alone.

One flat array of bytes, indexed by physical address, over lazily committed memory: a machine of 16
TiB costs what it touches, and a page or a range is a slice, never a copy. Beside it lie the shadow
(who wrote this page last) and, while a snapshot is active, the undo log.

It stands for the direct map (``arch/x86/include/asm/page_64.h:__phys_addr @ 7.3``): whatever a
kernel keeps in memory it keeps here, in the real layout. RAM knows no holes; an address below
``size_bytes`` that the memory map calls a hole can be read and written here, and it is
:class:`~khosim.machine.hardware.Hardware` that knows better. Left out: caches, ECC, memory types.

The machines are little-endian, and so must the host be.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any, NoReturn

import numpy as np

from khosim.errors import InputError, RamFault
from khosim.machine.mapping import map_memory, recycle
from khosim.machine.shadow import Stamp, Writer, WriterShadow
from khosim.machine.undo import Backing, UndoLog

__all__ = ("MAX_PHYS", "Ram", "Writer")

MAX_PHYS = 64 << 40
"""The highest end of RAM, in bytes: what a host's address space of 47 bits has room for."""

_SMALL_PAGES = 16  # writes up to this many pages are stamped page by page, longer ones as a run
_PAGE_SIZES = (4096, 16384, 65536)

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
By = tuple[int, str]
"""A :class:`Writer` or a plain (generation, symbol). Pass the same object each time: it is cheaper
than an equal one."""


class Ram:
    """The RAM of one machine, physical addresses [0, ``size_bytes``).

    ``page_size`` (4096, 16384 or 65536) is the granule of the shadow and of snapshots. Every
    access outside raises :class:`RamFault`; a length of 0 is always fine inside or at the end.
    Every writing call takes ``by``, the writer to remember for the pages it reaches.

    ``words`` is all of it as 64-bit numbers, for code that reads many and has checked where;
    ``u64`` is the same for single ones.
    ``data`` is the array itself, rounded up to whole pages, for vectorised code: call
    :meth:`note_writes` or :meth:`writable` for what you are going to write, and then write.
    ``guard`` is for :mod:`khosim.machine.devices.guarded_ram` and unset here.
    """

    __slots__ = (
        "__weakref__",
        "_backing",
        "_by",
        "_mv",
        "_next_token",
        "_pages",
        "_ro",
        "_shadow",
        "_small_bytes",
        "_stamp",
        "_u32",
        "_u64",
        "_undo",
        "_undo_log",
        "data",
        "guard",
        "page_shift",
        "page_size",
        "size_bytes",
        "u64",
        "words",
    )

    guard: Any

    def __init__(self, size_bytes: int, *, page_size: int = 4096) -> None:
        if page_size not in _PAGE_SIZES:
            raise InputError("RAM: page size", f"{page_size} is none of 4096, 16384, 65536")
        if not 0 < size_bytes <= MAX_PHYS:
            raise InputError("RAM: size", f"{size_bytes} bytes; it takes 1 to {MAX_PHYS}")
        self.size_bytes = size_bytes
        self.page_size = page_size
        self.page_shift = page_size.bit_length() - 1
        mapped = -(-size_bytes // page_size) * page_size
        mapping = map_memory(mapped)
        self.data: Bytes = np.frombuffer(mapping, dtype=np.uint8)
        self._ro: Bytes = self.data.view()
        self._ro.flags.writeable = False
        self._mv = memoryview(mapping)
        self._u64 = self._mv.cast("Q")
        self._u32 = self._mv.cast("I")
        self.words = self._ro.view("<u8")
        self.u64 = self._u64.toreadonly()
        self._backing = Backing(mapping, self.data, self._mv, self.page_shift)
        self._shadow = WriterShadow()
        self._pages = self._shadow.pages
        self._by: By | None = None
        self._stamp: Stamp = (0, Writer(-1, ""), False)
        self._undo_log = UndoLog(self._backing, self._shadow)
        self._undo: UndoLog | None = None  # the log while a snapshot is active
        self._small_bytes = page_size * _SMALL_PAGES
        self._next_token = 1

    def __del__(self) -> None:
        # The bytes may serve the next machine; see recycle().
        if not hasattr(self, "_next_token"):
            return  # it never came to be
        mapping = self._backing.mapping
        touched = self._shadow.ever_touched(self.page_shift)
        del self.data, self.words, self.u64, self._ro, self._mv, self._u64, self._u32
        del self._backing, self._undo_log, self._undo
        recycle(mapping, touched)

    # Reading

    def read(self, phys: int, len_bytes: int) -> bytes:
        """A copy of ``len_bytes`` bytes at ``phys``."""
        if phys < 0 or len_bytes < 0 or phys > self.size_bytes - len_bytes:
            self._fault(phys, len_bytes)
        return self._mv[phys : phys + len_bytes].tobytes()

    def view(self, phys: int, len_bytes: int) -> Bytes:
        """The bytes at ``phys`` as a read-only array that shows later writes; no copy."""
        if phys < 0 or len_bytes < 0 or phys > self.size_bytes - len_bytes:
            self._fault(phys, len_bytes)
        return self._ro[phys : phys + len_bytes]

    def read_u64(self, phys: int) -> int:
        """The little-endian 64-bit number at ``phys``, aligned or not."""
        if phys < 0 or phys > self.size_bytes - 8:
            self._fault(phys, 8)
        if phys & 7:
            return int.from_bytes(self._mv[phys : phys + 8], "little")
        return self._u64[phys >> 3]

    def read_u32(self, phys: int) -> int:
        """The little-endian 32-bit number at ``phys``, aligned or not."""
        if phys < 0 or phys > self.size_bytes - 4:
            self._fault(phys, 4)
        if phys & 3:
            return int.from_bytes(self._mv[phys : phys + 4], "little")
        return self._u32[phys >> 2]

    # Writing

    def write(self, phys: int, data: bytes | bytearray | memoryview | Bytes, by: By) -> None:
        """Write ``data`` (bytes-like, or a one-dimensional uint8 array) at ``phys``."""
        if type(data) is bytes:
            end = phys + len(data)
            pfn = phys >> self.page_shift
            if 0 <= phys < end <= self.size_bytes and pfn == (end - 1) >> self.page_shift:
                # Bytes inside one page, the commonest write of all: _note without the call.
                if self._undo is not None:
                    self._undo.save_page(pfn)
                if by is not self._by:
                    self._restamp(by)
                self._pages[pfn] = self._stamp
            else:
                self._note(phys, len(data), by)
            self._mv[phys:end] = data
        elif isinstance(data, np.ndarray):
            if data.dtype != np.uint8 or data.ndim != 1:
                raise TypeError(f"RAM takes a row of uint8, not {data.dtype} {data.shape}")
            self._note(phys, len(data), by)
            self.data[phys : phys + len(data)] = data
        else:
            raw = memoryview(data).cast("B")
            self._note(phys, len(raw), by)
            self._mv[phys : phys + len(raw)] = raw

    def write_u64(self, phys: int, value: int, by: By) -> None:
        """Write a little-endian 64-bit number, aligned or not."""
        if phys & 7 or phys < 0 or phys > self.size_bytes - 8:
            self.write(phys, value.to_bytes(8, "little"), by)
            return
        pfn = phys >> self.page_shift
        if self._undo is not None:
            self._undo.save_page(pfn)
        if by is not self._by:
            self._restamp(by)
        self._pages[pfn] = self._stamp
        self._u64[phys >> 3] = value

    def write_u32(self, phys: int, value: int, by: By) -> None:
        """Write a little-endian 32-bit number, aligned or not."""
        if phys & 3 or phys < 0 or phys > self.size_bytes - 4:
            self.write(phys, value.to_bytes(4, "little"), by)
            return
        pfn = phys >> self.page_shift
        if self._undo is not None:
            self._undo.save_page(pfn)
        if by is not self._by:
            self._restamp(by)
        self._pages[pfn] = self._stamp
        self._u32[phys >> 2] = value

    def writable(self, phys: int, len_bytes: int, by: By) -> Bytes:
        """The bytes at ``phys`` as an array to write through, counted as written now.

        Valid until the next snapshot: what is written through it after that is not undone. Ask
        for what you will write, not for more: every page of it counts as touched.
        """
        self._note(phys, len_bytes, by)
        return self.data[phys : phys + len_bytes]

    def writable_mv(self, phys: int, len_bytes: int, by: By) -> memoryview:
        """As :meth:`writable`, as a memoryview, for code that edits in place."""
        self._note(phys, len_bytes, by)
        return self._mv[phys : phys + len_bytes]

    def note_writes(self, pfns: np.ndarray[Any, Any] | Sequence[int], by: By) -> None:
        """Announce writes to these page frames through ``data``, in any order, repeats allowed."""
        frames = np.asarray(pfns)
        if not len(frames):
            return
        low, high = int(frames.min()), int(frames.max())
        if low < 0 or high << self.page_shift >= self.size_bytes:
            self._fault((low if low < 0 else high) << self.page_shift, self.page_size)
        cuts = np.flatnonzero(np.diff(frames.astype(np.int64)) != 1) + 1
        if (len(cuts) + 1) * _SMALL_PAGES < len(frames):
            firsts = frames[np.append(0, cuts)].tolist()
            lasts = frames[np.append(cuts - 1, len(frames) - 1)].tolist()
            for first, last in zip(firsts, lasts, strict=True):
                self._note_pages(first, last + 1, by)
            return
        numbers = frames.tolist()
        if self._undo is not None:
            for pfn in numbers:
                self._undo.save_page(pfn)
        if by is not self._by:
            self._restamp(by)
        self._pages.update(zip(numbers, repeat(self._stamp)))

    def zero(self, phys: int, len_bytes: int, by: By) -> None:
        """Zero a range of any length. Costs what was touched in it; gives memory back."""
        if phys < 0 or len_bytes < 0 or phys > self.size_bytes - len_bytes:
            self._fault(phys, len_bytes)
        if not len_bytes:
            return
        end = phys + len_bytes
        if not (phys | len_bytes) & (self.page_size - 1) and len_bytes <= self._small_bytes:
            self._zero_pages(phys >> self.page_shift, end >> self.page_shift, by)
            return
        first = (phys + self.page_size - 1) >> self.page_shift
        last = end >> self.page_shift
        if first > last:
            self._zero_part(phys, end, by)
            return
        if phys < first << self.page_shift:
            self._zero_part(phys, first << self.page_shift, by)
        if last - first > _SMALL_PAGES:
            if self._undo is not None:
                self._undo.save_range(first, last)
            touched = self._shadow.touched_runs(first, last)
            self._shadow.assign(first, last, by, False)
            self._by = None
            for start, stop in touched:
                self._backing.zero_pages(start, stop)
        elif first < last:
            self._zero_pages(first, last, by)
        if last << self.page_shift < end:
            self._zero_part(last << self.page_shift, end, by)

    def copy(self, src: int, dst: int, len_bytes: int, by: By) -> None:
        """Copy a range as memmove does; what was never touched is not read and stays so."""
        if src < 0 or len_bytes < 0 or src > self.size_bytes - len_bytes:
            self._fault(src, len_bytes)
        if dst < 0 or dst > self.size_bytes - len_bytes:
            self._fault(dst, len_bytes)
        if not len_bytes:
            return
        shift = self.page_shift
        src_end = src + len_bytes
        pieces: list[tuple[int, int, bool]] = []
        at = src
        first, last = src >> shift, (src_end - 1) >> shift
        for start, end in self._shadow.touched_runs(first, last + 1, shift):
            start, end = max(src, start), min(src_end, end)
            if at < start:
                pieces.append((at, start, False))
            pieces.append((start, end, True))
            at = end
        if at < src_end:
            pieces.append((at, src_end, False))
        if dst > src:
            pieces.reverse()
        for start, end, touched in pieces:
            to = start + dst - src
            if touched:
                self._note(to, end - start, by)
                self._mv[to : to + end - start] = self._mv[start:end]
            else:
                self.zero(to, end - start, by)

    # The shadow

    def last_writer(self, phys: int) -> Writer | None:
        """Who wrote the page of ``phys`` last; None: nobody ever did. Page-granular."""
        if phys < 0 or phys >= self.size_bytes:
            self._fault(phys, 1)
        stamp = self._shadow.stamp_of(phys >> self.page_shift)
        return stamp[1] if stamp is not None else None

    def last_writers(self, pfns: np.ndarray[Any, Any] | Sequence[int]) -> list[Writer | None]:
        """:meth:`last_writer` of each page frame."""
        numbers = pfns.tolist() if isinstance(pfns, np.ndarray) else list(pfns)
        if numbers and (min(numbers) < 0 or max(numbers) << self.page_shift >= self.size_bytes):
            bad = min(numbers) if min(numbers) < 0 else max(numbers)
            self._fault(bad << self.page_shift, self.page_size)
        stamps = map(self._shadow.stamp_of, numbers)
        return [stamp[1] if stamp is not None else None for stamp in stamps]

    def writers_in(self, start_phys: int, end_phys: int) -> list[tuple[int, int, Writer]]:
        """Who wrote what of [start, end): ordered (start_phys, end_phys, writer) of whole pages."""
        first, end = self._frames_of(start_phys, end_phys)
        shift = self.page_shift
        runs = self._shadow.written_runs(first, end)
        return [(start << shift, stop << shift, by) for start, stop, by in runs]

    def touched_ranges(
        self, start_phys: int = 0, end_phys: int | None = None
    ) -> list[tuple[int, int]]:
        """The pages ever written and not zeroed since, as ordered disjoint (start, end) in bytes.

        Whatever lies outside reads as zero. The last range may end past ``size_bytes``, at the
        end of its page.
        """
        first, end = self._frames_of(start_phys, self.size_bytes if end_phys is None else end_phys)
        return self._shadow.touched_runs(first, end, self.page_shift)

    def touched_frames(
        self, first_pfns: np.ndarray[Any, Any], end_pfns: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any] | None:
        """:meth:`touched_ranges` of ordered, disjoint ranges of page frames, frame by frame.

        None where that takes more than a look at single pages: :meth:`touched_ranges` tells.
        """
        return self._shadow.touched_frames(first_pfns, end_pfns)

    # Snapshots

    def snapshot(self) -> int:
        """Begin a snapshot and return its token. Snapshots nest."""
        token = self._next_token
        self._next_token += 1
        self._undo = self._undo_log
        self._undo.push(token)
        return token

    def rollback(self, token: int) -> None:
        """Restore bytes, writers and touched pages as they were at the snapshot.

        The token stays good for further rollbacks; snapshots begun after it are gone. Raises
        :class:`InputError` for a token that is not active.
        """
        self._undo_log.rollback(token)

    def discard(self, token: int) -> None:
        """Forget a snapshot, keeping all that was written since."""
        if not self._undo_log.discard(token):
            self._undo = None

    def reset(self) -> None:
        """Back to a machine never used: all zero, no writers, no snapshots. Memory stays mapped."""
        for first, end in self._shadow.touched_runs(0, self.data.nbytes >> self.page_shift):
            self._backing.zero_pages(first, end)
        self._shadow = WriterShadow()
        self._pages = self._shadow.pages
        self._by = None
        self._undo_log = UndoLog(self._backing, self._shadow)
        self._undo = None

    # Inside

    def _fault(self, phys: int, len_bytes: int) -> NoReturn:
        cause = "negative length" if len_bytes < 0 else f"RAM ends at {self.size_bytes:#x}"
        raise RamFault(int(phys), int(len_bytes), cause)

    def _frames_of(self, start_phys: int, end_phys: int) -> tuple[int, int]:
        if start_phys < 0 or end_phys < start_phys or end_phys > self.size_bytes:
            self._fault(start_phys, end_phys - start_phys)
        return start_phys >> self.page_shift, -(-end_phys >> self.page_shift)

    def _restamp(self, by: By) -> None:
        self._stamp = self._shadow.page_stamp(by, True)
        self._by = by

    def _note(self, phys: int, len_bytes: int, by: By) -> None:
        """Check, save for undo and stamp a write of [phys, phys + len_bytes)."""
        if phys < 0 or len_bytes < 0 or phys > self.size_bytes - len_bytes:
            self._fault(phys, len_bytes)
        pfn = phys >> self.page_shift
        last = (phys + len_bytes - 1) >> self.page_shift
        if pfn != last or not len_bytes:
            self._note_pages(pfn, last + 1 if len_bytes else pfn, by)
            return
        if self._undo is not None:
            self._undo.save_page(pfn)
        if by is not self._by:
            self._restamp(by)
        self._pages[pfn] = self._stamp

    def _note_pages(self, first: int, end: int, by: By) -> None:
        if end - first > _SMALL_PAGES:
            if self._undo is not None:
                self._undo.save_range(first, end)
            self._shadow.assign(first, end, by, True)
            self._by = None
            return
        if by is not self._by:
            self._restamp(by)
        for pfn in range(first, end):
            if self._undo is not None:
                self._undo.save_page(pfn)
            self._pages[pfn] = self._stamp

    def _zero_pages(self, first: int, last: int, by: By) -> None:
        touched, pages, undo = self._shadow.touched, self._pages, self._undo
        stamp = self._shadow.page_stamp(by, False)
        for pfn in range(first, last):
            if undo is not None:
                undo.save_page(pfn)
            if touched(pfn):
                start = pfn << self.page_shift
                self.data[start : start + self.page_size] = 0
            pages[pfn] = stamp

    def _zero_part(self, start: int, end: int, by: By) -> None:
        """Zero [start, end) inside one page."""
        if start >= end:
            return
        pfn = start >> self.page_shift
        if not self._shadow.touched(pfn):
            self._zero_pages(pfn, pfn + 1, by)
            return
        self._note(start, end - start, by)
        self.data[start:end] = 0
