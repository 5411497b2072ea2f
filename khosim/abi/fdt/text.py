"""Device tree source, for people: blob to text and text to blob.

The text is written and parsed by the ``fdt`` package (imported on first use); reading and writing
of blobs stays with libfdt's rules in this package. Around the ``fdt`` package's limits:

* strings and comments are lifted out before it parses, so that ``//``, ``;`` and quotes in a
  string survive; every statement gets its own line;
* values are typed by :mod:`khosim.abi.fdt.schema` and native integers are written as bytes, so
  that text keeps every byte;
* it reads no blob, so its guessing of types and its shared reservation list never matter;
* ``/incbin/``, ``/bits/``, ``/include/``, ``/delete-node/`` and a second root are refused rather
  than skipped.

Left out: overlays, expressions, labels on properties.
"""

from __future__ import annotations

import importlib
import re
import warnings
from typing import Any

from khosim.abi.fdt._blob import OFF_TOTALSIZE, U32, Buffer
from khosim.abi.fdt.errors import FDT_ERR_NOSPACE, fdt_strerror
from khosim.abi.fdt.schema import property_kind, typed_value
from khosim.abi.fdt.sw import (
    fdt_add_reservemap_entry,
    fdt_begin_node,
    fdt_create,
    fdt_end_node,
    fdt_finish,
    fdt_finish_reservemap,
    fdt_property,
)
from khosim.abi.fdt.tree import FdtNode, dump_tree
from khosim.errors import InputError

__all__ = ("blob_to_dts", "build_blob", "dts_to_blob")

_TOKEN = re.compile(r'"((?:\\.|[^"\\])*)"|//[^\n]*|/\*.*?\*/', re.DOTALL)
_BYTESTRING = re.compile(r"\[([0-9a-fA-F\s]*)\]")
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{1,2}|[0-7]{1,3}|.)", re.DOTALL)
_PROPERTY_NAME = re.compile(r"[0-9a-zA-Z,._+?#-]+\Z")
_NODE_NAME = re.compile(r"[0-9a-zA-Z,._+@#-]+\Z")
_ESCAPES = {"n": 10, "t": 9, "r": 13, "a": 7, "b": 8, "f": 12, "v": 11}
_MAX_DEPTH = 64
_MAX_BLOB_BYTES = 1 << 26


def _package() -> Any:
    """The ``fdt`` package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # an unescaped regex in its source
        return importlib.import_module("fdt")


def _node_to_package(package: Any, node: FdtNode, compatibles: list[str], place: str) -> Any:
    try:
        out = package.Node(node.name.decode("ascii") or "/")
        own = node.prop(b"compatible") or b""
        compatibles = [*own.rstrip(b"\0").decode("latin-1").split("\0"), *compatibles]
        for raw_name, value in node.props:
            name = raw_name.decode("ascii")
            kind = property_kind(compatibles, name, value)
            if not value:
                prop = package.Property(name)
            elif kind == "strings":
                prop = package.PropStrings(name)
                strings = typed_value(kind, value)
                assert isinstance(strings, list)
                prop.data = [str(text).replace("\\", "\\\\") for text in strings]
            elif kind == "cells":
                prop = package.PropWords(name)
                prop.data = typed_value(kind, value)
            else:
                prop = package.PropBytes(name, data=value)
            out.props.append(prop)
    except (UnicodeDecodeError, AssertionError) as error:
        raise InputError(place, f"a name in node {node.name!r} is not printable") from error
    for child in node.children:
        out.nodes.append(_node_to_package(package, child, compatibles, place))
    return out


def blob_to_dts(blob: Buffer, *, place: str = "FDT") -> str:
    """Device tree source for a blob. Raises :class:`InputError` naming ``place`` for a bad one."""
    dump = dump_tree(blob, max_depth=_MAX_DEPTH)
    if dump.error or dump.root is None:
        raise InputError(place, f"{fdt_strerror(dump.error)} at byte {dump.offset:#x}")
    package = _package()
    tree = package.FDT(entries=[{"address": at, "size": size} for at, size in dump.reserve_map])
    tree.root = _node_to_package(package, dump.root, [], place)
    text: str = tree.to_dts()
    return text


def build_blob(root: FdtNode, reserve_map: list[tuple[int, int]] | None = None) -> bytes:
    """The blob that sequential-write calls make of a tree: properties first, then children.

    Raises :class:`InputError` beyond 64 MiB.
    """
    len_bytes = 4096
    while True:
        buf = memoryview(bytearray(len_bytes))
        err = fdt_create(buf, len_bytes)
        for addr, size in reserve_map or ():
            err = err or fdt_add_reservemap_entry(buf, addr, size)
        err = err or fdt_finish_reservemap(buf)
        stack: list[FdtNode | None] = [root]
        while stack and not err:
            node = stack.pop()
            if node is None:
                err = fdt_end_node(buf)
                continue
            err = fdt_begin_node(buf, node.name)
            for name, value in node.props:
                err = err or fdt_property(buf, name, value)
            stack.append(None)
            stack.extend(reversed(node.children))
        err = err or fdt_finish(buf)
        if err == 0:
            return bytes(buf[: U32.unpack_from(buf, OFF_TOTALSIZE)[0]])
        if err != -FDT_ERR_NOSPACE or len_bytes >= _MAX_BLOB_BYTES:
            raise InputError("device tree", fdt_strerror(err))
        len_bytes *= 4


def _unescape(text: str) -> bytes:
    def one(match: re.Match[str]) -> str:
        code = match[1]
        if code[0] == "x" and len(code) > 1:
            return chr(int(code[1:], 16))
        if code[0] in "01234567":
            return chr(int(code, 8) & 0xFF)
        return chr(_ESCAPES.get(code, ord(code)))

    return _ESCAPE.sub(one, text).encode("latin-1")


def _normalise(text: str, strings: list[bytes]) -> str:
    """One statement a line, no comments, each string a number into ``strings``."""

    def lift(match: re.Match[str]) -> str:
        if match[1] is None:
            return " "
        strings.append(_unescape(match[1]))
        return f'"s{len(strings) - 1}"'

    def space(match: re.Match[str]) -> str:
        digits = "".join(match[1].split())
        return "[" + " ".join(digits[at : at + 2] for at in range(0, len(digits), 2)) + "]"

    text = _BYTESTRING.sub(space, _TOKEN.sub(lift, text))
    text = " ".join(text.split())
    return re.sub(r"([{;])", r"\1\n", text.replace("}", "\n}")).replace("}\n;", "};")


def _raw_value(package: Any, prop: Any, strings: list[bytes]) -> bytes:
    if isinstance(prop, package.PropBytes):
        return bytes(prop.data)
    if isinstance(prop, package.PropWords):
        return b"".join(word.to_bytes(4, "big") for word in prop.data)
    if isinstance(prop, package.PropStrings):
        return b"".join(strings[int(text[1:])] + b"\0" for text in prop.data)
    return b""


def _node_from_package(package: Any, node: Any, strings: list[bytes], depth: int) -> FdtNode:
    name = "" if depth == 0 else node.name
    if depth > _MAX_DEPTH or not (_NODE_NAME.match(name) if depth else node.name == "/"):
        raise ValueError(f"node {node.name!r} is out of place")
    props = []
    for prop in node.props:
        if prop.name.endswith("_with_references"):
            continue  # the package's note of a phandle that it has resolved
        if not _PROPERTY_NAME.match(prop.name):
            raise ValueError(f"cannot read {prop.name!r}")
        props.append((prop.name.encode(), _raw_value(package, prop, strings)))
    children = [_node_from_package(package, child, strings, depth + 1) for child in node.nodes]
    return FdtNode(name.encode(), props, children)


def dts_to_blob(text: str, *, place: str = "DTS") -> bytes:
    """The blob for device tree source, laid out as sequential write lays it out.

    Raises :class:`InputError` naming ``place`` for text that cannot be read in full.
    """
    strings: list[bytes] = []
    try:
        lines = _normalise(text, strings)
        if re.search(r"/(incbin|bits|include|plugin|delete-node|delete-property)/", lines):
            raise ValueError("directives inside the tree are not supported")
        if lines.count("{") != lines.count("}") or len(re.findall(r"(?m)^ ?/ \{$", lines)) != 1:
            raise ValueError("braces do not match around exactly one root node")
        package = _package()
        tree = package.parse_dts(lines)
        if tree.root is None:
            raise ValueError("there is no root node")
        root = _node_from_package(package, tree.root, strings, 0)
        reserve_map = [(entry["address"], entry["size"]) for entry in tree.entries]
        return build_blob(root, reserve_map)
    except InputError:
        raise
    except Exception as error:  # the package raises bare Exception, AssertionError, IndexError...
        raise InputError(place, str(error) or type(error).__name__) from error
