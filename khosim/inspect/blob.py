"""A lone FDT: a root FDT without the memory it speaks of, a sub FDT, or any other device tree.

Of a root FDT all is told that does not need memory: the format, where the map and the blobs were,
and whether these addresses and sizes are possible. A memblock blob gives its regions, a boot
device tree the two properties of ``/chosen`` by which arm64 hands over
(``drivers/of/fdt.c:early_init_dt_check_kho`` @ 7.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from khosim.checks.decode_fdt import Fdt, Node, parse_fdt
from khosim.checks.decode_root import (
    FORMATS,
    Region,
    RootFdt,
    decode_reserve_mem,
    decode_root,
)
from khosim.checks.reader import ProblemLog
from khosim.checks.strict_root import check_layout, check_values
from khosim.errors import RamFault
from khosim.inspect.damage import Damage, damage_json, explain

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("BlobReport", "FileBytes", "check_root", "inspect_blob", "is_root")

_MAX_FDT_BYTES = 1 << 26


class FileBytes:
    """A file's bytes as memory that begins at address 0."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, phys: int, len_bytes: int, /) -> bytes:
        """Copy of the bytes at ``[phys, phys + len_bytes)``; raises :class:`RamFault`."""
        if phys < 0 or len_bytes < 0 or phys + len_bytes > len(self.data):
            raise RamFault(phys, len_bytes, f"the file has {len(self.data)} bytes")
        return self.data[phys : phys + len_bytes]

    def view(self, phys: int, len_bytes: int, /) -> NDArray[np.uint8]:
        """Read-only array over these bytes."""
        return np.frombuffer(self.read(phys, len_bytes), dtype=np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class BlobReport:
    """What a lone FDT says. ``root`` is set for a handover's root FDT alone.

    ``chosen`` holds the address ranges of ``/chosen`` by which a kernel is told of a handover.
    """

    name: str
    place: str
    data: bytes
    fdt: Fdt
    root: RootFdt | None
    reserve_mem: dict[str, Region]
    chosen: dict[str, Region]
    damage: list[Damage]

    @property
    def compatible(self) -> str | None:
        """The root node's first ``compatible`` string."""
        strings = () if self.fdt.root is None else self.fdt.root.strings(b"compatible")
        return strings[0].decode("ascii", "backslashreplace") if strings else None

    def to_json(self) -> dict[str, Any]:
        """As plain values; what only memory could tell is None."""
        said: dict[str, Any] = {"compatible": self.compatible, "fdt": self.fdt.data.hex()}
        if self.root is not None:
            said.update(fdt_phys=None, mem_map=self.root.map_phys, radix_nodes=None, preserved=None)
            said["subtrees"] = {
                name: {"phys": blob.start, "size": blob.size or None, "hex": None}
                for name, blob in self.root.subtrees.items()
            }
        if self.reserve_mem:
            said["reserve_mem"] = {
                name: {"start": region.start, "size": region.size}
                for name, region in self.reserve_mem.items()
            }
        if self.chosen:
            said["chosen"] = {name: list(region) for name, region in self.chosen.items()}
        if self.damage:
            said["damage"] = damage_json(self.damage)
        return said


def inspect_blob(data: bytes, place: str, *, name: str = "") -> BlobReport:
    """Decode the FDT in ``data``, which is the file ``place``."""
    log = ProblemLog()
    fdt = parse_fdt(data[:_MAX_FDT_BYTES])
    log.extend(fdt.problems, "/")
    root = None
    reserve_mem: dict[str, Region] = {}
    chosen: dict[str, Region] = {}
    if fdt.root is not None and is_root(fdt.root):
        root = check_root(fdt, log)
    elif fdt.root is not None:
        if b"memblock-v1" in fdt.root.strings(b"compatible"):
            region = Region(0, len(data))
            inner = ProblemLog()
            reserve_mem = decode_reserve_mem(FileBytes(data), region, len(data), inner)
            seen = {(problem.code, problem.phys) for problem in fdt.problems}
            log.extend(tuple(p for p in inner.done() if (p.code, p.phys) not in seen))
        chosen = _chosen(fdt.root)
        for problem in check_layout(fdt, zeroed=False):
            if problem[0] == "fdt-name":
                log.add(*problem)
    damage = explain(log.done(), formats=_formats(), place=place)
    return BlobReport(name, place, data, fdt, root, reserve_mem, chosen, damage)


def is_root(root: Node) -> bool:
    """Whether a tree is, or was before it was damaged, the root FDT of a handover."""
    names = {key for key, _ in root.props}
    inner = {key for node in root.children for key, _ in node.props}
    return (
        any(string.startswith(b"kho-v") for string in root.strings(b"compatible"))
        or b"preserved-memory-map" in names
        or bool(inner & {b"preserved-data", b"blob-size"})
    )


def check_root(fdt: Fdt, log: ProblemLog) -> RootFdt:
    """Read a root FDT, and note values that no handover has."""
    assert fdt.root is not None
    root = decode_root(fdt.root, 0, log)
    check_values(root, log)
    for problem in check_layout(fdt, zeroed=root.format.size_prop is not None):
        log.add(*problem)
    return root


def _chosen(root: Node) -> dict[str, Region]:
    """The ranges of ``/chosen``: big-endian cells, two each for address and size."""
    found: dict[str, Region] = {}
    node = root.child(b"chosen")
    for name in (b"linux,kho-fdt", b"linux,kho-scratch"):
        value = None if node is None else node.prop(name)
        if value is not None and len(value) == 16:
            start, size = int.from_bytes(value[:8], "big"), int.from_bytes(value[8:], "big")
            found[name.decode()] = Region(start, size)
    return found


def _formats() -> str:
    return ", ".join(key.decode() for key in FORMATS)
