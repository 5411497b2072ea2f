"""Which known hazards explain what spoke: switches that make a program silent.

A program is carried out again with switches on. That is a hundredth of what shrinking it takes, so
each suspect is explained as it was drawn, and only few of those with one explanation are shrunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.explore.hazards import known_in
from khosim.explore.limits import BY_THE_CLOCK, alarm
from khosim.explore.search import problems_of, replay
from khosim.explore.shrink import cause_of, on_release, speaks
from khosim.kernel.release import find_release

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from khosim.explore.world import Step
    from khosim.kernel.behaviours import Release

__all__ = ("explanations", "silencers")


class _Tries:
    """A program with switches on: which causes still speak, asked once for each set."""

    def __init__(self, steps: Sequence[Step], release: Release) -> None:
        self._steps = steps
        self._release = release
        self._said: dict[frozenset[str], set[tuple[str, str]]] = {}

    def is_silent(self, cause: tuple[str, str], names: Sequence[str]) -> bool:
        key = frozenset(names)
        if key not in self._said:
            on = dict.fromkeys(sorted(names), True)
            changed = self._release.evolve(name=f"{self._release.name} and", **on)
            with alarm():
                world = replay(on_release(self._steps, changed), changed)
            self._said[key] = {cause_of(problem) for problem in problems_of(world)}
            if world is not None:
                world.close()
        return cause not in self._said[key]


def explanations(
    steps: Sequence[Step], causes: Sequence[tuple[str, str]], release: str | Release
) -> tuple[tuple[str, ...], ...]:
    """For each cause a small set of switches that makes it silent together; () where none does."""
    found = find_release(release)
    off = known_in(found)
    tries = _Tries(steps, found)
    told = []
    for cause in causes:
        can_be = bool(off) and BY_THE_CLOCK not in cause[1]
        can_be = can_be and tries.is_silent(cause, off) and not tries.is_silent(cause, [])
        told.append(tuple(_needed(tries, cause, [], off, is_more=False)) if can_be else ())
    return tuple(told)


def _needed(
    tries: _Tries, cause: tuple[str, str], on: list[str], names: list[str], *, is_more: bool
) -> list[str]:
    # QuickXplain: of ``names`` those without which ``cause`` speaks, where ``on`` are on as well.
    if is_more and tries.is_silent(cause, on):
        return []
    if len(names) == 1:
        return names
    half = len(names) // 2
    first, second = names[:half], names[half:]
    later = _needed(tries, cause, on + first, second, is_more=True)
    return _needed(tries, cause, on + later, first, is_more=bool(later)) + later


def silencers(
    steps: Sequence[Step],
    cause: tuple[str, str],
    release: str | Release,
    tick: Callable[[int], None] = lambda number: None,
) -> tuple[str, ...]:
    """The switches of known hazards that each make ``cause`` silent in a program.

    Where no single one does, a smallest set that does together; nothing where not even all do.
    """
    found = find_release(release)
    off = known_in(found)

    def is_silent(names: Sequence[str]) -> bool:
        tick(0)
        changed = found.evolve(name=f"{found.name} and", **dict.fromkeys(names, True))
        return not speaks(on_release(steps, changed), cause, changed)

    if not off or BY_THE_CLOCK in cause[1] or not is_silent(off):
        return ()
    alone = tuple(name for name in off if is_silent([name]))
    if alone:
        return alone
    needed = list(off)
    for name in off:
        less = [other for other in needed if other != name]
        if is_silent(less):
            needed = less
    return tuple(needed)
