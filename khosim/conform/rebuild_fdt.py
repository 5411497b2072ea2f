"""Device trees written once more from the facts in them, by khosim's own writer.

Kernels write a handover's trees in two ways. Most are written front to back in one go
(``mm/memblock.c:prepare_kho_fdt``, ``lib/test_kho.c`` @ 7.3, the root FDT of 6.16). The root FDT is
begun like that and then opened, grown by a node for each subtree and packed again, whenever one is
added (``kernel/liveupdate/kexec_handover.c:kho_out_fdt_setup``, ``kho_add_subtree`` @ 7.3). Which
facts a tree holds says the checkers' reader; how they lie in its bytes is what is compared.

Left out: subtrees that were removed again, which leave their mark in no byte that counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from khosim.abi import fdt
from khosim.checks.decode_fdt import Node, parse_fdt

__all__ = ("Rebuilt", "first_difference", "rebuild_root", "rebuild_tree")

_MAX_BYTES = 2 << 20
_SLACK = 4096


class Rebuilt(NamedTuple):
    """What came out: the difference in words (empty: none), and the way of writing that fits."""

    difference: str
    way: str = ""


def rebuild_tree(data: bytes) -> Rebuilt:
    """Write the tree in ``data`` front to back, and compare all of its bytes."""
    return _rebuild(data, ((_sequential, "written front to back"),))


def rebuild_root(data: bytes, page_size: int) -> Rebuilt:
    """Write the root FDT in ``data`` in the ways that kernels have of doing it."""

    def grown(root: Node) -> bytes:
        return _grown(root, page_size)

    return _rebuild(
        data, ((grown, "grown by each subtree"), (_sequential, "written front to back"))
    )


def first_difference(real: bytes, own: bytes) -> str:
    """Where two blobs part, in words; empty where they do not."""
    if real == own:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(real, own, strict=False)) if a != b), None)
    if at is None:
        return f"{len(real)} bytes, rebuilt {len(own)}"
    return f"byte {at:#x}: {real[at]:#04x}, rebuilt {own[at]:#04x}"


def _rebuild(data: bytes, ways: tuple[tuple[Callable[[Node], bytes], str], ...]) -> Rebuilt:
    parsed = parse_fdt(data)
    if parsed.root is None or parsed.problems:
        problem = parsed.problems[0].detail if parsed.problems else "no root node"
        return Rebuilt(f"no sound device tree: {problem}")
    difference = ""
    for write, way in ways:
        found = first_difference(parsed.data, write(parsed.root))
        if not found:
            return Rebuilt("", way)
        difference = difference or found
    return Rebuilt(difference)


def _finished(buf: memoryview, error: int) -> bytes:
    return b"" if error else bytes(buf[: fdt.fdt_totalsize(buf)])


def _sequential(root: Node) -> bytes:
    size = min(_MAX_BYTES, _SLACK + 2 * _bytes_of(root))
    buf = memoryview(bytearray(size))
    error = fdt.fdt_create(buf, size)
    error |= fdt.fdt_finish_reservemap(buf)
    error |= _node(buf, root)
    error |= fdt.fdt_finish(buf)
    return _finished(buf, error)


def _bytes_of(node: Node) -> int:
    props = sum(32 + len(name) + len(value) for name, value in node.props)
    return 16 + len(node.name) + props + sum(_bytes_of(child) for child in node.children)


def _node(buf: memoryview, node: Node) -> int:
    error = fdt.fdt_begin_node(buf, node.name)
    for name, value in node.props:
        error |= fdt.fdt_property(buf, name, value)
    for child in node.children:
        error |= _node(buf, child)
    return error | fdt.fdt_end_node(buf)


def _grown(root: Node, page_size: int) -> bytes:
    # Each subtree becomes the first child, and each property the first of its node: the facts
    # stand in the tree in the opposite order of the calls.
    buf = memoryview(bytearray(page_size))
    error = fdt.fdt_create(buf, page_size)
    error |= fdt.fdt_finish_reservemap(buf)
    error |= fdt.fdt_begin_node(buf, root.name)
    for name, value in root.props:
        error |= fdt.fdt_property(buf, name, value)
    error |= fdt.fdt_end_node(buf)
    error |= fdt.fdt_finish(buf)
    for child in reversed(root.children):
        error |= fdt.fdt_open_into(buf, buf, page_size)
        if error:
            return b""
        offset = fdt.fdt_add_subnode(buf, 0, child.name)
        if offset < 0 or child.children:
            return b""
        for name, value in reversed(child.props):
            error |= fdt.fdt_setprop(buf, offset, name, value)
        error |= fdt.fdt_pack(buf)
    return _finished(buf, error)
