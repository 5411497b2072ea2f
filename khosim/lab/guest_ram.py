"""The guest's memory, which QEMU keeps in files, one per node.

QEMU's machine "pc" lays RAM out as the nodes' memory end to end, cut at 3 GiB: the rest begins at
4 GiB (``hw/i386/pc_piix.c`` there, with ``max-ram-below-4g=3G``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from khosim.capture.mapped import MappedFile, MappedMemory, Segment
from khosim.errors import RamFault
from khosim.inspect.memory import SearchableReader

__all__ = ("LOW_BYTES", "GuestRam", "RecordingReader", "layout")

LOW_BYTES = 3 << 30
_HIGH_PHYS = 4 << 30
_PAGE_SHIFT = 12

U8 = NDArray[np.uint8]


def layout(sizes: Sequence[int]) -> list[list[Segment]]:
    """For nodes of these sizes in bytes: which parts of each node's file lie where."""
    nodes = []
    at = 0
    for size in sizes:
        end = at + size
        parts = []
        if at < LOW_BYTES:
            parts.append(Segment(at, min(end, LOW_BYTES), 0))
        if end > LOW_BYTES:
            low = max(at, LOW_BYTES)
            shift = _HIGH_PHYS - LOW_BYTES
            parts.append(Segment(low + shift, end + shift, low - at))
        nodes.append(parts)
        at = end
    return nodes


class GuestRam:
    """Memory in the files ``paths``, of nodes of ``sizes`` bytes; satisfies the checkers' reader.

    A running guest changes what is read; a stopped one does not.
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int]) -> None:
        self._parts: list[tuple[Segment, MappedMemory, Path]] = []
        for path, segments in zip(paths, layout(sizes), strict=True):
            memory = MappedMemory(MappedFile(path), segments)
            self._parts += [(segment, memory, path) for segment in segments]

    def read(self, phys: int, len_bytes: int, /) -> bytes:
        """Copy of the bytes at ``[phys, phys + len_bytes)``; raises :class:`RamFault`."""
        walk = self._walk(phys, len_bytes)
        return b"".join(memory.read(start, length) for start, length, memory, _, _ in walk)

    def view(self, phys: int, len_bytes: int, /) -> U8:
        """Read-only array over these bytes, a copy where they are in several files."""
        walk = self._walk(phys, len_bytes)
        pieces = [memory.view(start, length) for start, length, memory, _, _ in walk]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, np.uint8)])

    def write(self, phys: int, data: bytes) -> None:
        """Change the guest's memory; it should be stopped."""
        done = 0
        for _, length, _, path, offset in self._walk(phys, len(data)):
            with open(path, "r+b", buffering=0) as file:
                os.pwrite(file.fileno(), data[done : done + length], offset)
            done += length

    def pages_with(self, magic: bytes) -> Iterator[int]:
        """Addresses of 4 KiB pages that begin with ``magic``."""
        for memory in {id(memory): memory for _, memory, _ in self._parts}.values():
            yield from memory.pages_with(magic)

    def _walk(
        self, phys: int, len_bytes: int
    ) -> Iterator[tuple[int, int, MappedMemory, Path, int]]:
        """``(phys, length, memory, file, offset)`` of each piece."""
        end = phys + len_bytes
        for segment, memory, path in self._parts:
            if segment.start <= phys < segment.end and phys < end:
                stop = min(end, segment.end)
                yield phys, stop - phys, memory, path, segment.offset + phys - segment.start
                phys = stop
        if phys < end:
            raise RamFault(phys, end - phys, "no memory of the guest")


class RecordingReader:
    """A reader that notes which 4 KiB pages were read: those that a handover reaches."""

    def __init__(self, inner: SearchableReader) -> None:
        self._inner = inner
        self.pfns: set[int] = set()

    def read(self, phys: int, len_bytes: int, /) -> bytes:
        """As :meth:`GuestRam.read`."""
        data = self._inner.read(phys, len_bytes)
        self._note(phys, len_bytes)
        return data

    def view(self, phys: int, len_bytes: int, /) -> U8:
        """As :meth:`GuestRam.view`."""
        data = self._inner.view(phys, len_bytes)
        self._note(phys, len_bytes)
        return data

    def pages_with(self, magic: bytes) -> Iterator[int]:
        """As :meth:`GuestRam.pages_with`; a search is not noted."""
        return self._inner.pages_with(magic)

    def _note(self, phys: int, len_bytes: int) -> None:
        if len_bytes:
            last = phys + len_bytes - 1
            self.pfns.update(range(phys >> _PAGE_SHIFT, (last >> _PAGE_SHIFT) + 1))
