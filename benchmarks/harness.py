"""Timing, memory and the records that benchmarks yield.

Machines differ and get busy, so no figure stands alone: each is a ratio of two measurements that
took turns in one call, the best of several each. A limit is always an upper bound: "ten times
quicker than C" is a ratio of at most 0.1.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ParamSpec, TypeVar

from benchmarks.native import NativeRadix, NoCompiler, build_native

__all__ = (
    "Context",
    "Record",
    "best_of",
    "best_of_each",
    "in_child",
    "peak_resident_bytes",
    "resident_bytes",
    "start_python",
)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One figure: ``measured`` / ``against``, both in ``unit``.

    ``name`` is ``BENCHMARK.WHAT``, ``baseline`` says what ``against`` is, ``limit`` is the largest
    ratio that passes (None: for information). A record without measurements was skipped, and its
    ``note`` says why.
    """

    name: str
    baseline: str
    unit: str = "s"
    measured: float | None = None
    against: float | None = None
    limit: float | None = None
    note: str = ""

    @property
    def value(self) -> float | None:
        """The ratio; None where it was skipped."""
        if self.measured is None or not self.against:
            return None
        return self.measured / self.against

    @property
    def ok(self) -> bool | None:
        """Whether the ratio is within the limit; None where it was skipped or has no limit."""
        if self.value is None or self.limit is None:
            return None
        return self.value <= self.limit

    def as_json(self) -> dict[str, str | float | bool | None]:
        """Return the record as plain values, the ratio and the verdict included."""
        return {
            "name": self.name,
            "value": self.value,
            "limit": self.limit,
            "ok": self.ok,
            "unit": self.unit,
            "measured": self.measured,
            "against": self.against,
            "baseline": self.baseline,
            "note": self.note,
        }


class Context:
    """What a benchmark is handed: how thorough to be, and the yardsticks they share."""

    def __init__(self, *, quick: bool = False) -> None:
        self.quick = quick
        self.why_no_native = ""

    def rounds(self, thorough: int) -> int:
        """Return how often to measure: ``thorough`` times, a few in a quick call."""
        return min(thorough, 3) if self.quick else thorough

    def ratio(
        self,
        name: str,
        action: Callable[[], object],
        against: Callable[[], object],
        *,
        baseline: str,
        limit: float | None = None,
        rounds: int = 10,
        in_a_row: int = 1,
        note: str = "",
    ) -> Record:
        """Time ``action`` and ``against`` in turns and return the ratio of their best times.

        ``action`` is done ``in_a_row`` times in each turn, and counts as the mean of these.
        """

        def turn() -> None:
            for _ in range(in_a_row):
                action()

        measured, yardstick = best_of_each(turn, against, rounds=self.rounds(rounds))
        return Record(
            name=name,
            baseline=baseline,
            measured=measured / in_a_row,
            against=yardstick,
            limit=limit,
            note=note,
        )

    @cached_property
    def native(self) -> NativeRadix | None:
        """The C radix tree, compiled once; None without a compiler (:attr:`why_no_native`)."""
        try:
            return build_native()
        except NoCompiler as error:
            self.why_no_native = str(error)
            return None


def start_python(*args: str) -> None:
    """Start this interpreter with ``args`` (default: ``-c pass``) and wait until it ends."""
    command = [sys.executable, *(args or ("-c", "pass"))]
    # close_fds=False lets subprocess use vfork, whose cost does not grow with our own memory
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, close_fds=False)


def best_of(action: Callable[[], object], *, rounds: int) -> float:
    """Return the shortest time of ``action`` in seconds."""
    return min(_seconds(action) for _ in range(rounds))


def best_of_each(
    first: Callable[[], object], second: Callable[[], object], *, rounds: int
) -> tuple[float, float]:
    """Return the shortest time of each action in seconds; they take turns, so noise hits both."""
    pairs = [(_seconds(first), _seconds(second)) for _ in range(rounds)]
    return min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def resident_bytes() -> int:
    """Return the memory of this process that is resident now."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Return the most memory that was ever resident in this process."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"the kernel does not report {field}")


def in_child(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``function`` in a fresh process and return its result.

    The way to measure memory: nothing that ran before weighs in. Function, arguments and result
    must be picklable, so the function stands at the top of a module.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()
