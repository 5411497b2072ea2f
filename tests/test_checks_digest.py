"""Fingerprints of memory: what changes them, what they skip, and that they never differ by luck."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from khosim.checks.digest import Digests, changed_pages, digest_ranges
from khosim.checks.reader import PageImage
from khosim.errors import RamFault


class Ram:
    """Flat memory that may tell which of its ranges were ever written."""

    def __init__(self, len_bytes: int, base: int = 0) -> None:
        self.base = base
        self.data = np.zeros(len_bytes, dtype=np.uint8)
        self.reads = 0

    def view(self, phys: int, len_bytes: int, /) -> np.ndarray:
        """Bytes as an array, counted."""
        at = phys - self.base
        if at < 0 or at + len_bytes > len(self.data):
            raise RamFault(phys, len_bytes, "no RAM")
        self.reads += len_bytes
        return self.data[at : at + len_bytes]

    def read(self, phys: int, len_bytes: int, /) -> bytes:
        """Bytes as a copy."""
        return bytes(self.view(phys, len_bytes))


class TouchedRam(Ram):
    """The same, with a record of what was written."""

    touched: tuple[tuple[int, int], ...] = ()

    def touched_ranges(self) -> tuple[tuple[int, int], ...]:
        """Sorted ranges outside of which everything is zero."""
        return self.touched


def filled(pages: int = 8, page_size: int = 4096, seed: int = 0) -> Ram:
    """Memory with random contents."""
    ram = Ram(pages * page_size)
    ram.data[:] = np.frombuffer(random.Random(seed).randbytes(len(ram.data)), dtype=np.uint8)
    return ram


def test_equal_memory_equal_digests() -> None:
    """The same bytes give the same digests, whichever way the ranges are cut."""
    ram = filled(200)
    whole = digest_ranges(ram, [(0, 200 * 4096)])
    singly = digest_ranges(ram, [(n * 4096, (n + 1) * 4096) for n in range(200)])
    mixed = digest_ranges(ram, [(0, 4096 * 3), (4096 * 3, 4096 * 150), (4096 * 150, 4096 * 200)])
    assert whole == singly == mixed
    assert len(whole.pages) == 200
    assert len(set(whole.pages.values())) == 200
    assert changed_pages(whole, singly) == []


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_any_changed_bit_is_seen(page_size: int) -> None:
    """One bit, two equal bits of different words, two words exchanged: the page is named."""
    ram = filled(4, page_size)
    before = digest_ranges(ram, [(0, 4 * page_size)], page_size)
    words = ram.data.view("<u8")
    rng = random.Random(page_size)
    nr_words = page_size // 8
    for _ in range(300):
        page = rng.randrange(4)
        kept = ram.data.copy()
        first, second = (page * nr_words + n for n in rng.sample(range(nr_words), 2))
        flip = np.uint64(1 << rng.randrange(64))
        how = rng.randrange(4)
        words[first] ^= flip
        if how == 1:
            words[second] ^= flip
        elif how == 2:
            words[first] = kept.view("<u8")[second]
            words[second] = kept.view("<u8")[first]
        elif how == 3:
            words[page * nr_words : (page + 1) * nr_words] ^= flip
        after = digest_ranges(ram, [(0, 4 * page_size)], page_size)
        assert changed_pages(before, after) == [page * page_size]
        assert changed_pages(after, before) == [page * page_size]
        ram.data[:] = kept


def test_the_top_bit_counts_twice() -> None:
    """Top bits of two words, which a plain weighted sum would cancel out, are seen."""
    ram = filled(1)
    before = digest_ranges(ram, [(0, 4096)])
    ram.data[7] ^= 0x80
    ram.data[4095] ^= 0x80
    assert changed_pages(before, digest_ranges(ram, [(0, 4096)])) == [0]


def test_zero_pages_are_not_stored() -> None:
    """A page of zeros is the same as one that was never written; one that becomes zero shows."""
    ram = filled(3)
    before = digest_ranges(ram, [(0, 3 * 4096)])
    ram.data[4096:8192] = 0
    after = digest_ranges(ram, [(0, 3 * 4096)])
    assert sorted(after.pages) == [0, 8192]
    assert changed_pages(before, after) == [4096]
    assert changed_pages(after, before) == [4096]


def test_untouched_memory_is_not_read() -> None:
    """A range of a terabyte with two touched pages costs two pages."""
    ram = TouchedRam(64 * 4096, base=1 << 39)
    ram.data[5 * 4096 + 7] = 1
    ram.data[9 * 4096] = 2
    start = 1 << 39
    ram.touched = (
        (start + 5 * 4096, start + 6 * 4096),
        (start + 9 * 4096, start + 9 * 4096 + 8),
        (start + 20 * 4096, start + 21 * 4096),
    )
    found = digest_ranges(ram, [(0, 1 << 40)])
    assert sorted(found.pages) == [start + 5 * 4096, start + 9 * 4096]
    assert ram.reads == 3 * 4096
    plain = Ram(64 * 4096, base=start)
    plain.data[:] = ram.data
    assert digest_ranges(plain, [(start, start + 64 * 4096)]) == found


def test_touched_ranges_are_cut_to_what_was_asked() -> None:
    """Of a touched range, only the pages inside of the asked ranges are digested."""
    ram = TouchedRam(64 * 4096)
    ram.data[:] = 3
    ram.touched = ((0, 64 * 4096),)
    found = digest_ranges(ram, [(4096, 8192), (40 * 4096, 42 * 4096), (0, 0)])
    assert sorted(found.pages) == [4096, 40 * 4096, 41 * 4096]
    assert ram.reads == 3 * 4096


def test_missing_memory_is_listed() -> None:
    """Ranges without RAM are told apart from zeros, and end at once however large."""
    ram = filled(2)
    found = digest_ranges(ram, [(0, 4096), (1 << 50, 1 << 60), (4096, 8192)])
    assert found.unreadable == ((1 << 50, 1 << 60),)
    assert sorted(found.pages) == [0, 4096]


def test_loose_pages() -> None:
    """The image of loose pages is as good a source as any."""
    ram = filled(2)
    loose = PageImage({0: bytes(ram.data[:4096]), 1: bytes(ram.data[4096:])}, 4096)
    ranges = [(0, 8192)]
    assert digest_ranges(loose, ranges) == digest_ranges(ram, ranges)


def test_digests_are_the_same_in_every_process() -> None:
    """A fixed page has a fixed digest, here and in a process with another hash seed."""
    code = (
        "from khosim.checks.digest import digest_ranges\n"
        "from khosim.checks.reader import PageImage\n"
        "page = bytes(n * n % 251 for n in range(4096))\n"
        "found = digest_ranges(PageImage({0: page}, 4096), [(0, 4096)]).pages[0]\n"
    )
    here: dict[str, int] = {}
    exec(code, here)
    done = subprocess.run(
        [sys.executable, "-c", code + "print(found)"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    )
    assert int(done.stdout) == here["found"]
    # The definition, word by word.
    page, total = bytes(n * n % 251 for n in range(4096)), 0
    for index in range(512):
        word = int.from_bytes(page[index * 8 : index * 8 + 8], "little")
        x = (index + 1) * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        total += (word ^ word >> 32) * ((x ^ x >> 31) | 1)
    assert here["found"] == total % 2**64


def test_nothing_to_compare() -> None:
    """Two empty digests are alike."""
    assert changed_pages(Digests(4096, {}, ()), Digests(4096, {}, ())) == []
