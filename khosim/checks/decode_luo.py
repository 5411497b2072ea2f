"""The checkers' reader of what the Live Update Orchestrator hands over, luo-v5 and luo-v1.

``struct luo_ser`` is the blob of the subtree "LUO"; it points to the blocks that hold sessions,
these to blocks of files, and beside them lies one page of FLBs, objects that live as long as files
need them (``include/linux/kho/abi/luo.h``; ``kernel/liveupdate/luo_{core,session,file,flb}.c`` @
7.2 and 7.3). What a file's ``data`` means is its handler's business: memfds are read, others named.

What luo-v1 of 6.19 to 7.1 has instead of blocks is in ``decode_luo_v1``.

Never raises on what memory holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

from khosim.checks.decode_block import decode_blocks
from khosim.checks.decode_luo_v1 import FILE_PAGES, SESSION_PAGES, decode_array, parse_luo_v1
from khosim.checks.decode_memfd import MEMFD_RECORDS, Memfd, decode_memfd
from khosim.checks.decode_walk import Walk, as_text
from khosim.checks.preserved import covers
from khosim.checks.reader import ProblemLog
from khosim.errors import RamFault

if TYPE_CHECKING:
    from khosim.checks.decode_root import Region
    from khosim.checks.preserved import Preserved
    from khosim.checks.reader import Problem, Reader

__all__ = (
    "LUO_BYTES",
    "Luo",
    "LuoFile",
    "LuoFlb",
    "LuoSession",
    "decode_luo",
    "luo_json",
    "parse_luo_header",
)

_HEADER = Struct("<8sQQQ")
LUO_BYTES = _HEADER.size
_COMPATIBLE = b"luo-v5"
_COMPATIBLE_V1 = "luo-v1"
_SESSION = Struct("<64sQQ")
_FILE = Struct("<48sQQ")
_FLB_HEADER = Struct("<QQ")
_FLB = Struct("<48sQQ")
_FLB_PAGES = 1
_FDT_MAGIC = b"\xd0\x0d\xfe\xed"


class LuoFile(NamedTuple):
    """One preserved file: its handler's name, its token, what its handler keeps in ``data``.

    ``memfd`` is None where the handler is another, or the record cannot be read.
    """

    compatible: str
    data: int
    token: int
    memfd: Memfd | None


class LuoSession(NamedTuple):
    """One session and the files that could be read of the ``nr_files`` it says it has."""

    name: str
    nr_files: int
    files: list[LuoFile]


class LuoFlb(NamedTuple):
    """One object bound to files: its handler's name and data, and how many files need it."""

    name: str
    data: int
    nr_files: int


@dataclass(frozen=True, slots=True, eq=False)
class Luo:
    """All that LUO handed over. ``pages`` maps each page it lies in to the path of its content.

    Contents of files are not among these. ``flbs`` is None where their page is not in the image,
    though the map says that it was in memory, or all zero, as in the hole of a sparse file.
    """

    compatible: str | None
    liveupdate_num: int
    sessions_phys: int
    flbs_phys: int
    sessions: list[LuoSession]
    flbs: list[LuoFlb] | None
    pages: dict[int, str]
    problems: tuple[Problem, ...]


def parse_luo_header(
    data: bytes, phys: int, log: ProblemLog, path: str = "/LUO"
) -> tuple[str, int, int, int] | None:
    """``compatible``, ``liveupdate_num``, ``sessions_pa`` and ``flbs_pa`` of a blob, or None."""
    if data.startswith(_FDT_MAGIC):
        return parse_luo_v1(data, phys, log, path)
    if len(data) < LUO_BYTES:
        log.add("luo-size", phys, f"{len(data)} bytes", path, f"at least {LUO_BYTES} bytes")
        return None
    raw, number, sessions, flbs = _HEADER.unpack_from(data)
    compatible = raw.partition(b"\0")[0]
    if compatible != _COMPATIBLE:
        log.add("luo-compatible", phys, repr(as_text(compatible)), f"{path}/compatible", "'luo-v5'")
    return as_text(compatible), number, sessions, flbs


def decode_luo(
    reader: Reader,
    blob: Region,
    page_size: int,
    preserved: Preserved | None,
    *,
    content: bool = True,
    path: str = "/LUO",
) -> Luo:
    """Decode the subtree's blob and all it leads to.

    ``preserved`` tells how large folios are; None where there is no map to tell. Without
    ``content`` no file is digested. An image need not have the page of FLBs, which captures leave
    out.
    """
    log = ProblemLog()
    walk = Walk(reader, page_size, log)
    data = walk.read(blob.start, min(blob.size, page_size), path, blob.start)
    header = None if data is None else parse_luo_header(data, blob.start, log, path)
    if header is None:
        return Luo(None, 0, 0, 0, [], [], {}, log.done())
    compatible, number, sessions_phys, flbs_phys = header
    sessions: list[LuoSession] = []
    flbs: list[LuoFlb] | None = []
    walk.pages[blob.start & -page_size] = path
    is_v1 = compatible == _COMPATIBLE_V1
    if is_v1 or compatible.encode() == _COMPATIBLE:
        decoder = _Decoder(walk, preserved, content, is_v1=is_v1)
        sessions = decoder.sessions(sessions_phys, f"{path}/sessions", blob.start + 16)
        flbs = None
        if not _is_left_out(reader, flbs_phys, page_size, preserved):
            flbs = decoder.flbs(flbs_phys, f"{path}/flbs", blob.start + 24)
    return Luo(compatible, number, sessions_phys, flbs_phys, sessions, flbs, walk.pages, log.done())


def luo_json(luo: Luo) -> dict[str, Any]:
    """The decoded state as plain values; ``flbs`` stands there only where there are any."""
    said: dict[str, Any] = {
        "compatible": luo.compatible,
        "liveupdate_num": luo.liveupdate_num,
        "sessions": [
            {"name": session.name, "files": [_file_json(file) for file in session.files]}
            for session in luo.sessions
        ],
    }
    if luo.flbs:
        said["flbs"] = [
            {"name": flb.name, "data": flb.data, "count": flb.nr_files} for flb in luo.flbs
        ]
    return said


def _file_json(file: LuoFile) -> dict[str, Any]:
    said: dict[str, Any] = {
        "compatible": file.compatible,
        "data": file.data,
        "token": file.token,
    }
    memfd = file.memfd
    if memfd is None:
        return said
    columns = (memfd.pfn.tolist(), memfd.folio_flags.tolist(), memfd.index.tolist())
    said.update(
        pos=memfd.pos,
        size=memfd.size,
        seals=memfd.seals,
        flags=memfd.flags,
        nr_folios=memfd.nr_folios,
        folios=[list(entry) for entry in zip(*columns, strict=True)],
    )
    if memfd.nr_folios:
        said["sha256"] = memfd.sha256
    return said


class _Decoder:
    """Reads sessions, files and FLBs with one walk."""

    __slots__ = ("content", "is_v1", "preserved", "walk")

    def __init__(
        self, walk: Walk, preserved: Preserved | None, content: bool, *, is_v1: bool
    ) -> None:
        self.is_v1 = is_v1
        self.walk = walk
        self.preserved = preserved
        self.content = content

    def sessions(self, head: int, path: str, at: int) -> list[LuoSession]:
        """The sessions of the block list, or the array, at ``head``."""
        found: list[LuoSession] = []
        names: set[str] = set()
        walk, size = self.walk, _SESSION.size
        if self.is_v1:
            entries = decode_array(walk, head, SESSION_PAGES, size, None, path, at) if head else []
        else:
            entries = decode_blocks(walk, head, size, path, at)
        for phys, raw in entries:
            where = f"{path}[{len(found)}]"
            raw_name, files, count = _SESSION.unpack(raw)
            name = self.name(raw_name, phys, f"{where}/name")
            if name in names:
                expected = "a name that no other session has"
                self.walk.note("luo-session-name", phys, repr(name), f"{where}/name", expected)
            names.add(name)
            found.append(LuoSession(name, count, self.files(files, count, where, phys + 64)))
        return found

    def files(self, head: int, count: int, path: str, at: int) -> list[LuoFile]:
        """The files of a session, of which there should be ``count``."""
        found: list[LuoFile] = []
        tokens: set[int] = set()
        where = f"{path}/files"
        walk, size = self.walk, _FILE.size
        if self.is_v1:
            entries = decode_array(walk, head, FILE_PAGES, size, count, where, at) if head else []
        else:
            entries = decode_blocks(walk, head, size, where, at)
        for phys, raw in entries:
            place = f"{where}[{len(found)}]"
            raw_name, data, token = _FILE.unpack(raw)
            handler = self.name(raw_name, phys, f"{place}/compatible")
            if token in tokens:
                expected = "a token that no other file of the session has"
                self.walk.note("luo-token", phys + 56, f"{token:#x}", f"{place}/token", expected)
            tokens.add(token)
            memfd = None
            if handler in MEMFD_RECORDS:
                memfd = decode_memfd(
                    self.walk,
                    data,
                    phys + 48,
                    place,
                    self.preserved,
                    content=self.content,
                    compatible=handler,
                )
            found.append(LuoFile(handler, data, token, memfd))
        if len(found) != count:
            cause = f"{len(found)} in its blocks" if head else "no blocks"
            self.walk.note("luo-count", at + 8, cause, where, f"{count} files")
        return found

    def flbs(self, phys: int, path: str, at: int) -> list[LuoFlb] | None:
        """The FLBs of the page at ``phys``; none where that is 0, None where the page is blank."""
        page = self.walk.page(phys, path, at) if phys else None
        if page is None:
            return []
        if not any(page):  # the kernel that takes over reads it as no FLBs, too
            return None
        nr_pages, count = _FLB_HEADER.unpack_from(page)
        if nr_pages != _FLB_PAGES:
            self.walk.note("luo-flb", phys, f"{nr_pages}", f"{path}/pgcnt", f"{_FLB_PAGES}")
        room = (self.walk.page_size - _FLB_HEADER.size) // _FLB.size
        if count > room:
            self.walk.note("luo-flb", phys + 8, f"{count}", f"{path}/count", f"at most {room}")
            count = 0
        found: list[LuoFlb] = []
        for number in range(count):
            entry = _FLB_HEADER.size + number * _FLB.size
            raw_name, data, files = _FLB.unpack_from(page, entry)
            name = self.name(raw_name, phys + entry, f"{path}[{number}]/name")
            found.append(LuoFlb(name, data, files))
        return found

    def name(self, raw: bytes, phys: int, path: str) -> str:
        """A NUL-terminated string that is not empty."""
        text, nul, _ = raw.partition(b"\0")
        if not (text and nul):
            expected = f"1 to {len(raw) - 1} characters and a NUL"
            self.walk.note("luo-name", phys, repr(as_text(text)), path, expected)
        return as_text(text)


def _is_left_out(reader: Reader, phys: int, page_size: int, preserved: Preserved | None) -> bool:
    """Whether a preserved page is not in the image."""
    if phys % page_size or phys == 0:
        return False
    try:
        reader.read(phys, page_size)
    except RamFault:
        return preserved is None or bool(covers(preserved, [phys // page_size]).all())
    return False
