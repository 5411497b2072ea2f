"""The worked example of docs/drivers.md holds what it asserts, and the tables are complete."""

from __future__ import annotations

import re
from pathlib import Path

from khosim.drivers.core import PIECES

DOCUMENT = Path(__file__).parent.parent / "docs" / "drivers.md"


def test_the_example_runs() -> None:
    """All Python blocks of the document, one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, object] = {}
    exec(compile("\n".join(blocks), "drivers.md", "exec"), names)


def test_every_piece_has_a_row() -> None:
    """What is left out, and what that does, for each piece and no other."""
    rows = re.findall(r"^\| `([a-z-]+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows[: len(PIECES)]) == sorted(PIECES)
