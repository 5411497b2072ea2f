"""What the decoders of linked structures share: memory, a log, and whose page is whose.

Handed-over structures are pages that point to pages. A :class:`Walk` hands out each page once: a
second pointer to it is a cycle, or two owners of one page, and either way a problem. That bounds
every decoder that follows pointers by the pages there are.

Models nothing of the kernel, which checks only block lists for cycles
(``kernel/liveupdate/kho_block.c:kho_block_set_is_cyclic`` @ 7.3) and trusts the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from khosim.errors import RamFault

if TYPE_CHECKING:
    from khosim.checks.preserved import I64
    from khosim.checks.reader import ProblemLog, Reader

__all__ = ("Walk", "as_text")


def as_text(raw: bytes) -> str:
    """Bytes as text that any of them survives."""
    return raw.decode("ascii", "backslashreplace")


class Walk:
    """One pass over the structures of one handover.

    ``pages`` maps the address of each page taken so far to the path of what it holds. Folios are
    taken in bulk with :meth:`take_folios`.
    """

    __slots__ = ("_ends", "_starts", "log", "page_size", "pages", "reader")

    def __init__(self, reader: Reader, page_size: int, log: ProblemLog) -> None:
        self.reader = reader
        self.page_size = page_size
        self.log = log
        self.pages: dict[int, str] = {}
        self._starts: I64 = np.empty(0, dtype=np.int64)
        self._ends: I64 = np.empty(0, dtype=np.int64)

    def note(self, code: str, phys: int, found: str, path: str, expected: str) -> None:
        """Note a problem."""
        self.log.add(code, phys, found, path, expected)

    def take(self, phys: int, path: str, at: int, *, order: int = 0) -> bool:
        """Take the page at ``phys`` (``1 << order`` pages) for ``path``; False after a problem.

        ``at`` is where the pointer to it stands.
        """
        size = self.page_size << order
        if phys & (size - 1) or phys == 0:
            wanted = f"the address of a page, a multiple of {size:#x}"
            self.note("luo-pointer", at, f"{phys:#x}", path, wanted)
            return False
        owner = self.pages.get(phys)
        if owner is not None:
            found = f"{phys:#x}, which is also {owner}"
            self.note("luo-shared", at, found, path, "a page of its own")
            return False
        self.pages[phys] = path
        return True

    def page(self, phys: int, path: str, at: int) -> bytes | None:
        """The bytes of the page at ``phys``, taken for ``path``; None after a problem."""
        if not self.take(phys, path, at):
            return None
        data = self.read(phys, self.page_size, path, at)
        if data is None:
            del self.pages[phys]
        return data

    def read(self, phys: int, len_bytes: int, path: str, at: int) -> bytes | None:
        """The bytes at ``[phys, phys + len_bytes)``; None after a problem."""
        try:
            return self.reader.read(phys, len_bytes)
        except RamFault as fault:
            found = f"{phys:#x} ({fault.cause})"
            self.note("luo-unreadable", at, found, path, "the address of readable memory")
            return None

    def take_folios(self, starts: I64, ends: I64, path: str) -> bool:
        """Take page frame ranges for a file; False, after a problem, where any has an owner."""
        by_start = np.argsort(starts, kind="stable")
        starts, ends = starts[by_start], ends[by_start]
        twice = np.flatnonzero(starts[1:] < ends[:-1])
        if len(twice):
            self._shared(int(starts[twice[0] + 1]), path, "another folio of this file")
            return False
        if len(self._starts):
            at = np.searchsorted(self._starts, ends, side="left") - 1
            hit = np.flatnonzero((at >= 0) & (self._ends[np.maximum(at, 0)] > starts))
            if len(hit):
                self._shared(int(starts[hit[0]]), path, "a folio of another file")
                return False
        self._starts = np.concatenate((self._starts, starts))
        self._ends = np.concatenate((self._ends, ends))
        by_start = np.argsort(self._starts, kind="stable")
        self._starts, self._ends = self._starts[by_start], self._ends[by_start]
        return True

    def _shared(self, pfn: int, path: str, owner: str) -> None:
        phys = pfn * self.page_size
        found = f"the page at {phys:#x}, which is also in {owner}"
        self.note("luo-shared", phys, found, path, "pages of its own")
