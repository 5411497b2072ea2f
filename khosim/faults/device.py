"""A device that goes on writing to memory while kernels come and go.

The simplest there is: at each tick it stores its counter at one address, as who writes a status
word does. Devices with registers are in :mod:`khosim.machine.devices`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from khosim.machine.hardware import Hardware

__all__ = ("DEVICE", "Dma")

DEVICE = "device"
"""Who wrote, as RAM's record of last writers says it."""


class Board(Protocol):
    """What a device is put into: a machine that lets its ``writers`` tick."""

    hardware: Hardware
    writers: list[Dma]


class Dma:
    """Writes its ``count`` as 8 bytes to ``phys`` at each tick, from now on."""

    __slots__ = ("_board", "count", "phys")

    def __init__(self, board: Board, phys: int) -> None:
        self._board = board
        self.phys = phys
        self.count = 0
        board.writers.append(self)
        self.tick()

    def tick(self) -> None:
        """One more."""
        self.count += 1
        hardware = self._board.hardware
        if hardware.is_ram(self.phys, 8):
            hardware.ram.write_u64(self.phys, self.count, (-1, DEVICE))

    def stop(self) -> None:
        """Write nothing any more."""
        if self in self._board.writers:
            self._board.writers.remove(self)
