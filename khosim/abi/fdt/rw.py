"""Editing a finished tree in place, by splicing the flat buffer.

Models the nodes, properties and reserve entries of ``scripts/dtc/libfdt/fdt_rw.c`` @ 7.3. New
nodes go before their siblings, new properties before the node's others, new strings behind the
string table. Padding keeps whatever bytes the splice left there, as in C. Offsets handed out
earlier are stale after an edit.

Return values are libfdt's: 0, an offset, or ``-FDT_ERR_*``. Where C would write past the buffer
the answer is -FDT_ERR_TRUNCATED and nothing moves.
Left out: ``fdt_set_name``, phandles, overlays, ``fdt_wip.c``.
"""

from __future__ import annotations

from struct import Struct

from khosim.abi.fdt._blob import (
    FDT_BEGIN_NODE,
    FDT_END_NODE,
    FDT_LAST_SUPPORTED_VERSION,
    FDT_NOP,
    FDT_PROP,
    FDT_V17_SIZE,
    OFF_DT_STRINGS,
    OFF_DT_STRUCT,
    OFF_SIZE_DT_STRINGS,
    OFF_SIZE_DT_STRUCT,
    OFF_VERSION,
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
    check_node_offset,
    header_of,
    layout_of,
    next_tag,
    ro_probe,
)
from khosim.abi.fdt.errors import (
    FDT_ERR_BADLAYOUT,
    FDT_ERR_BADOFFSET,
    FDT_ERR_BADVERSION,
    FDT_ERR_EXISTS,
    FDT_ERR_INTERNAL,
    FDT_ERR_NOSPACE,
    FDT_ERR_NOTFOUND,
    FDT_ERR_TRUNCATED,
)
from khosim.abi.fdt.props import find_prop
from khosim.abi.fdt.ro import count_mem_rsv, find_subnode, walk_node

__all__ = (
    "blocks_misordered",
    "fdt_add_mem_rsv",
    "fdt_add_subnode",
    "fdt_appendprop",
    "fdt_del_mem_rsv",
    "fdt_del_node",
    "fdt_delprop",
    "fdt_setprop",
    "fdt_setprop_placeholder",
    "fdt_setprop_string",
    "fdt_setprop_u32",
    "fdt_setprop_u64",
    "rw_probe",
)

_put_u32 = U32.pack_into
_put_prop = PROP.pack_into
_U64 = Struct(">Q")


def blocks_misordered(header: Header, len_rsv: int, len_struct: int) -> bool:
    """``fdt_blocks_misordered_``: not reserve map, structure, strings in this order."""
    _, total, off_struct, off_strings, off_rsv, _, _, _, len_strings, _ = header
    return (
        off_rsv < FDT_V17_SIZE
        or off_struct < (off_rsv + len_rsv) & U32_MASK
        or off_strings < (off_struct + len_struct) & U32_MASK
        or total < (off_strings + len_strings) & U32_MASK
    )


def rw_probe(mv: memoryview) -> Header | int:
    """``fdt_rw_probe_``: the header of a tree that can be edited, or -FDT_ERR_*."""
    header = header_of(mv)
    if header is None:
        return -FDT_ERR_TRUNCATED
    err = ro_probe(header)
    if err < 0:
        return err
    if header[5] < 17:
        return -FDT_ERR_BADVERSION
    if blocks_misordered(header, RSV_ENTRY.size, header[9]):
        return -FDT_ERR_BADLAYOUT
    if header[5] > FDT_LAST_SUPPORTED_VERSION:
        _put_u32(mv, OFF_VERSION, FDT_LAST_SUPPORTED_VERSION)
    return header


def _splice(mv: memoryview, header: Header, pos: int, oldlen: int, newlen: int) -> int:
    """Replace ``oldlen`` bytes at absolute ``pos`` by ``newlen``, moving all behind: 0 or error."""
    end = (header[3] + header[8]) & U32_MASK
    if pos + oldlen > end:
        return -FDT_ERR_BADOFFSET
    new_end = end - oldlen + newlen
    if new_end > header[1]:
        return -FDT_ERR_NOSPACE
    if new_end > len(mv) or end > len(mv):
        return -FDT_ERR_TRUNCATED
    mv[pos + newlen : new_end] = mv[pos + oldlen : end]
    return 0


def _splice_struct(mv: memoryview, header: Header, pos: int, oldlen: int, newlen: int) -> int:
    err = _splice(mv, header, pos, oldlen, newlen)
    if err == 0:
        delta = newlen - oldlen
        _put_u32(mv, OFF_SIZE_DT_STRUCT, (header[9] + delta) & U32_MASK)
        _put_u32(mv, OFF_DT_STRINGS, (header[3] + delta) & U32_MASK)
    return err


def _find_add_string(mv: memoryview, header: Header, key: bytes) -> tuple[int, bool]:
    """Offset of ``key`` (with its NUL) in the strings and whether it had to be appended.

    Any place in the table will do, the tail of a longer string too.
    """
    start, len_strings = header[3], header[8]
    if start + len_strings > len(mv):
        return -FDT_ERR_TRUNCATED, False
    at = bytes(mv[start : start + len_strings]).find(key)
    if at >= 0:
        return at, False
    end = start + len_strings
    err = _splice(mv, header, end, 0, len(key))
    if err:
        return err, False
    _put_u32(mv, OFF_SIZE_DT_STRINGS, len_strings + len(key))
    mv[end : end + len(key)] = key
    return len_strings, True


def _add_property(
    mv: memoryview, header: Header, nodeoffset: int, name: bytes, len_bytes: int
) -> int:
    """``fdt_add_property_``: absolute offset of the new property's value, or -FDT_ERR_*."""
    base, limit, old = layout_of(header)
    offset = check_node_offset(mv, base, limit, old, nodeoffset)
    if offset < 0:
        return offset
    key = name + b"\0"
    nameoff, allocated = _find_add_string(mv, header, key)
    if nameoff < 0:
        return nameoff
    if allocated:
        header = (*header[:8], header[8] + len(key), header[9])
    pos = base + offset
    err = _splice_struct(mv, header, pos, 0, 12 + ((len_bytes + 3) & ~3))
    if err:
        if allocated:
            _put_u32(mv, OFF_SIZE_DT_STRINGS, header[8] - len(key))
        return err
    _put_prop(mv, pos, FDT_PROP, len_bytes, nameoff)
    return pos + 12


def _place_property(mv: memoryview, nodeoffset: int, name: Name, len_bytes: int) -> int:
    """``fdt_setprop_placeholder``: absolute offset of the value, or -FDT_ERR_*."""
    header = rw_probe(mv)
    if isinstance(header, int):
        return header
    raw = c_string(name)
    offset, oldlen = find_prop(mv, header, nodeoffset, raw)
    if offset < 0:
        if oldlen != -FDT_ERR_NOTFOUND:
            return oldlen
        return _add_property(mv, header, nodeoffset, raw, len_bytes)
    pos = header[2] + offset + 12
    err = _splice_struct(mv, header, pos, (oldlen + 3) & ~3, (len_bytes + 3) & ~3)
    if err:
        return err
    _put_u32(mv, pos - 8, len_bytes)
    return pos


def fdt_setprop_placeholder(
    fdt: WritableBuffer, nodeoffset: int, name: Name, len_bytes: int
) -> tuple[int, memoryview | None]:
    """Resize or create a property and hand out its value to be filled in: ``(err, view)``."""
    mv = as_view(fdt)
    pos = _place_property(mv, nodeoffset, name, len_bytes)
    return (pos, None) if pos < 0 else (0, mv[pos : pos + len_bytes])


def fdt_setprop(fdt: WritableBuffer, nodeoffset: int, name: Name, value: Buffer) -> int:
    """Set a property of the node at ``nodeoffset``: in its place, or new before the others."""
    mv = as_view(fdt)
    len_bytes = len(value)
    pos = _place_property(mv, nodeoffset, name, len_bytes)
    if pos < 0:
        return pos
    mv[pos : pos + len_bytes] = value
    return 0


def fdt_setprop_u32(fdt: WritableBuffer, nodeoffset: int, name: Name, value: int) -> int:
    """Set a property to one big-endian 32-bit cell."""
    return fdt_setprop(fdt, nodeoffset, name, U32.pack(value))


def fdt_setprop_u64(fdt: WritableBuffer, nodeoffset: int, name: Name, value: int) -> int:
    """Set a property to a big-endian 64-bit value (two cells)."""
    return fdt_setprop(fdt, nodeoffset, name, _U64.pack(value))


def fdt_setprop_string(fdt: WritableBuffer, nodeoffset: int, name: Name, string: Name) -> int:
    """Set a property to ``string`` with its NUL."""
    return fdt_setprop(fdt, nodeoffset, name, c_string(string) + b"\0")


def fdt_appendprop(fdt: WritableBuffer, nodeoffset: int, name: Name, value: Buffer) -> int:
    """Append bytes to a property, which is created where the node has none of that name."""
    mv = as_view(fdt)
    header = rw_probe(mv)
    if isinstance(header, int):
        return header
    raw = c_string(name)
    len_bytes = len(value)
    offset, oldlen = find_prop(mv, header, nodeoffset, raw)
    if offset >= 0:
        pos = header[2] + offset + 12
        newlen = oldlen + len_bytes
        err = _splice_struct(mv, header, pos, (oldlen + 3) & ~3, (newlen + 3) & ~3)
        if err:
            return err
        _put_u32(mv, pos - 8, newlen)
        pos += oldlen
    else:
        pos = _add_property(mv, header, nodeoffset, raw, len_bytes)
        if pos < 0:
            return pos
    mv[pos : pos + len_bytes] = value
    return 0


def fdt_delprop(fdt: WritableBuffer, nodeoffset: int, name: Name) -> int:
    """Delete a property; its name stays in the string table. -FDT_ERR_NOTFOUND without it."""
    mv = as_view(fdt)
    header = rw_probe(mv)
    if isinstance(header, int):
        return header
    offset, len_bytes = find_prop(mv, header, nodeoffset, c_string(name))
    if offset < 0:
        return len_bytes
    return _splice_struct(mv, header, header[2] + offset, 12 + ((len_bytes + 3) & ~3), 0)


def fdt_add_subnode(fdt: WritableBuffer, parentoffset: int, name: Name) -> int:
    """Add an empty child before the parent's other children: its offset, or -FDT_ERR_*.

    -FDT_ERR_EXISTS also where a child ``name@...`` stands and ``name`` has no unit address.
    """
    mv = as_view(fdt)
    header = rw_probe(mv)
    if isinstance(header, int):
        return header
    raw = c_string(name)
    base, limit, old = layout_of(header)
    offset = find_subnode(mv, base, limit, old, parentoffset, raw)
    if offset >= 0:
        return -FDT_ERR_EXISTS
    if offset != -FDT_ERR_NOTFOUND:
        return offset
    tag, after = next_tag(mv, base, limit, old, parentoffset)
    if tag != FDT_BEGIN_NODE:
        return -FDT_ERR_INTERNAL
    while True:
        offset = after
        tag, after = next_tag(mv, base, limit, old, offset)
        if tag != FDT_PROP and tag != FDT_NOP:
            break
    len_name = (len(raw) + 4) & ~3
    pos = base + offset
    err = _splice_struct(mv, header, pos, 0, 8 + len_name)
    if err:
        return err
    _put_u32(mv, pos, FDT_BEGIN_NODE)
    mv[pos + 4 : pos + 4 + len_name] = raw.ljust(len_name, b"\0")
    _put_u32(mv, pos + 4 + len_name, FDT_END_NODE)
    return offset


def fdt_del_node(fdt: WritableBuffer, nodeoffset: int) -> int:
    """Delete the node at ``nodeoffset`` with all below it."""
    mv = as_view(fdt)
    header = rw_probe(mv)
    if isinstance(header, int):
        return header
    base, limit, old = layout_of(header)
    offset, depth = nodeoffset, 0
    while offset >= 0 and depth >= 0:
        offset, depth = walk_node(mv, base, limit, old, offset, depth, counted=True)
    if offset < 0:
        return offset
    return _splice_struct(mv, header, base + nodeoffset, offset - nodeoffset, 0)


def _splice_mem_rsv(mv: memoryview, header: Header, pos: int, oldlen: int, newlen: int) -> int:
    err = _splice(mv, header, pos, oldlen, newlen)
    if err == 0:
        delta = newlen - oldlen
        _put_u32(mv, OFF_DT_STRUCT, (header[2] + delta) & U32_MASK)
        _put_u32(mv, OFF_DT_STRINGS, (header[3] + delta) & U32_MASK)
    return err


def fdt_add_mem_rsv(fdt: WritableBuffer, address: int, size: int) -> int:
    """Add ``[address, address + size)`` to the end of the reserve map."""
    mv = as_view(fdt)
    header = rw_probe(mv)
    if isinstance(header, int):
        return header
    pos = header[4] + 16 * count_mem_rsv(mv, header)
    if pos < header[4]:
        return -FDT_ERR_TRUNCATED  # C would splice before the map
    err = _splice_mem_rsv(mv, header, pos, 0, RSV_ENTRY.size)
    if err == 0:
        RSV_ENTRY.pack_into(mv, pos, address, size)
    return err


def fdt_del_mem_rsv(fdt: WritableBuffer, n: int) -> int:
    """Delete reserve entry ``n``; -FDT_ERR_NOTFOUND beyond the last."""
    mv = as_view(fdt)
    header = rw_probe(mv)
    if isinstance(header, int):
        return header
    if n < 0 or n >= count_mem_rsv(mv, header):
        return -FDT_ERR_NOTFOUND
    return _splice_mem_rsv(mv, header, header[4] + 16 * n, RSV_ENTRY.size, 0)
