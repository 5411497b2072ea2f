"""Items about what a kernel showed under ``/sys/kernel/debug/kho``.

``in`` has to be what the predecessor handed over, ``out`` what the kernel itself will hand over
(``kernel/liveupdate/kexec_handover_debugfs.c`` @ 7.3), with the kernel's quirks: ``out/fdt`` shows
as many bytes as the root FDT had at boot, a kernel that was itself handed over has none, and blobs
whose owner is done with them show whatever is in their pages by then. LUO's ``out`` blob gets its
sessions only at the jump.
"""

from __future__ import annotations

from collections.abc import Iterator

from khosim.abi.kexec_metadata import KHO_METADATA_NODE_NAME, pack_kexec_metadata
from khosim.abi.luo import LUO_SER_BYTES, unpack_luo_ser
from khosim.capture.debugfs import DebugfsSide, read_debugfs
from khosim.capture.folder import CapturedGeneration
from khosim.checks.decode_fdt import parse_fdt
from khosim.checks.decode_root import FDT_MAGIC
from khosim.conform.held import Held
from khosim.conform.items import Item, unknown
from khosim.conform.rebuild_fdt import first_difference, rebuild_tree
from khosim.errors import InputError
from khosim.machine.memory_map import RAM

__all__ = ("debugfs_items",)

_LUO, _MEMBLOCK = "LUO", "memblock"
_V1 = b"kho-v1"


def debugfs_items(
    generation: CapturedGeneration, before: Held | None, held: Held
) -> Iterator[Item]:
    """The items of both sides; ``before`` is None for a cold boot."""
    if not generation.has("kho"):
        yield unknown("debugfs", "not captured")
        return
    try:
        sides = read_debugfs(generation.path, scratch=False)  # an item of its own
    except InputError as error:
        yield Item("debugfs", False, 0, 1, (str(error),))
        return
    side = sides.get("in")
    if before is None:
        found = [] if side is None else ["in/: a cold boot was handed nothing"]
        yield Item.counted("debugfs in", not found, 1, found, note="none at a cold boot")
    elif side is None:
        yield Item("debugfs in", False, 0, 1, (f"{generation.name}/kho/in: no such folder",))
    else:
        yield from _incoming(side, before)
    side = sides.get("out")
    if side is None and generation.has("kho/out"):
        yield unknown("debugfs out", "no blobs")
    elif side is None:
        yield Item("debugfs out", False, 0, 1, (f"{generation.name}/kho/out: no such folder",))
    elif writer := _other_writer(generation, held):
        yield unknown("debugfs out", f"the handover is not this kernel's, but {writer}'s")
    else:
        yield from _outgoing(side, generation, before, held)
    if generation.has("kho/out/finalize"):
        yield _finalize(generation, held)


def _other_writer(generation: CapturedGeneration, held: Held) -> str:
    """Who wrote the handover, where it says that it was not the kernel of this log."""
    metadata = None if held.handover is None else held.handover.kexec_metadata
    if metadata is None or held.said is None or held.report is None:
        return ""
    told = held.said.get("subtrees", {}).get(KHO_METADATA_NODE_NAME, {})
    if told != held.report.to_json()["subtrees"].get(KHO_METADATA_NODE_NAME):
        return ""  # one of the two accounts is damaged
    try:
        release = generation.boot_log.release
    except InputError:
        return ""
    return metadata.previous_release if release not in (None, metadata.previous_release) else ""


def _incoming(side: DebugfsSide, before: Held) -> Iterator[Item]:
    handover = before.handover
    if handover is None:
        yield from _as_finalized(side, before)
        return
    needs = ("-1/handover",)
    if side.fdt is None:
        yield Item("in/fdt", False, 0, 1, ("no such file",))
    else:
        yield _same("in/fdt", side.fdt, handover.fdt, needs)
    for name in sorted(handover.subtrees.keys() | side.blobs.keys()):
        item = f"in/{name}"
        shown, blob = side.blobs.get(name), before.blob(name)
        if shown is None:
            yield Item(item, False, 0, 1, ("no such file",), needs=needs)
        elif blob is None:
            yield Item(item, False, 0, 1, ("no subtree of that name",), needs=needs)
        elif name == _LUO and _is_reused(shown, blob):
            yield unknown(item, "given back by its owner, and somebody else's now")
        else:
            yield _same(item, shown, blob, needs)


def _as_finalized(side: DebugfsSide, before: Held) -> Iterator[Item]:
    """Without pages: what a predecessor showed after it had finalized, which is final."""
    generation = before.generation
    files = [("fdt", side.fdt), *((f"sub_fdts/{name}", blob) for name, blob in side.blobs.items())]
    shown = [(name, blob) for name, blob in files if blob and generation.has(f"kho/out/{name}")]
    finalized = "kho/out/finalize"
    is_final = generation.has(finalized) and generation.text_of(finalized)[:1] == "1"
    is_before = side.path.parent.parent != generation.path
    if not (is_before and is_final and shown):
        yield unknown("debugfs in", f"the predecessor's pages: {before.why}")
        return
    for name, blob in shown:
        item = name.removeprefix("sub_fdts/")
        own = generation.bytes_of(f"kho/out/{name}")
        yield _same(f"in/{item}", blob or b"", own, (f"-1/out/{item}",))


def _outgoing(
    side: DebugfsSide, generation: CapturedGeneration, before: Held | None, held: Held
) -> Iterator[Item]:
    yield _out_fdt(side, before, held)
    handover = held.handover
    for name in sorted(side.blobs.keys() | (handover.subtrees.keys() if handover else set())):
        item = f"out/{name}"
        shown, blob = side.blobs.get(name), held.blob(name)
        if shown is None:
            yield Item(item, False, 0, 1, ("no such file",), needs=("handover",))
        elif name == _LUO:
            yield _luo(item, shown, blob, before, generation)
        elif blob is not None:
            yield _same(item, shown, blob, ("handover",))
        elif name == KHO_METADATA_NODE_NAME:
            yield _metadata(item, shown, generation, before)
        elif name == _MEMBLOCK and before is not None and before.blob(name) is not None:
            yield _regions(item, shown, before)
        elif shown.startswith(FDT_MAGIC):
            tree = rebuild_tree(shown)
            found = [tree.difference] if tree.difference else []
            yield Item.counted(item, not found, 1, found, note=tree.way)
        else:
            yield unknown(item, f"{len(shown)} bytes, and no handover to compare them with")


def _is_reused(shown: bytes, blob: bytes) -> bool:
    """Whether a freed page holds other things by now; one odd byte does not make it another's."""
    differing = sum(left != right for left, right in zip(shown, blob, strict=False))
    return not shown.startswith(b"luo-v") and differing > 1


def _finalize(generation: CapturedGeneration, held: Held) -> Item:
    """Whether user space had finalized, which shows the subtrees and lets the kernel hand over."""
    item = "out/finalize"
    shown = generation.text_of("kho/out/finalize").rstrip("\n")
    done = held.handover is not None or generation.has("kho/out/sub_fdts")
    found = [] if shown == str(int(done)) else [f"{shown!r}, not {int(done)}"]
    return Item.counted(item, not found, 1, found)


def _out_fdt(side: DebugfsSide, before: Held | None, held: Held) -> Item:
    shown = side.fdt
    if shown is None:
        if before is not None:
            return Item("out/fdt", True, 1, 1, note="none: booted through KHO")
        return Item("out/fdt", False, 0, 1, ("no such file, though this was a cold boot",))
    is_v1 = _V1 in shown[:256]
    if before is not None and not is_v1:
        return Item("out/fdt", False, 0, 1, ("a kernel booted through KHO shows none",))
    whole = held.root_fdt()
    if whole is not None:
        note = f"cut to {len(shown)} of {len(whole)} bytes" if len(shown) < len(whole) else ""
        return _same("out/fdt", shown, whole[: len(shown)], ("handover",), note)
    if is_v1:
        tree = rebuild_tree(shown)
        found = [tree.difference] if tree.difference else []
        return Item.counted("out/fdt", not found, 1, found, note=tree.way)
    found = [one.detail for one in parse_fdt(shown).problems[:1]]
    return Item.counted("out/fdt", not found, 1, found, note="a sound tree")


def _luo(
    item: str,
    shown: bytes,
    blob: bytes | None,
    before: Held | None,
    generation: CapturedGeneration,
) -> Item:
    if shown.startswith(FDT_MAGIC):
        tree = rebuild_tree(shown)
        found = [tree.difference] if tree.difference else []
        return Item.counted(item, not found, 1, found, note=tree.way)
    if len(shown) != LUO_SER_BYTES:
        return Item(item, False, 0, 1, (f"{len(shown)} bytes, not {LUO_SER_BYTES}",))
    ser = unpack_luo_ser(shown)
    differences = []
    if blob is not None and len(blob) == LUO_SER_BYTES:
        final = unpack_luo_ser(blob)
        for field in ("compatible", "liveupdate_num", "flbs_pa"):
            left, right = getattr(ser, field), getattr(final, field)
            if left != right:
                differences.append(f"{field}: {left}, at the jump {right}")
        if ser.sessions_pa not in (0, final.sessions_pa):
            jump = f"at the jump {final.sessions_pa:#x}"
            differences.append(f"sessions_pa: {ser.sessions_pa:#x}, {jump}")
    else:
        number = 1
        if before is not None and before.luo is not None:
            number = before.luo.liveupdate_num + 1
        is_told = before is None or before.handover is not None
        if is_told and ser.liveupdate_num != number:
            differences.append(f"liveupdate_num: {ser.liveupdate_num}, not {number}")
        if not ser.compatible.startswith("luo-v"):
            differences.append(f"compatible: {ser.compatible!r}")
        for field in ("sessions_pa", "flbs_pa"):
            phys = getattr(ser, field)
            if phys and not _is_page_of_ram(phys, generation):
                differences.append(f"{field}: {phys:#x} is no page of RAM")
    return Item.counted(item, not differences, 1, differences, needs=("handover", "-1/handover"))


def _is_page_of_ram(phys: int, generation: CapturedGeneration) -> bool:
    try:
        entries = generation.boot_log.memory_map.entries
    except InputError:
        return True  # nothing to compare it with
    in_ram = any(one.type == RAM and one.start <= phys < one.end for one in entries)
    return in_ram and not phys % generation.page_size


def _metadata(
    item: str, shown: bytes, generation: CapturedGeneration, before: Held | None
) -> Item:
    try:
        release = generation.boot_log.release or ""
    except InputError as error:
        return unknown(item, str(error))
    count = 1
    if before is not None:
        if before.handover is None:
            return unknown(item, f"the predecessor's pages: {before.why}")
        metadata = before.handover.kexec_metadata
        count = metadata.kexec_count + 1 if metadata is not None else 1
    return _same(item, shown, pack_kexec_metadata(release, count), ("-1/handover",))


def _regions(item: str, shown: bytes, before: Held) -> Item:
    # Revived regions keep name, address and size, so a kernel with the same ones says the same.
    names = _names(shown)
    theirs = before.blob(_MEMBLOCK) or b""
    if names == _names(theirs):
        return _same(item, shown, theirs, ("-1/handover",), "as the predecessor's")
    tree = rebuild_tree(shown)
    found = [tree.difference] if tree.difference else []
    return Item.counted(item, not found, 1, found, note=tree.way)


def _names(tree: bytes) -> list[bytes]:
    root = parse_fdt(tree).root
    return [] if root is None else [node.name for node in root.children]


def _same(
    item: str, shown: bytes, own: bytes, needs: tuple[str, ...] = (), note: str = ""
) -> Item:
    difference = first_difference(shown, own).replace("rebuilt", "in memory")
    found = [difference] if difference else []
    return Item.counted(item, not found, 1, found, note=note, needs=needs)


