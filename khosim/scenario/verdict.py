"""What the invariants say in the end: each with its sentence, and whether it holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from khosim.checks.invariants import INVARIANTS
from khosim.checks.violation import Violation

__all__ = ("Verdict", "invariant_names", "verdicts")


class Verdict(NamedTuple):
    """One invariant at the end of a run."""

    name: str
    sentence: str
    ok: bool


def invariant_names() -> list[str]:
    """The names of all invariants."""
    return [invariant.name for invariant in INVARIANTS]


def verdicts(violations: Iterable[Violation]) -> list[Verdict]:
    """Every invariant, in the auditor's order."""
    broken = {violation.invariant for violation in violations}
    return [
        Verdict(invariant.name, invariant.protects, invariant.name not in broken)
        for invariant in INVARIANTS
    ]
