"""Exercises: every test of them fails until it is solved, and holds for the teacher's solution."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "exercises"
EXERCISES = sorted(path.stem for path in (FOLDER / "solutions").glob("*.py"))


def _outcomes(*arguments: str) -> dict[str, set[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", *arguments, str(FOLDER)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=300,
    )
    found: dict[str, set[str]] = {}
    for outcome, name in re.findall(r"^(\w+) \S*/test_(\w+)\.py::", done.stdout, re.MULTILINE):
        found.setdefault(name, set()).add(outcome)
    assert done.returncode == (0 if "--solutions" in arguments else 1), done.stdout
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "outcome"), [((), "FAILED"), (("--solutions",), "PASSED")], ids=["new", "solved"]
)
def test_exercises_are_to_be_solved_and_can_be(arguments: tuple[str, ...], outcome: str) -> None:
    """As handed out every test fails; with the solutions every test holds."""
    assert _outcomes("-p", "no:cacheprovider", *arguments) == {
        name: {outcome} for name in EXERCISES
    }


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_is_whole(name: str) -> None:
    """It has something to hand out, a test and a line in the README; its solution is another."""
    handed_out = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert handed_out.startswith('"""Exercise ')
    assert handed_out != (FOLDER / "solutions" / f"{name}.py").read_text(encoding="utf-8")
    assert (FOLDER / f"test_{name}.py").is_file()
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert f"(exercises/{name}.py)" in readme
