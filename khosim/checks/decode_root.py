"""What the root FDT says, and the blobs that every kernel puts beside it.

The root node names its format, the preserved-memory map and one blob per child
(``include/linux/kho/abi/kexec_handover.h``). Two of these blobs are read here: the reserve_mem
regions (``abi/memblock.h``) and the record of the kernel that wrote the handover
(``abi/kexec_metadata.h``), all @ 7.3.

What differs between formats is one line in ``FORMATS``: the properties' names, and who reads the
map. kho-v1 of 6.16 to 7.0 does not say how large blobs are, because they are all device trees;
kho-v3 of 7.1 has the layout of kho-v4. Left out: kho-v2, which no release had, what LUO keeps in
its blob (``khosim.checks.decode_luo``), blobs of other owners.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple, Protocol

from khosim.checks.decode_chunks import decode_chunks
from khosim.checks.decode_fdt import decode_fdt
from khosim.checks.decode_radix import decode_preserved
from khosim.checks.decode_walk import as_text
from khosim.errors import RamFault

if TYPE_CHECKING:
    from khosim.checks.decode_fdt import Node
    from khosim.checks.preserved import Preserved
    from khosim.checks.reader import ProblemLog, Reader

__all__ = (
    "FDT_MAGIC",
    "FORMATS",
    "METADATA_BYTES",
    "Format",
    "KexecMetadata",
    "Region",
    "RootFdt",
    "Tracker",
    "decode_kexec_metadata",
    "decode_reserve_mem",
    "decode_root",
    "read_blob",
    "readable_blob",
)

FDT_MAGIC = b"\xd0\x0d\xfe\xed"
_MAX_BLOB_BYTES = 16 << 20
_PHYS_MAX = 1 << 52
_METADATA = Struct("<I65sI")
_METADATA_VERSION = 1
METADATA_BYTES = _METADATA.size


class Region(NamedTuple):
    """A physical range: ``start`` and ``size`` in bytes."""

    start: int
    size: int


class KexecMetadata(NamedTuple):
    """The kexec-metadata blob: the kernel that wrote it and the number of its kexec."""

    version: int
    previous_release: str
    kexec_count: int


class Tracker(Protocol):
    """Decodes a preserved-memory map of one format."""

    def __call__(
        self, reader: Reader, map_phys: int, page_size: int, preserve_bits: int | None, /
    ) -> Preserved:
        """What the map at ``map_phys`` says; never raises on it."""


class Format(NamedTuple):
    """What differs between the formats that root FDTs declare: property names and the map.

    Without a ``size_prop``, a blob is a device tree, whose header tells its size.
    """

    map_prop: bytes
    data_prop: bytes
    size_prop: bytes | None
    tracker: Tracker


def _radix(
    reader: Reader, map_phys: int, page_size: int, _preserve_bits: int | None, /
) -> Preserved:
    return decode_preserved(reader, map_phys, page_size)


_MAP = b"preserved-memory-map"
FORMATS = {
    b"kho-v1": Format(_MAP, b"fdt", None, decode_chunks),
    b"kho-v3": Format(_MAP, b"preserved-data", b"blob-size", _radix),
    b"kho-v4": Format(_MAP, b"preserved-data", b"blob-size", _radix),
}
"""Each format that can be read whole, by the root node's ``compatible``."""

_NEWEST = b"kho-v4"


class RootFdt(NamedTuple):
    """What the root FDT says; ``compatible`` and ``map_phys`` are None where it does not."""

    format: Format
    compatible: str | None
    map_phys: int | None
    subtrees: dict[str, Region]


def decode_root(
    root: Node,
    phys: int,
    log: ProblemLog,
    reader: Reader | None = None,
    written: Format | None = None,
) -> RootFdt:
    """Read a root node; ``phys`` is the address of its FDT, for problems.

    Without a ``reader``, sizes that only memory tells are 0. ``written`` is the format, where it is
    known to be none of :data:`FORMATS`.
    """
    known, compatible = _format(root, phys, log)
    known = known if written is None else written
    map_phys = root.u64(known.map_prop)
    if map_phys is None:
        log.add("kho-map", phys, f"root node has no u64 {known.map_prop.decode()}", "/")
    return RootFdt(known, compatible, map_phys, _subtrees(root, known, phys, log, reader))


def read_blob(reader: Reader, blob: Region) -> bytes:
    """Bytes of a subtree's blob; empty where it is no RAM or larger than any kernel makes one."""
    if blob.size > _MAX_BLOB_BYTES:
        return b""
    try:
        return reader.read(blob.start, blob.size)
    except RamFault:
        return b""


def readable_blob(reader: Reader, name: str, blob: Region, log: ProblemLog) -> bool:
    """Whether the blob is not empty and can be there; notes why where it cannot."""
    start, size = blob
    if size > _MAX_BLOB_BYTES:
        log.add("kho-blob-size", start, f"blob of {name!r} claims {size} bytes", f"/{name}")
        return False
    try:
        reader.view(start, size)
    except RamFault as fault:
        if size:
            log.add("kho-blob-unreadable", start, f"blob of {name!r}: {fault}", f"/{name}")
        return False
    return size > 0


def decode_reserve_mem(
    reader: Reader, blob: Region | None, page_size: int, log: ProblemLog
) -> dict[str, Region]:
    """The regions that the memblock subtree describes. The kernel writes it into one page."""
    found: dict[str, Region] = {}
    if blob is None:
        return found
    fdt = decode_fdt(reader, blob.start, min(blob.size, page_size))
    log.extend(fdt.problems, "/memblock")
    if fdt.root is None:
        return found
    if b"memblock-v1" not in fdt.root.strings(b"compatible"):
        cause = "subtree 'memblock' is not memblock-v1"
        log.add("memblock-compatible", blob.start, cause, "/memblock")
    for node in fdt.root.children:
        name = as_text(node.name)
        path = f"/memblock/{name}"
        start, size = node.u64(b"start"), node.u64(b"size")
        if b"reserve-mem-v1" not in node.strings(b"compatible"):
            cause = f"region {name!r} is not reserve-mem-v1"
            log.add("memblock-compatible", blob.start, cause, path)
        elif start is None or size is None:
            cause = f"region {name!r} has no u64 start and size"
            log.add("memblock-region", blob.start, cause, path)
        elif size == 0 or start + size > _PHYS_MAX:
            cause = f"region {name!r} at {start:#x} of {size:#x} bytes"
            log.add("memblock-region", blob.start, cause, path, "memory that a machine can have")
        elif name not in found:
            found[name] = Region(start, size)
    return found


def decode_kexec_metadata(
    reader: Reader, blob: Region | None, log: ProblemLog
) -> KexecMetadata | None:
    """The record of the kernel that wrote the handover; None where there is none to be read."""
    if blob is None:
        return None
    path = "/kexec-metadata"
    try:
        data = reader.read(blob.start, min(blob.size, _METADATA.size))
    except RamFault:
        return None  # noted with the blob's pages
    version = int.from_bytes(data[:4], "little")
    if len(data) < 4 or (version == _METADATA_VERSION and len(data) < _METADATA.size):
        log.add("metadata-size", blob.start, f"kexec-metadata of {blob.size} bytes", path)
        return None
    if version != _METADATA_VERSION:
        log.add("metadata-version", blob.start, f"kexec-metadata version {version}", path)
        return None
    _, release, count = _METADATA.unpack(data)
    text, nul, _ = release.partition(b"\0")
    if not nul:
        log.add("metadata-release", blob.start + 4, "previous release does not end", path)
    return KexecMetadata(version, as_text(text), count)


def _format(root: Node, phys: int, log: ProblemLog) -> tuple[Format, str | None]:
    """The format that the root node declares, the newest where it declares none that is known."""
    strings = root.strings(b"compatible")
    for string in strings:
        if string in FORMATS:
            return FORMATS[string], as_text(string)
    declared = as_text(strings[0]) if strings else None
    log.add("kho-compatible", phys, f"root node is compatible with {declared!r}", "/compatible")
    return FORMATS[_NEWEST], declared


def _subtrees(
    root: Node, known: Format, phys: int, log: ProblemLog, reader: Reader | None
) -> dict[str, Region]:
    """The blobs that the root node's children name, in their order."""
    found: dict[str, Region] = {}
    for node in root.children:
        name = as_text(node.name)
        start = node.u64(known.data_prop)
        if known.size_prop is not None:
            size = node.u64(known.size_prop)
        else:
            size = 0 if start is None or reader is None else _fdt_bytes(reader, name, start, log)
        if start is None or size is None:
            cause = f"subtree {name!r} does not give its address and size"
            log.add("kho-subtree", phys, cause, f"/{name}")
        elif name not in found:  # a second one is a problem that the FDT's reader has noted
            found[name] = Region(start, size)
    return found


def _fdt_bytes(reader: Reader, name: str, phys: int, log: ProblemLog) -> int:
    """The size of the device tree at ``phys``; 0, after a problem, where there is none."""
    try:
        head = reader.read(phys, 8)
    except RamFault as fault:
        log.add("kho-blob-unreadable", phys, f"blob of {name!r}: {fault}", f"/{name}")
        return 0
    if not head.startswith(FDT_MAGIC):
        log.add("fdt-magic", phys, f"blob of {name!r} begins with {head.hex()}", f"/{name}")
        return 0
    return int.from_bytes(head[4:], "big")
