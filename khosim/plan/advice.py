"""What drives scratch, and which ``kho_scratch=`` would do: by planning again.

A driver is an option of the command line, or a dimension of the model, without which scratch would
be smaller. A suggestion is only made when it was tried: the same kernel is handed over to itself in
the simulator, with nothing but scratch to boot in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from khosim.errors import InputError
from khosim.kernel.cmdline import parse_words
from khosim.kernel.release import Release
from khosim.plan.model import Assumptions
from khosim.plan.simulated import Outcome, Simulation, simulate
from khosim.plan.source import Source

__all__ = ("Driver", "Suggestion", "find_drivers", "suggest")

_SINGLE = ("log_buf_len", "crashkernel", "cma")
_HUGE = ("hugepages", "hugepagesz", "default_hugepagesz")
_SCALES = (50, 75, 100, 125, 150, 175, 200)
_LEAST_BYTES = 64 << 10
_WORTH_SHARE = 1 / 20
_WORTH_SAVING = 4 / 5


@dataclass(frozen=True, slots=True)
class Driver:
    """One reason for scratch: what boot reserves for it, and scratch (bytes) with and without it.

    Where KHO is off, ``scratch_bytes`` is 0; without a driver it may stay on. ``without_bytes`` is
    None where it goes off without it.
    """

    what: str
    reserved_bytes: int
    scratch_bytes: int
    without_bytes: int | None

    def as_json(self) -> dict[str, Any]:
        """The driver for programs."""
        return {
            "what": self.what,
            "reserved_bytes": self.reserved_bytes,
            "scratch_bytes": self.scratch_bytes,
            "scratch_without_bytes": self.without_bytes,
        }


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A ``kho_scratch=`` that worked when tried, and what scratch (bytes) is with it."""

    option: str
    scratch_bytes: int

    def as_json(self) -> dict[str, Any]:
        """The suggestion for programs."""
        return {"option": self.option, "reserved_bytes": self.scratch_bytes}


Word = tuple[str, str | None]


def _words(cmdline: str) -> list[Word]:
    # parameq: '-' and '_' are one character.
    return [(name.replace("-", "_"), value) for name, value in parse_words(cmdline)]


def _text(words: list[Word]) -> str:
    parts = []
    for name, value in words:
        if value is not None and any(char.isspace() for char in value):
            value = f'"{value}"'
        parts.append(name if value is None else f"{name}={value}")
    return " ".join(parts)


def _word_groups(words: list[Word]) -> list[tuple[str, list[int]]]:
    # Options that are taken away together, with their places: all hugetlb options are one.
    groups: dict[str, list[int]] = {}
    huge = [i for i, (name, _) in enumerate(words) if name in _HUGE]
    for i, (name, _) in enumerate(words):
        if name in _SINGLE:
            groups.setdefault(name, []).append(i)
        elif name == "reserve_mem":
            groups[f"reserve_mem {i}"] = [i]
    if huge:
        groups["huge"] = huge
    return [(_text([words[i] for i in places]), places) for places in groups.values()]


def find_drivers(
    source: Source, cmdline: str, assumed: Assumptions, release: Release, whole: Outcome
) -> tuple[Driver, ...]:
    """Options and dimensions that make scratch larger, the costliest first.

    ``whole`` is the model's outcome with all of them.
    """
    words = _words(cmdline)
    tried: list[tuple[str, str, Assumptions]] = []
    for what, places in _word_groups(words):
        rest = _text([word for i, word in enumerate(words) if i not in places])
        tried.append((what, rest, assumed))
    if assumed["initrd_bytes"]:
        tried.append(("the initrd", cmdline, assumed.evolve(initrd_bytes=0)))
    if assumed["cma_bytes"] and all(name != "cma" for name, _ in words):
        tried.append(("the default CMA area", cmdline, assumed.evolve(cma_bytes=None)))
    drivers = []
    for what, text, without in tried:
        outcome = _try(source, text, without, release)
        if outcome is None:
            continue
        saved = whole.boot_bytes - outcome.outcome.boot_bytes
        scratch = outcome.outcome.scratch_bytes if outcome.outcome.enabled else None
        before = whole.scratch_bytes if whole.enabled else None
        if scratch != before or (saved >= _LEAST_BYTES and whole.enabled):
            drivers.append(Driver(what, saved, whole.scratch_bytes, scratch))
    return tuple(sorted(drivers, key=lambda driver: (-driver.reserved_bytes, driver.what)))


def _try(
    source: Source, cmdline: str, assumed: Assumptions, release: Release, *, whole: bool = False
) -> Simulation | None:
    try:
        return simulate(
            source.memory_map, source.page_size, cmdline, assumed, release, whole=whole
        )
    except InputError:
        return None


def suggest(
    source: Source,
    cmdline: str,
    assumed: Assumptions,
    release: Release,
    whole: Outcome,
    needed: bool,
) -> Suggestion | None:
    """A scale that worked, where scratch fails or takes more than a twentieth of RAM.

    It is one step above the smallest that worked. ``needed``: KHO goes off or nothing can be
    loaded; without that, sizes that the user chose stay. None where nothing worked, or little is
    gained.
    """
    if not needed and (
        not whole.scale_percent
        or whole.scratch_bytes <= source.memory_map.ram_bytes * _WORTH_SHARE
    ):
        return None
    words = [word for word in _words(cmdline) if word[0] != "kho_scratch"]
    if all(owner.name != "huge pages" for owner in whole.owners):
        # They come from the page allocator, or at least not from scratch: no part of the trial.
        words = [word for word in words if word[0] not in _HUGE]
    worked = 0
    for scale in _SCALES:
        text = _text([*words, ("kho_scratch", f"{scale}%")])
        simulation = _try(source, text, assumed, release)
        if simulation is None or not simulation.outcome.enabled:
            break  # more is no better
        simulation = _try(source, text, assumed, release, whole=True)
        if simulation is None or simulation.hand_over():
            worked = 0
            continue
        worked += 1
        if worked == 2:
            scratch = simulation.outcome.scratch_bytes
            gained = needed or scratch <= whole.scratch_bytes * _WORTH_SAVING
            return Suggestion(f"kho_scratch={scale}%", scratch) if gained else None
    return None
