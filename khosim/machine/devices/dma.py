"""The way of a transaction from a device: to memory, to another device, to a CPU, or nowhere.

In order: power and bus master of the device and of the bridges above; a peer below the same bridge
where ACS does not redirect; the IOMMU of the segment; then RAM, a BAR, or the address range of
interrupts. Each is an event. Left out: the splitting into packets, ordering, read completions that
get lost, address translation services.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from khosim.machine.devices.events import DmaEvent, EventLog
from khosim.machine.devices.function import Function
from khosim.machine.devices.interrupts import Interrupts, is_interrupt
from khosim.machine.devices.pci import Pci
from khosim.machine.ram import Ram

if TYPE_CHECKING:
    from khosim.machine.devices.amd import Unit
    from khosim.machine.devices.snp import SecureProcessor

__all__ = ("Dma",)

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class Dma:
    """The fabric of one machine."""

    __slots__ = ("interrupts", "is_ram", "log", "pci", "ram", "ram_ranges", "snp", "unit")

    def __init__(
        self,
        ram: Ram,
        is_ram: Callable[[int, int], bool],
        ram_ranges: tuple[tuple[int, int], ...],
        pci: Pci,
        interrupts: Interrupts,
        unit: Unit | None,
        snp: SecureProcessor | None,
        log: EventLog,
    ) -> None:
        self.ram, self.is_ram, self.ram_ranges = ram, is_ram, ram_ranges
        self.pci, self.interrupts, self.unit, self.snp = pci, interrupts, unit, snp
        self.log = log

    def transact(
        self, function: Function, iova: int, len_bytes: int, data: Bytes | None
    ) -> tuple[DmaEvent, bytes]:
        """One DMA: a write of ``data``, or with None a read, whose bytes come back as well.

        Bytes that nothing answered for are missing at the end.
        """
        outcome, runs, found = self._go(function, iova, len_bytes, data)
        event = DmaEvent(
            self.log.now,
            function.name,
            function.bdf.rid,
            iova,
            len_bytes,
            data is not None,
            outcome,
            tuple(runs),
        )
        self.log.add("dma", function.name, dma=event)
        return event, found

    def _go(
        self, function: Function, iova: int, len_bytes: int, data: Bytes | None
    ) -> tuple[str, list[tuple[int, int]], bytes]:
        if function.power_state or not function.present:
            return "no-power", [], b""
        if not function.bus_master:
            return "master-abort", [], b""
        peer = self.pci.claim(iova)
        if peer is not None and self.pci.goes_direct(function, peer[2]):
            length = min(len_bytes, peer[1] - iova)
            found = self._peer(peer, iova, length, data)
            return "peer" if length == len_bytes else "unclaimed", [(iova, length)], found
        unit = self.unit
        wanted: tuple[tuple[int, int], ...] = ((iova, len_bytes),)
        is_message = data is not None and is_interrupt(iova)
        if unit is None or unit.segment != function.segment or is_message:
            fault = False
        else:
            resolved = unit.translate(function.bdf.rid, iova, len_bytes, data is not None)
            wanted, fault = resolved.runs, resolved.fault is not None
        runs: list[tuple[int, int]] = []
        pieces: list[bytes] = []
        outcome, at = "done", 0
        for phys, length in wanted:
            part = None if data is None else data[at : at + length]
            outcome, reached, found = self._reach(function, phys, length, part, outcome)
            runs += reached
            pieces.append(found)
            at += length
            if outcome not in ("done", "peer", "interrupt"):
                return outcome, runs, b"".join(pieces)
        return "fault" if fault else outcome, runs, b"".join(pieces)

    def _reach(
        self, function: Function, phys: int, length: int, data: Bytes | None, outcome: str
    ) -> tuple[str, list[tuple[int, int]], bytes]:
        """A contiguous piece of the physical address space: what answers there."""
        runs: list[tuple[int, int]] = []
        pieces: list[bytes] = []
        at = 0
        while at < length:
            here = phys + at
            left = length - at
            size = left if self.is_ram(here, left) else self._ram_bytes(here, left)
            if size:
                if data is None:
                    pieces.append(self.ram.read(here, size))
                else:
                    snp = self.snp
                    if snp is not None and snp.enforces_dma:
                        size = snp.rmp.first_assigned(here, size) - here
                        if not size:
                            if self.unit is not None:
                                self.unit.record_rmp(function.bdf.rid, here)
                            return "rmp", runs, b""
                    Ram.write(self.ram, here, data[at : at + size], function.writer)
            else:
                peer = self.pci.claim(here)
                if peer is not None:
                    size = min(left, peer[1] - here)
                    part = None if data is None else data[at : at + size]
                    pieces.append(self._peer(peer, here, size, part))
                    outcome = "peer"
                elif data is not None and is_interrupt(here) and left == 4:
                    value = int.from_bytes(data[at:].tobytes(), "little")
                    self.interrupts.message(function, -1, here, value)
                    size, outcome = 4, "interrupt"
                else:
                    return "unclaimed", runs, b"".join(pieces)
            if runs and sum(runs[-1]) == here:
                runs[-1] = runs[-1][0], runs[-1][1] + size
            else:
                runs.append((here, size))
            at += size
        return outcome, runs, b"".join(pieces)

    def _ram_bytes(self, phys: int, length: int) -> int:
        """How many bytes from ``phys`` on are RAM, if not all are."""
        at = phys
        for start, end in self.ram_ranges:
            if start <= at < end:
                at = min(end, phys + length)
        return at - phys

    def _peer(
        self, claim: tuple[int, int, Function, int], phys: int, length: int, data: Bytes | None
    ) -> bytes:
        start, _, target, bar = claim
        if data is None:
            return target.bar_read(bar, phys - start, length)
        target.bar_write(bar, phys - start, data[:length].tobytes())
        return b""
