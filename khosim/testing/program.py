"""A life as a script: imports, and the steps as they were run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from khosim.testing.rules import import_of

__all__ = ("PLACES", "script")

PLACES = {
    "suppress": "contextlib",
    "KernelError": "khosim",
    "KernelPanic": "khosim.errors",
    "Machine": "khosim",
    "KhoVmallocSlot": "khosim.kernel.kho_vmalloc",
    "kho_preserve_vmalloc": "khosim.kernel.kho_vmalloc",
    "kho_restore_vmalloc": "khosim.kernel.kho_vmalloc",
    "kho_unpreserve_vmalloc": "khosim.kernel.kho_vmalloc",
    "vfree": "khosim.kernel.vmalloc",
    "vmalloc": "khosim.kernel.vmalloc",
    "assert_no_violations": "khosim.testing",
    "assert_not_preserved": "khosim.testing",
    "assert_preserved": "khosim.testing",
    "assert_preserved_is_held": "khosim.testing",
    "failing_allocation": "khosim.testing",
    "flipped": "khosim.testing",
    "jump_with": "khosim.testing",
    "oops": "khosim.testing",
    "overwritten": "khosim.testing",
    "refusing_freeze": "khosim.testing",
    "stale": "khosim.testing",
    "torn": "khosim.testing",
}
"""Where each name that steps use comes from."""


def script(
    lines: Iterable[str], functions: Iterable[Callable[..., Any]], extra: Iterable[str] = ()
) -> str:
    """The script. ``functions`` are the user's, ``extra`` further imports."""
    text = "\n".join(lines)
    words = set(re.findall(r"[A-Za-z_]\w*", text))
    wanted: dict[str, list[str]] = {}
    for name, place in PLACES.items():
        if name in words:
            wanted.setdefault(place, []).append(name)
    head = [f"from {place} import {', '.join(names)}" for place, names in wanted.items()]
    head += sorted(extra)
    own: dict[tuple[str, str], list[str]] = {}
    for function in functions:
        if function.__module__ == "types":
            head.append(f"from types import {function.__name__}")
            continue
        folder, module, name = import_of(function)
        own.setdefault((folder, module), []).append(name)
    folders = list(dict.fromkeys(folder for folder, _ in own))
    if folders:
        head = ["import sys", *head]
        head += [f"sys.path.insert(0, {folder!r})" for folder in folders]
        head += [f"from {module} import {', '.join(names)}" for (_, module), names in own.items()]
    return "\n".join([*head, "", text, ""])
