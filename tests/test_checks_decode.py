"""The checkers' decoder against handovers of real kernels, and against spoilt ones."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khosim.checks.decode import (
    Handover,
    KexecMetadata,
    Region,
    decode_handover,
    read_blob,
    to_json,
)
from khosim.checks.preserved import covers, expand, overlaps
from khosim.checks.reader import PageImage
from khosim.errors import InputError, RamFault

CAPTURES = Path(__file__).parent / "golden" / "captures"
NAMES = ("uma1g", "numa4g", "fixed2g", "uma1g-7.2", "arm64-16k")
CASES = [(name, generation) for name in NAMES for generation in ("gen0", "gen1")]
SHAPE = {4096: (9, 15, 6), 16384: (11, 17, 5)}  # log2 of table entries, of leaf bits; levels

every_capture = pytest.mark.parametrize(("name", "generation"), CASES, ids=map("-".join, CASES))


@cache
def golden(name: str, generation: str) -> tuple[dict[int, bytes], int, dict[str, Any]]:
    """Pages of RAM, page size, and what an independent program decoded from them."""
    folder = CAPTURES / name / generation
    page_size = json.loads((CAPTURES / name / "capture.json").read_text())["page_size"]
    with np.load(folder / "ram.npz") as ram:
        pages = dict(zip(ram["pfn"].tolist(), map(bytes, ram["data"]), strict=True))
    return pages, page_size, json.loads((folder / "handover.json").read_text())


def image(name: str = "uma1g", generation: str = "gen0") -> tuple[PageImage, dict[str, Any]]:
    """A capture's RAM, free to be changed, and what it is known to say."""
    pages, page_size, known = golden(name, generation)
    return PageImage(dict(pages), page_size), known


def poke(ram: PageImage, phys: int, data: bytes) -> None:
    """Overwrite bytes within one page."""
    pfn, offset = divmod(phys, ram.page_size)
    page = bytearray(ram.pages[pfn])
    page[offset : offset + len(data)] = data
    ram.pages[pfn] = bytes(page)


def codes(handover: Handover) -> set[str]:
    """Which kinds of problems were found."""
    return {problem.code for problem in handover.problems}


def plain_walk(ram: PageImage, root: int) -> list[tuple[int, int]]:
    """The kernel's walk, entry by entry and bit by bit, with no check at all."""
    page_size = ram.page_size
    page_shift = page_size.bit_length() - 1
    table_bits, leaf_bits, levels = SHAPE[page_size]
    found = []

    def visit(phys: int, level: int, start: int) -> None:
        page = ram.read(phys, page_size)
        if level:
            for index, (child,) in enumerate(struct.iter_unpack("<Q", page)):
                if child:
                    shift = (level - 1) * table_bits + leaf_bits
                    visit(child, level - 1, start | index << shift)
            return
        for byte_at, byte in enumerate(page):
            for bit in range(8):
                if byte >> bit & 1:
                    key = start | byte_at * 8 + bit
                    order = 64 - page_shift - (key.bit_length() - 1)
                    found.append(((key << page_shift + order) % (1 << 64), order))

    visit(root, levels - 1, 0)
    return found


@every_capture
def test_a_real_handover_is_read_whole(name: str, generation: str) -> None:
    """Every key that the independent program gives has the same value here, in the same order."""
    ram, known = image(name, generation)
    handover = decode_handover(ram, known["fdt_phys"], ram.page_size)
    said = to_json(ram, handover)
    assert said.pop("problems") == []
    assert said == {key: value for key, value in known.items() if key in said}
    assert set(known) - set(said) == {"luo"}
    assert list(said["subtrees"]) == list(known["subtrees"])
    assert json.loads(json.dumps(said)) == said


@pytest.mark.parametrize(
    ("name", "release", "regions"),
    [
        ("uma1g", "7.3.4", {"oops": (962592768, 2 << 20)}),
        (
            "numa4g",
            "7.3.4",
            {"trace": (5261754368, 4 << 20), "oops": (5293088768, 64 << 10)},
        ),
        ("fixed2g", "7.3.4", {"log": (2020605952, 1 << 20)}),
        ("uma1g-7.2", "7.2.13", {"oops": (962592768, 2 << 20)}),
        ("arm64-16k", "7.3.4", {"oops": (3209183232, 2 << 20)}),
    ],
)
def test_known_blobs_are_read(name: str, release: str, regions: dict[str, Any]) -> None:
    """Regions and the writer's release are those of the captured machines, in both generations."""
    for count, generation in enumerate(("gen0", "gen1"), 1):
        ram, known = image(name, generation)
        handover = decode_handover(ram, known["fdt_phys"], ram.page_size)
        assert handover.reserve_mem == regions
        assert handover.kexec_metadata == KexecMetadata(1, release, count)


@every_capture
def test_real_handovers_keep_the_rules(name: str, generation: str) -> None:
    """No page has two keys, tables are in no block, and the blobs and the root FDT are in one."""
    ram, known = image(name, generation)
    handover = decode_handover(ram, known["fdt_phys"], ram.page_size)
    assert overlaps(handover.preserved) == []
    tables = np.array(handover.table_pages) // ram.page_size
    assert not covers(handover.preserved, tables).any()
    others = set(handover.metadata_pages) - set(handover.table_pages)
    assert known["fdt_phys"] in others
    assert covers(handover.preserved, [phys // ram.page_size for phys in others]).all()
    assert len(others) == 1 + len(known["subtrees"])
    assert list(handover.metadata_pages) == sorted(handover.metadata_pages)
    assert handover.table_pages[0] == handover.map_phys


def test_blobs_are_read_from_ram() -> None:
    """A blob is the bytes at its range, and empty where it cannot be there."""
    ram, known = image()
    luo = known["subtrees"]["LUO"]
    assert read_blob(ram, Region(luo["phys"], luo["size"])).hex() == luo["hex"]
    assert read_blob(ram, Region(1 << 50, 8)) == b""
    assert read_blob(ram, Region(luo["phys"], 1 << 60)) == b""


def test_no_memory_at_all() -> None:
    """Nothing at the FDT's address: an empty handover with one problem."""
    handover = decode_handover(PageImage({}, 4096), 0x1000, 4096)
    assert codes(handover) == {"fdt-unreadable"}
    assert (handover.compatible, handover.map_phys, handover.fdt) == (None, 0, b"")
    assert handover.metadata_pages == ()
    assert handover.preserved.total_blocks == 0


def test_page_size_is_checked() -> None:
    """A page size that no kernel has is the caller's mistake."""
    with pytest.raises(InputError, match="page_size: 8192 is not one of"):
        decode_handover(PageImage({}, 4096), 0, 8192)


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        (b"kho-v4\0", b"kho-v9\0", "kho-compatible"),
        (b"preserved-memory-map\0", b"preserved-memory-mop\0", "kho-map"),
        (b"preserved-data\0", b"preserved-dada\0", "kho-subtree"),
        (b"blob-size\0", b"blob-sise\0", "kho-subtree"),
        (b"\xd0\x0d\xfe\xed", b"\xd0\x0d\xfe\xee", "fdt-magic"),
    ],
)
def test_spoilt_root_fdt(old: bytes, new: bytes, code: str) -> None:
    """One wrong word in the root FDT is named; what does not depend on it is still read."""
    ram, known = image()
    at = bytes.fromhex(known["fdt"]).index(old)
    poke(ram, known["fdt_phys"] + at, new)
    handover = decode_handover(ram, known["fdt_phys"], 4096)
    assert codes(handover) == {code}
    if code == "kho-compatible":
        assert handover.compatible == "kho-v9"
        assert expand(handover.preserved) == [tuple(block) for block in known["preserved"]]
    assert (handover.map_phys == 0) == (code in ("kho-map", "fdt-magic"))
    assert (handover.subtrees == {}) == (code in ("kho-subtree", "fdt-magic"))


@pytest.mark.parametrize(
    ("offset", "data", "code"),
    [
        (0, b"\2", "metadata-version"),
        (4, b"x" * 65, "metadata-release"),
        (None, struct.pack("<Q", 72), "metadata-size"),
        (None, struct.pack("<Q", 3), "metadata-size"),
        (None, struct.pack("<Q", 1 << 40), "kho-blob-size"),
    ],
)
def test_spoilt_metadata(offset: int | None, data: bytes, code: str) -> None:
    """The record of the earlier kernel is checked for version, size and its string's end."""
    ram, known = image()
    blob = known["subtrees"]["kexec-metadata"]
    if offset is None:  # spoil the size that the root FDT gives
        fdt = bytes.fromhex(known["fdt"])
        at = fdt.index(struct.pack("<Q", blob["size"]))
        poke(ram, known["fdt_phys"] + at, data)
    else:
        poke(ram, blob["phys"] + offset, data)
    handover = decode_handover(ram, known["fdt_phys"], 4096)
    assert codes(handover) == {code}
    expected = {"metadata-release": "x" * 65, "kho-blob-size": "7.3.4"}.get(code)
    found = handover.kexec_metadata
    assert (found.previous_release if found else None) == expected


def test_a_record_too_short_for_its_version() -> None:
    """Three bytes tell no version, not even that it is another one."""
    ram, known = image()
    blob = known["subtrees"]["kexec-metadata"]
    at = bytes.fromhex(known["fdt"]).index(struct.pack("<Q", blob["size"]))
    poke(ram, known["fdt_phys"] + at, struct.pack("<Q", 3))
    poke(ram, blob["phys"], b"\2")
    assert codes(decode_handover(ram, known["fdt_phys"], 4096)) == {"metadata-size"}


@pytest.mark.parametrize(
    ("start", "size"), [(0x4000, 0), (1 << 52, 4096), ((1 << 52) - 4096, 4097)]
)
def test_regions_that_no_machine_has(start: int, size: int) -> None:
    """A region of no bytes, or one that passes the last address, is named and left out."""
    ram, known = image()
    blob, region = known["subtrees"]["memblock"], (962592768, 2 << 20)
    old = bytes.fromhex(blob["hex"])
    poke(ram, blob["phys"] + old.index(struct.pack("<Q", region[0])), struct.pack("<Q", start))
    poke(ram, blob["phys"] + old.index(struct.pack("<Q", region[1])), struct.pack("<Q", size))
    handover = decode_handover(ram, known["fdt_phys"], 4096)
    assert codes(handover) == {"memblock-region"}
    assert handover.reserve_mem == {}


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        (b"memblock-v1", b"memblock-v2", "memblock-compatible"),
        (b"reserve-mem-v1", b"reserve-mem-v2", "memblock-compatible"),
        (b"start\0", b"sturt\0", "memblock-region"),
        (b"\xd0\x0d", b"\xd0\x0e", "fdt-magic"),
    ],
)
def test_spoilt_memblock_subtree(old: bytes, new: bytes, code: str) -> None:
    """What is wrong with the reserve_mem description is named."""
    ram, known = image()
    blob = known["subtrees"]["memblock"]
    poke(ram, blob["phys"] + bytes.fromhex(blob["hex"]).index(old), new)
    handover = decode_handover(ram, known["fdt_phys"], 4096)
    assert codes(handover) == {code}
    assert bool(handover.reserve_mem) == (old == b"memblock-v1")


def test_blob_outside_of_ram() -> None:
    """A blob without memory under it is noted, its pages are not counted."""
    ram, known = image()
    blob = known["subtrees"]["kexec-metadata"]
    del ram.pages[blob["phys"] >> 12]
    handover = decode_handover(ram, known["fdt_phys"], 4096)
    assert codes(handover) == {"kho-blob-unreadable"}
    assert handover.kexec_metadata is None
    assert blob["phys"] not in handover.metadata_pages


def test_blob_over_page_boundaries() -> None:
    """A blob that starts late in a page and ends early in another counts both."""
    ram, known = image()
    fdt = bytes.fromhex(known["fdt"])
    blob = known["subtrees"]["LUO"]
    at = fdt.index(struct.pack("<Q", blob["phys"]))
    free = 0x7000000
    for pfn in range(free >> 12, (free >> 12) + 3):
        ram.pages[pfn] = bytes(4096)
    poke(ram, known["fdt_phys"] + at, struct.pack("<Q", free + 4080))
    handover = decode_handover(ram, known["fdt_phys"], 4096)
    assert handover.problems == ()
    assert {free, free + 4096} <= set(handover.metadata_pages)
    assert free + 8192 not in handover.metadata_pages


def test_an_empty_blob_has_no_pages() -> None:
    """A blob of no bytes, wherever it claims to be, adds no page."""
    ram, known = image()
    fdt = bytes.fromhex(known["fdt"])
    blob = known["subtrees"]["LUO"]
    at = known["fdt_phys"] + fdt.index(struct.pack("<Q", blob["phys"]))
    poke(ram, at - 20, bytes(8))  # libfdt puts a new property before the others
    poke(ram, at, b"\x07")
    handover = decode_handover(ram, known["fdt_phys"], 4096)
    assert handover.subtrees["LUO"] == (blob["phys"] + 7, 0)
    assert handover.problems == ()
    assert blob["phys"] not in handover.metadata_pages


def test_two_subtrees_of_one_name() -> None:
    """The first one counts, as for the kernel, and the second is a problem."""
    ram, known = image()
    at = bytes.fromhex(known["fdt"]).index(b"kho_test\0")
    poke(ram, known["fdt_phys"] + at, b"memblock\0")
    handover = decode_handover(ram, known["fdt_phys"], 4096)
    assert codes(handover) == {"fdt-duplicate"}
    blob = known["subtrees"]["memblock"]
    assert handover.subtrees["memblock"] == (blob["phys"], blob["size"])
    assert list(handover.reserve_mem) == ["oops"]


def test_too_many_blocks_for_json() -> None:
    """More blocks than asked for are left out of the JSON, not cut."""
    ram, known = image()
    handover = decode_handover(ram, known["fdt_phys"], 4096)
    assert to_json(ram, handover, limit=5)["preserved"] is None


def spoil(rng: random.Random, ram: PageImage, pages: list[int]) -> None:
    """Change something in one of the given pages, in one of several ways."""
    page_size = ram.page_size
    target = rng.choice(pages)
    at = target + rng.randrange(page_size // 8) * 8
    how = rng.randrange(8)
    if how == 0:
        del ram.pages[target // page_size]
    elif how == 1:
        ram.pages[target // page_size] = ram.read(rng.choice(pages), page_size)
    elif how == 2:
        ram.pages[target // page_size] = rng.randbytes(page_size)
    elif how == 3:
        value = rng.choice((0, 1, (1 << 64) - 1, rng.getrandbits(64), rng.choice(pages)))
        poke(ram, at, struct.pack("<Q", value))
    else:  # where bytes are already: a bit, a byte, a word of them
        page = bytearray(ram.read(target, page_size))
        filled = np.flatnonzero(np.frombuffer(bytes(page), dtype=np.uint8)).tolist() or [0]
        for _ in range(rng.choice((1, 1, 1, 4))):
            offset = rng.choice(filled)
            if how < 6:
                page[offset] ^= 1 << rng.randrange(8)
            else:
                page[offset] = rng.randrange(256)
        ram.pages[target // page_size] = bytes(page)


@every_capture
def test_spoilt_memory_never_raises(name: str, generation: str) -> None:
    """Hundreds of changes to the bytes of a handover: always an answer, and a bounded one.

    Where nothing about the map is called wrong, it says what the kernel's plain walk says.
    """
    ram, known = image(name, generation)
    whole = decode_handover(ram, known["fdt_phys"], ram.page_size)
    rng = random.Random(f"{name}-{generation}")
    pages = list(whole.metadata_pages)
    noticed = compared = 0
    for number in range(600):
        spoilt = PageImage(dict(ram.pages), ram.page_size)
        for _ in range(1 + number % 3):
            with contextlib.suppress(KeyError, RamFault):  # the page is already gone
                spoil(rng, spoilt, pages)
        began = time.monotonic()
        handover = decode_handover(spoilt, known["fdt_phys"], ram.page_size)
        assert time.monotonic() - began < 5
        assert len(handover.problems) <= 600
        assert len(handover.table_pages) <= len(spoilt.pages)
        noticed += bool(handover.problems)
        if number % 8 == 0:
            json.dumps(to_json(spoilt, handover, limit=10_000))
        if number % 10 == 0 and handover.map_phys and not handover.preserved.problems:
            compared += 1
            assert expand(handover.preserved) == plain_walk(spoilt, handover.map_phys)
    assert noticed > 200
    assert compared > 0
