"""The bytes of kho-v1: each layout worked out by hand from the structures."""

from __future__ import annotations

import pytest

from khosim.abi.kho_v1 import (
    ChunkHdr,
    Element,
    chunk_capacity,
    pack_chunk_hdr,
    pack_element,
    unpack_chunk_hdr,
    unpack_element,
)


def test_a_chunk_header() -> None:
    """u64 next, u32 order, u32 num_elms, lowest byte first."""
    data = pack_chunk_hdr(ChunkHdr(next_phys=0x57F000, order=9, num_elms=255))
    assert data == bytes.fromhex("00f057000000000009000000ff000000")
    assert unpack_chunk_hdr(data) == ChunkHdr(0x57F000, 9, 255)


def test_an_element() -> None:
    """u64 phys_start, u64 bitmap: the second 16 MiB window of order 0, its bitmap at 0x55f400."""
    data = pack_element(Element(phys_start=0x1000000, bitmap_phys=0x55F400))
    assert data == bytes.fromhex("000000010000000000f4550000000000")
    assert unpack_element(data) == Element(0x1000000, 0x55F400)


@pytest.mark.parametrize(("page_size", "capacity"), [(4096, 255), (16384, 1023), (65536, 4095)])
def test_how_many_elements_a_chunk_has(page_size: int, capacity: int) -> None:
    """What is left of a page after 16 bytes, in elements of 16."""
    assert chunk_capacity(page_size) == capacity
