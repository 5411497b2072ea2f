"""khosim.abi.fdt against the real libfdt, call by call and byte by byte.

The oracle is the C library inside ``pylibfdt``'s extension module, called through ctypes on a
buffer of its own, so that every return code and every byte can be compared.
"""

from __future__ import annotations

import ctypes
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim.abi import fdt

if os.environ.get("CI") == "true":
    import libfdt  # noqa: F401
else:
    pytest.importorskip("libfdt")

GOLDEN = Path(__file__).parent / "golden" / "fdt"
SLACK = 64  # bytes behind a blob that both sides see
P, I32, U32, U64, S = (
    ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_char_p,
)  # fmt: skip


class Oracle:
    """The C library on one 8-byte aligned buffer."""

    def __init__(self, blob: bytes, lib: ctypes.CDLL) -> None:
        self.lib = lib
        self.words = (ctypes.c_uint64 * (len(blob) // 8 + 2))()
        self.base = ctypes.addressof(self.words)
        self.view = memoryview(self.words).cast("B").cast("B")[: len(blob)]
        self.view[:] = blob

    def content(self) -> bytes:
        """The buffer as it is now."""
        return bytes(self.view)

    def call(self, name: str, *args: Any, returns: Any = I32) -> Any:
        """Call ``name`` with the buffer first."""
        function = getattr(self.lib, name)
        function.restype = returns
        return function(P(self.base), *args)

    def getprop(self, offset: int, name: bytes) -> tuple[bytes | None, int]:
        """``fdt_getprop`` as khosim returns it."""
        length = I32()
        at = self.call("fdt_getprop", I32(offset), S(name), ctypes.byref(length), returns=P)
        return (ctypes.string_at(at, length.value) if at else None), length.value

    def getprop_by_offset(self, offset: int) -> tuple[bytes | None, int, bytes | None]:
        """``fdt_getprop_by_offset`` as khosim returns it."""
        length, name = I32(), S()
        at = self.call(
            "fdt_getprop_by_offset", I32(offset), ctypes.byref(name), ctypes.byref(length),
            returns=P,
        )  # fmt: skip
        return (ctypes.string_at(at, length.value), length.value, name.value) if at else (
            None, length.value, None,
        )  # fmt: skip

    def named(self, function: str, offset: int) -> tuple[bytes | None, int]:
        """``fdt_get_name`` or ``fdt_get_string``."""
        length = I32()
        at = self.call(function, I32(offset), ctypes.byref(length), returns=P)
        return (ctypes.string_at(at, length.value) if at else None), length.value

    def next_tag(self, offset: int) -> tuple[int, int]:
        """``fdt_next_tag`` as khosim returns it."""
        after = I32()
        tag = self.call("fdt_next_tag", I32(offset), ctypes.byref(after), returns=U32)
        return tag, after.value

    def next_node(self, offset: int, depth: int | None) -> tuple[int, int]:
        """``fdt_next_node`` as khosim returns it."""
        level = I32(depth or 0)
        pointer = None if depth is None else ctypes.byref(level)
        return self.call("fdt_next_node", I32(offset), pointer), level.value

    def mem_rsv(self, n: int) -> tuple[int, int, int]:
        """``fdt_get_mem_rsv`` as khosim returns it."""
        address, size = U64(), U64()
        err = self.call("fdt_get_mem_rsv", I32(n), ctypes.byref(address), ctypes.byref(size))
        return err, address.value, size.value


@pytest.fixture(scope="session")
def lib() -> ctypes.CDLL:
    """The C library that pylibfdt carries."""
    import _libfdt  # type: ignore[import-not-found]

    return ctypes.CDLL(_libfdt.__file__)


NAMES = (b"compatible", b"preserved-data", b"blob-size", b"reg", b"size", b"e", b"", b"x" * 40)
NODES = (b"memblock", b"LUO", b"data", b"uart@1000", b"uart", b"cpu@1", b"cpu", b"", b"n" * 30)
PATHS = (
    b"/", b"", b"//", b"/memblock", b"/data/", b"data", b"/cpu/uart", b"//memblock//e", b"al",
    b"al/cpu", b"/memblock@1", b"/aliases",
)  # fmt: skip


def random_blob(rng: random.Random) -> bytes:
    """A sound tree, of any supported version, with NOPs, reserve entries and odd values."""
    strings = bytearray()
    offsets: dict[bytes, int] = {}
    out = bytearray()
    version = rng.choice((17, 17, 17, 17, 16, 3, 2))

    def prop(name: bytes, value: bytes) -> None:
        if name not in offsets:
            offsets[name] = len(strings)
            strings.extend(name + b"\0")
        out.extend(struct.pack(">3I", 3, len(value), offsets[name]))
        if version < 16 and len(value) >= 8 and len(out) % 8:
            out.extend(bytes(4))
        out.extend(value + bytes(-len(value) % 4))

    def node(path: bytes, name: bytes, depth: int) -> None:
        full = path + b"/" + name if version < 16 else name
        out.extend(struct.pack(">I", 1) + full + bytes(4 - len(full) % 4))
        for _ in range(rng.randrange(4)):
            if rng.random() < 0.2:
                out.extend(struct.pack(">I", 4))
            name = rng.choice(NAMES)
            value = rng.choice(
                (b"", rng.randbytes(rng.randrange(14)), b"kho-v4\0", b"a\0kho-v4\0", b"kho-v4",
                 rng.randbytes(8), b"/cpu@1\0", b"/memblock\0")
            )  # fmt: skip
            prop(name, value)
        if depth == 1 and rng.random() < 0.5:
            prop(b"al", b"/cpu@1\0")
        while depth < 4 and rng.random() < 0.55:
            child = b"aliases" if depth == 0 and rng.random() < 0.2 else rng.choice(NODES)
            node(full if path else b"", child, depth + 1)
        out.extend(struct.pack(">I", 2))

    node(b"", b"", 0)
    out.extend(struct.pack(">I", 9))
    nr_rsv = rng.choice((0, 0, 0, 1, 3))
    rsv = b"".join(struct.pack(">2Q", rng.getrandbits(40), 4096 * (i + 1)) for i in range(nr_rsv))
    rsv += bytes(16)
    gaps = [8 * rng.choice((0, 0, 0, 1, 5)) for _ in range(4)]
    blocks = [(16, rsv), (8, bytes(out)), (12, bytes(strings))]
    if rng.random() < 0.15:
        rng.shuffle(blocks)
    at = 40 + gaps[0]
    header = bytearray(struct.pack(">10I", 0xD00DFEED, 0, 0, 0, 0, version, min(version, 16),
                                   rng.getrandbits(32), len(strings), len(out)))  # fmt: skip
    body = bytearray(gaps[0])
    for (word, block), gap in zip(blocks, gaps[1:], strict=True):
        struct.pack_into(">I", header, word, at)
        block += rng.randbytes(-len(block) % 8 + gap)
        body += block
        at += len(block)
    struct.pack_into(">I", header, 4, at)
    return bytes(header + body)


INTERESTING = (0, 1, 2, 3, 4, 7, 9, 16, 17, 18, 40, 0x7FFFFFFF, 0x7FFFFFFE, 0x80000000, 0xFFFFFFFF,
               0xFFFFFFF0, 0x2F012112, 0xD00DFEED)  # fmt: skip


def mutate(rng: random.Random, blob: bytes) -> bytes:
    """``blob`` with a few bytes, words or header fields changed; same length plus slack."""
    data = bytearray(blob)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 8))):
        kind = rng.randrange(6)
        word = 4 * rng.randrange(10) if kind < 2 else 4 * rng.randrange(len(data) // 4)
        if kind == 0 or kind == 2:
            struct.pack_into(">I", data, word, rng.choice(INTERESTING))
        elif kind == 1 or kind == 3:
            value = struct.unpack_from(">I", data, word)[0] + rng.choice((-8, -4, -1, 1, 4, 8, 64))
            struct.pack_into(">I", data, word, value & 0xFFFFFFFF)
        elif kind == 4:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            data[rng.randrange(len(data))] = 0
    return bytes(data) + rng.randbytes(SLACK)


def totalsize(data: bytes | memoryview) -> int:
    """The size that the header claims."""
    total: int = struct.unpack_from(">I", data, 4)[0]
    return total


def plain(value: memoryview | None) -> bytes | None:
    """A value as bytes."""
    return None if value is None else bytes(value)


def assert_header_code(data: bytes, ours: int, theirs: int) -> bool:
    """Equal codes, but for one rule that the kernel's libfdt has and dtc 1.7.2 lacks.

    The kernel's copy refuses a reserve map off 8 bytes and a structure off 4 bytes.
    """
    if ours != theirs:
        assert ours == -fdt.FDT_ERR_ALIGNMENT
        _, _, off_struct, _, off_rsv = struct.unpack_from(">5I", data)
        assert off_struct % 4 or off_rsv % 8
        assert theirs not in (-fdt.FDT_ERR_BADMAGIC, -fdt.FDT_ERR_BADVERSION)
    return ours == theirs


def compare_reads(data: bytes, oracle: Oracle) -> None:
    """Every reading function, at every tag of the tree and some places beside."""
    mv = memoryview(data)
    call = oracle.call
    assert_header_code(data, fdt.fdt_check_header(mv), call("fdt_check_header"))
    if totalsize(data) >= 16:  # below, libfdt's bound underflows and it reads anywhere
        assert fdt.fdt_num_mem_rsv(mv) == call("fdt_num_mem_rsv")
        for n in (-1, 0, 1, 3):
            assert fdt.fdt_get_mem_rsv(mv, n) == oracle.mem_rsv(n)
    for stroffset in (-9, -1, 0, 1, 12, 60):
        assert fdt.fdt_get_string(mv, stroffset) == oracle.named("fdt_get_string", stroffset)
    for path in PATHS:
        assert fdt.fdt_path_offset(mv, path) == call("fdt_path_offset", S(path))
    offsets = [-1, 1, 2, 0x7FFFFFF8]
    offset = 0
    while offset >= 0 and len(offsets) < 60:
        offsets.append(offset)
        tag, after = fdt.fdt_next_tag(mv, offset)
        if tag == 9:
            break
        offset = after
    for offset in offsets:
        assert fdt.fdt_next_tag(mv, offset) == oracle.next_tag(offset)
        assert fdt.fdt_next_node(mv, offset) == oracle.next_node(offset, None)
        assert fdt.fdt_next_node(mv, offset, 0) == oracle.next_node(offset, 0)
        assert fdt.fdt_get_name(mv, offset) == oracle.named("fdt_get_name", offset)
        value, length, name = fdt.fdt_getprop_by_offset(mv, offset)
        assert (plain(value), length, name) == oracle.getprop_by_offset(offset)
        for function in (
            "fdt_first_subnode", "fdt_next_subnode", "fdt_first_property_offset",
            "fdt_next_property_offset",
        ):  # fmt: skip
            assert getattr(fdt, function)(mv, offset) == call(function, I32(offset)), function
        for key in NAMES[:3]:
            value, length = fdt.fdt_getprop(mv, offset, key)
            assert (plain(value), length) == oracle.getprop(offset, key)
        for key in (b"memblock", b"uart", b"cpu@1", b""):
            assert fdt.fdt_subnode_offset(mv, offset, key) == call(
                "fdt_subnode_offset", I32(offset), S(key)
            )
        for key in (b"kho-v4", b"a", b""):
            assert fdt.fdt_node_check_compatible(mv, offset, key) == call(
                "fdt_node_check_compatible", I32(offset), S(key)
            )


def test_reads_of_hostile_blobs(lib: ctypes.CDLL) -> None:
    """Mutated trees get libfdt's very code from every reading function."""
    rng = random.Random(1)
    blobs = [path.read_bytes() for path in sorted(GOLDEN.glob("*.dtb"))]
    refused = 0
    for round_nr in range(700):
        blob = random_blob(rng) if round_nr % 2 else rng.choice(blobs)
        data = mutate(rng, blob)
        if totalsize(data) > len(data):
            continue  # libfdt would read outside
        compare_reads(data, Oracle(data, lib))
        refused += fdt.fdt_check_header(data) != 0
    assert 50 < refused < 600


def test_full_check_of_hostile_blobs(lib: ctypes.CDLL) -> None:
    """fdt_check_full accepts and refuses as libfdt does, truncated buffers included."""
    rng = random.Random(2)
    blobs = [path.read_bytes() for path in sorted(GOLDEN.glob("*.dtb"))]
    seen: dict[int, int] = {}
    for round_nr in range(6000):
        blob = random_blob(rng) if round_nr % 3 == 0 else rng.choice(blobs)
        data = mutate(rng, blob)
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data))]
        code = Oracle(data, lib).call("fdt_check_full", ctypes.c_size_t(len(data)))
        if not assert_header_code(data, fdt.fdt_check_full(data), code):
            continue
        if len(data) >= 40 and totalsize(data) <= len(data):
            assert fdt.dump_tree(data, max_nodes=1 << 20, max_depth=1 << 20).error == code
        seen[code] = seen.get(code, 0) + 1
    codes = {-fdt.FDT_ERR_TRUNCATED, -fdt.FDT_ERR_BADMAGIC, -fdt.FDT_ERR_BADVERSION, 0}
    assert codes | {-fdt.FDT_ERR_BADSTRUCTURE, -fdt.FDT_ERR_BADOFFSET} <= set(seen)


def test_lengths_that_overflow(lib: ctypes.CDLL) -> None:
    """Property lengths around INT_MAX in a blob that claims 4 GiB wrap as C's int does."""
    wrapped = 0
    for length in (*range(0x7FFFFFE0, 0x80000004), 0xFFFFFFF0, 0xFFFFFFFF):
        head = struct.pack(">10I", 0xD00DFEED, 0xFFFFFFFF, 56, 56, 40, 17, 16, 0, 0, 0xFFFFFFFF)
        data = head + bytes(16) + struct.pack(">5I", 1, 0, 3, length, 0) + bytes(SLACK)
        oracle = Oracle(data, lib)
        tag, after = fdt.fdt_next_tag(data, 8)
        assert (tag, after) == oracle.next_tag(8)
        if after >= 0:
            continue  # libfdt would read 2 GiB further on
        wrapped += tag == 3
        assert fdt.fdt_getprop(data, 0, "x") == oracle.getprop(0, b"x")
        assert fdt.fdt_next_node(data, 0) == oracle.next_node(0, None)
        assert fdt.fdt_first_property_offset(data, 0) == oracle.call(
            "fdt_first_property_offset", I32(0)
        )
        assert fdt.fdt_next_property_offset(data, 8) == oracle.call(
            "fdt_next_property_offset", I32(8)
        )
    assert wrapped


def test_misaligned_address(lib: ctypes.CDLL) -> None:
    """A blob at an address that is no multiple of 8 is refused where libfdt refuses it."""
    blob = (GOLDEN / "root-4-subtrees.dtb").read_bytes()
    oracle = Oracle(bytes(4) + blob + bytes(8), lib)
    oracle.base += 4
    assert fdt.fdt_check_header(blob, addr=4) == oracle.call("fdt_check_header") == -19
    value, length = fdt.fdt_getprop(blob, 0, "compatible", addr=4)
    assert (value, length) == oracle.getprop(0, b"compatible")
    assert fdt.fdt_subnode_offset(blob, 0, "LUO", addr=4) == oracle.call(
        "fdt_subnode_offset", I32(0), S(b"LUO")
    )
    assert fdt.fdt_get_name(blob, 0, addr=4) == oracle.named("fdt_get_name", 0)
    assert fdt.fdt_check_full(blob, addr=4) == -19


Step = tuple[str, Callable[[memoryview], Any], Callable[[Oracle], Any]]


def edit_step(rng: random.Random, data: bytes, bufsize: int) -> Step:
    """One random editing call, for both sides."""
    nodes = [0]
    offset, depth = 0, 0
    while len(nodes) < 30:
        offset, depth = fdt.fdt_next_node(data, offset, depth)
        if offset < 0 or depth < 0:
            break
        nodes.append(offset)
    node = rng.choice((*nodes, rng.choice((-1, 4, 6, 8, 1 << 20))))
    name, value = rng.choice(NAMES), rng.randbytes(rng.choice((0, 1, 3, 4, 5, 8, 13, 16)))
    child = rng.choice(NODES)
    size, n = rng.getrandbits(34), rng.randrange(3)
    length = I32(len(value))
    steps: tuple[Step, ...] = (
        ("setprop", lambda mv: fdt.fdt_setprop(mv, node, name, value),
         lambda o: o.call("fdt_setprop_namelen", I32(node), S(name), I32(len(name)), value,
                          length)),
        ("appendprop", lambda mv: fdt.fdt_appendprop(mv, node, name, value),
         lambda o: o.call("fdt_appendprop", I32(node), S(name), value, length)),
        ("delprop", lambda mv: fdt.fdt_delprop(mv, node, name),
         lambda o: o.call("fdt_delprop", I32(node), S(name))),
        ("add_subnode", lambda mv: fdt.fdt_add_subnode(mv, node, child),
         lambda o: o.call("fdt_add_subnode", I32(node), S(child))),
        ("del_node", lambda mv: fdt.fdt_del_node(mv, node),
         lambda o: o.call("fdt_del_node", I32(node))),
        ("addrrange",
         lambda mv: fdt.fdt_appendprop_addrrange(mv, 0, node, name, size, size // 3),
         lambda o: o.call("fdt_appendprop_addrrange", I32(0), I32(node), S(name), U64(size),
                          U64(size // 3))),
        ("add_mem_rsv", lambda mv: fdt.fdt_add_mem_rsv(mv, size, 4096),
         lambda o: o.call("fdt_add_mem_rsv", U64(size), U64(4096))),
        ("del_mem_rsv", lambda mv: fdt.fdt_del_mem_rsv(mv, n),
         lambda o: o.call("fdt_del_mem_rsv", I32(n))),
        ("pack", fdt.fdt_pack, lambda o: o.call("fdt_pack")),
        ("open_into", lambda mv: fdt.fdt_open_into(mv, mv, bufsize),
         lambda o: o.call("fdt_open_into", P(o.base), I32(bufsize))),
    )  # fmt: skip
    weights = (6, 3, 2, 6, 1, 2, 1, 1, 1, 2)
    return rng.choices(steps, weights)[0]


def compare_edits(rng: random.Random, data: bytes, bufsize: int, oracle: Oracle) -> int:
    """Random edits in one buffer, compared byte for byte after each; how many succeeded."""
    mine = memoryview(bytearray(data))
    done = 0
    assert fdt.fdt_open_into(mine, mine, bufsize) == oracle.call(
        "fdt_open_into", P(oracle.base), I32(bufsize)
    )
    for _ in range(12):
        if totalsize(mine) > len(data) or fdt.fdt_num_mem_rsv(mine) < 0:
            break  # libfdt would write outside
        name, ours, theirs = edit_step(rng, bytes(mine), bufsize)
        result = ours(mine)
        assert result == theirs(oracle), name
        assert bytes(mine) == oracle.content(), name
        done += result >= 0
    return done


def test_edits_of_sound_trees(lib: ctypes.CDLL) -> None:
    """Random edits leave libfdt's bytes in the whole buffer, stale padding included."""
    rng = random.Random(3)
    done = 0
    for _ in range(500):
        blob = random_blob(rng)
        bufsize = len(blob) + rng.choice((0, 40, 200, 1000))
        data = blob + rng.randbytes(bufsize - len(blob) + SLACK)
        done += compare_edits(rng, data, bufsize, Oracle(data, lib))
    assert done > 1500


def test_edits_of_hostile_trees(lib: ctypes.CDLL) -> None:
    """Edits of damaged trees return libfdt's code and do libfdt's damage, no more."""
    rng = random.Random(4)
    done = 0
    for _ in range(700):
        data = mutate(rng, random_blob(rng))
        sound = fdt.fdt_check_header(data) == 0 and fdt.fdt_num_mem_rsv(data) >= 0
        if totalsize(data) > len(data) or not sound:
            continue  # opening it would move blocks from outside the buffer
        data += rng.randbytes(8192)
        done += compare_edits(rng, data, len(data) - 4096, Oracle(data, lib))
    assert done > 500


def test_open_into_another_buffer(lib: ctypes.CDLL) -> None:
    """Opening into a second buffer converts and reorders as libfdt does."""
    rng = random.Random(5)
    for _ in range(200):
        blob = random_blob(rng)
        bufsize = len(blob) + rng.choice((-16, 0, 8, 100))
        target = bytearray(bufsize)
        oracle, other = Oracle(blob, lib), Oracle(bytes(bufsize), lib)
        code = oracle.call("fdt_open_into", P(other.base), I32(bufsize))
        assert fdt.fdt_open_into(blob, target, bufsize) == code
        assert bytes(target) == other.content()


CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.sampled_from(NODES)),
        st.tuples(st.just("end")),
        st.tuples(st.just("prop"), st.sampled_from(NAMES), st.binary(max_size=20)),
        st.tuples(st.just("rsv"), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
        st.tuples(st.just("finish_rsv")),
        st.tuples(st.just("finish")),
    ),
    max_size=25,
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(bufsize=st.integers(0, 500), flags=st.integers(0, 2), in_order=st.booleans(), calls=CALLS)
def test_sequential_write(bufsize: int, flags: int, in_order: bool, calls: list[Any]) -> None:
    """Any sequence of sequential-write calls, in or out of turn, gives libfdt's bytes and codes."""
    import _libfdt

    start = b"\xa5" * (bufsize + SLACK)
    mine = memoryview(bytearray(start))
    oracle = Oracle(start, ctypes.CDLL(_libfdt.__file__))
    code = oracle.call("fdt_create_with_flags", I32(bufsize), U32(flags))
    assert fdt.fdt_create_with_flags(mine, bufsize, flags) == code
    if in_order:
        calls = [("finish_rsv",), ("begin", b""), *calls, ("end",), ("finish",)]
    for kind, *args in calls:
        if kind == "begin":
            result = fdt.fdt_begin_node(mine, args[0])
            code = oracle.call("fdt_begin_node", S(args[0]))
        elif kind == "end":
            result, code = fdt.fdt_end_node(mine), oracle.call("fdt_end_node")
        elif kind == "prop":
            result = fdt.fdt_property(mine, *args)
            code = oracle.call("fdt_property", S(args[0]), args[1], I32(len(args[1])))
        elif kind == "rsv":
            result = fdt.fdt_add_reservemap_entry(mine, *args)
            code = oracle.call("fdt_add_reservemap_entry", U64(args[0]), U64(args[1]))
        elif kind == "finish_rsv":
            result, code = fdt.fdt_finish_reservemap(mine), oracle.call("fdt_finish_reservemap")
        else:
            result, code = fdt.fdt_finish(mine), oracle.call("fdt_finish")
        assert result == code, kind
        assert bytes(mine) == oracle.content(), kind
        if result == 0 and kind != "finish_rsv" and bufsize >= 48:
            assert fdt.fdt_get_string(mine, -4) == oracle.named("fdt_get_string", -4)


@pytest.mark.parametrize("bufsize", [0, 47, 48, 64, 80, 100, 4096])
def test_empty_tree(lib: ctypes.CDLL, bufsize: int) -> None:
    """fdt_create_empty_tree fills the buffer as libfdt does, at every size."""
    oracle = Oracle(b"\xff" * 4096, lib)
    mine = bytearray(b"\xff" * 4096)
    code = oracle.call("fdt_create_empty_tree", I32(bufsize))
    assert fdt.fdt_create_empty_tree(mine, bufsize) == code
    assert bytes(mine) == oracle.content()


def test_error_texts(lib: ctypes.CDLL) -> None:
    """fdt_strerror says what libfdt says."""
    lib.fdt_strerror.restype = S
    for code in range(-30, 3):
        assert fdt.fdt_strerror(code) == lib.fdt_strerror(I32(code)).decode()
