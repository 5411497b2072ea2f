"""What memory held at one moment, so that later a change can be named by its page.

Models nothing of the kernel. Little content is kept as it is and compared word for word, which is
several times faster than a fingerprint; of much content only digests are kept. Memory that was
never written is neither read nor kept: of a terabyte only the touched pages cost anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from khosim.checks.digest import Digests, changed_pages, digest_ranges
from khosim.checks.ranges import both, frames_of, holds, page_ranges

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from khosim.checks.ranges import I64, Ranges

__all__ = ("Keepsake", "Memory")

_FEW_PAGES = 4  # sets up to this size are read whole, without asking what was touched
_BATCH_PAGES = 32  # compared at once: stays in the second-level cache
_COPY_BYTES = 4 << 20  # content up to this size is kept, not digested


class Memory(Protocol):
    """RAM as one array of bytes in whole pages, which knows what of it was ever written."""

    @property
    def data(self) -> NDArray[np.uint8]:
        """All bytes."""

    def read(self, phys: int, len_bytes: int, /) -> bytes:
        """Copy of a range."""

    def view(self, phys: int, len_bytes: int, /) -> NDArray[np.uint8]:
        """Read-only array over a range."""

    def touched_frames(self, first_pfns: I64, end_pfns: I64, /) -> I64 | None:
        """The page frames of ordered ranges that may not be zero; None where it does not know."""

    def touched_ranges(self) -> list[tuple[int, int]]:
        """Sorted ``(start_phys, end_phys)`` outside of which all bytes are zero."""


class _Bytes:
    """Memory for the digester, which is told what to read and need not ask what was touched."""

    __slots__ = ("read", "view")

    def __init__(self, memory: Memory) -> None:
        self.read = memory.read
        self.view = memory.view


class Keepsake:
    """The content of ``ranges`` (sorted, disjoint, in pages) when this was made."""

    __slots__ = ("_digests", "_frames", "_memory", "_page_size", "_runs", "_shift", "ranges")

    def __init__(self, memory: Memory, ranges: Ranges, page_size: int) -> None:
        self._memory = memory
        self._page_size = page_size
        self.ranges = ranges
        self._shift = page_size.bit_length() - 1
        self._digests: Digests | None = None
        self._frames = frames = self._worth_reading(ranges)
        self._runs: list[tuple[int, bytes]] = []
        if len(frames) << self._shift <= _COPY_BYTES:
            data = memory.data
            self._runs = [(start, data[start:end].tobytes()) for start, end in self._pieces(frames)]
        else:
            self._digests = self._digest(frames)

    def changed(self, ranges: Ranges) -> list[int]:
        """Page frames of ``ranges`` that hold something else now, ascending.

        ``ranges`` is the set that was kept, or a part of it.
        """
        frames = self._worth_reading(ranges)
        if self._digests is None:
            return self._differing(ranges, frames)
        now = self._digest(frames)
        pages = [phys >> self._shift for phys in changed_pages(self._digests, now)]
        inside = holds(ranges, pages) if pages else ()
        return [pfn for pfn, is_inside in zip(pages, inside, strict=True) if is_inside]

    def _differing(self, ranges: Ranges, now: I64) -> list[int]:
        frames, data = self._frames, self._memory.data
        if now.tobytes() == frames.tobytes():
            for start, kept in self._runs:
                if data[start : start + len(kept)].tobytes() != kept:
                    break
            else:
                return []  # all of it is there as it was
        before = self._content()
        if len(now) != len(frames) or (now != frames).any():
            # Pages that one of both moments does not know were zero then.
            asked = np.array(holds(ranges, frames), dtype=np.bool_)
            known, before = frames[asked], before[asked]
            frames = now
            if len(known) != len(now) or (known != now).any():
                frames, kept_rows = np.union1d(known, now), before
                before = np.zeros((len(frames), self._page_size >> 3), dtype=np.uint64)
                before[frames.searchsorted(known)] = kept_rows
        found: list[int] = []
        pages = data.view(np.uint64).reshape(-1, self._page_size >> 3)
        for first in range(0, len(frames), _BATCH_PAGES):
            some = slice(first, first + _BATCH_PAGES)
            differs = before[some] != pages.take(frames[some], axis=0)
            if differs.any():
                found += frames[some][differs.any(axis=1)].tolist()
        return found

    def _content(self) -> NDArray[np.uint64]:
        # The kept pages' content, a page in each row.
        content = np.frombuffer(b"".join(kept for _, kept in self._runs), dtype=np.uint64)
        return content.reshape(-1, self._page_size >> 3)

    def _pieces(self, frames: I64) -> list[tuple[int, int]]:
        # Neighbouring frames as (start, end) in bytes.
        pieces: list[tuple[int, int]] = []
        first = end = -1
        for pfn in frames.tolist():
            if pfn != end:
                if end >= 0:
                    pieces.append((first << self._shift, end << self._shift))
                first = pfn
            end = pfn + 1
        if end >= 0:
            pieces.append((first << self._shift, end << self._shift))
        return pieces

    def _digest(self, frames: I64) -> Digests:
        step = np.ones(len(frames) + 1, dtype=np.bool_)
        np.not_equal(frames[1:] - frames[:-1], 1, out=step[1:-1])
        starts, ends = frames[step[:-1]] << self._shift, (frames[step[1:]] + 1) << self._shift
        listed = zip(starts.tolist(), ends.tolist(), strict=True)
        return digest_ranges(_Bytes(self._memory), listed, self._page_size)

    def _worth_reading(self, ranges: Ranges) -> I64:
        # The frames that may hold anything but zeros, ascending.
        starts, ends = ranges
        end_pfn = len(self._memory.data) >> self._shift
        if len(ends) and ends[-1] > end_pfn:  # a map may name what is no memory
            some = starts < end_pfn
            starts, ends = starts[some], np.minimum(ends[some], end_pfn)
        if int((ends - starts).sum()) <= _FEW_PAGES:
            return frames_of((starts, ends))
        frames = self._memory.touched_frames(starts, ends)
        if frames is None:
            touched = page_ranges(self._memory.touched_ranges(), self._shift)
            frames = frames_of(both((starts, ends), touched))
        return frames
