"""A campaign: many runs of one seed, and what they found, told by cause.

The work is cut into pieces (:mod:`khosim.explore.work`) that a crew does in any order
(:mod:`khosim.explore.crew`). What comes back is put together in the order of the runs
(:mod:`khosim.explore.keeper`), so that equal seeds give equal findings whoever did the work. With a
corpus (:mod:`khosim.explore.corpus`) each finished piece is written down, and not done again.
"""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING, Any

from khosim.errors import InputError
from khosim.explore import record
from khosim.explore.coverage import Reached
from khosim.explore.crew import Inline
from khosim.explore.engine import DRAWN_TOGETHER
from khosim.explore.exhaust import Exhausted, Frontier
from khosim.explore.keeper import Asked, Keeper, tags, together
from khosim.explore.program import tell
from khosim.explore.shrink import Finding, cause_of
from khosim.explore.work import Runs, Spec, Suspect, Task, run_unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from khosim.explore.corpus import Corpus
    from khosim.explore.crew import Crew
    from khosim.explore.program import Told
    from khosim.kernel.behaviours import Release

__all__ = ("CHUNK", "Campaign", "Suspect", "run_unit", "tags")

CHUNK = DRAWN_TOGETHER
"""Runs in one piece of work."""
_ROUND = 10 * CHUNK
"""Runs until a campaign looks at what it found, whole pieces; then again after as many more."""
_PROGRAMS = 4
"""Programs to go on from in one piece of an exhaustive search."""
_LOOK_AGAIN = 0.5
"""Seconds until a campaign looks whether it is to stop."""


class Campaign:
    """Runs, and keeps what was found. ``explored`` counts the programs that were run."""

    def __init__(
        self,
        seed: str,
        scenario: str,
        release: str | Release,
        *,
        crew: Crew | None = None,
        corpus: Corpus | None = None,
        progress: Callable[[Campaign], None] = lambda campaign: None,
        stops: Callable[[], bool] = lambda: False,
        engine: str = "plain",
    ) -> None:
        self.spec = Spec(scenario, release, seed, engine=engine)
        self.crew = crew or Inline(self.spec)
        self.corpus = corpus
        self.progress = progress
        self.stops = stops
        self.explored = 0
        self.is_interrupted = False
        self.exhausted: tuple[int, Exhausted] | None = None
        """The depth and the end of a search through all programs, if this is one."""
        self.lost: list[int] = []
        """Runs that ended every worker that tried."""
        self.reached: set[str] = set()
        self.covered = Reached()
        """What the runs reached of the kernel; those that a corpus told of were not watched."""
        self.keeper = Keeper(release)
        self._chunks: dict[int, tuple[int, Runs]] = {}
        self._next = 0
        self._round_end = _ROUND
        self._off: tuple[str, ...] = ()
        """Known hazards that it has found, which are off in the runs of this round."""
        self._children: dict[tuple[int, int], Any] = {}
        self._programs: dict[str, Told] = {}
        if corpus is not None:
            self._recall(corpus)

    @property
    def done(self) -> int:
        """Programs that were run, counting those whose turn has not come."""
        return self.explored + sum(count for count, _ in self._chunks.values())

    @property
    def findings(self) -> list[Finding]:
        """What was found, put together by cause."""
        return together(self.keeper.findings())

    # -- random programs -------------------------------------------------------------------------

    def run(self, *, runs: int | None = None, seconds: float | None = None) -> None:
        """Go on until ``runs`` were made or the time is up."""
        end = None if seconds is None else time.monotonic() + seconds
        chunks = self._missing(runs, set(self._runs()))
        ahead: list[tuple[int, int]] = []

        def more() -> tuple[Any, Task] | None:
            if end is not None and time.monotonic() >= end:
                return None
            ahead.extend(islice(chunks, 1 - len(ahead)))
            if not ahead or ahead[0][0] >= self._round_end:
                return None
            chunk = ahead.pop()
            return chunk, Task("runs", (*chunk, (), self._off))

        held = max(self._runs(), default=-1) + 1
        if runs is not None and held > runs:
            raise InputError("--runs", f"the corpus holds {held} runs already")
        self._merge()
        self._go(more, self._ran)
        for first in sorted(self._chunks):  # after an interruption there may be gaps
            self._take(*self._chunks.pop(first))
        self._finish()

    def _runs(self) -> Iterator[int]:
        # The numbers of all runs that a corpus told of.
        for first, (count, _) in self._chunks.items():
            yield from range(first, first + count)

    def _missing(self, runs: int | None, done: set[int]) -> Iterator[tuple[int, int]]:
        # (first, count) of what was not done yet.
        first = 0
        while runs is None or first < runs:
            end = first - first % CHUNK + CHUNK
            end = end if runs is None else min(end, runs)
            count = 0
            while first + count < end and first + count not in done:
                count += 1
            if count:
                yield first, count
            first += count or 1

    def _ran(self, key: Any, result: Runs) -> None:
        first, count = key
        if self.corpus is not None:
            self.corpus.done(record.of_runs(first, count, result, self.spec.release))
        self._chunks[first] = (count, result)
        self._merge()

    def _merge(self) -> None:
        # What a round's runs are made with, all of the rounds before have to do with.
        while True:
            while self._next < self._round_end and self._next in self._chunks:
                count, result = self._chunks.pop(self._next)
                self._next += count
                self._take(count, result)
            if self._next < self._round_end or not self.keeper.is_settled:
                return
            self._off = self.keeper.known
            self._round_end *= 2

    def _take(self, count: int, result: Runs) -> None:
        self.explored += count - len(result.lost) - result.given_up
        self.lost += result.lost
        self.reached |= result.reached
        self.covered |= result.covered
        for suspect in result.suspects:
            self.keeper.take(suspect)

    # -- all programs ----------------------------------------------------------------------------

    def exhaust(self, depth: int, *, states_max: int = 100_000) -> Exhausted:
        """Every program of up to ``depth`` steps after the boot, equal states once."""
        frontier = Frontier(self.spec.release, states_max)
        taken = 0
        for level in range(depth):
            self._level(level, frontier)
            self.explored = frontier.runs
            for steps, problems in frontier.suspects[taken:]:
                causes = tuple(dict.fromkeys(cause_of(problem) for problem in problems))
                name = f"exhaustive:{depth}:{taken}"
                self.keeper.take(Suspect(name, tuple(steps), causes))
                taken += 1
            self._go(lambda: None, self._expanded)
            if self.is_interrupted or frontier.is_full:
                break
            frontier.deeper()
        done = frontier.done()
        done = done._replace(is_complete=done.is_complete and not self.is_interrupted)
        self.exhausted = depth, done
        self._finish()
        return done

    def _level(self, level: int, frontier: Frontier) -> None:
        firsts = iter(range(0, len(frontier.level), _PROGRAMS))

        def more() -> tuple[Any, Task] | None:
            for first in firsts:
                if (level, first) not in self._children:
                    programs = frontier.level[first : first + _PROGRAMS]
                    return (level, first), Task("expand", (programs,))
            return None

        self._go(more, self._expanded)
        for first in range(0, len(frontier.level), _PROGRAMS):
            found = self._children.pop((level, first), [])
            for program, children in zip(frontier.level[first:], found, strict=False):
                frontier.take(program, children)

    def _expanded(self, key: Any, result: Any) -> None:
        if self.corpus is not None:
            self.corpus.done(record.of_children(key, result.found, self.spec.release))
        self.covered |= result.covered
        self._children[key] = result.found

    # -- the work --------------------------------------------------------------------------------

    def _go(
        self,
        more: Callable[[], tuple[Any, Task] | None],
        take: Callable[[Any, Any], None],
    ) -> None:
        try:
            self._work(more, take)
        except BaseException:
            self.crew.close()
            raise

    def _work(
        self,
        more: Callable[[], tuple[Any, Task] | None],
        take: Callable[[Any, Any], None],
    ) -> None:
        # Shrinking first, which others wait for; then whatever there is more to do.
        asked: dict[int, tuple[Any, bool]] = {}
        number = 0
        while not self.is_interrupted:
            while len(asked) < self.crew.width:
                found = self._to_shrink() or more()
                if found is None:
                    break
                key, task = found
                asked[number] = key, task.name == "shrink"
                self.crew.submit(number, task)
                number += 1
            if not asked:
                return
            for done, result in self.crew.wait(_LOOK_AGAIN):
                key, is_shrunk = asked.pop(done)
                (self._shrunk if is_shrunk else take)(key, result)
            self.progress(self)
            if self.stops():
                self.is_interrupted = True

    def _to_shrink(self) -> tuple[Any, Task] | None:
        wanted = self.keeper.next_wanted()
        if wanted is None:
            return None
        asked, suspect = wanted
        return asked, Task("shrink", (suspect, asked.cause))

    def _shrunk(self, asked: Asked, answer: Any) -> None:
        if self.corpus is not None:
            self.corpus.done(record.of_answer(asked, answer, self.spec.release))
        self.keeper.answer(asked, answer)
        self._merge()
        self._write()

    def _recall(self, corpus: Corpus) -> None:
        release = self.spec.release
        held: set[int] = set()
        for place, line in corpus.lines():
            if "shrunk" in line:
                self.keeper.recall(*record.to_answer(line, release, place))
            elif "expand" in line:
                key, children = record.to_children(line, release, place)
                self._children[key] = children
            else:
                first, count, result = record.to_runs(line, self.spec, place)
                if not held.isdisjoint(range(first, first + count)):
                    raise InputError(place, "runs that a line before it has as well")
                held |= {*range(first, first + count)}
                self._chunks[first] = (count, result)

    def _finish(self) -> None:
        self.crew.close()
        self._write()
        if self.corpus is not None and not self.is_interrupted:
            self.corpus.complete()

    def _write(self) -> None:
        if self.corpus is not None:
            told = [self._told(finding) for finding in self.findings]
            self.corpus.tell({one["id"]: one for one in told})

    # -- telling ---------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        """``explored`` and ``findings``, as printed."""
        result: dict[str, Any] = {
            "scenario": self.spec.scenario,
            "release": str(getattr(self.spec.release, "name", self.spec.release)),
            "seed": self.spec.seed,
            "explored": self.explored,
            "findings": [self._told(finding) for finding in self.findings],
        }
        if self.exhausted is not None:
            depth, done = self.exhausted
            result |= {"exhaustive": depth, "states": done.states, "is_complete": done.is_complete}
        if self.keeper.unexplained:
            result["unexplained"] = self.keeper.unexplained
        if self.lost:
            result["lost"] = sorted(self.lost)
        return result

    def _told(self, finding: Finding) -> dict[str, Any]:
        name = f"{finding.seed} {finding.invariant} {finding.shape}"
        if name not in self._programs:
            self._programs[name] = tell(finding.steps, finding.problem, finding.release)
        return record.of_finding(finding, self._programs[name])
