"""The worked example of docs/handlers.md is a program that holds what it asserts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parent.parent / "docs" / "handlers.md"


def test_the_program_in_the_document_runs() -> None:
    """All its Python blocks, one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, Any] = {}
    exec(compile("\n".join(blocks), "handlers.md", "exec"), names)
    assert names["successor"].liveupdate.sessions.incoming.count == 0
