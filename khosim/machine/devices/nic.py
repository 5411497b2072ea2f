"""A network card with the descriptor rings of Intel's 8254x.

Registers and 16-byte legacy descriptors as in Intel's "PCI/PCI-X Family of Gigabit Ethernet
Controllers Software Developer's Manual" and ``drivers/net/ethernet/intel/e1000/e1000_hw.h @ 7.3``.
The rings lie in memory and are read by DMA. Each step receives one frame, if the driver left a
descriptor for it, and sends one. Left out: a network (frames hold a pattern), filters, offloads,
interrupt moderation, write-back of transmit descriptors without RS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from khosim.machine.devices.engine import Engine, fill

if TYPE_CHECKING:
    from khosim.machine.devices.events import DmaEvent

__all__ = ("NicEngine",)

CTRL, STATUS, RCTL, TCTL = 0x0, 0x8, 0x100, 0x400
RX, TX = 0x2800, 0x3800  # base low, base high, length in bytes; head at +0x10, tail at +0x18
_RESET, _ENABLE = 1 << 26, 1 << 1
_RING = (0x0, 0x4, 0x8, 0x10, 0x18)
_REGISTERS = (CTRL, STATUS, RCTL, TCTL, *(ring + at for ring in (RX, TX) for at in _RING))
_FRAME_BYTES = 1514
_DONE, _END_OF_PACKET, _REPORT = 1, 2, 1 << 3


class NicEngine(Engine):
    """The card's rings, beside the free-running program that every engine has."""

    has_registers = True

    __slots__ = ("frames", "hung", "registers")

    def reset(self) -> None:
        """All registers zero: both rings off."""
        super().reset()
        self.registers = dict.fromkeys(_REGISTERS, 0)
        self.registers[STATUS] = 2  # the link is up
        self.frames = 0
        self.hung = False

    def read_register(self, offset: int, size: int) -> int:
        """A register; 0 where there is none."""
        return self.registers.get(offset, 0)

    def write_register(self, offset: int, value: int, size: int) -> None:
        """Write a register; bit 26 of CTRL resets the card."""
        if offset == CTRL and value & _RESET:
            self.reset()
        elif offset in self.registers and offset != STATUS:
            self.registers[offset] = value & 0xFFFF_FFFF

    def _ready(self, ring: int, control: int) -> bool:
        held = self.registers
        return bool(
            held[control] & _ENABLE
            and held[ring + 8] >= 16
            and held[ring + 0x10] != held[ring + 0x18]
        )

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        rings = self._ready(RX, RCTL) or self._ready(TX, TCTL)
        return self.running or (rings and not self.hung)

    def step(self) -> list[DmaEvent]:
        """One transfer of the program, one frame in, one frame out."""
        events = super().step()
        if self.hung:
            return events
        done = 0
        if self._ready(RX, RCTL):
            done += self._receive(events)
        if self._ready(TX, TCTL) and not self.hung:
            done += self._send(events)
        if done:
            self.steps += 1
            self.function.msix(0)
        return events

    def _descriptor(self, ring: int, events: list[DmaEvent]) -> tuple[int, int, int] | None:
        """The descriptor at a ring's head: its I/O address and two words; None: the card hangs."""
        held = self.registers
        base = held[ring] | held[ring + 4] << 32
        at = base + 16 * held[ring + 0x10]
        event, data = self.dma.transact(self.function, at, 16, None)
        events.append(event)
        if event.outcome not in ("done", "peer"):
            self.hung = True
            return None
        return at, int.from_bytes(data[:8], "little"), int.from_bytes(data[8:], "little")

    def _finish(
        self, ring: int, at: int, low: int, high: int, write: bool, events: list[DmaEvent]
    ) -> int:
        if write:
            back = low.to_bytes(8, "little") + high.to_bytes(8, "little")
            data = np.frombuffer(back, dtype=np.uint8)
            event, _ = self.dma.transact(self.function, at, 16, data)
            events.append(event)
            self.hung = event.outcome not in ("done", "peer")
        held = self.registers
        held[ring + 0x10] = (held[ring + 0x10] + 1) % (held[ring + 8] // 16)
        return int(not self.hung)

    def _receive(self, events: list[DmaEvent]) -> int:
        found = self._descriptor(RX, events)
        if found is None:
            return 0
        at, buffer, _ = found
        self.frames += 1
        data = fill(0, self.frames, _FRAME_BYTES)
        event, _ = self.dma.transact(self.function, buffer, _FRAME_BYTES, data)
        events.append(event)
        status = _DONE | _END_OF_PACKET
        return self._finish(RX, at, buffer, _FRAME_BYTES | status << 32, True, events)

    def _send(self, events: list[DmaEvent]) -> int:
        found = self._descriptor(TX, events)
        if found is None:
            return 0
        at, buffer, high = found
        length = high & 0xFFFF
        if length:
            event, _ = self.dma.transact(self.function, buffer, length, None)
            events.append(event)
        return self._finish(TX, at, buffer, high | _DONE << 32, bool(high >> 24 & _REPORT), events)

    def state(self) -> list[Any]:
        """All of it as plain data."""
        registers = [[at, value] for at, value in self.registers.items()]
        return [*super().state(), registers, self.frames, self.hung]

    def restore(self, state: list[Any]) -> None:
        """Become what :meth:`state` described."""
        super().restore(state)
        registers, self.frames, self.hung = state[5:]
        self.registers = dict(registers)
