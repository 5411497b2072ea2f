"""The strict FDT reader: blobs made here, blobs changed here, and the real libfdt beside it."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim.checks.decode_fdt import Fdt, Node, decode_fdt, parse_fdt
from khosim.checks.reader import PageImage

Tree = tuple[bytes, tuple[tuple[bytes, bytes], ...], tuple[Any, ...]]

SMALL: Tree = (
    b"",
    ((b"compatible", b"kho-v4\0"), (b"word", bytes(range(8)))),
    ((b"one", ((b"word", b""),), ()), (b"two@1", (), ((b"deep", (), ()),))),
)


def padded(data: bytes) -> bytes:
    """``data`` filled up to four bytes, with what libfdt may leave there."""
    return data + b"\xaa" * (-len(data) % 4)


def tokens(tree: Tree, strings: bytearray) -> bytes:
    """A node's part of the structure block; names of properties go into ``strings``."""
    name, props, children = tree
    out = struct.pack(">I", 1) + padded(name + b"\0")
    for key, value in props:
        if key + b"\0" not in strings:
            strings += key + b"\0"
        at = strings.index(key + b"\0")
        out += struct.pack(">3I", 3, len(value), at) + padded(value)
    return out + b"".join(tokens(child, strings) for child in children) + struct.pack(">I", 2)


def assemble(structure: bytes, strings: bytes) -> bytes:
    """A blob around a structure block and a strings block."""
    off_struct = 40 + 16
    off_strings = off_struct + len(structure)
    total = off_strings + len(strings)
    header = (0xD00DFEED, total, off_struct, off_strings, 40, 17, 16, 0)
    header += (len(strings), len(structure))
    return struct.pack(">10I", *header) + bytes(16) + structure + strings


def blob(tree: Tree) -> bytes:
    """The whole blob of a tree."""
    strings = bytearray()
    structure = tokens(tree, strings) + struct.pack(">I", 9)
    return assemble(structure, bytes(strings))


def plain(node: Node | None) -> Tree | None:
    """A decoded tree as plain tuples."""
    if node is None:
        return None
    return node.name, node.props, tuple(plain(child) for child in node.children)


def codes(fdt: Fdt) -> list[str]:
    """The kinds of the problems, in order."""
    return [problem.code for problem in fdt.problems]


names = st.binary(min_size=1, max_size=6).filter(lambda name: b"\0" not in name)
values = st.binary(max_size=12)
props = st.lists(st.tuples(names, values), max_size=4, unique_by=lambda prop: prop[0]).map(tuple)


def siblings(nodes: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Lists of nodes whose names differ."""
    return st.lists(nodes, max_size=3, unique_by=lambda node: node[0]).map(tuple)


leaves = st.tuples(names, props, st.just(()))
trees = st.recursive(leaves, lambda nodes: st.tuples(names, props, siblings(nodes)), max_leaves=12)
roots = st.tuples(st.just(b""), props, siblings(trees))


@settings(max_examples=100)
@given(tree=roots)
def test_any_tree_comes_back(tree: Tree) -> None:
    """What was put into a blob is read from it, without a problem."""
    fdt = parse_fdt(blob(tree))
    assert plain(fdt.root) == tree
    assert fdt.problems == ()
    assert fdt.data == blob(tree)


def test_reading_from_memory() -> None:
    """A blob is found across pages; what follows it in the page is no part of it."""
    data = blob(SMALL)
    ram = PageImage({7: bytes(4096 - 32) + data[:32], 8: (data[32:]).ljust(4096, b"\xff")}, 4096)
    fdt = decode_fdt(ram, 8 * 4096 - 32, 4096)
    assert plain(fdt.root) == SMALL
    assert fdt.data == data
    assert codes(decode_fdt(ram, 9 * 4096 - 4, 4096)) == ["fdt-unreadable"]
    assert codes(decode_fdt(ram, 8 * 4096 - 32, 39)) == ["fdt-unreadable"]
    assert "fdt-totalsize" in codes(decode_fdt(ram, 8 * 4096 - 32, len(data) - 1))


def test_asking_a_node() -> None:
    """Properties and children are found by name, numbers are little-endian, lists split."""
    root = parse_fdt(blob(SMALL)).root
    assert root is not None
    assert root.prop(b"word") == bytes(range(8))
    assert root.prop(b"wor") is None
    assert root.u64(b"word") == 0x0706050403020100
    assert root.u64(b"compatible") is None
    assert root.u64(b"none") is None
    assert root.strings(b"compatible") == (b"kho-v4",)
    assert root.strings(b"word") == ()
    assert root.child(b"two@1") is root.children[1]
    assert root.child(b"two") is None


@pytest.mark.parametrize(
    ("offset", "value", "expected"),
    [
        (0, 0xD00DFEEE, ["fdt-magic"]),
        (4, 39, ["fdt-totalsize"]),
        (4, 0xFFFFFFFF, ["fdt-totalsize"]),
        (8, 58, ["fdt-alignment", "fdt-overlap", "fdt-tag"]),
        (8, 0xFFFFFFFC, ["fdt-bounds", "fdt-truncated"]),
        (12, 20, ["fdt-overlap"]),
        (16, 44, ["fdt-alignment", "fdt-rsvmap"]),
        (20, 16, ["fdt-version"]),
        (20, 18, ["fdt-version"]),
        (24, 18, ["fdt-version"]),
        (32, 0x1000, ["fdt-bounds"]),
        (32, 3, ["fdt-strings"]),
        (36, 8, ["fdt-truncated"]),
        (36, 0xFFFFFFFF, ["fdt-bounds"]),
    ],
)
def test_spoilt_header(offset: int, value: int, expected: list[str]) -> None:
    """Each field of the header is checked, and told with its address where it alone is wrong."""
    data = bytearray(blob(SMALL))
    struct.pack_into(">I", data, offset, value)
    found = parse_fdt(bytes(data), 0x1000)
    assert set(expected) <= set(codes(found))
    told = [one.phys for one in found.problems if one.code == expected[0]]
    if expected[0] in ("fdt-magic", "fdt-totalsize", "fdt-alignment"):
        assert 0x1000 + offset in told


@pytest.mark.parametrize(("last_comp", "is_read"), [(15, True), (17, True), (18, False)])
def test_a_blob_for_readers_as_new_as_this_is_read(last_comp: int, is_read: bool) -> None:
    """It is named, as libfdt writes none, and read unless it needs a newer reader."""
    data = bytearray(blob(SMALL))
    struct.pack_into(">I", data, 24, last_comp)
    found = parse_fdt(bytes(data))
    assert codes(found) == ["fdt-version"]
    assert (found.root is not None) == is_read


def repr_short(value: object) -> str:
    """A name for a parameter: the problems, or how long the bytes are."""
    return "-".join(value) or "sound" if isinstance(value, list) else f"{len(value)} bytes"


BEGIN, END_NODE, NOP, END = b"\0\0\0\1", b"\0\0\0\2", b"\0\0\0\4", b"\0\0\0\x09"
ROOT = BEGIN + bytes(4)
KID = BEGIN + b"kid\0"
PROP = struct.pack(">3I", 3, 0, 0)


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        (ROOT + END_NODE + END, []),
        (NOP + ROOT + NOP + PROP + NOP + END_NODE + NOP + END, []),
        (b"", ["fdt-truncated"]),
        (END, ["fdt-nesting"]),
        (ROOT + END_NODE, ["fdt-truncated"]),
        (ROOT + END, ["fdt-nesting"]),
        (ROOT + END_NODE + END_NODE + END, ["fdt-nesting"]),
        (ROOT + END_NODE + ROOT + END_NODE + END, ["fdt-nesting"]),
        (ROOT + END_NODE + END + NOP, ["fdt-trailing"]),
        (ROOT + ROOT + END_NODE + END_NODE + END, ["fdt-name"]),
        (KID + END_NODE + END, ["fdt-root-name"]),
        (PROP + ROOT + END_NODE + END, ["fdt-nesting"]),
        (ROOT + b"\0\0\0\5" + END_NODE + END, ["fdt-tag"]),
        (ROOT + KID + END_NODE + PROP + END_NODE + END, ["fdt-order"]),
        (ROOT + PROP + PROP + END_NODE + END, ["fdt-duplicate"]),
        (ROOT + (KID + END_NODE) * 2 + END_NODE + END, ["fdt-duplicate"]),
        (ROOT + BEGIN + b"kidd", ["fdt-truncated"]),
        (ROOT + PROP[:8], ["fdt-truncated"]),
        (ROOT + struct.pack(">3I", 3, 9, 0) + bytes(8), ["fdt-truncated"]),
        (ROOT + struct.pack(">3I", 3, 0xFFFFFFFF, 0) + END_NODE + END, ["fdt-truncated"]),
        (ROOT + struct.pack(">3I", 3, 0, 9) + END_NODE + END, ["fdt-strings"]),
        (ROOT + KID * 100, ["fdt-nesting"]),
        (ROOT + KID * 63 + END_NODE * 64 + END, []),
    ],
    ids=repr_short,
)
def test_spoilt_structure(structure: bytes, expected: list[str]) -> None:
    """Each rule of the structure block is checked, and breaking one alone is named alone."""
    fdt = parse_fdt(assemble(structure, b"name\0"))
    assert codes(fdt) == expected
    assert (fdt.root is None) == (structure in (b"", END) or structure.startswith(PROP))


def test_partial_trees_are_kept() -> None:
    """What was read before the blob goes wrong is there."""
    fdt = parse_fdt(assemble(ROOT + PROP + KID + END_NODE + b"\0\0\0\5", b"name\0"))
    assert plain(fdt.root) == (b"", ((b"name", b""),), ((b"kid", (), ()),))


def test_hostile_sizes_cost_little() -> None:
    """A claim of gigabytes reads no more than the caller trusts."""
    data = bytearray(blob(SMALL))
    struct.pack_into(">I", data, 4, 0x7FFFFFFF)
    asked = []

    class Meter(PageImage):
        __slots__ = ()

        def read(self, phys: int, len_bytes: int, /) -> bytes:
            asked.append(len_bytes)
            return super().read(phys, len_bytes)

    decode_fdt(Meter({0: bytes(data).ljust(4096, b"\0")}, 4096), 0, 4096)
    assert max(asked) == 4096


def test_every_byte_of_a_blob_may_be_wrong() -> None:
    """Each byte takes a few wrong values; the reader answers each time."""
    data = blob(SMALL)
    for at in range(len(data)):
        for value in (0, 1, 3, 0x7F, 0xFF, data[at] ^ 1, data[at] ^ 0x80):
            spoilt = data[:at] + bytes([value]) + data[at + 1 :]
            fdt = parse_fdt(spoilt)
            assert fdt.root is not None or fdt.problems
        parse_fdt(data[:at])


def libfdt_tree(libfdt: Any, data: bytes) -> Tree:
    """The tree as the real libfdt walks it."""
    fdt = libfdt.Fdt(data)

    def props_of(offset: int) -> list[tuple[bytes, bytes]]:
        found = []
        at = fdt.first_property_offset(offset, libfdt.QUIET_NOTFOUND)
        while at >= 0:
            prop = fdt.get_property_by_offset(at)
            found.append((prop.name.encode(), bytes(prop)))
            at = fdt.next_property_offset(at, libfdt.QUIET_NOTFOUND)
        return found

    def visit(offset: int) -> Tree:
        children = []
        at = fdt.first_subnode(offset, libfdt.QUIET_NOTFOUND)
        while at >= 0:
            children.append(visit(at))
            at = fdt.next_subnode(at, libfdt.QUIET_NOTFOUND)
        return fdt.get_name(offset).encode(), tuple(props_of(offset)), tuple(children)

    return visit(0)


def test_the_real_libfdt_agrees() -> None:
    """A blob that this reader finds no fault with means the same tree to libfdt."""
    libfdt = pytest.importorskip("libfdt")
    assert libfdt_tree(libfdt, blob(SMALL)) == SMALL
    rng = random.Random(1)
    data = blob(SMALL)
    agreed = 0
    for _ in range(2000):
        spoilt = bytearray(data)
        for _ in range(rng.choice((1, 1, 2))):
            spoilt[rng.randrange(len(data))] = rng.choice((0, 1, 2, 3, 4, 9, rng.randrange(128)))
        fdt = parse_fdt(bytes(spoilt))
        if fdt.problems:
            continue
        agreed += 1
        assert libfdt_tree(libfdt, bytes(spoilt)) == plain(fdt.root)
    assert agreed > 100
