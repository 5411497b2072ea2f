"""Bounded exhaustive search: every program of some steps, each state of the machine once.

A state is reached again by running its steps from the boot on, which is cheaper than a copy of it:
a handover of a small machine takes some milliseconds, a fork of the process some more. Two programs
that end with equal books and equal pages, owners, preserved blocks and warnings
(:meth:`khosim.explore.world.World.state`) are one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from khosim.explore.kinds import Args, Kind
from khosim.explore.limits import alarm
from khosim.explore.search import KINDS, SCENARIOS, is_drained, named
from khosim.explore.world import LOADS, Problem, Step, World

if TYPE_CHECKING:
    from khosim.kernel.behaviours import Release

__all__ = ("Child", "Exhausted", "Frontier", "digest", "exhaust", "expand", "keep_of", "kinds_of")

_BOOT = ('"64M"', "kho=on liveupdate=on")
Keep = Callable[[World, Kind, Args], bool]


class Exhausted(NamedTuple):
    """``states`` that are different, ``runs`` it took, and the programs in which something spoke.

    ``is_complete`` is False where ``states_max`` ended it.
    """

    states: int
    runs: int
    suspects: list[tuple[list[Step], list[Problem]]]
    is_complete: bool


class Child(NamedTuple):
    """A program that is one step longer: its last step, the state it leads to, what spoke.

    ``state`` is a digest, equal in every process; "" where the program is over.
    """

    step: Step
    state: str
    problems: list[Problem]


def digest(state: Hashable) -> str:
    """Short words for a state, the same wherever it is taken."""
    return blake2b(repr(state).encode(), digest_size=12).hexdigest()


def kinds_of(scenario: str) -> list[Kind]:
    """The kinds of steps that a scenario is made of."""
    groups = ("", *SCENARIOS[scenario])
    return [kind for kind in KINDS.values() if kind.weight and kind.group in groups]


def keep_of(scenario: str) -> Keep:
    """Which arguments are in a scenario: odd successors are in few."""
    odd = "successors" in SCENARIOS[scenario]

    def keep(world: World, kind: Kind, args: Args) -> bool:
        return odd or kind.name not in LOADS or args[0] == world.cmdline

    return keep


def expand(
    program: Sequence[Step],
    kinds: Sequence[Kind],
    release: str | Release,
    keep: Keep,
    key: Callable[[World], Hashable] = World.state,
) -> Iterator[Child]:
    """All programs that are one step longer."""
    parent = _run(program, release)
    steps = _next_steps(parent, kinds, keep)
    parent.close()
    for step in steps:
        with alarm():
            world = _run([*program, step], release)
            problems = world.judge(drained=not world.is_over and is_drained(world))
        yield Child(step, "" if world.is_over else digest(key(world)), problems)
        world.close()


class Frontier:
    """A breadth-first search: the states seen, and ``level``, the programs to go on from."""

    def __init__(
        self,
        release: str | Release,
        states_max: int = 100_000,
        key: Callable[[World], Hashable] = World.state,
    ) -> None:
        first = [Step("boot", (*_BOOT, release))]
        world = _run(first, release)
        self._seen = {digest(key(world))}
        world.close()
        self.level: list[list[Step]] = [first]
        self._following: list[list[Step]] = []
        self._states_max = states_max
        self.suspects: list[tuple[list[Step], list[Problem]]] = []
        self.runs = 1
        self.is_full = False

    def take(self, program: Sequence[Step], children: Iterable[Child]) -> None:
        """What came of one program of the level; they are taken in the level's order."""
        for child in children:
            if self.is_full:
                return
            longer = [*program, child.step]
            self.runs += 1
            if child.problems:
                self.suspects.append((longer, child.problems))
            if not child.state or child.state in self._seen:
                continue
            self._seen.add(child.state)
            if not child.problems:
                self._following.append(longer)
            self.is_full = len(self._seen) >= self._states_max

    def deeper(self) -> None:
        """On to the next level."""
        self.level, self._following = self._following, []

    def done(self) -> Exhausted:
        """What was found."""
        return Exhausted(len(self._seen), self.runs, self.suspects, not self.is_full)


def exhaust(
    kinds: Sequence[Kind],
    depth: int,
    release: str | Release = "7.3",
    *,
    states_max: int = 100_000,
    keep: Keep = lambda world, kind, args: True,
    key: Callable[[World], Hashable] = World.state,
) -> Exhausted:
    """All programs of up to ``depth`` steps of ``kinds`` whose arguments ``keep`` lets through.

    Breadth first, so that the first program with a state is a shortest one. What lies behind a
    state in which something spoke is not looked at.
    """
    frontier = Frontier(release, states_max, key)
    for _ in range(depth):
        for program in frontier.level:
            frontier.take(program, expand(program, kinds, release, keep, key))
            if frontier.is_full:
                return frontier.done()
        frontier.deeper()
    return frontier.done()


def _run(steps: Sequence[Step], release: str | Release) -> World:
    world = World(KINDS, release)
    for step in steps:
        world.run(step)
    return world


def _next_steps(world: World, kinds: Sequence[Kind], keep: Keep) -> list[Step]:
    return [
        Step(kind.name, named(world, kind, args))
        for kind in kinds
        for args in kind.choices(world)
        if keep(world, kind, args)
    ]
