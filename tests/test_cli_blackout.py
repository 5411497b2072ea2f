"""``khosim blackout`` as people and programs call it: tables, JSON, files of costs, wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from khosim.blackout.costs import Costs, costs_text, read_costs
from khosim.cli.blackout_text import time_text
from khosim.cli.main import main

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "blackout.md"
SMALL = """
[machine]
ram = "64M"
[[generation]]
steps = [ { do = "folios", name = "guest", count = 4 } ]
[[generation]]
steps = [ { do = "restore", name = "guest" } ]
"""


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A scenario of one handover."""
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Status, output and errors of one call."""
    status = main(["blackout", *args])
    return status, *capsys.readouterr()


def test_printed_costs_are_a_file_of_costs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What ``--print-costs`` prints reads back as the same costs, and gives each a source."""
    status, out, _ = call(capsys, "--print-costs")
    path = tmp_path / "costs.toml"
    path.write_text(out)
    assert status == 0
    assert read_costs(str(path)) == Costs.defaults()
    for line, before in zip(out.splitlines()[1:], out.splitlines(), strict=False):
        assert "=" not in line or line.startswith("#") or before.startswith("#"), line


def test_a_file_replaces_what_it_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Any other cost, handler and host keeps its default."""
    path = tmp_path / "costs.toml"
    path.write_text(
        '[host]\ncpus = 8\n[costs]\nshutdown_us = 5\n[freeze_file_us]\n"vfio \\"x\\"" = 7\n'
    )
    costs = read_costs(str(path))
    assert costs == Costs.defaults().with_cpus(8).replace("shutdown_us", 5.0).replace(
        "freeze_file_us", 7.0, 'vfio "x"'
    )
    again = tmp_path / "again.toml"
    again.write_text(costs_text(costs))
    assert read_costs(str(again)) == costs
    assert "cpus = 8" in call(capsys, "--costs", str(path), "--print-costs")[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[costs]\nshutdwn_us = 1", "[costs]: no cost 'shutdwn_us'; did you mean 'shutdown_us'?"),
        ("[costs]\nzzz = 1", "no cost 'zzz'; see khosim blackout --print-costs"),
        ("[cost]\nshutdown_us = 1", "no table 'cost'; did you mean 'costs'?"),
        ("costs = 3", "costs: a table is wanted, [costs]"),
        ("[costs]\nshutdown_us = -1", "[costs] shutdown_us: -1 is negative"),
        ('[costs]\nshutdown_us = "1"', "[costs] shutdown_us: '1' is not a number"),
        ("[costs]\nshutdown_us = true", "[costs] shutdown_us: True is not a number"),
        ("[costs]\nshutdown_us = nan", "[costs] shutdown_us: nan is not a number"),
        ("[costs]\nshutdown_us = inf", "[costs] shutdown_us: more than 1e+12"),
        ("[freeze_file_us]\nx = [1]", "[freeze_file_us] x: [1] is not a number"),
        ("[host]\ncpus = 0", "[host] cpus: not a whole number from 1 to 8192"),
        ("[host]\ncpus = 1.5", "[host] cpus: not a whole number from 1 to 8192"),
        ("[host]\ncpu = 1", "[host]: no key 'cpu'; did you mean 'cpus'?"),
        ("[costs", "not TOML: "),
        ("\udcff", "not UTF-8 text"),
    ],
)
def test_wrong_costs_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, said: str
) -> None:
    """Place and cause, status 2, nothing printed."""
    path = tmp_path / "costs.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    status, out, err = call(capsys, "--costs", str(path), "--print-costs")
    assert (status, out) == (2, "")
    assert str(path) in err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--costs", "nowhere.toml"], "nowhere.toml: no such file"),
        (["--costs", ""], "directory"),
        (["--cpus", "0"], "--cpus: '0' is not a whole number from 1 to 8192"),
        (["--memory", "1K"], "--memory: 1K is not from 1G to 64T"),
        (["--memory", "much"], "--memory"),
        (["--order", "3"], "--order: 3 is none of 0, 9, 18"),
        (["--sessions", "x"], "--sessions: 'x' is not a whole number from 0 to 128"),
        (["--sessions", "0"], "--devices: devices are held in sessions: there is none"),
        (["--release", "5.4"], "5.4"),
        (["--scenario", "cloud-hst"], "did you mean 'cloud-host'?"),
    ],
)
def test_wrong_calls_are_one_line(
    capsys: pytest.CaptureFixture[str], args: list[str], said: str
) -> None:
    """Place and cause, status 2."""
    status, out, err = call(capsys, *args)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_scenario_is_priced_step_by_step(capsys: pytest.CaptureFixture[str], small: str) -> None:
    """The table and the JSON tell the same blackout; lines fit a terminal."""
    status, out, _ = call(capsys, "--scenario", small)
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    found = json.loads(call(capsys, "--scenario", small, "--json")[1])["handovers"]
    assert len(found) == 1
    parts: list[dict[str, Any]] = found[0]["parts"]
    stood = sum(part["seconds"] for part in parts if part["stage"] not in ("preserve", "load"))
    assert found[0]["blackout_seconds"] == pytest.approx(stood)
    assert f"blackout      {time_text(stood)}, {found[0]['blackout_events']} events" in out
    assert sum(part["count"] for part in parts if part["cost"] == "restore_block_ns") == 5


def test_run_tells_it_at_its_end(capsys: pytest.CaptureFixture[str], small: str) -> None:
    """A few lines before the last one, and a list in the JSON: as ``khosim blackout`` has it."""
    assert main(["run", small]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("blackout, estimated")
    assert lines[at + 1].startswith("  handover 1: guests stand still ")
    assert len(lines) - at < 12
    assert max(map(len, lines)) <= 80
    assert main(["run", small, "--json"]) == 0
    of_run = json.loads(capsys.readouterr().out)["blackout"]
    assert of_run == json.loads(call(capsys, "--scenario", small, "--json")[1])["handovers"]


@pytest.mark.slow
def test_the_sweep_has_a_row_for_each_host(capsys: pytest.CaptureFixture[str]) -> None:
    """More of anything takes longer. Slow: two dozen runs, of old releases among them."""
    args = ("--sessions", "1", "--devices", "0", "--order", "18", "--release", "7.2")
    status, out, _ = call(capsys, *args, "--json")
    assert status == 0
    rows = json.loads(out)["rows"]
    by_axis: dict[str, list[float]] = {}
    for row in rows:
        by_axis.setdefault(f"{row['axis']} {row['order']}", []).append(row["blackout_seconds"])
    for axis in ("memory 0", "memory 9", "memory 18", "sessions 18", "devices 18"):
        assert by_axis[axis] == sorted(by_axis[axis]), axis
        assert len(set(by_axis[axis])) == len(by_axis[axis]), axis
    assert [row["value"] for row in rows if row["axis"] == "release"] == [
        "6.18", "7.0", "7.1", "7.3", "7.2"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["khosim blackout", "khosim blackout --compare"])
def test_the_document_shows_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """Both tables of the document, to the letter: slow, as it runs every host of them."""
    _, out, _ = call(capsys, *command.split()[2:])
    text = DOCUMENT.read_text(encoding="utf-8")
    shown = text.split(f"$ {command}\n")[1].split("```")[0]
    assert shown == out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0"),
        (1.2345, "1.23 s"),
        (0.9999, "1.00 s"),
        (123.4, "123 s"),
        (0.0361, "36.1 ms"),
        (4.2e-7, "420 ns"),
    ],
)
def test_times_have_three_digits(seconds: float, text: str) -> None:
    """And the unit that suits them."""
    assert time_text(seconds) == text
