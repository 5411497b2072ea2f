"""The firmware's memory map: what lies where before any kernel runs.

The table that a PC's firmware hands over (``arch/x86/include/asm/e820/types.h:struct e820_entry @
7.3``) or the memory nodes of a device tree, and the NUMA nodes of the ACPI SRAT
(``drivers/acpi/numa/srat.c:acpi_parse_memory_affinity``). It outlives every kernel.

:meth:`MemoryMap.from_size` lays a machine out as QEMU does (``pc``, and ``virt`` on arm64).
Left out: hot-plugged memory, distances between nodes, and the move of RAM above 1 TiB that QEMU
makes for AMD's HyperTransport hole: the hole is listed only while RAM ends below it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from khosim.errors import InputError
from khosim.units import format_size, parse_size

__all__ = (
    "ACPI_DATA",
    "ACPI_NVS",
    "ARCHES",
    "MAX_NODES",
    "RAM",
    "RESERVED",
    "SOFT_RESERVED",
    "UNUSABLE",
    "MemoryMap",
    "NodeRange",
    "Region",
)

# The words of e820.c:e820_print_type @ 7.3. A type without a name of its own is "type N".
RAM = "System RAM"
RESERVED = "device reserved"
SOFT_RESERVED = "soft reserved"
ACPI_DATA = "ACPI data"
ACPI_NVS = "ACPI NVS"
UNUSABLE = "unusable"

ARCHES = ("x86_64", "arm64")
MAX_NODES = 64
NO_NODE = -1

_KIB, _MIB, _GIB, _TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
_MIN_RAM, _MAX_RAM, _MAX_END = 16 * _MIB, 16 * _TIB, 64 * _TIB
_MIN_NODE = 4 * _MIB
_SECTION = 128 * _MIB  # one memory section of both architectures with 4 KiB pages
_GRANULE = 4 * _KIB

_EBDA, _LEGACY, _BIOS = 0x9FC00, 0xA0000, 0xF0000
_PCI_HOLE, _ABOVE_PCI_HOLE = 3 * _GIB, 4 * _GIB
_ACPI_BYTES = 128 * _KIB
_FLASH = (0xFFFC0000, 0x1_0000_0000)
_HYPERTRANSPORT = (0xFD_0000_0000, 0x100_0000_0000)
_ARM64_BASE = _GIB


class Region(NamedTuple):
    """One entry of the map: [start, end) in bytes, and what it is (:data:`RAM`, ...)."""

    start: int
    end: int
    type: str


class NodeRange(NamedTuple):
    """Physical addresses [start, end) that belong to NUMA node ``nid``, holes included."""

    start: int
    end: int
    nid: int


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """An ordered memory map and its NUMA nodes; refused with :class:`InputError` where unsound.

    Without ``node_ranges`` everything belongs to node 0, as a kernel that finds no NUMA tables
    pretends. ``online_nodes`` are those with memory unless told otherwise; the rest are
    memoryless.
    """

    entries: tuple[Region, ...]
    node_ranges: tuple[NodeRange, ...] = ()
    arch: str = "x86_64"
    online_nodes: tuple[int, ...] = ()
    ram_ranges: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)
    ram_bytes: int = field(init=False, repr=False, compare=False)
    end_phys: int = field(init=False, repr=False, compare=False)
    _node_starts: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        if self.arch not in ARCHES:
            raise InputError("memory map: architecture", f"{self.arch!r} is none of {ARCHES}")
        entries = tuple(Region(*entry) for entry in self.entries)
        _check_order("memory map: entry", entries)
        ram = tuple((start, end) for start, end, kind in entries if kind == RAM)
        put(self, "entries", entries)
        put(self, "ram_ranges", ram)
        put(self, "ram_bytes", sum(end - start for start, end in ram))
        put(self, "end_phys", ram[-1][1] if ram else 0)
        _check_ram_bytes("memory map: RAM", self.ram_bytes, _MIN_RAM // 2)
        if self.end_phys > _MAX_END:
            raise InputError("memory map: RAM", f"it ends at {self.end_phys:#x}, above 64 TiB")
        base = 0 if self.arch == "x86_64" else ram[0][0]
        nodes = self.node_ranges or ((base, self.end_phys, 0),)
        nodes = tuple(NodeRange(*node) for node in nodes)
        _check_order("memory map: node range", nodes)
        put(self, "node_ranges", nodes)
        put(self, "_node_starts", tuple(node.start for node in nodes))
        with_memory = {node.nid for node in nodes}
        online = tuple(sorted(with_memory | set(self.online_nodes)))
        for nid in online:
            if not 0 <= nid < MAX_NODES:
                raise InputError("memory map: node", f"{nid} is not from 0 to {MAX_NODES - 1}")
        put(self, "online_nodes", online)

    @property
    def memoryless_nodes(self) -> tuple[int, ...]:
        """The online nodes that own no addresses."""
        with_memory = {node.nid for node in self.node_ranges}
        return tuple(nid for nid in self.online_nodes if nid not in with_memory)

    def nid_of(self, phys: int) -> int:
        """The node that ``phys`` belongs to, or -1 (the kernel's NUMA_NO_NODE)."""
        index = bisect_right(self._node_starts, phys) - 1
        if index >= 0 and phys < self.node_ranges[index].end:
            return self.node_ranges[index].nid
        return NO_NODE

    @classmethod
    def from_size(
        cls,
        size: int | str,
        *,
        nodes: int | Sequence[int | str] = 1,
        arch: str = "x86_64",
        holes: Iterable[tuple[int, int]] = (),
        memoryless: Iterable[int] = (),
    ) -> MemoryMap:
        """A machine of ``size`` bytes (``"16G"``) as QEMU lays it out.

        ``nodes`` is a number of equal nodes, cut at memory sections where they are large enough,
        or their sizes (``["2560M", "1536M"]``), which add up to ``size``. ``memoryless`` numbers
        online nodes without memory; the others take the numbers left free, in order. ``holes``
        are (start, end) to punch out of RAM, which shrinks by them.
        """
        total = parse_size(size, what="RAM size")
        _check_ram_bytes("RAM size", total, _MIN_RAM)
        if total % _GRANULE:
            raise InputError("RAM size", f"{total} bytes are no whole number of 4 KiB pages")
        if arch not in ARCHES:
            raise InputError("architecture", f"{arch!r} is none of {', '.join(ARCHES)}")
        shares = _node_sizes(total, nodes)
        empty = sorted(set(memoryless))
        if len(shares) + len(empty) > MAX_NODES:
            raise InputError("nodes", f"{len(shares) + len(empty)} are more than {MAX_NODES}")
        if empty and not 0 <= empty[0] <= empty[-1] < MAX_NODES:
            raise InputError("memoryless nodes", f"{empty} are not from 0 to {MAX_NODES - 1}")
        punched = tuple((start, end) for start, end in holes)
        return _laid_out(total, tuple(shares), arch, punched, tuple(empty))

    def to_dict(self) -> dict[str, Any]:
        """The map as plain lists and strings, for JSON."""
        return {
            "arch": self.arch,
            "entries": [list(entry) for entry in self.entries],
            "node_ranges": [list(node) for node in self.node_ranges],
            "online_nodes": list(self.online_nodes),
        }

    @classmethod
    def from_dict(cls, facts: Any) -> MemoryMap:
        """The map that :meth:`to_dict` described; :class:`InputError` for anything else."""
        try:
            entries = tuple(Region(int(a), int(b), str(kind)) for a, b, kind in facts["entries"])
            ranges = tuple(NodeRange(int(a), int(b), int(n)) for a, b, n in facts["node_ranges"])
            online = tuple(int(nid) for nid in facts["online_nodes"])
            arch = str(facts["arch"])
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError("memory map", f"not as khosim describes one: {error!r}") from None
        return cls(entries, ranges, arch, online)


# Property tests ask for the same few machines thousands of times a second.
@lru_cache(maxsize=64)
def _laid_out(
    total: int,
    shares: tuple[int, ...],
    arch: str,
    holes: tuple[tuple[int, int], ...],
    empty: tuple[int, ...],
) -> MemoryMap:
    spans, fixed = _layout(total, arch)
    entries = [Region(*part, RAM) for part in _punched(spans, holes, arch)] + fixed
    ranges: list[NodeRange] = []
    if len(shares) > 1 or empty:
        nids = [nid for nid in range(MAX_NODES) if nid not in empty]
        ranges = _node_ranges(total, shares, nids, arch)
    return MemoryMap(tuple(sorted(entries)), tuple(ranges), arch, empty)


def _check_ram_bytes(place: str, ram_bytes: int, least: int) -> None:
    if ram_bytes < least:
        cause = "none at all" if ram_bytes <= 0 else f"{format_size(ram_bytes)} are too few"
        raise InputError(place, f"{cause}; a machine has at least {format_size(least)}")
    if ram_bytes > _MAX_RAM:
        raise InputError(place, f"{format_size(ram_bytes)} are above {format_size(_MAX_RAM)}")


def _check_order(place: str, ranges: Sequence[Region] | Sequence[NodeRange]) -> None:
    last = 0
    for entry in ranges:
        text = f"[{entry[0]:#x}-{entry[1]:#x}) {entry[2]}"
        if not 0 <= entry[0] < entry[1] <= 1 << 64:
            raise InputError(place, f"{text} is empty or outside 64 bits")
        if entry[0] < last:
            raise InputError(place, f"{text} begins before the one above it ends ({last:#x})")
        last = entry[1]


def _layout(total: int, arch: str) -> tuple[list[tuple[int, int]], list[Region]]:
    """RAM before any hole is punched, and the other entries."""
    if arch == "arm64":
        return [(_ARM64_BASE, _ARM64_BASE + total)], []
    low = min(total, _PCI_HOLE)
    spans = [(0, _EBDA), (_MIB, low - _ACPI_BYTES)]
    fixed = [
        Region(_EBDA, _LEGACY, RESERVED),
        Region(_BIOS, _MIB, RESERVED),
        Region(low - _ACPI_BYTES, low, RESERVED),
        Region(*_FLASH, RESERVED),
    ]
    end = low
    if total > low:
        end = _ABOVE_PCI_HOLE + total - low
        spans.append((_ABOVE_PCI_HOLE, end))
    if end <= _HYPERTRANSPORT[0]:
        fixed.append(Region(*_HYPERTRANSPORT, RESERVED))
    return spans, fixed


def _punched(
    spans: list[tuple[int, int]], holes: tuple[tuple[int, int], ...], arch: str
) -> list[tuple[int, int]]:
    for start, end in holes:
        if not 0 <= start < end:
            raise InputError("holes", f"[{start:#x}-{end:#x}) is no range")
        if start % _GRANULE or end % _GRANULE:
            raise InputError("holes", f"[{start:#x}-{end:#x}) cuts a page")
        left = [(low, min(high, start)) for low, high in spans if low < start]
        right = [(max(low, end), high) for low, high in spans if high > end]
        after = sorted(set(left + right))
        if after == spans:
            raise InputError("holes", f"[{start:#x}-{end:#x}) is not in RAM of this {arch} machine")
        spans = after
    return spans


def _node_sizes(total: int, nodes: int | Sequence[int | str]) -> list[int]:
    if isinstance(nodes, str):
        raise InputError("nodes", f"{nodes!r} is neither a number nor a list of sizes")
    if isinstance(nodes, int):
        if not 1 <= nodes <= MAX_NODES:
            raise InputError("nodes", f"{nodes}; a machine has 1 to {MAX_NODES}")
        share = total // nodes
        unit = _SECTION
        if share < unit:  # no whole section each: cut finer, but evenly to within an eighth
            unit = max(_GRANULE, 1 << max(0, (share // 8).bit_length() - 1))
        cuts = [(i * total // nodes + unit // 2) // unit * unit for i in range(nodes)]
        sizes = [high - low for low, high in zip(cuts, [*cuts[1:], total], strict=True)]
    else:
        sizes = [parse_size(size, what="node size") for size in nodes]
        if not 1 <= len(sizes) <= MAX_NODES:
            raise InputError("nodes", f"{len(sizes)}; a machine has 1 to {MAX_NODES}")
        if sum(sizes) != total:
            given = " + ".join(format_size(size) for size in sizes)
            raise InputError("nodes", f"{given} is not the size of RAM, {format_size(total)}")
    for size in sizes:
        if size < _MIN_NODE or size % _GRANULE:
            cause = f"a node of {format_size(size)}; at least 4M, in whole 4 KiB pages"
            raise InputError("nodes", f"{cause} (memoryless nodes are listed apart)")
    return sizes


def _node_ranges(
    total: int, sizes: tuple[int, ...], nids: list[int], arch: str
) -> list[NodeRange]:
    """Node sizes laid end to end over RAM as it stands around the holes of the platform."""
    if arch == "arm64":
        windows = [(_ARM64_BASE, 0, total)]
    else:
        low = min(total, _PCI_HOLE)
        windows = [(0, 0, _LEGACY), (_MIB, _MIB, low), (_ABOVE_PCI_HOLE, low, total)]
    ranges = []
    offset = 0
    for size, nid in zip(sizes, nids, strict=False):
        for phys, first, end in windows:  # RAM's bytes [first, end) lie at phys
            start, stop = max(offset, first), min(offset + size, end)
            if start < stop:
                ranges.append(NodeRange(phys + start - first, phys + stop - first, nid))
        offset += size
    return sorted(ranges)
