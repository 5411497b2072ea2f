"""The checkers' view of a handover: raw physical memory in, what it says out.

Reads what a successor kernel would read, from the bytes alone: the root FDT
(``include/linux/kho/abi/kexec_handover.h``), the preserved-memory map it names, its subtrees, and
inside of these the reserve_mem regions (``abi/memblock.h``) and the record of earlier kernels
(``abi/kexec_metadata.h``), all @ 7.3. Shares no code with the simulated kernel.

The kernel stops at the first thing it dislikes; this decoder notes it as a problem and goes on,
so that a report shows everything that can still be read.

Left out: what LUO and other owners of subtrees keep inside their blobs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from khosim.checks.decode_chunks import ChunkMap
from khosim.checks.decode_fdt import decode_fdt
from khosim.checks.decode_root import (
    FDT_MAGIC,
    KexecMetadata,
    Region,
    decode_kexec_metadata,
    decode_reserve_mem,
    decode_root,
    read_blob,
    readable_blob,
)
from khosim.checks.preserved import Preserved, expand
from khosim.checks.reader import ProblemLog, page_shift
from khosim.errors import InputError

if TYPE_CHECKING:
    from khosim.checks.decode_chunks import Chunk
    from khosim.checks.decode_root import Format
    from khosim.checks.reader import Problem, Reader

__all__ = (
    "Handover",
    "KexecMetadata",
    "Region",
    "decode_handover",
    "read_blob",
    "to_json",
)


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


def decode_handover(
    reader: Reader,
    fdt_phys: int,
    page_size: int,
    *,
    preserve_bits: int | None = None,
    written: Format | None = None,
) -> Handover:
    """Decode the handover whose root FDT is in the page at ``fdt_phys``.

    ``preserve_bits`` is the size of a kho-v1 bitmap, found out where it is None; ``written`` is a
    format that Linux does not have.
    Never raises on what memory holds: everything odd is in ``problems``. :class:`InputError` only
    where ``page_size`` is none that a kernel has.
    """
    page_shift(page_size)
    log = ProblemLog()
    fdt = decode_fdt(reader, fdt_phys, page_size)
    log.extend(fdt.problems, "/")
    compatible = None
    map_phys = 0
    preserved = None
    subtrees: dict[str, Region] = {}
    if fdt.root is not None:
        root = decode_root(fdt.root, fdt_phys, log, reader, written)
        compatible, subtrees = root.compatible, root.subtrees
        if root.map_phys is not None:
            map_phys = root.map_phys
            preserved = root.format.tracker(reader, map_phys, page_size, preserve_bits)
            log.extend(preserved.problems, "/preserved-memory-map")
    if preserved is None:
        none = np.empty(0, dtype=np.int64)
        preserved = Preserved(page_size, none, none, none, (), ())
    pages = {fdt_phys & -page_size} if fdt.data else set()
    pages.update(preserved.table_pages)
    for name, blob in subtrees.items():
        if readable_blob(reader, name, blob, log):
            pages.update(range(blob.start & -page_size, blob.start + blob.size, page_size))
    return Handover(
        page_size=page_size,
        fdt_phys=fdt_phys,
        fdt=fdt.data,
        compatible=compatible,
        map_phys=map_phys,
        preserved=preserved,
        subtrees=subtrees,
        reserve_mem=decode_reserve_mem(reader, subtrees.get("memblock"), page_size, log),
        kexec_metadata=decode_kexec_metadata(reader, subtrees.get("kexec-metadata"), log),
        table_pages=preserved.table_pages,
        metadata_pages=tuple(sorted(pages)),
        problems=log.done(),
    )


def to_json(reader: Reader, handover: Handover, *, limit: int = 1 << 20) -> dict[str, Any]:
    """The handover as plain values, for JSON.

    ``preserved`` holds ``[phys, order]`` per block in walk order and is None where there are more
    than ``limit`` blocks; ``radix_nodes`` is the number of table pages. ``problems`` holds the
    fields of each. A kho-v1 handover has ``chunks`` and ``preserve_bits`` instead of radix nodes.
    """
    try:
        blocks: list[list[int]] | None = [list(b) for b in expand(handover.preserved, limit=limit)]
    except InputError:
        blocks = None
    said: dict[str, Any] = {
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
    if isinstance(handover.preserved, ChunkMap):
        del said["radix_nodes"]
        said["preserve_bits"] = handover.preserved.preserve_bits
        said["chunks"] = [_chunk_json(chunk) for chunk in handover.preserved.chunks]
        for blob in said["subtrees"].values():
            blob["magic_ok"] = blob["hex"].startswith(FDT_MAGIC.hex())
    return said


def _chunk_json(chunk: Chunk) -> dict[str, Any]:
    return {
        "phys": chunk.phys,
        "next": chunk.next_phys,
        "order": chunk.order,
        "num_elms": chunk.nr_elements,
        "elms": [
            {"phys_start": element.phys_start, "bitmap": element.bitmap, "set": element.nr_set}
            for element in chunk.elements
        ],
    }
