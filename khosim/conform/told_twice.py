"""Items about files in which a kernel tells once more what another file told already.

The firmware's memory map in the log and in ``/proc/iomem``
(``arch/x86/kernel/e820.c:e820__reserve_resources`` @ 7.3), the log as it was when the machine was
looked at and as it was at the jump, ``reserve_mem=`` of the command line and debugfs's
``memblock/reserve_mem_param`` (``mm/memblock.c:memblock_reserve_mem_show``).

Left out: entries of the map that a kernel changes or drops (``memmap=``, EFI's MMIO).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from khosim.capture.folder import Capture, CapturedGeneration
from khosim.conform.items import Item, unknown
from khosim.errors import InputError
from khosim.kernel.cmdline import parse_words
from khosim.machine.memory_map import ACPI_DATA, ACPI_NVS, RESERVED, UNUSABLE
from khosim.units import memparse

__all__ = ("string_get_size", "told_twice_items")

_MOST = 8
_MIB = 1 << 20
_USER_MAP = "user-defined physical RAM map"
_CHANGED = re.compile(r"e820: (?:update|remove) \[mem 0x([0-9a-f]+)-0x([0-9a-f]+)\]")
_RESOURCE = re.compile(r"(?m)^ *([0-9a-f]{8,16})-([0-9a-f]{8,16}) : (.*?)\s*$")
_SHOWN_AS = {
    RESERVED: "reserved",
    ACPI_DATA: "acpi tables",
    ACPI_NVS: "acpi non-volatile storage",
    UNUSABLE: "unusable memory",
}
_END, _PARAM = "dmesg.end", "memblock/reserve_mem_param"
_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


def told_twice_items(capture: Capture, generation: CapturedGeneration) -> Iterator[Item]:
    """The items of one generation's files."""
    if generation.has("dmesg"):
        yield _memory_map(capture, generation)
        if generation.has(_END):
            yield _log_at_the_jump(generation)
    if generation.has(_PARAM):
        yield _reserve_mem(generation)


def _memory_map(capture: Capture, generation: CapturedGeneration) -> Item:
    """Whether the log's map makes sense, and each entry that is no RAM is in ``/proc/iomem``."""
    name = "memory map"
    try:
        memory_map = generation.boot_log.memory_map
    except InputError as error:
        return Item(name, False, 0, 1, (str(error),))
    if memory_map.arch != capture.arch:
        cause = f"the log is of an {memory_map.arch} kernel, capture.json says {capture.arch}"
        return Item(name, False, 0, 1, (cause,))
    if not generation.has("iomem") or capture.arch != "x86_64":
        return Item(name, True, 1, 1)
    log = generation.dmesg
    if _USER_MAP in log:
        return unknown(name, "memmap= or mem= changed it")
    changed = [(int(low, 16), int(high, 16)) for low, high in _CHANGED.findall(log)]
    shown = [
        (int(low, 16), int(high, 16) + 1, kind.lower())
        for low, high, kind in _RESOURCE.findall(generation.text_of("iomem"))
    ]
    # e820__reserve_resources_late: those above 1 MiB come with PCI, maybe after iomem was read.
    has_late = any(low >= _MIB and other in _SHOWN_AS.values() for low, _, other in shown)
    differences = []
    total = 0
    for start, end, kind in memory_map.entries:
        if any(low < end and start <= high for low, high in changed):
            continue
        as_shown = _SHOWN_AS.get(kind)
        if as_shown is None or (start >= _MIB and not has_late):
            continue
        total += 1
        # A resource that overlaps others may have grown (insert_resource_expand_to_fit).
        if not any(
            low <= start and end <= high and other == as_shown for low, high, other in shown
        ):
            differences.append(f"[{start:#x}-{end:#x}) is not {as_shown} in iomem")
    return Item.counted(name, total - len(differences), total, differences[:_MOST])


def _log_at_the_jump(generation: CapturedGeneration) -> Item:
    """The later log begins with all of the earlier one."""
    first = generation.dmesg.splitlines()
    later = generation.text_of(_END).splitlines()
    if not first or (later and later[0] in first[1:] and later[0] != first[0]):
        return unknown(_END, "its beginning is lost")
    same = sum(left == right for left, right in zip(first, later, strict=False))
    differences = [
        f"line {nth}: {right!r}, in dmesg {left!r}"
        for nth, (left, right) in enumerate(zip(first, later, strict=False), 1)
        if left != right
    ]
    if len(later) < len(first):
        differences.append(f"{len(later)} lines, dmesg has {len(first)}")
    needs = ("replay", "preserved", "messages", "cmdline", "memory map")
    return Item.counted(_END, same, len(first), differences[:_MOST], note="lines", needs=needs)


def _reserve_mem(generation: CapturedGeneration) -> Item:
    """What ``reserve_mem=`` asked for, as far as it was granted."""
    if not generation.has("cmdline"):
        return unknown(_PARAM, "no command line to compare it with")
    asked = []
    for parameter, value in parse_words(generation.cmdline):
        if parameter == "reserve_mem" and value is not None and value.count(":") >= 2:
            size, _ = memparse(value)
            asked.append(f"{value.rpartition(':')[2]}\t\t({string_get_size(size)})")
    shown = generation.text_of(_PARAM).splitlines()
    rest = iter(asked)
    extra = [line for line in shown if line not in rest]
    differences = [f"{line!r}: nobody asked for it" for line in extra[:_MOST]]
    if not extra and len(shown) < len(asked):
        return unknown(_PARAM, f"{len(asked) - len(shown)} regions were asked for and not granted")
    total = len(asked)
    return Item.counted(
        _PARAM, max(0, total - len(differences)), total, differences, needs=("cmdline",)
    )


def string_get_size(size: int) -> str:
    """``lib/string_helpers.c:string_get_size`` in units of 1024, such as 2.00 MiB."""
    unit = rest = 0
    while size >= 1024:
        size, rest = divmod(size, 1024)
        unit += 1
    digits = 2 if size < 10 else 1 if size < 100 else 0
    if not size and not unit:
        return "0 B"
    thousandths = (rest * 1000 >> 10) + (5, 50, 500)[2 - digits]
    if thousandths >= 1000:
        size, thousandths = size + 1, thousandths - 1000
    fraction = f".{thousandths:03d}"[: digits + 1] if digits else ""
    return f"{size}{fraction} {_UNITS[unit]}B"
