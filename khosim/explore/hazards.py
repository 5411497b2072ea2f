"""The hazards of 7.3 that the search found, and the switches that make each go away."""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.kernel.release import find_release

if TYPE_CHECKING:
    from khosim.kernel.behaviours import Release

__all__ = ("SWITCHES", "fixed")

SWITCHES: dict[str, bool] = {}


def fixed(release: str | Release) -> Release:
    """``release`` with every known hazard switched off."""
    found = find_release(release)
    return found.evolve(name=f"{found.name} fixed", **SWITCHES)
