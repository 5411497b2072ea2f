"""Physical memory inside of a file: mapped, never read as a whole.

A :class:`MappedFile` is the file, a :class:`MappedMemory` says which of its bytes are which
physical memory. Both cost what is touched of them, whatever their size; a search looks only at
parts of the file that hold data (``lseek(2)``: ``SEEK_DATA``, ``SEEK_HOLE``).

Left out: files that shrink while they are mapped, for which the host sends SIGBUS.
"""

from __future__ import annotations

import mmap
import os
import stat
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from khosim.errors import InputError, RamFault

__all__ = ("MappedFile", "MappedMemory", "Segment", "pages_with")

U8: TypeAlias = NDArray[np.uint8]

_STEP = 4096
_CHUNK = 1 << 30


class Segment(NamedTuple):
    """The bytes at ``offset`` of the file are the memory at ``[start, end)``."""

    start: int
    end: int
    offset: int


class MappedFile:
    """A file as an array of bytes; :class:`InputError` where it is empty or no regular file."""

    __slots__ = ("data", "path", "size_bytes")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise InputError(self.path, "not a regular file")
            with open(self.path, "rb") as file:
                self.size_bytes = os.fstat(file.fileno()).st_size
                if self.size_bytes == 0:
                    raise InputError(self.path, "the file is empty")
                mapping = mmap.mmap(file.fileno(), self.size_bytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            cause = getattr(error, "strerror", None) or str(error)
            raise InputError(self.path, cause) from None
        self.data: U8 = np.frombuffer(mapping, dtype=np.uint8)

    def extents(self) -> Iterator[tuple[int, int]]:
        """The parts ``[start, end)`` that are no holes; all of it where the host cannot tell."""
        size = self.size_bytes
        with open(self.path, "rb") as file:
            end = 0
            while end < size:
                try:
                    start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                    end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                except OSError:  # ENXIO: no data after this; EINVAL: no such calls
                    if end == 0 and not _knows_holes(file.fileno()):
                        yield 0, size
                    return
                yield min(start, size), min(end, size)


class MappedMemory:
    """Memory in the segments of a file; satisfies the checkers' reader protocol.

    Where segments overlap, the one with the lower address counts. Everything else is no RAM.
    """

    __slots__ = ("_starts", "file", "segments")

    def __init__(self, file: MappedFile, segments: Iterable[Segment]) -> None:
        self.file = file
        self.segments: list[Segment] = []
        past = 0
        for start, end, offset in sorted(segments):
            low = max(start, past)
            if low < end:
                self.segments.append(Segment(low, end, offset + low - start))
                past = end
        self._starts = [segment.start for segment in self.segments]

    def read(self, phys: int, len_bytes: int, /) -> bytes:
        """Copy of the bytes at ``[phys, phys + len_bytes)``; raises :class:`RamFault`."""
        return self.view(phys, len_bytes).tobytes()

    def view(self, phys: int, len_bytes: int, /) -> U8:
        """Read-only array over these bytes, a copy only where they cross segments."""
        at = bisect_right(self._starts, phys) - 1
        if at < 0 or len_bytes < 0:
            raise RamFault(phys, len_bytes, "not in this image")
        end = phys + len_bytes
        start, segment_end, offset = self.segments[at]
        data = self.file.data
        if end <= segment_end:
            return data[offset + phys - start : offset + end - start]
        parts: list[U8] = []
        while True:
            if phys >= segment_end:
                raise RamFault(phys, end - phys, "not in this image")
            stop = min(end, segment_end)
            parts.append(data[offset + phys - start : offset + stop - start])
            phys = stop
            if phys == end:
                return np.concatenate(parts)
            at += 1
            if at == len(self.segments) or self.segments[at].start != phys:
                raise RamFault(phys, end - phys, "not in this image")
            start, segment_end, offset = self.segments[at]

    def touched_ranges(self) -> list[tuple[int, int]]:
        """The physical ranges ``[start, end)`` that are no holes of the file, in order."""
        by_offset = sorted(self.segments, key=lambda segment: segment.offset)
        found: list[tuple[int, int]] = []
        at = 0
        for low, high in self.file.extents():
            while at < len(by_offset) and _file_end(by_offset[at]) <= low:
                at += 1
            for start, end, offset in by_offset[at:]:
                if offset >= high:
                    break
                first, past = max(low, offset), min(high, offset + end - start)
                if first < past:
                    found.append((start + first - offset, start + past - offset))
        return sorted(found)

    def pages_with(self, magic: bytes) -> Iterator[int]:
        """Addresses of 4 KiB pages that begin with ``magic``."""
        for low, high in self.touched_ranges():
            phys = (low + _STEP - 1) & -_STEP
            while phys < high:
                segment = self.segments[bisect_right(self._starts, phys) - 1]
                past = min(high, segment.end)
                at = segment.offset + phys - segment.start
                for offset in pages_with(self.file.data, at, at + past - phys, magic):
                    yield phys + offset - at
                phys += (past - phys + _STEP - 1) & -_STEP


def pages_with(data: U8, start: int, end: int, magic: bytes) -> Iterator[int]:
    """Offsets in ``[start, end)``, a whole number of 4 KiB from ``start``, where ``magic`` stands.

    Touches the first bytes of each page and no others.
    """
    for low in range(start, end, _CHUNK):
        firsts = data[low : min(end, low + _CHUNK) : _STEP]
        for page in np.flatnonzero(firsts == magic[0]).tolist():
            at = low + page * _STEP
            if at + len(magic) <= end and data[at : at + len(magic)].tobytes() == magic:
                yield at


def _file_end(segment: Segment) -> int:
    return segment.offset + segment.end - segment.start


def _knows_holes(fileno: int) -> bool:
    """Whether the host tells holes from data in this file."""
    try:
        os.lseek(fileno, 0, os.SEEK_HOLE)
    except OSError:
        return False
    return True
