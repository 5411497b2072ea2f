"""Which handovers the matrix is made of, and what becomes of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from khosim.kernel.release import MAINLINE, Release, find_release
from khosim.matrix import handover
from khosim.matrix.handover import THINGS, hand_over
from khosim.matrix.leg import INTACT, SEVERITY, Leg

__all__ = ("Cell", "Run", "cells", "play", "play_all", "program")

PAGE_SIZES = (4096, 16384)


@dataclass(frozen=True)
class Cell:
    """One run: ``releases`` are those of the kernels in a row, two or three of them.

    ``finalized`` is None where the first release has nothing to finalize. A release is named as
    everywhere, so that one of a designer's own is the name of its file.
    """

    releases: tuple[str, ...]
    page_size: int = 4096
    finalized: bool | None = True
    only: tuple[str, ...] = THINGS

    def __str__(self) -> str:
        how = ", not finalized" if self.finalized is False else ""
        return f"{' -> '.join(self.releases)}, {self.page_size >> 10} KiB pages{how}"


@dataclass(frozen=True)
class Run:
    """What came of a cell."""

    cell: Cell
    legs: tuple[Leg, ...]

    @property
    def outcome(self) -> str:
        """The worst of its handovers' outcomes."""
        return max((leg.outcome for leg in self.legs), key=SEVERITY.index)

    @property
    def why(self) -> str:
        """That in a sentence; of a round trip, which handover it was."""
        if len(self.cell.releases) == 2:
            return self.legs[0].why
        said = [f"{leg.old} -> {leg.new} {leg.outcome}: {leg.why}" for leg in self.legs]
        if self.outcome == "right" and self.missing:
            said.append(f"not back: {', '.join(self.missing)}")
        return "; ".join(said)

    @property
    def missing(self) -> list[str]:
        """What was in play at first and is not there, or not intact, at last."""
        first, last = self.legs[0], self.legs[-1]
        alive = last.outcome != "panic" and len(self.legs) == len(self.cell.releases) - 1
        return [name for name in first.names if not alive or last.fates.get(name) != INTACT]

    @property
    def contradiction(self) -> str:
        """Where the ways to judge disagree, else empty."""
        return "; ".join(leg.contradiction for leg in self.legs if leg.contradiction)

    def as_json(self) -> dict[str, Any]:
        """The run as plain values."""
        cell = self.cell
        row: dict[str, Any] = {"from": cell.releases[0], "to": cell.releases[-1]}
        if len(cell.releases) > 2:
            row["via"] = list(cell.releases[1:-1])
        row |= {
            "outcome": self.outcome,
            "why": self.why,
            "page_size": cell.page_size,
            "finalized": cell.finalized,
        }
        if self.contradiction:
            row["contradiction"] = self.contradiction
        if len(self.legs) > 1 or len(cell.releases) > 2:
            row["lost"] = self.missing
            row["handovers"] = [_leg_json(leg) for leg in self.legs]
            return row
        return row | _leg_json(self.legs[0])


def _leg_json(leg: Leg) -> dict[str, Any]:
    return {
        "from": leg.old,
        "to": leg.new,
        "outcome": leg.outcome,
        "why": leg.why,
        "panic": leg.panic or None,
        "lost": leg.gone,
        "fates": leg.fates,
        "unclaimed": leg.unclaimed,
        "preserved_blocks": leg.preserved,
        "lost_blocks": leg.lost,
        "phantom_blocks": leg.phantom,
        "violations": {name: len(messages) for name, messages in leg.violations.items()},
        "log": leg.log,
    }


def cells(
    old: Sequence[str] = MAINLINE,
    new: Sequence[str] = MAINLINE,
    *,
    page_sizes: Sequence[int] = PAGE_SIZES,
    only: tuple[str, ...] = THINGS,
) -> Iterator[Cell]:
    """All pairs, finalized and not, then N to N-1 and back for what is in both lists."""
    for page_size in page_sizes:
        for finalized in (True, False):
            for name in old:
                needed = _finalizes(find_release(name))
                if not finalized and not needed:
                    continue
                for successor in new:
                    yield Cell((name, successor), page_size, finalized if needed else None, only)
        for before, name in pairwise(MAINLINE):
            if name in old and name in new and before in old and before in new:
                finalized_or_none = True if _finalizes(find_release(name)) else None
                yield Cell((name, before, name), page_size, finalized_or_none, only)


def _finalizes(release: Release) -> bool:
    return bool(release.finalize)


def play(cell: Cell) -> Run:
    """Run one cell."""
    legs = hand_over(
        cell.releases,
        page_size=cell.page_size,
        finalize=cell.finalized is not False,
        only=cell.only,
    )
    return Run(cell, tuple(legs))


def play_all(wanted: Sequence[Cell], progress: Callable[[int, Cell], None]) -> list[Run]:
    """Run all of them, telling ``progress`` of each before it begins."""
    runs = []
    for number, cell in enumerate(wanted):
        progress(number, cell)
        runs.append(play(cell))
    return runs


def program(cell: Cell) -> str:
    """A program that does what :func:`play` does with a cell, and prints what came of it."""
    call = f"hand_over({cell.releases!r}, page_size={cell.page_size}"
    if cell.finalized is False:
        call += ", finalize=False"
    if cell.only != THINGS:
        call += f", only={cell.only!r}"
    return (
        f"{inspect.getsource(handover)}\n\n"
        'if __name__ == "__main__":\n'
        f"    for leg in {call}):\n"
        "        print(leg)\n"
    )
