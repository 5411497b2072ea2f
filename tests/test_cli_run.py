"""``khosim run`` as people and programs call it: account, JSON, trace, exit status, errors."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from khosim.checks.violation import Violation
from khosim.cli.main import main
from khosim.scenario.library import builtin_scenarios, builtin_text

ROOT = Path(__file__).resolve().parent.parent
CAPTURES = Path(__file__).parent / "golden" / "captures"
BROKEN = """
[machine]
ram = "64M"
[[generation]]
steps = [
  { do = "folios", name = "guest", count = 4 },
  { do = "corrupt", at = "guest", offset = 5, flip = 1 },
]
[[generation]]
steps = [ { do = "restore", name = "guest" } ]
"""


class Called:
    """What one call printed and returned."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    def json(self) -> dict[str, Any]:
        """The JSON object on stdout."""
        facts = json.loads(self.out)
        assert isinstance(facts, dict)
        return facts


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    """Call ``khosim run`` with some arguments."""

    def call_run(*args: str) -> Called:
        status = main(["run", *args])
        return Called(status, *capsys.readouterr())

    return call_run


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """A scenario in which one byte of a guest changes on the way."""
    path = tmp_path / "broken.toml"
    path.write_text(BROKEN)
    return str(path)


def test_without_arguments_it_runs_the_cloud_host(call: Any) -> None:
    """Every phase is told, every invariant has its sentence and a state, one line sums up."""
    called = call()
    assert (called.status, called.err) == (0, "")
    lines = called.out.splitlines()
    assert lines[0].startswith("cloud-host: ")
    assert [line for line in lines if line.startswith("generation ")] == [
        "generation 0: cold boot",
        "generation 1: took the handover over (from 7.3.4, handover 1)",
        "generation 2: took the handover over (from 7.3.4, handover 2)",
    ]
    for word in ("scratch", "kernel log", "restored", "intact", "hands over", "jump", "by order",
                 "started", "session", "retrieved", "finished", "closed", "sessions"):
        assert any(line.strip().startswith(word) for line in lines), word
    oks = [line for line in lines if line.startswith("  ok  ")]
    assert len(oks) >= 13
    assert all(re.fullmatch(r"  ok  [a-z-]+: [A-Z].*", line) for line in oks)
    assert re.fullmatch(
        rf"ok: 3 generations, 2 handovers, [\d.]+G preserved; {len(oks)} invariants hold", lines[-1]
    )


@pytest.mark.parametrize("name", builtin_scenarios())
def test_the_account_is_plain_text_of_eighty_columns(call: Any, name: str) -> None:
    """Nothing is wider than a terminal, nothing is coloured, nothing ends in blanks."""
    called = call(name)
    assert called.status == 0
    assert called.out.isascii()
    for line in called.out.splitlines():
        assert len(line) <= 80, line
        assert line == line.rstrip()
        assert line.isprintable()


def test_json_has_its_keys(call: Any) -> None:
    """The keys that the design promises, with their types, and the facts of each kernel."""
    facts = call("small", "--json").json()
    assert facts["generations"] == 2
    assert facts["handovers"] == 1
    assert facts["preserved_bytes"] > 500_000
    assert facts["seed"] == 1
    assert facts["release"] == "7.3"
    assert set(facts["invariants"].values()) == {True}
    assert facts["violations"] == []
    first, second = facts["kernels"]
    assert [first["outcome"], second["outcome"]] == ["cold", "accepted"]
    assert first["preserved"]["len_bytes"] == facts["preserved_bytes"]
    assert sum(first["preserved"]["by_order"].values()) == first["preserved"]["blocks"]
    assert "KHO: found kexec handover data." in second["messages"]
    assert all(area["len_bytes"] >= 0 for area in first["scratch"])
    assert 0 < first["free_pages"] < first["managed_pages"]


def test_a_violation_is_told_whole(call: Any, broken: str) -> None:
    """Exit status 1; in JSON with every field, in the account with page and writer."""
    called = call(broken, "--json")
    assert (called.status, called.err) == (1, "")
    facts = called.json()
    assert facts["invariants"]["preserved-content"] is False
    assert sum(not ok for ok in facts["invariants"].values()) == 1
    (violation,) = facts["violations"]
    assert set(violation) == set(Violation._fields)
    assert violation["invariant"] == "preserved-content"
    assert violation["writer"] == "scenario: corrupt"
    called = call(broken)
    assert called.status == 1
    assert "  VIOLATED  preserved-content: " in called.out
    assert f"{violation['phys']:#x}" in called.out
    assert called.out.splitlines()[-1].startswith("FAILED: 2 generations, 1 handover, ")


def test_equal_calls_print_equal_bytes(call: Any) -> None:
    """Account and JSON alike, also with the adversarial allocator."""
    for args in (["small"], ["small", "--json", "--allocator", "adversarial", "--seed", "9"]):
        assert call(*args).out == call(*args).out


def test_the_trace_is_whole_and_the_same_each_time(call: Any, tmp_path: Path) -> None:
    """One JSON object a line, in order; two runs write equal bytes; nothing else is left behind."""
    paths = [tmp_path / "one", tmp_path / "two"]
    paths[1].write_text("something else")
    for path in paths:
        assert call("small", "--trace", str(path)).status == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths
    events = [json.loads(line) for line in paths[0].read_text().splitlines()]
    assert len(events) > 200
    assert all(list(e) == ["generation", "phase", "symbol", "args", "result"] for e in events)
    assert {event["generation"] for event in events} == {0, 1}
    symbols = [event["symbol"] for event in events]
    assert symbols.index("kho_memory_init") < symbols.index("kho_preserve_folio")
    assert symbols.index("machine_kexec") < symbols.index("kho_populate")
    assert paths[0].stat().st_mode & 0o777 == paths[1].stat().st_mode & 0o777


def test_a_run_that_fails_leaves_no_half_trace(call: Any, tmp_path: Path) -> None:
    """Wrong input found on the way: the file that was there stays, and no temporary one."""
    scenario = tmp_path / "s.toml"
    scenario.write_text(BROKEN.replace('"restore", name = "guest"', '"free", name = "guest"'))
    trace = tmp_path / "trace"
    trace.write_text("old")
    called = call(str(scenario), "--trace", str(trace))
    assert called.status == 2
    assert "generation 1, step 1: nothing of 'guest' is there to free" in called.err
    assert trace.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.toml", "trace"]


def test_a_trace_can_go_into_a_device(call: Any) -> None:
    """What is no regular file is written to, not replaced."""
    assert call("small", "--trace", os.devnull).status == 0
    assert not Path(os.devnull).is_file()


def test_a_trace_goes_where_a_link_leads(call: Any, tmp_path: Path) -> None:
    """The link stays: /dev/stdout is one."""
    (tmp_path / "link").symlink_to("target")
    assert call("small", "--trace", str(tmp_path / "link")).status == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text().endswith("}\n")


@pytest.mark.parametrize(
    ("options", "key", "expected"),
    [
        (["--seed", "77"], "seed", 77),
        (["--release", "7.3"], "release", "7.3"),
        (["--generations", "4"], "generations", 4),
        (["--ram", "128M"], "machine.ram_bytes", 0x9FC00 + (127 << 20) - (128 << 10)),
        (["--ram", "256M", "--nodes", "2"], "machine.nodes", [0, 1]),
        (["--allocator", "adversarial"], "machine.allocator", "adversarial"),
        (["--machine", str(CAPTURES / "arm64-16k")], "machine.page_size", 16384),
    ],
)
def test_options_take_the_place_of_what_the_file_says(
    call: Any, options: list[str], key: str, expected: object
) -> None:
    """Each option is seen in the result, and all still holds."""
    called = call("small", "--json", *options)
    assert called.status == 0
    facts: Any = called.json()
    for part in key.split("."):
        facts = facts[part]
    assert facts == expected


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--release", "6.19"], "cloud-host-4k"),
        (["--release", "7.0"], "cloud-host-4k"),
        (["--release", "7.1"], "cloud-host"),
        (["--release", "6.18"], "kho-host"),
        (["--ram", "1G", "--allocator", "adversarial"], "cloud-host"),
        (["--ram", "2T", "--nodes", "4", "--generations", "2"], "cloud-host"),
    ],
)
def test_the_cloud_host_suits_what_there_is(call: Any, options: list[str], name: str) -> None:
    """Other releases and machines: guests shrink with RAM, old kernels get what they can carry."""
    called = call("--json", *options)
    assert called.status == 0
    facts = called.json()
    assert facts["scenario"] == name
    assert all(kernel["sessions"] for kernel in facts["kernels"]) == (name != "kho-host")


def test_a_capture_brings_its_command_line(call: Any) -> None:
    """The cloud-host scenario on the captured two-node machine."""
    called = call("--machine", str(CAPTURES / "numa4g"))
    assert called.status == 0
    text = " ".join(called.out.split())
    assert (CAPTURES / "numa4g" / "gen0" / "cmdline").read_text().strip() in text
    assert "4G of RAM on 2 nodes" in text


def test_the_built_in_scenarios_are_listed_and_shown(call: Any, tmp_path: Path) -> None:
    """``--list`` names them with a line each, ``--show`` prints one that runs as a file."""
    lines = call("--list").out.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(builtin_scenarios())
    assert call("--list", "--json").json() == builtin_scenarios()
    assert call("--show").out == builtin_text("cloud-host")
    path = tmp_path / "mine.toml"
    path.write_text(call("small", "--show").out)
    assert call(str(path)).out == call("small").out


def test_a_scenario_comes_through_standard_input(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``-`` reads it; places in errors say <stdin>; a closed one is no traceback."""

    class Stdin:
        buffer = io.BytesIO(builtin_text("small").encode())

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert call("-").out.splitlines()[0].startswith("small: ")
    monkeypatch.setattr(Stdin, "buffer", io.BytesIO(b"[machine]\nram = 3 4\n"))
    called = call("-")
    assert (called.status, called.out) == (2, "")
    assert called.err.startswith("khosim: <stdin>: line 2, column ")
    monkeypatch.setattr(sys, "stdin", None)
    assert call("-").err == "khosim: <stdin>: it is closed\n"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["smal"], "smal: neither a file nor a built-in scenario; did you mean 'small'?"),
        (["./none.toml"], "./none.toml: no such file"),
        (["."], ".: Is a directory"),
        ([sys.executable], f"{sys.executable}: "),
        (["/dev/zero"], "/dev/zero: larger than 1M"),
        (["small", "--seed", "x"], "--seed: 'x' is not a whole number from 0 to"),
        (["small", "--seed", "-1"], "--seed: -1 is not from 0 to"),
        (["small", "--seed", "9" * 50], "--seed: "),
        (["small", "--generations", "0"], "--generations: 0 is not from 1 to 1000"),
        (["small", "--generations", "1001"], "--generations: 1001 is not from 1 to 1000"),
        (["small", "--generations", "1e3"], "--generations: '1e3' is not a whole number"),
        (["small", "--nodes", "65"], "--nodes: 65 is not from 1 to 64"),
        (["small", "--nodes", "40"], "nodes: "),
        (["small", "--ram", "16"], "--ram: RAM size: "),
        (["small", "--ram", "1Z"], "--ram: RAM size: '1Z' is not a size"),
        (["small", "--ram", "20T"], "--ram: RAM size: 20T are above 16T"),
        (["small", "--release", "7.4"], "--release: '7.4' is no release khosim knows"),
        (["small", "--allocator", "slab"], "--allocator: 'slab' is not one of linux, adversarial"),
        (["small", "--machine", "nowhere"], "nowhere: no such folder"),
        (["small", "--machine", "nowhere", "--ram", "1G"], "--machine: does not go together"),
        (["kho-host", "--ram", "64M"], "kho-host: generation 0, step 2: "),
        (["small", "--trace", "."], ".: a folder: --trace names a file"),
        (["small", "--trace", "nowhere/trace"], "nowhere/trace: No such file or directory"),
        (["none", "--show"], "none: no built-in scenario"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(call: Any, args: list[str], expected: str) -> None:
    """Place and cause, nothing on stdout, no traceback."""
    called = call(*args)
    assert called.status == 2
    assert called.out == ""
    assert len(called.err.splitlines()) == 1
    assert called.err.startswith("khosim: ")
    assert expected in called.err


def test_the_readme_shows_what_it_prints() -> None:
    """Each block of README.md that begins with ``$ khosim run`` is the tool's own output.

    A line ``...`` stands for lines left out.
    """
    blocks = re.findall(
        r"```\n\$ khosim (run[^\n]*)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert blocks
    for command, shown in blocks:
        done = subprocess.run(
            [sys.executable, "-m", "khosim", *command.split()],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")
        at = 0
        for piece in re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE):
            at = done.stdout.find(piece, at)
            assert at >= 0, f"not printed by khosim {command}:\n{piece}"
            at += len(piece)
        assert done.stdout.startswith(shown.split("...\n")[0])
        assert done.stdout.endswith(re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE)[-1])
