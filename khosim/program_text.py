"""Programs as text: Python that is carried out step by step, and printed as a script.

What a search draws and what a test's life does are both written with this, so that what is printed
is what was run, and runs by itself.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import CodeType

__all__ = ("FILENAME", "compiled", "imports_of", "indented", "script")

FILENAME = "<khosim program>"
"""What tracebacks call the file that a step's code is in."""


@lru_cache(maxsize=4096)
def compiled(source: str) -> CodeType:
    """The code of a step."""
    return compile(source, FILENAME, "exec")


def indented(source: str) -> str:
    """The text, one block deeper."""
    return "\n".join(f"    {line}" for line in source.splitlines())


def imports_of(body: str, places: Mapping[str, str]) -> list[str]:
    """The imports that ``body`` needs of the names in ``places``, which say what module has them.

    Sorted, a line for each module, the names in the order of ``places``.
    """
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    wanted: dict[str, list[str]] = {}
    for name, place in places.items():
        if name in used:
            wanted.setdefault(place, []).append(name)
    return sorted(f"from {place} import {', '.join(names)}" for place, names in wanted.items())


def script(body: str, imports: Iterable[str], setup: Iterable[str] = ()) -> str:
    """The whole file: imports of Python's own modules, of khosim's, ``setup``, and the steps."""
    lines = sorted(set(imports))
    own = [line for line in lines if " khosim" in line]
    others = [line for line in lines if line not in own]
    groups = [group for group in (others, own, list(setup), [body]) if group]
    return "\n\n".join("\n".join(group) for group in groups) + "\n"
