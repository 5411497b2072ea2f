"""A campaign's work on more machines than one, by Dask's distributed scheduler.

An optional extra: ``khosim[cluster]``. Every worker needs the same khosim, which is looked at with
each piece of work. Dask gives the work of a worker that dies to another one; a run that ends four
of them is left out. There is no alarm by the clock, for the work is not done in a main thread.
"""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any

from khosim.errors import InputError
from khosim.explore.corpus import fingerprint
from khosim.explore.work import Runs, Spec, Task, do

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ("Cluster",)

_CONNECT_SECONDS = 20
_AT_ONCE = 2
"""Pieces of work for each thread, so that none waits for the way there and back."""


class Cluster:
    """The crew at ``address``: that of a scheduler, or ``local:N`` for N workers started here.

    ``say`` is told, in a line, of work that no worker survived. Raises :class:`InputError` where
    Dask is not installed, where nobody answers, and where workers have another khosim.
    """

    def __init__(self, spec: Spec, address: str, say: Callable[[str], None]) -> None:
        try:
            import distributed
        except ImportError:
            raise InputError("--cluster", "it needs Dask: pip install 'khosim[cluster]'") from None
        self._spec = spec
        self._say = say
        self._dask = distributed
        self._local: Any = None
        if address.startswith("local:"):
            address = self._start(address)
        try:
            self._client = distributed.Client(address, timeout=_CONNECT_SECONDS)
            self._client.wait_for_workers(1, timeout=_CONNECT_SECONDS)
        except (OSError, TimeoutError, ValueError):
            raise InputError("--cluster", f"no scheduler with workers at {address!r}") from None
        self.width = _AT_ONCE * sum(self._client.nthreads().values())
        self._fingerprint = fingerprint()
        self._futures: dict[Any, tuple[int, Task]] = {}
        self._parts: dict[int, list[tuple[int, Runs]]] = {}
        self._counts: dict[int, int] = {}

    def _start(self, address: str) -> str:
        count = address.removeprefix("local:")
        if not count.isascii() or not count.isdigit() or not 1 <= int(count[:5]) <= 256:
            raise InputError("--cluster", f"{address!r} is not local:N with N from 1 to 256")
        self._local = self._dask.LocalCluster(
            n_workers=int(count), threads_per_worker=1, dashboard_address=None, silence_logs=50
        )
        return str(self._local.scheduler_address)

    def submit(self, number: int, task: Task) -> None:
        """See :meth:`khosim.explore.crew.Crew.submit`."""
        future = self._client.submit(_there, self._fingerprint, self._spec, task, pure=False)
        self._futures[future] = number, task

    def wait(self, seconds: float) -> list[tuple[int, Any]]:
        """See :meth:`khosim.explore.crew.Crew.wait`. Raises what a task raised."""
        try:
            self._dask.wait(list(self._futures), timeout=seconds, return_when="FIRST_COMPLETED")
        except TimeoutError:
            return []
        done: list[tuple[int, Any]] = []
        for future in [future for future in self._futures if future.done()]:
            number, task = self._futures.pop(future)
            try:
                result = future.result()
            except self._dask.KilledWorker:
                done += self._killed(number, task)
                continue
            if isinstance(result, str):
                raise InputError("--cluster", result)
            done += self._taken(number, task, result)
        return done

    def _killed(self, number: int, task: Task) -> list[tuple[int, Any]]:
        # Which of several runs it was nobody knows: each of them for itself, then.
        if task.name != "runs":
            self._say("workers died while they shrank a program; it stays as it is")
            return [(number, None)]
        first, count, _, off = task.args
        if count == 1:
            self._say(f"workers died at run {self._spec.seed}:{first}; that run is left out")
            return self._taken(number, task, Runs([], set(), (first,)))
        self._parts[number], self._counts[number] = [], count
        for n in range(first, first + count):
            self.submit(number, Task("runs", (n, 1, (), off)))
        return []

    def _taken(self, number: int, task: Task, result: Any) -> list[tuple[int, Any]]:
        parts = self._parts.get(number)
        if parts is None:
            return [(number, result)]
        parts.append((task.args[0], result))
        if len(parts) < self._counts[number]:
            return []
        del self._parts[number]
        return [(number, _joined([part for _, part in sorted(parts, key=itemgetter(0))]))]

    def close(self) -> None:
        """See :meth:`khosim.explore.crew.Crew.close`."""
        self._client.cancel(list(self._futures))
        self._client.close()
        if self._local is not None:
            self._local.close()


def _joined(parts: Sequence[Runs]) -> Runs:
    whole = parts[0]
    for part in parts[1:]:
        whole = Runs(
            [*whole.suspects, *part.suspects],
            whole.reached | part.reached,
            (*whole.lost, *part.lost),
            whole.covered | part.covered,
            whole.given_up + part.given_up,
        )
    return whole


def _there(wanted: str, spec: Spec, task: Task) -> Any:
    # On a worker: the result, or in words why there can be none.
    if fingerprint() != wanted:
        return "a worker has another version of khosim"
    return do(spec, task)
