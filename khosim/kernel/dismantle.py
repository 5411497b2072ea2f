"""Taking a kernel apart when its machine is closed.

The parts of a kernel know it and it knows them, so Python frees none of them before its garbage
collector comes by. A kernel without parts is freed at its last use, and so is each part. The real
kernel has nothing like it: it is overwritten.
"""

from __future__ import annotations

from khosim.kernel.direct_map import DirectMap
from khosim.kernel.kernel import Kernel

__all__ = ("dismantle",)

_REMAINS = frozenset(
    ("__weakref__", "alive", "cmdline", "config", "generation", "messages", "phase", "release")
)
_PARTS = tuple(
    part for kind in (Kernel, DirectMap) for part in kind.__slots__ if part not in _REMAINS
)


def dismantle(kernel: Kernel) -> None:
    """Take all parts from a kernel, which is dead then; it still knows its name and its log."""
    kernel.alive = False
    for part in _PARTS:
        if hasattr(kernel, part):
            delattr(kernel, part)
