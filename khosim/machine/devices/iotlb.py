"""An IOTLB that really remembers: translations stay until they are invalidated.

A real one forgets as it likes. One that never does is the worst case for whoever forgets to
invalidate, and its answers are the same on each run. Left out: eviction, and caches of the upper
levels (a walk always starts at the table's root).
"""

from __future__ import annotations

from typing import Any

from khosim.machine.devices.walk import Extent
from khosim.machine.shadow import RunMap

__all__ = ("Iotlb",)

Held = tuple[int, int, int]
"""(delta in frames, rights, shift) of a run of frames, as in :class:`Extent`."""


class Iotlb:
    """Cached translations by domain id, in I/O frames of 4 KiB."""

    __slots__ = ("by_domain",)

    def __init__(self) -> None:
        self.by_domain: dict[int, RunMap[Held | None]] = {}

    def look_up(self, domain: int, frame: int, end: int) -> tuple[Extent | None, int]:
        """The cached extent at ``frame``, clipped to ``end``; or None and where one begins."""
        held = self.by_domain.get(domain)
        if held is None:
            return None, end
        for first, stop, value in held.overlapping(frame, end):
            if value is None:
                continue
            if first == frame:
                return Extent(first, stop, *value), stop
            return None, first
        return None, end

    def fill(self, domain: int, extents: list[Extent]) -> None:
        """Remember what a walk found: large leaves as a whole, whatever part was asked for."""
        held = self.by_domain.setdefault(domain, RunMap())
        for first, end, delta, rights, shift in extents:
            size = 1 << shift - 12
            held.assign(first // size * size, -(-end // size) * size, (delta, rights, shift))

    def invalidate(self, domain: int | None = None) -> None:
        """Forget a domain, or everything."""
        if domain is None:
            self.by_domain.clear()
        else:
            self.by_domain.pop(domain, None)

    def invalidate_pages(self, domain: int, first: int, end: int) -> None:
        """Forget every translation that has a page in [first, end): large ones as a whole."""
        held = self.by_domain.get(domain)
        if held is None:
            return
        gone = [(first, end)]
        for start, stop, value in held.overlapping(first, end):
            if value is not None and value[2] > 12:
                size = 1 << value[2] - 12
                gone.append((start // size * size, -(-stop // size) * size))
        for start, stop in gone:
            held.assign(start, stop, None)

    def state(self) -> list[Any]:
        """All of it as plain data."""
        return [
            [domain, list(held.starts), list(held.ends), list(held.values)]
            for domain, held in self.by_domain.items()
        ]

    def restore(self, state: list[Any]) -> None:
        """Become what :meth:`state` described."""
        self.by_domain.clear()
        for domain, starts, ends, values in state:
            held: RunMap[Held | None] = RunMap()
            held.starts, held.ends = list(starts), list(ends)
            held.values = [None if value is None else tuple(value) for value in values]
            self.by_domain[domain] = held
