"""The 1,200 sequences answered by Linux 7.3.4, and ``khosim memblock`` on good and bad files."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from khosim.cli import memblock as command
from khosim.errors import InputError
from khosim.kernel.memblock_vectors import parse_case, run_case

VECTORS = Path(__file__).parent / "golden" / "memblock-vectors.jsonl.gz"
GOOD = '{"id": "a", "ops": [["add", 0, 8192], ["alloc", 64, 64, 0, 0, -1, 0]]}'


def run(file: Path | str, *options: str) -> int:
    """Run the command as the main program does."""
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args([str(file), *options]))


def test_all_vectors_come_out_identical() -> None:
    """Every result and both final arrays of every case are Linux's own."""
    with gzip.open(VECTORS, "rt") as lines:
        cases = list(lines)
    assert len(cases) == 1200
    for line in cases:
        expected = json.loads(line)
        del expected["ops"]
        assert run_case(parse_case(line, "vectors")).as_json() == expected


def test_json_output_is_a_line_per_case(capsys: pytest.CaptureFixture[str]) -> None:
    """The vectors through the command: the same objects, in the same order."""
    assert run(VECTORS, "--json") == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with gzip.open(VECTORS, "rt") as lines:
        expected = [json.loads(line) for line in lines]
    for case in expected:
        del case["ops"]
    assert printed == expected


def test_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row per case and the totals; odd identifiers are quoted."""
    file = tmp_path / "cases"
    file.write_text(f'{GOOD}\n\n{{"id": "\\u001b[2J", "ops": [], "results": "ignored"}}\n')
    assert run(file) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["case", "ops", "memory", "reserved", "reserved", "bytes"]
    assert lines[1].split() == ["a", "2", "1", "1", "64"]
    assert lines[2].split() == ['"\\u001b[2J"', "0", "0", "0", "0"]
    assert lines[3] == "2 cases, 2 calls"


@pytest.mark.parametrize("packed", [False, True])
def test_stdin(
    packed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dash reads standard input, gzipped or not."""
    data = GOOD.encode()
    stdin = io.TextIOWrapper(io.BytesIO(gzip.compress(data) if packed else data))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run("-", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "id": "a",
        "results": [0, 8128],
        "memory": [[0, 8192, 0, -1]],
        "reserved": [[8128, 64, 32, -1]],
    }


def test_a_closed_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may be started without standard input: one line, no traceback."""
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="<stdin>: it is closed"):
        run("-")


def test_a_panic_ends_its_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The 129th region: results up to there, the panic's line, exit status 1; then the next."""
    ops: list[list[Any]] = [["reserve", 8192 * k, 4096] for k in range(130)]
    file = tmp_path / "cases.jsonl"
    file.write_text(json.dumps({"id": 7, "ops": ops}) + "\n" + GOOD)
    assert run(file, "--json") == 1
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["id"] == 7
    assert first["results"] == [0] * 128
    assert len(first["reserved"]) == 128
    assert first["panic"] == "memblock: cannot resize reserved array"
    assert "panic" not in second
    assert run(file) == 1
    assert "2 cases, 132 calls, 1 ended in a panic" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("add 0 4096", "not JSON: Expecting value (column 1)"),
        ("[" * 100_000, "not a case: nested too deeply"),
        ("9" * 5000, "a number has too many digits"),
        ("[]", "a case is an object, not a list"),
        ('{"ops": []}', "key 'id' is missing"),
        ('{"id": "x"}', "key 'ops' is missing"),
        ('{"id": true, "ops": []}', "'id' is text or a number, not true"),
        ('{"id": 1, "ops": null}', "'ops' is a list, not null"),
        ('{"id": 1, "ops": [["add", 0, 1], []]}', "ops[1] is not a list of a name and numbers"),
        ('{"id": 1, "ops": [["explode"]]}', 'ops[0]: unknown op "explode"'),
        ('{"id": 1, "ops": [["add", 0]]}', "ops[0]: add takes 2, got 1"),
        (
            '{"id": 1, "ops": [["add", 0, "1M"]]}',
            "ops[0]: add: argument 2 is text, not a whole number",
        ),
        (
            '{"id": 1, "ops": [["add", 0, 1.5]]}',
            "ops[0]: add: argument 2 is a fraction, not a whole number",
        ),
        (
            '{"id": 1, "ops": [["add", true, 1]]}',
            "ops[0]: add: argument 1 is true, not a whole number",
        ),
        (
            '{"id": 1, "ops": [["add", 0, 18446744073709551616]]}',
            "ops[0]: add: argument 2 is outside 0 to 18446744073709551615",
        ),
        (
            '{"id": 1, "ops": [["alloc", 1, 1, 0, 0, -1, 2]]}',
            "ops[0]: alloc: argument 6 is outside 0 to 1",
        ),
    ],
)
def test_bad_cases_name_the_line(
    line: str, cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """File, line and cause; the good case before it was answered."""
    file = tmp_path / "cases"
    file.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(InputError) as caught:
        run(file, "--json")
    assert str(caught.value) == f"{file}: line 2: {cause}"
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_bad_files(tmp_path: Path) -> None:
    """Missing, a folder, empty, not text, gzip cut short or damaged."""
    file = tmp_path / "cases"
    with pytest.raises(InputError, match="cases: No such file or directory"):
        run(file)
    with pytest.raises(InputError, match="Is a directory"):
        run(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(InputError, match="cases: holds no case"):
        run(file)
    file.write_bytes(GOOD.encode() + b'\n{"id": "\xff"}')
    with pytest.raises(InputError, match=r"line 2: not UTF-8 \(byte 9\)"):
        run(file)
    packed = gzip.compress((GOOD + "\n").encode() * 3)
    file.write_bytes(packed[:-6])
    with pytest.raises(InputError, match="line 4: the gzip data is cut short"):
        run(file)
    file.write_bytes(packed[:20])
    with pytest.raises(InputError, match="line 1: the gzip data is cut short"):
        run(file)
    file.write_bytes(packed[:12] + b"\xff\xff\xff\xff" + packed[16:])
    with pytest.raises(InputError, match="line 1: bad gzip data"):
        run(file)
    file.write_bytes(packed[:-8] + bytes(8))
    with pytest.raises(InputError, match="bad gzip data"):
        run(file)


def test_every_op_answers_on_an_empty_machine() -> None:
    """Calls of no recorded case as well; no memory means no result but zeros."""
    ops = [
        *([name, 0, 4096] for name in ("clear_hotplug", "reserved_mark_kern", "cap_memory_range")),
        *([name, 1] for name in ("enforce_memory_limit", "mem_limit_remove_map", "trim_memory")),
        *([name, 4096] for name in ("is_memory", "is_map_memory", "reserved_hugetlb_size")),
        *([name] for name in ("phys_mem_size", "reserved_size", "estimated_nr_free_pages")),
        ["phys_alloc", 64, 64],
        ["phys_alloc_try_nid", 64, 64, 1],
        ["alloc_range_nid", 64, 0, 0, 0, 1, 0],
        ["end_of_DRAM"],
    ]
    line = json.dumps({"id": 0, "ops": ops})
    assert run_case(parse_case(line, "here")).results == (0,) * len(ops)
