"""Machines in files: round trips, and every way a file can be wrong."""

from __future__ import annotations

import os
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim.errors import InputError
from khosim.machine.hardware import Hardware
from khosim.machine.image import load_image, save_image
from khosim.machine.memory_map import MemoryMap
from khosim.machine.ram import Ram

BY = (1, "kho_fill_kimage")
TIB = 1 << 40
SMALL = MemoryMap.from_size("64M", nodes=2, memoryless=(5,))


def small_ram() -> Ram:
    """64 MiB with data in its first and last page, a long stretch, and a page written to zero."""
    ram = Ram(SMALL.end_phys)
    ram.write(0, b"first", BY)
    ram.write(SMALL.end_phys - 4, b"last", BY)
    ram.writable(1 << 20, 9 << 20, BY)[:] = 0xA5
    ram.zero((1 << 20) + 4096, 4096, BY)
    ram.write(0x30000, bytes(4096), BY)
    return ram


def test_round_trip(tmp_path: Path) -> None:
    """Bytes, memory map, nodes and firmware blobs come back; only what is not zero is stored."""
    path = tmp_path / "m.img"
    ram = small_ram()
    firmware = {"boot_params": bytes(range(256)), "empty": b""}
    save_image(ram, SMALL, path, firmware=firmware)
    image = load_image(path)
    assert image.memory_map == SMALL
    assert image.firmware == firmware
    assert (image.ram.size_bytes, image.ram.page_size) == (SMALL.end_phys, 4096)
    assert np.array_equal(image.ram.data, ram.data)
    assert image.ram.touched_ranges() == [
        (0, 0x1000),
        (0x100000, 0x101000),
        (0x102000, 0xA00000),
        (SMALL.end_phys - 4096, SMALL.end_phys),
    ]
    assert image.ram.last_writer(0) == (-1, "load_image")
    pages = 1 + 1 + (0xA00000 - 0x102000) // 4096 + 1
    assert struct.unpack_from("<QQ", path.read_bytes(), 24) == (4, pages)
    assert pages * 4096 < path.stat().st_size < pages * 4096 + 4096
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.img"]


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_hardware_round_trip(tmp_path: Path, page_size: int) -> None:
    """A whole machine of any page size, through its own save and load."""
    hardware = Hardware(MemoryMap.from_size("64M", arch="arm64"), page_size)
    hardware.ram.write((1 << 30) + 5 * page_size - 2, b"spans", BY)
    hardware.save(tmp_path / "m", firmware={"fdt": b"\xd0\x0d"})
    loaded, firmware = Hardware.load(tmp_path / "m")
    assert firmware == {"fdt": b"\xd0\x0d"}
    assert (loaded.arch, loaded.page_size) == ("arm64", page_size)
    assert loaded.memory_map == hardware.memory_map
    assert loaded.ram.touched_ranges() == hardware.ram.touched_ranges()
    assert loaded.ram.read((1 << 30) + 5 * page_size - 4, 8) == b"\0\0spans\0"


def test_sixteen_tebibytes(tmp_path: Path) -> None:
    """A machine of 16 TiB is saved and loaded by what it touched."""
    memory_map = MemoryMap.from_size("16T", nodes=8)
    ram = Ram(memory_map.end_phys)
    for step in range(16):
        ram.write_u64((step << 40) + 0x123458, step + 1, BY)
    ram.zero(TIB, 14 * TIB, BY)
    save_image(ram, memory_map, tmp_path / "big")
    loaded = load_image(tmp_path / "big").ram
    assert [loaded.read_u64((step << 40) + 0x123458) for step in range(16)] == [1, *[0] * 14, 16]
    assert (tmp_path / "big").stat().st_size < 16384


def test_an_image_replaces_the_file_only_when_whole(tmp_path: Path) -> None:
    """Where writing fails half-way, the old file stays and nothing is left beside it."""
    path = tmp_path / "m.img"
    path.write_bytes(b"old")
    reader = path.open("rb")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(InputError, match=r"m.img: File too large"):
            save_image(small_ram(), SMALL, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.img"]
    save_image(small_ram(), SMALL, path)
    assert load_image(path).ram.read(0, 5) == b"first"
    with reader:
        assert reader.read() == b"old"


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    """A missing folder, a missing file, a folder: one line that names the path."""
    with pytest.raises(InputError, match=r"gone/m.img: No such file"):
        save_image(small_ram(), SMALL, tmp_path / "gone" / "m.img")
    with pytest.raises(InputError, match=r"m.img: No such file"):
        load_image(tmp_path / "m.img")
    with pytest.raises(InputError, match=r"Is a directory"):
        load_image(tmp_path)


def test_an_image_takes_no_devices_place(tmp_path: Path) -> None:
    """A pipe (or a device) is refused and stays what it is; a link stays, what it names is new."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe: a device or a pipe"):
        save_image(small_ram(), SMALL, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "link").symlink_to("target")
    save_image(small_ram(), SMALL, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load_image(tmp_path / "target").ram.read(0, 5) == b"first"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "pipe", "target"]


@pytest.fixture(scope="module")
def image_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a sound image of four pages."""
    path = tmp_path_factory.mktemp("image") / "m.img"
    ram = Ram(SMALL.end_phys)
    ram.note_writes([3, 4, 700, 9000], BY)
    ram.data.reshape(-1, 4096)[[3, 4, 700, 9000]] = 0x5A
    save_image(ram, SMALL, path, firmware={"a": b"b"})
    return path.read_bytes()


def test_any_cut_is_seen(tmp_path: Path, image_bytes: bytes) -> None:
    """An image cut at any place, or with a tail, is refused."""
    path = tmp_path / "m.img"
    size = len(image_bytes)
    for length in [*range(200), *range(200, size, 97), size - 1]:
        path.write_bytes(image_bytes[:length])
        with pytest.raises(InputError, match=r"m.img: (cut off|not a machine image)"):
            load_image(path)
    path.write_bytes(image_bytes + b"\0")
    with pytest.raises(InputError, match="has a tail"):
        load_image(path)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(at=st.integers(0, 17_500), bit=st.integers(0, 7))
def test_any_flipped_bit_is_seen(
    tmp_path_factory: pytest.TempPathFactory, image_bytes: bytes, at: int, bit: int
) -> None:
    """One wrong bit anywhere is refused, never loaded and never another exception."""
    damaged = bytearray(image_bytes)
    damaged[at % len(damaged)] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.img"
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="flipped"):
        load_image(path)


def sealed(facts: bytes, extents: list[int], pages: int, page_size: int = 4096) -> bytes:
    """An image with the right checksums and whatever is asked for inside."""
    table = struct.pack(f"<{len(extents)}Q", *extents)
    body = b"\1" * (pages * page_size)
    about = zlib.crc32(table, zlib.crc32(facts))
    header = struct.pack(
        "<8sIIQQQII8xI", b"KHOSIMGE", 1, page_size, len(facts), len(extents) // 2, pages, about,
        zlib.crc32(body), 0,
    )  # fmt: skip
    return header + struct.pack("<I", zlib.crc32(header)) + facts + table + body


GOOD_FACTS = (
    b'{"ram_bytes": 67108864, "firmware": {}, "memory_map": {"arch": "x86_64", '
    b'"entries": [[0, 67108864, "System RAM"]], "node_ranges": [], "online_nodes": [0]}}'
)


def test_the_format_is_as_documented(tmp_path: Path) -> None:
    """An image made by hand from the description loads."""
    path = tmp_path / "m.img"
    path.write_bytes(sealed(GOOD_FACTS, [2, 1, 16383, 1], 2))
    ram = load_image(path).ram
    assert ram.touched_ranges() == [(0x2000, 0x3000), (0x3FFF000, 0x4000000)]
    assert ram.read(0x2FFF, 2) == b"\1\0"


@pytest.mark.parametrize(
    ("facts", "extents", "pages"),
    [
        (b"", [], 0),
        (b"[]", [], 0),
        (b"\xff\xff", [], 0),
        (b"[" * 100_000, [], 0),
        (b'{"ram_bytes": 67108864}', [], 0),
        (GOOD_FACTS.replace(b"{}", b"[]", 1), [], 0),
        (GOOD_FACTS.replace(b"{}", b'{"a": "!"}', 1), [], 0),
        (GOOD_FACTS.replace(b"67108864,", b"1e300,", 1), [], 0),
        (GOOD_FACTS.replace(b"67108864,", b"Infinity,", 1), [], 0),
        (GOOD_FACTS.replace(b"67108864,", b"67108863,", 1), [], 0),
        (GOOD_FACTS.replace(b"System RAM", b"nothing"), [], 0),
        (GOOD_FACTS, [0, 2], 1),
        (GOOD_FACTS, [16384, 1], 1),
        (GOOD_FACTS, [(1 << 64) - 1, 1], 1),
        (GOOD_FACTS, [1, (1 << 64) - 1], 1),
        (GOOD_FACTS, [5, 1, 4, 1], 2),
        (GOOD_FACTS, [5, 2, 6, 1], 3),
        (GOOD_FACTS, [5, 0], 1),
        (GOOD_FACTS, [5, 0, 6, 2], 2),
    ],
)
def test_hostile_images_are_refused(
    tmp_path: Path, facts: bytes, extents: list[int], pages: int
) -> None:
    """Right checksums do not help an image that makes no sense."""
    path = tmp_path / "m.img"
    path.write_bytes(sealed(facts, extents, pages))
    with pytest.raises(InputError, match=r"m.img: "):
        load_image(path)
