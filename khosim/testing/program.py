"""A life as a script: imports, and the steps as they were run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from khosim.program_text import imports_of, script
from khosim.testing.rules import import_of

__all__ = ("PLACES", "life_script")

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
    "Dma": "khosim.testing",
    "failing_allocation": "khosim.testing",
    "flipped": "khosim.testing",
    "jump_with": "khosim.testing",
    "kill": "khosim.testing",
    "lost_memory": "khosim.testing",
    "oops": "khosim.testing",
    "overwritten": "khosim.testing",
    "refusing": "khosim.testing",
    "refusing_freeze": "khosim.testing",
    "stale": "khosim.testing",
    "torn": "khosim.testing",
}
"""Where each name that steps use comes from."""


def life_script(
    lines: Iterable[str], functions: Iterable[Callable[..., Any]], extra: Iterable[str] = ()
) -> str:
    """The script. ``functions`` are the user's, ``extra`` further imports."""
    body = "\n".join(lines)
    imports = [*imports_of(body, PLACES), *extra]
    own: dict[tuple[str, str], list[str]] = {}
    for function in functions:
        if function.__module__ == "types":
            imports.append(f"from types import {function.__name__}")
            continue
        folder, module, name = import_of(function)
        own.setdefault((folder, module), []).append(name)
    folders = dict.fromkeys(folder for folder, _ in own)
    setup = [f"sys.path.insert(0, {folder!r})" for folder in folders]
    setup += [f"from {module} import {', '.join(names)}" for (_, module), names in own.items()]
    return script(body, [*imports, *(["import sys"] if own else [])], setup)
