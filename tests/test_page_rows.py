"""Rows of pages as memory: reads within, across and beyond them."""

from __future__ import annotations

import numpy as np
import pytest

from khosim.capture.page_rows import PageRows
from khosim.errors import RamFault


@pytest.mark.parametrize("page_size", [4096, 16384])
def test_reads_agree_with_a_dictionary(page_size: int) -> None:
    """Every range whose pages are all there is read; any other is a fault."""
    rng = np.random.default_rng(7)
    pfns = [3, 4, 5, 9, 10, 20]
    data = rng.integers(0, 256, (len(pfns), page_size), dtype=np.uint8)
    rows = PageRows(np.array(pfns, dtype=np.uint64), data)
    plain = {pfn: bytes(row) for pfn, row in zip(pfns, data, strict=True)}
    read = 0
    for _ in range(400):
        phys = int(rng.integers(2 * page_size, 22 * page_size))
        size = int(rng.integers(0, 4 * page_size))
        wanted = range(phys // page_size, max(phys, phys + size - 1) // page_size + 1)
        if all(pfn in plain for pfn in wanted):
            offset = phys % page_size
            whole = b"".join(plain[pfn] for pfn in wanted)
            assert rows.read(phys, size) == whole[offset : offset + size]
            assert rows.view(phys, size).tobytes() == whole[offset : offset + size]
            read += 1
        else:
            with pytest.raises(RamFault, match="is not in this image"):
                rows.read(phys, size)
    assert 20 < read < 380
    for phys, size in ((-1, 1), (3 * page_size, -1), (1 << 60, 1), (3 * page_size, 1 << 60)):
        with pytest.raises(RamFault):
            rows.view(phys, size)


def test_pages_are_found_by_their_beginning() -> None:
    """At each 4 KiB of larger pages, and nowhere else."""
    data = np.zeros((2, 16384), dtype=np.uint8)
    for row, at in ((0, 0), (0, 8192), (1, 4096), (1, 100)):
        data[row, at : at + 2] = (0xD0, 0x0D)
    rows = PageRows(np.array([2, 7], dtype=np.uint64), data)
    assert sorted(rows.pages_with(b"\xd0\x0d")) == [
        2 * 16384,
        2 * 16384 + 8192,
        7 * 16384 + 4096,
    ]
