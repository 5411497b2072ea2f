"""khosim.abi.fdt.text and .schema: device tree source in and out, values by their kind."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim.abi.fdt import FdtNode, dump_tree, fdt_check_full, fdt_num_mem_rsv
from khosim.abi.fdt.schema import property_kind, typed_value
from khosim.abi.fdt.text import blob_to_dts, build_blob, dts_to_blob
from khosim.errors import InputError

GOLDEN = Path(__file__).parent / "golden" / "fdt"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.dtb")), ids=lambda path: path.name)
def test_text_keeps_every_byte_of_a_real_tree(path: Path) -> None:
    """Through text and back: the same tree, and where sequential write made it, the same blob."""
    blob = path.read_bytes()
    again = dts_to_blob(blob_to_dts(blob))
    assert fdt_check_full(again) == 0
    before, after = dump_tree(blob), dump_tree(again)
    assert (after.root, after.reserve_map) == (before.root, before.reserve_map)
    if path.name.startswith(("memblock", "kho_test")):
        assert again == blob


def test_native_integers_are_bytes_in_text() -> None:
    """KHO's u64 shows as the bytes that are there, the compatible string as a string."""
    text = blob_to_dts((GOLDEN / "root-3-subtrees.dtb").read_bytes())
    assert 'compatible = "kho-v4";' in text
    assert "preserved-memory-map = [00 40 0F 01 00 00 00 00];" in text
    assert "/memreserve/" not in text


def test_reservations_do_not_leak_between_trees() -> None:
    """A tree with a reserve map leaves the next one's empty."""
    blob = dts_to_blob("/dts-v1/; /memreserve/ 0x1000 0x2000; / { };")
    assert dump_tree(blob).reserve_map == [(0x1000, 0x2000)]
    assert "0x1000 0x2000" in blob_to_dts(blob)
    assert fdt_num_mem_rsv(dts_to_blob("/ { };")) == 0
    assert "/memreserve/" not in blob_to_dts(build_blob(FdtNode(b"", [], [])))


def test_source_on_few_lines() -> None:
    """Comments, one-line nodes, joined byte strings, octal, references and escapes are read."""
    text = r"""/dts-v1/; // comment with { and "
    / { /* two
      lines */ s = "a // not; a {comment}", "", "q\"\\\x41"; empty; b = [0010 ff];
      w = <0x10 8 010>, <1>; ref = <&here>; here: n@1 { x; }; };"""
    dump = dump_tree(dts_to_blob(text))
    assert dump.error == 0
    root = dump.root
    assert root is not None
    assert dict(root.props) == {
        b"s": b'a // not; a {comment}\0\0q"\\A\0',
        b"empty": b"",
        b"b": b"\x00\x10\xff",
        b"w": struct.pack(">4I", 16, 8, 8, 1),
        b"ref": struct.pack(">I", 1),
    }
    assert root.children == [FdtNode(b"n@1", [(b"x", b""), (b"phandle", b"\0\0\0\1")], [])]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "/ { ",
        "/ { }; / { };",
        "foo { };",
        "/ { a = <08>; };",
        "/ { a = <0x1ffffffff>; };",
        "/ { a = [0g]; };",
        "/ { a = 5; };",
        '/ { a = "x", <1>; };',
        '/ { a = <1>, "x"; };',
        '/ { a = /incbin/("secret"); };',
        "/ { a = /bits/ 64 <1>; };",
        "/ { a; a; };",
        "/ { /delete-node/ x; };",
        "/ { a b = <1>; };",
        "/memreserve/ 1; / { };",
        "/memreserve/ -1 5; / { };",
        "/ { b: c: d { }; };",
        "/ { " + "n { " * 70 + "}; " * 70 + "};",
    ],
)
def test_bad_source_is_an_input_error(text: str) -> None:
    """Text that cannot be read in full is refused in one line that names the place."""
    with pytest.raises(InputError, match=r"^tree\.dts: .") as caught:
        dts_to_blob(text, place="tree.dts")
    assert "\n" not in str(caught.value)


def test_bad_blobs_are_input_errors() -> None:
    """A blob that libfdt refuses gives no text but the error's name and place."""
    blob = (GOLDEN / "root-3-subtrees.dtb").read_bytes()
    with pytest.raises(InputError, match="FDT_ERR_TRUNCATED at byte 0x40"):
        blob_to_dts((GOLDEN / "root-cut.bin").read_bytes())
    with pytest.raises(InputError, match="FDT_ERR_BADMAGIC"):
        blob_to_dts(b"\0" * 64, place="x")
    with pytest.raises(InputError, match="not printable"):
        blob_to_dts(blob.replace(b"LUO", b"L\x01O"))
    with pytest.raises(InputError, match="not printable"):
        blob_to_dts(blob.replace(b"LUO", b"L\xffO"))


RAW = st.one_of(
    st.binary(max_size=12),
    st.lists(
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8), max_size=3
    ).map(lambda texts: b"".join(text.encode() + b"\0" for text in texts)),
)
PROPS = st.lists(
    st.tuples(st.sampled_from([b"a", b"compatible", b"start", b"r,x#", b"magic"]), RAW),
    max_size=4,
    unique_by=lambda prop: prop[0],
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(PROPS, PROPS)
def test_any_values_survive_text(
    props: list[tuple[bytes, bytes]], inner: list[tuple[bytes, bytes]]
) -> None:
    """Random values, strings with quotes and comment marks among them, come back exactly."""
    root = FdtNode(b"", props, [FdtNode(b"child@0", inner, [])])
    blob = build_blob(root)
    assert dump_tree(blob).root == root
    assert dts_to_blob(blob_to_dts(blob)) == blob


def test_kinds() -> None:
    """The nearest compatible known to the table decides; unknown trees are guessed at."""
    assert property_kind(["kho-v4"], "preserved-memory-map", bytes(8)) == "u64"
    assert property_kind(["kho-v4"], "preserved-memory-map", bytes(4)) == "bytes"
    assert property_kind(["", "kho-v1"], "fdt", b"abcdefg\0") == "u64"
    assert property_kind(["reserve-mem-v1", "memblock-v1"], "start", bytes(8)) == "u64"
    assert property_kind(["kho-v4"], "novelty", b"text\0") == "bytes"
    assert property_kind(["acme,board"], "model", b"text\0more\0") == "strings"
    assert property_kind([], "reg", bytes(8)) == "cells"
    assert property_kind([], "odd", bytes(3)) == "bytes"
    assert property_kind([], "compatible", b"\xff") == "bytes"
    assert typed_value("u64", b"\x01" + bytes(7)) == 1
    assert typed_value("u32", b"\x00\x01\x00\x00") == 256
    assert typed_value("cells", b"\x00\x00\x00\x01\x00\x00\x00\x02") == [1, 2]
    assert typed_value("strings", b"a\0b\0") == ["a", "b"]
    assert typed_value("bytes", b"a") == b"a"
