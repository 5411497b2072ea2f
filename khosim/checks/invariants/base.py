"""What an invariant is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from khosim.checks.look import Look
    from khosim.checks.violation import Violation

__all__ = ("ALWAYS", "DEVICES", "REPORTED_MAX", "Invariant")

ALWAYS = "always"
DEVICES = "devices"
"""The kind that is asked about only where a machine has devices."""
REPORTED_MAX = 16
"""How many places one look reports for one invariant; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Invariant:
    """A promise that every kernel keeps at every look.

    ``name`` is what reports call it, ``protects`` one sentence of what would be lost without it,
    ``stages`` are the looks at which ``check`` is asked. ``check`` returns the violations it sees.
    """

    name: str
    protects: str
    stages: frozenset[str]
    check: Callable[[Look], Sequence[Violation]]
    kind: str = ALWAYS

    def __str__(self) -> str:
        return f"{self.name}: {self.protects}"
