"""Findings: what spoke, told by cause, with the shortest program that still makes it speak."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from khosim.explore.hazards import like
from khosim.explore.limits import BY_THE_CLOCK, alarm
from khosim.explore.search import KINDS, replay
from khosim.explore.world import LOADS, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from khosim.explore.world import Problem
    from khosim.kernel.behaviours import Release

__all__ = ("Finding", "cause_of", "on_release", "shape", "shrink", "speaks")

_NUMBERS = re.compile(r"0x[0-9a-f]+|(?<=pfn:)[0-9a-f]+|\b\d+\b|\b[a-z]\d+(?=_|\b)")
_QUOTED = re.compile(r"'[^']*'")
_EVALUATIONS_MAX = 150
_OTHER = 'release="'
"""Begins what a step says of a successor of another release."""
_SMALL = "reserve_mem=4096:4096:"
"""The simplest region: a page."""


@dataclass
class Finding:
    """What spoke with the shortest program: one cause, until findings are put together.

    ``first`` are the runs in which it spoke, by their numbers; ``switches`` the known hazards that
    make it silent; ``also`` the other invariants that say the same. ``behind`` are known hazards
    that hide it: ``release`` is the campaign's with these switched off.
    """

    problem: Problem
    shape: str
    steps: list[Step]
    seed: str
    release: str | Release
    behind: tuple[str, ...] = ()
    kinds: frozenset[str] = field(default_factory=frozenset)
    runs: set[str] = field(default_factory=set)
    switches: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    @property
    def invariant(self) -> str:
        """Which invariant spoke."""
        return self.problem.invariant

    @property
    def is_plain(self) -> bool:
        """Whether one known hazard explains it, and no other: nor does one hide it."""
        return len(self.switches) == 1 and not self.behind

    @property
    def count(self) -> int:
        """In how many programs it spoke."""
        return len(self.runs)


def shape(text: str) -> str:
    """Words without numbers, names and addresses."""
    return _QUOTED.sub("'...'", _NUMBERS.sub("#", text))[:160]


def cause_of(problem: Problem) -> tuple[str, str]:
    """What findings are grouped by before they are shrunk."""
    return problem.invariant, shape(problem.message)


def on_release(steps: Sequence[Step], release: str | Release) -> list[Step]:
    """The same program, booted on another release.

    Successors that are of a release of their own get the switches that ``release`` has.
    """
    boot = steps[0]
    told = [boot._replace(args=(*boot.args[:2], release, *boot.args[3:]))]
    for step in steps[1:]:
        option = step.args[-1] if step.kind in LOADS else ""
        if option.startswith(_OTHER):
            base = option.removeprefix(_OTHER).rstrip('"').partition("+")[0]
            step = step._replace(args=(*step.args[:-1], f'{_OTHER}{like(release, base)}"'))
        told.append(step)
    return told


def speaks(steps: Sequence[Step], cause: tuple[str, str], release: str | Release) -> Problem | None:
    """The first problem of that cause in a program; None also where it is not lawful."""
    with alarm():
        world = replay(steps, release)
    if world is None:
        return None
    found = next((problem for problem in world.problems if cause_of(problem) == cause), None)
    world.close()
    return found


def shrink(
    steps: list[Step],
    cause: tuple[str, str],
    release: str | Release,
    *,
    also: str | Release | None = None,
    tick: Callable[[int], None] = lambda number: None,
) -> tuple[list[Step], Problem] | None:
    """The shortest lawful part of a program in which ``cause`` speaks, with simple arguments.

    None where the program as it stands does not show it again. ``tick`` is called before each try.
    With ``also`` it has to speak on that release as well.
    """
    budget = [_EVALUATIONS_MAX]

    def shows(some: list[Step]) -> Problem | None:
        budget[0] -= _EVALUATIONS_MAX // 3 if BY_THE_CLOCK in cause[1] else 1
        tick(budget[0])
        problem = speaks(some, cause, release)
        if problem and also and not speaks(on_release(some, also), cause, also):
            return None
        return problem

    best = shows(steps)
    if best is None:
        return None
    changed = True
    while changed and budget[0] > 0:
        changed = False
        for passes in (_without_name, _without_some, _without_fault, _short_text, _simpler):
            at = 0
            while budget[0] > 0:
                candidates = passes(steps, at)
                if candidates is None:
                    break
                at += 1
                for candidate in candidates:
                    problem = shows(candidate)
                    if problem is not None:
                        steps, best, changed, at = candidate, problem, True, at - 1
                        break
                    if budget[0] <= 0:
                        break
    return steps, best


def _without_name(steps: list[Step], at: int) -> list[list[Step]] | None:
    # All that has to do with one variable, the last one first.
    names = [step.args[0] for step in steps if KINDS[step.kind].letter][::-1]
    if at >= len(names):
        return None
    return [[step for step in steps if names[at] not in step.args]]


def _without_some(steps: list[Step], at: int) -> list[list[Step]] | None:
    # Some steps in a row: a quarter of all, then single ones, from the end.
    sizes = [size for size in (len(steps) // 2, len(steps) // 4, 1) if size]
    places = [(size, start) for size in sizes for start in range(len(steps) - size, 0, -size)]
    if at >= len(places):
        return None
    size, start = places[at]
    return [steps[:start] + steps[start + size :]]


def _short_text(steps: list[Step], at: int) -> list[list[Step]] | None:
    # A long name becomes a short one in all steps.
    words = {a for step in steps for a in step.args if isinstance(a, str)}
    texts = sorted(word for word in words if set(word) == {"x"})
    if at >= len(texts):
        return None
    return [[s._replace(args=tuple("vm" if a == texts[at] else a for a in s.args)) for s in steps]]


def _without_fault(steps: list[Step], at: int) -> list[list[Step]] | None:
    if at >= len(steps):
        return None
    if not steps[at].fault:
        return []
    return [[*steps[:at], steps[at]._replace(fault=0, boot=False), *steps[at + 1 :]]]


def _simpler(steps: list[Step], at: int) -> Iterator[list[Step]] | None:
    return None if at >= len(steps) else _simpler_step(steps, at)


def _simpler_step(steps: list[Step], i: int) -> Iterator[list[Step]]:
    # Every lawful alternative that comes earlier in the kind's own list of choices.
    step = steps[i]
    kind = KINDS[step.kind]
    if step.kind == "boot":
        spec, line, release = step.args
        if spec != '"64M"':
            yield [step._replace(args=('"64M"', line, release)), *steps[1:]]
        words = line.split()
        for n in range(len(words)):
            less = " ".join(words[:n] + words[n + 1 :])
            yield [step._replace(args=(spec, less, release)), *_retold(steps[1:], words[n])]
        for word in words:
            if word.startswith("reserve_mem=") and not word.startswith(_SMALL):
                small = f"{_SMALL}{word.rsplit(':', 1)[1]}"
                yield _reworded(steps, word, small)
        return
    if step.fault > 1:
        for fault in range(1, step.fault):
            yield [*steps[:i], step._replace(fault=fault), *steps[i + 1 :]]
    if step.kind in LOADS:
        yield from _simpler_successor(steps, i)
        return
    if step.kind == "jump":
        yield from _loaded_late(steps, i)
        return
    if not kind.letter:
        return
    world = replay(steps[:i])
    if world is None or world.is_over:
        return
    for args in kind.choices(world)[:8]:
        args = (step.args[0], *args[1:])
        if args == step.args:
            break
        yield [*steps[:i], step._replace(args=args), *steps[i + 1 :]]


def _simpler_successor(steps: list[Step], i: int) -> Iterator[list[Step]]:
    # The same command line again; else one that differs in fewer words from the one before.
    lines = [s.args[1] if s.kind == "boot" else s.args[0] for s in steps[:i] if _has_line(s)]
    before, words = lines[-1].split(), steps[i].args[0].split()
    if words == before:
        return
    yield [*steps[:i], steps[i]._replace(args=(lines[-1],)), *steps[i + 1 :]]
    for word in words:
        if word not in before:
            less = " ".join(w for w in words if w != word)
            yield [*steps[:i], steps[i]._replace(args=(less,)), *_retold(steps[i + 1 :], word)]
    for word in before:
        if word not in words:
            more = " ".join([*words, word])
            yield [*steps[:i], steps[i]._replace(args=(more,)), *steps[i + 1 :]]


def _loaded_late(steps: list[Step], i: int) -> Iterator[list[Step]]:
    # A kexec, which loads its image where it jumps.
    for at in reversed(range(i)):
        if steps[at].kind == "load_image":
            kexec = Step("kexec", steps[at].args, *steps[i][2:])
            yield [*steps[:at], *steps[at + 1 : i], kexec, *steps[i + 1 :]]
            return


def _has_line(step: Step) -> bool:
    return step.kind in ("boot", *LOADS)


def _reworded(steps: list[Step], word: str, new: str) -> list[Step]:
    # The same program with one word of its command lines replaced.
    told = []
    for step in steps:
        if _has_line(step):
            at = 1 if step.kind == "boot" else 0
            line = " ".join(new if w == word else w for w in step.args[at].split())
            step = step._replace(args=(*step.args[:at], line, *step.args[at + 1 :]))
        told.append(step)
    return told


def _retold(steps: list[Step], word: str) -> list[Step]:
    # Later command lines without that word as well.
    told = []
    for step in steps:
        if step.kind in LOADS:
            line = " ".join(w for w in step.args[0].split() if w != word)
            step = step._replace(args=(line,))
        told.append(step)
    return told
