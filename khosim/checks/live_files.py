"""What is remembered of each file that LUO carries, from the jump until it is retrieved.

A memfd has to come back with its size, position, seals, accounting and folios, and with its bytes.
What it was is read off the old kernel's open file when that kernel is frozen, not off the record
that it wrote for its successor: a record that leaves something out is what has to be noticed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from khosim.checks.keepsake import Keepsake
from khosim.checks.ranges import merged

if TYPE_CHECKING:
    from collections.abc import Iterator

    from khosim.checks.kernel_view import KernelView, LuoFileView, MemfdView
    from khosim.checks.ranges import Ranges
    from khosim.machine.hardware import Hardware

__all__ = ("LiveMemfd", "attributes_of", "is_memfd", "live_memfds", "outgoing_files", "pieces_of")


_F_SEAL_SEAL = 1


class LiveMemfd(NamedTuple):
    """A memfd as it was: ``attributes`` by name, ``pieces`` as :func:`pieces_of` gives them."""

    attributes: dict[str, int]
    pieces: list[tuple[int, int, int, bool]]
    pages: Ranges
    kept: Keepsake


def outgoing_files(kernel: KernelView) -> Iterator[tuple[str, LuoFileView]]:
    """Every file of every session for the successor, with its session's name."""
    for session in kernel.liveupdate.sessions.outgoing.sessions.values():
        for luo_file in session.file_set.files:
            yield session.name, luo_file


def is_memfd(luo_file: LuoFileView) -> bool:
    """Whether a file is a memfd, of any version of the format."""
    return luo_file.handler.compatible.startswith("memfd-")


def attributes_of(file: MemfdView, compatible: str) -> dict[str, int]:
    """What user space can ask of a memfd without reading it.

    A file of memfd-v1 (6.19 and 7.0) may always come back as one that takes no more seals: that
    format has no place for them. A seal that was set is asked for all the same.
    """
    inode = file.inode
    unasked = _F_SEAL_SEAL if compatible == "memfd-v1" else 0
    return {
        "size": inode.i_size,
        "position": file.f_pos,
        "seals": inode.seals & ~unasked,
        "blocks": inode.i_blocks,
    }


def pieces_of(file: MemfdView, page_size: int) -> list[tuple[int, int, int, bool]]:
    """The folios below the file's size, as ``(page, pfn, pages, readable)`` as long as they go on.

    ``readable`` is False where the folio is not up to date: whoever reads it gets zeros.
    """
    nr_pages = -(-file.inode.i_size // page_size)
    pieces: list[tuple[int, int, int, bool]] = []
    for run in file.inode.mapping:
        count = min(run.end, nr_pages) - run.index
        if count <= 0:
            break
        if pieces:
            index, pfn, known, readable = pieces[-1]
            if (index + known, pfn + known, readable) == (run.index, run.pfn, run.uptodate):
                pieces[-1] = (index, pfn, known + count, readable)
                continue
        pieces.append((run.index, run.pfn, count, run.uptodate))
    return pieces


def live_memfds(hardware: Hardware, kernel: KernelView) -> dict[int, LiveMemfd]:
    """The memfds in the sessions of a frozen kernel, by the address of their record."""
    found: dict[int, LiveMemfd] = {}
    if not kernel.liveupdate.enabled:
        return found
    for _, luo_file in outgoing_files(kernel):
        if luo_file.file is None or not is_memfd(luo_file):
            continue
        file: MemfdView = luo_file.file
        kind = luo_file.handler.compatible
        pieces = pieces_of(file, hardware.page_size)
        columns = np.array([piece[1:3] for piece in pieces], dtype=np.int64).reshape(-1, 2)
        pages = merged((columns[:, 0], columns[:, 0] + columns[:, 1]))
        kept = Keepsake(hardware.ram, pages, hardware.page_size)
        found[luo_file.serialized_data] = LiveMemfd(attributes_of(file, kind), pieces, pages, kept)
    return found
