"""The checkers' reader of flattened device trees: strict, and unable to fail.

Reads what ``scripts/dtc/libfdt`` writes (format version 17), from the format's own description
and not by libfdt's walk: header, memory reservation block, structure block, strings block
(``include/linux/kho/abi/kexec_handover.h``, ``abi/memblock.h`` @ 7.3 for what lies inside).
Whatever libfdt would never write becomes a :class:`~khosim.checks.reader.Problem`; what could be
read up to there is kept. Time and memory are bounded by the ``limit`` the caller trusts.

Left out: libfdt's error codes (those belong to the simulated kernel), versions before 16, and the
entries of the reservation block, which no handover has.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from khosim.checks.reader import Problem, ProblemLog
from khosim.errors import RamFault

if TYPE_CHECKING:
    from khosim.checks.reader import Reader

__all__ = ("Fdt", "Node", "decode_fdt", "parse_fdt")

_HEADER = Struct(">10I")
_U32 = Struct(">I")
_2U32 = Struct(">2I")
_MAGIC = 0xD00DFEED
_VERSION = 17
_LAST_COMP_VERSION = 16
_MAX_DEPTH = 64
_MAX_NAME_BYTES = 64  # shown of a node's name in the path to a problem
_SMALL_BYTES = 4096
_MAX_BYTES = 2 << 20  # more than libfdt-made handover blobs ever hold

_BEGIN_NODE, _END_NODE, _PROP, _NOP, _END = 1, 2, 3, 4, 9


@dataclass(frozen=True, slots=True)
class Node:
    """One node: its name, its properties and its children, in the order of the bytes."""

    name: bytes
    props: tuple[tuple[bytes, bytes], ...]
    children: tuple[Node, ...]

    def prop(self, name: bytes) -> bytes | None:
        """Value of the first property of that name, or None."""
        for key, value in self.props:
            if key == name:
                return value
        return None

    def u64(self, name: bytes) -> int | None:
        """Value of a native-endian u64 property, or None where it is absent or no 8 bytes."""
        value = self.prop(name)
        return int.from_bytes(value, "little") if value is not None and len(value) == 8 else None

    def strings(self, name: bytes) -> tuple[bytes, ...]:
        """The strings of a NUL-terminated string list property, ``()`` where it is none."""
        value = self.prop(name)
        return tuple(value[:-1].split(b"\0")) if value and value[-1] == 0 else ()

    def child(self, name: bytes) -> Node | None:
        """The first child of that name, or None."""
        for node in self.children:
            if node.name == name:
                return node
        return None


class Fdt(NamedTuple):
    """A decoded blob. ``root`` is None where not even a root node could be read.

    ``data`` is the blob's bytes, as many as its header claims, cut at what the caller trusts.
    """

    root: Node | None
    data: bytes
    problems: tuple[Problem, ...]


def decode_fdt(reader: Reader, phys: int, limit: int) -> Fdt:
    """Decode the blob at physical address ``phys``, which may take up to ``limit`` bytes.

    Never raises on the contents; memory that is no RAM is a problem like any other.
    """
    try:
        if limit < _HEADER.size:
            raise RamFault(phys, _HEADER.size, f"only {limit} bytes for an FDT header")
        totalsize = _2U32.unpack(reader.read(phys, 8))[1]
        size = max(_HEADER.size, min(totalsize, limit, _MAX_BYTES))
        data = reader.read(phys, size)
    except RamFault as fault:
        return Fdt(None, b"", (Problem("fdt-unreadable", phys, str(fault)),))
    return parse_fdt(data, phys)


def parse_fdt(data: bytes, phys: int = 0) -> Fdt:
    """Decode the blob in ``data``; ``phys`` only serves to name addresses in problems."""
    # What is known of small blobs is remembered: each is looked at several times.
    return _parse_small(data, phys) if len(data) <= _SMALL_BYTES else _parse(data, phys)


def _parse(data: bytes, phys: int) -> Fdt:
    log = ProblemLog()
    root = None
    if len(data) < _HEADER.size:
        log.add("fdt-header", phys, f"{len(data)} bytes are too few for an FDT header")
    else:
        header = _HEADER.unpack_from(data)
        if _check_header(header, len(data), phys, log):
            data = data[: header[1]]
            _check_blocks(header, data, phys, log)
            root = _Walk(data, header, phys, log).run()
    return Fdt(root, data, log.done())


_parse_small = lru_cache(maxsize=64)(_parse)


def _check_header(header: tuple[int, ...], have_bytes: int, phys: int, log: ProblemLog) -> bool:
    """Note what is wrong with the header's fields; False where no walk makes sense."""
    magic, totalsize, _, _, _, version, last_comp, _, _, _ = header
    if magic != _MAGIC:
        log.add("fdt-magic", phys, f"magic is {magic:#010x}, not {_MAGIC:#010x}")
        return False
    if version != _VERSION or last_comp != _LAST_COMP_VERSION:
        log.add("fdt-version", phys + 20, f"version {version}, compatible back to {last_comp}")
        if version < _VERSION or last_comp > _VERSION:
            return False
    if totalsize < _HEADER.size:
        log.add("fdt-totalsize", phys + 4, f"totalsize {totalsize} is less than a header")
        return False
    if totalsize > have_bytes:
        log.add("fdt-totalsize", phys + 4, f"totalsize {totalsize} exceeds {have_bytes} bytes")
    return True


def _check_blocks(header: tuple[int, ...], data: bytes, phys: int, log: ProblemLog) -> None:
    """Note blocks that are misaligned, out of bounds or laid over each other."""
    _, _, off_struct, off_strings, off_rsvmap, _, _, _, size_strings, size_struct = header
    end_rsvmap = off_rsvmap
    while True:
        entry = data[end_rsvmap : end_rsvmap + 16]
        end_rsvmap += 16
        if len(entry) < 16:
            log.add("fdt-rsvmap", phys + off_rsvmap, "memory reservation block does not end")
            end_rsvmap = off_rsvmap
            break
        if not any(entry):
            break
    blocks = sorted(
        (
            (0, _HEADER.size, "header"),
            (off_rsvmap, end_rsvmap, "memory reservation block"),
            (off_struct, off_struct + size_struct, "structure block"),
            (off_strings, off_strings + size_strings, "strings block"),
        )
    )
    if off_rsvmap % 8:
        log.add("fdt-alignment", phys + 16, f"memory reservation block at {off_rsvmap:#x}")
    if off_struct % 4:
        log.add("fdt-alignment", phys + 8, f"structure block at {off_struct:#x}")
    past = 0
    for start, end, name in blocks:
        if end > len(data):
            log.add("fdt-bounds", phys, f"{name} [{start:#x}-{end:#x}) leaves the blob")
        if start < past:
            log.add("fdt-overlap", phys + start, f"{name} lies over what stands before it")
        past = max(past, end)


class _Walk:
    """One pass over the structure block, with an explicit stack of open nodes."""

    __slots__ = ("data", "end", "log", "open", "phys", "pos", "root", "strings", "strings_end")

    def __init__(self, data: bytes, header: tuple[int, ...], phys: int, log: ProblemLog) -> None:
        self.data = data
        self.phys = phys
        self.log = log
        self.pos = header[2]
        self.end = min(header[2] + header[9], len(data))
        self.strings = header[3]
        self.strings_end = min(header[3] + header[8], len(data))
        self.open: list[tuple[bytes, list[tuple[bytes, bytes]], list[Node]]] = []
        self.root: Node | None = None

    def run(self) -> Node | None:
        """Walk to the end tag or to the first tag that cannot be read past."""
        data, end = self.data, self.end
        while True:
            at = self.pos
            if at + 4 > end:
                self.note("fdt-truncated", at, "structure block stops without an end tag")
                break
            (tag,) = _U32.unpack_from(data, at)
            self.pos = at + 4
            if tag == _PROP:
                going = self.property(at)
            elif tag == _BEGIN_NODE:
                going = self.begin(at)
            elif tag == _END_NODE:
                going = self.close(at)
            elif tag == _NOP:
                going = True
            elif tag == _END:
                self.finish(at)
                break
            else:
                self.note("fdt-tag", at, f"unknown tag {tag:#x}")
                break
            if not going:
                break
        while self.open:
            self.close(self.pos)
        return self.root

    def note(self, code: str, at: int, detail: str) -> None:
        """Note a problem at offset ``at`` of the blob, inside of the node that is open there."""
        path = "/" + "/".join(_printable(name) for name, _, _ in self.open[1:])
        self.log.add(code, self.phys + at, detail, path)

    def begin(self, at: int) -> bool:
        """Open a node."""
        nul = self.data.find(b"\0", self.pos, self.end)
        if nul < 0:
            self.note("fdt-truncated", at, "node name does not end")
            return False
        name = self.data[self.pos : nul]
        self.pos = (nul + 4) & ~3
        if not self.open:
            if self.root is not None:
                self.note("fdt-nesting", at, f"second root node {name!r}")
                return False
            if name:
                self.note("fdt-root-name", at, f"root node is called {name!r}")
        elif not name:
            self.note("fdt-name", at, "node without a name")
        if len(self.open) >= _MAX_DEPTH:
            self.note("fdt-nesting", at, f"nodes nest deeper than {_MAX_DEPTH}")
            return False
        self.open.append((name, [], []))
        return True

    def property(self, at: int) -> bool:
        """Take a property into the innermost open node."""
        data, value_at = self.data, self.pos + 8
        if value_at > self.end:
            self.note("fdt-truncated", at, "property header leaves the structure block")
            return False
        len_bytes, name_at = _2U32.unpack_from(data, self.pos)
        if value_at + len_bytes > self.end:
            self.note("fdt-truncated", at, f"property value of {len_bytes} bytes leaves the block")
            return False
        self.pos = (value_at + len_bytes + 3) & ~3
        name_at += self.strings
        nul = data.find(b"\0", name_at, self.strings_end) if name_at < self.strings_end else -1
        if nul < 0:
            self.note("fdt-strings", at, "property name is no string of the strings block")
        elif not self.open:
            self.note("fdt-nesting", at, "property outside of any node")
            return False
        elif self.open[-1][2]:
            self.note("fdt-order", at, "property after a subnode, where libfdt never looks")
        else:
            self.open[-1][1].append((data[name_at:nul], data[value_at : value_at + len_bytes]))
        return True

    def close(self, at: int) -> bool:
        """Close the innermost open node."""
        if not self.open:
            self.note("fdt-nesting", at, "end of a node where none is open")
            return False
        name, props, children = self.open.pop()
        for what, names in (
            ("property", [key for key, _ in props]),
            ("subnode", [child.name for child in children]),
        ):
            if len(set(names)) != len(names):
                self.note("fdt-duplicate", at, f"{what} given twice in node {name!r}")
        node = Node(name, tuple(props), tuple(children))
        if self.open:
            self.open[-1][2].append(node)
        else:
            self.root = node
        return True

    def finish(self, at: int) -> None:
        """Check what an end tag must be preceded and followed by."""
        if self.open or self.root is None:
            self.note("fdt-nesting", at, "end tag inside of the tree")
        if self.pos != self.end:
            self.note("fdt-trailing", self.pos, f"{self.end - self.pos} bytes after the end tag")


def _printable(name: bytes) -> str:
    """A node's name, cut to what libfdt's users would give one."""
    return name[:_MAX_NAME_BYTES].decode("ascii", "backslashreplace")
