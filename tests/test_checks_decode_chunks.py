"""The checkers' reader of kho-v1's chunk lists: against real kernels, and against spoilt lists."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khosim.checks.decode import decode_handover, to_json
from khosim.checks.decode_chunks import ChunkMap, decode_chunks
from khosim.checks.preserved import expand
from khosim.checks.reader import PageImage

GOLDEN = Path(__file__).parent / "golden" / "kho-v1"
CASES = [(name, gen) for name in ("uma1g-v1", "uma1g-v1page") for gen in ("gen0", "gen1")]


def golden(name: str, generation: str) -> tuple[PageImage, dict[str, Any]]:
    """A capture's RAM, and what an independent program decoded from it."""
    folder = GOLDEN / name / generation
    with np.load(folder / "ram.npz") as ram:
        pages = dict(zip(ram["pfn"].tolist(), map(bytes, ram["data"]), strict=True))
    return PageImage(pages, 4096), json.loads((folder / "handover.json").read_text())


@pytest.mark.parametrize(("name", "generation"), CASES, ids=map("-".join, CASES))
def test_what_old_kernels_left_is_read_whole(name: str, generation: str) -> None:
    """Every key has the value that an independent program found; bitmap sizes are found out."""
    ram, known = golden(name, generation)
    handover = decode_handover(ram, known["fdt_phys"], 4096)
    said = to_json(ram, handover)
    assert said.pop("problems") == []
    del known["kho_data"]  # boot parameters, which lie elsewhere
    assert said == known
    assert list(handover.reserve_mem) == ["oops"]


def chunk(
    following: int, order: int, *elements: tuple[int, int], count: int | None = None
) -> bytes:
    """A chunk page."""
    raw = struct.pack("<QII", following, order, len(elements) if count is None else count)
    return (raw + b"".join(struct.pack("<QQ", *pair) for pair in elements)).ljust(4096, b"\0")


def image(*pages: bytes) -> PageImage:
    """Pages from 0x10000 on."""
    return PageImage({0x10 + n: page.ljust(4096, b"\0") for n, page in enumerate(pages)}, 4096)


def test_a_long_bitmap_spans_a_page() -> None:
    """32768 bits a page, and blocks of a higher order at their own distance."""
    bits = bytearray(4096)
    bits[0], bits[4095] = 0b101, 0x80
    found = decode_chunks(image(chunk(0, 2, (1 << 29, 0x11000)), bytes(bits)), 0x10000, 4096)
    assert found.problems == ()
    assert found.preserve_bits == 32768
    base = 1 << 29
    assert expand(found) == [(base, 2), (base + (2 << 14), 2), (base + (32767 << 14), 2)]
    assert found.table_pages == (0x10000, 0x11000)


def test_a_short_bitmap_is_told_by_its_place() -> None:
    """One that does not begin on a page, or stands for less than a page's bits, has 4096 bits."""
    bits = bytes([1]).ljust(512, b"\0") + bytes([0xFF]) * 512
    for element in ((0, 0x11000 + 512), (1 << 24, 0x11000)):
        found = decode_chunks(image(chunk(0, 0, element), bits), 0x10000, 4096)
        assert found.preserve_bits == 4096
        assert found.problems == ()
        assert found.total_blocks == (4096 if element[0] == 0 else 1)
    told = decode_chunks(image(chunk(0, 0, (0, 0x11000)), bits), 0x10000, 4096, 4096)
    assert told.total_blocks == 1


def test_no_list_is_no_problem() -> None:
    """Kernels before 6.19 take an address of 0 for an empty list."""
    found = decode_chunks(image(), 0, 4096)
    assert (found.problems, found.chunks, found.total_blocks) == ((), (), 0)


@pytest.mark.parametrize(
    ("pages", "code", "chunks"),
    [
        ((chunk(0x10000, 0),), "chunk-pointer", 1),
        ((chunk(0x10001, 0),), "chunk-pointer", 1),
        ((chunk(0x7FFF000, 0),), "chunk-unreadable", 1),
        ((chunk(0, 60, (0, 0x10000)),), "chunk-order", 1),
        ((chunk(0, 0, count=256),), "chunk-count", 1),
        ((chunk(0, 0, (4096, 0x10000)),), "chunk-range", 1),
        ((chunk(0, 0, (1 << 60, 0x10000)),), "chunk-range", 1),
        ((chunk(0, 0, (0, 0x7FFF000)),), "chunk-bitmap", 1),
    ],
)
def test_damage_is_named(pages: tuple[bytes, ...], code: str, chunks: int) -> None:
    """Each kind of broken list is a problem, never an exception, and ends."""
    found = decode_chunks(image(*pages), 0x10000, 4096)
    assert code in {problem.code for problem in found.problems}
    assert len(found.chunks) == chunks
    assert isinstance(found, ChunkMap)


def test_an_impossible_order_costs_nothing() -> None:
    """An order of four billion is a problem, not a number of that many bits."""
    page = struct.pack("<QII", 0, 0xFFFFFFFF, 1).ljust(4096, b"\xff")
    found = decode_chunks(image(page), 0x10000, 4096)
    assert [problem.code for problem in found.problems] == ["chunk-order"]
    assert found.chunks[0].order == 0xFFFFFFFF


def test_every_byte_of_a_chunk_may_be_wrong() -> None:
    """Flips all over a real list never raise."""
    ram, known = golden("uma1g-v1", "gen1")
    pages = dict(ram.pages)
    for phys in {known["mem_map"], known["chunks"][1]["phys"]}:
        for at in range(48):
            page = bytearray(pages[phys // 4096])
            page[at] ^= 0xFF
            ram.pages = {**pages, phys // 4096: bytes(page)}
            handover = decode_handover(ram, known["fdt_phys"], 4096)
            assert len(handover.problems) < 200
