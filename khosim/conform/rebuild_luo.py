"""Live-update state written once more from the facts in it, page by page.

The checkers' decoder says which sessions, files, records and chunks a handover holds and in which
pages; the layouts of :mod:`khosim.abi` put them into bytes again. Whole pages are compared: the
kernel zeroes each before it writes (``kho_alloc_preserve``, ``kho_block_set_clear``, ``vcalloc`` @
7.3), so what stands behind the last entry counts as well.

Left out: the page of FLBs, which captures do not keep, and files of other handlers than memfd's.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from khosim.abi.kho_block import KhoBlockHeaderSer, kho_block_capacity, pack_kho_block_header
from khosim.abi.kho_vmalloc import KhoVmalloc, kho_vmalloc_size, pack_kho_vmalloc_chunk
from khosim.abi.luo import (
    LUO_FILE_SER_BYTES,
    LUO_SESSION_SER_BYTES,
    LuoFileSer,
    LuoFileSetSer,
    LuoSer,
    LuoSessionSer,
    pack_luo_file_ser,
    pack_luo_ser,
    pack_luo_session_ser,
)
from khosim.abi.memfd import (
    MEMFD_LUO_FOLIO_SER_BYTES,
    MemfdLuoFolioSer,
    MemfdLuoSer,
    pack_memfd_luo_folio_ser,
    pack_memfd_luo_ser,
)
from khosim.checks.decode_luo import Luo, LuoSession
from khosim.checks.decode_memfd import Memfd
from khosim.checks.decode_vmalloc import Vmalloc
from khosim.checks.reader import Reader
from khosim.conform.rebuild_fdt import first_difference
from khosim.errors import RamFault

__all__ = ("Piece", "chunk_pieces", "compare_pieces", "luo_pieces")

Piece = tuple[str, int, bytes]
"""The kind of a page (``"session blocks"``), its physical address, the bytes it should hold."""


def compare_pieces(reader: Reader, pieces: list[Piece]) -> dict[str, tuple[int, int, list[str]]]:
    """Per kind: pages that are the same, pages, and differences in words."""
    found: dict[str, tuple[int, int, list[str]]] = {}
    for kind, phys, own in pieces:
        same, total, differences = found.get(kind, (0, 0, []))
        try:
            difference = first_difference(reader.read(phys, len(own)), own)
        except RamFault as fault:
            difference = fault.cause
        if difference:
            differences.append(f"{kind} at {phys:#x}: {difference}")
        found[kind] = (same + (not difference), total + 1, differences)
    return found


def luo_pieces(luo: Luo, blob_phys: int, page_size: int) -> list[Piece]:
    """All pages of ``luo``; ``blob_phys`` is where the subtree's blob lies."""
    return list(_Pieces(luo, page_size).all(blob_phys))


def chunk_pieces(
    pages: dict[str, int], path: str, area: Vmalloc, page_size: int
) -> Iterator[Piece]:
    """The chunk pages of a vmalloc area; ``pages`` maps paths to addresses."""
    per_chunk = kho_vmalloc_size(page_size)
    number = 0
    while (phys := pages.get(f"{path}/chunks[{number}]")) is not None:
        following = pages.get(f"{path}/chunks[{number + 1}]", 0)
        listed = area.areas[number * per_chunk : (number + 1) * per_chunk]
        yield "vmalloc chunks", phys, pack_kho_vmalloc_chunk(following, listed, page_size)
        number += 1


class _Pieces:
    """Puts the pages of one handover's live-update state together."""

    def __init__(self, luo: Luo, page_size: int) -> None:
        self.luo = luo
        self.page_size = page_size
        self.pages = {path: phys for phys, path in luo.pages.items()}

    def all(self, blob_phys: int) -> Iterator[Piece]:
        """Every page."""
        luo = self.luo
        header = LuoSer(
            luo.compatible or "", luo.liveupdate_num, luo.sessions_phys, luo.flbs_phys
        )
        yield "blob", blob_phys, self.padded(pack_luo_ser(header))
        yield from self.blocks(
            "session blocks",
            "/LUO/sessions",
            [self.session(number, session) for number, session in enumerate(luo.sessions)],
            LUO_SESSION_SER_BYTES,
        )
        for number, session in enumerate(luo.sessions):
            path = f"/LUO/sessions[{number}]/files"
            entries = [
                pack_luo_file_ser(LuoFileSer(file.compatible, file.data, file.token))
                for file in session.files
            ]
            yield from self.blocks("file blocks", path, entries, LUO_FILE_SER_BYTES)
            for index, file in enumerate(session.files):
                if file.memfd is not None:
                    yield from self.memfd(f"{path}[{index}]", file.memfd)

    def session(self, number: int, session: LuoSession) -> bytes:
        head = self.pages.get(f"/LUO/sessions[{number}]/files/blocks[0]", 0)
        files = LuoFileSetSer(head, session.nr_files)
        return pack_luo_session_ser(LuoSessionSer(session.name, files))

    def blocks(
        self, kind: str, path: str, entries: list[bytes], entry_bytes: int
    ) -> Iterator[Piece]:
        """The chain of blocks that holds ``entries``: all but the last one full."""
        capacity = kho_block_capacity(self.page_size, entry_bytes)
        number = 0
        while (phys := self.pages.get(f"{path}/blocks[{number}]")) is not None:
            following = self.pages.get(f"{path}/blocks[{number + 1}]", 0)
            some = entries[number * capacity : (number + 1) * capacity]
            header = pack_kho_block_header(KhoBlockHeaderSer(following, len(some)))
            yield kind, phys, self.padded(header + b"".join(some))
            number += 1

    def memfd(self, path: str, memfd: Memfd) -> Iterator[Piece]:
        """A file's record, the chunks that list its folio entries' pages, and those pages."""
        area = memfd.vmalloc
        chunks = f"{path}/folios"
        descriptor = KhoVmalloc(0, 0, 0, 0)
        if area is not None:
            first = self.pages.get(f"{chunks}/chunks[0]", 0)
            descriptor = KhoVmalloc(first, area.total_pages, area.flags, area.order)
        record = MemfdLuoSer(
            memfd.pos, memfd.size, memfd.seals, memfd.flags, memfd.nr_folios, descriptor
        )
        yield "memfd records", memfd.phys, self.padded(pack_memfd_luo_ser(record))
        if area is None:
            return
        yield from chunk_pieces(self.pages, chunks, area, self.page_size)
        entries = _entries(memfd)
        size = self.page_size << area.order
        for number, phys in enumerate(area.areas):
            some = entries[number * size : (number + 1) * size]
            yield "folio entries", phys, some.ljust(size, b"\0")

    def padded(self, data: bytes) -> bytes:
        """``data``, and zeros to the end of its page."""
        return data.ljust(self.page_size, b"\0")


def _entries(memfd: Memfd) -> bytes:
    columns = np.stack((memfd.pfn, memfd.folio_flags, memfd.index), axis=1)
    out = bytearray(len(columns) * MEMFD_LUO_FOLIO_SER_BYTES)
    at = 0
    for pfn, flags, index in columns.tolist():
        out[at : at + MEMFD_LUO_FOLIO_SER_BYTES] = pack_memfd_luo_folio_ser(
            MemfdLuoFolioSer(pfn, flags, index)
        )
        at += MEMFD_LUO_FOLIO_SER_BYTES
    return bytes(out)
