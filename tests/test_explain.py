"""``khosim explain``: the life of the page that a finding is about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from khosim.cli.main import main
from khosim.explore.search import replay
from khosim.explore.story import explain, pages_of
from khosim.explore.world import Step

LINE = "kho=on liveupdate=on reserve_mem=4096:4096:b"
STEPS: list[Any] = [
    ["boot", ['"64M"', LINE, {"release": "of the campaign"}]],
    ["release_region", ["b"]],
]
PROBLEM = ["preserved-is-held", "page 0x1 (pfn 0x1, 1 pages) is preserved and free", 1, ""]
FINDING = {"release": "7.3", "steps": STEPS, "problem": PROBLEM, "hazards": ["region-release"]}


def _told(finding: Any, folder: Path) -> list[str]:
    file = folder / "finding.json"
    file.write_text(json.dumps(finding))
    return ["explain", str(file)]


def test_the_life_of_a_released_region(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Given to the region at boot, preserved, freed by the program, preserved still."""
    assert main(_told(FINDING, tmp_path)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("preserved-is-held: page 0x")
    phys = int(lines[0].split()[2], 16)
    assert lines[1:3] == [
        "shown by 2 steps on Linux 7.3",
        "known hazard: docs/hazards/region-release.md",
    ]
    life = lines[lines.index(f"the life of page {phys:#x} (pfn {phys >> 12:#x})") :]
    order = [
        "reserve_mem(name=b, size=0x1000, align=0x1000)",
        "kho_preserve_pages(",
        "; preserved for the successor",
        "2. kernel.reserve_mem.release_by_name('b')",
        "now it is free; preserved for the successor",
    ]
    at = [next(n for n, line in enumerate(life) if words in line) for words in order]
    assert at == sorted(at)


def test_a_silent_program_is_said_to_be_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the fixed release nothing speaks: status 0."""
    assert main(_told({**FINDING, "release": "7.3 fixed"}, tmp_path)) == 0
    assert "silent: Linux 7.3 fixed does not show it" in capsys.readouterr().out


def test_what_hides_a_finding_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finding that shows on a release with a fix is not to be taken for one of the release."""
    finding = {**FINDING, "release": "7.3+fix_luo_off=on", "behind": ["luo-off"]}
    assert main(_told(finding, tmp_path)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "shown by 2 steps on Linux 7.3+fix_luo_off=on",
        "it shows once luo-off is fixed",
    ]


def test_every_writer_is_told() -> None:
    """A page that one function wrote and another one afterwards has two lines, and both calls."""
    steps = [
        Step("boot", ('"64M"', "kho=on liveupdate=on", "7.3")),
        Step("memfd", ("m0", 0, 8)),
        Step("create_session", ("s0", "vm")),
        Step("preserve_file", ("s0", "m0", 0)),
        Step("kexec", ("kho=on liveupdate=on",)),
        Step("retrieve_session", ("s0", "vm")),
        Step("retrieve_file", ("s0", "m0", 0, "memfd")),
    ]
    world = replay(steps)
    assert world is not None
    problem = next(p for p in world.problems if p.invariant == "luo-file-equal")
    story = explain(steps, problem, "7.3")
    writers = [line.split("written by ")[1] for line in story.lines if " written by " in line]
    assert writers[0] == "kho_alloc_preserve"
    assert writers[1:3] == ["memfd_luo_preserve", "memfd_luo_freeze"]
    assert story.lines[-1] == "last written by memfd_luo_freeze in generation 0"
    assert story.spoke == problem


def test_pages_are_read_from_words() -> None:
    """Addresses and page frame numbers as the kernel and the checkers write them."""
    assert pages_of("page 0x3000 (pfn 0x3, 1 pages) is free", 4096) == [0x3000, 0x3000]
    assert pages_of("BUG: Bad page state pfn:02800: freed", 4096) == [0x2800000]
    assert pages_of("nothing", 4096) == []


def test_findings_of_a_corpus_by_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The beginning of an id is enough where only one begins so."""
    folder = tmp_path / "findings"
    folder.mkdir()
    for name in ("0123456789ab", "0199999999ab"):
        (folder / f"{name}.json").write_text(json.dumps(FINDING))
    assert main(["explain", str(tmp_path), "012"]) == 1
    assert main(["explain", str(folder / "0123456789ab.json")]) == 1
    capsys.readouterr()
    for prefix, told in (("01", "'01' can be any of 0123456789ab, 0199999999ab"), ("f", "no find")):
        assert main(["explain", str(tmp_path), prefix]) == 2
        assert told in capsys.readouterr().err
    assert main(["explain", str(folder)]) == 2
    assert "not a corpus" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("finding", "told"),
    [
        ([], "not an object"),
        ({}, "it names no release"),
        ({**FINDING, "release": "9.9"}, "9.9"),
        ({**FINDING, "steps": []}, "no program"),
        ({**FINDING, "steps": [["release_region", ["b"]]]}, "does not begin with a boot"),
        ({**FINDING, "steps": [*STEPS, ["nonsense", []]]}, "step 2: 'nonsense' is no kind"),
        ({**FINDING, "steps": [*STEPS, ["kexec", [LINE], {"x": 1}]]}, "options that no step has"),
        ({**FINDING, "steps": [["boot", ["exit()", LINE, "7.3"]]]}, "boots no machine"),
        ({**FINDING, "steps": [*STEPS, ["memfd", ["exit();x", 0, 0]]]}, "has no name"),
        ({**FINDING, "problem": ["x"]}, "not what an invariant said"),
    ],
)
def test_what_is_no_finding(
    finding: Any, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line names the file and what is wrong with it; nothing of it is run."""
    assert main(_told(finding, tmp_path)) == 2
    err = capsys.readouterr().err
    assert told in err
    assert len(err.splitlines()) == 1


def test_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing file and an id without a corpus: one line each."""
    assert main(["explain", str(tmp_path / "none")]) == 2
    (tmp_path / "torn").write_text('{"id"')
    assert main(["explain", str(tmp_path / "torn")]) == 2
    assert main(["explain", str(tmp_path / "torn"), "01"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
