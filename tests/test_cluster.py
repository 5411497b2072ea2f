"""Campaigns on Dask: equal bytes, deaths of workers told and survived, refusals in one line.

A stand-in for ``distributed`` does the work at once, and lets workers die where it is told to;
where Dask itself is installed two real workers do it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from khosim.errors import InputError
from khosim.explore.campaign import Campaign
from khosim.explore.cluster import Cluster
from khosim.explore.work import Runs, Spec, Task, do

SPEC = Spec("reserve-mem", "7.3", "4")


class KilledWorker(Exception):
    """Every worker that tried died."""


class Future:
    """Work that is done when it is asked for."""

    def __init__(self, result: Callable[[], Any]) -> None:
        self.result = result

    def done(self) -> bool:
        """At once."""
        return True


class Client:
    """What a cluster asks of Dask's client. ``deadly`` are runs that no worker survives."""

    deadly: tuple[int, ...] = ()
    answers = True

    def __init__(self, address: str, timeout: float) -> None:
        if not self.answers:
            raise OSError("nobody there")

    def wait_for_workers(self, count: int, timeout: float) -> None:
        """They are there."""

    def nthreads(self) -> dict[str, int]:
        """One worker with one thread."""
        return {"worker": 1}

    def submit(self, call: Any, *args: Any, pure: bool) -> Any:
        """A future that has come to its end."""
        task: Task = args[-1]
        kills = task.name == "runs" and set(self.deadly) & set(
            range(task.args[0], task.args[0] + task.args[1])
        )
        kills = kills or (task.name == "shrink" and bool(self.deadly))

        def result() -> Any:
            if kills:
                raise KilledWorker
            return call(*args)

        return Future(result)

    def cancel(self, futures: list[Any]) -> None:
        """All was done anyway."""

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def dask(monkeypatch: pytest.MonkeyPatch) -> type[Client]:
    """The stand-in, in the place of ``distributed``."""
    client = type("StandIn", (Client,), {})
    stand_in = SimpleNamespace(
        Client=client, KilledWorker=KilledWorker, wait=lambda futures, **options: None
    )
    monkeypatch.setitem(sys.modules, "distributed", stand_in)  # type: ignore[arg-type]
    return client


def _campaign(crew: Any = None) -> dict[str, Any]:
    campaign = Campaign(SPEC.seed, SPEC.scenario, "7.3", crew=crew)
    campaign.run(runs=4)
    return campaign.as_json()


def test_the_crew_is_any_crew(dask: type[Client]) -> None:
    """Work that is done elsewhere comes to the same findings."""
    crew = Cluster(SPEC, "tcp://elsewhere", lambda line: None)
    assert crew.width == 2
    assert _campaign(crew) == _campaign()
    crew.close()


def test_a_deadly_run_is_left_out(dask: type[Client]) -> None:
    """Of a piece in which workers die each run is made for itself, and the one is named."""
    dask.deadly = (2,)
    said: list[str] = []
    crew = Cluster(SPEC, "tcp://elsewhere", said.append)
    crew.submit(7, Task("runs", (0, 4, (), ())))
    done: list[tuple[int, Any]] = []
    while not done:
        done = crew.wait(1)
    [(number, runs)] = done
    assert number == 7
    assert isinstance(runs, Runs)
    whole = do(SPEC, Task("runs", (0, 4, (2,), ())))
    assert runs.suspects == whole.suspects
    assert runs.reached == whole.reached
    assert runs.lost == (2,)
    assert said == ["workers died at run 4:2; that run is left out"]
    crew.submit(8, Task("shrink", ((), ("a", "b"))))
    assert crew.wait(1) == [(8, None)]
    assert "stays as it is" in said[-1]


def test_another_version_is_refused(
    dask: type[Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose khosim is not the campaign's does nothing."""
    crew = Cluster(SPEC, "tcp://elsewhere", lambda line: None)
    crew.submit(0, Task("runs", (0, 1, (), ())))
    monkeypatch.setattr("khosim.explore.cluster.fingerprint", lambda: "another")
    with pytest.raises(InputError, match="another version of khosim"):
        crew.wait(1)


def test_nobody_answers(dask: type[Client]) -> None:
    """One line that names the option; a number of workers that is none as well."""
    dask.answers = False
    with pytest.raises(InputError, match="no scheduler with workers at 'tcp://elsewhere'"):
        Cluster(SPEC, "tcp://elsewhere", lambda line: None)
    for address in ("local:0", "local:257", "local:x"):
        with pytest.raises(InputError, match="is not local:N"):
            Cluster(SPEC, address, lambda line: None)


def test_dask_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is said how to get it."""
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"pip install 'khosim\[cluster\]'"):
        Cluster(SPEC, "local:1", lambda line: None)


@pytest.mark.slow  # two workers start, each of which is Python with khosim
def test_real_workers_find_the_same(tmp_path: Path) -> None:
    """Dask with two local workers: equal bytes, equal corpus."""
    pytest.importorskip("distributed", reason="needs khosim[cluster]")
    command = [sys.executable, "-m", "khosim", "explore", SPEC.scenario, "--runs", "12"]
    texts, corpora = [], []
    for more in (["--cluster", "local:2"], ["--jobs", "1"]):
        folder = tmp_path / more[0][2:]
        done = subprocess.run(
            [*command, *more, "--corpus", str(folder)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert (done.returncode, done.stderr) == (1, "")
        texts.append(done.stdout)
        files = [path for path in folder.rglob("*") if path.is_file()]
        corpora.append({str(p.relative_to(folder)): p.read_bytes() for p in files})
    assert texts[0] == texts[1]
    assert corpora[0] == corpora[1]
