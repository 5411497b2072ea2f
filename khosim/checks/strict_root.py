"""What no kernel writes into a root FDT, though any reader of device trees would take it.

A root FDT is built in one zeroed page by ``kernel/liveupdate/kexec_handover.c:kho_out_fdt_setup``
and ``kho_add_subtree`` @ 7.3: no reservations, no boot CPU, zeros wherever libfdt pads, names that
are words, addresses of pages. Without the memory it speaks of, that is all that tells a damaged
root FDT from a sound one; a flipped bit in the middle of an address shows only in memory.

Left out: paddings of kho-v1, whose page was not zeroed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from khosim.checks.decode_luo import LUO_BYTES
from khosim.checks.decode_root import METADATA_BYTES

if TYPE_CHECKING:
    from khosim.checks.decode_fdt import Fdt, Node
    from khosim.checks.decode_root import Region, RootFdt
    from khosim.checks.reader import ProblemLog

__all__ = ("check_layout", "check_values")

_PHYS_MAX = 1 << 52
_PAGE = 4096
_LARGEST_PAGE = 65536
_LEAST_FDT_BYTES = 72  # header, an empty reservation block, a root node
_BLOB_BYTES = {
    "LUO": (LUO_BYTES, LUO_BYTES),
    "kexec-metadata": (METADATA_BYTES, METADATA_BYTES),
    "memblock": (_LEAST_FDT_BYTES, _LARGEST_PAGE),
    "kho_test": (_LEAST_FDT_BYTES, 16 << 20),
}
"""Least and most bytes of the blobs that kernels make themselves; they begin on a page."""

_BOOT_CPU_AT, _RSVMAP_AT, _STRUCT_AT = 28, 16, 8
_BEGIN_NODE, _PROP, _END = 1, 3, 9


def check_layout(fdt: Fdt, *, zeroed: bool, path: str = "/", phys: int = 0) -> Iterator[
    tuple[str, int, str, str]
]:
    """Yield ``(code, address, detail, path)`` for each oddity of a tree that can be read whole.

    ``zeroed`` tells whether the tree was built in zeroed memory.
    """
    if fdt.problems or fdt.root is None:
        return
    data = fdt.data
    boot_cpu, rsvmap = _u32(data, _BOOT_CPU_AT), _u32(data, _RSVMAP_AT)
    if boot_cpu:
        yield "fdt-reserved", phys + _BOOT_CPU_AT, f"boot CPU {boot_cpu:#x}", path
    if any(data[rsvmap : rsvmap + 16]):
        yield "fdt-reserved", phys + rsvmap, "a memory reservation", path
    for inner, name in _names(fdt.root, path):
        if not (name.isascii() and name.decode("ascii").isprintable()):
            yield "fdt-name", phys, f"name {name!r}", inner
    for start, end in _paddings(data) if zeroed else ():
        if any(data[start:end]):
            yield "fdt-padding", phys + start, data[start:end].hex(" "), path


def check_values(root: RootFdt, log: ProblemLog) -> None:
    """Note addresses and sizes that no handover has."""
    map_phys = root.map_phys
    if map_phys is not None and not _is_page(map_phys):
        expected = f"the address of a page below {_PHYS_MAX:#x}"
        log.add("kho-map", 0, f"{map_phys:#x}", "/preserved-memory-map", expected)
    owners: dict[int, str] = {} if map_phys is None else {map_phys: "the map"}
    for name, blob in root.subtrees.items():
        _check_blob(root, name, blob, log)
        page = blob.start & -_PAGE
        if name in _BLOB_BYTES and page in owners:
            found = f"{blob.start:#x}, where {owners[page]} is"
            log.add("kho-subtree", 0, found, f"/{name}", "a page of its own")
        owners.setdefault(page, name)


def _check_blob(root: RootFdt, name: str, blob: Region, log: ProblemLog) -> None:
    if not 0 < blob.start < _PHYS_MAX or (name in _BLOB_BYTES and blob.start % _PAGE):
        what = "the address of a page" if name in _BLOB_BYTES else "an address"
        expected = f"{what} below {_PHYS_MAX:#x}"
        log.add("kho-subtree", 0, f"{blob.start:#x}", f"/{name}/preserved-data", expected)
    if root.format.size_prop is None:
        return
    least, most = _BLOB_BYTES.get(name, (1, _PHYS_MAX))
    if name == "LUO" and root.compatible == "kho-v3":  # 7.1, whose LUO keeps a device tree
        least, most = _BLOB_BYTES["memblock"]
    if not least <= blob.size <= most:
        expected = f"{least} bytes" if least == most else f"{least} to {most} bytes"
        log.add("kho-subtree", 0, f"{blob.size} bytes", f"/{name}/blob-size", expected)


def _names(node: Node, path: str) -> Iterator[tuple[str, bytes]]:
    """Names of properties and nodes; a sound tree is not deep."""
    for key, _ in node.props:
        yield path, key
    for child in node.children:
        inner = f"{path.rstrip('/')}/{child.name.decode('ascii', 'backslashreplace')}"
        yield inner, child.name
        yield from _names(child, inner)


def _paddings(data: bytes) -> Iterator[tuple[int, int]]:
    """Where libfdt pads names and values of a sound structure block."""
    at = _u32(data, _STRUCT_AT)
    while (tag := _u32(data, at)) != _END:
        at += 4
        past = at
        if tag == _BEGIN_NODE:
            past = data.index(b"\0", at) + 1
        elif tag == _PROP:
            past = at + 8 + _u32(data, at)
        at = (past + 3) & ~3
        if past < at:
            yield past, at


def _u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def _is_page(phys: int) -> bool:
    return phys % _PAGE == 0 and 0 < phys < _PHYS_MAX
