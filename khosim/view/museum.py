"""Bugs of the museum, recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from khosim.bugs.exhibit import release_of
from khosim.bugs.stage import Stage
from khosim.errors import InputError
from khosim.view.recording import Recording

if TYPE_CHECKING:
    from khosim.bugs.bug import Bug
    from khosim.kernel.release import Release
    from khosim.simulator import Machine

__all__ = ("record_bug",)


class _RecordedStage(Stage):
    """A stage that records each of its machines."""

    def __init__(self, release: Release, title: str) -> None:
        super().__init__(release)
        self.title = title
        self.stories: list[Recording] = []
        self.checked: list[Recording] = []
        """Those whose machine has invariants to ask."""

    def machine(self, ram: str = "256M", **options: Any) -> Machine:
        """A machine that is recorded."""
        machine = super().machine(ram, **options)
        story = Recording(machine, self.title, in_depth=True)
        self.stories.append(story)
        if options.get("checks", True):
            self.checked.append(story)
        return machine

    def tell(self, text: str) -> None:
        """Narrate, and keep the moment."""
        super().tell(text)
        if self.stories:
            self.stories[-1].mark(text)


def record_bug(bug: Bug, *, is_fixed: bool = False) -> Recording:
    """Play a bug's scenario with its fix off or on: the recording of the machine that tells most.

    That is the first on which an invariant speaks, else the one with most events. Promises of calls
    that the scenario itself reports are among the violations. Raises InputError where the scenario
    has no machine to record.
    """
    state = "fix on" if is_fixed else "fix off"
    stage = _RecordedStage(release_of(bug, is_fixed=is_fixed), f"{bug.id}, {state}: {bug.subject}")
    stage.play(bug.scenario)
    for story in stage.checked:
        story.finish()
    told = [story for story in stage.stories if story.moments]
    if not told:
        raise InputError(bug.id, "its scenario has no machine that could be recorded")
    broken = [story for story in told if story.violations]
    chosen = broken[0] if broken else max(told, key=lambda story: len(story.events))
    known = set(chosen.violations)
    chosen.violations += [it for it in stage.violations if it not in known]
    return chosen
