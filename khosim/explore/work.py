"""Pieces of a campaign's work: plain data in, plain data out, in whatever process.

Each function is of its arguments alone. ``tick`` is called before each program with its number, so
that whoever waits knows what a worker is at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from khosim.explore import interleave
from khosim.explore.causes import explanations, silencers
from khosim.explore.coverage import Reached, watching
from khosim.explore.engine import drawn_by_hypothesis
from khosim.explore.exhaust import expand, keep_of, kinds_of
from khosim.explore.hazards import silenced
from khosim.explore.limits import alarm
from khosim.explore.search import random_run
from khosim.explore.shrink import cause_of, on_release, shrink, speaks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from random import Random

    from khosim.explore.exhaust import Child
    from khosim.explore.world import Problem, Step
    from khosim.kernel.behaviours import Release

__all__ = ("Cause", "Runs", "Shrunk", "Spec", "Suspect", "Task", "do", "run_unit", "shrunk")

_WHOLE = 16
"""One run in so many is made with all hazards of its release."""
Cause = tuple[str, str]
"""An invariant, and the shape of its words."""


class Spec(NamedTuple):
    """What a campaign tries: all that a run depends on, but its number."""

    scenario: str
    release: str | Release
    seed: str
    watches: bool = False
    """Note what of the kernel the runs reach."""
    engine: str = "plain"
    """Who draws programs: "plain" or "hypothesis"."""


class Suspect(NamedTuple):
    """A run in which something spoke: enough to run it again."""

    seed: str
    steps: tuple[Step, ...]
    causes: tuple[Cause, ...]
    explained: tuple[tuple[str, ...], ...] = ()
    """For each of the causes the switches that together make it silent, if any do."""
    off: tuple[str, ...] = ()
    """Known hazards that were switched off as it spoke."""

    @property
    def told(self) -> Iterator[tuple[Cause, tuple[str, ...]]]:
        """Each cause with the switches that explain it."""
        explained = self.explained or ((),) * len(self.causes)
        return zip(self.causes, explained, strict=True)


class Shrunk(NamedTuple):
    """A shrunk program, what speaks in it, and which switches of known hazards silence it.

    ``behind`` are switches that have to be on for it to speak: it is hidden by their hazards.
    """

    steps: list[Step]
    problem: Problem
    switches: tuple[str, ...]
    behind: tuple[str, ...] = ()


class Runs(NamedTuple):
    """What some runs in a row came to.

    ``lost`` are numbers of runs that no worker survived, ``covered`` is what they reached of the
    kernel, where somebody watched; ``given_up`` counts programs that an engine did not draw to
    their end.
    """

    suspects: list[Suspect]
    reached: set[str]
    lost: tuple[int, ...] = ()
    covered: Reached = Reached()
    given_up: int = 0


class Expanded(NamedTuple):
    """What some programs of an exhaustive search lead to, and what that reached of the kernel."""

    found: list[list[Child]]
    covered: Reached


class Task(NamedTuple):
    """A piece of work: the name of one of the functions here, and its arguments after the spec."""

    name: str
    args: tuple[Any, ...]


def _no_tick(number: int) -> None:
    """Nobody waits."""


def run_unit(
    seed: str,
    scenario: str,
    release: str | Release,
    first: int,
    count: int,
    skip: Sequence[int] = (),
    tick: Callable[[int], None] = _no_tick,
    engine: str = "plain",
    off: tuple[str, ...] = (),
) -> Runs:
    """Make ``count`` runs from number ``first`` on, but for those to ``skip``.

    Known hazards by the switches in ``off`` are off in them, but for one run in sixteen.
    """
    suspects: list[Suspect] = []
    without = silenced(release, off)
    reached: set[str] = set()

    def run(n: int, random: Random | None = None) -> None:
        tick(n)
        name = f"{seed}:{n}"
        is_whole = n % _WHOLE == 0
        with alarm():
            world = random_run(name, scenario, release if is_whole else without, random)
        causes = tuple(dict.fromkeys(cause_of(problem) for problem in world.problems))
        if n >= first:
            reached.update(step.kind for step in world.steps)
            if causes:
                steps = tuple(on_release(world.steps, release))
                suspects.append(Suspect(name, steps, causes, off=() if is_whole else off))
        world.close()

    made = count
    if engine == "hypothesis":
        made = drawn_by_hypothesis(seed, first, count, skip, run) + len(skip)
    else:
        for n in range(first, first + count):
            if n not in skip:
                run(n)
    return Runs(suspects, reached, tuple(skip), given_up=count - made)


def _explained(
    suspect: Suspect, release: str | Release, tick: Callable[[int], None]
) -> Suspect:
    # Nobody watches: these programs are carried out on kernels that nobody has.
    tick(int(suspect.seed.rpartition(":")[2]))
    without = silenced(release, suspect.off)
    return suspect._replace(explained=explanations(suspect.steps, suspect.causes, without))


def shrunk(
    suspect: Suspect,
    cause: Cause,
    release: str | Release,
    tick: Callable[[int], None] = _no_tick,
) -> Shrunk | None:
    """The shortest program; where hazards were off it has to speak with them as well.

    Where it does not, for one of them shows first, ``behind`` are those that have to be off.
    """
    steps, off = list(suspect.steps), suspect.off
    without = silenced(release, off) if off else None
    found = shrink(steps, cause, release, also=without, tick=tick)
    behind: tuple[str, ...] = ()
    if found is None and without:
        found = shrink(on_release(steps, without), cause, without, tick=tick)
        if found is not None:
            behind, problem = _hidden_by(*found, cause, release, off, tick)
            found = found[0], problem
    if found is None:
        return None
    steps, problem = found
    base = silenced(release, behind)
    silent = silencers(on_release(steps, base), cause, base, tick)
    return Shrunk(on_release(steps, release), problem, silent, behind)


def _hidden_by(
    steps: list[Step],
    problem: Problem,
    cause: Cause,
    release: str | Release,
    off: tuple[str, ...],
    tick: Callable[[int], None],
) -> tuple[tuple[str, ...], Problem]:
    # Of the switches that are on those that have to be, mostly none, else a smallest set; and what
    # is said with just these, in which addresses may be others.
    def says(names: tuple[str, ...]) -> Problem | None:
        tick(0)
        base = silenced(release, names)
        return speaks(on_release(steps, base), cause, base)

    if said := says(()):
        return (), said
    for name in off:
        less = tuple(other for other in off if other != name)
        if said := says(less):
            off, problem = less, said
    return off, problem


def do(spec: Spec, task: Task, tick: Callable[[int], None] = _no_tick) -> Any:
    """Carry a piece of work out."""
    if task.name == "runs":
        first, count, skip, off = task.args
        with watching(on=spec.watches) as watch:
            runs = run_unit(
                *(spec.seed, spec.scenario, spec.release, first, count, skip),
                *(tick, spec.engine, off),
            )
        return runs._replace(
            covered=watch.reached,
            suspects=[_explained(suspect, spec.release, tick) for suspect in runs.suspects],
        )
    if task.name == "shrink":
        suspect, cause = task.args
        return shrunk(suspect, cause, spec.release, tick)
    if task.name == "interleave":
        return interleave.carry_out(task.args[0], tick)
    assert task.name == "expand"
    kinds, keep = kinds_of(spec.scenario), keep_of(spec.scenario)
    found = []
    with watching(on=spec.watches) as watch:
        for program in task.args[0]:
            tick(0)
            found.append(list(expand(program, kinds, spec.release, keep)))
    return Expanded(found, watch.reached)
