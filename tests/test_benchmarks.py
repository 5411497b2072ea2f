"""The benchmarks' own machinery: records, verdicts, output, and the yardstick in C."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import native
from benchmarks.harness import (
    Context,
    Record,
    best_of,
    in_child,
    peak_resident_bytes,
    resident_bytes,
)
from benchmarks.native import NativeRadix, NoCompiler, Walk, build_native


@pytest.fixture(scope="module")
def radix() -> NativeRadix:
    """Return the compiled C radix tree."""
    try:
        return build_native()
    except NoCompiler as error:
        pytest.skip(str(error))


def _walk_by_hand(pfns: set[int]) -> Walk:
    """Say what a walk must see, from sets alone: a node for each prefix of the order-0 keys."""
    keys = {(1 << 52) | pfn for pfn in pfns}
    nr_nodes = 1  # the root is there from the start
    for level in range(5):
        nr_nodes += len({key >> (15 + 9 * level) for key in keys})
    return Walk(len(pfns), sum(pfn << 12 for pfn in pfns) % 2**64, nr_nodes)


@pytest.mark.parametrize(
    ("start_pfn", "nr_pages"),
    [(0, 0), (0, 1), (0, 32768), (32767, 2), (0x100000, 100_000), ((1 << 52) - 3, 3)],
)
def test_native_run(radix: NativeRadix, start_pfn: int, nr_pages: int) -> None:
    """A run fed page by page is walked once per page; each prefix of its keys is a node."""
    expected = _walk_by_hand(set(range(start_pfn, start_pfn + nr_pages)))
    assert radix.feed_run(start_pfn, nr_pages) == expected


def test_native_scattered(radix: NativeRadix) -> None:
    """Scattered frames are each walked once, also where they were added twice."""
    pfns = np.random.default_rng(7).integers(0, 1 << 32, 2_000, dtype=np.uint64)
    pfns = np.concatenate([pfns, pfns[::-3]])
    assert radix.feed_pfns(pfns) == _walk_by_hand({int(pfn) for pfn in pfns})


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    """Where nothing can be compiled there is a reason, and no crash."""
    monkeypatch.setenv("CC", compiler)
    context = Context()
    assert context.native is None
    assert compiler in context.why_no_native


def test_the_verdict_is_an_upper_bound() -> None:
    """A ratio passes up to its limit; without limit or measurement there is no verdict."""
    record = Record(name="a.b", baseline="c", measured=6.0, against=2.0, limit=3.0)
    assert (record.value, record.ok) == (3.0, True)
    assert Record(name="a.b", baseline="c", measured=6.1, against=2.0, limit=3.0).ok is False
    assert Record(name="a.b", baseline="c", measured=6.0, against=2.0).ok is None
    assert Record(name="a.b", baseline="c", limit=3.0, note="skipped").ok is None


def test_ratio_takes_turns() -> None:
    """Both actions are called equally often, one after the other, less often in a quick call."""
    calls: list[str] = []
    record = Context(quick=True).ratio(
        "a.b", lambda: calls.append("a"), lambda: calls.append("b"), baseline="b", rounds=50
    )
    assert calls == ["a", "b"] * 3
    assert record.value is not None
    assert record.value > 0
    assert best_of(lambda: calls.append("c"), rounds=4) >= 0
    assert calls.count("c") == 4


def test_memory_is_measured_in_bytes() -> None:
    """A process that touches 64 MiB more has 64 MiB more resident, and never less at its peak."""
    before, after, peak = in_child(_touch, 64 << 20)
    assert 0.95 * (64 << 20) < after - before < 1.2 * (64 << 20)
    assert peak >= after


def _touch(len_bytes: int) -> tuple[int, int, int]:
    before = resident_bytes()
    touched = np.ones(len_bytes, dtype=np.uint8)
    after = resident_bytes()
    assert touched[-1]
    return before, after, peak_resident_bytes()


def _good(context: Context) -> Iterator[Record]:
    yield Record(name="good.time", baseline="a second", measured=0.5, against=1.0, limit=0.6)
    yield Record(name="good.memory", baseline="x", unit="bytes", measured=2**20, against=2**21)


def _bad(context: Context) -> Iterator[Record]:
    yield Record(name="bad.time", baseline="a second", measured=5.0, against=1.0, limit=2)


def _absent(context: Context) -> Iterator[Record]:
    yield Record(name="absent.time", baseline="C", limit=0.1, note="no C compiler (cc)")


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put three small benchmarks in the place of the real ones."""
    monkeypatch.setattr(command, "BENCHMARKS", {"good": _good, "bad": _bad, "absent": _absent})


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("only", "status"),
    [(["good"], 0), (["absent"], 0), (["good", "absent"], 0), (["bad"], 1), ([], 1)],
)
def test_status_says_whether_limits_hold(
    capsys: pytest.CaptureFixture[str], only: list[str], status: int
) -> None:
    """A missed limit is status 1, in the table and in JSON; what was skipped is no failure."""
    argv = [word for name in only for word in ("--only", name)]
    assert command.main(argv) == status
    assert ("NO" in capsys.readouterr().out) == bool(status)
    assert command.main([*argv, "--json"]) == status
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is not bool(status)
    assert {row["name"].split(".")[0] for row in report["records"]} == set(
        only or ["good", "bad", "absent"]
    )


@pytest.mark.usefixtures("stand_ins")
def test_the_table_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    """Each record is one row: name, ratio, limit, verdict, what was measured, against what."""
    command.main([])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["benchmark", "ratio", "limit", "ok", "measured", "baseline"],
        ["good.time", "0.5", "0.6", "yes", "500", "ms", "of", "a", "second"],
        ["good.memory", "0.5", "-", "-", "1", "MiB", "of", "x"],
        ["bad.time", "5", "2", "NO", "5", "s", "of", "a", "second"],
        ["absent.time", "skipped", "0.1", "-", "-", "of", "C", "(no", "C", "compiler", "(cc))"],
    ]


@pytest.mark.usefixtures("stand_ins")
def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """--only takes the names there are."""
    with pytest.raises(SystemExit) as stop:
        command.main(["--only", "god"])
    assert stop.value.code == 2
    assert "'god'" in capsys.readouterr().err


def test_the_source_of_the_yardstick_is_there() -> None:
    """The C file is beside the module that compiles it."""
    assert native.SOURCE.is_file()


def test_startup_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The start-up benchmark runs and yields a ratio above one."""
    command.main(["--only", "startup", "--quick", "--json"])
    (record,) = json.loads(capsys.readouterr().out)["records"]
    assert record["name"] == "startup.help"
    assert record["limit"] == 5
    assert record["value"] > 1
