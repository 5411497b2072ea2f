"""Sequential write: a tree built front to back in one buffer.

Models ``scripts/dtc/libfdt/fdt_sw.c`` and ``fdt_empty_tree.c``'s call sequence @ 7.3. The state
(reserve map, structure, complete) lives in the header of the buffer, as in C: the structure grows
upwards from the reserve map at 0x30, the strings grow downwards from the end of the buffer, and
:func:`fdt_finish` moves the strings behind the structure. Return values are libfdt's: 0 or
``-FDT_ERR_*`` (_BADSTATE for a call out of turn).

A ``bufsize`` beyond the buffer is -FDT_ERR_NOSPACE, where C would write past it. Left out:
``fdt_resize``.
"""

from __future__ import annotations

from struct import Struct

from khosim.abi.fdt._blob import (
    FDT_BEGIN_NODE,
    FDT_END,
    FDT_END_NODE,
    FDT_LAST_COMPATIBLE_VERSION,
    FDT_LAST_SUPPORTED_VERSION,
    FDT_MAGIC,
    FDT_PROP,
    FDT_SW_MAGIC,
    HEADER,
    OFF_DT_STRINGS,
    OFF_DT_STRUCT,
    OFF_LAST_COMP_VERSION,
    OFF_MAGIC,
    OFF_SIZE_DT_STRINGS,
    OFF_SIZE_DT_STRUCT,
    OFF_TOTALSIZE,
    PROP,
    RSV_ENTRY,
    U32,
    U32_MASK,
    Buffer,
    Header,
    Name,
    WritableBuffer,
    as_view,
    c_string,
    header_of,
    layout_of,
    next_tag,
)
from khosim.abi.fdt.errors import (
    FDT_ERR_BADFLAGS,
    FDT_ERR_BADMAGIC,
    FDT_ERR_BADSTATE,
    FDT_ERR_NOSPACE,
    FDT_ERR_TRUNCATED,
)

__all__ = (
    "FDT_CREATE_FLAG_NO_NAME_DEDUP",
    "fdt_add_reservemap_entry",
    "fdt_begin_node",
    "fdt_create",
    "fdt_create_with_flags",
    "fdt_end_node",
    "fdt_finish",
    "fdt_finish_reservemap",
    "fdt_property",
    "fdt_property_placeholder",
    "fdt_property_string",
    "fdt_property_u32",
    "fdt_property_u64",
)

FDT_CREATE_FLAG_NO_NAME_DEDUP = 1

_HDRSIZE = 0x30  # the header, rounded up to the size of a reserve entry
_put_u32 = U32.pack_into
_put_prop = PROP.pack_into
_U64 = Struct(">Q")


def _probe(mv: memoryview) -> Header | int:
    """The header of a tree under construction, or -FDT_ERR_*."""
    header = header_of(mv)
    if header is None:
        return -FDT_ERR_TRUNCATED
    if header[0] != FDT_SW_MAGIC:
        return -FDT_ERR_BADSTATE if header[0] == FDT_MAGIC else -FDT_ERR_BADMAGIC
    return header


def _probe_struct(mv: memoryview) -> Header | int:
    """As :func:`_probe`, for calls allowed between finish_reservemap and finish."""
    header = _probe(mv)
    if not isinstance(header, int) and header[3] != header[1]:
        return -FDT_ERR_BADSTATE
    return header


def _grab_space(mv: memoryview, header: Header, len_bytes: int) -> int:
    """Claim bytes at the end of the structure: their absolute offset, or -FDT_ERR_NOSPACE."""
    offset = header[9]
    space_left = (header[1] - header[2] - header[8]) & U32_MASK
    pos = header[2] + offset
    if offset + len_bytes > space_left or pos + len_bytes > len(mv):
        return -FDT_ERR_NOSPACE
    _put_u32(mv, OFF_SIZE_DT_STRUCT, offset + len_bytes)
    return pos


def fdt_create_with_flags(buf: WritableBuffer, bufsize: int, flags: int) -> int:
    """Start a tree in the first ``bufsize`` bytes of ``buf``, which are cleared."""
    if bufsize < _HDRSIZE or bufsize > len(buf):
        return -FDT_ERR_NOSPACE
    if flags & ~FDT_CREATE_FLAG_NO_NAME_DEDUP:
        return -FDT_ERR_BADFLAGS
    mv = as_view(buf)
    mv[:bufsize] = bytes(bufsize)
    HEADER.pack_into(
        mv, 0, FDT_SW_MAGIC, bufsize, _HDRSIZE, 0, _HDRSIZE, FDT_LAST_SUPPORTED_VERSION, flags,
        0, 0, 0,
    )  # fmt: skip
    return 0


def fdt_create(buf: WritableBuffer, bufsize: int) -> int:
    """Start a tree in the first ``bufsize`` bytes of ``buf``: 0 or -FDT_ERR_NOSPACE."""
    return fdt_create_with_flags(buf, bufsize, 0)


def fdt_add_reservemap_entry(fdt: WritableBuffer, addr: int, size: int) -> int:
    """Add ``[addr, addr + size)`` to the reserve map, before any node."""
    mv = as_view(fdt)
    header = _probe(mv)
    if isinstance(header, int):
        return header
    if header[3] != 0:
        return -FDT_ERR_BADSTATE
    offset = header[2]
    if offset + RSV_ENTRY.size > header[1] or offset + RSV_ENTRY.size > len(mv):
        return -FDT_ERR_NOSPACE
    RSV_ENTRY.pack_into(mv, offset, addr, size)
    _put_u32(mv, OFF_DT_STRUCT, offset + RSV_ENTRY.size)
    return 0


def fdt_finish_reservemap(fdt: WritableBuffer) -> int:
    """End the reserve map; nodes may follow."""
    err = fdt_add_reservemap_entry(fdt, 0, 0)
    if err == 0:
        mv = as_view(fdt)
        mv[OFF_DT_STRINGS : OFF_DT_STRINGS + 4] = mv[OFF_TOTALSIZE : OFF_TOTALSIZE + 4]
    return err


def fdt_begin_node(fdt: WritableBuffer, name: Name) -> int:
    """Open a node called ``name`` (empty for the root)."""
    mv = as_view(fdt)
    header = _probe_struct(mv)
    if isinstance(header, int):
        return header
    raw = c_string(name) + b"\0"
    pos = _grab_space(mv, header, 4 + ((len(raw) + 3) & ~3))
    if pos < 0:
        return pos
    _put_u32(mv, pos, FDT_BEGIN_NODE)
    mv[pos + 4 : pos + 4 + len(raw)] = raw
    return 0


def fdt_end_node(fdt: WritableBuffer) -> int:
    """Close the innermost open node. Nesting is not checked, as in libfdt."""
    mv = as_view(fdt)
    header = _probe_struct(mv)
    if isinstance(header, int):
        return header
    pos = _grab_space(mv, header, 4)
    if pos < 0:
        return pos
    _put_u32(mv, pos, FDT_END_NODE)
    return 0


def _add_string(mv: memoryview, header: Header, raw: bytes) -> int:
    """``fdt_add_string_``: the negative offset of the new lowest string, or 0 for no room."""
    offset = header[8] + len(raw)
    pos = header[1] - offset
    if pos & U32_MASK < (header[2] + header[9]) & U32_MASK or not 0 <= pos <= len(mv) - len(raw):
        return 0
    mv[pos : pos + len(raw)] = raw
    _put_u32(mv, OFF_SIZE_DT_STRINGS, offset)
    return -offset


def _place_property(mv: memoryview, name: Name, len_bytes: int) -> int:
    """``fdt_property_placeholder``: absolute offset of the value, or -FDT_ERR_*."""
    header = _probe_struct(mv)
    if isinstance(header, int):
        return header
    raw = c_string(name) + b"\0"
    len_strings, end = header[8], header[1]
    if len_strings > end or end > len(mv):
        return -FDT_ERR_TRUNCATED
    nameoff = 0
    if len_strings and not header[6] & FDT_CREATE_FLAG_NO_NAME_DEDUP:
        at = bytes(mv[end - len_strings : end]).find(raw)
        if at >= 0:
            nameoff = at - len_strings
    allocated = nameoff == 0
    if allocated:
        nameoff = _add_string(mv, header, raw)
        if nameoff == 0:
            return -FDT_ERR_NOSPACE
        header = (*header[:8], -nameoff, header[9])
    pos = _grab_space(mv, header, 12 + ((len_bytes + 3) & ~3))
    if pos < 0:
        if allocated:
            _put_u32(mv, OFF_SIZE_DT_STRINGS, len_strings)
        return pos
    _put_prop(mv, pos, FDT_PROP, len_bytes, nameoff & U32_MASK)
    return pos + 12


def fdt_property_placeholder(
    fdt: WritableBuffer, name: Name, len_bytes: int
) -> tuple[int, memoryview | None]:
    """Add a property of ``len_bytes`` and hand out its value to be filled in: ``(err, view)``."""
    mv = as_view(fdt)
    pos = _place_property(mv, name, len_bytes)
    return (pos, None) if pos < 0 else (0, mv[pos : pos + len_bytes])


def fdt_property(fdt: WritableBuffer, name: Name, value: Buffer) -> int:
    """Add property ``name`` to the open node. A name already in use anywhere is shared."""
    mv = as_view(fdt)
    len_bytes = len(value)
    pos = _place_property(mv, name, len_bytes)
    if pos < 0:
        return pos
    mv[pos : pos + len_bytes] = value
    return 0


def fdt_property_string(fdt: WritableBuffer, name: Name, string: Name) -> int:
    """Add a property whose value is ``string`` with its NUL."""
    return fdt_property(fdt, name, c_string(string) + b"\0")


def fdt_property_u32(fdt: WritableBuffer, name: Name, value: int) -> int:
    """Add a property of one big-endian 32-bit cell."""
    return fdt_property(fdt, name, U32.pack(value))


def fdt_property_u64(fdt: WritableBuffer, name: Name, value: int) -> int:
    """Add a big-endian 64-bit property. (KHO's own u64 are native-endian: use fdt_property.)"""
    return fdt_property(fdt, name, _U64.pack(value))


def fdt_finish(fdt: WritableBuffer) -> int:
    """End the tree: strings move behind the structure, the total shrinks to what is used."""
    mv = as_view(fdt)
    header = _probe_struct(mv)
    if isinstance(header, int):
        return header
    pos = _grab_space(mv, header, 4)
    if pos < 0:
        return pos
    _put_u32(mv, pos, FDT_END)
    header = (*header[:9], header[9] + 4)
    len_strings = header[8]
    old_strings = header[1] - len_strings
    new_strings = pos + 4
    if old_strings < 0 or header[1] > len(mv) or new_strings + len_strings > len(mv):
        return -FDT_ERR_TRUNCATED
    mv[new_strings : new_strings + len_strings] = mv[old_strings : header[1]]
    _put_u32(mv, OFF_DT_STRINGS, new_strings)
    base, limit, old = layout_of(header)
    after = 0
    while True:
        offset = after
        tag, after = next_tag(mv, base, limit, old, offset)
        if tag == FDT_PROP:
            at = base + offset + 8
            _put_u32(mv, at, (U32.unpack_from(mv, at)[0] + len_strings) & U32_MASK)
        elif tag == FDT_END:
            break
    if after < 0:
        return after
    _put_u32(mv, OFF_TOTALSIZE, new_strings + len_strings)
    _put_u32(mv, OFF_LAST_COMP_VERSION, FDT_LAST_COMPATIBLE_VERSION)
    _put_u32(mv, OFF_MAGIC, FDT_MAGIC)
    return 0
