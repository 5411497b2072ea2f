"""khosim.abi.fdt: what real kernels wrote, and edits against a plain model."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim.abi import fdt

GOLDEN = Path(__file__).parent / "golden" / "fdt"
PAGE = 4096


def golden(name: str) -> bytes:
    """One blob that a real kernel wrote."""
    return (GOLDEN / name).read_bytes()


def u64(value: int) -> bytes:
    """A native integer, as KHO stores it."""
    return value.to_bytes(8, "little")


def u32(value: int) -> bytes:
    """A native 32-bit integer."""
    return value.to_bytes(4, "little")


def kho_page(mem_map: int, junk: bytes = b"\0") -> memoryview:
    """A page with a fresh root FDT, as kho_out_fdt_setup leaves it."""
    page = memoryview(bytearray(junk * PAGE))
    err = fdt.fdt_create(page, PAGE)
    err |= fdt.fdt_finish_reservemap(page)
    err |= fdt.fdt_begin_node(page, "")
    err |= fdt.fdt_property_string(page, "compatible", "kho-v4")
    err |= fdt.fdt_property(page, "preserved-memory-map", u64(mem_map))
    err |= fdt.fdt_end_node(page)
    err |= fdt.fdt_finish(page)
    assert err == 0
    return page


def kho_add_subtree(page: memoryview, name: str, phys: int, size: int) -> int:
    """The kernel's sequence for one more subtree; the error of the step that failed."""
    assert fdt.fdt_open_into(page, page, PAGE) == 0
    off = fdt.fdt_add_subnode(page, 0, name)
    err = min(off, 0)
    if not err:
        err = fdt.fdt_setprop(page, off, "preserved-data", u64(phys))
        err = err or fdt.fdt_setprop(page, off, "blob-size", u64(size))
        if err:
            assert fdt.fdt_del_node(page, off) == 0
    assert fdt.fdt_pack(page) == 0
    return err


def blob_of(page: memoryview) -> bytes:
    """The tree at the start of a page."""
    return bytes(page[: fdt.fdt_totalsize(page)])


ROOTS: list[tuple[str, int, list[tuple[str, int, int]]]] = [
    ("root-4-subtrees.dtb", 0x17D000,
     [("kexec-metadata", 0x4A6000, 73), ("kho_test", 0x55A000, 240), ("LUO", 0x2114000, 32),
      ("memblock", 0x2117000, 210)]),
    ("root-3-subtrees.dtb", 0x10F4000,
     [("kexec-metadata", 0x10FB000, 73), ("LUO", 0x139F000, 32), ("memblock", 0x13A1000, 210)]),
    ("root-arm64.dtb", 0x42174000,
     [("kexec-metadata", 0x4218C000, 73), ("kho_test", 0x42308000, 240), ("LUO", 0x42C80000, 32),
      ("memblock", 0x42C6C000, 210)]),
]  # fmt: skip


@pytest.mark.parametrize("junk", [b"\0", b"\xee"])
@pytest.mark.parametrize(("name", "mem_map", "subtrees"), ROOTS, ids=[r[0] for r in ROOTS])
def test_root_fdt_is_the_kernels(
    name: str, mem_map: int, subtrees: list[tuple[str, int, int]], junk: bytes
) -> None:
    """The kernel's calls rebuild its root FDT byte for byte, whatever the page held before."""
    page = kho_page(mem_map, junk)
    for subtree in subtrees:
        assert kho_add_subtree(page, *subtree) == 0
    assert blob_of(page) == golden(name)


def test_root_fdt_of_6_16() -> None:
    """Sequential write alone rebuilds the kho-v1 root."""
    page = bytearray(PAGE)
    assert fdt.fdt_create(page, PAGE) == 0
    assert fdt.fdt_finish_reservemap(page) == 0
    assert fdt.fdt_begin_node(page, "") == 0
    assert fdt.fdt_property_string(page, "compatible", "kho-v1") == 0
    err, slot = fdt.fdt_property_placeholder(page, "preserved-memory-map", 8)
    assert err == 0
    assert slot is not None
    for name, phys in (("kho_test", 0x566000), ("memblock", 0xB33000)):
        assert fdt.fdt_begin_node(page, name) == 0
        assert fdt.fdt_property(page, "fdt", u64(phys)) == 0
        assert fdt.fdt_end_node(page) == 0
    slot[:] = u64(0x57E000)
    assert fdt.fdt_end_node(page) == 0
    assert fdt.fdt_finish(page) == 0
    assert bytes(page[: fdt.fdt_totalsize(page)]) == golden("root-v1.dtb")


@pytest.mark.parametrize(
    ("name", "regions"),
    [
        ("memblock-one.dtb", [("oops", 0x39600000, 0x200000)]),
        ("memblock-two.dtb", [("trace", 0x139A00000, 0x400000), ("oops", 0x13B7E2000, 0x10000)]),
    ],
)
def test_memblock_fdt_is_the_kernels(name: str, regions: list[tuple[str, int, int]]) -> None:
    """The calls of prepare_kho_fdt rebuild the reserve_mem blobs."""
    page = bytearray(PAGE)
    err = fdt.fdt_create(page, PAGE)
    err |= fdt.fdt_finish_reservemap(page)
    err |= fdt.fdt_begin_node(page, "")
    err |= fdt.fdt_property_string(page, "compatible", "memblock-v1")
    for region, start, size in regions:
        err |= fdt.fdt_begin_node(page, region)
        err |= fdt.fdt_property_string(page, "compatible", "reserve-mem-v1")
        err |= fdt.fdt_property(page, "start", u64(start))
        err |= fdt.fdt_property(page, "size", u64(size))
        err |= fdt.fdt_end_node(page)
    err |= fdt.fdt_end_node(page)
    err |= fdt.fdt_finish(page)
    assert err == 0
    assert bytes(page[: fdt.fdt_totalsize(page)]) == golden(name)


@pytest.mark.parametrize(
    ("name", "nr_folios", "info", "csum"),
    [
        ("kho_test.dtb", 0x14, u64(0x506000) + bytes.fromhex("0100000001000000"), 0x90375005),
        ("kho_test-v1.dtb", 0x19, golden("kho_test-v1.dtb")[0x98:0x160], 0x9CD9843A),
    ],
)
def test_kho_test_fdt_is_the_kernels(name: str, nr_folios: int, info: bytes, csum: int) -> None:
    """The calls of the kernel's test module rebuild its blob."""
    buf = bytearray(PAGE * 2)
    err = fdt.fdt_create(buf, nr_folios * 8 + PAGE)
    err |= fdt.fdt_finish_reservemap(buf)
    err |= fdt.fdt_begin_node(buf, "")
    err |= fdt.fdt_property(buf, "compatible", b"kho-test-v1\0")
    err |= fdt.fdt_property(buf, "magic", u32(0x4B484F21))
    err |= fdt.fdt_begin_node(buf, "data")
    err |= fdt.fdt_property(buf, "nr_folios", u32(nr_folios))
    err |= fdt.fdt_property(buf, "folios_info", info)
    err |= fdt.fdt_property(buf, "csum", u32(csum))
    err |= fdt.fdt_end_node(buf)
    err |= fdt.fdt_end_node(buf)
    err |= fdt.fdt_finish(buf)
    assert err == 0
    assert bytes(buf[: fdt.fdt_totalsize(buf)]) == golden(name)


@pytest.mark.parametrize(
    "kind", [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, "u1").data]
)
def test_reading_a_root(kind: Callable[[bytes], memoryview]) -> None:
    """The successor's calls find what the kernel wrote, in any kind of buffer."""
    blob = kind(golden("root-4-subtrees.dtb") + bytes(100))
    assert fdt.fdt_check_header(blob) == 0
    assert fdt.fdt_totalsize(blob) == 405
    assert fdt.fdt_node_check_compatible(blob, 0, "kho-v4") == 0
    assert fdt.fdt_node_check_compatible(blob, 0, "kho-v") == 1
    value, length = fdt.fdt_getprop(blob, 0, "preserved-memory-map")
    assert value is not None
    assert (int.from_bytes(value, "little"), length) == (0x17D000, 8)
    off = fdt.fdt_subnode_offset(blob, 0, "kho_test")
    assert fdt.fdt_path_offset(blob, "/kho_test") == off
    value, length = fdt.fdt_getprop(blob, off, "preserved-data")
    assert value is not None
    assert (int.from_bytes(value, "little"), length) == (0x55A000, 8)
    assert fdt.fdt_getprop(blob, off, "fdt") == (None, -fdt.FDT_ERR_NOTFOUND)
    names, off = [], fdt.fdt_first_subnode(blob, 0)
    while off >= 0:
        names.append(fdt.fdt_get_name(blob, off)[0])
        off = fdt.fdt_next_subnode(blob, off)
    assert names == [b"memblock", b"LUO", b"kho_test", b"kexec-metadata"]
    assert fdt.fdt_check_full(blob) == 0


def test_value_is_a_view() -> None:
    """A value is where the tree is: writing through it changes the tree."""
    page = kho_page(0x1000)
    value, _ = fdt.fdt_getprop(page, 0, "preserved-memory-map")
    assert value is not None
    value[:] = u64(0x2000)
    assert blob_of(page) == blob_of(kho_page(0x2000))


def test_a_name_twice_and_a_full_page() -> None:
    """EXISTS for a second subtree of a name, NOSPACE when the page is full; the rest stays."""
    page = kho_page(0)
    assert kho_add_subtree(page, "a", 1, 2) == 0
    before = blob_of(page)
    assert kho_add_subtree(page, "a", 3, 4) == -fdt.FDT_ERR_EXISTS
    assert blob_of(page) == before
    added = 1
    while not (err := kho_add_subtree(page, f"subtree-{added:03}", added, added)):
        added += 1
        before = blob_of(page)
    assert err == -fdt.FDT_ERR_NOSPACE
    assert blob_of(page) == before
    # packed: root 144, the two new names 25, node "a" 52, each further node 60
    assert added - 1 == (PAGE - 144 - 25 - 52) // 60


def test_removing_a_subtree_leaves_the_others() -> None:
    """Deleting a node and packing gives the bytes of never having added it."""
    page, without = kho_page(5), kho_page(5)
    for name in ("a", "b", "c"):
        kho_add_subtree(page, name, 1, 2)
        if name != "b":
            kho_add_subtree(without, name, 1, 2)
    assert fdt.fdt_open_into(page, page, PAGE) == 0
    assert fdt.fdt_del_node(page, fdt.fdt_subnode_offset(page, 0, "b")) == 0
    assert fdt.fdt_pack(page) == 0
    assert blob_of(page) == blob_of(without)


def test_padding_keeps_stale_bytes() -> None:
    """A new value of 5 bytes leaves in its padding what the splice moved away."""
    page = kho_page(0xFFFFFFFFFFFFFFFF)
    assert fdt.fdt_open_into(page, page, PAGE) == 0
    assert fdt.fdt_setprop(page, 0, "x", b"12345") == 0
    at = struct.unpack_from(">I", page, 8)[0] + fdt.fdt_first_property_offset(page, 0)
    # where the value of "compatible" stood: its "4", NUL and padding show behind the new value
    assert bytes(page[at : at + 20]) == struct.pack(">3I", 3, 5, 32) + b"12345" + b"4\0\0"


def test_sequential_calls_out_of_turn() -> None:
    """Each state refuses the calls of the others with BADSTATE, foreign bytes with BADMAGIC."""
    page = bytearray(PAGE)
    assert fdt.fdt_begin_node(page, "") == -fdt.FDT_ERR_BADMAGIC
    assert fdt.fdt_create(page, 47) == -fdt.FDT_ERR_NOSPACE
    assert fdt.fdt_create(page, PAGE + 1) == -fdt.FDT_ERR_NOSPACE
    assert fdt.fdt_create_with_flags(page, PAGE, 2) == -fdt.FDT_ERR_BADFLAGS
    assert fdt.fdt_create(page, PAGE) == 0
    assert fdt.fdt_begin_node(page, "") == -fdt.FDT_ERR_BADSTATE
    assert fdt.fdt_add_reservemap_entry(page, 1, 2) == 0
    assert fdt.fdt_finish_reservemap(page) == 0
    assert fdt.fdt_finish_reservemap(page) == -fdt.FDT_ERR_BADSTATE
    assert fdt.fdt_begin_node(page, "") == 0
    assert fdt.fdt_property_u32(page, "n", 7) == 0
    assert fdt.fdt_property_u64(page, "m", 8) == 0
    assert fdt.fdt_end_node(page) == 0
    assert fdt.fdt_finish(page) == 0
    assert fdt.fdt_finish(page) == -fdt.FDT_ERR_BADSTATE
    assert fdt.fdt_get_mem_rsv(page, 0) == (0, 1, 2)
    assert fdt.fdt_num_mem_rsv(page) == 1
    value, _ = fdt.fdt_getprop(page, 0, "m")
    assert value is not None
    assert bytes(value) == bytes(7) + b"\x08"


def test_chosen_of_a_kexec() -> None:
    """addrrange writes the /chosen properties that a real arm64 kexec wrote."""
    blob = golden("arm64-firmware.dtb")
    buf = memoryview(bytearray(len(blob) + 1024))
    assert fdt.fdt_open_into(blob, buf, len(buf)) == 0
    chosen = fdt.fdt_path_offset(buf, "/chosen")
    for name in ("linux,kho-fdt", "linux,kho-scratch"):
        value, _ = fdt.fdt_getprop(blob, chosen, name)
        assert value is not None
        start, size = struct.unpack(">2Q", value)
        assert fdt.fdt_delprop(buf, chosen, name) == 0
        assert fdt.fdt_delprop(buf, chosen, name) == -fdt.FDT_ERR_NOTFOUND
        assert fdt.fdt_appendprop_addrrange(buf, 0, chosen, name, start, size) == 0
        assert fdt.fdt_getprop(buf, chosen, name) == (value, 16)
        assert fdt.fdt_first_property_offset(buf, chosen) == chosen + 12
        assert fdt.fdt_getprop_by_offset(buf, chosen + 12)[2] == name.encode()
    assert fdt.fdt_check_full(buf) == 0


def test_one_byte_past_a_stringlist() -> None:
    """An unterminated string counts where a NUL happens to follow it, as in libfdt."""
    assert fdt.fdt_stringlist_contains(b"a\0kho-v4\0", 8, "kho-v4") == 1
    assert fdt.fdt_stringlist_contains(b"a\0kho-v4x", 8, "kho-v4") == 0
    assert fdt.fdt_stringlist_contains(b"a\0kho-v4", 8, "kho-v4") == -fdt.FDT_ERR_TRUNCATED
    assert fdt.fdt_stringlist_contains(b"kho-v4\0", 7, "kho") == 0
    assert fdt.fdt_stringlist_contains(b"", 0, "kho") == 0


def test_unit_addresses() -> None:
    """A name without a unit address finds one with; a name with one is matched whole."""
    buf = bytearray(512)
    assert fdt.fdt_create_empty_tree(buf, 512) == 0
    off = fdt.fdt_add_subnode(buf, 0, "d@1@2")
    assert fdt.fdt_subnode_offset(buf, 0, "d") == off
    assert fdt.fdt_subnode_offset(buf, 0, "d@1") == -fdt.FDT_ERR_NOTFOUND
    assert fdt.fdt_add_subnode(buf, 0, "d") == -fdt.FDT_ERR_EXISTS
    assert fdt.fdt_add_subnode(buf, 0, "d@1") >= 0


@pytest.mark.parametrize(
    ("cells", "addr", "size", "expected"),
    [
        ((2, 1), 1 << 40, 16, bytes.fromhex("000001000000000000000010")),
        ((1, 1), 0xFFFFFFFF, 1, bytes.fromhex("ffffffff00000001")),
        ((1, 1), 0xFFFFFFFF, 2, -fdt.FDT_ERR_BADVALUE),
        ((1, 2), 1 << 32, 0, -fdt.FDT_ERR_BADVALUE),
        ((2, 1), 0, 1 << 32, -fdt.FDT_ERR_BADVALUE),
        ((3, 1), 0, 0, -fdt.FDT_ERR_BADNCELLS),
        ((0, 1), 0, 0, -fdt.FDT_ERR_BADNCELLS),
        ((5, 1), 0, 0, -fdt.FDT_ERR_BADNCELLS),
        ((2, 0), 0, 0, -fdt.FDT_ERR_BADNCELLS),
    ],
)
def test_addrrange(cells: tuple[int, int], addr: int, size: int, expected: bytes | int) -> None:
    """Ranges are written in the parent's cells, and refused where they do not fit."""
    buf = bytearray(512)
    assert fdt.fdt_create_empty_tree(buf, 512) == 0
    assert fdt.fdt_setprop_u32(buf, 0, "#address-cells", cells[0]) == 0
    assert fdt.fdt_setprop_u32(buf, 0, "#size-cells", cells[1]) == 0
    err = fdt.fdt_appendprop_addrrange(buf, 0, 0, "reg", addr, size)
    value, _ = fdt.fdt_getprop(buf, 0, "reg")
    assert (err if value is None else bytes(value)) == expected


def test_dump_is_bounded() -> None:
    """dump_tree stops at its bounds with NOSPACE and keeps what it had."""
    blob = golden("memblock-two.dtb")
    assert fdt.dump_tree(blob).error == 0
    dump = fdt.dump_tree(blob, max_nodes=2)
    assert dump.error == -fdt.FDT_ERR_NOSPACE
    assert dump.root is not None
    assert [child.name for child in dump.root.children] == [b"trace"]
    assert fdt.dump_tree(blob, max_depth=1).error == -fdt.FDT_ERR_NOSPACE
    root = fdt.dump_tree(blob).root
    assert root is not None
    trace = root.child(b"trace")
    assert trace is not None
    assert trace.prop(b"size") == u64(0x400000)
    assert trace.prop(b"nothing") is None


NAME = st.sampled_from(["a", "b", "compatible", "reg", "d@1", "x" * 31])
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("node"), st.integers(0, 9), NAME),
        st.tuples(st.just("set"), st.integers(0, 9), NAME, st.binary(max_size=17)),
        st.tuples(st.just("append"), st.integers(0, 9), NAME, st.binary(max_size=9)),
        st.tuples(st.just("unset"), st.integers(0, 9), NAME),
        st.tuples(st.just("delete"), st.integers(0, 9)),
        st.tuples(st.just("pack")),
    ),
    max_size=30,
)


class Model:
    """A tree of lists that is edited as the documentation of fdt_rw says."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.props: list[list[Any]] = []
        self.children: list[Model] = []

    def walk(self) -> list[Model]:
        """This node and all below, in document order."""
        return [self, *(node for child in self.children for node in child.walk())]

    def plain(self) -> tuple[Any, ...]:
        """The shape that dump_tree gives."""
        props = [(name.encode(), value) for name, value in self.props]
        return self.name.encode(), props, [child.plain() for child in self.children]

    def edit(self, kind: str, name: str, value: bytes) -> int:
        """Set, append or unset a property."""
        old = next((prop for prop in self.props if prop[0] == name), None)
        if kind == "unset":
            if old is None:
                return -fdt.FDT_ERR_NOTFOUND
            self.props.remove(old)
        elif old is None:
            self.props.insert(0, [name, value])
        else:
            old[1] = value if kind == "set" else old[1] + value
        return 0


@settings(derandomize=True, deadline=None, max_examples=120)
@given(EDITS)
def test_edits_match_a_plain_tree(edits: list[Any]) -> None:
    """Random edits of the flat buffer mean the same as edits of a tree of lists."""
    page = memoryview(bytearray(b"\xcc" * 16384))
    assert fdt.fdt_create_empty_tree(page, 16384) == 0
    root = Model("")
    for kind, *args in edits:
        if kind == "pack":
            assert fdt.fdt_pack(page) == 0
            assert fdt.fdt_open_into(page, page, 16384) == 0
            continue
        nodes = root.walk()
        node = nodes[args[0] % len(nodes)]
        offset = -1
        for _ in range(nodes.index(node) + 1):
            offset, _ = fdt.fdt_next_node(page, offset)
        if kind == "node":
            taken = any(
                args[1] in (child.name, child.name.split("@")[0]) for child in node.children
            )
            result = fdt.fdt_add_subnode(page, offset, args[1])
            if taken:
                assert result == -fdt.FDT_ERR_EXISTS
            else:
                assert fdt.fdt_get_name(page, result)[0] == args[1].encode()
                node.children.insert(0, Model(args[1]))
        elif kind == "delete":
            if node is not root:
                assert fdt.fdt_del_node(page, offset) == 0
                next(n for n in nodes if node in n.children).children.remove(node)
        else:
            call = {"set": fdt.fdt_setprop, "append": fdt.fdt_appendprop}.get(kind)
            value = args[2] if call else b""
            expected = node.edit(kind, args[1], value)
            if call:
                assert call(page, offset, args[1], value) == expected
            else:
                assert fdt.fdt_delprop(page, offset, args[1]) == expected
        dump = fdt.dump_tree(page)
        assert dump.error == 0

        def plain(found: fdt.FdtNode) -> tuple[Any, ...]:
            return found.name, found.props, [plain(child) for child in found.children]

        assert dump.root is not None
        assert plain(dump.root) == root.plain()


def test_reserve_map_edits() -> None:
    """Reserve entries are added at the end and deleted by number; the tree moves along."""
    page = kho_page(7)
    assert fdt.fdt_open_into(page, page, PAGE) == 0
    before = fdt.dump_tree(page).root
    assert fdt.fdt_add_mem_rsv(page, 0x1000, 0x2000) == 0
    assert fdt.fdt_add_mem_rsv(page, 0x8000, 0x1000) == 0
    assert fdt.fdt_num_mem_rsv(page) == 2
    assert fdt.fdt_del_mem_rsv(page, 2) == -fdt.FDT_ERR_NOTFOUND
    assert fdt.fdt_del_mem_rsv(page, 0) == 0
    assert fdt.fdt_get_mem_rsv(page, 0) == (0, 0x8000, 0x1000)
    assert fdt.dump_tree(page) == (before, 0, fdt.dump_tree(page).offset, [(0x8000, 0x1000)])


def test_error_names() -> None:
    """Every code has its libfdt name; 0, positive and unknown have theirs."""
    assert fdt.fdt_strerror(-fdt.FDT_ERR_BADMAGIC) == "FDT_ERR_BADMAGIC"
    assert sorted(fdt.FDT_ERR_NAMES) == list(range(1, 20))
    assert fdt.fdt_strerror(0) == "<no error>"
    assert fdt.fdt_strerror(4) == "<valid offset/length>"
    assert fdt.fdt_strerror(-99) == "<unknown error>"
