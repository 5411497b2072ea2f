"""How far a campaign is: a bar on stderr, where that is a terminal, and lines about workers."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ("Bar", "shown")


class Search(Protocol):
    """What a bar tells of."""

    @property
    def done(self) -> int:
        """What was run so far."""

    @property
    def findings(self) -> Sequence[object]:
        """What was found so far."""


class Bar(Protocol):
    """Shows progress."""

    def show(self, campaign: Search) -> None:
        """Something was done."""

    def say(self, line: str) -> None:
        """Something happened that a person should know."""


class _Silent:
    """Nobody looks; lines are for a log."""

    def show(self, campaign: Search) -> None:
        """See :meth:`Bar.show`."""

    def say(self, line: str) -> None:
        """See :meth:`Bar.say`."""
        print(f"khosim explore: {line}", file=sys.stderr, flush=True)


class _Rich:
    """A bar of rich's."""

    def __init__(self, bar: Any, task: Any, runs: int | None, seconds: float | None) -> None:
        self._bar = bar
        self._task = task
        self._seconds = seconds
        self._begin = time.monotonic()
        self._first: int | None = None

    def show(self, campaign: Search) -> None:
        """See :meth:`Bar.show`."""
        passed = time.monotonic() - self._begin
        done = campaign.done
        if self._first is None:
            self._first = done  # what a corpus held is no speed
        told = {"runs": done, "findings": len(campaign.findings)}
        told["speed"] = round((done - self._first) / max(passed, 1e-3))
        position = min(passed, self._seconds) if self._seconds else done
        self._bar.update(self._task, completed=position, **told)

    def say(self, line: str) -> None:
        """See :meth:`Bar.say`."""
        self._bar.console.print(f"khosim explore: {line}", markup=False, highlight=False)


@contextmanager
def shown(runs: int | None, seconds: float | None) -> Iterator[Bar]:
    """Within, a bar for so many runs or seconds; without either it only counts."""
    if not sys.stderr.isatty():
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.fields[runs]} runs"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[findings]} findings, {task.fields[speed]}/s,"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=seconds or runs, runs=0, findings=0, speed=0)
        yield _Rich(bar, task, runs, seconds)
