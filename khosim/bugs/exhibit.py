"""Playing an exhibit: once with the fix off, once with it on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage
from khosim.kernel.release import Release, find_release

__all__ = ("Exhibit", "release_of", "show")


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A bug, and what came of its scenario without and with the fix."""

    bug: Bug
    without_fix: Stage
    with_fix: Stage

    @property
    def reproduced(self) -> bool:
        """Whether with the fix off just the invariants spoke that were to speak."""
        return self.without_fix.spoke == tuple(sorted(self.bug.caught_by))

    @property
    def clean_when_fixed(self) -> bool:
        """Whether with the fix on no invariant spoke."""
        return not self.with_fix.spoke

    @property
    def ok(self) -> bool:
        """Whether the exhibit shows what it claims."""
        return self.reproduced and self.clean_when_fixed

    def as_json(self) -> dict[str, Any]:
        """Plain data, in a fixed order."""
        bug = self.bug
        return {
            "id": bug.id,
            "name": bug.name,
            "subject": bug.subject,
            "commit": bug.commit,
            "broken": bug.broken,
            "fixed": bug.fixed,
            "release": bug.release,
            "reproduced": self.reproduced,
            "caught_by": list(self.without_fix.spoke),
            "expected": sorted(bug.caught_by),
            "clean_when_fixed": self.clean_when_fixed,
            "spoke_when_fixed": list(self.with_fix.spoke),
            "partly": bug.partly,
            "violations": [str(violation) for violation in self.without_fix.violations],
        }


def release_of(bug: Bug, *, is_fixed: bool) -> Release:
    """The release that ``bug`` is shown on, with its fix on or off."""
    changes = bug.with_fix if is_fixed else bug.without_fix
    return find_release(bug.release).evolve(**changes)


def show(bug: Bug) -> Exhibit:
    """Play a bug's scenario twice."""
    stages = []
    for is_fixed in (False, True):
        stage = Stage(release_of(bug, is_fixed=is_fixed))
        stage.play(bug.scenario)
        stages.append(stage)
    return Exhibit(bug, *stages)
