"""The checkers' view of a handover: raw physical memory in, what it says out.

Reads what a successor kernel would read, from the bytes alone: the root FDT
(``include/linux/kho/abi/kexec_handover.h``), the preserved-memory map it names, its subtrees, and
inside of these the reserve_mem regions (``abi/memblock.h``) and the record of earlier kernels
(``abi/kexec_metadata.h``), all @ 7.3, format kho-v4. Shares no code with the simulated kernel.

The kernel stops at the first thing it dislikes; this decoder notes it as a problem and goes on,
so that a report shows everything that can still be read.

Left out: what LUO and other owners of subtrees keep inside their blobs.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Any, NamedTuple, Protocol

import numpy as np

from khosim.checks.decode_fdt import Node, decode_fdt
from khosim.checks.decode_radix import decode_preserved
from khosim.checks.preserved import Preserved, expand
from khosim.checks.reader import Problem, ProblemLog, Reader, page_shift
from khosim.errors import InputError, RamFault

__all__ = (
    "Handover",
    "KexecMetadata",
    "Region",
    "decode_handover",
    "read_blob",
    "to_json",
)

_MAX_BLOB_BYTES = 16 << 20
_METADATA = Struct("<I65sI")
_METADATA_VERSION = 1


class Region(NamedTuple):
    """A physical range: ``start`` and ``size`` in bytes."""

    start: int
    size: int


class KexecMetadata(NamedTuple):
    """The kexec-metadata blob: the kernel that wrote it and the number of its kexec."""

    version: int
    previous_release: str
    kexec_count: int


@dataclass(frozen=True, slots=True, eq=False)
class Handover:
    """What the memory of one handover says.

    ``compatible`` is None and ``map_phys`` 0 where the root FDT does not tell. ``subtrees`` gives
    each blob's range, ``reserve_mem`` each region's. ``table_pages`` are the map's own pages in
    walk order, ``metadata_pages`` the sorted addresses of all pages that hold the handover itself
    (root FDT, map, blobs). Addresses are physical, sizes in bytes.
    """

    page_size: int
    fdt_phys: int
    fdt: bytes
    compatible: str | None
    map_phys: int
    preserved: Preserved
    subtrees: dict[str, Region]
    reserve_mem: dict[str, Region]
    kexec_metadata: KexecMetadata | None
    table_pages: tuple[int, ...]
    metadata_pages: tuple[int, ...]
    problems: tuple[Problem, ...]


class _Tracker(Protocol):
    """Decodes a preserved-memory map of one format."""

    def __call__(self, reader: Reader, map_phys: int, page_size: int, /) -> Preserved: ...


class _Format(NamedTuple):
    """What differs between the formats that root FDTs declare."""

    map_prop: bytes
    data_prop: bytes
    size_prop: bytes
    tracker: _Tracker


_FORMATS = {
    b"kho-v4": _Format(b"preserved-memory-map", b"preserved-data", b"blob-size", decode_preserved),
}
_NEWEST = b"kho-v4"


def decode_handover(reader: Reader, fdt_phys: int, page_size: int) -> Handover:
    """Decode the handover whose root FDT is in the page at ``fdt_phys``.

    Never raises on what memory holds: everything odd is in ``problems``. :class:`InputError` only
    where ``page_size`` is none that a kernel has.
    """
    page_shift(page_size)
    log = ProblemLog()
    fdt = decode_fdt(reader, fdt_phys, page_size)
    log.extend(fdt.problems)
    compatible = None
    map_phys = 0
    preserved = None
    subtrees: dict[str, Region] = {}
    if fdt.root is not None:
        known, compatible = _format(fdt.root, fdt_phys, log)
        value = fdt.root.u64(known.map_prop)
        if value is None:
            log.add("kho-map", fdt_phys, f"root node has no u64 {known.map_prop.decode()}")
        else:
            map_phys = value
            preserved = known.tracker(reader, map_phys, page_size)
            log.extend(preserved.problems)
        subtrees = _subtrees(fdt.root, known, fdt_phys, log)
    if preserved is None:
        none = np.empty(0, dtype=np.int64)
        preserved = Preserved(page_size, none, none, none, (), ())
    pages = {fdt_phys & -page_size} if fdt.data else set()
    pages.update(preserved.table_pages)
    for name, blob in subtrees.items():
        pages.update(_blob_pages(reader, name, blob, page_size, log))
    return Handover(
        page_size=page_size,
        fdt_phys=fdt_phys,
        fdt=fdt.data,
        compatible=compatible,
        map_phys=map_phys,
        preserved=preserved,
        subtrees=subtrees,
        reserve_mem=_reserve_mem(reader, subtrees.get("memblock"), page_size, log),
        kexec_metadata=_kexec_metadata(reader, subtrees.get("kexec-metadata"), log),
        table_pages=preserved.table_pages,
        metadata_pages=tuple(sorted(pages)),
        problems=log.done(),
    )


def read_blob(reader: Reader, blob: Region) -> bytes:
    """Bytes of a subtree's blob; empty where it is no RAM or larger than any kernel makes one."""
    if blob.size > _MAX_BLOB_BYTES:
        return b""
    try:
        return reader.read(blob.start, blob.size)
    except RamFault:
        return b""


def to_json(reader: Reader, handover: Handover, *, limit: int = 1 << 20) -> dict[str, Any]:
    """The handover as plain values, for JSON.

    ``preserved`` holds ``[phys, order]`` per block in walk order and is None where there are more
    than ``limit`` blocks; ``radix_nodes`` is the number of table pages. ``problems`` holds
    ``code``, ``phys`` and ``detail`` of each.
    """
    try:
        blocks: list[list[int]] | None = [list(b) for b in expand(handover.preserved, limit=limit)]
    except InputError:
        blocks = None
    return {
        "compatible": handover.compatible,
        "fdt_phys": handover.fdt_phys,
        "fdt": handover.fdt.hex(),
        "mem_map": handover.map_phys,
        "radix_nodes": len(handover.table_pages),
        "preserved": blocks,
        "subtrees": {
            name: {"phys": blob.start, "size": blob.size, "hex": read_blob(reader, blob).hex()}
            for name, blob in handover.subtrees.items()
        },
        "problems": [problem._asdict() for problem in handover.problems],
    }


def _format(root: Node, phys: int, log: ProblemLog) -> tuple[_Format, str | None]:
    """The format that the root node declares, the newest where it declares none that is known."""
    strings = root.strings(b"compatible")
    for string in strings:
        if string in _FORMATS:
            return _FORMATS[string], _text(string)
    declared = _text(strings[0]) if strings else None
    log.add("kho-compatible", phys, f"root node is compatible with {declared!r}")
    return _FORMATS[_NEWEST], declared


def _subtrees(root: Node, known: _Format, phys: int, log: ProblemLog) -> dict[str, Region]:
    """The blobs that the root node's children name, in their order."""
    found: dict[str, Region] = {}
    for node in root.children:
        name = _text(node.name)
        start, size = node.u64(known.data_prop), node.u64(known.size_prop)
        if start is None or size is None:
            log.add("kho-subtree", phys, f"subtree {name!r} does not give its address and size")
        elif name not in found:  # a second one is a problem that the FDT's reader has noted
            found[name] = Region(start, size)
    return found


def _blob_pages(reader: Reader, name: str, blob: Region, page_size: int, log: ProblemLog) -> range:
    """Addresses of a blob's pages, none where it cannot be there."""
    start, size = blob
    if size == 0:
        return range(0)
    if size > _MAX_BLOB_BYTES:
        log.add("kho-blob-size", start, f"blob of {name!r} claims {size} bytes")
        return range(0)
    try:
        reader.view(start, size)
    except RamFault as fault:
        log.add("kho-blob-unreadable", start, f"blob of {name!r}: {fault}")
        return range(0)
    return range(start & -page_size, start + size, page_size)


def _reserve_mem(
    reader: Reader, blob: Region | None, page_size: int, log: ProblemLog
) -> dict[str, Region]:
    """The regions that the memblock subtree describes. The kernel writes it into one page."""
    found: dict[str, Region] = {}
    if blob is None:
        return found
    fdt = decode_fdt(reader, blob.start, min(blob.size, page_size))
    log.extend(fdt.problems)
    if fdt.root is None:
        return found
    if b"memblock-v1" not in fdt.root.strings(b"compatible"):
        log.add("memblock-compatible", blob.start, "subtree 'memblock' is not memblock-v1")
    for node in fdt.root.children:
        name = _text(node.name)
        start, size = node.u64(b"start"), node.u64(b"size")
        if b"reserve-mem-v1" not in node.strings(b"compatible"):
            log.add("memblock-compatible", blob.start, f"region {name!r} is not reserve-mem-v1")
        elif start is None or size is None:
            log.add("memblock-region", blob.start, f"region {name!r} has no u64 start and size")
        elif name not in found:
            found[name] = Region(start, size)
    return found


def _kexec_metadata(reader: Reader, blob: Region | None, log: ProblemLog) -> KexecMetadata | None:
    """The record of the kernel that wrote the handover; None where there is none to be read."""
    if blob is None:
        return None
    try:
        data = reader.read(blob.start, min(blob.size, _METADATA.size))
    except RamFault:
        return None  # noted with the blob's pages
    version = int.from_bytes(data[:4], "little")
    if len(data) < 4 or (version == _METADATA_VERSION and len(data) < _METADATA.size):
        log.add("metadata-size", blob.start, f"kexec-metadata of {blob.size} bytes")
        return None
    if version != _METADATA_VERSION:
        log.add("metadata-version", blob.start, f"kexec-metadata version {version}")
        return None
    _, release, count = _METADATA.unpack(data)
    text, nul, _ = release.partition(b"\0")
    if not nul:
        log.add("metadata-release", blob.start + 4, "previous release does not end")
    return KexecMetadata(version, _text(text), count)


def _text(raw: bytes) -> str:
    """Bytes as text that any of them survives."""
    return raw.decode("ascii", "backslashreplace")
