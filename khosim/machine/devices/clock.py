"""When devices act: between which events of the kernels.

Time on this machine is the number of events that its kernels emitted, counted on through every
jump. After each of them a schedule says whether the devices do a step. Schedules are plain data and
hold no state: whether they act after an event depends on its number alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from khosim.errors import InputError

__all__ = ("Schedule", "at", "every", "mix64", "never", "seeded")

_M64 = (1 << 64) - 1


def mix64(value: int) -> int:
    """A good hash of a 64-bit number (the finalizer of splitmix64)."""
    value = value + 0x9E37_79B9_7F4A_7C15 & _M64
    value = (value ^ value >> 30) * 0xBF58_476D_1CE4_E5B9 & _M64
    value = (value ^ value >> 27) * 0x94D0_49BB_1331_11EB & _M64
    return value ^ value >> 31


class Schedule(NamedTuple):
    """Made by :func:`never`, :func:`every`, :func:`seeded` and :func:`at`."""

    kind: str
    number: int = 0
    chance: float = 0.0
    moments: tuple[tuple[int, str], ...] = ()

    def acting(self, time: int) -> tuple[str, ...]:
        """Who acts after event number ``time``: names, "" for all devices, nothing for nobody."""
        if self.kind == "every":
            return ("",) if time % self.number == self.number - 1 else ()
        if self.kind == "seeded":
            return ("",) if mix64(self.number << 32 ^ time) < self.chance * 2.0**64 else ()
        return tuple(name for moment, name in self.moments if moment == time)

    def state(self) -> list[Any]:
        """As plain data."""
        return [self.kind, self.number, self.chance, [list(moment) for moment in self.moments]]

    @classmethod
    def of_state(cls, state: list[Any]) -> Schedule:
        """The schedule that :meth:`state` described."""
        kind, number, chance, moments = state
        return cls(kind, number, chance, tuple((int(time), str(name)) for time, name in moments))


def never() -> Schedule:
    """Devices act only when somebody calls ``tick``."""
    return Schedule("never")


def every(number: int) -> Schedule:
    """All devices do a step after each ``number`` events."""
    if number < 1:
        raise InputError("schedule", f"every {number} events; at least 1")
    return Schedule("every", number)


def seeded(seed: int, chance: float = 0.5) -> Schedule:
    """All devices do a step after an event with this chance, always the same for a seed."""
    if not 0 <= chance <= 1:
        raise InputError("schedule", f"a chance of {chance}; it is from 0 to 1")
    return Schedule("seeded", seed, chance)


def at(moments: Iterable[int | tuple[int, str]]) -> Schedule:
    """A step after exactly these events: a number for all devices, or (number, name of one)."""
    pairs = [(moment, "") if isinstance(moment, int) else moment for moment in moments]
    return Schedule("at", moments=tuple((int(time), str(name)) for time, name in pairs))
