"""The record of what devices did: for observers, never read by a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ("DmaEvent", "EventLog", "HardwareEvent")


class HardwareEvent(NamedTuple):
    """One thing that happened outside all kernels.

    ``time`` counts the kernels' events so far; ``kind`` is "dma", "interrupt", "reset",
    "renumbered", "fault", "power", "rmp", "psp" or "vcpu"; ``source`` names the device;
    ``detail`` is plain data, or a :class:`DmaEvent` under the key "dma".
    """

    time: int
    kind: str
    source: str
    detail: dict[str, Any]


class DmaEvent(NamedTuple):
    """One DMA. ``name`` is the device's first address, ``rid`` its requester id now.

    ``outcome``: "done", "peer" (a BAR), "interrupt", "fault" (IOMMU), "rmp" (a page of a guest),
    "master-abort" (bus master off), "no-power", or "unclaimed" (neither RAM nor a BAR). ``runs``
    are the (physical address, bytes) that it reached, in the order of the I/O addresses: all of it
    only where the outcome is good.
    """

    time: int
    name: str
    rid: int
    iova: int
    len_bytes: int
    write: bool
    outcome: str
    runs: tuple[tuple[int, int], ...]


class EventLog:
    """The events so far, and those who want to hear of each at once."""

    __slots__ = ("events", "listeners", "now")

    def __init__(self) -> None:
        self.now = 0
        self.events: list[HardwareEvent] = []
        self.listeners: list[Callable[[HardwareEvent], None]] = []

    def add(self, kind: str, source: str, /, **detail: Any) -> None:
        """Record an event and tell the listeners."""
        event = HardwareEvent(self.now, kind, source, detail)
        self.events.append(event)
        for listener in self.listeners:
            listener(event)
