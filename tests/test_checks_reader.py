"""Loose pages as memory, and the log of problems."""

from __future__ import annotations

import numpy as np
import pytest

from khosim.checks.reader import PageImage, Problem, ProblemLog, page_shift
from khosim.errors import InputError, RamFault

PAGES = {3: b"a" * 4096, 4: bytearray(b"b" * 4096), 6: b"c" * 4096}


@pytest.mark.parametrize(
    ("phys", "len_bytes", "expected"),
    [
        (3 * 4096, 4, b"aaaa"),
        (4 * 4096 + 4090, 6, b"bbbbbb"),
        (4 * 4096 - 2, 4, b"aabb"),
        (3 * 4096, 8192, b"a" * 4096 + b"b" * 4096),
        (3 * 4096, 0, b""),
        (4 * 4096 - 1, 4098, None),
        (5 * 4096 - 1, 2, None),
        (2 * 4096, 1, None),
        (-1, 4, None),
        (3 * 4096, -1, None),
        (1 << 70, 4, None),
    ],
)
def test_reading_loose_pages(phys: int, len_bytes: int, expected: bytes | None) -> None:
    """Known pages are read, also across their borders; everything else is no RAM."""
    ram = PageImage(PAGES, 4096)
    if expected is None:
        with pytest.raises(RamFault):
            ram.read(phys, len_bytes)
        with pytest.raises(RamFault):
            ram.view(phys, len_bytes)
    else:
        assert ram.read(phys, len_bytes) == expected
        assert ram.view(phys, len_bytes).dtype == np.uint8
        assert ram.view(phys, len_bytes).tobytes() == expected


def test_pages_are_seen_as_they_change() -> None:
    """The image holds no copy of its own."""
    pages = {1: bytearray(4096)}
    ram = PageImage(pages, 4096)
    pages[1][5] = 9
    assert ram.read(4096 + 5, 1) == b"\x09"
    assert not ram.view(4096, 4096).flags.writeable


def test_page_sizes() -> None:
    """The three page sizes have their shifts; others are refused."""
    assert [page_shift(size) for size in (4096, 16384, 65536)] == [12, 14, 16]
    with pytest.raises(InputError, match="page_size: 512"):
        PageImage({}, 512)


def test_one_kind_of_problem_does_not_hide_another() -> None:
    """Many problems of one kind are cut short, and counted; a later one of another kind stays."""
    log = ProblemLog()
    for number in range(1000):
        log.add("a", number, "wrong")
    log.add("b", 7, "also wrong")
    done = log.done()
    assert len(done) < 50
    assert done[0] == Problem("a", 0, "wrong")
    assert done[-2] == Problem("b", 7, "also wrong")
    assert done[-1].code == "more"
    assert done[-1].detail.startswith(f"{1000 - (len(done) - 2)} more")
    other = ProblemLog()
    other.extend(done)
    assert other.done() == done
    assert ProblemLog().done() == ()
    assert str(done[-2]) == "0x7: also wrong [b]"
