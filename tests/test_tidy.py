"""The housekeeping that reviewers should not have to do."""

from __future__ import annotations

import ast
import os
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE_FOLDERS = ("khosim", "benchmarks", "tests", "examples")
TEXT_SUFFIXES = {".py", ".c", ".md", ".toml", ".txt", ".cfg", ".ini", ".yml", ".yaml", ".sh", ""}
NOT_OURS = re.compile(r"^(\.git|\.venv|\.hypothesis|build|dist|site|golden|.*(_cache|__|-info))$")

LINE_CHARS_MAX = 100
MODULE_LINES_MAX = 450
TEST_LINES_MAX = 800  # tables of cases are long, and easy to read
MAY_PRINT = ("cli", "view")

# Written in two halves, so that this file does not trip over itself.
BANNED = {
    "a path of one machine": re.compile(r"(?<![\w.])/" + r"(?:work|tmp|root|home)/"),
    "the host of a package registry": re.compile(
        r"\b(?:py" + r"pi\.org|python" + r"hosted\.org|npm" + r"js\.(?:org|com))", re.IGNORECASE
    ),
}


def _python_files() -> list[Path]:
    return sorted(path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*.py"))


def _text_files() -> list[Path]:
    found: list[Path] = []
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [sub for sub in subfolders if not NOT_OURS.search(sub)]
        found += [
            Path(folder, name)
            for name in names
            if Path(name).suffix in TEXT_SUFFIXES and name != ".git"  # a file in a second worktree
        ]
    return sorted(found)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_python_file = pytest.mark.parametrize("path", _python_files(), ids=_name)
every_test_file = pytest.mark.parametrize(
    "path", sorted((ROOT / "tests").glob("**/test_*.py")), ids=_name
)


def _is_code(path: Path) -> bool:
    return bool(_tree(path).body)


@every_python_file
def test_modules_say_what_they_are(path: Path) -> None:
    """Each module that has any content begins with a docstring."""
    assert not _is_code(path) or ast.get_docstring(_tree(path))


@every_python_file
def test_annotations_are_postponed(path: Path) -> None:
    """``from __future__ import annotations`` is the first import of each module that has code."""
    imports = [n for n in _tree(path).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    if any(not isinstance(node, ast.Expr) for node in _tree(path).body):
        assert imports, "no import at all"
        assert isinstance(imports[0], ast.ImportFrom)
        assert imports[0].module == "__future__"
        assert "annotations" in [alias.name for alias in imports[0].names]


@every_python_file
def test_modules_are_small(path: Path) -> None:
    """A module fits in a reader's head."""
    lines_max = TEST_LINES_MAX if path.is_relative_to(ROOT / "tests") else MODULE_LINES_MAX
    assert len(path.read_text(encoding="utf-8").splitlines()) <= lines_max


@pytest.mark.parametrize(
    "path", [p for p in _text_files() if p.suffix in (".py", ".c")], ids=_name
)
def test_lines_are_short(path: Path) -> None:
    """Lines fit beside each other on a screen, carry no tabs and no blanks at their end."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= LINE_CHARS_MAX, f"line {number}"
        assert line == line.rstrip(), f"line {number}"
        assert "\t" not in line or path.suffix == ".c", f"line {number}"


def test_no_trace_of_one_machine() -> None:
    """No file names a path of the machine it was written on, or the host of a registry."""
    found = [
        f"{_name(path)}:{number}: {what}"
        for path in _text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for what, pattern in BANNED.items()
        if pattern.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "is_banned"),
    [
        ("open('/wor" + "k/x')", True),
        ("cd /tm" + "p/build", True),
        ("https://py" + "pi.org/simple", True),
        ("kernel/liveupdate/kexec_handover.c", False),
        ("tools/testing/work/list", False),
        ("../home/x", False),
    ],
)
def test_banned_strings_are_seen(line: str, is_banned: bool) -> None:
    """The patterns above find what they are meant to find, and nothing else."""
    assert any(pattern.search(line) for pattern in BANNED.values()) == is_banned


@every_test_file
def test_tests_say_what_they_hold(path: Path) -> None:
    """Each test function has a docstring."""
    silent = [
        node.name
        for node in ast.walk(_tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


@every_test_file
def test_tests_have_names_of_their_own(path: Path) -> None:
    """No test function is silently replaced by a later one of the same name."""
    classes = [node for node in _tree(path).body if isinstance(node, ast.ClassDef)]
    for body in (_tree(path).body, *(node.body for node in classes)):
        names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
        assert sorted(names) == sorted(set(names))


def test_only_the_command_line_prints() -> None:
    """Library modules return what they know; cli and view put it on the screen."""
    package = ROOT / "khosim"
    found = [
        f"{_name(path)}:{node.lineno}"
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).parts[0] not in MAY_PRINT
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert found == []
