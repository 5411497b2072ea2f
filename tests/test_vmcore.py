"""ELF dumps: what their headers say, and headers that lie."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from khosim.capture.vmcore import open_vmcore
from khosim.errors import InputError, RamFault

EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR = struct.Struct("<IIQQQQQQ")
IDENT = b"\x7fELF\x02\x01\x01" + bytes(9)


def elf(
    segments: list[tuple[int, bytes]],
    *,
    machine: int = 62,
    notes: bytes = b"",
    kind: int = 4,
    extended: bool = False,
) -> bytes:
    """A dump with the given memory, as (physical address, bytes)."""
    phnum = len(segments) + 1
    section = bytes(64)
    at = EHDR.size + phnum * PHDR.size
    if extended:
        section = struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, phnum, 0, 0)
    shoff = at if extended else 0
    at += len(section) if extended else 0
    headers = [PHDR.pack(4, 0, at, 0, 0, len(notes), len(notes), 0)]
    body = notes
    for phys, data in segments:
        size = len(data)
        headers.append(PHDR.pack(1, 7, at + len(body), phys + (1 << 63), phys, size, size + 9, 0))
        body += data
    count = 0xFFFF if extended else phnum
    head = EHDR.pack(IDENT, kind, machine, 1, 0, EHDR.size, shoff, 0, 64, 56, count, 64, 1, 0)
    return head + b"".join(headers) + (section if extended else b"") + body


def note(name: bytes, desc: bytes) -> bytes:
    """An ELF note."""

    def padded(raw: bytes) -> bytes:
        return raw.ljust(-(-len(raw) // 4) * 4, b"\0")

    return struct.pack("<III", len(name), len(desc), 0) + padded(name) + padded(desc)


INFO = note(b"CORE\0", b"123") + note(
    b"VMCOREINFO\0", b"OSRELEASE=7.3.4\nPAGESIZE=16384\nSYMBOL(x)=ffff\n"
)


@pytest.mark.parametrize("extended", [False, True])
def test_a_dump_is_memory_by_physical_address(tmp_path: Path, extended: bool) -> None:
    """Segments at their p_paddr, also where the number of headers stands in a section."""
    low, high = bytes(range(256)) * 4, b"x" * 5000
    path = tmp_path / "vmcore"
    path.write_bytes(elf([(0x1000, low), (4 << 30, high)], extended=extended))
    core = open_vmcore(path)
    assert core.memory.read(0x1003, 5) == low[3:8]
    assert core.memory.read(4 << 30, 5000) == high
    assert (core.arch, core.page_size, core.release, core.cut) == ("x86_64", 4096, None, 0)
    for phys in (0, 0x1000 + len(low), (4 << 30) + 5000):  # beyond p_filesz is not dumped
        with pytest.raises(RamFault):
            core.memory.read(phys, 1)


def test_notes_tell_page_size_and_release(tmp_path: Path) -> None:
    """VMCOREINFO is found behind other notes."""
    path = tmp_path / "vmcore"
    path.write_bytes(elf([(0x40000000, b"abc")], machine=183, notes=INFO))
    core = open_vmcore(path)
    assert (core.arch, core.page_size, core.release) == ("arm64", 16384, "7.3.4")
    path.write_bytes(elf([(0x40000000, b"abc")], machine=183))
    assert open_vmcore(path).page_size is None


def test_pages_are_found_at_odd_offsets(tmp_path: Path) -> None:
    """A page begins at a multiple of 4096 in memory, wherever that is in the file."""
    data = bytes(0x800) + b"magic" + bytes(4096 - 5) + b"magic" + bytes(200)
    path = tmp_path / "vmcore"
    path.write_bytes(elf([(0x7800, data), (0x100000, b"magic")]))
    assert list(open_vmcore(path).memory.pages_with(b"magic")) == [0x8000, 0x9000, 0x100000]


def test_a_dump_that_was_cut_off_keeps_what_it_has(tmp_path: Path) -> None:
    """The end of the file ends the last segments, and is counted."""
    path = tmp_path / "vmcore"
    whole = elf([(0x1000, b"a" * 4096), (0x8000, b"b" * 4096), (0x4000, b"c" * 4096)])
    path.write_bytes(whole[:-5000])
    core = open_vmcore(path)
    assert (core.cut, core.cut_phys) == (5000, 0x4000)
    assert core.memory.read(0x8000, 4096 - 904) == b"b" * 3192
    with pytest.raises(RamFault):
        core.memory.read(0x8000 + 3192, 1)


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        (b"\x7fELF", "cut off inside of the ELF header"),
        (b"\x7fELF\x01" + bytes(100), "not of a 64-bit little-endian machine"),
        (b"\x7fELF\x02\x02" + bytes(100), "not of a 64-bit little-endian machine"),
        (elf([(0, b"x")], kind=2), "no core dump"),
        (elf([(0, b"x")], machine=21), "ELF machine 21"),
        (elf([]), "holds no memory"),
        (elf([(0x1000, b"")]), "holds no memory"),
        (elf([(0x1000, b"x")])[:100], "cut off"),
        (elf([(0, b"x"), (0, b"y")]), "of a process"),
        (elf([(1 << 60, b"x")]), "physical address"),
        (elf([(0x1000, b"x")], extended=True)[:180], "section"),
        (b"KDUMP   " + bytes(100), "makedumpfile -E"),
        (b"not an ELF", "not an ELF file"),
    ],
)
def test_broken_headers_are_refused_in_one_line(tmp_path: Path, raw: bytes, cause: str) -> None:
    """Each says what is wrong."""
    path = tmp_path / "vmcore"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=cause) as caught:
        open_vmcore(path)
    assert "\n" not in str(caught.value)


def test_every_byte_of_the_headers_may_be_wrong(tmp_path: Path) -> None:
    """Flips in ELF header, program headers and notes: a dump, or a refusal."""
    sound = elf([(0x1000, b"a" * 64), (0x3000, b"b" * 64)], notes=INFO, extended=True)
    path = tmp_path / "vmcore"
    rng = random.Random(2)
    refused = 0
    for at in range(len(sound) - 128):
        raw = bytearray(sound)
        raw[at] ^= rng.randrange(1, 256)
        path.write_bytes(raw)
        try:
            core = open_vmcore(path)
        except InputError:
            refused += 1
        else:
            assert len(list(core.memory.pages_with(b"a"))) <= 2
    assert refused > 30
