"""The checkers' reader of LUO's state: against real kernels, and against what none would write."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khosim.checks.decode import decode_handover
from khosim.checks.decode_luo import Luo, decode_luo, luo_json
from khosim.checks.decode_root import Region
from khosim.checks.preserved import Preserved
from khosim.checks.reader import PageImage

CAPTURES = Path(__file__).parent / "golden" / "captures"
NAMES = ("uma1g", "numa4g", "fixed2g", "uma1g-7.2", "arm64-16k")
CASES = [(name, generation) for name in NAMES for generation in ("gen0", "gen1")]


@cache
def golden(name: str, generation: str) -> tuple[dict[int, bytes], int, dict[str, Any]]:
    """Pages of RAM, page size, and what an independent program decoded from them."""
    folder = CAPTURES / name / generation
    page_size = json.loads((CAPTURES / name / "capture.json").read_text())["page_size"]
    with np.load(folder / "ram.npz") as ram:
        pages = dict(zip(ram["pfn"].tolist(), map(bytes, ram["data"]), strict=True))
    return pages, page_size, json.loads((folder / "handover.json").read_text())


@pytest.mark.parametrize(("name", "generation"), CASES, ids=map("-".join, CASES))
def test_what_real_kernels_left_is_read_whole(name: str, generation: str) -> None:
    """Sessions, files, folios and digests are those that an independent program found."""
    pages, page_size, known = golden(name, generation)
    ram = PageImage(pages, page_size)
    handover = decode_handover(ram, known["fdt_phys"], page_size)
    luo = decode_luo(ram, handover.subtrees["LUO"], page_size, handover.preserved)
    assert luo.problems == ()
    assert luo.flbs is None  # their page is not in the capture
    assert luo_json(luo) == known["luo"]


class Builder:
    """Memory in which a test writes what a kernel would have written, page by page."""

    def __init__(self, page_size: int = 4096) -> None:
        self.page_size = page_size
        self.pages: dict[int, bytearray] = {}
        self.next_pfn = 0x100
        self.blocks: list[tuple[int, int]] = []  # preserved, as (pfn, order)

    def page(self, data: bytes = b"", order: int = 0) -> int:
        """A new page (or ``1 << order`` of them) that holds ``data``; its address."""
        size = 1 << order
        pfn = (self.next_pfn + size - 1) & -size
        self.next_pfn = pfn + size
        padded = data.ljust(size * self.page_size, b"\0")
        for number in range(size):
            at = number * self.page_size
            self.pages[pfn + number] = bytearray(padded[at : at + self.page_size])
        self.blocks.append((pfn, order))
        return pfn * self.page_size

    def poke(self, phys: int, data: bytes) -> None:
        """Overwrite bytes within one page."""
        pfn, offset = divmod(phys, self.page_size)
        self.pages[pfn][offset : offset + len(data)] = data

    def chain(self, entries: list[bytes], room: int) -> int:
        """Blocks of ``room`` entries each, linked; the first one's address or 0."""
        following = 0
        for start in range((len(entries) - 1) // room * room, -1, -room) if entries else ():
            part = entries[start : start + room]
            following = self.page(struct.pack("<QQ", following, len(part)) + b"".join(part))
        return following

    def vmalloc(self, data: bytes, order: int = 0, flags: int = 1) -> bytes:
        """A preserved vmalloc area that holds ``data``."""
        piece = self.page_size << order
        areas = [
            self.page(data[at : at + piece], order) for at in range(0, max(len(data), 1), piece)
        ]
        room = self.page_size // 8 - 1
        parts = [areas[at : at + room] for at in range(0, len(areas), room)]
        if len(parts[-1]) == room:
            parts.append([])
        following = 0
        for part in reversed(parts):
            following = self.page(struct.pack(f"<{len(part) + 1}Q", following, *part))
        return struct.pack("<QIHH", following, len(areas) << order, flags, order)

    def memfd(
        self,
        folios: list[tuple[int, int, int]],
        size: int,
        *,
        pos: int = 0,
        seals: int = 0,
        flags: int = 0,
        order: int = 0,
    ) -> bytes:
        """The entry of a file with folios (address, flags, index)."""
        raw = b"".join(
            struct.pack("<QQ", phys // self.page_size | bits << 52, index)
            for phys, bits, index in folios
        )
        area = self.vmalloc(raw, order) if folios else bytes(16)
        record = struct.pack("<QQIIQ", pos, size, seals, flags, len(folios)) + area
        return struct.pack("<48sQ", b"memfd-v2", self.page(record))

    def luo(self, sessions: list[tuple[bytes, list[bytes]]], flbs: int = 0) -> Region:
        """The blob: sessions with their files, each an entry without its token."""
        entries = []
        for name, files in sessions:
            numbered = [file + struct.pack("<Q", token) for token, file in enumerate(files)]
            head = self.chain(numbered, (self.page_size - 16) // 64)
            entries.append(struct.pack("<64sQQ", name, head, len(files)))
        head = self.chain(entries, (self.page_size - 16) // 80)
        return Region(self.page(struct.pack("<8sQQQ", b"luo-v5", 3, head, flbs)), 32)

    def preserved(self) -> Preserved:
        """A map that holds every page made so far."""
        blocks = sorted(self.blocks, key=lambda block: (-block[1], block[0]))
        pfn, order = (np.array(column, dtype=np.int64) for column in zip(*blocks, strict=True))
        return Preserved(self.page_size, order, pfn, np.ones_like(pfn), (), ())

    def decode(self, blob: Region, **options: Any) -> Luo:
        """What the decoder makes of it."""
        ram = PageImage(self.pages, self.page_size)
        return decode_luo(ram, blob, self.page_size, self.preserved(), **options)


def codes(luo: Luo) -> list[str]:
    """The kinds of the problems, in order."""
    return [problem.code for problem in luo.problems]


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_many_sessions_and_files_go_on_in_further_blocks(page_size: int) -> None:
    """Lists longer than a block are read to the end, in order."""
    ram = Builder(page_size)
    many = page_size // 64 + 5
    files = [struct.pack("<48sQ", b"device-v1", number) for number in range(many)]
    blob = ram.luo([(b"big", files)] + [(b"s%d" % n, []) for n in range(page_size // 80 + 2)])
    luo = ram.decode(blob)
    assert luo.problems == ()
    assert [file.data for file in luo.sessions[0].files] == list(range(many))
    assert [s.name for s in luo.sessions[1:]] == [f"s{n}" for n in range(page_size // 80 + 2)]
    assert luo.sessions[0].files[3].memfd is None
    assert luo_json(luo)["sessions"][0]["files"][3] == {
        "compatible": "device-v1",
        "data": 3,
        "token": 3,
    }


def test_a_file_in_large_folios_is_digested_in_order() -> None:
    """Sizes of folios come from the map; the last one reaches beyond the size."""
    ram = Builder()
    rng = random.Random(1)
    content = rng.randbytes(11 * 4096 + 100)
    folios = []
    for index, order in ((8, 2), (0, 3)):  # not in the order of the file
        folios.append((ram.page(content[index * 4096 : (index + (1 << order)) * 4096], order), 3))
    entry = ram.memfd([(*folios[0], 8), (*folios[1], 0)], len(content), pos=77, seals=0x3F)
    luo = ram.decode(ram.luo([(b"vm", [entry])]))
    memfd = luo.sessions[0].files[0].memfd
    assert luo.problems == ()
    assert memfd is not None
    assert memfd.sha256 == hashlib.sha256(content).hexdigest()
    assert (memfd.pos, memfd.size, memfd.seals) == (77, len(content), 0x3F)
    assert memfd.order.tolist() == [2, 3]
    unread = ram.decode(ram.luo([(b"vm", [entry])]), content=False).sessions[0].files[0].memfd
    assert unread is not None
    assert unread.sha256 is None


def test_a_long_list_of_folios_takes_several_chunks() -> None:
    """One more chunk follows a full one; here it is not empty."""
    ram = Builder()
    content = [bytes([n]) * 4096 for n in range(251)]
    folios = [(ram.page(data), 3, n) for n, data in enumerate(content)]
    folios += [(0, 0, 0)] * (256 * 512 - 251)
    luo = ram.decode(ram.luo([(b"vm", [ram.memfd(folios, 251 * 4096)])]))
    memfd = luo.sessions[0].files[0].memfd
    assert luo.problems == ()
    assert memfd is not None
    assert len(memfd.pfn) == memfd.nr_folios == 256 * 512
    assert memfd.sha256 == hashlib.sha256(b"".join(content)).hexdigest()


def test_an_array_in_huge_mappings_is_read() -> None:
    """Areas of 1 << order pages each, as a huge vmalloc mapping has them."""
    ram = Builder()
    pages = [ram.page(bytes([n])) for n in range(3)]
    entry = ram.memfd([(phys, 3, n) for n, phys in enumerate(pages)], 3 * 4096, order=2)
    luo = ram.decode(ram.luo([(b"vm", [entry])]))
    memfd = luo.sessions[0].files[0].memfd
    assert luo.problems == ()
    assert memfd is not None
    assert memfd.vmalloc is not None
    assert (memfd.vmalloc.total_pages, memfd.vmalloc.order) == (4, 2)
    assert memfd.pfn.tolist() == [phys // 4096 for phys in pages]


def test_objects_bound_to_files_are_read() -> None:
    """FLBs with their counts; a page without any is fine, a blank one says nothing."""
    ram = Builder()
    entries = struct.pack("<48sQQ", b"iommu-v1", 7, 2) + struct.pack("<48sQQ", b"pci-v1", 9, 1)
    page = ram.page(struct.pack("<QQ", 1, 2) + entries)
    luo = ram.decode(ram.luo([], page))
    assert luo.problems == ()
    assert luo_json(luo) == {
        "compatible": "luo-v5",
        "liveupdate_num": 3,
        "sessions": [],
        "flbs": [
            {"name": "iommu-v1", "data": 7, "count": 2},
            {"name": "pci-v1", "data": 9, "count": 1},
        ],
    }
    assert ram.decode(ram.luo([], ram.page(struct.pack("<QQ", 1, 0)))).flbs == []
    assert ram.decode(ram.luo([], ram.page())).flbs is None
    assert ram.decode(ram.luo([], 0)).flbs == []
    for header, count in ((struct.pack("<QQ", 2, 0), 0), (struct.pack("<QQ", 1, 64), 0)):
        luo = ram.decode(ram.luo([], ram.page(header)))
        assert codes(luo) == ["luo-flb"]
        assert len(luo.flbs or ()) == count
    missing = ram.decode(ram.luo([], 0x7FFF0000))
    assert codes(missing) == ["luo-unreadable"]
    assert codes(ram.decode(ram.luo([], page + 8))) == ["luo-pointer"]
    del ram.pages[page // 4096]  # preserved, but not in the image
    left_out = ram.decode(ram.luo([], page))
    assert (left_out.flbs, left_out.problems) == (None, ())


def two_files() -> tuple[Builder, Region]:
    """Two sessions, the first with two files of two pages, the second empty."""
    ram = Builder()
    entries = []
    for fill in (1, 2):
        pages = [ram.page(bytes([fill, n]) * 2048) for n in range(2)]
        entries.append(ram.memfd([(phys, 3, n) for n, phys in enumerate(pages)], 8192))
    return ram, ram.luo([(b"vm-a", entries), (b"vm-b", [])])


def word(ram: Builder, phys: int) -> int:
    """The 64-bit number at an address."""
    pfn, offset = divmod(phys, ram.page_size)
    return int.from_bytes(ram.pages[pfn][offset : offset + 8], "little")


SESSIONS = 16  # offset in the blob of the pointer to the sessions
Spoil = Callable[[Builder, int, int, int], None]


def _set(base: str, offset: int, value: int, len_bytes: int = 8) -> Spoil:
    def spoil(ram: Builder, sessions: int, files: int, record: int) -> None:
        at = {"sessions": sessions, "files": files, "record": record}[base] + offset
        ram.poke(at, value.to_bytes(len_bytes, "little"))

    return spoil


def _cycle(ram: Builder, sessions: int, files: int, record: int) -> None:
    ram.poke(sessions, sessions.to_bytes(8, "little"))


def _swap_record(ram: Builder, sessions: int, files: int, record: int) -> None:
    ram.poke(files + 16 + 64 + 48, record.to_bytes(8, "little"))


def _array(ram: Builder, record: int) -> int:
    return word(ram, word(ram, record + 32) + 8)


def _same_folio(ram: Builder, sessions: int, files: int, record: int) -> None:
    array = _array(ram, record)
    ram.poke(array + 16, word(ram, array).to_bytes(8, "little"))


def _same_index(ram: Builder, sessions: int, files: int, record: int) -> None:
    ram.poke(_array(ram, record) + 24, bytes(8))


def _far_index(ram: Builder, sessions: int, files: int, record: int) -> None:
    ram.poke(_array(ram, record) + 24, b"\xff" * 8)


def _folio_flags(ram: Builder, sessions: int, files: int, record: int) -> None:
    ram.poke(_array(ram, record) + 7, b"\x80")


def _other_files_folio(ram: Builder, sessions: int, files: int, record: int) -> None:
    other = _array(ram, word(ram, files + 16 + 64 + 48))
    ram.poke(other, word(ram, _array(ram, record)).to_bytes(8, "little"))


def _unpreserved_folio(ram: Builder, sessions: int, files: int, record: int) -> None:
    pfn = word(ram, _array(ram, record)) & (1 << 52) - 1
    ram.blocks.remove((pfn, 0))


def _zero_folio(ram: Builder, sessions: int, files: int, record: int) -> None:
    ram.poke(_array(ram, record), bytes(16))


def _area_cycle(ram: Builder, sessions: int, files: int, record: int) -> None:
    chunk = word(ram, record + 32)
    ram.poke(chunk + 8, chunk.to_bytes(8, "little"))


def _short_chunk(ram: Builder, sessions: int, files: int, record: int) -> None:
    ram.poke(word(ram, record + 32), word(ram, files + 16 + 64 + 48).to_bytes(8, "little"))


def _no_room(ram: Builder, sessions: int, files: int, record: int) -> None:
    ram.poke(record + 24, (300).to_bytes(8, "little"))


FIRST = "/LUO/sessions[0]/files[0]"


@pytest.mark.parametrize(
    ("spoil", "code", "path"),
    [
        (_set("sessions", 8, 0), "block-count", "/LUO/sessions/blocks[0]/count"),
        (_set("sessions", 8, 52), "block-count", "/LUO/sessions/blocks[0]/count"),
        (_set("files", 8, 64), "block-count", "/LUO/sessions[0]/files/blocks[0]/count"),
        (_set("sessions", 0, 0x123), "luo-pointer", "/LUO/sessions/blocks[1]"),
        (_set("sessions", 0, 0x7FFFF000), "luo-unreadable", "/LUO/sessions/blocks[1]"),
        (_cycle, "luo-shared", "/LUO/sessions/blocks[1]"),
        (_set("sessions", 16 + 72, 3), "luo-count", "/LUO/sessions[0]/files"),
        (_set("sessions", 16 + 64, 0), "luo-count", "/LUO/sessions[0]/files"),
        (_set("sessions", 16 + 80 + 72, 1), "luo-count", "/LUO/sessions[1]/files"),
        (_set("sessions", 16 + 80 + 3, ord("a"), 1), "luo-session-name", "/LUO/sessions[1]/name"),
        (_set("sessions", 16, 0, 1), "luo-name", "/LUO/sessions[0]/name"),
        (_set("files", 16, (1 << 384) - 1, 48), "luo-name", f"{FIRST}/compatible"),
        (_set("files", 16 + 56, 1), "luo-token", "/LUO/sessions[0]/files[1]/token"),
        (_set("files", 16 + 48, 0), "luo-pointer", FIRST),
        (_set("files", 16 + 48, 0x7FFFF000), "luo-unreadable", FIRST),
        (_swap_record, "luo-shared", "/LUO/sessions[0]/files[1]"),
        (_set("record", 0, 1 << 63), "memfd-pos", f"{FIRST}/pos"),
        (_set("record", 16, 0x40, 4), "memfd-seals", f"{FIRST}/seals"),
        (_set("record", 20, 1, 4), "memfd-flags", f"{FIRST}/flags"),
        (_set("record", 8, 8193), "memfd-hole", f"{FIRST}/folios"),
        (_set("record", 8, 4096), "memfd-index", f"{FIRST}/folios[1]"),
        (_set("record", 24, 0), "memfd-hole", f"{FIRST}/folios"),
        (_no_room, "memfd-folios", f"{FIRST}/nr_folios"),
        (_set("record", 32, 0), "vmalloc-chunk", f"{FIRST}/folios/first"),
        (_set("record", 32, 0x11), "luo-pointer", f"{FIRST}/folios/chunks[0]"),
        (_set("record", 40, 2, 4), "vmalloc-pages", f"{FIRST}/folios"),
        (_set("record", 44, 4, 2), "vmalloc-flags", f"{FIRST}/folios/flags"),
        (_set("record", 46, 19, 2), "vmalloc-order", f"{FIRST}/folios/order"),
        (_area_cycle, "luo-shared", f"{FIRST}/folios/areas[0]"),
        (_short_chunk, "vmalloc-chunk", f"{FIRST}/folios/chunks[0]"),
        (_same_folio, "luo-shared", f"{FIRST}/folios"),
        (_same_index, "memfd-index", f"{FIRST}/folios[1]"),
        (_far_index, "memfd-index", f"{FIRST}/folios[1]"),
        (_folio_flags, "memfd-folio-flags", f"{FIRST}/folios[0]"),
        (_other_files_folio, "luo-shared", "/LUO/sessions[0]/files[1]/folios"),
        (_unpreserved_folio, "memfd-not-preserved", f"{FIRST}/folios[0]"),
        (_zero_folio, "memfd-hole", f"{FIRST}/folios"),
    ],
)
def test_damage_is_found_where_it_is(spoil: Spoil, code: str, path: str) -> None:
    """One wrong field is one kind of problem at its own path; the other file stays whole."""
    ram, blob = two_files()
    sound = luo_json(ram.decode(blob))
    sessions = word(ram, blob.start + SESSIONS)
    files = word(ram, sessions + 16 + 64)
    record = word(ram, files + 16 + 48)
    spoil(ram, sessions, files, record)
    luo = ram.decode(blob)
    assert (code, path) in [(problem.code, problem.path) for problem in luo.problems]
    assert len(luo.problems) <= 2
    assert all(problem.expected for problem in luo.problems)
    if path.startswith(FIRST):
        said = luo_json(luo)["sessions"]
        assert said[0]["files"][1] == sound["sessions"][0]["files"][1]
        assert said[1] == sound["sessions"][1]


@pytest.mark.parametrize("count", [52, 1 << 63])
def test_too_many_entries_are_read_up_to_the_first_blank(count: int) -> None:
    """A count beyond what a block holds is wrong, the entries in it are not."""
    ram, blob = two_files()
    sound = luo_json(ram.decode(blob))
    ram.poke(word(ram, blob.start + SESSIONS) + 8, count.to_bytes(8, "little"))
    luo = ram.decode(blob)
    assert codes(luo) == ["block-count"]
    assert luo_json(luo) == sound


def test_a_full_chunk_needs_another() -> None:
    """The kernel links one more chunk after a full one; without it the list is torn."""
    ram = Builder()
    folios = [(ram.page(bytes([n])), 3, n) for n in range(3)]
    folios += [(0, 0, 0)] * (256 * 511 - 3)
    blob = ram.luo([(b"vm", [ram.memfd(folios, 3 * 4096)])])
    luo = ram.decode(blob)
    assert luo.problems == ()
    memfd = luo.sessions[0].files[0].memfd
    assert memfd is not None
    ram.poke(word(ram, memfd.phys + 32), bytes(8))
    spoilt = ram.decode(blob)
    assert codes(spoilt) == ["vmalloc-chunk"]
    memfd = spoilt.sessions[0].files[0].memfd
    assert memfd is not None
    assert len(memfd.pfn) == 256 * 511


FIELDS = [
    ("sessions", 0, 0x123, "luo-pointer"),
    ("sessions", 8, 52, "block-count"),
    ("files", 8, 64, "block-count"),
    ("files", 16 + 48, 0, "luo-pointer"),
    ("record", 0, 1 << 63, "memfd-pos"),
    ("record", 8, 1 << 63, "memfd-size"),
    ("record", 16, 0x40, "memfd-seals"),
    ("record", 20, 1, "memfd-flags"),
    ("record", 24, 300, "memfd-folios"),
    ("record", 32, 0, "vmalloc-chunk"),
    ("record", 40, 2, "vmalloc-pages"),
    ("record", 44, 5, "vmalloc-flags"),
    ("record", 46, 19, "vmalloc-order"),
]


@pytest.mark.parametrize(("base", "offset", "value", "code"), FIELDS)
def test_a_wrong_field_is_told_with_its_address(
    base: str, offset: int, value: int, code: str
) -> None:
    """A problem stands at the field that is wrong, for who looks at the bytes."""
    ram, blob = two_files()
    sessions = word(ram, blob.start + SESSIONS)
    files = word(ram, sessions + 16 + 64)
    record = word(ram, files + 16 + 48)
    wide = {16: 4, 20: 4, 40: 4, 44: 2, 46: 2}.get(offset, 8) if base == "record" else 8
    _set(base, offset, value, wide)(ram, sessions, files, record)
    at = {"sessions": sessions, "files": files, "record": record}[base] + offset
    assert (code, at) in [(problem.code, problem.phys) for problem in ram.decode(blob).problems]


@pytest.mark.parametrize(("chunk", "index"), [(0, 0), (0, 1), (0, 510), (1, 0), (1, 2)])
def test_a_wrong_piece_of_an_array_is_told_with_its_pointer(chunk: int, index: int) -> None:
    """The pointer in its chunk is what is wrong, in the first chunk and in a later one."""
    ram, blob = two_files()
    record = word(ram, word(ram, word(ram, blob.start + SESSIONS) + 16 + 64) + 16 + 48)
    area = ram.vmalloc(bytes(514 * 4096))
    ram.poke(record + 32, area)
    page = word(ram, record + 32)
    for _ in range(chunk):
        page = word(ram, page)
    at = page + 8 + 8 * index
    ram.poke(at, b"\x01")
    problems = ram.decode(blob, content=False).problems
    path = f"/LUO/sessions[0]/files[0]/folios/areas[{511 * chunk + index}]"
    assert (at, path) in [(problem.phys, problem.path) for problem in problems]


def test_a_page_full_of_flbs() -> None:
    """As many as there is room for are read, and one more is too many."""
    ram = Builder()
    room = (4096 - 16) // 64
    entries = b"".join(struct.pack("<48sQQ", b"flb-%d" % n, 0, 1) for n in range(room))
    page = ram.page(struct.pack("<QQ", 1, room) + entries)
    blob = ram.luo([], page)
    luo = ram.decode(blob)
    assert luo.problems == ()
    assert luo.flbs is not None
    assert [flb.name for flb in luo.flbs] == [f"flb-{n}" for n in range(room)]
    ram.poke(page + 8, struct.pack("<Q", room + 1))
    assert codes(ram.decode(blob)) == ["luo-flb"]


@pytest.mark.parametrize("spoil", [_far_index, _same_index, _same_folio, _no_room])
def test_folios_that_contradict_each_other_have_no_digest(spoil: Spoil) -> None:
    """What the content is cannot be told, and is not."""
    ram, blob = two_files()
    files = word(ram, word(ram, blob.start + SESSIONS) + 16 + 64)
    spoil(ram, 0, files, word(ram, files + 16 + 48))
    said = luo_json(ram.decode(blob))["sessions"][0]["files"]
    assert said[0]["sha256"] is None
    assert said[1]["sha256"] is not None


def test_a_folio_inside_of_a_block_is_not_preserved() -> None:
    """kho_restore_folio wants the block that begins there."""
    ram = Builder()
    block = ram.page(order=1)
    luo = ram.decode(ram.luo([(b"vm", [ram.memfd([(block + 4096, 3, 0)], 4096)])]))
    assert codes(luo) == ["memfd-not-preserved"]


def test_a_hole_reads_as_zeros() -> None:
    """The digest of a file that lacks a page is that of the file with zeros there."""
    ram = Builder()
    last = ram.page(b"\x55" * 4096)
    entry = ram.memfd([(last, 3, 2)], 3 * 4096)
    luo = ram.decode(ram.luo([(b"vm", [entry])]))
    memfd = luo.sessions[0].files[0].memfd
    assert memfd is not None
    assert memfd.sha256 == hashlib.sha256(bytes(8192) + b"\x55" * 4096).hexdigest()
    assert codes(luo) == ["memfd-hole"]


def test_an_enormous_hole_is_not_waited_for() -> None:
    """A size that no machine has costs no time: there is no digest."""
    ram = Builder()
    entry = ram.memfd([(ram.page(), 3, 0)], (1 << 63) - 1)
    luo = ram.decode(ram.luo([(b"vm", [entry])]))
    memfd = luo.sessions[0].files[0].memfd
    assert memfd is not None
    assert memfd.sha256 is None
    assert codes(luo) == ["memfd-hole"]


@pytest.mark.parametrize(
    ("data", "size", "code"),
    [
        (b"luo-v4\0\0", 32, "luo-compatible"),
        (b"luo-v5", 31, "luo-size"),
        (b"\xd0\x0d\xfe\xed", 4096, "luo-compatible"),
    ],
)
def test_other_formats_are_named(data: bytes, size: int, code: str) -> None:
    """What is no luo-v5 is said to be none, and not read as one."""
    ram = Builder()
    luo = ram.decode(Region(ram.page(data), size))
    assert codes(luo) == [code]
    assert luo.sessions == []


def test_a_blob_that_is_not_there_is_said() -> None:
    """No memory at the blob's address: one problem, no state."""
    ram = Builder()
    ram.page()
    luo = ram.decode(Region(0x7FFF0000, 32))
    assert (luo.compatible, codes(luo)) == (None, ["luo-unreadable"])
    assert (luo.liveupdate_num, luo.sessions_phys, luo.flbs_phys) == (0, 0, 0)


def test_hostile_bytes_never_raise() -> None:
    """Random damage all over LUO's pages: problems or different values, and an end."""
    rng = random.Random(4)
    _, page_size, known = golden("uma1g", "gen1")
    pages = dict(golden("uma1g", "gen1")[0])
    ram = PageImage(pages, page_size)
    handover = decode_handover(ram, known["fdt_phys"], page_size)
    blob = handover.subtrees["LUO"]
    sound = decode_luo(ram, blob, page_size, handover.preserved, content=False)
    places = [phys // page_size for phys in sound.pages if phys // page_size in pages]
    noticed = 0
    for _ in range(150):
        spoilt = dict(pages)
        for _ in range(rng.randrange(1, 4)):
            pfn = rng.choice(places)
            page = bytearray(spoilt[pfn])
            at = rng.randrange(0, rng.choice((64, 512, page_size)))
            page[at] ^= 1 << rng.randrange(8)
            spoilt[pfn] = bytes(page)
        luo = decode_luo(
            PageImage(spoilt, page_size), blob, page_size, handover.preserved, content=False
        )
        assert len(luo.problems) < 100
        assert json.dumps(luo_json(luo))
        noticed += luo_json(luo) != luo_json(sound) or bool(luo.problems)
    assert noticed > 60
