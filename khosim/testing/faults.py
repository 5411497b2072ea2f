"""Plans of faults for a life: what strikes at which step, and what has to survive it.

The faults themselves are in :mod:`khosim.faults`; a crash is a cold boot, after which nothing that
was preserved has a future.
"""

from __future__ import annotations

from typing import NamedTuple

from khosim.faults.between import (
    flipped,
    jump_with,
    lost_memory,
    overwritten,
    regained_memory,
    stale,
    torn,
)
from khosim.faults.calls import failing_allocation, kill, oops, refusing, refusing_freeze
from khosim.faults.device import Dma

__all__ = (
    "DAMAGES",
    "KINDS",
    "PLAIN",
    "Dma",
    "Fault",
    "FaultPlan",
    "failing_allocation",
    "flipped",
    "jump_with",
    "kill",
    "lost_memory",
    "oops",
    "overwritten",
    "refusing",
    "refusing_freeze",
    "regained_memory",
    "stale",
    "torn",
)

PLAIN = ("allocation", "freeze", "crash")
KINDS = (*PLAIN, "callback", "device", "kill", "oops", "memory", "bytes")
_SURVIVES = {
    "allocation": "everything",
    "callback": "everything",
    "freeze": "everything",
    "device": "everything, with what the device wrote",
    "kill": "all but the agent's things",
    "oops": "all but the step's things",
    "memory": "everything, where nothing handed over lay there; else the machine",
    "bytes": "the machine",
    "crash": "the machine",
}

DAMAGES = (
    "overwritten('root FDT', 0, 'ffffffff')",
    "overwritten('map', 8, 'ffffffffffffffff')",
    "overwritten('LUO', 16, '0100000000000000')",
    "overwritten('/LUO/sessions/blocks[0]', 8, 'ffffffffffffffff')",
    "flipped('table', 70)",
    "flipped('scratch array', 70)",
    "stale(kernel, 'root FDT')",
    "stale(kernel, 'LUO')",
    "torn(kernel, 'root FDT')",
    "torn(kernel, 'table')",
)
"""What a fault of kind "bytes" does, by its number: places of the handover that it hits."""


class Fault(NamedTuple):
    """One fault. ``kind`` is one of :data:`KINDS`, ``at`` the number of the step it strikes.

    "allocation": the ``n``-th allocation of that step fails, counted from 1. "callback": the
    ``n``-th callback of a file handler that may say no in that step does. "freeze": the ``n``-th
    file refuses at the first kexec from that step on. "crash": before that step. "device": from
    that step on a device writes to the ``n``-th preserved folio, until its owner has it back.
    "kill": before that step the agent is killed, who has the kit's sessions and memfds open.
    "oops": the task dies at the ``n``-th event of that step. "memory": at the first kexec from that
    step on some RAM is gone, by ``n`` a piece or a node. "bytes": the ``n``-th of :data:`DAMAGES`
    strikes at the first kexec from that step on.
    """

    kind: str
    at: int
    n: int = 1

    @property
    def survives(self) -> str:
        """What has to, in words; outside of it a fault is a scenario, and no finding.

        Of a machine alone nothing is promised but that each kernel ends in an outcome of its own:
        a refusal, a warning, a panic.
        """
        return _SURVIVES[self.kind]


class FaultPlan(NamedTuple):
    """All faults of one life."""

    faults: tuple[Fault, ...] = ()

    def strike(self, step: int, *, is_kexec: bool) -> Fault | None:
        """The fault that step number ``step`` has to bear, if any.

        What strikes at a jump waits for the first kexec from its step on, which no oops strikes.
        """
        waits = ("freeze", "bytes", "memory")
        for fault in self.faults:
            if fault.at == step and fault.kind not in waits and not (
                is_kexec and fault.kind == "oops"
            ):
                return fault
        waiting = [fault for fault in self.faults if fault.kind in waits and fault.at <= step]
        return waiting[-1] if waiting and is_kexec else None

    def without(self, fault: Fault) -> FaultPlan:
        """The plan when ``fault`` has struck, and all those of its kind from before it."""
        return FaultPlan(
            tuple(f for f in self.faults if f.kind != fault.kind or f.at > fault.at)
        )
