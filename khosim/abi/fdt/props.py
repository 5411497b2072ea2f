"""Reading a flattened device tree: strings, properties, ``compatible``, paths.

Models ``scripts/dtc/libfdt/fdt_ro.c`` (``fdt_get_string``, ``fdt_getprop``, property offsets,
``fdt_stringlist_contains``, ``fdt_node_check_compatible``, ``fdt_path_offset`` with aliases)
@ 7.3, under the rules that :mod:`khosim.abi.fdt.ro` states.

Left out: the other stringlist functions and ``fdt_get_property``, whose struct pointer means
nothing here.
"""

from __future__ import annotations

from struct import Struct

from khosim.abi.fdt._blob import (
    FDT_END,
    FDT_MAGIC,
    FDT_NOP,
    FDT_PROP,
    FDT_SW_MAGIC,
    INT_MAX,
    PROP,
    U32_MASK,
    Buffer,
    Header,
    Name,
    as_view,
    c_string,
    check_node_offset,
    find_nul,
    header_of,
    layout_of,
    next_tag,
    ro_probe,
    to_s32,
)
from khosim.abi.fdt.errors import (
    FDT_ERR_BADOFFSET,
    FDT_ERR_BADPATH,
    FDT_ERR_BADSTRUCTURE,
    FDT_ERR_INTERNAL,
    FDT_ERR_NOTFOUND,
    FDT_ERR_TRUNCATED,
)
from khosim.abi.fdt.ro import find_subnode

__all__ = (
    "fdt_first_property_offset",
    "fdt_get_string",
    "fdt_getprop",
    "fdt_getprop_by_offset",
    "fdt_next_property_offset",
    "fdt_node_check_compatible",
    "fdt_path_offset",
    "fdt_stringlist_contains",
    "find_prop",
    "prop_value",
    "string_window",
)

_read_len_nameoff = Struct(">2I").unpack_from


def string_window(header: Header, stroffset: int, probed: int) -> tuple[int, int]:
    """``(absolute offset, bytes)`` in which the string must end; ``(-1, -error)`` where none is.

    ``stroffset`` is the raw 32-bit offset, ``probed`` what :func:`ro_probe` said.
    """
    if probed < 0:
        return -1, probed
    offset = to_s32(stroffset)
    start = (stroffset + header[3]) & U32_MASK
    if start >= probed:
        return -1, -FDT_ERR_BADOFFSET
    len_bytes = probed - start
    if header[0] == FDT_SW_MAGIC:
        if offset >= 0 or -offset > header[8]:
            return -1, -FDT_ERR_BADOFFSET
        return start, min(len_bytes, -offset)
    if offset < 0:
        return -1, -FDT_ERR_BADOFFSET
    if header[5] >= 17:
        if offset >= header[8]:
            return -1, -FDT_ERR_BADOFFSET
        len_bytes = min(len_bytes, header[8] - offset)
    return start, len_bytes


def fdt_get_string(fdt: Buffer, stroffset: int, *, addr: int = 0) -> tuple[bytes | None, int]:
    """The string at ``stroffset`` of the strings block and its length, or ``(None, -error)``."""
    mv = as_view(fdt)
    header = header_of(mv)
    if header is None:
        return None, -FDT_ERR_TRUNCATED
    start, len_bytes = string_window(header, stroffset, ro_probe(header, addr))
    if start < 0:
        return None, len_bytes
    nul = find_nul(mv, start, start + len_bytes)
    if nul < 0:
        return None, -FDT_ERR_TRUNCATED
    return bytes(mv[start:nul]), nul - start


def _next_prop(mv: memoryview, base: int, limit: int, old: bool, offset: int) -> int:
    while True:
        tag, after = next_tag(mv, base, limit, old, offset)
        if tag == FDT_PROP:
            return offset
        if tag == FDT_END:
            return -FDT_ERR_BADSTRUCTURE if after >= 0 else after
        if tag != FDT_NOP:
            return -FDT_ERR_NOTFOUND
        offset = after


def fdt_first_property_offset(fdt: Buffer, nodeoffset: int) -> int:
    """Offset of the first property of the node at ``nodeoffset``, or -FDT_ERR_*."""
    mv = as_view(fdt)
    header = header_of(mv)
    if header is None:
        return -FDT_ERR_TRUNCATED
    base, limit, old = layout_of(header)
    after = check_node_offset(mv, base, limit, old, nodeoffset)
    return after if after < 0 else _next_prop(mv, base, limit, old, after)


def _check_prop_offset(mv: memoryview, base: int, limit: int, old: bool, offset: int) -> int:
    if offset < 0 or offset & 3:
        return -FDT_ERR_BADOFFSET
    tag, after = next_tag(mv, base, limit, old, offset)
    return after if tag == FDT_PROP else -FDT_ERR_BADOFFSET


def fdt_next_property_offset(fdt: Buffer, offset: int) -> int:
    """Offset of the property after the one at ``offset``, or -FDT_ERR_*."""
    mv = as_view(fdt)
    header = header_of(mv)
    if header is None:
        return -FDT_ERR_TRUNCATED
    base, limit, old = layout_of(header)
    after = _check_prop_offset(mv, base, limit, old, offset)
    return after if after < 0 else _next_prop(mv, base, limit, old, after)


def find_prop(
    mv: memoryview, header: Header, offset: int, name: bytes, addr: int = 0
) -> tuple[int, int]:
    """``(offset, bytes of value)`` of a node's property, or ``(-1, -error)``.

    ``fdt_get_property_namelen_``: a name that cannot be read is another name.
    """
    base, limit, old = layout_of(header)
    offset = check_node_offset(mv, base, limit, old, offset)
    if offset < 0:
        return -1, offset
    probed = ro_probe(header, addr)
    key = name + b"\0"
    len_key = len(key)
    off_strings = header[3]
    plain = header[0] == FDT_MAGIC and header[5] >= 17 and off_strings <= INT_MAX
    last_nameoff = min(header[8], INT_MAX) - len_key if plain else -1  # string_window, in short
    while True:
        tag, after = next_tag(mv, base, limit, old, offset)
        if tag == FDT_PROP:
            pos = base + offset
            if after < 0:
                return -1, -FDT_ERR_INTERNAL
            if pos + 12 > len(mv):
                return -1, -FDT_ERR_TRUNCATED
            len_bytes, nameoff = _read_len_nameoff(mv, pos + 4)
            if nameoff <= last_nameoff:
                start = off_strings + nameoff
                if start + len_key <= probed and mv[start : start + len_key] == key:
                    return offset, len_bytes
            elif last_nameoff < 0:
                start, len_window = string_window(header, nameoff, probed)
                if start >= 0 and len_window >= len_key and mv[start : start + len_key] == key:
                    return offset, len_bytes
        elif tag != FDT_NOP:
            if tag == FDT_END:
                return -1, -FDT_ERR_BADSTRUCTURE if after >= 0 else after
            return -1, -FDT_ERR_NOTFOUND
        offset = after


def _value_start(header: Header, offset: int, len_bytes: int) -> int:
    start = header[2] + offset + 12
    if header[5] < 16 and len_bytes >= 8 and (offset + 12) % 8:
        start += 4
    return start


def prop_value(
    mv: memoryview, header: Header, offset: int, len_bytes: int
) -> tuple[memoryview | None, int]:
    """The value of the property at ``offset``, or None where the buffer ends inside it."""
    start = _value_start(header, offset, len_bytes)
    if start + len_bytes > len(mv):
        return None, -FDT_ERR_TRUNCATED
    return mv[start : start + len_bytes], len_bytes


def fdt_getprop(
    fdt: Buffer, nodeoffset: int, name: Name, *, addr: int = 0
) -> tuple[memoryview | None, int]:
    """The value of property ``name`` and its length in bytes, or ``(None, -FDT_ERR_*)``.

    The value is a view into ``fdt``, like C's pointer: it changes when the tree does.
    """
    mv = as_view(fdt)
    header = header_of(mv)
    if header is None:
        return None, -FDT_ERR_TRUNCATED
    offset, len_bytes = find_prop(mv, header, nodeoffset, c_string(name), addr)
    return (None, len_bytes) if offset < 0 else prop_value(mv, header, offset, len_bytes)


def fdt_getprop_by_offset(
    fdt: Buffer, offset: int, *, addr: int = 0
) -> tuple[memoryview | None, int, bytes | None]:
    """Value, length in bytes and name of the property at ``offset``; (None, -error, None) if bad.

    A name that cannot be read is an error here, where :func:`fdt_getprop` passes it over.
    """
    mv = as_view(fdt)
    header = header_of(mv)
    if header is None:
        return None, -FDT_ERR_TRUNCATED, None
    base, limit, old = layout_of(header)
    err = _check_prop_offset(mv, base, limit, old, offset)
    if err < 0:
        return None, err, None
    if base + offset + 12 > len(mv):
        return None, -FDT_ERR_TRUNCATED, None
    _, len_bytes, nameoff = PROP.unpack_from(mv, base + offset)
    name, err = fdt_get_string(mv, nameoff, addr=addr)
    if name is None:
        return None, err, None
    value, err = prop_value(mv, header, offset, len_bytes)
    return value, err, name


def fdt_stringlist_contains(strlist: Buffer, listlen: int, string: Name) -> int:
    """1 where the list of NUL-terminated strings has ``string``, else 0.

    Like libfdt this looks one byte past ``listlen``: an unterminated last string counts when a NUL
    happens to follow it. Where that byte decides and ``strlist`` ends before it, the answer is
    -FDT_ERR_TRUNCATED.
    """
    key = c_string(string) + b"\0"
    if listlen < 0:
        return 0
    data = bytes(strlist[: listlen + 1])
    if data.startswith(key) or b"\0" + key in data:
        return 1
    if len(data) <= listlen:
        data += b"\0"
        if data.startswith(key) or b"\0" + key in data:
            return -FDT_ERR_TRUNCATED
    return 0


def fdt_node_check_compatible(
    fdt: Buffer, nodeoffset: int, compatible: Name, *, addr: int = 0
) -> int:
    """0 where the node is compatible, 1 where it says it is not, else -FDT_ERR_*."""
    mv = as_view(fdt)
    header = header_of(mv)
    if header is None:
        return -FDT_ERR_TRUNCATED
    offset, len_bytes = find_prop(mv, header, nodeoffset, b"compatible", addr)
    if offset < 0:
        return len_bytes
    start = _value_start(header, offset, len_bytes)
    if start + len_bytes > len(mv):
        return -FDT_ERR_TRUNCATED
    value = mv[start : start + len_bytes + 1]
    found = fdt_stringlist_contains(value, len_bytes, compatible)
    return found if found < 0 else 1 - found


def fdt_path_offset(fdt: Buffer, path: Name, *, addr: int = 0) -> int:
    """Offset of the node at ``path``; without a leading slash the first part is an alias."""
    mv = as_view(fdt)
    header = header_of(mv)
    if header is None:
        return -FDT_ERR_TRUNCATED
    probed = ro_probe(header, addr)
    if probed < 0:
        return probed
    raw = c_string(path)
    if not raw:
        return -FDT_ERR_BADPATH
    offset = 0
    if raw[0] != 0x2F:
        alias_name, _, rest = raw.partition(b"/")
        alias, len_alias = fdt_getprop(mv, fdt_path_offset(mv, b"/aliases"), alias_name)
        if alias is None or len_alias <= 0 or alias[0] != 0x2F or alias[-1] != 0:
            return -FDT_ERR_BADPATH
        offset = fdt_path_offset(mv, bytes(alias))
        raw = rest
    layout = layout_of(header)
    for part in raw.split(b"/"):
        if part:
            offset = find_subnode(mv, *layout, offset, part)
            if offset < 0:
                return offset
    return offset
