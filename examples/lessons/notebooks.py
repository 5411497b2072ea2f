"""The lessons as notebooks: ``python examples/lessons/notebooks.py`` writes all of them anew.

A cell begins at ``# %%``, one of text at ``# %% [markdown]`` with its lines as comments; the
script's docstring is the first cell. Code is run, and what a cell prints is kept below it.
"""

from __future__ import annotations

import ast
import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

__all__ = ("lessons", "notebook", "printed", "text_of")

HERE = Path(__file__).parent
_CELL = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def lessons() -> list[Path]:
    """The scripts, in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def notebook(script: Path) -> dict[str, Any]:
    """The notebook of a script, in nbformat 4.5; runs the script, cell by cell."""
    intro, *rest = _CELL.split(script.read_text(encoding="utf-8"))
    heading = ast.get_docstring(ast.parse(intro)) or ""
    cells = [_cell(0, "markdown", f"# {heading}")]
    names: dict[str, Any] = {"__name__": "__main__"}
    runs = 0
    for number, (mark, text) in enumerate(zip(rest[::2], rest[1::2], strict=True), 1):
        text = text.strip("\n")
        if mark:
            cells.append(_cell(number, "markdown", re.sub(r"^# ?", "", text, flags=re.MULTILINE)))
            continue
        runs += 1
        with redirect_stdout(io.StringIO()) as out:
            exec(compile(text, f"{script.name}: cell {number}", "exec"), names)
        cells.append(_cell(number, "code", text) | _ran(runs, out.getvalue()))
    return {"cells": cells, "metadata": _METADATA, "nbformat": 4, "nbformat_minor": 5}


def _cell(number: int, kind: str, text: str) -> dict[str, Any]:
    lines = text.splitlines(keepends=True)
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines}


def _ran(run: int, text: str) -> dict[str, Any]:
    lines = text.splitlines(keepends=True)
    stream = {"name": "stdout", "output_type": "stream", "text": lines}
    return {"execution_count": run, "outputs": [stream] if lines else []}


def printed(book: dict[str, Any]) -> str:
    """All that a notebook's cells printed."""
    streams = [out for cell in book["cells"] for out in cell.get("outputs", ())]
    return "".join(line for stream in streams for line in stream["text"])


def text_of(book: dict[str, Any]) -> str:
    """A notebook as its file has it."""
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for lesson in lessons():
        made = notebook(lesson)
        lesson.with_suffix(".ipynb").write_text(text_of(made), encoding="utf-8")
        lesson.with_suffix(".out").write_text(printed(made), encoding="utf-8")
        print(lesson.stem)
