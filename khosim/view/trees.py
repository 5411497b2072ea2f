"""A handover as nested plain values, to browse: root FDT, subtrees, the map of preserved memory.

Read from the bytes in RAM when a moment is taken. Large maps are cut off after some tables, and
say so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from khosim.checks.decode import read_blob
from khosim.checks.decode_chunks import ChunkMap
from khosim.checks.decode_fdt import parse_fdt
from khosim.checks.decode_luo import decode_luo
from khosim.checks.decode_radix import geometry
from khosim.errors import RamFault
from khosim.scenario.fields import size_text

if TYPE_CHECKING:
    from khosim.checks.decode import Handover
    from khosim.checks.decode_fdt import Node
    from khosim.machine.hardware import Hardware

__all__ = ("handover_tree",)

TABLES_MAX = 600
"""Tables of a radix tree, or chunks, that are shown of one moment."""
BLOCKS_MAX = 64
"""Runs of blocks that are shown of one leaf."""

Tree = dict[str, Any]


def handover_tree(hardware: Hardware, handover: Handover) -> Tree:
    """The handover's parts by name, each a tree of dicts and strings."""
    root = parse_fdt(handover.fdt, handover.fdt_phys).root
    parts: Tree = {
        f"root FDT at {handover.fdt_phys:#x}": {} if root is None else _node(root),
        f"preserved-memory map at {handover.map_phys:#x}": _map(hardware, handover),
    }
    for name, blob in handover.subtrees.items():
        parts[f"{name} at {blob.start:#x}"] = _subtree(hardware, handover, name)
    if handover.problems:
        parts["problems"] = [f"{it.code} at {it.phys:#x}: {it.detail}" for it in handover.problems]
    return parts


def _node(node: Node) -> Tree:
    tree: Tree = {_text(key): _value(value) for key, value in node.props}
    for child in node.children:
        tree[f"{_text(child.name)} {{}}"] = _node(child)
    return tree


def _text(raw: bytes) -> str:
    return raw.decode("ascii", "backslashreplace")


def _value(raw: bytes) -> str:
    text = raw.rstrip(b"\0")
    if len(text) > 1 and all(32 <= byte < 127 or byte == 0 for byte in text):
        return ", ".join(f'"{_text(part)}"' for part in text.split(b"\0"))
    if len(raw) in (4, 8):
        return f"{int.from_bytes(raw, 'little'):#x}"
    return raw.hex() if len(raw) <= 64 else f"{raw[:64].hex()}... ({len(raw):,} bytes)"


def _subtree(hardware: Hardware, handover: Handover, name: str) -> Tree:
    blob = handover.subtrees[name]
    if name == "memblock" and handover.reserve_mem:
        regions = handover.reserve_mem.items()
        return {key: f"{it.start:#x}, {size_text(it.size)}" for key, it in regions}
    if name == "kexec-metadata" and handover.kexec_metadata is not None:
        return {key: str(value) for key, value in handover.kexec_metadata._asdict().items()}
    if name == "LUO":
        return _luo(hardware, handover)
    data = read_blob(hardware.ram, blob)
    root = parse_fdt(data, blob.start).root
    return (
        {"bytes": f"{blob.size:,}", "begins with": data[:64].hex()} if root is None else _node(root)
    )


def _luo(hardware: Hardware, handover: Handover) -> Tree:
    blob, size = handover.subtrees["LUO"], handover.page_size
    luo = decode_luo(hardware.ram, blob, size, handover.preserved, content=False)
    tree: Tree = {"live update number": str(luo.liveupdate_num)}
    for session in luo.sessions:
        tree[f"session {session.name}"] = {
            f"token {file.token:#x}": f"{file.compatible}, data at {file.data:#x}"
            for file in session.files
        }
    for flb in luo.flbs or ():
        tree[f"object {flb.name}"] = f"data at {flb.data:#x}, of {flb.nr_files} files"
    return tree


def _map(hardware: Hardware, handover: Handover) -> Tree:
    preserved = handover.preserved
    if isinstance(preserved, ChunkMap):
        chunks: Tree = {}
        for chunk in preserved.chunks[:TABLES_MAX]:
            chunks[f"chunk at {chunk.phys:#x}, order {chunk.order}"] = {
                f"bitmap at {element.bitmap:#x}": (
                    f"{element.nr_set} set, from {element.phys_start:#x} on"
                )
                for element in chunk.elements[:BLOCKS_MAX]
            }
        return chunks
    if not handover.map_phys:
        return {}
    return _Radix(hardware, handover.page_size).table(handover.map_phys, None, 0)


class _Radix:
    """Reads tables until there are too many."""

    def __init__(self, hardware: Hardware, page_size: int) -> None:
        self.ram = hardware.ram
        self.page_size = page_size
        self.geo = geometry(page_size)
        self.seen: set[int] = set()

    def table(self, phys: int, level: int | None, key: int) -> Tree:
        """The entries of the table at ``phys``; ``level`` counts from the leaves."""
        level = self.geo.depth - 1 if level is None else level
        if phys in self.seen or len(self.seen) >= TABLES_MAX:
            return {"...": "seen before" if phys in self.seen else "more than is shown"}
        self.seen.add(phys)
        try:
            raw = self.ram.read(phys, self.page_size)
        except RamFault:
            return {"...": "no RAM"}
        if level == 0:
            return self.leaf(raw, key)
        words = np.frombuffer(raw, dtype="<u8")
        tree: Tree = {}
        for index in np.flatnonzero(words).tolist():
            child, below = int(words[index]), key | index << self.geo.level_shift(level)
            what = "leaf" if level == 1 else f"level {level - 1}"
            tree[f"entry {index}: {what} at {child:#x}"] = self.table(child, level - 1, below)
        return tree

    def leaf(self, raw: bytes, key: int) -> Tree:
        """The runs of bits that are set: blocks of one order, one behind the other."""
        bits = np.flatnonzero(np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little"))
        keys = key | bits  # each power of two begins another order
        breaks = np.flatnonzero((np.diff(bits) != 1) | (keys[1:] & (keys[1:] - 1) == 0)) + 1
        tree: Tree = {}
        for run in np.split(bits, breaks)[:BLOCKS_MAX] if len(bits) else ():
            first, count = key | int(run[0]), len(run)
            tree[f"bit {int(run[0])}" + (f" to {int(run[-1])}" if count > 1 else "")] = self.block(
                first, count
            )
        if len(breaks) >= BLOCKS_MAX:
            tree["..."] = f"{len(breaks) + 1 - BLOCKS_MAX:,} more runs"
        return tree

    def block(self, key: int, count: int) -> str:
        """What a key means: the highest bit tells the order, the rest where the block lies."""
        if not key:
            return "no block"
        order = self.geo.key_width - key.bit_length()
        phys = (key & ~(1 << (key.bit_length() - 1))) << (order + self.geo.page_shift)
        blocks = f"{count:,} blocks" if count > 1 else "a block"
        return f"{blocks} of order {order} from {phys:#x}"
