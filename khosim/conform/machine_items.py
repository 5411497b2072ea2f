"""Items about what else a kernel told of its machine: files of ``/proc`` that bear on memory.

The replay knows memblock as the kernel had it; ``/proc/iomem`` and ``/proc/zoneinfo``
(``mm/mm_init.c:calculate_node_totalpages`` @ 7.3) have to agree with it, ``/proc/meminfo`` and
``/proc/buddyinfo`` with ``zoneinfo``, ``/proc/cmdline`` with the log, and the device tree that an
arm64 kernel was started with (``arch/arm64/kernel/machine_kexec_file.c`` and
``drivers/of/kexec.c``) with the handover. Counts of free pages were read at different moments and
are compared with what there is at most. A file that a capture has in no generation is no item.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from khosim.abi import fdt
from khosim.capture.folder import Capture, CapturedGeneration
from khosim.conform.held import Held
from khosim.conform.items import Item, unknown
from khosim.conform.misread import dies
from khosim.conform.replay import Replay
from khosim.conform.start import covered, subtract
from khosim.errors import InputError
from khosim.kernel.memblock import MEMBLOCK_NOMAP
from khosim.machine.memory_map import RAM

__all__ = ("files_item", "machine_items")

_MOST = 8
_V1, _V1_MOST_KIB = "kho-v1", 64
_ZONE_RANGE = re.compile(
    r"(?m)  (DMA|DMA32|Normal|Device)[ \t]+(?:\[mem 0x([0-9a-f]+)-0x([0-9a-f]+)\]|empty)\s*$"
)
_EFI = re.compile(r"\befi: EFI v\d")
_ZONE = re.compile(r"Node (\d+), zone +(\S+)")
_FREE_LISTS = re.compile(r"Node (\d+), zone\s+(\S+)((?:\s+\d+)+)\s*")
_COUNT = re.compile(r"\s+(?:pages )?(free|spanned|present|managed|start_pfn):?\s+(\d+)")
_SOMETIMES = re.compile(
    r"(ram\.npz|handover\.json|dmesg\.end|kho/out/(fdt|finalize|sub_fdts/kho_test)"
    r"|kho/in/.*|firmware/.*)"
)
"""Files that some generations have and others not, for reasons of their own."""


class _Zone(NamedTuple):
    """One zone of ``/proc/zoneinfo``: its counts in pages, by name."""

    node: int
    name: str
    counts: dict[str, int]


def files_item(capture: Capture, generation: CapturedGeneration) -> Item:
    """Whether this generation has the files that others of its capture have."""
    own = _files(generation)
    others = set().union(*(_files(one) for one in capture.generations if one is not generation))
    expected = {name for name in others if not _SOMETIMES.fullmatch(name)}
    if generation.has("kho/out/finalize") and not generation.has("kho/out/sub_fdts"):
        expected = {name for name in expected if not name.startswith("kho/out/sub_fdts/")}
    missing = sorted(expected - own)
    differences = [f"{generation.name}/{name}: no such file" for name in missing]
    total = len(expected | own)
    if missing and dies(generation):
        return unknown("files", "the kernel dies and leaves but its log")
    return Item.counted("files", total - len(missing), total, differences)


def _files(generation: CapturedGeneration) -> set[str]:
    root = generation.path
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def machine_items(
    capture: Capture, generation: CapturedGeneration, replay: Replay | None, before: Held | None
) -> Iterator[Item]:
    """The items of ``/proc`` files and of the device tree."""
    for name, judge in (
        ("cmdline", lambda: _cmdline(generation)),
        ("iomem", lambda: _iomem(generation, replay)),
        ("zoneinfo", lambda: _zoneinfo(generation, replay)),
        ("meminfo", lambda: _meminfo(generation, before)),
        ("buddyinfo", lambda: _buddyinfo(capture, generation)),
        ("firmware/fdt", lambda: _device_tree(generation, before)),
    ):
        if generation.has(name):
            yield _judged(name, judge)
    if capture.arch == "arm64" and before is not None and not generation.has("firmware/fdt"):
        yield unknown("firmware/fdt", "not captured")


def _judged(name: str, judge: Callable[[], Item]) -> Item:
    try:
        return judge()
    except InputError as error:
        return Item(name, False, 0, 1, (str(error),))


def _cmdline(generation: CapturedGeneration) -> Item:
    if not generation.has("dmesg"):
        return unknown("cmdline", "no log to compare it with")
    found = re.search(r"Kernel command line: ([^\r\n]*)", generation.dmesg) or re.search(
        r"Command line: ([^\r\n]*)", generation.dmesg
    )
    if found is None:
        return unknown("cmdline", "the log does not tell")
    own, said = generation.cmdline, found.group(1).strip()
    if said.endswith("\\"):  # a long one is logged in several lines
        said = said[:-1].rstrip()
        own = own[: len(said)]
    differences = [] if own == said else [f"{own!r}, in the log {said!r}"]
    return Item.counted("cmdline", own == said, 1, differences)


def _iomem(generation: CapturedGeneration, replay: Replay | None) -> Item:
    if replay is None:
        return unknown("iomem", "no replay to compare it with")
    iomem = generation.iomem
    page = generation.page_size
    shown = [
        (-(-one.start // page) * page, one.end // page * page)
        for one in iomem.memory_map.entries
        if one.type == RAM
    ]
    rows = replay.memblock.memory.rows()
    memory = [  # what is not to be mapped is called reserved there
        (-(-base // page) * page, (base + size) // page * page)
        for base, size, flags, _ in rows
        if not flags & MEMBLOCK_NOMAP
    ]
    memory = [(low, high) for low, high in memory if low < high]
    last = replay.memblock.memblock_end_of_DRAM()  # memory above was plugged in later
    lost = subtract(memory, shown)
    extra = subtract([(low, min(high, last)) for low, high in shown if low < last], memory)
    differences = [f"memory [{low:#x}-{high:#x}) is no System RAM" for low, high in lost]
    differences += [f"System RAM [{low:#x}-{high:#x}) is no memory" for low, high in extra]
    reserved = [(base, base + size) for base, size, _, _ in replay.memblock.reserved.rows()]
    parts = [one for one in iomem.inside_ram if one[2].startswith("Kernel ")]
    for start, end, name in parts:
        if not covered(start, end, reserved):
            differences.append(f"{name} [{start:#x}-{end:#x}) is not reserved")
    total = len(memory) + len(parts)
    return Item.counted(
        "iomem", max(0, total - len(differences)), total, differences[:_MOST], needs=("replay",)
    )


def _plugged(generation: CapturedGeneration, replay: Replay) -> bool:
    """Whether there is RAM above all that memblock knew."""
    if not generation.has("iomem"):
        return False
    last = replay.memblock.memblock_end_of_DRAM()
    try:
        entries = generation.iomem.memory_map.entries
    except InputError:
        return False
    return any(one.type == RAM and one.end - generation.page_size > last for one in entries)


def _zones(generation: CapturedGeneration) -> list[_Zone]:
    zones: list[_Zone] = []
    for line in generation.text_of("zoneinfo").splitlines():
        if found := _ZONE.match(line):
            zones.append(_Zone(int(found.group(1)), found.group(2), {}))
        elif zones and (found := _COUNT.fullmatch(line)):
            zones[-1].counts.setdefault(found.group(1), int(found.group(2)))
    if not zones:
        raise InputError(str(generation.path / "zoneinfo"), "no zone in it")
    return zones


def _zoneinfo(generation: CapturedGeneration, replay: Replay | None) -> Item:
    zones = _zones(generation)
    if replay is None:
        return unknown("zoneinfo", "no replay to compare it with")
    if any(one.name == "Movable" and one.counts.get("present") for one in zones):
        return unknown("zoneinfo", "kernelcore= or movablecore= moved memory between zones")
    if _plugged(generation, replay):
        return unknown("zoneinfo", "memory was plugged in after boot")
    page = generation.page_size
    limits = {
        name: (int(low, 16) // page, (int(high, 16) + 1) // page)
        for name, low, high in _ZONE_RANGE.findall(generation.dmesg)
        if low
    }
    memory = list(replay.memblock.for_each_mem_pfn_range())
    differences = []
    total = same = 0
    for zone in zones:
        if "present" not in zone.counts:
            continue
        low, high = limits.get(zone.name, (0, 0))
        ranges = [(start, end) for start, end, nid in memory if max(nid, 0) == zone.node]
        pieces = [
            (max(start, low), min(end, high))
            for start, end in ranges
            if max(start, low) < min(end, high)
        ]
        own = {"present": sum(end - start for start, end in pieces)}
        if pieces:  # the part of the node's span in the zone, holes included
            own["start_pfn"] = max(low, ranges[0][0])
            own["spanned"] = min(high, ranges[-1][1]) - own["start_pfn"]
        for name, value in own.items():
            said = zone.counts.get(name)
            total += 1
            same += said == value
            if said != value:
                where = f"node {zone.node} {zone.name} {name}"
                differences.append(f"{where}: {said}, from memblock {value}")
    return Item.counted("zoneinfo", same, total, differences[:_MOST], needs=("replay",))


def _meminfo(generation: CapturedGeneration, before: Held | None) -> Item:
    found = re.search(r"MemTotal:\s+(\d+) kB", generation.text_of("meminfo"))
    if found is None:
        return Item("meminfo", False, 0, 1, ("no MemTotal in it",))
    if not generation.has("zoneinfo"):
        return unknown("meminfo", "no zoneinfo to compare it with")
    pages = sum(zone.counts.get("managed", 0) for zone in _zones(generation))
    own, said = pages * generation.page_size >> 10, int(found.group(1))
    differences = [] if own == said else [f"MemTotal {said} kB, all zones together {own} kB"]
    old = before is not None and (before.handover is None or before.handover.compatible == _V1)
    late = old and said - own < _V1_MOST_KIB
    if generation.has("dmesg") and _EFI.search(generation.dmesg):
        late = True  # efi_free_boot_services: memblock_free_late counts pages for the total alone
    if said > own and late:
        return unknown("meminfo", f"{differences[0]}: this boot frees memory late")
    return Item.counted("meminfo", own == said, 1, differences, needs=("zoneinfo",))


def _buddyinfo(capture: Capture, generation: CapturedGeneration) -> Item:
    rows: dict[tuple[int, str], list[int]] = {}
    for line in generation.text_of("buddyinfo").splitlines():
        found = _FREE_LISTS.fullmatch(line)
        if found is None:
            return Item("buddyinfo", False, 0, 1, (f"{line[:60]!r} is no line of it",))
        counts = [int(word) for word in found.group(3).split()]
        rows[int(found.group(1)), found.group(2)] = counts
    if not generation.has("zoneinfo"):
        return unknown("buddyinfo", "no zoneinfo to compare it with")
    nr_orders = max(
        len(found.group(3).split())
        for one in capture.generations
        if one.has("buddyinfo")
        for line in one.text_of("buddyinfo").splitlines()
        if (found := _FREE_LISTS.fullmatch(line))
    )
    zones = {(one.node, one.name): one.counts for one in _zones(generation)}
    used = {key for key, counts in zones.items() if counts.get("present") or key in rows}
    differences = []
    for key in sorted(used):
        name = f"node {key[0]} {key[1]}"
        if key not in rows:
            differences.append(f"{name}: no line")
        elif len(rows[key]) != nr_orders:
            differences.append(f"{name}: {len(rows[key])} orders")
        else:
            free = sum(count << order for order, count in enumerate(rows[key]))
            managed = zones.get(key, {}).get("managed", 0)
            if free > managed:
                differences.append(f"{name}: {free} pages free of {managed}")
    total = len(used)
    return Item.counted("buddyinfo", total - len(differences), total, differences[:_MOST])


def _device_tree(generation: CapturedGeneration, before: Held | None) -> Item:
    name = "firmware/fdt"
    tree = generation.bytes_of(name)
    error = fdt.fdt_check_full(tree) if len(tree) >= 40 else -fdt.FDT_ERR_TRUNCATED
    if error:
        return Item(name, False, 0, 1, (f"no sound device tree: {fdt.fdt_strerror(error)}",))
    packed = memoryview(bytearray(len(tree) + 4096))
    if fdt.fdt_open_into(tree, packed, len(packed)) or fdt.fdt_pack(packed):
        return Item(name, False, 0, 1, ("it cannot be opened and packed again",))
    own: dict[str, object] = {"packed again": bytes(packed[: fdt.fdt_totalsize(packed)])}
    said: dict[str, object] = {"packed again": tree[: fdt.fdt_totalsize(tree)]}
    chosen = fdt.fdt_path_offset(tree, "/chosen")
    props = {
        prop: fdt.fdt_getprop(tree, chosen, prop)[0]
        for prop in ("bootargs", "linux,kho-fdt", "linux,kho-scratch")
        if chosen >= 0
    }
    if generation.has("cmdline"):
        own["bootargs"] = generation.cmdline.encode() + b"\0"
        said["bootargs"] = bytes(props.get("bootargs") or b"")
    if before is not None and before.handover is not None:
        handover = before.handover
        own["linux,kho-fdt"] = (handover.fdt_phys, handover.page_size)
        value = bytes(props.get("linux,kho-fdt") or b"")
        said["linux,kho-fdt"] = (int.from_bytes(value[:8], "big"), int.from_bytes(value[8:], "big"))
        if before.generation.has("kho/out/scratch_phys"):
            own["linux,kho-scratch"] = 16 * len(before.generation.scratch_areas)
            value = bytes(props.get("linux,kho-scratch") or b"")
            said["linux,kho-scratch"] = int.from_bytes(value[8:], "big")
    wrong = [key for key in own if own[key] != said[key]]
    differences = [f"{key}: not what the handover says" for key in wrong]
    needs = ("cmdline", "-1/handover", "-1/scratch")
    return Item.counted(name, len(own) - len(wrong), len(own), differences, needs=needs)
