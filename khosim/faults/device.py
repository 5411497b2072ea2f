"""A device that goes on writing to memory while kernels come and go.

The simplest there is: at each stage of a kernel's life it stores its counter at one address, as who
writes a status word does. Devices with registers are in :mod:`khosim.machine.devices`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from khosim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from khosim.kernel.kernel import Kernel
    from khosim.machine.hardware import Hardware

__all__ = ("DEVICE", "Dma")

DEVICE = "device"
"""Who wrote, as RAM's record of last writers says it."""


class Board(Protocol):
    """What a device is put into: a :class:`khosim.Machine`, which tells of its kernels' stages."""

    hardware: Hardware
    generation: int
    watchers: list[Callable[[Kernel, str], None]]


class Dma:
    """Writes its ``count`` as 8 bytes to ``phys``, now and at each stage from now on.

    It does so wherever that is in RAM, until :meth:`stop` or until the machine is reset. What has
    to survive: everything, where ``phys`` lies in memory that its owner preserves, with what the
    device wrote; the machine alone, where it lies in anybody else's. Raises :class:`InputError` for
    what is no address.
    """

    __slots__ = ("_generation", "_has_jumped", "_machine", "count", "phys")

    def __init__(self, machine: Board, phys: int) -> None:
        if phys < 0:
            raise InputError("Dma: phys", f"{phys} is no address")
        self._machine = machine
        self._generation = machine.generation
        self._has_jumped = False
        self.phys = phys
        self.count = 0
        machine.watchers.append(self._at_stage)
        self.tick()

    def _at_stage(self, kernel: Kernel, stage: str) -> None:
        if kernel.generation != self._generation:
            if not self._has_jumped:  # a kernel that nobody jumped to: power was off
                self.stop()
                return
            self._generation, self._has_jumped = kernel.generation, False
        self._has_jumped = self._has_jumped or stage == "jump"
        self.tick()

    def tick(self) -> None:
        """One more."""
        self.count += 1
        hardware = self._machine.hardware
        if hardware.is_ram(self.phys, 8):
            hardware.ram.write_u64(self.phys, self.count, (-1, DEVICE))

    def stop(self) -> None:
        """Write nothing any more."""
        if self._at_stage in self._machine.watchers:
            self._machine.watchers.remove(self._at_stage)
