"""khosim.abi.fdt on broken input: nothing raises, nothing hangs, each rule has its code."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from khosim.abi import fdt

GOLDEN = Path(__file__).parent / "golden" / "fdt"


def golden(name: str) -> bytes:
    """One blob that a real kernel wrote."""
    return (GOLDEN / name).read_bytes()


READERS: tuple[Callable[[Any], Any], ...] = (
    fdt.fdt_check_header, fdt.fdt_check_full, fdt.dump_tree, fdt.fdt_totalsize,
    fdt.fdt_num_mem_rsv, lambda b: fdt.fdt_get_mem_rsv(b, 1), lambda b: fdt.fdt_get_string(b, 4),
    lambda b: fdt.fdt_next_tag(b, 0), lambda b: fdt.fdt_next_node(b, -1),
    lambda b: fdt.fdt_first_subnode(b, 0), lambda b: fdt.fdt_next_subnode(b, 48),
    lambda b: fdt.fdt_get_name(b, 48), lambda b: fdt.fdt_first_property_offset(b, 0),
    lambda b: fdt.fdt_next_property_offset(b, 8), lambda b: fdt.fdt_getprop_by_offset(b, 8),
    lambda b: fdt.fdt_getprop(b, 0, "preserved-memory-map"),
    lambda b: fdt.fdt_node_check_compatible(b, 0, "kho-v4"),
    lambda b: fdt.fdt_subnode_offset(b, 0, "kexec-metadata"),
    lambda b: fdt.fdt_path_offset(b, "/LUO"), lambda b: fdt.fdt_path_offset(b, "LUO"),
    lambda b: fdt.fdt_address_cells(b, 0), lambda b: fdt.fdt_size_cells(b, 0),
)  # fmt: skip
WRITERS: tuple[Callable[[Any], Any], ...] = (
    fdt.fdt_pack, lambda b: fdt.fdt_open_into(b, b, len(b)),
    lambda b: fdt.fdt_add_subnode(b, 0, "new"), lambda b: fdt.fdt_setprop(b, 0, "new", b"12345"),
    lambda b: fdt.fdt_setprop_u32(b, 0, "new", 1), lambda b: fdt.fdt_setprop_u64(b, 48, "n", 1),
    lambda b: fdt.fdt_setprop_string(b, 0, "compatible", "kho-v5"),
    lambda b: fdt.fdt_setprop_placeholder(b, 0, "new", 64),
    lambda b: fdt.fdt_appendprop(b, 0, "compatible", b"more\0"),
    lambda b: fdt.fdt_appendprop_addrrange(b, 0, 0, "reg", 1, 2),
    lambda b: fdt.fdt_delprop(b, 0, "compatible"), lambda b: fdt.fdt_del_node(b, 48),
    lambda b: fdt.fdt_add_mem_rsv(b, 1, 2), lambda b: fdt.fdt_del_mem_rsv(b, 0),
    lambda b: fdt.fdt_begin_node(b, "x"), fdt.fdt_end_node, fdt.fdt_finish,
    lambda b: fdt.fdt_property(b, "x", b"12345"), fdt.fdt_finish_reservemap,
)  # fmt: skip


def test_no_bytes_raise() -> None:
    """Cut and mangled trees, finished or not, make no function raise or write outside."""
    rng = random.Random(6)
    unfinished = bytearray(200)
    fdt.fdt_create(unfinished, 200)
    fdt.fdt_finish_reservemap(unfinished)
    fdt.fdt_begin_node(unfinished, "")
    fdt.fdt_property(unfinished, "x", b"1")
    sources = [golden("root-4-subtrees.dtb"), golden("memblock-two.dtb"), bytes(unfinished)]
    for round_nr in range(1200):
        data = bytearray(sources[round_nr % 3])
        for _ in range(rng.randrange(4)):
            word = 4 * rng.randrange(10 if rng.random() < 0.5 else len(data) // 4)
            struct.pack_into(
                ">I", data, word, rng.choice((0, 1, 3, 15, 40, 300, 1 << 31, 2**32 - 1))
            )
        data = data[: rng.randrange(len(data) + 1)]
        for read in READERS:
            before = bytes(data)
            read(data)
            assert bytes(data) == before
        for write in WRITERS:
            write(bytearray(data))


def test_beyond_the_buffer_is_truncated() -> None:
    """What libfdt would read past the end of the buffer is -FDT_ERR_TRUNCATED, not a guess."""
    blob = golden("root-4-subtrees.dtb")
    truncated = -fdt.FDT_ERR_TRUNCATED
    assert fdt.fdt_next_tag(blob[:0x43], 8) == (9, truncated)
    assert fdt.fdt_next_tag(blob[:0x47], 8) == (9, truncated)
    assert fdt.fdt_next_tag(blob[:0x48], 8) == (3, 28)
    assert fdt.fdt_subnode_offset(blob[:0x74], 0, "memblock") == truncated
    assert fdt.fdt_subnode_offset(blob[:0x75], 0, "memblock") == 0x30
    structure = struct.pack(">5I", 1, 0, 3, 8, 0) + b"12345678" + struct.pack(">2I", 2, 9)
    blob_strings_first = header(56 + 8 + 36, 64, 56, 8, 36) + b"value\0\0\0" + structure
    value, _ = fdt.fdt_getprop(blob_strings_first, 0, "value")
    assert value is not None
    assert bytes(value) == b"12345678"
    assert fdt.fdt_getprop(blob_strings_first[:91], 0, "value") == (None, truncated)
    assert fdt.fdt_getprop_by_offset(blob_strings_first[:91], 8) == (None, truncated, b"value")
    assert fdt.fdt_check_header(blob[:39]) == truncated
    assert fdt.fdt_check_header(b"\0" * 39) == -fdt.FDT_ERR_BADMAGIC
    assert fdt.fdt_num_mem_rsv(blob[:0x30]) == truncated
    dump = fdt.dump_tree(golden("root-cut.bin"))
    assert (dump.error, dump.offset) == (truncated, 0x40)
    assert dump.root is not None
    assert [node.name for node in dump.root.children] == [b"memblock", b"LUO", b"kho_test"]


def header(total: int, off_struct: int, off_strings: int, s_strings: int, s_struct: int) -> bytes:
    """A version 17 header with an empty reserve map at 0x28."""
    return struct.pack(
        ">10I", fdt.FDT_MAGIC, total, off_struct, off_strings, 40, 17, 16, 0, s_strings, s_struct
    ) + bytes(16)


def hostile(structure: bytes, strings: bytes) -> bytes:
    """A blob around hand-made blocks."""
    total = 56 + len(structure) + len(strings)
    head = header(total, 56, 56 + len(structure), len(strings), len(structure))
    return head + structure + strings


def patched(blob: bytes, **words: int) -> bytes:
    """``blob`` with header words replaced."""
    names = ("magic", "total", "struct", "strings", "rsv", "version", "last_comp")
    data = bytearray(blob)
    for name, value in words.items():
        struct.pack_into(">I", data, 4 * names.index(name), value)
    return bytes(data)


def test_header_rules() -> None:
    """Each rule of fdt_check_header and of the editing functions, at its edge."""
    blob = golden("root-4-subtrees.dtb")
    check, align, trunc = fdt.fdt_check_header, -fdt.FDT_ERR_ALIGNMENT, -fdt.FDT_ERR_TRUNCATED
    assert check(blob, addr=0x1000) == 0
    assert check(blob, addr=0x1004) == align
    assert check(patched(blob, rsv=44)) == align
    assert check(patched(blob, struct=58)) == align
    assert check(patched(blob, rsv=32)) == trunc
    assert check(patched(blob, total=404)) == trunc
    assert check(patched(blob, total=0x7FFFFFFF)) == 0
    assert check(patched(blob, total=0x80000000)) == trunc
    assert check(patched(blob, version=15)) == -fdt.FDT_ERR_BADVERSION
    assert check(patched(blob, version=18, last_comp=18)) == -fdt.FDT_ERR_BADVERSION
    assert fdt.fdt_get_name(patched(blob, total=0x7FFFFFFF), 0) == (None, trunc)
    assert fdt.fdt_get_name(patched(blob, total=0x7FFFFFFE), 0) == (b"", 0)
    room = bytes(100)
    newer = bytearray(patched(blob, version=18, total=505) + room)
    assert fdt.fdt_setprop(newer, 0, "x", b"") == 0
    assert newer[20:24] == struct.pack(">I", 17)
    low = bytearray(patched(blob, rsv=32, total=505) + room)
    assert fdt.fdt_setprop(low, 0, "x", b"") == -fdt.FDT_ERR_BADLAYOUT
    older = bytearray(patched(blob, version=16, total=505) + room)
    assert fdt.fdt_setprop(older, 0, "x", b"") == -fdt.FDT_ERR_BADVERSION


def test_nothing_after_the_root() -> None:
    """A second root, and even a NOP, behind the first is BADSTRUCTURE to the full check."""
    root = struct.pack(">3I", 1, 0, 2)
    for after, expected in ((b"", 0), (b"\0\0\0\4", -11), (root, -11)):
        blob = hostile(root + after + b"\0\0\0\x09", b"")
        assert fdt.fdt_check_full(blob) == expected
        assert fdt.dump_tree(blob).error == expected
    assert fdt.fdt_check_full(hostile(b"\0\0\0\1a\0\0\0\0\0\0\2\0\0\0\x09", b"")) == -11


def test_hostile_sizes_end_in_time() -> None:
    """Deep, wide, nameless and overlong trees of a quarter megabyte cost linear time."""
    nr_words = 1 << 16
    node, end = struct.pack(">2I", 1, 0), struct.pack(">I", 9)
    props = b"".join(struct.pack(">3I", 3, 0, i) for i in range(nr_words // 3))
    blobs = [
        hostile(node * (nr_words // 2), b""),
        hostile(struct.pack(">I", 4) * nr_words, b""),
        hostile(struct.pack(">I", 1) + b"n" * (4 * nr_words), b""),
        hostile(node + props + struct.pack(">2I", 2, 9), b"p" * nr_words * 2),
        hostile(node + props + struct.pack(">2I", 2, 9), b"p" * nr_words * 2 + b"\0"),
        hostile(node + struct.pack(">3I", 3, 4 * nr_words, 0) + bytes(4 * nr_words), b"p\0") + end,
        header(1 << 31 - 1, 56, 56, 0, 1 << 30) + struct.pack(">I", 4) * nr_words,
    ]
    started = time.perf_counter()
    for blob in blobs:
        for read in READERS:
            read(blob)
    assert time.perf_counter() - started < 20
