"""Raw images and the mapped memory under them: what is read, and what is touched."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from khosim.capture.mapped import MappedFile, MappedMemory, Segment, pages_with
from khosim.capture.raw_image import open_raw_image
from khosim.errors import InputError, RamFault

MAGIC = b"\xd0\x0d\xfe\xed"


def sparse(path: Path, size: int, parts: dict[int, bytes]) -> Path:
    """A file of ``size`` bytes with ``parts`` at their offsets and holes elsewhere."""
    with path.open("wb") as file:
        file.truncate(size)
        for at, data in parts.items():
            file.seek(at)
            file.write(data)
    return path


def test_offsets_are_addresses(tmp_path: Path) -> None:
    """A byte is read where it is, also with memory that begins elsewhere; views are no copies."""
    path = sparse(tmp_path / "ram", 5 << 30, {(4 << 30) + 5: b"hello"})
    ram = open_raw_image(path)
    assert ram.read((4 << 30) + 5, 5) == b"hello"
    assert ram.read(123, 3) == bytes(3)
    assert ram.view(0, 5 << 30).base is not None
    assert not ram.view(0, 16).flags.writeable
    shifted = open_raw_image(path, base_phys=1 << 30)
    assert shifted.read((5 << 30) + 5, 5) == b"hello"
    for phys, len_bytes in ((0, 1), ((1 << 30) - 1, 2), ((6 << 30) - 1, 2), (7 << 30, 1)):
        with pytest.raises(RamFault):
            shifted.read(phys, len_bytes)


def test_a_search_finds_page_starts_in_data_alone(tmp_path: Path) -> None:
    """Pages that begin with the words, wherever they are; nothing that merely contains them."""
    size = 3 << 30
    parts = {
        4096: MAGIC,
        8192 + 4: MAGIC,
        (1 << 30) + 8: MAGIC,
        (2 << 30): MAGIC + b"x",
        size - 4096: MAGIC,
    }
    ram = open_raw_image(sparse(tmp_path / "ram", size, parts))
    assert list(ram.pages_with(MAGIC)) == [4096, 2 << 30, size - 4096]
    touched = sum(end - start for start, end in ram.touched_ranges())
    assert touched < 64 << 20
    assert all(any(a <= at < b for a, b in ram.touched_ranges()) for at in parts)


def test_a_host_without_holes_is_searched_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the host knows no holes, all of the file counts as data."""
    ram = open_raw_image(sparse(tmp_path / "ram", 1 << 20, {40960: MAGIC}))

    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "lseek", refuse)
    assert ram.touched_ranges() == [(0, 1 << 20)]
    assert list(ram.pages_with(MAGIC)) == [40960]


def test_an_image_may_end_anywhere(tmp_path: Path) -> None:
    """Sizes that are no whole pages, down to one byte, are searched to their end."""
    for size in (1, 3, 4096, 4097, 4100, 12289):
        ram = open_raw_image(sparse(tmp_path / "ram", size, {size - 1: b"\xd0"}))
        assert list(ram.pages_with(MAGIC)) == []
        assert ram.read(size - 1, 1) == b"\xd0"


def test_segments_may_touch_and_overlap(tmp_path: Path) -> None:
    """Reads cross from one segment to the next; of two, the one that begins lower counts."""
    data = bytes(range(256)) * 64
    (tmp_path / "f").write_bytes(data)
    file = MappedFile(tmp_path / "f")
    ram = MappedMemory(
        file,
        [Segment(0x3000, 0x4000, 0x10), Segment(0x1000, 0x3000, 0x800), Segment(0x2800, 0x5000, 1)],
    )
    assert ram.segments == [
        Segment(0x1000, 0x3000, 0x800),
        Segment(0x3000, 0x5000, 0x801),
    ]
    expected = data[0x27F0:0x2800] + data[0x801:0x811]
    assert ram.read(0x2FF0, 32) == expected
    gap = MappedMemory(file, [Segment(0, 0x1000, 0), Segment(0x2000, 0x3000, 0)])
    for phys, len_bytes in (
        (0xFFF, 2),
        (0x1000, 1),
        (0xFFF, 0x1002),
        (0x3000, 1),
        (-1, 1),
        (0, -1),
    ):
        with pytest.raises(RamFault):
            gap.read(phys, len_bytes)
    assert gap.read(0x2FFF, 1) == data[0xFFF:0x1000]


def test_reads_agree_with_a_plain_copy(tmp_path: Path) -> None:
    """Random reads over random segments equal those from a dictionary of bytes."""
    rng = np.random.default_rng(5)
    data = rng.integers(0, 256, 4096, dtype=np.uint8).tobytes()
    (tmp_path / "f").write_bytes(data)
    file = MappedFile(tmp_path / "f")
    for _ in range(30):
        segments = []
        plain: dict[int, int] = {}
        for _ in range(rng.integers(1, 6)):
            start, size = (int(n) for n in rng.integers(0, 300, 2))
            offset = int(rng.integers(0, 3000))
            segments.append(Segment(start, start + size, offset))
        for start, end, offset in sorted(segments):
            for phys in range(start, end):
                plain.setdefault(phys, data[offset + phys - start])
        ram = MappedMemory(file, segments)
        for _ in range(40):
            phys, size = int(rng.integers(0, 600)), int(rng.integers(1, 200))
            wanted = [plain.get(at) for at in range(phys, phys + size)]
            if None in wanted:
                with pytest.raises(RamFault):
                    ram.read(phys, size)
            else:
                assert list(ram.read(phys, size)) == wanted


def test_pages_are_found_in_a_part_of_an_array() -> None:
    """Offsets count from the array's beginning, pages from the part's."""
    data = np.zeros(40000, dtype=np.uint8)
    for at in (100, 100 + 4096, 100 + 5000):
        data[at : at + 4] = np.frombuffer(MAGIC, dtype=np.uint8)
    assert list(pages_with(data, 100, 40000, MAGIC)) == [100, 4196]
    assert list(pages_with(data, 100, 4198, MAGIC)) == [100]


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (b"KDUMP   ", "makedumpfile -E"),
        (b"DISKDUMP", "makedumpfile -E"),
        (b"makedumpfile\0\0\0\0", "makedumpfile -R"),
        (b"EMiL", "LiME"),
        (b"QFI\xfb", "qcow2"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ],
)
def test_packed_dumps_are_refused_with_a_remedy(tmp_path: Path, head: bytes, word: str) -> None:
    """Formats that are no raw image are named, with what turns them into something readable."""
    (tmp_path / "dump").write_bytes(head.ljust(8192, b"\0"))
    with pytest.raises(InputError, match=word):
        open_raw_image(tmp_path / "dump")


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    """Missing and empty files, folders and pipes, and impossible addresses."""
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, cause in (
        ("missing", "No such file"),
        ("empty", "empty"),
        (".", "not a regular file"),
        ("pipe", "not a regular file"),
    ):
        with pytest.raises(InputError, match=cause):
            open_raw_image(tmp_path / name)
    (tmp_path / "page").write_bytes(bytes(4096))
    for base in (1, -4096, 1 << 52):
        with pytest.raises(InputError, match="not a page of any machine"):
            open_raw_image(tmp_path / "page", base_phys=base)
