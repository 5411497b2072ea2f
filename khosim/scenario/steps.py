"""The kinds of step that a scenario may have, by their names in scenario files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from khosim.scenario.fields import Table, did_you_mean
from khosim.scenario.model import Limits, Step
from khosim.scenario.steps_alloc import Blob, Folios, Pages
from khosim.scenario.steps_content import Check, Corrupt, Write
from khosim.scenario.steps_guest import DeviceStep, GuestStep, Stop
from khosim.scenario.steps_hold import Free, Preserve, PreserveAt, Restore, Unpreserve
from khosim.scenario.steps_host import (
    Assign,
    Clock,
    Misbehave,
    Peer,
    PreserveVm,
    ResumeVm,
    Tick,
    VmStep,
)
from khosim.scenario.steps_luo import (
    Close,
    Finish,
    Kill,
    PreserveFd,
    Reboot,
    RetrieveSession,
    SessionStep,
)

__all__ = ("STEPS", "parse_step")

STEPS: Mapping[str, Callable[[Table, Limits], Step]] = {
    step.do: step.parse
    for step in (
        Folios,
        Pages,
        Blob,
        Preserve,
        Unpreserve,
        Restore,
        Free,
        Write,
        Check,
        PreserveAt,
        Corrupt,
        GuestStep,
        DeviceStep,
        Stop,
        SessionStep,
        PreserveFd,
        RetrieveSession,
        Finish,
        Close,
        Kill,
        Reboot,
        VmStep,
        Assign,
        Peer,
        Misbehave,
        Clock,
        Tick,
        PreserveVm,
        ResumeVm,
    )
}
"""What reads each kind of step. A new kind: a class with ``do`` and ``parse``, and a name here."""


def parse_step(value: object, place: str, limits: Limits) -> Step:
    """One step of a generation; raises :class:`khosim.InputError`."""
    table = Table(value, place)
    do = table.text("do")
    read = STEPS.get(do)
    if read is None:
        raise table.error(f"do: there is no step {do!r}{did_you_mean(do, STEPS)}")
    step = read(table, limits)
    table.done()
    return step
