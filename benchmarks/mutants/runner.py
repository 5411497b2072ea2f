"""Running tests against mutants, each in a fork of a process that has collected them.

Once, in a fork, all tests run under ``coverage``, which tells by line which tests get there, and
how long each takes. A mutant is then judged by those that reach its line, the quickest first, until
one fails. Nothing is imported or collected twice.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from itertools import accumulate
from pathlib import Path
from select import select
from typing import Any, NamedTuple

import pytest

from benchmarks.mutants.sample import Mutant, install

__all__ = ("Baseline", "Verdict", "with_tests")

_WALL_SECONDS = 600
_SPARE_CPU_SECONDS = 5
_TIMES_SLOWER = 3


class Baseline(NamedTuple):
    """``reached``: the tests (by number) that get to a line of a file; CPU ``seconds`` of each."""

    reached: dict[str, dict[int, list[int]]]
    seconds: list[float]
    failed: str


class Verdict(NamedTuple):
    """``outcome``: "killed" by a test, by "timeout", "unreached" by any test, or "survived"."""

    outcome: str
    by: str = ""
    tests: int = 0


class Session:
    """A pytest session whose tests are run at will. It is a plugin for :func:`pytest.main`."""

    def __init__(self, work: Callable[[Session], None]) -> None:
        self.items: list[pytest.Item] = []
        self._work = work
        self._failed = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Instead of running the tests."""
        self.items = list(session.items)
        self._work(self)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the first failure."""
        if report.failed and not self._failed:
            self._failed = report.nodeid

    def run(self, numbers: Sequence[int], before: Callable[[int], object] = int) -> str:
        """Run these tests here, until one fails: its name, or ""."""
        items = [self.items[number] for number in numbers]
        self._failed = ""
        for number, item, following in zip(numbers, items, [*items[1:], None], strict=True):
            before(number)
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            if self._failed:
                break
        return self._failed

    # -- the baseline -----------------------------------------------------------------------------

    def baseline(self, files: Sequence[Path]) -> Baseline:
        """Which test reaches which line of ``files``, told by a fork."""
        answer = _in_fork(lambda: self._measure(files), cpu_seconds=3600)
        if not isinstance(answer, Baseline):
            raise RuntimeError(f"the tests do not run without a mutant: {answer}")
        return answer

    def _measure(self, files: Sequence[Path]) -> Baseline:
        import coverage

        names = [str(file) for file in files]
        meter = coverage.Coverage(data_file=None, config_file=False, include=names)
        seconds = [0.0] * len(self.items)
        last: list[tuple[int, float]] = []

        def begin(number: int) -> None:
            now = time.process_time()
            if last:
                seconds[last[-1][0]] = now - last[-1][1]
            last.append((number, now))
            meter.switch_context(str(number))

        meter.start()
        failed = self.run(range(len(self.items)), begin)
        meter.stop()
        data = meter.get_data()
        reached = {
            name: {
                line: sorted(int(context) for context in contexts if context)
                for line, contexts in data.contexts_by_lineno(name).items()
            }
            for name in names
        }
        return Baseline(reached, seconds, failed)

    # -- mutants ----------------------------------------------------------------------------------

    def judge(
        self, mutant: Mutant, path: Path, baseline: Baseline, budget: float = float("inf")
    ) -> Verdict:
        """What the tests say to a mutant of the file ``path``, the quickest ones of ``budget``.

        ``budget`` are CPU seconds, as the tests take them without a mutant.
        """
        by_line = baseline.reached[str(path)]
        # A statement of several lines is known by its first one.
        lines = [n for n in range(mutant.line, mutant.first, -1) if by_line.get(n)][:1]
        numbers = sorted(by_line[lines[0]], key=lambda n: baseline.seconds[n]) if lines else []
        if not numbers:
            return Verdict("unreached")
        spent = list(accumulate(baseline.seconds[number] for number in numbers))
        numbers = numbers[: max(1, sum(so_far <= budget for so_far in spent))]
        expected = sum(baseline.seconds[number] for number in numbers)

        def work() -> str:
            install(mutant)
            return self.run(numbers)

        limit = int(_SPARE_CPU_SECONDS + _TIMES_SLOWER * expected)
        answer = _in_fork(work, cpu_seconds=limit)
        if answer is None:
            return Verdict("timeout", tests=len(numbers))
        return Verdict("killed" if answer else "survived", str(answer), len(numbers))


def _in_fork(work: Callable[[], Any], *, cpu_seconds: int) -> Any:
    """What ``work`` gives in a fork of this process; None where it used up its time or died."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(ours)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
        try:
            answer = work()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        with os.fdopen(theirs, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(theirs)
    parts = []
    end = time.monotonic() + max(_WALL_SECONDS, cpu_seconds)
    with os.fdopen(ours, "rb", buffering=0) as pipe:
        while select([pipe], [], [], max(0, end - time.monotonic()))[0]:
            part = pipe.read(1 << 16)
            if not part:
                break
            parts.append(part)
        else:
            os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    data = b"".join(parts)
    return pickle.loads(data) if data else None


def with_tests(files: Sequence[str], work: Callable[[Session], None]) -> None:
    """Collect the tests of ``files``, and do ``work`` with them."""
    session = Session(work)
    # khosim is imported long since, as pytest notices where it is installed with its plugin.
    known = "ignore::pytest.PytestAssertRewriteWarning"
    quiet = ["-q", "-s", "-p", "no:cacheprovider", "-n0", "-W", known, *files]
    with open(os.devnull, "w", encoding="utf-8") as nothing, redirect_stdout(nothing):
        status = pytest.main(quiet, plugins=[session])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest could not collect the tests: {status!r}")
