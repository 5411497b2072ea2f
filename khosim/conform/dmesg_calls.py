"""The memblock lines of a kernel log, and the other lines that tell how far boot had come.

Reads what ``mm/memblock.c:memblock_dbg`` prints under ``memblock=debug`` (requests, reservations,
frees, additions, doublings) and the tables of ``__memblock_dump_all`` @ 7.3, the same in every
release since 6.16. What stands before and between these lines does not matter: time stamps, log
levels, a serial console's or journalctl's own columns, other subsystems.

Line numbers count from 1 in the text as given. Ranges are half-open, sizes and ends taken modulo
2**64 as the kernel prints them. Of several boots in one text the first is read.
"""

from __future__ import annotations

import re
from typing import NamedTuple, TypeAlias

from khosim.errors import InputError

__all__ = (
    "Add",
    "Doubled",
    "Dump",
    "Event",
    "Free",
    "Note",
    "Remove",
    "Request",
    "Reserve",
    "Row",
    "parse_calls",
    "symbol_of",
)

_U64 = (1 << 64) - 1


class Request(NamedTuple):
    """A call that allocates; ``nid`` -1 is none, ``exact`` whether it insists on that node."""

    line: int
    symbol: str
    size: int
    align: int
    start: int
    end: int
    nid: int
    exact: bool
    caller: str


class Reserve(NamedTuple):
    """``__memblock_reserve`` of [base, end)."""

    line: int
    base: int
    end: int
    nid: int
    flags: int
    caller: str


class Free(NamedTuple):
    """``memblock_phys_free`` of [base, end)."""

    line: int
    base: int
    end: int
    caller: str


class Add(NamedTuple):
    """``memblock_add`` or ``memblock_add_node`` of [base, end); ``nid`` None without a node."""

    line: int
    base: int
    end: int
    nid: int | None
    flags: int
    caller: str


class Remove(NamedTuple):
    """``memblock_remove`` of [base, end)."""

    line: int
    base: int
    end: int
    caller: str


class Doubled(NamedTuple):
    """A doubled array: its name, how many regions it now holds, and where it lies."""

    line: int
    name: str
    max_regions: int
    base: int
    end: int


class Row(NamedTuple):
    """One region of a dump, as printed; ``size`` is printed beside [base, end)."""

    line: int
    base: int
    end: int
    size: int
    nid: int
    flags: int


class Dump(NamedTuple):
    """A dump of both arrays. ``lines`` are those of: sizes, memory.cnt, reserved.cnt (0: none)."""

    line: int
    lines: tuple[int, int, int]
    memory_size: int
    reserved_size: int
    memory_cnt: int
    reserved_cnt: int
    memory: tuple[Row, ...]
    reserved: tuple[Row, ...]

    @property
    def whole(self) -> bool:
        """Whether no line of it is missing."""
        return (
            all(self.lines)
            and len(self.memory) == self.memory_cnt
            and len(self.reserved) == self.reserved_cnt
        )


class Note(NamedTuple):
    """Another line worth knowing: its ``kind`` (a key of the table below) and what it says."""

    line: int
    kind: str
    words: tuple[str, ...]


Event: TypeAlias = Request | Reserve | Free | Add | Remove | Doubled | Dump | Note

_X = r"0x([0-9a-fA-F]{1,16})"
_RANGE = rf"\[{_X}-{_X}\]"
_MEM = rf"\[mem {_X}-{_X}\]"
_CALLER = r"[ \t]*([^\r\n]*)"
_REQUEST = re.compile(
    r"\b(memblock_(?:phys_)?alloc\w*): (\d+) bytes,?"
    rf"(?: align={_X})?(?: nid=(-?\d+),?)?(?: exact_nid=(\d))?"
    rf"(?: from={_X} max_addr={_X})?{_CALLER}"
)
_RESERVE = re.compile(
    rf"\b(_*memblock_reserve): {_RANGE}(?: nid=(-?\d+) flags=([0-9a-f]+))?{_CALLER}"
)
_PLAIN = re.compile(rf"\b(memblock_phys_free|memblock_remove|memblock_add): {_RANGE}{_CALLER}")
_ADD_NODE = re.compile(rf"\bmemblock_add_node: {_RANGE} nid=(-?\d+) flags=([0-9a-f]+){_CALLER}")
_DOUBLED = re.compile(rf"\bmemblock: (memory|reserved) is doubled to (\d+) at {_RANGE}")
_DUMP = "MEMBLOCK configuration:"
_SIZES = re.compile(rf" memory size = {_X} reserved size = {_X}")
_CNT = re.compile(rf" (memory|reserved)\.cnt  ?= {_X}")
_ROW = re.compile(
    rf" (memory|reserved)\[0x[0-9a-f]+\][ \t]+{_RANGE}, {_X} bytes"
    rf"(?: on node (\d+))? flags: (?:0x)?([0-9a-f]+)"
)
_VERSION = "Linux version "

_NOTES: tuple[tuple[str, str, re.Pattern[str]], ...] = (
    ("srat", "SRAT: Node", re.compile(rf"SRAT: Node (\d+) PXM \d+ {_MEM}([^\r\n]*)")),
    ("faked-node", "Faking a node", re.compile(rf"Faking a node at {_MEM}")),
    ("emulated-node", "Faking node", re.compile(rf"Faking node (\d+) at {_MEM}")),
    ("no-numa", "NUMA", re.compile(r"(No NUMA configuration found|NUMA turned off)")),
    ("node-data", "NODE_DATA", re.compile(rf"NODE_DATA\((\d+)\) allocated {_MEM}")),
    ("node-range", "node ", re.compile(rf"\bnode[ \t]+(\d+): {_MEM}")),
    ("zones", "Zone ranges:", re.compile(r"(Zone ranges:)")),
    ("zone", "  DMA", re.compile(rf"  (DMA|DMA32)[ \t]+(?:{_MEM}|(empty))")),
    ("mapped", "", re.compile(r"(RAMDISK: \[mem|ACPI: RSDP |ACPI: Early table|log buffer data)")),
    ("ramdisk", "RAMDISK:", re.compile(rf"(?<!new )RAMDISK: {_MEM}")),
    ("acpi-table", "ACPI: Reserving", re.compile(rf"ACPI: Reserving \S+ table memory at {_MEM}")),
    ("mp-table", "MP-table", re.compile(rf"found SMP MP-table at {_MEM}")),
    ("cma", "eserved", re.compile(r"\bcma: Reserved (\d+) MiB (at|in)")),
    ("hugetlb-cma", "hugetlb_cma: reserve", re.compile(r"(hugetlb_cma: reserve) \d")),
    ("esrt", "esrt:", re.compile(rf"esrt: Reserving ESRT space from {_X} to {_X}")),
    ("percpu", "percpu:", re.compile(r"percpu: .* s(\d+) r(\d+) d(\d+) u(\d+)")),
    ("kho-found", "KHO:", re.compile(r"KHO: (found kexec handover data)")),
    ("e820", "BIOS-e820:", re.compile(rf"BIOS-e820: {_MEM}[ \t]+([^\r\n]*\S)")),
    ("e820-change", "e820:", re.compile(rf"\be820: (update|remove) {_MEM}([^\r\n]*)")),
    ("early-options", "", re.compile(r"(?:Kernel c|\bC)ommand line: ([^\r\n]*)")),
    ("slab-up", "SLUB:", re.compile(r"(SLUB: HWalign)")),
    ("later", "", re.compile(r"(rcu: Hierarchical|Memory: \d+K/|NR_IRQS:|Console: colour)")),
    ("hash", "order:", re.compile(r"entries: \d+ \(order: (\d+), (\d+) bytes")),
    ("nr-cpus", "NR_CPUS", re.compile(r"NR_CPUS[:=](\d+)")),
    ("arm64", "", re.compile(r"(Booting Linux on physical CPU|\baarch64\b)")),
    ("version", _VERSION, re.compile(rf"{_VERSION}(\S+)")),
    (
        "unknown-options",
        "Unknown kernel",
        re.compile(r"Unknown kernel command line (?:p|P)arameters ([^\r\n]*)"),
    ),
)
_ANY_NOTE = re.compile(
    "node|NODE|NUMA|Zone|  DMA|RAMDISK|ACPI|log buffer|MP-table|eserve|esrt|percpu|KHO|e820|ommand"
    "|SLUB|rcu|Memory|NR_|Console|order:|Linux|aarch64"
)


def symbol_of(caller: str) -> str:
    """The function's name in a caller such as ``setup_arch+0x5e3/0x8b6``.

    Without the suffixes a compiler gives to clones (``.isra.0``).
    """
    return caller.partition("+")[0].partition(" ")[0].partition(".")[0]


def parse_calls(text: str, *, place: str = "dmesg") -> list[Event]:
    """Every memblock line and every line of interest of the first boot in ``text``, in order.

    Raises :class:`InputError`, which names ``place``, where there is no memblock line at all.
    """
    events: list[Event] = []
    dump: _DumpLines | None = None
    booted = memblock = False
    for number, line in enumerate(text.split("\n"), 1):
        if _VERSION in line:
            if booted:
                break
            booted = True
        if "memblock" in line:
            event = _call(number, line, place)
            if event is not None:
                memblock = True
                events.append(event)
                continue
        if dump is not None and dump.take(number, line):
            continue
        if _DUMP in line:
            dump = _DumpLines(number, len(events))
            events.append(Note(number, "dump", ()))
            dump.events = events
            continue
        if _ANY_NOTE.search(line):
            for kind, needle, pattern in _NOTES:
                if needle in line and (found := pattern.search(line)):
                    events.append(Note(number, kind, tuple(word or "" for word in found.groups())))
    if not memblock:
        cause = "no memblock lines: not the log of a kernel booted with memblock=debug"
        raise InputError(place, cause)
    return events


def _span(first: str, last: str) -> tuple[int, int]:
    return int(first, 16), (int(last, 16) + 1) & _U64


def _call(number: int, line: str, place: str) -> Event | None:
    if found := _RESERVE.search(line):
        _, first, last, nid, flags, caller = found.groups()
        if flags is None:
            cause = "reservations without flags: a kernel before 6.16, which has no KHO"
            raise InputError(f"{place}: line {number}", cause)
        return Reserve(number, *_span(first, last), int(nid), int(flags, 16), caller.strip())
    if found := _REQUEST.search(line):
        symbol, size, align, nid, exact, start, end, caller = found.groups()
        return Request(
            number,
            symbol,
            int(size) & _U64,
            int(align or size, 16 if align else 10) & _U64,
            int(start or "0", 16),
            int(end or "0", 16),
            int(nid or -1),
            symbol == "memblock_alloc_exact_nid_raw" or exact == "1",
            caller.strip(),
        )
    if found := _PLAIN.search(line):
        symbol, first, last, caller = found.groups()
        base, end_addr = _span(first, last)
        if symbol == "memblock_add":
            return Add(number, base, end_addr, None, 0, caller.strip())
        kind = Free if symbol == "memblock_phys_free" else Remove
        return kind(number, base, end_addr, caller.strip())
    if found := _ADD_NODE.search(line):
        first, last, nid, flags, caller = found.groups()
        return Add(number, *_span(first, last), int(nid), int(flags, 16), caller.strip())
    if found := _DOUBLED.search(line):
        name, regions, first, last = found.groups()
        return Doubled(number, name, int(regions), *_span(first, last))
    return None


class _DumpLines:
    """The lines of one dump, put together as they come; other lines may stand between them."""

    def __init__(self, line: int, at: int) -> None:
        self.line = line
        self.at = at
        self.events: list[Event] = []
        self.lines = {"sizes": 0, "memory": 0, "reserved": 0}
        self.sizes = (0, 0)
        self.counts = {"memory": 0, "reserved": 0}
        self.rows: dict[str, list[Row]] = {"memory": [], "reserved": []}

    def take(self, number: int, line: str) -> bool:
        """Whether ``line`` belongs to the dump; then it is kept."""
        if found := _ROW.search(line):
            name, first, last, size, nid, flags = found.groups()
            base, end = _span(first, last)
            row = Row(number, base, end, int(size, 16), int(nid or -1), int(flags, 16))
            self.rows[name].append(row)
        elif found := _CNT.search(line):
            self.counts[found.group(1)] = int(found.group(2), 16)
            self.lines[found.group(1)] = number
        elif found := _SIZES.search(line):
            self.sizes = int(found.group(1), 16), int(found.group(2), 16)
            self.lines["sizes"] = number
        else:
            return False
        self.events[self.at] = Dump(
            self.line,
            (self.lines["sizes"], self.lines["memory"], self.lines["reserved"]),
            *self.sizes,
            self.counts["memory"],
            self.counts["reserved"],
            tuple(self.rows["memory"]),
            tuple(self.rows["reserved"]),
        )
        return True
