"""How a memfd is handed over: one descriptor, and a record for each folio.

Layout of ``include/linux/kho/abi/memfd.h`` @ 7.1 .. 7.3 (``memfd-v2``), packed, little-endian.
``struct memfd_luo_ser`` (48 bytes): u64 ``pos``, u64 ``size``, u32 ``seals``, u32 ``flags`` (0),
u64 ``nr_folios``, then the :mod:`khosim.abi.kho_vmalloc` descriptor of the records. ``struct
memfd_luo_folio_ser`` (16 bytes): a u64 with the pfn in its low 52 bits and flags in the high 12,
and u64 ``index``, the folio's offset in the file in pages.

``memfd-v1`` of 6.19 and 7.0 has neither seals nor flags: 40 bytes.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import NamedTuple

from khosim.abi.kho_vmalloc import KhoVmalloc, pack_kho_vmalloc, unpack_kho_vmalloc

__all__ = (
    "F_SEAL_EXEC",
    "F_SEAL_FUTURE_WRITE",
    "F_SEAL_GROW",
    "F_SEAL_SEAL",
    "F_SEAL_SHRINK",
    "F_SEAL_WRITE",
    "LAYOUTS",
    "MEMFD_LUO_ALL_SEALS",
    "MEMFD_LUO_FH_COMPATIBLE",
    "MEMFD_LUO_FOLIO_DIRTY",
    "MEMFD_LUO_FOLIO_SER_BYTES",
    "MEMFD_LUO_FOLIO_UPTODATE",
    "MEMFD_LUO_PFN_BITS",
    "MEMFD_LUO_SER_BYTES",
    "MEMFD_LUO_SER_FOLIOS_OFFSET",
    "MEMFD_LUO_SER_NR_FOLIOS_OFFSET",
    "MEMFD_LUO_SER_POS_OFFSET",
    "MEMFD_LUO_SER_SEALS_OFFSET",
    "MEMFD_LUO_SER_SIZE_OFFSET",
    "MemfdLayout",
    "MemfdLuoFolioSer",
    "MemfdLuoSer",
    "pack_memfd_luo_folio_ser",
    "pack_memfd_luo_ser",
    "unpack_memfd_luo_folio_ser",
    "unpack_memfd_luo_ser",
)

MEMFD_LUO_FH_COMPATIBLE = "memfd-v2"

# include/uapi/linux/fcntl.h
F_SEAL_SEAL = 0x0001
F_SEAL_SHRINK = 0x0002
F_SEAL_GROW = 0x0004
F_SEAL_WRITE = 0x0008
F_SEAL_FUTURE_WRITE = 0x0010
F_SEAL_EXEC = 0x0020
MEMFD_LUO_ALL_SEALS = (
    F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_FUTURE_WRITE | F_SEAL_EXEC
)
"""The seals that memfd-v2 can hand over."""

MEMFD_LUO_FOLIO_DIRTY = 1 << 0
MEMFD_LUO_FOLIO_UPTODATE = 1 << 1
MEMFD_LUO_PFN_BITS = 52
_PFN_MASK = (1 << MEMFD_LUO_PFN_BITS) - 1

_SER = struct.Struct("<QQIIQ16s")
_SER_V1 = struct.Struct("<QQQ16s")
_FOLIO = struct.Struct("<QQ")
MEMFD_LUO_SER_BYTES = _SER.size
MEMFD_LUO_FOLIO_SER_BYTES = _FOLIO.size
MEMFD_LUO_SER_POS_OFFSET = 0
MEMFD_LUO_SER_SIZE_OFFSET = 8
MEMFD_LUO_SER_SEALS_OFFSET = 16
MEMFD_LUO_SER_NR_FOLIOS_OFFSET = 24
MEMFD_LUO_SER_FOLIOS_OFFSET = 32


class MemfdLayout(NamedTuple):
    """What differs between the formats of a descriptor; ``seals_offset`` is 0 without seals."""

    compatible: str
    ser_bytes: int
    seals_offset: int
    nr_folios_offset: int
    folios_offset: int


LAYOUTS = {
    "memfd-v1": MemfdLayout("memfd-v1", _SER_V1.size, 0, 16, 24),
    "memfd-v2": MemfdLayout("memfd-v2", _SER.size, 16, 24, 32),
}
"""By the name of the file handler; memfd-v1 is that of 6.19 and 7.0."""


@dataclasses.dataclass(frozen=True, slots=True)
class MemfdLuoSer:
    """``struct memfd_luo_ser``: ``pos`` and ``size`` in bytes."""

    pos: int
    size: int
    seals: int
    flags: int
    nr_folios: int
    folios: KhoVmalloc


@dataclasses.dataclass(frozen=True, slots=True)
class MemfdLuoFolioSer:
    """``struct memfd_luo_folio_ser``: ``index`` in pages from the start of the file."""

    pfn: int
    flags: int
    index: int


def pack_memfd_luo_ser(ser: MemfdLuoSer, layout: MemfdLayout | None = None) -> bytes:
    """The 48 bytes of a descriptor, or the 40 of a memfd-v1; memfd-v2 by default."""
    folios = pack_kho_vmalloc(ser.folios)
    if layout is not None and not layout.seals_offset:
        return _SER_V1.pack(ser.pos, ser.size, ser.nr_folios, folios)
    return _SER.pack(ser.pos, ser.size, ser.seals, ser.flags, ser.nr_folios, folios)


def unpack_memfd_luo_ser(
    data: bytes, offset: int = 0, layout: MemfdLayout | None = None
) -> MemfdLuoSer:
    """The descriptor at ``data[offset:]``; memfd-v2 by default."""
    if layout is not None and not layout.seals_offset:
        pos, size, nr_folios, folios = _SER_V1.unpack_from(data, offset)
        return MemfdLuoSer(pos, size, 0, 0, nr_folios, unpack_kho_vmalloc(folios))
    pos, size, seals, flags, nr_folios, folios = _SER.unpack_from(data, offset)
    return MemfdLuoSer(pos, size, seals, flags, nr_folios, unpack_kho_vmalloc(folios))


def pack_memfd_luo_folio_ser(folio: MemfdLuoFolioSer) -> bytes:
    """The 16 bytes of a record; pfn and flags are cut to 52 and 12 bits, as bitfields are."""
    word = (folio.pfn & _PFN_MASK) | (folio.flags & 0xFFF) << MEMFD_LUO_PFN_BITS
    return _FOLIO.pack(word, folio.index)


def unpack_memfd_luo_folio_ser(data: bytes, offset: int = 0) -> MemfdLuoFolioSer:
    """The record at ``data[offset:]``."""
    word, index = _FOLIO.unpack_from(data, offset)
    return MemfdLuoFolioSer(word & _PFN_MASK, word >> MEMFD_LUO_PFN_BITS, index)
