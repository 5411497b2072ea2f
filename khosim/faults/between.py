"""What can happen between two kernels: bytes that are not what was written, other memory.

A fault of this kind is made while the old kernel lives (:func:`overwritten`, :func:`stale`,
:func:`torn`, :func:`flipped`, :func:`lost_memory`, :func:`regained_memory`) and strikes at the
jump. It says in ``words`` what a kernel has to notice, where a header, a magic number or a checksum
claims that it does, and after it struck whether it ``spares`` all that was handed over.

Left out: bytes that change while the new kernel reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from khosim.abi.boot_params import BOOT_PARAMS_BYTES, E820_RAM, parse_boot_params, with_e820
from khosim.errors import InputError
from khosim.faults.places import places
from khosim.machine.memory_map import RAM, MemoryMap, NodeRange, Region

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.machine.hardware import Hardware

__all__ = (
    "Between",
    "flipped",
    "jump_with",
    "lost_memory",
    "overwritten",
    "regained_memory",
    "stale",
    "torn",
)

_BY = (-1, "fault")


class Between:
    """A fault at the jump. ``words``: one of them has to be in what the new kernel says."""

    __slots__ = ("has_struck", "spares", "words")

    def __init__(self, words: tuple[str, ...] = ()) -> None:
        self.words = words
        self.has_struck = False
        self.spares = False

    def strike(self, kernel: Kernel) -> None:
        """Strike: ``kernel`` has just jumped, its successor has not run yet."""
        self.has_struck = True


def jump_with(kernel: Kernel, *faults: Between, **options: Any) -> Any:
    """A kexec of ``kernel`` at which ``faults`` strike: the successor, which may panic.

    ``options`` are those of :meth:`khosim.Machine.kexec`.
    """
    for fault in faults:
        if not isinstance(fault, Between):
            raise InputError("jump_with", f"{fault!r} is no fault")
    host: Any = kernel.host
    host.load_successor(kernel, **options)
    for fault in faults:
        fault.strike(kernel)
    return host.resume()


def _from_zero(what: str, number: int) -> None:
    if number < 0:
        raise InputError(what, f"{number!r} is less than 0")


class _Bytes(Between):
    __slots__ = ("data", "offset", "place")

    def __init__(self, place: str, offset: int, data: bytes, words: tuple[str, ...]) -> None:
        super().__init__(words)
        self.place = place
        self.offset = offset
        self.data = data

    def strike(self, kernel: Kernel) -> None:
        phys = places(kernel).get(self.place)
        if phys is None or not kernel.hardware.is_ram(phys + self.offset, len(self.data)):
            return
        at = phys + self.offset
        self.has_struck = True
        self.spares = kernel.ram.read(at, len(self.data)) == self.data
        kernel.ram.write(at, self.data, _BY)


_CLAIMS: dict[tuple[str, int], tuple[str, ...]] = {
    ("root FDT", 0): ("is invalid",),
    ("kexec-metadata", 0): ("not supported",),
    ("memblock", 0): ("is incompatible", "failed to retrieve"),
    ("LUO", 0): ("LUO state is incompatible", "incoming tree failed"),
    ("/LUO/sessions/blocks[0]", 8): ("invalid entry count", "incoming tree failed"),
}
"""What 7.3 checks, by place and offset, and its words where the check fails.

A version or a count of 1 is one that it takes, wrong as it may be.
"""


def overwritten(place: str, offset: int, data: str) -> Between:
    """At the jump ``data``, hexadecimal, stands at ``offset`` of the place.

    See :func:`khosim.faults.places.places`. Raises :class:`InputError` for what is not hexadecimal,
    and for an offset below 0.
    """
    try:
        told = bytes.fromhex(data)
    except ValueError:
        raise InputError("overwritten: data", f"{data!r} is not hexadecimal") from None
    _from_zero("overwritten: offset", offset)
    words = _CLAIMS.get((place, offset), ()) if not data.startswith("01") else ()
    return _Bytes(place, offset, told, words)


class _Flip(Between):
    __slots__ = ("bit", "place")

    def __init__(self, place: str, bit: int) -> None:
        super().__init__()
        self.place = place
        self.bit = bit

    def strike(self, kernel: Kernel) -> None:
        phys = places(kernel).get(self.place)
        if phys is None:
            return
        at = phys + self.bit // 8
        byte = kernel.ram.read(at, 1)[0] ^ 1 << self.bit % 8
        kernel.ram.write(at, bytes([byte]), _BY)
        self.has_struck = True


def flipped(place: str, bit: int) -> Between:
    """At the jump one bit of the place is another; raises :class:`InputError` for one below 0."""
    _from_zero("flipped: bit", bit)
    return _Flip(place, bit)


class _Old(Between):
    __slots__ = ("data", "phys")

    def __init__(self, kernel: Kernel, place: str, half: bool) -> None:
        super().__init__()
        page = kernel.arch.page_size
        self.phys = places(kernel).get(place, 0)
        self.data = kernel.ram.read(self.phys, page) if self.phys else b""
        if half:
            self.phys += page // 2
            self.data = self.data[page // 2 :]

    def strike(self, kernel: Kernel) -> None:
        if self.data:
            self.has_struck = True
            self.spares = kernel.ram.read(self.phys, len(self.data)) == self.data
            kernel.ram.write(self.phys, self.data, _BY)


def stale(kernel: Kernel, place: str) -> Between:
    """Nothing that ``kernel`` writes to the place's page from now on reaches memory."""
    return _Old(kernel, place, half=False)


def torn(kernel: Kernel, place: str) -> Between:
    """What ``kernel`` writes to the second half of the place's page from now on is lost."""
    return _Old(kernel, place, half=True)


# -- memory ----------------------------------------------------------------------------------------


class _Map(Between):
    __slots__ = ("end", "memory_map", "start")

    def __init__(self, memory_map: MemoryMap, start: int, end: int) -> None:
        super().__init__()
        self.memory_map = memory_map
        self.start = start
        self.end = end

    def strike(self, kernel: Kernel) -> None:
        hardware = kernel.hardware
        self.has_struck = True
        self.spares = not _needed(kernel, self.start, self.end)
        _use(hardware, self.memory_map)


def _use(hardware: Hardware, memory_map: MemoryMap) -> None:
    # On x86-64 the kernel that jumped has written the E820 table down for its successor.
    hardware.change_memory(memory_map)
    if hardware.arch != "x86_64":
        return
    at = hardware.registers["rsi"]
    params = parse_boot_params(hardware.ram.read(at, BOOT_PARAMS_BYTES))
    others = [entry for entry in params.e820 if entry[2] != E820_RAM]
    ram = [(start, end - start, E820_RAM) for start, end in hardware.ram_ranges]
    hardware.ram.write(at, with_e820(hardware.ram.read(at, BOOT_PARAMS_BYTES), ram + others), _BY)


def _needed(kernel: Kernel, start: int, end: int) -> bool:
    # Whether [start, end) holds anything that the successor is promised or begins with.
    shift = kernel.arch.page_shift
    ranges = [(addr, addr + size) for addr, size in kernel.scratch_areas()]
    ranges += [(phys, phys + kernel.arch.page_size) for phys in places(kernel).values()]
    for nr_keys, key in kernel.kho_out.tree.walk():
        if not nr_keys:
            ranges.append((key, key + kernel.arch.page_size))
            continue
        order = 64 - shift - (key.bit_length() - 1)
        first = (key & ~(1 << key.bit_length() - 1)) << (shift + order)
        ranges.append((first, first + (nr_keys << (shift + order))))
    return any(low < end and high > start for low, high in ranges)


def without(memory_map: MemoryMap, start: int, end: int) -> MemoryMap:
    """The map with [start, end) cut out of its RAM; nodes that have none left are gone."""
    entries: list[Region] = []
    for entry in memory_map.entries:
        if entry.type != RAM or entry.end <= start or entry.start >= end:
            entries.append(entry)
            continue
        pieces = ((entry.start, min(entry.end, start)), (max(entry.start, end), entry.end))
        entries += [Region(low, high, entry.type) for low, high in pieces if low < high]
    ram = [entry for entry in entries if entry.type == RAM]
    nodes = tuple(
        NodeRange(*node)
        for node in memory_map.node_ranges
        if any(entry.start < node.end and entry.end > node.start for entry in ram)
    )
    top = max(entry.end for entry in ram)
    nodes = tuple(node._replace(end=min(node.end, top)) for node in nodes)
    return MemoryMap(tuple(entries), nodes, memory_map.arch)


def lost_memory(hardware: Hardware, start: int, end: int) -> Between:
    """From the jump on RAM [start, end) is not there: a DIMM, a node, a hole.

    Raises :class:`InputError` for a range that is none, and where no RAM would be left.
    """
    if not 0 <= start < end:
        raise InputError("lost_memory", f"[{start:#x}, {end:#x}) is no range")
    if all(start <= low and high <= end for low, high in hardware.ram_ranges):
        raise InputError("lost_memory", f"without [{start:#x}, {end:#x}) there is no RAM")
    return _Map(without(hardware.memory_map, start, end), start, end)


def regained_memory(memory_map: MemoryMap) -> Between:
    """From the jump on RAM is as ``memory_map`` says, which has more of it."""
    return _Map(memory_map, 0, 0)
