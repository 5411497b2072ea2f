"""What the memory of a machine holds at one moment, as layers of ranges.

A :class:`Moment` is taken from a running kernel (or one that is about to leave) and keeps no part
of it: plain arrays that can be drawn, compared and written down. What is preserved is read from the
bytes in RAM by the checkers' decoder, not from the kernel's own books.

Left out: free pages, which are the RAM that no other layer covers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from khosim.checks.history import History
from khosim.checks.look import AT_ANY_TIME, JUMP, TAKEOVER, Look

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from khosim.checks.decode import Handover
    from khosim.kernel.kernel import Kernel
    from khosim.machine.hardware import Hardware

__all__ = ("LAYERS", "Layer", "Moment", "take_moment")

LAYERS = {
    "ram": "RAM by the firmware's memory map; the owner is its NUMA node",
    "scratch": "areas that a successor may boot in",
    "reserved": "memblock's reservations, while memblock still serves",
    "held": "pages that the kernel or its users hold",
    "incoming": "pages that the predecessor preserved and nobody has restored yet",
    "preserved": "blocks that the successor is to find",
    "handover": "pages of the handover itself: root FDT, map and blobs",
    "image": "pieces of the next kernel's image, and where they go",
}
"""Every layer and what it shows, in the order in which they are drawn."""

NO_ORDER = -1


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """Sorted ranges of one kind.

    ``start`` and ``end`` are int64 arrays of physical addresses in bytes, half-open; ``order`` is
    that of the blocks a range is made of, -1 where it is not made of blocks; ``owner`` is an index
    into ``owners``.
    """

    name: str
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    order: NDArray[np.int8]
    owner: NDArray[np.int32]
    owners: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.start)

    @property
    def total_bytes(self) -> int:
        """How much memory its ranges cover; a byte in two of them counts twice."""
        return int((self.end - self.start).sum())

    def owner_names(self) -> list[str]:
        """The owner of each range."""
        return [self.owners[index] for index in self.owner.tolist()]

    def at(self, phys: int) -> list[int]:
        """The indices of the ranges that cover an address."""
        return np.flatnonzero((self.start <= phys) & (phys < self.end)).tolist()

    def same_as(self, other: Layer) -> bool:
        """Whether both hold the same ranges of the same owners."""
        return (
            np.array_equal(self.start, other.start)
            and np.array_equal(self.end, other.end)
            and np.array_equal(self.order, other.order)
            and self.owner_names() == other.owner_names()
        )


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """All layers of a machine at one moment.

    ``event`` is how many events there had been; ``stage`` is "takeover", "booted", "retrieved",
    "jump" or "" for a moment that somebody asked for; ``title`` says it for people.
    """

    index: int
    generation: int
    release: str
    stage: str
    title: str
    event: int
    layers: dict[str, Layer]
    handover: Handover | None
    """The decoded handover that is being written; None where there is none."""


def take_moment(
    hardware: Hardware,
    kernel: Kernel,
    *,
    index: int = 0,
    stage: str = "",
    title: str = "",
    event: int = 0,
) -> Moment:
    """Look at ``kernel`` and its machine now."""
    known = stage if stage in (JUMP, TAKEOVER) else AT_ANY_TIME
    look = Look(hardware, kernel, known, History())
    handover = None if look.outgoing is None else look.outgoing.handover
    layers = [
        _ranges("ram", _ram(hardware)),
        _ranges("scratch", _scratch(look.scratch)),
        _reserved(kernel, stage),
        *_pages(kernel, hardware.page_shift),
        *_handed(handover, kernel, hardware.page_shift),
        _ranges("image", _segments(kernel)),
    ]
    return Moment(
        index=index,
        generation=kernel.generation,
        release=kernel.release.name,
        stage=stage,
        title=title or stage,
        event=event,
        layers={layer.name: layer for layer in layers},
        handover=handover,
    )


def _ram(hardware: Hardware) -> Iterable[tuple[int, int, str]]:
    return [
        (max(start, node.start), min(end, node.end), f"node {node.nid}")
        for start, end in hardware.ram_ranges
        for node in hardware.memory_map.node_ranges
        if max(start, node.start) < min(end, node.end)
    ]


def _scratch(areas: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int, str]]:
    return [(phys, phys + size, f"scratch {i}") for i, (phys, size) in enumerate(areas) if size]


def _segments(kernel: Kernel) -> Iterable[tuple[int, int, str]]:
    image = kernel.kexec_image
    if image is None:
        return []
    return [(part.mem, part.mem + part.memsz, part.name) for part in image.segments]


def _reserved(kernel: Kernel, stage: str) -> Layer:
    # Later the array is still there, and no longer says who holds what.
    if stage != TAKEOVER:
        return _ranges("reserved", [])
    array = kernel.memblock.reserved
    return _layer("reserved", array.base, array.end, None, ["memblock"] * len(array.base))


def _pages(kernel: Kernel, shift: int) -> tuple[Layer, Layer]:
    starts, ends, states = kernel.pages.pages.columns()
    found: dict[str, tuple[list[int], list[int], list[int], list[str]]] = {
        "held": ([], [], [], []),
        "incoming": ([], [], [], []),
    }
    for start, end, state in zip(starts, ends, states, strict=True):
        columns = found["incoming" if state.kind == "incoming" else "held"]
        values = (start << shift, end << shift, state.order, state.owner or state.kind)
        for column, value in zip(columns, values, strict=True):
            column.append(value)  # type: ignore[attr-defined]  # each of its own type
    held, incoming = (_layer(name, *columns) for name, columns in found.items())
    return held, incoming


def _handed(handover: Handover | None, kernel: Kernel, shift: int) -> tuple[Layer, Layer]:
    if handover is None:
        return _ranges("preserved", []), _ranges("handover", [])
    preserved = handover.preserved
    order = np.argsort(preserved.start_pfn, kind="stable")
    start, end = preserved.start_pfn[order], preserved.end_pfn[order]
    starts, ends, states = kernel.pages.pages.columns()
    at = np.searchsorted(np.asarray(starts, dtype=np.int64), start, side="right") - 1
    owners = [
        (states[i].owner or states[i].kind) if i >= 0 and pfn < ends[i] else "nobody"
        for i, pfn in zip(at.tolist(), start.tolist(), strict=True)
    ]
    pages = sorted({*handover.metadata_pages})
    size = 1 << shift
    return (
        _layer("preserved", start << shift, end << shift, preserved.order[order], owners),
        _ranges("handover", ((phys, phys + size, _part(handover, phys)) for phys in pages)),
    )


def _part(handover: Handover, phys: int) -> str:
    if phys == handover.fdt_phys & -handover.page_size:
        return "root FDT"
    for name, blob in handover.subtrees.items():
        if blob.start - handover.page_size < phys < blob.start + blob.size:
            return name
    return "preserved-memory map"


def _ranges(name: str, ranges: Iterable[tuple[int, int, str]]) -> Layer:
    listed = sorted(ranges)
    starts = [start for start, _, _ in listed]
    return _layer(name, starts, [end for _, end, _ in listed], None, [own for *_, own in listed])


def _layer(
    name: str,
    start: Sequence[int] | NDArray[np.int64],
    end: Sequence[int] | NDArray[np.int64],
    order: Sequence[int] | NDArray[np.int64] | None,
    owners: Sequence[str],
) -> Layer:
    names = tuple(dict.fromkeys(owners))
    number = {owner: index for index, owner in enumerate(names)}
    return Layer(
        name,
        np.asarray(start, dtype=np.int64),
        np.asarray(end, dtype=np.int64),
        np.full(len(start), NO_ORDER, np.int8) if order is None else np.asarray(order, np.int8),
        np.fromiter((number[owner] for owner in owners), np.int32, len(owners)),
        names,
    )
