"""Every exhibit of the museum shows its bug with the fix off, and nothing with it on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from khosim.bugs.bug import Bug
from khosim.bugs.catalogue import all_bugs, find_bug
from khosim.bugs.elsewhere import ELSEWHERE
from khosim.bugs.exhibit import release_of, show
from khosim.bugs.promises import PROMISES
from khosim.bugs.stage import Stage
from khosim.checks.invariants import INVARIANTS
from khosim.cli.main import main
from khosim.errors import InputError
from khosim.kernel.release import MAINLINE, find_release

NOT_IN_A_RELEASE = {"A7", "A11", "A29", "A30", "D27"}
"""A bug that its callers hid, one by design, two that no release had, one that a new name ended."""
every_bug = pytest.mark.parametrize("bug", all_bugs(), ids=str)


@every_bug
def test_an_exhibit_shows_what_it_claims(bug: Bug) -> None:
    """Just the named invariants speak with the fix off, and none with it on."""
    exhibit = show(bug)
    assert exhibit.without_fix.spoke == tuple(sorted(bug.caught_by))
    assert exhibit.with_fix.spoke == ()


@every_bug
def test_an_exhibit_is_whole(bug: Bug) -> None:
    """Each says what it is, differs between off and on, and names invariants that there are."""
    known = {invariant.name for invariant in INVARIANTS} | set(PROMISES)
    assert bug.caught_by
    assert set(bug.caught_by) <= known
    assert release_of(bug, is_fixed=False) != release_of(bug, is_fixed=True)
    assert re.fullmatch(r"[0-9a-f]{12}|", bug.commit)
    assert len(bug.story.split()) > 30
    assert bug.scenario.__module__.endswith(f"{bug.id.lower()}_{bug.name.replace('-', '_')}")


def mainline_in(text: str) -> list[str]:
    """Return the tagged releases that a text such as ``"6.16 to 7.0, 7.2-rc"`` names."""
    release = r"(6\.1[6-9]|7\.[0-3])"
    found: list[str] = []
    for first, last in re.findall(rf"(?<![\w.]){release}(?: to {release})?(?![\w.-])", text):
        start = MAINLINE.index(first)
        found += MAINLINE[start : MAINLINE.index(last or first) + 1]
    return found


@every_bug
def test_the_releases_agree_with_an_exhibit(bug: Bug) -> None:
    """What is said to be broken in a release is so in its data, and right where it was fixed."""
    off, on = release_of(bug, is_fixed=False), release_of(bug, is_fixed=True)
    if bug.id in NOT_IN_A_RELEASE:
        return
    for name in {*bug.without_fix, *bug.with_fix}:
        for release in mainline_in(bug.broken):
            assert getattr(find_release(release), name) == getattr(off, name), (release, name)
        for release in mainline_in(bug.fixed)[:1]:
            assert getattr(find_release(release), name) == getattr(on, name), (release, name)


def test_numbers_and_names_are_given_once() -> None:
    """No two exhibits, and none of those that cannot be shown, share a number or a name."""
    both = [(bug.id, bug.name) for bug in all_bugs()] + [(bug.id, bug.name) for bug in ELSEWHERE]
    assert len({number for number, _ in both}) == len(both)
    assert len({name for _, name in both}) == len(both)


def test_a_stage_reports_what_was_promised() -> None:
    """A call that is not refused as it should be, or refused, or a panic, is a broken promise."""
    stage = Stage(find_release("7.3"))

    def scenario(stage: Stage) -> None:
        kernel = stage.boot("64M")
        stage.refuses("EINVAL", "preserving nothing", lambda: kernel.kho_alloc_preserve(0))
        stage.refuses("ENOMEM", "preserving nothing", lambda: kernel.kho_alloc_preserve(0))
        stage.refuses("ENOMEM", "a page", lambda: kernel.kho_alloc_preserve(8))
        assert stage.carries_out("a page", lambda: kernel.kho_alloc_preserve(8))
        assert not stage.carries_out("nothing", lambda: kernel.kho_alloc_preserve(0))
        kernel.kho_alloc_preserve(0)

    stage.play(scenario)
    assert [(found.invariant, found.message) for found in stage.violations] == [
        ("errno-as-documented", "preserving nothing gave -EINVAL and not -ENOMEM"),
        ("errno-as-documented", "a page went through and did not give -ENOMEM"),
        ("call-succeeds", "nothing gave -EINVAL"),
        ("call-succeeds", "kho_alloc_preserve: -EINVAL (size 0)"),
    ]


def test_all_of_a_stages_machines_are_checked() -> None:
    """Damage in any machine that a scenario made is seen when it is over."""
    stage = Stage(find_release("7.3"))

    def scenario(stage: Stage) -> None:
        for is_broken in (True, False):
            kernel = stage.boot("64M")
            folio = kernel.alloc_folio()
            kernel.kho_preserve_folio(folio)
            successor = kernel.kexec()
            if is_broken:
                successor.ram.write(folio.phys, b"!", (1, "intruder"))

    stage.play(scenario)
    assert stage.spoke == ("preserved-content",)


def test_a_bug_is_found_by_number_and_by_name() -> None:
    """Either will do, in any case; what cannot be shown says why."""
    assert find_bug("a26") is find_bug("numa-span")
    with pytest.raises(InputError, match=r"bug A2: .*lock checker"):
        find_bug("A2")
    with pytest.raises(InputError, match="did you mean 'numa-span'"):
        find_bug("numa-spam")
    with pytest.raises(InputError, match="no such entry"):
        find_bug("")


def test_the_command_tells_a_story(capsys: pytest.CaptureFixture[str]) -> None:
    """``khosim bugs ID`` names commit and releases, plays both acts and says who spoke."""
    assert main(["bugs", "A26"]) == 0
    out = capsys.readouterr().out
    for part in ("91e74fa8b1bc", "the fix is off", "the fix is on", "! one-node-per-block:"):
        assert part in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_readme_shows_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """The README's example is what the command prints, in that order."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    shown = readme.split("$ khosim bugs A9\n")[1].split("```")[0].splitlines()
    assert main(["bugs", "A9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = 0
    for line in shown:
        if line != "...":
            at = lines.index(line, at)


def test_the_command_lists(capsys: pytest.CaptureFixture[str]) -> None:
    """``khosim bugs`` has a line for each exhibit and a reason for each bug that is not one."""
    assert main(["bugs"]) == 0
    out = capsys.readouterr().out
    for entry in (*all_bugs(), *ELSEWHERE):
        assert re.search(rf"^{entry.id} +{entry.name}\b", out, re.MULTILINE)


def test_json_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    """``--json`` gives the facts of an exhibit."""
    assert main(["bugs", "A26", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["id"] == "A26"
    assert told["reproduced"] is True
    assert told["caught_by"] == ["one-node-per-block"]
    assert told["clean_when_fixed"] is True


def test_the_program_is_the_exhibits_own_file(capsys: pytest.CaptureFixture[str]) -> None:
    """``--program`` prints what was played."""
    assert main(["bugs", "A26", "--program"]) == 0
    out = capsys.readouterr().out
    assert "def scenario(stage: Stage)" in out
    compile(out, "a26", "exec")


@pytest.mark.parametrize(
    "argv",
    [["A26", "--all"], ["--program"], ["A26", "--program", "--json"], ["Z9"], ["--no-such"]],
    ids=" ".join,
)
def test_wrong_calls(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A call that makes no sense is refused in one line, with status 2."""
    assert main(["bugs", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
