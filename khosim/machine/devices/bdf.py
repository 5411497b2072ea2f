"""Where a PCI function is: segment, bus, device, function, as ``lspci -D`` writes it."""

from __future__ import annotations

import re
from typing import NamedTuple

from khosim.errors import InputError

__all__ = ("Bdf",)

_FORM = re.compile(r"(?:([0-9a-f]{4}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])", re.IGNORECASE)


class Bdf(NamedTuple):
    """A function's address. ``rid`` is the 16-bit requester id of its transactions."""

    segment: int
    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> Bdf:
        """``"0000:3b:00.0"``, or without the segment; :class:`InputError` for anything else."""
        match = _FORM.fullmatch(text)
        if match is None or int(match[3], 16) > 31:
            raise InputError("PCI address", f"{text!r} is not like 0000:3b:00.0")
        return cls(int(match[1] or "0", 16), int(match[2], 16), int(match[3], 16), int(match[4]))

    @classmethod
    def of_rid(cls, segment: int, rid: int) -> Bdf:
        """The address behind a requester id."""
        return cls(segment, rid >> 8 & 0xFF, rid >> 3 & 31, rid & 7)

    @property
    def devfn(self) -> int:
        """Device and function in one byte, as the kernel's ``PCI_DEVFN``."""
        return self.device << 3 | self.function

    @property
    def rid(self) -> int:
        """Bus, device and function in 16 bits."""
        return self.bus << 8 | self.device << 3 | self.function

    def __str__(self) -> str:
        return f"{self.segment:04x}:{self.bus:02x}:{self.device:02x}.{self.function}"
