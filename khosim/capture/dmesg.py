"""What a kernel log says about the machine: the memory map, the NUMA nodes, the command line.

The lines read are those of ``arch/x86/kernel/e820.c:e820__print_table @ 7.3`` (and of its older
wording: "usable", "reserved"), ``drivers/acpi/numa/srat.c:acpi_numa_memory_affinity_init``,
``mm/mm_init.c:free_area_init`` ("node   0: [mem ...]") and ``mm/memblock.c:memblock_dump``. Any
prefix is fine: time stamps, log levels, what journalctl or a serial console puts in front.

An x86 log has the firmware's own map. An arm64 log has only what memblock made of it, so memory
that the firmware reserved is unknown there. Of several boots in one text the first is read. The
memblock calls of ``memblock=debug`` are not read here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from khosim.errors import InputError
from khosim.machine.memory_map import (
    ACPI_DATA,
    ACPI_NVS,
    RAM,
    RESERVED,
    SOFT_RESERVED,
    UNUSABLE,
    MemoryMap,
    NodeRange,
    Region,
)

__all__ = ("BootLog", "parse_dmesg")

_RANGE = r"\[mem 0x([0-9a-fA-F]{1,16})-0x([0-9a-fA-F]{1,16})\]"
_VERSION = re.compile(r"Linux version (\S+)")
_CMDLINE = re.compile(r"(?:Kernel c|\bC)ommand line: ([^\r\n]*)")
_E820 = re.compile(r"BIOS-e820: " + _RANGE + r"[ \t]+([^\r\n]*\S)")
_SRAT = re.compile(r"SRAT: Node (\d+) PXM \d+ " + _RANGE)
_FAKED = re.compile(r"Faking a node at " + _RANGE)
_EARLY_NODE = re.compile(r"\bnode[ \t]+(\d+): " + _RANGE)
_DUMP = "MEMBLOCK configuration:"
_DUMPED = re.compile(r"\bmemory\[0x[0-9a-f]+\][ \t]+\[0x([0-9a-f]+)-0x([0-9a-f]+)\],")
_MEMORYLESS = re.compile(r"Initmem setup node (\d+) as memoryless")
_ARM64 = re.compile(r"Booting Linux on physical CPU|\baarch64\b")

_TYPES = {
    "System RAM": RAM,
    "usable": RAM,
    "device reserved": RESERVED,
    "reserved": RESERVED,
    "soft reserved": SOFT_RESERVED,
    "ACPI data": ACPI_DATA,
    "ACPI NVS": ACPI_NVS,
    "unusable": UNUSABLE,
}


@dataclass(frozen=True, slots=True)
class BootLog:
    """The beginning of one boot. ``release`` and ``command_line`` are None where not logged."""

    memory_map: MemoryMap
    release: str | None
    command_line: str | None


def parse_dmesg(text: str, *, place: str = "dmesg") -> BootLog:
    """Read one boot's log; ``place`` names the file in errors.

    Raises :class:`InputError` where the log holds no memory map, or one that makes no sense.
    """
    versions = list(_VERSION.finditer(text))
    if len(versions) > 1:
        text = text[: versions[1].start()]
    command_line = _CMDLINE.search(text)
    try:
        memory_map = _memory_map(text, place)
    except InputError as error:
        if error.place.startswith(place):
            raise
        raise InputError(place, f"{error.place}: {error.cause}") from None
    return BootLog(
        memory_map,
        versions[0].group(1) if versions else None,
        command_line.group(1).strip() if command_line else None,
    )


def _memory_map(text: str, place: str) -> MemoryMap:
    entries = [
        Region(int(first, 16), int(last, 16) + 1, _TYPES.get(kind, kind))
        for first, last, kind in _E820.findall(text)
    ]
    early = [_node_range(*found) for found in _EARLY_NODE.findall(text)]
    if entries:
        arch = "x86_64"
    elif _ARM64.search(text):
        arch = "arm64"
        entries = [Region(start, end, RAM) for start, end, _ in early] or [
            Region(int(first, 16), int(last, 16) + 1, RAM)
            for first, last in _DUMPED.findall("".join(text.split(_DUMP, 2)[1:2]))
        ]
    else:
        cause = "no BIOS-e820 lines: not a kernel log, or its beginning is missing"
        raise InputError(place, cause)
    if not entries:
        cause = "an arm64 log without 'node 0: [mem ...]' lines: its beginning is missing"
        raise InputError(place, cause)
    nodes = [_node_range(*found) for found in _SRAT.findall(text)]
    faked = [_node_range("0", *found) for found in _FAKED.findall(text)[:1]]
    # Firmware first; then what the kernel pretends; then what came out of it in memblock.
    online = tuple(int(nid) for nid in _MEMORYLESS.findall(text))
    return MemoryMap(_merged_regions(entries), _merged(nodes or faked or early), arch, online)


def _node_range(nid: str, first: str, last: str) -> NodeRange:
    return NodeRange(int(first, 16), int(last, 16) + 1, int(nid))


def _merged(nodes: list[NodeRange]) -> tuple[NodeRange, ...]:
    """In order, with adjoining pieces of one node joined (scratch areas split them in the log)."""
    merged: list[NodeRange] = []
    for node in sorted(nodes):
        if merged and (merged[-1].end, merged[-1].nid) == (node.start, node.nid):
            merged[-1] = NodeRange(merged[-1].start, node.end, node.nid)
        else:
            merged.append(node)
    return tuple(merged)


def _merged_regions(entries: list[Region]) -> tuple[Region, ...]:
    merged: list[Region] = []
    for entry in sorted(entries):
        if merged and (merged[-1].end, merged[-1].type) == (entry.start, entry.type):
            merged[-1] = Region(merged[-1].start, entry.end, entry.type)
        else:
            merged.append(entry)
    return tuple(merged)
