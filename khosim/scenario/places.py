"""Places in RAM that a scenario calls by name, to corrupt them or to preserve what it should not.

What a name means depends on when it is asked: at the jump, a segment lies where the successor will
find it; before, where the running kernel has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.scenario.fields import Table, did_you_mean
from khosim.scenario.files import Guest

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.scenario.model import Limits
    from khosim.scenario.play import Player

__all__ = ("PLACES", "RESERVED_NAMES", "place_field", "resolve")

PLACES = (
    "fdt",
    "tree root",
    "tree leaf",
    "scratch",
    "scratch array",
    "kernel",
    "initrd",
    "boot parameters",
    "device tree",
)
"""Names of places; besides them groups, guests, ``index NAME`` and ``region NAME``."""

RESERVED_NAMES = frozenset(PLACES)
_SEGMENTS = {
    "kernel": "kernel",
    "initrd": "initrd",
    "boot parameters": "boot parameters",
    "device tree": "device tree",
    "scratch array": "KHO scratch array",
}


def place_field(table: Table, limits: Limits) -> int | str:
    """The field ``at``: a physical address, or the name of a place."""
    value = table.any("at")
    if isinstance(value, int):
        return table.whole("at", value, 0, (1 << 64) - 1)
    if not isinstance(value, str):
        raise table.error("at: a physical address or the name of a place is missing")
    kind, _, name = value.partition(" ")
    names = limits.names | limits.files
    if value in PLACES or value in names or (kind == "region" and name):
        return value
    if kind == "index" and name in limits.names:
        return value
    if value[:1].isdigit():
        return table.bytes_of("at", value, 0, (1 << 64) - 1)
    known = (*PLACES, *sorted(names))
    raise table.error(f"at: {value!r} is no place{did_you_mean(value, known)}")


def resolve(player: Player, at: int | str, place: str, *, at_jump: bool = False) -> int:
    """The physical address of ``at`` in bytes; :class:`InputError` where it is not there."""
    if isinstance(at, int):
        return at
    kernel = player.kernel
    kind, _, name = at.partition(" ")
    phys: int | None = None
    if at_jump and at in _SEGMENTS:
        phys = _segment(kernel, _SEGMENTS[at])
    elif at in PLACES:
        phys = _of_kernel(kernel, at)
    elif kind == "region":
        found = kernel.reserve_mem.find_by_name(name)
        phys = found[0] if found else None
    elif kind == "index":
        parts = player.groups[name].index if name in player.groups else []
        phys = parts[0][1] if parts else None
    elif at in player.groups and len(player.groups[at]):
        phys = int(player.groups[at].pfn[0]) << kernel.arch.page_shift
    else:
        phys = _of_guest(player, at, at_jump=at_jump)
    if not phys:
        raise player.error(place, f"there is no {at!r} in generation {kernel.generation}")
    return phys


def _of_guest(player: Player, at: str, *, at_jump: bool) -> int | None:
    # The first page with content of a guest, or its first folio.
    guest = player.files.get(at)
    if not isinstance(guest, Guest):
        return None
    if not at_jump:
        guest.remember()
    page = int(guest.pages[0]) if len(guest.pages) else 0
    for index, pfn, order, count in guest.folios:
        if index + (count << order) > page:
            return pfn + max(0, page - index) << player.kernel.arch.page_shift
    return None


def _segment(kernel: Kernel, name: str) -> int | None:
    image = kernel.kexec_image
    segments = image.segments if image is not None else []
    return next((segment.mem for segment in segments if segment.name == name), None)


def _of_kernel(kernel: Kernel, at: str) -> int | None:
    if at == "fdt":
        return kernel.kho_out.fdt_phys
    if at == "tree root":
        return kernel.kho_out.tree.root
    if at == "tree leaf":
        last = 0
        for nr_keys, value in kernel.kho_out.tree.walk():
            if nr_keys:
                return last
            last = value
    if at == "scratch":
        areas = kernel.scratch_areas()
        return areas[0][0] if areas else None
    if at == "scratch array":
        return kernel.kho_scratch_phys
    if at == "kernel":
        return kernel.kernel_range[0]
    if at == "initrd":
        return kernel.initrd[0]
    return None
