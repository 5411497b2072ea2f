"""A whole tree at once: libfdt's full check, and a plain Python copy for inspection.

``fdt_check_full`` models ``libfdt/fdt_check.c`` of dtc 1.7.2, which the kernel does not build; it
is what tells a sound blob from one that merely has a sound header. :func:`dump_tree` shows as much
of a blob as can be read and says where and why it stopped.

Left out: the device tree rules above libfdt (names, ``#cells``, properties before children).
"""

from __future__ import annotations

from typing import NamedTuple

from khosim.abi.fdt._blob import (
    FDT_BEGIN_NODE,
    FDT_END,
    FDT_END_NODE,
    FDT_PROP,
    OFF_VERSION,
    PROP,
    RSV_ENTRY,
    U32,
    Buffer,
    Header,
    as_view,
    find_nul,
    header_of,
    layout_of,
    next_tag,
    ro_probe,
)
from khosim.abi.fdt.errors import (
    FDT_ERR_BADSTRUCTURE,
    FDT_ERR_NOSPACE,
    FDT_ERR_TRUNCATED,
)
from khosim.abi.fdt.props import prop_value, string_window
from khosim.abi.fdt.ro import count_mem_rsv, fdt_check_header, fdt_get_name, header_size

__all__ = ("FdtDump", "FdtNode", "dump_tree", "fdt_check_full")

_MAX_NAME_BYTES = 1 << 20  # of distinct property names in one dump


class FdtNode(NamedTuple):
    """One node: its name (``b""`` for the root), properties in order, children in order."""

    name: bytes
    props: list[tuple[bytes, bytes]]
    children: list[FdtNode]

    def prop(self, name: bytes) -> bytes | None:
        """The value of the first property called ``name``."""
        return next((value for key, value in self.props if key == name), None)

    def child(self, name: bytes) -> FdtNode | None:
        """The first child called exactly ``name``."""
        return next((node for node in self.children if node.name == name), None)


class FdtDump(NamedTuple):
    """What :func:`dump_tree` could read.

    ``error`` is 0 or -FDT_ERR_*; ``offset`` the absolute byte offset of the tag at which it was
    met, or of the end tag.
    """

    root: FdtNode | None
    error: int
    offset: int
    reserve_map: list[tuple[int, int]]


class _Names:
    """Property names of one blob whose header is sound, in time linear in the blob."""

    __slots__ = ("_header", "_known", "_last_nul", "_mv", "_nr_bytes", "_probed")

    def __init__(self, mv: memoryview, header: Header) -> None:
        self._mv = mv
        self._header = header
        self._probed = ro_probe(header)
        end = header[1]
        if header[5] >= 17:
            end = min(end, header[3] + header[8])
        self._last_nul = header[3] + bytes(mv[header[3] : end]).rfind(0)
        self._known: dict[int, bytes] = {}
        self._nr_bytes = 0

    def check(self, nameoff: int) -> int:
        """Absolute offset of the name, or the error of ``fdt_get_string``."""
        start, err = string_window(self._header, nameoff, self._probed)
        if start < 0:
            return err
        return start if start <= self._last_nul else -FDT_ERR_TRUNCATED

    def get(self, nameoff: int) -> tuple[bytes, int]:
        """``(name, 0)`` or ``(b"", -error)``; -FDT_ERR_NOSPACE once they add up to too much."""
        name = self._known.get(nameoff)
        if name is not None:
            return name, 0
        start = self.check(nameoff)
        if start < 0:
            return b"", start
        name = bytes(self._mv[start : find_nul(self._mv, start, self._last_nul + 1)])
        self._nr_bytes += len(name)
        if self._nr_bytes > _MAX_NAME_BYTES:
            return b"", -FDT_ERR_NOSPACE
        self._known[nameoff] = name
        return name, 0


def fdt_check_full(fdt: Buffer, bufsize: int | None = None, *, addr: int = 0) -> int:
    """0 where the blob in ``bufsize`` bytes (all of ``fdt`` when None) is sound, else -FDT_ERR_*.

    Sound: header, reserve map and every tag hold, nodes nest, every name ends, one nameless root.
    """
    mv = as_view(fdt)
    if bufsize is not None:
        mv = mv[: max(bufsize, 0)]
    if len(mv) < 28 or len(mv) < header_size(U32.unpack_from(mv, OFF_VERSION)[0]):
        return -FDT_ERR_TRUNCATED
    err = fdt_check_header(mv, addr=addr)
    if err:
        return err
    header = header_of(mv)
    if header is None or len(mv) < header[1]:
        return -FDT_ERR_TRUNCATED
    err = count_mem_rsv(mv, header)
    if err < 0:
        return err
    base, limit, old = layout_of(header)
    names = _Names(mv, header)
    depth = after = 0
    closed = False
    while True:
        offset = after
        tag, after = next_tag(mv, base, limit, old, offset)
        if after < 0:
            return after
        if closed and tag != FDT_END:
            return -FDT_ERR_BADSTRUCTURE
        if tag == FDT_PROP:
            err = names.check(PROP.unpack_from(mv, base + offset)[2])
            if err < 0:
                return err
        elif tag == FDT_BEGIN_NODE:
            depth += 1
            if depth == 1:
                len_name = fdt_get_name(mv, offset)[1]
                if len_name:
                    return len_name if len_name < 0 else -FDT_ERR_BADSTRUCTURE
        elif tag == FDT_END_NODE:
            if depth == 0:
                return -FDT_ERR_BADSTRUCTURE
            depth -= 1
            closed = depth == 0
        elif tag == FDT_END:
            return -FDT_ERR_BADSTRUCTURE if depth else 0


def dump_tree(buf: Buffer, *, max_nodes: int = 4096, max_depth: int = 64) -> FdtDump:
    """Everything in ``buf`` that reads as a tree, and the first thing wrong. Raises nothing.

    A property whose name cannot be read is kept with the name ``b""``; any other fault ends it.
    The error is that of :func:`fdt_check_full`, except that a tree beyond the bounds (nodes, depth
    as in ``drivers/of/fdt.c:FDT_MAX_DEPTH``, a megabyte of distinct property names) ends with
    -FDT_ERR_NOSPACE, and a property before the root node is -FDT_ERR_BADSTRUCTURE. A header that is
    refused gives no tree. Node names of versions below 16 are paths and stay as they are.
    """
    mv = as_view(buf)
    err = fdt_check_header(mv)
    header = header_of(mv)
    if err or header is None:
        return FdtDump(None, err or -FDT_ERR_TRUNCATED, 0, [])
    nr_rsv = count_mem_rsv(mv, header)
    if nr_rsv < 0:
        return FdtDump(None, nr_rsv, header[4], [])
    reserve_map = [
        (address, size)
        for address, size in RSV_ENTRY.iter_unpack(mv[header[4] : header[4] + 16 * nr_rsv])
    ]
    base, limit, old = layout_of(header)
    names = _Names(mv, header)
    root: FdtNode | None = None
    open_nodes: list[FdtNode] = []
    nr_nodes = after = 0
    name_err = name_at = 0
    while True:
        offset = after
        tag, after = next_tag(mv, base, limit, old, offset)
        if after < 0:
            err = after
        elif tag == FDT_END:
            err = -FDT_ERR_BADSTRUCTURE if open_nodes else 0
        elif root is not None and not open_nodes:
            err = -FDT_ERR_BADSTRUCTURE
        elif tag == FDT_PROP:
            err, bad_name = _add_prop(mv, header, offset, names, open_nodes)
            if bad_name and not name_err:
                name_err, name_at = bad_name, base + offset
        elif tag == FDT_BEGIN_NODE:
            nr_nodes += 1
            start = base + offset + 4
            node = FdtNode(bytes(mv[start : find_nul(mv, start, base + limit)]), [], [])
            if nr_nodes > max_nodes or len(open_nodes) >= max_depth:
                err = -FDT_ERR_NOSPACE
            elif open_nodes:
                open_nodes[-1].children.append(node)
            elif fdt_get_name(mv, offset)[1] != 0:
                err = -FDT_ERR_BADSTRUCTURE
            else:
                root = node
            open_nodes.append(node)
        elif tag == FDT_END_NODE:
            if open_nodes:
                open_nodes.pop()
            else:
                err = -FDT_ERR_BADSTRUCTURE
        if name_err and (err or tag == FDT_END):
            return FdtDump(root, name_err, name_at, reserve_map)
        if err or tag == FDT_END:
            return FdtDump(root, err, base + offset, reserve_map)


def _add_prop(
    mv: memoryview, header: Header, offset: int, names: _Names, open_nodes: list[FdtNode]
) -> tuple[int, int]:
    """Append the property at ``offset`` to the innermost open node.

    Returns what ends the dump and what is wrong with the name, each 0 or -FDT_ERR_*.
    """
    pos = header[2] + offset
    if pos + 12 > len(mv):
        return -FDT_ERR_TRUNCATED, 0
    _, len_bytes, nameoff = PROP.unpack_from(mv, pos)
    name, bad_name = names.get(nameoff)
    if bad_name == -FDT_ERR_NOSPACE:
        return bad_name, 0
    value, err = prop_value(mv, header, offset, len_bytes)
    if value is None:
        return err, bad_name
    if not open_nodes:
        return -FDT_ERR_BADSTRUCTURE, bad_name
    open_nodes[-1].props.append((name, bytes(value)))
    return 0, bad_name
