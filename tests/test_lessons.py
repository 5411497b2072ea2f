"""The lessons print what stands beside them, and their notebooks are up to date."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "lessons"
LESSONS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def _converter() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks", FOLDER / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebooks = _converter()


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_prints_its_golden_output(lesson: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells, run in order, print the .out file; the .ipynb has these cells and this output."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(FOLDER)  # as a notebook is run
    book = notebooks.notebook(lesson)
    assert notebooks.printed(book) == lesson.with_suffix(".out").read_text(encoding="utf-8")
    assert notebooks.text_of(book) == lesson.with_suffix(".ipynb").read_text(encoding="utf-8")


def test_a_lesson_runs_as_a_script() -> None:
    """In a process of its own, from anywhere, the first lesson prints the same."""
    lesson = LESSONS[0]
    done = subprocess.run(
        [sys.executable, str(lesson)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
        check=False,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.stdout == lesson.with_suffix(".out").read_text(encoding="utf-8")


def test_lessons_are_numbered_and_listed() -> None:
    """Numbers go up from 1 without a gap, and the README names each."""
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for number, lesson in enumerate(LESSONS, 1):
        assert lesson.name.startswith(f"{number:02}_")
        assert f"(lessons/{lesson.name})" in listed


def test_nothing_is_left_of_a_lesson_that_is_gone() -> None:
    """Each output and each notebook has its script."""
    names = {lesson.stem for lesson in LESSONS}
    assert {path.stem for path in FOLDER.glob("*.out")} == names
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == names


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_notebooks_are_notebooks(lesson: Path) -> None:
    """The parts that nbformat 4.5 asks for, no line longer than a screen; all text is in a cell."""
    book: dict[str, Any] = json.loads(lesson.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in book["cells"]]
    assert len(ids) == len(set(ids))
    written = lesson.read_text(encoding="utf-8").replace("\n# ", "\n").replace("\n#\n", "\n\n")
    for cell in book["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert ("outputs" in cell) == (cell["cell_type"] == "code")
        assert cell["source"]
        assert all(line.strip("# \n") in written for line in cell["source"])
        for out in cell.get("outputs", ()):
            assert all(len(line) <= 81 for line in out["text"])


def test_the_converter_tells_cells_apart(tmp_path: Path) -> None:
    """Docstring, text and code become cells; code sees what earlier cells made."""
    script = tmp_path / "01_x.py"
    script.write_text(
        '"""A title.\n\nAn intro.\n"""\n\n# %%\nx = 1\n\n# %% [markdown]\n# Text.\n#\n# * more\n'
        "\n# %%\nprint(x + 1)\nprint()\n",
        encoding="utf-8",
    )
    book = notebooks.notebook(script)
    assert ["".join(cell["source"]) for cell in book["cells"]] == [
        "# A title.\n\nAn intro.",
        "x = 1",
        "Text.\n\n* more",
        "print(x + 1)\nprint()",
    ]
    assert [cell.get("execution_count") for cell in book["cells"]] == [None, 1, None, 2]
    assert notebooks.printed(book) == "2\n\n"
