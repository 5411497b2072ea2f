"""How many programs a search tries: against handing over once, and with a second worker.

Random runs and exhaustive states are told as the time of one, in bare handovers of the same machine
(boot, kexec, every invariant), which is what a program can't do without. Two workers are measured
against one of the same kind, once both have started.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.harness import Context, Record
from khosim import Machine
from khosim.explore.crew import Workers
from khosim.explore.exhaust import exhaust, keep_of, kinds_of
from khosim.explore.hazards import fixed
from khosim.explore.work import Spec, Task, run_unit

__all__ = ("explore",)

_SCENARIOS = ("sessions", "reserve-mem", "vmalloc")
_RUNS = 20
_CHUNKS = 12


def _handover() -> None:
    with Machine("64M") as machine:
        machine.boot(cmdline="kho=on liveupdate=on").kexec()
        machine.check()


def explore(context: Context) -> Iterator[Record]:
    """Random runs, states of an exhaustive search, and what a second worker brings."""
    release = fixed("7.3")
    _handover()
    for scenario in _SCENARIOS:
        record = context.ratio(
            f"explore.random.{scenario}",
            partial(run_unit, "0", scenario, release, 0, _RUNS),
            partial(_repeated, _handover, _RUNS),
            baseline="as many handovers of nothing",
            limit=8,
            rounds=3,
        )
        yield _rated(record, _RUNS, "runs")
    kinds, keep = kinds_of("subtrees"), keep_of("subtrees")
    states = exhaust(kinds, 1, release, keep=keep).states
    record = context.ratio(
        "explore.exhaustive.subtrees",
        lambda: exhaust(kinds, 1, release, keep=keep),
        partial(_repeated, _handover, states),
        baseline="as many handovers of nothing",
        limit=8,
        rounds=3,
    )
    yield _rated(record, states, "states")
    yield _scaling(context)


def _repeated(action: Callable[[], None], times: int) -> None:
    for _ in range(times):
        action()


def _rated(record: Record, count: int, what: str) -> Record:
    assert record.measured is not None
    note = f"{count / record.measured:.0f} {what} a second"
    return Record(**{**{name: getattr(record, name) for name in record.__slots__}, "note": note})


def _scaling(context: Context) -> Record:
    one, two = (_seconds(jobs, context) for jobs in (1, 2))
    return Record(
        name="explore.two-workers",
        baseline="one worker",
        measured=two,
        against=one,
        limit=1 / 1.7,
        note=f"{one / two:.2f} times as many runs, on two free cores",
    )


def _seconds(jobs: int, context: Context) -> float:
    # The time of some chunks, once all workers have done one.
    crew = Workers(Spec("sessions", fixed("7.3"), "0"), jobs, lambda line: None)
    try:
        _run(crew, jobs)
        chunks = _CHUNKS // 3 if context.quick else _CHUNKS
        start = time.perf_counter()
        _run(crew, chunks)
        return time.perf_counter() - start
    finally:
        crew.close()


def _run(crew: Workers, chunks: int) -> None:
    given = done = 0
    while done < chunks:
        while given < min(chunks, done + crew.width):
            crew.submit(given, Task("runs", (given * _RUNS, _RUNS, (), ())))
            given += 1
        done += len(crew.wait(1))
