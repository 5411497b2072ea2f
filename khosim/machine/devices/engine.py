"""DMA engines: what makes a device read and write memory by itself, step after step.

An engine has a free-running program, a list of transfers that it goes through again and again, and
may have registers and rings of its own (:mod:`.nic`, :mod:`.nvme`). It holds plain data only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from khosim.machine.devices.dma import Dma
    from khosim.machine.devices.events import DmaEvent
    from khosim.machine.devices.function import Function

__all__ = ("Engine", "Transfer", "fill")


class Transfer(NamedTuple):
    """One DMA of a program: ``write`` says that the device writes memory."""

    iova: int
    len_bytes: int
    write: bool
    pattern: int = 0


def fill(pattern: int, step: int, len_bytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """What a device writes in its n-th step: 64-bit words pattern ^ (step << 32) + index."""
    words = np.arange(len_bytes + 7 >> 3, dtype=np.uint64)
    words = words + np.uint64((step & 0xFFFF_FFFF) << 32) ^ np.uint64(pattern & (1 << 64) - 1)
    return words.view(np.uint8)[:len_bytes]


class Engine:
    """The engine of a "plain" device: a program and no registers.

    ``steps`` counts the steps done, for as long as the machine has power.
    """

    has_registers = False

    __slots__ = ("at", "dma", "function", "loop", "running", "steps", "transfers")

    def __init__(self, function: Function, dma: Dma) -> None:
        self.function, self.dma = function, dma
        self.steps = 0
        self.reset()

    def reset(self) -> None:
        """As after power-on: no program, nothing runs."""
        self.transfers: list[Transfer] = []
        self.loop = self.running = False
        self.at = 0

    def program(self, transfers: Iterable[Transfer], *, loop: bool = True) -> None:
        """Replace the program and start it; with ``loop`` it begins again after its last one."""
        self.transfers = [Transfer(*transfer) for transfer in transfers]
        self.at, self.loop, self.running = 0, loop, bool(self.transfers)

    def stop(self) -> None:
        """Stop the program where it is."""
        self.running = False

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return self.running

    def step(self) -> list[DmaEvent]:
        """One tick: the program's next transfer."""
        if not self.running:
            return []
        transfer = self.transfers[self.at]
        self.at += 1
        if self.at == len(self.transfers):
            self.at, self.running = 0, self.loop
        self.steps += 1
        data = fill(transfer.pattern, self.steps, transfer.len_bytes) if transfer.write else None
        event, _ = self.dma.transact(self.function, transfer.iova, transfer.len_bytes, data)
        return [event]

    def read_register(self, offset: int, size: int) -> int:
        """A register's value."""
        return 0

    def write_register(self, offset: int, value: int, size: int) -> None:
        """Write a register."""

    def state(self) -> list[Any]:
        """All of it as plain data."""
        return [self.steps, self.at, self.loop, self.running, [*map(list, self.transfers)]]

    def restore(self, state: list[Any]) -> None:
        """Become what :meth:`state` described."""
        self.steps, self.at, self.loop, self.running, transfers = state[:5]
        self.transfers = [Transfer(*transfer) for transfer in transfers]
