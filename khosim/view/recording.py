"""The whole story of a machine: every event of its kernels, and what memory held in between.

A :class:`Recording` listens to a machine. Events are kept as they come; moments are taken at the
stages of each kernel and where somebody asks for one (:meth:`Recording.mark`), as a scenario does
after each of its steps. Everything that khosim draws is drawn from a recording.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from khosim.checks.look import BOOTED, JUMP, RETRIEVED, TAKEOVER
from khosim.scenario.play import Player
from khosim.view.evidence import Evidence, take_evidence
from khosim.view.moment import Moment, take_moment
from khosim.view.trees import handover_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from khosim.checks.violation import Violation
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.trace import Event
    from khosim.scenario.model import Scenario
    from khosim.scenario.result import Result
    from khosim.simulator import Machine

__all__ = ("Phase", "Recording", "record", "recording")

_TITLES = {
    TAKEOVER: "what was preserved is reserved",
    BOOTED: "booted",
    RETRIEVED: "a file was retrieved",
    JUMP: "about to jump",
}


class Phase(NamedTuple):
    """Events in a row of one kernel in one phase: ``[first, end)`` of the recording's events."""

    generation: int
    name: str
    first: int
    end: int


class Recording:
    """What a machine and its kernels did, from the time it was made on.

    ``events`` are all events in order; ``moments`` are in order too, and each knows how many events
    there had been. ``violations`` are filled by :meth:`finish`. With ``in_depth``, ``evidence`` and
    ``trees`` hold for each moment what its ranges held and what its handover says, else nothing.
    """

    def __init__(self, machine: Machine, title: str = "", *, in_depth: bool = False) -> None:
        self.machine = machine
        self.title = title
        self.in_depth = in_depth
        self.evidence: list[dict[str, Evidence]] = []
        self.trees: list[dict[str, Any]] = []
        self.events: list[Event] = []
        self.moments: list[Moment] = []
        self.violations: list[Violation] = []
        self._running = True
        machine.listen(self._on_event)
        machine.watch(self._at_stage)

    def mark(self, title: str) -> Moment | None:
        """Take a moment of the running kernel now; None where none runs."""
        kernel = self.machine.kernel
        return None if kernel is None else self._take(kernel, "", title)

    def stop(self) -> None:
        """Listen no longer, and keep what there is."""
        self._running = False  # the kernel that runs goes on calling

    def finish(self) -> None:
        """Ask every invariant, and keep what they say."""
        self.violations = self.machine.check()

    def phases(self) -> list[Phase]:
        """The phases that the kernels went through, each with its events."""
        found: list[Phase] = []
        first = 0
        for index in range(1, len(self.events) + 1):
            event = self.events[index - 1]
            following = self.events[index] if index < len(self.events) else None
            if following is None or following[:2] != event[:2]:
                found.append(Phase(event.generation, event.phase, first, index))
                first = index
        return found

    def moment_at(self, event: int) -> Moment | None:
        """The last moment that was taken before event number ``event``, or the first of all."""
        before = [moment for moment in self.moments if moment.event <= event]
        return before[-1] if before else next(iter(self.moments), None)

    def _on_event(self, event: Event) -> None:
        if self._running:
            self.events.append(event)

    def _at_stage(self, kernel: Kernel, stage: str) -> None:
        if not self._running:
            return
        title = _TITLES.get(stage, stage)
        if stage == TAKEOVER and not kernel.kho_in.fdt_phys:
            title = "memory is known, nothing is taken over"
        self._take(kernel, stage, title)

    def _take(self, kernel: Kernel, stage: str, title: str) -> Moment:
        moment = take_moment(
            self.machine.hardware,
            kernel,
            index=len(self.moments),
            stage=stage,
            title=title,
            event=len(self.events),
        )
        self.moments.append(moment)
        if self.in_depth:
            hardware, handover = self.machine.hardware, moment.handover
            self.evidence.append(take_evidence(hardware, moment))
            self.trees.append({} if handover is None else handover_tree(hardware, handover))
        return moment


@contextmanager
def recording(machine: Machine, title: str = "", *, in_depth: bool = False) -> Iterator[Recording]:
    """Record what a ``with`` block does with ``machine``, and ask the invariants at its end."""
    story = Recording(machine, title, in_depth=in_depth)
    try:
        yield story
    finally:
        story.stop()
    story.finish()


def record(scenario: Scenario, *, in_depth: bool = False) -> tuple[Recording, Result]:
    """Play a scenario and record it, with a moment after each step."""
    player = Player(scenario, after_step=lambda step: story.mark(f"{step.do} {step.name}".strip()))
    title = f"{scenario.name}: {scenario.about}"
    story = Recording(player.machine, title, in_depth=in_depth)
    for _ in player.generations():
        pass
    story.finish()
    return story, player.result
