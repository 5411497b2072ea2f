"""Bounded exhaustive search: every program of some steps, each state of the machine once.

A state is reached again by running its steps from the boot on (a handover of a small machine takes
some milliseconds, and nothing has to be copied). Two programs that end with equal books and equal
pages, owners, preserved blocks and warnings (:meth:`khosim.explore.world.World.state`) are one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from khosim.explore.search import KINDS, is_drained, named
from khosim.explore.world import Problem, Step, World

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from khosim.explore.kinds import Args, Kind
    from khosim.kernel.behaviours import Release

__all__ = ("Exhausted", "exhaust")

_BOOT = ('"64M"', "kho=on liveupdate=on")


class Exhausted(NamedTuple):
    """``states`` that are different, ``runs`` it took, and the programs in which something spoke.

    ``is_complete`` is False where ``states_max`` ended it.
    """

    states: int
    runs: int
    suspects: list[tuple[list[Step], list[Problem]]]
    is_complete: bool


def exhaust(
    kinds: Sequence[Kind],
    depth: int,
    release: str | Release = "7.3",
    *,
    states_max: int = 100_000,
    keep: Callable[[World, Kind, Args], bool] = lambda world, kind, args: True,
    key: Callable[[World], Hashable] = World.state,
) -> Exhausted:
    """All programs of up to ``depth`` steps of ``kinds`` whose arguments ``keep`` lets through.

    Breadth first, so that the first program with a state is a shortest one. What lies behind a
    state in which something spoke is not looked at.
    """
    first = [Step("boot", (*_BOOT, release))]
    world = _run(first, release)
    seen = {hash(key(world))}
    suspects: list[tuple[list[Step], list[Problem]]] = []
    runs = 1
    level = [first]
    for _ in range(depth):
        following: list[list[Step]] = []
        for steps in level:
            for step in _next_steps(_run(steps, release), kinds, keep):
                program = [*steps, step]
                world = _run(program, release)
                runs += 1
                problems = world.judge(drained=not world.is_over and is_drained(world))
                if problems:
                    suspects.append((program, problems))
                if world.is_over:
                    continue
                state = hash(key(world))
                if state in seen:
                    continue
                seen.add(state)
                if not problems:
                    following.append(program)
                if len(seen) >= states_max:
                    return Exhausted(len(seen), runs, suspects, False)
        level = following
    return Exhausted(len(seen), runs, suspects, True)


def _run(steps: Sequence[Step], release: str | Release) -> World:
    world = World(KINDS, release)
    for step in steps:
        world.run(step)
    return world


def _next_steps(
    world: World, kinds: Sequence[Kind], keep: Callable[[World, Kind, Args], bool]
) -> list[Step]:
    return [
        Step(kind.name, named(world, kind, args))
        for kind in kinds
        for args in kind.choices(world)
        if keep(world, kind, args)
    ]
