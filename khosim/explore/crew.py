"""Who does a campaign's work: this process, or workers beside it.

A crew takes up to ``width`` tasks at a time and gives results in any order. :class:`Workers` are
processes of their own, started afresh (spawn), so that one that dies takes nothing with it: its
task is done again, and the run that ends a second worker is left out and named.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, Protocol

from khosim.errors import KhoSimError
from khosim.explore.limits import SECONDS_MAX
from khosim.explore.work import Spec, Task, do

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

__all__ = ("Crew", "Inline", "Workers")

_SILENT_SECONDS = 3 * SECONDS_MAX
"""A worker that says nothing for so long is stuck where no alarm reaches it."""


class Crew(Protocol):
    """Does tasks."""

    width: int

    def submit(self, number: int, task: Task) -> None:
        """Take a task on; never more than ``width`` at a time."""

    def wait(self, seconds: float) -> list[tuple[int, Any]]:
        """Results by the numbers of their tasks; none where nothing ends within ``seconds``."""

    def close(self) -> None:
        """Let everything fall that is not done."""


class Inline:
    """One task after the other, here."""

    width = 1

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._tasks: list[tuple[int, Task]] = []

    def submit(self, number: int, task: Task) -> None:
        """See :meth:`Crew.submit`."""
        self._tasks.append((number, task))

    def wait(self, seconds: float) -> list[tuple[int, Any]]:
        """Do what was submitted."""
        tasks, self._tasks = self._tasks, []
        return [(number, do(self._spec, task)) for number, task in tasks]

    def close(self) -> None:
        """Nothing is left."""
        self._tasks.clear()


@dataclass
class _Worker:
    """A process, our end of its pipe, and what it is at."""

    process: SpawnProcess
    pipe: Connection[Any, Any]
    number: int = -1
    task: Task | None = None
    at: int | None = None
    heard: float = 0.0


class Workers:
    """``jobs`` processes. ``say`` is told, in a line, of each one that dies."""

    def __init__(self, spec: Spec, jobs: int, say: Callable[[str], None]) -> None:
        self.width = jobs
        self._spec = spec
        self._say = say
        self._context = multiprocessing.get_context("spawn")
        self._deaths: set[tuple[int, int | None]] = set()
        self._workers = [self._start() for _ in range(jobs)]

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._spec), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def submit(self, number: int, task: Task) -> None:
        """See :meth:`Crew.submit`."""
        self._give(next(w for w in self._workers if w.task is None), number, task)

    def _give(self, worker: _Worker, number: int, task: Task) -> None:
        worker.number, worker.task, worker.at = number, task, None
        worker.heard = time.monotonic()
        with suppress(OSError):  # it is dead, which wait() will notice
            worker.pipe.send(task)

    def wait(self, seconds: float) -> list[tuple[int, Any]]:
        """See :meth:`Crew.wait`. Raises what a task raised."""
        done: list[tuple[int, Any]] = []
        ready = wait([worker.pipe for worker in self._workers], seconds)
        now = time.monotonic()
        for worker in list(self._workers):
            try:
                if worker.pipe in ready:
                    done += self._hear(worker)
                elif worker.task is not None and now - worker.heard > _SILENT_SECONDS:
                    worker.process.kill()
            except (EOFError, OSError):
                done += self._bury(worker)
        return done

    def _hear(self, worker: _Worker) -> list[tuple[int, Any]]:
        worker.heard = time.monotonic()
        what, value = worker.pipe.recv()
        if what == "at":
            worker.at = value
            return []
        worker.task = None
        if what == "raised":
            raise value
        return [(worker.number, value)]

    def _bury(self, dead: _Worker) -> list[tuple[int, Any]]:
        # A death that came from outside must not change what is found: once more, then without.
        dead.pipe.close()
        dead.process.join()
        how = _how(dead.process.exitcode)
        new = self._start()
        self._workers[self._workers.index(dead)] = new
        task = dead.task
        if task is None:
            self._say(f"a worker {how} while it had nothing to do; another one takes its place")
            return []
        where = f"at run {self._spec.seed}:{dead.at}" if task.name == "runs" else "at its work"
        where = "as it began" if dead.at is None else where
        if (dead.number, dead.at) not in self._deaths:
            self._deaths.add((dead.number, dead.at))
            self._say(f"a worker {how} {where}; what it was at is done again")
            self._give(new, dead.number, task)
        elif dead.at is None:
            raise KhoSimError(f"workers end before they begin to work: one {how}")
        elif task.name == "runs":
            self._say(f"a worker {how} {where} again; that run is left out")
            first, count, skip, off = task.args
            self._give(new, dead.number, Task("runs", (first, count, (*skip, dead.at), off)))
        else:
            self._say(f"a worker {how} {where} again; that program stays as it is")
            return [(dead.number, None)]
        return []

    def close(self) -> None:
        """End all of them, whatever they are at."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()


def _how(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        try:
            return f"was killed ({signal.Signals(-exitcode).name})"
        except ValueError:
            return f"was killed (signal {-exitcode})"
    return f"ended with status {exitcode}"


def _work(pipe: Connection[Any, Any], spec: Spec) -> None:
    # What a worker does until its campaign goes away. Ctrl-C is for the campaign to see.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def tick(number: int) -> None:
        pipe.send(("at", number))

    try:
        while True:
            task = pipe.recv()
            try:
                answer = ("done", do(spec, task, tick))
            except Exception as error:
                answer = ("raised", error)
            pipe.send(answer)
    except (EOFError, OSError):
        pass
