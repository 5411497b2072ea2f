"""The memory map as ``/proc/iomem`` shows it.

``kernel/resource.c:r_show @ 7.3`` prints one line a resource, indented by its depth. The top level
has the firmware's entries under the names of ``arch/x86/kernel/e820.c:e820_type_to_string``, and
on arm64 the memory of memblock (``arch/arm64/kernel/setup.c:request_standard_resources``).

Left out: NUMA nodes, which the file does not tell; devices. The kernel has already taken page 0 of
a PC out of RAM here, which makes no difference to the next kernel: it does the same.
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
    Region,
)

__all__ = ("Iomem", "parse_iomem")

_LINE = re.compile(r"( *)([0-9a-fA-F]{8,16})-([0-9a-fA-F]{8,16}) : (.*?)\s*")
_TYPES = {
    "System RAM": RAM,
    "Reserved": RESERVED,
    "reserved": RESERVED,
    "Soft Reserved": SOFT_RESERVED,
    "ACPI Tables": ACPI_DATA,
    "ACPI Non-volatile Storage": ACPI_NVS,
    "Unusable memory": UNUSABLE,
}
_PC_LOW_MEMORY = 0xA0000  # only a PC has RAM below this


@dataclass(frozen=True, slots=True)
class Iomem:
    """``/proc/iomem``, read.

    ``inside_ram`` is what lies in RAM ("Kernel code", "reserved", ...) as (start, end, name): a
    running kernel's own, gone with it.
    """

    memory_map: MemoryMap
    inside_ram: tuple[tuple[int, int, str], ...]


def parse_iomem(text: str, *, place: str = "iomem") -> Iomem:
    """Read the text of ``/proc/iomem``; ``place`` names the file in errors.

    Raises :class:`InputError` for lines of another kind, for addresses hidden from a reader who
    was not root, and where there is no RAM.
    """
    entries: list[Region] = []
    inside: list[tuple[int, int, str]] = []
    hidden = True
    in_ram = False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise InputError(f"{place}:{number}", f"{line[:60]!r} is not a line of /proc/iomem")
        indent, first, last, name = found.groups()
        start, end = int(first, 16), int(last, 16) + 1
        hidden = hidden and end == 1
        if not indent:
            in_ram = name == "System RAM"
            kind = _TYPES.get(name)
            if kind is not None:
                if entries and (entries[-1].end, entries[-1].type) == (start, kind):
                    entries[-1] = Region(entries[-1].start, end, kind)
                else:
                    entries.append(Region(start, end, kind))
        elif in_ram:
            inside.append((start, end, name))
    if entries and hidden:
        raise InputError(place, "all addresses are 0: it was not read as root")
    if not any(entry.type == RAM for entry in entries):
        raise InputError(place, "no 'System RAM' line")
    low = min(entry.start for entry in entries if entry.type == RAM)
    arch = "x86_64" if low < _PC_LOW_MEMORY else "arm64"
    try:
        return Iomem(MemoryMap(tuple(entries), arch=arch), tuple(inside))
    except InputError as error:
        raise InputError(place, f"{error.place}: {error.cause}") from None
