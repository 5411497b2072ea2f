"""What suspects come to: findings, the same whoever made the runs and however fast.

Suspects that the same known hazards explain have a queue, in the order of the runs; so has each
cause that nothing explains. Who stands first is counted for a finding that says the same, or else
has to be shrunk before the queue goes on. Queues do not depend on each other, so several can be
shrunk at the same time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from khosim.explore.hazards import EARLIER, SWITCHES, silenced
from khosim.explore.shrink import Finding, on_release
from khosim.explore.work import Shrunk
from khosim.explore.world import LOADS, Step

if TYPE_CHECKING:
    from collections.abc import Iterable

    from khosim.explore.work import Cause, Suspect
    from khosim.kernel.behaviours import Release

__all__ = ("Answer", "Asked", "Keeper", "tags", "together")

_PER_CAUSE = 5
_PER_HAZARD = 2
"""Programs that are shrunk of one cause, and of what one known hazard explains."""
_TOLD_BY_LAST = ("memfd", "vmalloc", "token", "fallocate")
"""Kinds of steps whose last argument makes another program of it."""

Answer = Shrunk | None
"""What shrinking came to; nothing where the program did not show it again."""


class Asked(NamedTuple):
    """Which suspect is to be shrunk, and for which of its causes."""

    seed: str
    cause: Cause


def tags(steps: Iterable[Step]) -> frozenset[str]:
    """What a program is made of: kinds of steps, faults, and what changes from kernel to kernel."""
    found: set[str] = set()
    words: list[str] = []
    for step in steps:
        if step.kind in ("boot", *LOADS):
            now = (step.args[1] if step.kind == "boot" else step.args[0]).split()
            found |= {f"{step.kind}+{word.split('=')[0]}" for word in now if word not in words}
            found |= {f"kexec-{word.split('=')[0]}" for word in words if word not in now}
            words = now
        found.add(step.kind + ("!" if step.fault else ""))
        if step.kind in _TOLD_BY_LAST:
            found.add(f"{step.kind}:{step.args[-1]}")
    return frozenset(found - {"boot", "boot+kho", "boot+liveupdate", "kexec"})


class _Queue:
    """Suspects with one explanation that wait, and what is known of it."""

    __slots__ = ("asked", "counted", "known", "most", "waiting")

    def __init__(self, most: int) -> None:
        self.waiting: deque[tuple[Suspect, Cause]] = deque()
        self.known: list[Finding] = []
        self.counted: set[str] = set()
        """Runs that show it together with others, or once more than it has to be shrunk."""
        self.most = most
        self.asked = False

    @property
    def is_full(self) -> bool:
        """Whether no more is wanted: what may be of others leaves room for a plain program."""
        if self.most == _PER_CAUSE:
            return len(self.known) >= self.most
        plain = sum(found.is_plain for found in self.known)
        return plain >= self.most or len(self.known) >= 2 * self.most


class Keeper:
    """Takes suspects in the order of the runs, keeps findings."""

    def __init__(self, release: str | Release) -> None:
        self._release = release
        self._queues: dict[tuple[str, ...], _Queue] = {}
        self._places: dict[Asked, _Queue] = {}
        self._answers: dict[Asked, Answer] = {}
        self._wanted: deque[tuple[Asked, Suspect]] = deque()
        self.unshrunk = 0
        """Suspects that did not show it a second time."""
        self.unexplained = 0
        """Times that a cause with many findings already was shown by yet another program."""

    def take(self, suspect: Suspect) -> None:
        """The next suspect."""
        for cause, switches in suspect.told:
            alone = [self._queues[(name,)] for name in switches if (name,) in self._queues]
            if len(switches) > 1 and len(alone) == len(switches):
                for queue in alone:
                    queue.counted.add(suspect.seed)
                continue
            key = switches or ("", *cause)
            if key not in self._queues:
                self._queues[key] = _Queue(_PER_HAZARD if switches else _PER_CAUSE)
            queue = self._queues[key]
            queue.waiting.append((suspect, cause))
            if not queue.asked:
                self._settle(queue)

    def recall(self, asked: Asked, answer: Answer) -> None:
        """An answer from an earlier time, for whenever it will be asked."""
        self._answers[asked] = answer

    def next_wanted(self) -> tuple[Asked, Suspect] | None:
        """What is to be shrunk next, if anything is."""
        return self._wanted.popleft() if self._wanted else None

    @property
    def waits(self) -> int:
        """How many suspects nobody has looked into yet."""
        return sum(len(queue.waiting) for queue in self._queues.values())

    @property
    def is_settled(self) -> bool:
        """Whether all that was taken is looked into."""
        return not self._places

    @property
    def known(self) -> tuple[str, ...]:
        """The switches of hazards that were found, each by a program that is of nothing else."""
        told = {
            found.switches[0]
            for queue in self._queues.values()
            for found in queue.known
            if found.is_plain
        }
        return tuple(name for name in (*SWITCHES, *EARLIER) if name in told)

    def answer(self, asked: Asked, answer: Answer) -> None:
        """What shrinking came to."""
        self._answers[asked] = answer
        queue = self._places.pop(asked)
        queue.asked = False
        self._settle(queue)

    def _settle(self, queue: _Queue) -> None:
        while queue.waiting:
            suspect, cause = queue.waiting[0]
            asked = Asked(suspect.seed, cause)
            parts = tags(suspect.steps)
            explained = next((f for f in queue.known if f.kinds <= parts), None)
            if explained is not None:
                explained.runs.add(suspect.seed)
            elif queue.is_full:
                self.unexplained += queue.most == _PER_CAUSE
                queue.counted.add(suspect.seed)
            elif asked in self._answers:
                self._found(queue, suspect, cause, self._answers[asked])
            else:
                queue.asked = True
                self._places[asked] = queue
                self._wanted.append((asked, suspect))
                return
            queue.waiting.popleft()

    def _found(self, queue: _Queue, suspect: Suspect, cause: Cause, answer: Answer) -> None:
        if answer is None:
            self.unshrunk += 1
            return
        parts = tags(answer.steps)
        same = next((f for f in queue.known if f.kinds == parts), None)
        if same is not None:
            same.runs.add(suspect.seed)
            return
        release = silenced(self._release, answer.behind)
        steps = on_release(answer.steps, release) if answer.behind else list(answer.steps)
        found = Finding(answer.problem, cause[1], steps, suspect.seed, release, kinds=parts)
        found.behind, found.switches = answer.behind, answer.switches
        found.runs.add(suspect.seed)
        queue.known.append(found)

    def findings(self) -> list[Finding]:
        """All of them, each cause for itself, in the order of the runs that they are from."""
        for queue in self._queues.values():
            if queue.known and queue.most == _PER_HAZARD:
                queue.known[0].runs |= queue.counted
        every = [found for queue in self._queues.values() for found in queue.known]
        return sorted(every, key=lambda f: (_place(f.seed), f.invariant, f.shape))


def _place(seed: str) -> tuple[str, int]:
    name, _, number = seed.rpartition(":")
    return name, int(number)


def together(findings: Iterable[Finding]) -> list[Finding]:
    """Findings put together by cause.

    Known hazards are told by the switches that make them silent: what one of them explains belongs
    to it, also where another would do as well. What nothing explains is told by what spoke, the
    call with which it did, and whose page it is about, or by an equal program. Of each cause the
    shortest program is kept, and who else says so.
    """
    groups: dict[frozenset[str], list[Finding]] = {}
    known: dict[frozenset[str], frozenset[str]] = {}
    for found in sorted(findings, key=lambda f: (len(f.switches), _place(f.seed))):
        key = frozenset(found.switches)
        if key:
            key = next((k for k in groups if k <= key and "new" not in k), key)
        else:
            names = frozenset(("new", *_where(found))), frozenset(("new", *found.kinds))
            key = next((known[name] for name in names if name in known), names[0])
            known.update(dict.fromkeys(names, key))
        groups.setdefault(key, []).append(found)
    return sorted(map(_joined, groups.values()), key=lambda f: _place(f.seed))


def _where(found: Finding) -> tuple[str, ...]:
    # Numbers in front, since a set of these is what is compared.
    at = min(found.problem.at, len(found.steps) - 1)
    parts = (found.invariant, found.shape, found.steps[at].kind, found.problem.owner)
    return tuple(f"{n} {part}" for n, part in enumerate(parts))


def _joined(group: list[Finding]) -> Finding:
    # What nothing hides, the fewest steps, the fewest faults; among equals the first run.
    def length(found: Finding) -> tuple[int, int, int, int, tuple[str, int]]:
        faults = sum(bool(step.fault) for step in found.steps)
        line = sum(len(str(step.args)) for step in found.steps)
        return len(found.behind), len(found.steps), faults, line, _place(found.seed)

    best = min(group, key=length)
    others = {found.invariant for found in group} - {best.invariant}
    runs = set().union(*(found.runs for found in group))
    joined = replace(best)
    joined.runs, joined.also = runs, tuple(sorted(others))
    joined.switches = min((f.switches for f in group), key=len)
    return joined
