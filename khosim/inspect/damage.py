"""Damage told as a good compiler tells an error: expected, where, found, what is still readable.

A decoder's :class:`~khosim.checks.reader.Problem` says what it found and where. Many say what they
expected; for the others the table here does, by kind of problem. It also says what a problem of
that kind leaves readable, for this program: the kernel gives up much earlier.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from khosim.checks.reader import Problem

__all__ = ("Damage", "damage_json", "explain")


class Damage(NamedTuple):
    """One finding. ``phys`` counts bytes of the file where ``place`` names one, else of memory."""

    code: str
    phys: int
    path: str
    expected: str
    found: str
    still_read: str
    place: str = ""

    @property
    def where(self) -> str:
        """The place in words: an address, or a byte of a file."""
        return f"{self.place}, byte {self.phys:#x}" if self.place else f"{self.phys:#x}"


_EXPECTED = {
    "fdt-unreadable": "a device tree in readable memory",
    "fdt-header": "a device tree's header of 40 bytes",
    "fdt-magic": "the magic d00dfeed of a device tree",
    "fdt-version": "version 17, compatible back to 16",
    "fdt-totalsize": "a size that holds the header and fits in the space there is",
    "fdt-rsvmap": "a memory reservation block that ends with 16 zero bytes",
    "fdt-alignment": "a block at a multiple of 4 bytes (reservations: 8)",
    "fdt-bounds": "a block inside of the blob",
    "fdt-overlap": "blocks one after the other",
    "fdt-truncated": "a structure block that goes on to its end tag",
    "fdt-tag": "a tag: begin or end of a node, a property, nop, end",
    "fdt-nesting": "nodes that begin and end in pairs, under one root",
    "fdt-root-name": "a root node without a name",
    "fdt-name": "a name in printable letters",
    "fdt-padding": "zeros, where a name or value is padded to 4 bytes",
    "fdt-strings": "the offset of a name in the strings block",
    "fdt-order": "properties before subnodes",
    "fdt-duplicate": "each name once in a node",
    "fdt-trailing": "nothing after the end tag",
    "fdt-reserved": "no memory reservations, and boot CPU 0",
    "kho-compatible": "a format this program reads: {formats}",
    "kho-map": "an 8-byte address of the preserved-memory map",
    "kho-subtree": "an 8-byte address and an 8-byte size",
    "kho-blob-size": "a size that a kernel can allocate",
    "kho-blob-unreadable": "a blob in readable memory",
    "memblock-compatible": "memblock-v1, with reserve-mem-v1 nodes",
    "memblock-region": "an 8-byte start and an 8-byte size",
    "metadata-size": "a record of 73 bytes",
    "metadata-version": "version 1",
    "metadata-release": "a NUL within 65 bytes",
    "radix-root": "the address of the root table",
    "radix-unaligned": "the address of a page",
    "radix-unreadable": "a table page in readable memory",
    "radix-budget": "a map of a size that a machine can have",
    "radix-key": "an entry that stands for blocks of a possible address",
    "radix-shared": "a table page with one parent",
    "radix-order": "keys of blocks that a machine can hold",
    "map-overlap": "each page in one preserved block at most",
}

_FDT_REST = "the nodes and properties before this place"
_SUBTREE = "all other subtrees, and the map"
_MAP = "all blocks that other table pages hold"
_SESSION = "all other sessions and files"
_CONTENT = "the file's record and its list of folios"
_STILL_READ = {
    "fdt-unreadable": "nothing of this tree",
    "fdt-header": "nothing of this tree",
    "fdt-magic": "nothing of this tree",
    "fdt-version": "what a reader of version 17 makes of it",
    "fdt-totalsize": _FDT_REST,
    "fdt-truncated": _FDT_REST,
    "fdt-tag": _FDT_REST,
    "fdt-nesting": _FDT_REST,
    "fdt-strings": "all other properties",
    "fdt-order": "all other properties",
    "kho-compatible": "what the newest of these formats would mean by it",
    "kho-map": "the subtrees; which memory is preserved stays unknown",
    "kho-subtree": _SUBTREE,
    "kho-blob-size": _SUBTREE,
    "kho-blob-unreadable": _SUBTREE,
    "memblock-compatible": "all other regions",
    "memblock-region": "all other regions",
    "metadata-size": _SUBTREE,
    "metadata-version": _SUBTREE,
    "metadata-release": "the characters that are there, and the count",
    "radix-root": "the subtrees; which memory is preserved stays unknown",
    "radix-unaligned": _MAP,
    "radix-unreadable": _MAP,
    "radix-budget": "the blocks found until then",
    "radix-key": _MAP,
    "radix-shared": _MAP,
    "radix-order": _MAP,
    "luo-compatible": _SUBTREE,
    "luo-size": _SUBTREE,
    "luo-pointer": _SESSION,
    "luo-unreadable": _SESSION,
    "luo-shared": _SESSION,
    "luo-count": "the files that are there",
    "luo-flb": "all sessions and files",
    "block-count": "the entries before the first that is all zero, and the blocks after this",
    "block-list": "the blocks before this",
    "vmalloc-order": _CONTENT.partition(" and")[0],
    "vmalloc-chunk": "the areas in the chunks before this",
    "vmalloc-pages": "the folios in the areas that are there",
    "memfd-folios": "the folios for which there is room",
    "memfd-index": _CONTENT,
    "memfd-content": _CONTENT,
    "memfd-hole": "the content, with zeros in the holes",
    "memfd-not-preserved": "the content, for pages of their own",
}


def explain(
    problems: Iterable[Problem], *, formats: str = "kho-v4", place: str = ""
) -> list[Damage]:
    """What the decoders noted, with what they leave to the table filled in."""
    return [
        Damage(
            problem.code,
            problem.phys,
            problem.path,
            (problem.expected or _EXPECTED.get(problem.code, "")).replace("{formats}", formats),
            problem.detail,
            _STILL_READ.get(problem.code, "everything else"),
            place,
        )
        for problem in problems
    ]


def damage_json(damage: Iterable[Damage]) -> list[dict[str, Any]]:
    """The findings as plain values."""
    return [
        {
            key: value
            for key, value in item._asdict().items()
            if value != "" or key not in ("expected", "place")
        }
        for item in damage
    ]
