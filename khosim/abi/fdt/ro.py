"""Reading a flattened device tree: header, tags, nodes and the reserve map.

Models ``scripts/dtc/libfdt/fdt.c`` (``fdt_check_header``, ``fdt_next_tag``, ``fdt_next_node``,
``fdt_first_subnode``, ``fdt_next_subnode``) and ``fdt_ro.c`` (names, children, reserve map) @ 7.3.
Every function takes a buffer with the tree at its start and returns libfdt's value or
``-FDT_ERR_*``; no bytes make one raise. Where libfdt would read past the buffer the answer is
``-FDT_ERR_TRUNCATED``. ``addr`` is the address at which the kernel sees the blob: libfdt refuses
one that is not a multiple of 8.

Left out: phandles, overlays, paths of nodes and the searches by value, which handover code does
not call. Walks are linear in the buffer; who reads from hostile RAM hands over no more of it than
the kernel would have mapped.
"""

from __future__ import annotations

from khosim.abi.fdt._blob import (
    FDT_BEGIN_NODE,
    FDT_END,
    FDT_END_NODE,
    FDT_FIRST_SUPPORTED_VERSION,
    FDT_LAST_SUPPORTED_VERSION,
    FDT_MAGIC,
    INT_MAX,
    OFF_TOTALSIZE,
    RSV_ENTRY,
    U32,
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
)
from khosim.abi.fdt.errors import (
    FDT_ERR_ALIGNMENT,
    FDT_ERR_BADMAGIC,
    FDT_ERR_BADOFFSET,
    FDT_ERR_BADSTRUCTURE,
    FDT_ERR_BADVERSION,
    FDT_ERR_NOTFOUND,
    FDT_ERR_TRUNCATED,
)

__all__ = (
    "count_mem_rsv",
    "fdt_check_header",
    "fdt_first_subnode",
    "fdt_get_mem_rsv",
    "fdt_get_name",
    "fdt_next_node",
    "fdt_next_subnode",
    "fdt_next_tag",
    "fdt_num_mem_rsv",
    "fdt_subnode_offset",
    "fdt_totalsize",
    "find_subnode",
    "header_size",
    "walk_node",
)

_read_u32 = U32.unpack_from


def fdt_totalsize(fdt: Buffer) -> int:
    """The header's total size in bytes, unchecked; -FDT_ERR_TRUNCATED in less than 8 bytes."""
    if len(fdt) < OFF_TOTALSIZE + 4:
        return -FDT_ERR_TRUNCATED
    totalsize: int = _read_u32(fdt, OFF_TOTALSIZE)[0]
    return totalsize


def header_size(version: int) -> int:
    """``fdt_header_size_``: bytes of header that a tree of this version has."""
    if version <= 2:
        return 28 if version <= 1 else 32
    return 36 if version <= 16 else 40


def fdt_check_header(fdt: Buffer, *, addr: int = 0) -> int:
    """0 where the header makes sense, else -FDT_ERR_ALIGNMENT, _BADMAGIC, _BADVERSION, _TRUNCATED.

    Looks at the header alone: the structure may still be rubbish. Kernel: ``fdt_check_header``.
    """
    if addr & 7:
        return -FDT_ERR_ALIGNMENT
    mv = as_view(fdt)
    header = header_of(mv)
    if header is None:
        if len(mv) >= 4 and _read_u32(mv)[0] != FDT_MAGIC:
            return -FDT_ERR_BADMAGIC
        return -FDT_ERR_TRUNCATED
    magic, total, off_struct, off_strings, off_rsv, version, last_comp, _, s_strings, s_struct = (
        header
    )
    if magic != FDT_MAGIC:
        return -FDT_ERR_BADMAGIC
    if (
        version < FDT_FIRST_SUPPORTED_VERSION
        or last_comp > FDT_LAST_SUPPORTED_VERSION
        or version < last_comp
    ):
        return -FDT_ERR_BADVERSION
    hdrsize = header_size(version)
    if total < hdrsize or total > INT_MAX:
        return -FDT_ERR_TRUNCATED
    if off_rsv & 7 or off_struct & 3:
        return -FDT_ERR_ALIGNMENT
    if version < 17:
        s_struct = 0
    if not (
        hdrsize <= off_rsv <= total
        and hdrsize <= off_struct <= off_struct + s_struct <= total
        and hdrsize <= off_strings <= off_strings + s_strings <= total
    ):
        return -FDT_ERR_TRUNCATED
    return 0


def fdt_next_tag(fdt: Buffer, offset: int) -> tuple[int, int]:
    """The tag at structure ``offset`` and the offset after it; trouble is ``(FDT_END, -error)``."""
    mv = as_view(fdt)
    header = header_of(mv)
    if header is None:
        return FDT_END, -FDT_ERR_TRUNCATED
    base, limit, old = layout_of(header)
    return next_tag(mv, base, limit, old, offset)


def walk_node(
    mv: memoryview, base: int, limit: int, old: bool, offset: int, depth: int, *, counted: bool
) -> tuple[int, int]:
    """``fdt_next_node`` on a known layout; ``counted`` says whether C would pass a depth."""
    after = 0
    if offset >= 0:
        after = check_node_offset(mv, base, limit, old, offset)
        if after < 0:
            return after, depth
    while True:
        offset = after
        tag, after = next_tag(mv, base, limit, old, offset)
        if tag == FDT_BEGIN_NODE:
            return offset, depth + 1
        if tag == FDT_END_NODE:
            depth -= 1
            if counted and depth < 0:
                return after, depth
        elif tag == FDT_END:
            if after >= 0 or (after == -FDT_ERR_TRUNCATED and not counted):
                return -FDT_ERR_NOTFOUND, depth
            return after, depth


def fdt_next_node(fdt: Buffer, offset: int, depth: int | None = None) -> tuple[int, int]:
    """The next node after ``offset`` in document order (-1: the first), and its depth.

    With ``depth`` None nothing is counted and the walk runs to the end of the tree. With a depth it
    ends where that falls below 0: then the offset is the one after the closing tag.
    """
    mv = as_view(fdt)
    header = header_of(mv)
    if header is None:
        return -FDT_ERR_TRUNCATED, depth or 0
    base, limit, old = layout_of(header)
    if depth is None:
        return walk_node(mv, base, limit, old, offset, 0, counted=False)[0], 0
    return walk_node(mv, base, limit, old, offset, depth, counted=True)


def fdt_first_subnode(fdt: Buffer, offset: int) -> int:
    """Offset of the first child of the node at ``offset``, or -FDT_ERR_NOTFOUND."""
    child, depth = fdt_next_node(fdt, offset, 0)
    return child if child >= 0 and depth == 1 else -FDT_ERR_NOTFOUND


def fdt_next_subnode(fdt: Buffer, offset: int) -> int:
    """Offset of the next sibling of the node at ``offset``, or -FDT_ERR_NOTFOUND."""
    mv = as_view(fdt)
    header = header_of(mv)
    if header is None:
        return -FDT_ERR_NOTFOUND
    base, limit, old = layout_of(header)
    depth = 1
    while True:
        offset, depth = walk_node(mv, base, limit, old, offset, depth, counted=True)
        if offset < 0 or depth < 1:
            return -FDT_ERR_NOTFOUND
        if depth == 1:
            return offset


def _node_name(
    mv: memoryview, base: int, limit: int, old: bool, offset: int
) -> tuple[bytes | None, int]:
    err = check_node_offset(mv, base, limit, old, offset)
    if err < 0:
        return None, err
    start = base + offset + 4
    name = bytes(mv[start : find_nul(mv, start, base + limit)])
    if old:
        slash = name.rfind(b"/")
        if slash < 0:
            return None, -FDT_ERR_BADSTRUCTURE
        name = name[slash + 1 :]
    return name, len(name)


def fdt_get_name(fdt: Buffer, nodeoffset: int, *, addr: int = 0) -> tuple[bytes | None, int]:
    """Name of the node at ``nodeoffset`` (empty for the root) and its length, or (None, -error)."""
    mv = as_view(fdt)
    header = header_of(mv)
    if header is None:
        return None, -FDT_ERR_TRUNCATED
    probed = ro_probe(header, addr)
    if probed < 0:
        return None, probed
    return _node_name(mv, *layout_of(header), nodeoffset)


def find_subnode(mv: memoryview, base: int, limit: int, old: bool, offset: int, name: bytes) -> int:
    """``fdt_subnode_offset_namelen`` after its probe. A wanted name without ``@`` matches any."""
    if offset < 0:
        return offset
    after = check_node_offset(mv, base, limit, old, offset)
    if after < 0:
        return after
    len_name = len(name)
    ends = (b"\0",) if b"@" in name else (b"\0", b"@")
    depth = 0
    while True:
        offset = after
        tag, after = next_tag(mv, base, limit, old, offset)
        if tag == FDT_BEGIN_NODE:
            depth += 1
            if depth != 1:
                continue
            if old:
                leaf = _node_name(mv, base, limit, old, offset)[0]
                found = b"" if leaf is None else leaf + b"\0"
            else:
                start = base + offset + 4
                found = bytes(mv[start : start + len_name + 1])
            if found.startswith(name) and found[len_name : len_name + 1] in ends:
                return offset
        elif tag == FDT_END_NODE:
            depth -= 1
            if depth < 0:
                return -FDT_ERR_NOTFOUND
        elif tag == FDT_END:
            return -FDT_ERR_NOTFOUND if after >= 0 else after


def fdt_subnode_offset(fdt: Buffer, parentoffset: int, name: Name, *, addr: int = 0) -> int:
    """Offset of the child ``name`` of the node at ``parentoffset``, or -FDT_ERR_*.

    ``name`` without a unit address finds ``name@anything`` too, the first in the tree.
    """
    mv = as_view(fdt)
    header = header_of(mv)
    if header is None:
        return -FDT_ERR_TRUNCATED
    probed = ro_probe(header, addr)
    if probed < 0:
        return probed
    return find_subnode(mv, *layout_of(header), parentoffset, c_string(name))


def fdt_get_mem_rsv(fdt: Buffer, n: int, *, addr: int = 0) -> tuple[int, int, int]:
    """``(err, address, size)`` of reserve entry ``n``; address and size are 0 on error.

    libfdt's bound wraps at 32 bits, and a total below 16 bytes disarms it; what that lets through
    lies outside the buffer and is -FDT_ERR_TRUNCATED here.
    """
    mv = as_view(fdt)
    header = header_of(mv)
    if header is None:
        return -FDT_ERR_TRUNCATED, 0, 0
    probed = ro_probe(header, addr)
    if probed < 0:
        return probed, 0, 0
    wrapped = (header[4] + n * 16) & U32_MASK
    if wrapped < header[4] or (probed >= 16 and wrapped > probed - 16):
        return -FDT_ERR_BADOFFSET, 0, 0
    pos = header[4] + n * 16
    if pos < 0 or pos + 16 > len(mv):
        return -FDT_ERR_TRUNCATED, 0, 0
    address, size = RSV_ENTRY.unpack_from(mv, pos)
    return 0, address, size


def count_mem_rsv(mv: memoryview, header: Header) -> int:
    """``fdt_num_mem_rsv``: entries before the first with size 0, or -FDT_ERR_TRUNCATED."""
    pos = header[4]
    stop = len(mv) if header[1] < 16 else min(header[1], len(mv))
    while pos + 16 <= stop:
        if RSV_ENTRY.unpack_from(mv, pos)[1] == 0:
            return (pos - header[4]) >> 4
        pos += 16
    return -FDT_ERR_TRUNCATED


def fdt_num_mem_rsv(fdt: Buffer) -> int:
    """Number of memory reserve entries, or -FDT_ERR_TRUNCATED where the map has no end."""
    mv = as_view(fdt)
    header = header_of(mv)
    return -FDT_ERR_TRUNCATED if header is None else count_mem_rsv(mv, header)
