"""What the guest's console says, and what of it matters when something went wrong."""

from __future__ import annotations

import re

__all__ = ("Console",)

_DEATH = re.compile(
    r"Kernel panic - not syncing.*|BUG: .*|Oops: .*|general protection fault.*|kernel BUG at .*"
    r"|khosim-lab: .*|Error: .*System halted.*|Invalid .* \(corrupt.*|Out of memory.*"
)
_PANIC = "Kernel panic - not syncing"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


class Console:
    """The first serial port, from the start of QEMU on."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._mark = 0

    def feed(self, data: bytes) -> None:
        """Add what came."""
        self._data += data

    @property
    def text(self) -> str:
        """All of it, without control characters."""
        return _plain(self._data)

    def begin_generation(self) -> None:
        """What comes from now on is another kernel's."""
        self._mark = len(self._data)

    def trouble(self) -> str | None:
        """The line by which this generation's kernel died, or the first odd one; None if none."""
        found = [match[0].strip() for match in _DEATH.finditer(_plain(self._data[self._mark :]))]
        panics = [line for line in found if line.startswith(_PANIC)]
        return next(iter(panics or found), None)

    def died(self) -> bool:
        """Whether this generation's kernel has panicked."""
        return _PANIC.encode() in self._data[self._mark :]

    def tail(self, nr_lines: int = 20) -> list[str]:
        """The last lines that hold anything."""
        return [line for line in self.text.splitlines() if line.strip()][-nr_lines:]


def _plain(data: bytearray) -> str:
    return _CONTROL.sub("", data.decode("utf-8", "replace").replace("\r", ""))
