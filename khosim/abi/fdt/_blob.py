"""Where things lie in a flattened device tree, and the one function that steps over a tag.

Models ``scripts/dtc/libfdt/fdt.c`` (``fdt_ro_probe_``, ``fdt_offset_ptr``, ``fdt_next_tag``,
``fdt_check_node_offset_``) and the header of ``fdt.h`` @ 7.3, built as the kernel builds it: no
``ASSUME_*`` flag, so every check is in.

C arithmetic wraps at 32 bits; here the sums are exact and compared with ``limit``, the highest
structure offset that libfdt would let a read end at, which comes to the same. What libfdt would
read beyond the end of the buffer reads as ``-FDT_ERR_TRUNCATED``.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct

from khosim.abi.fdt.errors import (
    FDT_ERR_ALIGNMENT,
    FDT_ERR_BADMAGIC,
    FDT_ERR_BADOFFSET,
    FDT_ERR_BADSTATE,
    FDT_ERR_BADSTRUCTURE,
    FDT_ERR_BADVERSION,
    FDT_ERR_TRUNCATED,
)

__all__ = (
    "FDT_BEGIN_NODE",
    "FDT_END",
    "FDT_END_NODE",
    "FDT_FIRST_SUPPORTED_VERSION",
    "FDT_LAST_COMPATIBLE_VERSION",
    "FDT_LAST_SUPPORTED_VERSION",
    "FDT_MAGIC",
    "FDT_NOP",
    "FDT_PROP",
    "FDT_SW_MAGIC",
    "FDT_V17_SIZE",
    "HEADER",
    "INT_MAX",
    "OFF_DT_STRINGS",
    "OFF_DT_STRUCT",
    "OFF_LAST_COMP_VERSION",
    "OFF_MAGIC",
    "OFF_MEM_RSVMAP",
    "OFF_SIZE_DT_STRINGS",
    "OFF_SIZE_DT_STRUCT",
    "OFF_TOTALSIZE",
    "OFF_VERSION",
    "PROP",
    "RSV_ENTRY",
    "U32",
    "U32_MASK",
    "Buffer",
    "Header",
    "Name",
    "WritableBuffer",
    "as_view",
    "c_string",
    "check_node_offset",
    "find_nul",
    "header_of",
    "layout_of",
    "next_tag",
    "ro_probe",
    "to_s32",
)

Buffer = bytes | bytearray | memoryview
WritableBuffer = bytearray | memoryview
Name = str | bytes
#: magic, totalsize, off_dt_struct, off_dt_strings, off_mem_rsvmap, version, last_comp_version,
#: boot_cpuid_phys, size_dt_strings, size_dt_struct
Header = tuple[int, int, int, int, int, int, int, int, int, int]

FDT_MAGIC = 0xD00DFEED
FDT_SW_MAGIC = ~FDT_MAGIC & 0xFFFFFFFF
FDT_BEGIN_NODE = 1
FDT_END_NODE = 2
FDT_PROP = 3
FDT_NOP = 4
FDT_END = 9
FDT_FIRST_SUPPORTED_VERSION = 2
FDT_LAST_COMPATIBLE_VERSION = 16
FDT_LAST_SUPPORTED_VERSION = 17
FDT_V17_SIZE = 40

HEADER = Struct(">10I")
PROP = Struct(">3I")
RSV_ENTRY = Struct(">2Q")
U32 = Struct(">I")
OFF_MAGIC = 0
OFF_TOTALSIZE = 4
OFF_DT_STRUCT = 8
OFF_DT_STRINGS = 12
OFF_MEM_RSVMAP = 16
OFF_VERSION = 20
OFF_LAST_COMP_VERSION = 24
OFF_SIZE_DT_STRINGS = 32
OFF_SIZE_DT_STRUCT = 36

U32_MASK = 0xFFFFFFFF
INT_MAX = 0x7FFFFFFF

_read_header = HEADER.unpack_from
_read_u32 = U32.unpack_from
_read_2u32 = Struct(">2I").unpack_from


def as_view(buf: Buffer) -> memoryview:
    """``buf`` as a memoryview, without a copy."""
    return buf if buf.__class__ is memoryview else memoryview(buf)


@lru_cache(maxsize=256)
def c_string(name: Name) -> bytes:
    """``name`` as C would see it: bytes up to the first NUL."""
    if isinstance(name, str):
        raw = name.encode() if name.isascii() else name.encode("utf-8", "surrogateescape")
    else:
        raw = bytes(name)
    return raw if 0 not in raw else raw[: raw.index(0)]


def to_s32(value: int) -> int:
    """``value`` stored into a C ``int``."""
    value &= U32_MASK
    return value - 0x100000000 if value > INT_MAX else value


def header_of(mv: memoryview) -> Header | None:
    """The ten header words; None where the buffer ends inside the header.

    A header older than version 17 is 36 bytes long: its missing tenth word reads as 0.
    """
    if len(mv) >= FDT_V17_SIZE:
        return _read_header(mv)
    if len(mv) >= 36 and _read_u32(mv, OFF_VERSION)[0] < 17:
        return HEADER.unpack(bytes(mv[:36]) + bytes(4))
    return None


def layout_of(header: Header) -> tuple[int, int, bool]:
    """``(base, limit, old)`` of the structure block.

    Absolute byte offset of the block; highest offset in it at which a read may end; True for
    versions below 16, which align values and store full paths.
    """
    base, version = header[2], header[5]
    limit = header[1] - base
    if version >= 17 and header[9] < limit:
        limit = header[9]
    return base, limit, version < 16


def ro_probe(header: Header, addr: int = 0) -> int:
    """``fdt_ro_probe_``: the total size in bytes, or what is wrong with the header."""
    if addr & 7:
        return -FDT_ERR_ALIGNMENT
    magic = header[0]
    if magic == FDT_MAGIC:
        if header[5] < FDT_FIRST_SUPPORTED_VERSION or header[6] > FDT_LAST_SUPPORTED_VERSION:
            return -FDT_ERR_BADVERSION
    elif magic == FDT_SW_MAGIC:
        if header[9] == 0:
            return -FDT_ERR_BADSTATE
    else:
        return -FDT_ERR_BADMAGIC
    return header[1] if header[1] < INT_MAX else -FDT_ERR_TRUNCATED


def find_nul(mv: memoryview, start: int, stop: int) -> int:
    """Absolute offset of the first NUL in ``[start, stop)``.

    Without one: ``-FDT_ERR_BADSTRUCTURE``, or ``-FDT_ERR_TRUNCATED`` where the buffer ends first.
    """
    end = min(stop, len(mv))
    len_chunk = 64
    while start < end:
        chunk_end = min(start + len_chunk, end)
        at = bytes(mv[start:chunk_end]).find(0)
        if at >= 0:
            return start + at
        start = chunk_end
        len_chunk = min(len_chunk * 4, 1 << 20)
    return -FDT_ERR_TRUNCATED if len(mv) < stop and start < stop else -FDT_ERR_BADSTRUCTURE


def next_tag(mv: memoryview, base: int, limit: int, old: bool, offset: int) -> tuple[int, int]:
    """``fdt_next_tag``: the tag at ``offset`` and the offset after it.

    ``base``, ``limit`` and ``old`` come from :func:`layout_of`. Trouble is ``(FDT_END, -error)``.
    """
    after = offset + 4
    pos = base + offset
    room = len(mv) - pos
    if offset < 0 or after > limit or room < 4:
        return FDT_END, -FDT_ERR_TRUNCATED
    tag: int
    len_bytes: int
    tag, len_bytes = _read_2u32(mv, pos) if room >= 8 else (_read_u32(mv, pos)[0], 0)
    if tag == FDT_PROP:
        if after + 4 > limit:
            return FDT_END, -FDT_ERR_BADSTRUCTURE
        if room < 8:
            return FDT_END, -FDT_ERR_TRUNCATED
        after += len_bytes
        if after >= INT_MAX:
            return FDT_END, -FDT_ERR_BADSTRUCTURE
        after += 8
        if old and len_bytes >= 8 and (after - len_bytes) % 8:
            after += 4
        if after > limit:
            return FDT_END, -FDT_ERR_BADSTRUCTURE
        after = (after + 3) & ~3
        return FDT_PROP, after if after <= INT_MAX else after - 0x100000000
    if tag == FDT_BEGIN_NODE:
        after += bytes(mv[pos + 4 : pos + 36]).find(0)
        if after < offset + 4 or after >= limit:  # not within 32 bytes, or beyond the structure
            nul = find_nul(mv, pos + 4, base + limit)
            if nul < 0:
                return FDT_END, nul
            after = nul - base
        return FDT_BEGIN_NODE, (after + 4) & ~3
    if tag in (FDT_END_NODE, FDT_NOP, FDT_END):
        return tag, (after + 3) & ~3
    return FDT_END, -FDT_ERR_BADSTRUCTURE


def check_node_offset(mv: memoryview, base: int, limit: int, old: bool, offset: int) -> int:
    """``fdt_check_node_offset_``: the offset after the node's begin tag, or -FDT_ERR_BADOFFSET."""
    if offset < 0 or offset & 3:
        return -FDT_ERR_BADOFFSET
    tag, after = next_tag(mv, base, limit, old, offset)
    return after if tag == FDT_BEGIN_NODE else -FDT_ERR_BADOFFSET
