"""Items about what one generation handed over: read, and written once more.

First the decoder's account against that of an independent program (``handover.json``); then all
that the handover consists of is rebuilt byte for byte from the facts in it: root FDT, subtrees,
the tree of preserved memory, live-update state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from khosim.abi.kexec_metadata import pack_kexec_metadata
from khosim.checks.decode import Handover
from khosim.checks.decode_fdt import parse_fdt
from khosim.checks.decode_root import FDT_MAGIC
from khosim.checks.decode_vmalloc import VMALLOC_BYTES, decode_vmalloc, read_vmalloc
from khosim.checks.decode_walk import Walk
from khosim.checks.preserved import expand
from khosim.checks.reader import ProblemLog
from khosim.conform.held import Held
from khosim.conform.items import Item, unknown
from khosim.conform.rebuild_fdt import first_difference, rebuild_root, rebuild_tree
from khosim.conform.rebuild_luo import chunk_pieces, compare_pieces, luo_pieces
from khosim.conform.rebuild_radix import compare_tree
from khosim.kernel.arch import Arch

__all__ = ("handover_items",)

_MOST = 8
_HANDOVER = "handover"


def handover_items(held: Held, arch: Arch) -> Iterator[Item]:
    """All items of the handover in ``held``."""
    yield _told(held)
    handover = held.handover
    if handover is None:
        return
    root = rebuild_root(handover.fdt, handover.page_size)
    yield _rebuilt("root FDT", root.difference, root.way)
    for name in handover.subtrees:
        yield _subtree(held, handover, name)
    if handover.compatible in _RADIX and handover.map_phys:
        same, total, differences = compare_tree(
            held.reader, handover.preserved, handover.map_phys, arch
        )
        yield Item.counted("map pages", same, total, differences[:_MOST], needs=(_HANDOVER,))
    if held.luo is not None and held.luo.compatible == "luo-v5":
        pieces = luo_pieces(held.luo, handover.subtrees["LUO"].start, handover.page_size)
        for kind, (same, total, found) in compare_pieces(held.reader, pieces).items():
            yield Item.counted(f"LUO: {kind}", same, total, found[:_MOST], needs=(_HANDOVER,))
    yield from _test_folios(held, handover)


_RADIX = ("kho-v3", "kho-v4")
_OTHER_FORMATS = ("luo-compatible",)
"""Damage to a reader, but none to the kernel that wrote it."""
_SEQUENTIAL = ("memblock", "kho_test", "LUO")
"""Subtrees whose owners write them front to back."""
_NOT_IN_PAGES = ("kho_data",)
"""Boot parameters, which the independent program looked for in all of RAM."""


def _rebuilt(name: str, difference: str, way: str = "") -> Item:
    found = [difference] if difference else []
    return Item.counted(name, not difference, 1, found, note=way, needs=(_HANDOVER,))


def _told(held: Held) -> Item:
    """``ram.npz``, decoded, against ``handover.json``."""
    generation = held.generation
    missing = [name for name in ("ram.npz", "handover.json") if not generation.has(name)]
    if len(missing) == 2:
        return unknown(_HANDOVER, "not captured")
    if held.report is None:
        return Item(_HANDOVER, False, 0, 1, (held.why,))
    if held.said is None:
        cause = "no such file" if missing else "not JSON"
        return Item(_HANDOVER, False, 0, 1, (f"{generation.name}/handover.json: {cause}",))
    own = held.report.to_json()
    damage = own.pop("damage", [])
    said = {key: value for key, value in held.said.items() if key not in _NOT_IN_PAGES}
    keys = sorted(own.keys() | said.keys())
    differences = [
        f"handover.json {path}: {_short(left)}, in ram.npz {_short(right)}"
        for key in keys
        for path, left, right in _apart(key, said.get(key), own.get(key))
    ]
    wrong = sum(own.get(key) != said.get(key) for key in keys)
    # What the two agree on may still be damage, but of the handover and not of the capture.
    if not wrong:
        differences += [
            f"{one['path']}: {one['found']}" for one in damage if one["code"] not in _OTHER_FORMATS
        ]
    return Item.counted(_HANDOVER, len(keys) - wrong, len(keys), differences[:_MOST])


def _apart(path: str, left: Any, right: Any) -> Iterator[tuple[str, Any, Any]]:
    """The places in which two plain values differ."""
    if left == right:
        return
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted(left.keys() | right.keys(), key=str):
            yield from _apart(f"{path}/{key}", left.get(key), right.get(key))
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for number, (one, other) in enumerate(zip(left, right, strict=True)):
            yield from _apart(f"{path}[{number}]", one, other)
    else:
        yield path, left, right


def _short(value: Any) -> str:
    text = f"{value}"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _subtree(held: Held, handover: Handover, name: str) -> Item:
    item = f"subtree {name}"
    blob = held.blob(name) or b""
    if name == "kexec-metadata" and handover.kexec_metadata is not None:
        metadata = handover.kexec_metadata
        own = pack_kexec_metadata(metadata.previous_release, metadata.kexec_count)
        return _rebuilt(item, first_difference(blob, own), "packed")
    if name == "LUO" and held.luo is not None and held.luo.compatible == "luo-v5":
        pieces = luo_pieces(held.luo, handover.subtrees[name].start, handover.page_size)
        return _rebuilt(item, first_difference(blob, pieces[0][2][: len(blob)]), "packed")
    if blob.startswith(FDT_MAGIC):
        tree = rebuild_tree(blob)
        if tree.difference and name not in _SEQUENTIAL:
            return unknown(item, "a tree that is written in a way khosim does not know")
        return _rebuilt(item, tree.difference, tree.way)
    return unknown(item, f"{len(blob)} bytes of a format that khosim does not know")


def _test_folios(held: Held, handover: Handover) -> Iterator[Item]:
    """What the kernel's test module lists: chunks, and folios that are to be preserved blocks.

    ``lib/test_kho.c``: the list is a vmalloc area @ 7.3, and was the property itself @ 6.16.
    """
    blob = held.blob("kho_test") or b""
    root = parse_fdt(blob).root if blob.startswith(FDT_MAGIC) else None
    data = root.child(b"data") if root is not None else None
    raw = data.prop(b"folios_info") if data is not None else None
    number = data.prop(b"nr_folios") if data is not None else None
    if raw is None or number is None or len(number) != 4:
        return
    nr_folios = int.from_bytes(number, "little")
    listed = raw
    if len(raw) == VMALLOC_BYTES and nr_folios != 2:
        log = ProblemLog()
        walk = Walk(held.reader, handover.page_size, log)
        area = decode_vmalloc(walk, raw, handover.subtrees["kho_test"].start, "/kho_test")
        pages = {path: phys for phys, path in walk.pages.items()}
        pieces = list(chunk_pieces(pages, "/kho_test", area, handover.page_size))
        same, total, found = compare_pieces(held.reader, pieces).get("vmalloc chunks", (0, 0, []))
        if not total:  # captures need not follow what only a test module understands
            yield unknown("kho_test: folios", "their list was not captured")
            return
        found += [f"{one.path}: {one.detail}" for one in log.done()]
        yield Item.counted("kho_test: vmalloc chunks", same, total, found, needs=(_HANDOVER,))
        listed = read_vmalloc(walk, area, 8 * nr_folios, "/kho_test")
    if len(listed) != 8 * nr_folios:
        yield unknown("kho_test: folios", "their list was not captured")
        return
    blocks = set(expand(handover.preserved))
    lost = []
    for at in range(0, len(listed), 8):
        word = int.from_bytes(listed[at : at + 8], "little")
        block = word & -handover.page_size, word & handover.page_size - 1
        if block not in blocks:
            lost.append(f"folio at {block[0]:#x} of order {block[1]}: no preserved block")
    yield Item.counted(
        "kho_test: folios", nr_folios - len(lost), nr_folios, lost[:_MOST], needs=(_HANDOVER,)
    )
