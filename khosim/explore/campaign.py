"""A campaign: many runs of one seed, and what they found, told by cause.

A unit of work (:func:`run_unit`) is a seed, a scenario and numbers of runs: plain data, so that it
can be sent to another process. What comes back is put together in the order of the runs, whoever
made them, so that equal seeds give equal findings.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from khosim.explore.exhaust import Exhausted, exhaust
from khosim.explore.program import tell
from khosim.explore.search import KINDS, SCENARIOS, random_run
from khosim.explore.shrink import Finding, cause_of, shrink

if TYPE_CHECKING:
    from collections.abc import Callable

    from khosim.explore.kinds import Args, Kind
    from khosim.explore.world import Step, World
    from khosim.kernel.behaviours import Release

__all__ = ("Campaign", "Suspect", "run_unit", "tags")

_PER_CAUSE = 5
_TOLD_BY_LAST = ("memfd", "vmalloc", "token", "fallocate")
"""Kinds of steps whose last argument makes another program of it."""


class Suspect(NamedTuple):
    """A run in which something spoke: enough to run it again."""

    seed: str
    steps: tuple[Step, ...]
    causes: tuple[tuple[str, str], ...]


def run_unit(
    seed: str, scenario: str, release: str | Release, first: int, count: int
) -> tuple[list[Suspect], set[str]]:
    """Make ``count`` runs from number ``first`` on: the suspects, and the kinds of steps taken."""
    suspects, reached = [], set()
    for n in range(first, first + count):
        name = f"{seed}:{n}"
        world = random_run(name, scenario, release)
        reached |= {step.kind for step in world.steps}
        causes = tuple(dict.fromkeys(cause_of(problem) for problem in world.problems))
        if causes:
            suspects.append(Suspect(name, tuple(world.steps), causes))
    return suspects, reached


def tags(steps: tuple[Step, ...] | list[Step]) -> frozenset[str]:
    """What a program is made of: kinds of steps, faults, and what changes from kernel to kernel."""
    found: set[str] = set()
    words: list[str] = []
    for step in steps:
        if step.kind in ("boot", "kexec"):
            now = (step.args[1] if step.kind == "boot" else step.args[0]).split()
            found |= {f"{step.kind}+{word.split('=')[0]}" for word in now if word not in words}
            found |= {f"kexec-{word.split('=')[0]}" for word in words if word not in now}
            words = now
        found.add(step.kind + ("!" if step.fault else ""))
        if step.kind in _TOLD_BY_LAST:
            found.add(f"{step.kind}:{step.args[-1]}")
    return frozenset(found - {"boot", "boot+kho", "boot+liveupdate", "kexec"})


class Campaign:
    """Takes suspects in, keeps findings. ``explored`` counts runs."""

    def __init__(self, seed: str, scenario: str, release: str | Release) -> None:
        self.seed = seed
        self.scenario = scenario
        self.release = release
        self.explored = 0
        self.unshrunk = 0
        """Suspects that did not show it a second time."""
        self.reached: set[str] = set()
        self.findings: list[Finding] = []

    def run(
        self,
        *,
        runs: int | None = None,
        seconds: float | None = None,
        progress: Callable[[Campaign], None] | None = None,
    ) -> None:
        """Go on until ``runs`` were made or the time is up."""
        end = None if seconds is None else time.monotonic() + seconds
        while (runs is None or self.explored < runs) and (end is None or time.monotonic() < end):
            suspects, reached = run_unit(self.seed, self.scenario, self.release, self.explored, 1)
            self.explored += 1
            self.reached |= reached
            for suspect in suspects:
                self.take(suspect)
            if progress is not None:
                progress(self)

    def exhaust(self, depth: int, *, states_max: int = 100_000) -> Exhausted:
        """Every program of up to ``depth`` steps after the boot, equal states once."""
        groups = ("", *SCENARIOS[self.scenario])
        kinds = [kind for kind in KINDS.values() if kind.weight and kind.group in groups]
        odd = "successors" in groups

        def keep(world: World, kind: Kind, args: Args) -> bool:
            return odd or kind.name != "kexec" or args[0] == world.cmdline

        done = exhaust(kinds, depth, self.release, states_max=states_max, keep=keep)
        self.explored += done.runs
        for steps, problems in done.suspects:
            causes = tuple(dict.fromkeys(cause_of(problem) for problem in problems))
            self.take(Suspect(f"exhaustive:{depth}", tuple(steps), causes))
        return done

    def take(self, suspect: Suspect) -> None:
        """Shrink what is new, count what is known."""
        parts = tags(suspect.steps)
        for cause in suspect.causes:
            known = [f for f in self.findings if (f.invariant, f.shape) == cause]
            explained = next((f for f in known if f.kinds <= parts), None)
            if explained is not None:
                explained.count += 1
            elif len(known) < _PER_CAUSE:
                self._shrink(suspect, cause, known)

    def _shrink(self, suspect: Suspect, cause: tuple[str, str], known: list[Finding]) -> None:
        shrunk = shrink(list(suspect.steps), cause, self.release)
        if shrunk is None:
            self.unshrunk += 1
            return
        steps, problem = shrunk
        parts = tags(steps)
        same = next((f for f in known if f.kinds == parts), None)
        if same is not None:
            same.count += 1
            return
        self.findings.append(
            Finding(problem, cause[1], steps, suspect.seed, self.release, kinds=parts)
        )

    def as_json(self) -> dict[str, Any]:
        """``explored`` and ``findings``, as printed."""
        return {
            "scenario": self.scenario,
            "release": str(getattr(self.release, "name", self.release)),
            "seed": self.seed,
            "explored": self.explored,
            "findings": [self._told(finding) for finding in self.findings],
        }

    def _told(self, finding: Finding) -> dict[str, Any]:
        told = tell(finding.steps, finding.problem, self.release)
        return {
            "invariant": finding.invariant,
            "message": finding.problem.message,
            "count": finding.count,
            "seed": finding.seed,
            "program": told.program,
            "trace": told.trace,
        }
