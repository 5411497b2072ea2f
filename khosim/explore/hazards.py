"""The hazards that the search found, and the switches that make each go away."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import TYPE_CHECKING

from khosim.kernel.behaviours import Release
from khosim.kernel.release import RELEASES, find_release

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = (
    "EARLIER",
    "SWITCHES",
    "fixed",
    "hazard_of",
    "known_in",
    "like",
    "silenced",
    "told",
)

SWITCHES: dict[str, bool] = {
    field.name: True for field in dataclasses.fields(Release) if field.name.startswith("fix_")
}
"""What a release with all hazards switched off evolves by."""
EARLIER = {
    "kdump_guard": "kdump-scratch",
    "scratch_excludes_hugetlb": "huge-pages-scale",
    "hugetlb_outside_scratch": "huge-pages-scale",
}
"""Hazards of 7.2 that 7.3 has fixed: the behaviours that are on from then on, and the pages."""


def known_in(release: Release) -> list[str]:
    """The switches of known hazards that ``release`` has."""
    return [name for name in (*SWITCHES, *EARLIER) if not getattr(release, name)]


def fixed(release: str | Release) -> Release:
    """``release`` with every known hazard switched off."""
    found = find_release(release)
    return found.evolve(name=f"{found.name} fixed", **dict.fromkeys(known_in(found), True))


def silenced(release: str | Release, names: Sequence[str]) -> str | Release:
    """``release`` with the known hazards of these switches off."""
    if not names:
        return release
    if isinstance(release, str):
        return "+".join((release, *(f"{name}=on" for name in names)))
    return release.evolve(name=f"{release.name} and", **dict.fromkeys(names, True))


def like(release: str | Release, base: str) -> str:
    """The release ``base`` with the fixes that ``release`` has: what it takes for a successor."""
    found = find_release(release)
    return "+".join((base, *(f"{name}=on" for name in SWITCHES if getattr(found, name))))


@lru_cache(maxsize=8)
def _fixed_again(name: str) -> Release:
    return fixed(name)


def told(release: str | Release) -> str:
    """What a program calls ``release``: its name, ``fixed`` of one, or the variable ``release``."""
    if isinstance(release, str):
        return repr(release)
    base = release.name.removesuffix(" fixed")
    if base in RELEASES and release == _fixed_again(base):
        return f"fixed({base!r})"
    return "release"


def hazard_of(switch: str) -> str:
    """The name of the hazard that a switch makes go away: that of its page in docs/hazards."""
    return EARLIER.get(switch) or switch.removeprefix("fix_").replace("_", "-")
