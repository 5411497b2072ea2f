"""``khosim explore HOST``: devices that act between any two events of a live update.

The other half of :mod:`khosim.cli.explore`: what is drawn here is no programme of calls, but when
which device does what while kernels come and go (:mod:`khosim.explore.interleave`).
"""

from __future__ import annotations

import argparse
import json
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from khosim.errors import InputError
from khosim.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from khosim.explore.crew import Crew
    from khosim.explore.interleave import Batch, Model, Plan, Said, Spoken

__all__ = ("Hosts", "check_options", "model_of", "tell")

_CHUNK = 40
_LOOK_AGAIN = 0.5
_COLUMNS = 80
_EXIT_INTERRUPTED = 130


class Finding(NamedTuple):
    """What speaks for one cause: how often, first in which plan, and the least of that plan."""

    said: Said
    times: int
    number: int
    plan: Plan


class Hosts:
    """A search on one host: ``explored`` plans, and what spoke in them by cause."""

    def __init__(self, model: Model, seed: str, crew: Crew, depth: int) -> None:
        self.model, self.seed, self.crew, self.depth = model, seed, crew, depth
        self.explored = 0
        self.lost = 0
        self.is_interrupted = False
        self.found: dict[tuple[str, str], Finding] = {}

    @property
    def done(self) -> int:
        """For the bar."""
        return self.explored

    @property
    def findings(self) -> list[Finding]:
        """In the order of the names of what spoke."""
        return [self.found[cause] for cause in sorted(self.found)]

    def run(
        self,
        more: Callable[[], int | None],
        stops: Callable[[], bool],
        show: Callable[[Hosts], None],
    ) -> None:
        """Carry plans out as long as ``more`` gives a number of them, then shrink what spoke."""
        from khosim.explore.work import Task

        results: dict[int, list[Spoken] | None] = {}
        sizes: dict[int, int] = {}
        for number, work in enumerate(self._batches(more)):
            while len(sizes) >= self.crew.width:
                self._wait(sizes, results, show)
                self.is_interrupted = self.is_interrupted or stops()
            if self.is_interrupted:
                break
            self.crew.submit(number, Task("interleave", (work,)))
            sizes[number] = work.nr_plans
        while sizes and not self.is_interrupted:
            self._wait(sizes, results, show)
            self.is_interrupted = stops()
        self.crew.close()
        for number in sorted(results):
            self._take(results[number])
        if not self.is_interrupted:
            self._shrink()

    def _batches(self, more: Callable[[], int | None]) -> Iterator[Batch]:
        from khosim.explore.interleave import Batch

        first = 0
        while (count := more()) is not None:
            yield Batch(self.model, self.seed, self.depth, first, count)
            first += count

    def _wait(
        self,
        sizes: dict[int, int],
        results: dict[int, list[Spoken] | None],
        show: Callable[[Hosts], None],
    ) -> None:
        for number, result in self.crew.wait(_LOOK_AGAIN):
            count = sizes.pop(number)
            results[number] = result
            if result is None:
                self.lost += count
            else:
                self.explored += count
        show(self)

    def _take(self, result: list[Spoken] | None) -> None:
        for number, plan, said in result or ():
            for one in {it.cause: it for it in reversed(said)}.values():
                old = self.found.get(one.cause)
                if old is None:
                    self.found[one.cause] = Finding(one, 1, number, plan)
                else:
                    self.found[one.cause] = old._replace(times=old.times + 1)

    def _shrink(self) -> None:
        from khosim.explore.interleave import run, shrink

        for cause, finding in self.found.items():
            plan = shrink(self.model, finding.plan, cause)
            said = next((it for it in run(self.model, plan) if it.cause == cause), finding.said)
            self.found[cause] = finding._replace(plan=plan, said=said)

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        from khosim.explore.interleave import moments, tell

        findings = []
        for said, times, number, plan in self.findings:
            program, trace = tell(self.model, plan)
            where = f"exhaustive:{self.depth}:{number}" if self.depth else f"{self.seed}:{number}"
            findings.append(
                {
                    "invariant": said.invariant,
                    "message": said.message,
                    "count": times,
                    "seed": where,
                    "program": program,
                    "trace": trace,
                }
            )
        result: dict[str, Any] = {
            "scenario": self.model.host,
            "release": self.model.release,
            "without": list(self.model.without),
            "seed": self.seed,
            "exhaustive": self.depth,
            "moments": moments(self.model),
            "explored": self.explored,
            "findings": findings,
        }
        return result | ({"lost": self.lost} if self.lost else {})


def check_options(args: argparse.Namespace) -> None:
    """Raise :class:`InputError` for an option that is not for hosts."""
    for option in ("corpus", "cluster", "coverage", "fixed"):
        if getattr(args, option):
            raise InputError(f"--{option}", f"not for {args.scenario}, whose kernels are its own")
    if args.engine != "plain":
        raise InputError("--engine", f"not for {args.scenario}")


def model_of(args: argparse.Namespace) -> Model:
    """The model that was asked for; raises :class:`InputError`."""
    from khosim.explore.interleave import Model, check_model

    pieces = [piece for text in args.without or () for piece in text.split(",")]
    model = Model(args.scenario, args.release, tuple(dict.fromkeys(pieces)))
    check_model(model)
    return model


def counter(total: int) -> Callable[[], int | None]:
    """Pieces of work until so many plans were given out."""
    left = [total]

    def more() -> int | None:
        count = min(_CHUNK, left[0])
        left[0] -= count
        return count or None

    return more


def tell(search: Hosts, *, as_json: bool) -> int:
    """Print it; the exit status."""
    result = search.as_json()
    print(json.dumps(result, indent=1) if as_json else printable(_text(result)), end="")
    if as_json:
        print()
    if search.is_interrupted:
        return _EXIT_INTERRUPTED
    return 1 if result["findings"] else 0


def _text(result: dict[str, Any]) -> str:
    without = f" without {', '.join(result['without'])}" if result["without"] else ""
    depth, findings = result["exhaustive"], result["findings"]
    how = f"every one to depth {depth}" if depth else f"seed {result['seed']}"
    spoke = ", ".join(dict.fromkeys(finding["invariant"] for finding in findings))
    lines = wrap(
        f"{result['explored']} interleavings of {result['scenario']}{without} on Linux "
        f"{result['release']}, {how}, {result['moments']} moments in a live update: "
        + (f"{spoke} spoke" if spoke else "nothing spoke"),
        _COLUMNS,
    )
    if "lost" in result:
        lines.append(f"left out, for they end their workers: {result['lost']}")
    for n, finding in enumerate(findings, 1):
        where = f"in {finding['count']} of them, first in {finding['seed']}"
        lines += ["", f"-- {n}. {finding['invariant']}", where]
        lines += wrap(finding["message"], _COLUMNS)
        lines += ["", *(f"    {line}".rstrip() for line in finding["program"].splitlines())]
        lines += [""] if finding["trace"] else []
        for event in finding["trace"]:
            first, *more = wrap(event, _COLUMNS - 8)
            lines += [f"    | {first}", *(f"    |   {line}" for line in more)]
    return "\n".join(lines) + "\n"
