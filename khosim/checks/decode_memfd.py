"""The checkers' reader of preserved memfds: their record, their folios, their content.

``struct memfd_luo_ser`` and the array of ``struct memfd_luo_folio_ser`` in a preserved vmalloc area
(``include/linux/kho/abi/memfd.h``, ``mm/memfd_luo.c:memfd_luo_preserve_folios`` @ 7.3), formats
memfd-v2 and memfd-v1. How large a folio is stands only in the preserved-memory map.

The kernel gives every page of a file a folio before it preserves it, so a hole is a problem; it
reads as zeros here as it would there. A file of memfd-v1 (6.19 and 7.0) has no seals.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING

import numpy as np

from khosim.checks.decode_vmalloc import VMALLOC_BYTES, Vmalloc, decode_vmalloc, read_vmalloc
from khosim.checks.preserved import block_orders
from khosim.errors import RamFault

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from khosim.checks.decode_walk import Walk
    from khosim.checks.preserved import I64, Preserved

    U64 = NDArray[np.uint64]

__all__ = ("MEMFD_RECORDS", "Memfd", "decode_memfd")

_RECORD_V1 = Struct("<QQQ")
_RECORD_V2 = Struct("<QQIIQ")
MEMFD_RECORDS = {"memfd-v1": _RECORD_V1, "memfd-v2": _RECORD_V2}
"""What stands before the ``struct kho_vmalloc``, by the handler's name."""

_ENTRY_BYTES = 16
_PFN_BITS = 52
_ALL_SEALS = 0x3F  # F_SEAL_SEAL to F_SEAL_EXEC: MEMFD_LUO_ALL_SEALS
_FOLIO_FLAGS = 0x3  # MEMFD_LUO_FOLIO_DIRTY, MEMFD_LUO_FOLIO_UPTODATE
_MAX_LFS_FILESIZE = (1 << 63) - 1
_MAX_HOLE_BYTES = 1 << 30
_HASH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Memfd:
    """One file. ``pos`` and ``size`` are in bytes, ``nr_folios`` is what the record says.

    ``pfn``, ``folio_flags`` and ``index`` (in pages) hold the entries that could be read, ``order``
    each folio's (0 where the map does not tell). ``sha256`` is None where the content was not
    asked for or cannot be told.
    """

    phys: int
    pos: int
    size: int
    seals: int
    flags: int
    nr_folios: int
    vmalloc: Vmalloc | None
    pfn: U64
    folio_flags: U64
    index: U64
    order: I64
    sha256: str | None


def decode_memfd(
    walk: Walk,
    phys: int,
    at: int,
    path: str,
    preserved: Preserved | None,
    *,
    content: bool,
    compatible: str = "memfd-v2",
) -> Memfd | None:
    """Decode the record at ``phys``, to which the pointer at ``at`` leads; None without one.

    ``compatible`` is the format, a key of :data:`MEMFD_RECORDS`.
    ``preserved`` is None where there is no map: folios then count as single pages.
    """
    page = walk.page(phys, path, at)
    if page is None:
        return None
    layout = MEMFD_RECORDS[compatible]
    seals = flags = 0
    if layout is _RECORD_V1:
        pos, size, nr_folios = layout.unpack_from(page)
    else:
        pos, size, seals, flags, nr_folios = layout.unpack_from(page)
    for name, offset, value, wrong, expected in (
        ("pos", 0, pos, pos > _MAX_LFS_FILESIZE, f"at most {_MAX_LFS_FILESIZE:#x}"),
        ("size", 8, size, size > _MAX_LFS_FILESIZE, f"at most {_MAX_LFS_FILESIZE:#x}"),
        ("seals", 16, seals, bool(seals & ~_ALL_SEALS), f"bits of {_ALL_SEALS:#x}"),
        ("flags", 20, flags, bool(flags), "0"),
    ):
        if wrong:
            walk.note(f"memfd-{name}", phys + offset, f"{value:#x}", f"{path}/{name}", expected)
    vmalloc = None
    raw = b""
    if nr_folios:
        record = page[layout.size : layout.size + VMALLOC_BYTES]
        vmalloc = decode_vmalloc(walk, record, phys + layout.size, f"{path}/folios")
        room = (len(vmalloc.areas) * walk.page_size << vmalloc.order) // _ENTRY_BYTES
        if vmalloc.sound and nr_folios > room:
            expected = f"at most {room}, for which the array has room"
            walk.note("memfd-folios", phys + 24, f"{nr_folios}", f"{path}/nr_folios", expected)
        wanted = min(nr_folios, room) * _ENTRY_BYTES
        raw = read_vmalloc(walk, vmalloc, wanted, f"{path}/folios")
    entries = np.frombuffer(raw[: len(raw) & -_ENTRY_BYTES], dtype="<u8").reshape(-1, 2)
    pfn = entries[:, 0] & np.uint64((1 << _PFN_BITS) - 1)
    folio_flags = entries[:, 0] >> np.uint64(_PFN_BITS)
    index = entries[:, 1]
    folios = _Folios(walk, phys, path, size, pfn, folio_flags, index, preserved)
    whole = folios.check() and len(pfn) == nr_folios
    digest = folios.sha256() if content and whole and nr_folios else None
    return Memfd(
        phys, pos, size, seals, flags, nr_folios, vmalloc,
        pfn, folio_flags, index, folios.order, digest,
    )  # fmt: skip


class _Folios:
    """The folios of one file, their checks and their content."""

    __slots__ = ("flags", "index", "order", "path", "pfn", "phys", "preserved", "size", "walk")

    def __init__(
        self,
        walk: Walk,
        phys: int,
        path: str,
        size: int,
        pfn: U64,
        flags: U64,
        index: U64,
        preserved: Preserved | None,
    ) -> None:
        self.walk = walk
        self.phys = phys
        self.path = path
        self.size = size
        self.pfn = pfn
        self.flags = flags
        self.index = index
        self.preserved = preserved
        self.order: I64 = np.zeros(len(pfn), dtype=np.int64)

    def note(self, code: str, number: int, found: str, expected: str) -> None:
        """Note a problem of entry ``number``."""
        path = f"{self.path}/folios[{number}]"
        self.walk.note(code, int(self.pfn[number]) * self.walk.page_size, found, path, expected)

    def check(self) -> bool:
        """Look at each entry; False where the content cannot be told."""
        strange = np.flatnonzero(self.flags & ~np.uint64(_FOLIO_FLAGS))
        for number in strange[:1].tolist():
            found = f"{int(self.flags[number]):#x}{_and_more(len(strange))}"
            self.note("memfd-folio-flags", number, found, f"bits of {_FOLIO_FLAGS:#x}")
        used = np.flatnonzero(self.pfn)
        pfns = self.pfn.astype(np.int64)
        if self.preserved is not None:
            orders = block_orders(self.preserved, pfns)
            lost = used[orders[used] < 0] if not self.preserved.problems else used[:0]
            for number in lost[:1].tolist():
                found = f"page {int(pfns[number]):#x}{_and_more(len(lost))}"
                self.note("memfd-not-preserved", number, found, "a page where a preserved block is")
            self.order = np.maximum(orders, 0)
        nr_pages = -(-self.size // self.walk.page_size)
        order, first = self.order[used], self.index[used]
        beyond = np.flatnonzero(first >= np.uint64(min(nr_pages, (1 << 64) - 1)))
        for at in beyond[:1].tolist():
            found = f"index {int(first[at])}{_and_more(len(beyond))}"
            self.note("memfd-index", int(used[at]), found, f"below {nr_pages}, the size in pages")
        if len(beyond):
            return False
        starts = first.astype(np.int64)
        ends = starts + (np.int64(1) << order)
        by_index = np.argsort(starts, kind="stable")
        twice = np.flatnonzero(starts[by_index][1:] < ends[by_index][:-1])
        for at in twice[:1].tolist():
            number = by_index[at + 1]
            found = f"index {int(starts[number])}{_and_more(len(twice))}"
            self.note("memfd-index", int(used[number]), found, "an index of its own")
        if len(twice):
            return False
        nr_found = int(np.minimum(ends, nr_pages).sum() - starts.sum()) if len(used) else 0
        if nr_found < nr_pages:
            phys, path = self.phys + 24, f"{self.path}/folios"
            found = f"{nr_found} pages, so holes"
            self.walk.note("memfd-hole", phys, found, path, f"folios for all {nr_pages} pages")
        size = np.int64(1) << order
        return self.walk.take_folios(pfns[used], pfns[used] + size, f"{self.path}/folios")

    def sha256(self) -> str | None:
        """The digest of the content up to the size; holes are zeros."""
        used = np.flatnonzero(self.pfn)
        by_index = used[np.argsort(self.index[used], kind="stable")]
        order = self.order[by_index]
        page_size = self.walk.page_size
        starts = self.index[by_index].astype(np.int64)
        pfns = self.pfn[by_index].astype(np.int64)
        ends = starts + (np.int64(1) << order)
        joins = (starts[1:] == ends[:-1]) & (pfns[1:] - starts[1:] == pfns[:-1] - starts[:-1])
        heads = np.concatenate(([0], np.flatnonzero(~joins) + 1)) if len(starts) else by_index
        tails = np.concatenate((heads[1:], [len(starts)])) - 1 if len(starts) else by_index
        digest = hashlib.sha256()
        done = 0
        for start, end, pfn in zip(
            starts[heads].tolist(), ends[tails].tolist(), pfns[heads].tolist(), strict=True
        ):
            if not self.zeros(digest, start * page_size - done):
                return None
            done = min(end * page_size, self.size)
            if not self.content(digest, pfn * page_size, done - start * page_size):
                return None
        return digest.hexdigest() if self.zeros(digest, self.size - done) else None

    def zeros(self, digest: hashlib._Hash, len_bytes: int) -> bool:
        """Digest a hole; False where it is larger than anyone would wait for."""
        if len_bytes > _MAX_HOLE_BYTES:
            return False
        while len_bytes > 0:
            size = min(len_bytes, _HASH_BYTES)
            digest.update(bytes(size))
            len_bytes -= size
        return True

    def content(self, digest: hashlib._Hash, phys: int, len_bytes: int) -> bool:
        """Digest memory; False, after a problem, where it is no RAM."""
        for low in range(0, len_bytes, _HASH_BYTES):
            size = min(len_bytes - low, _HASH_BYTES)
            try:
                digest.update(self.walk.reader.view(phys + low, size).data)
            except RamFault as fault:
                self.walk.note(
                    "memfd-content",
                    phys + low,
                    fault.cause,
                    f"{self.path}/folios",
                    "readable memory in every folio",
                )
                return False
        return True


def _and_more(count: int) -> str:
    return f", and {count - 1} more such" if count > 1 else ""
