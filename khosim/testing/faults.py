"""Plans of faults for a life: what strikes at which step, and what has to survive it.

The faults themselves are in :mod:`khosim.faults`; a crash is a cold boot, after which nothing that
was preserved has a future.
"""

from __future__ import annotations

from typing import NamedTuple

from khosim.faults.between import flipped, jump_with, overwritten, stale, torn
from khosim.faults.calls import failing_allocation, oops, refusing_freeze

__all__ = (
    "DAMAGES",
    "KINDS",
    "PLAIN",
    "Fault",
    "FaultPlan",
    "failing_allocation",
    "flipped",
    "jump_with",
    "oops",
    "overwritten",
    "refusing_freeze",
    "stale",
    "torn",
)

PLAIN = ("allocation", "freeze", "crash")
KINDS = (*PLAIN, "oops", "bytes")

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

    "allocation": the ``n``-th allocation of that step fails, counted from 1. "freeze": the
    ``n``-th file refuses at the first kexec from that step on. "crash": before that step. "oops":
    the task dies at the ``n``-th event of that step. "bytes": the ``n``-th of :data:`DAMAGES`
    strikes at the first kexec from that step on.
    """

    kind: str
    at: int
    n: int = 1

    @property
    def survives(self) -> str:
        """What has to: "everything", "all but the step's things", "the machine".

        Of a damaged handover nothing is promised but that each kernel ends in an outcome of its
        own: a refusal, a warning, a panic. Outside of what survives it is a scenario, no finding.
        """
        if self.kind in ("allocation", "freeze"):
            return "everything"
        return "all but the step's things" if self.kind == "oops" else "the machine"


class FaultPlan(NamedTuple):
    """All faults of one life."""

    faults: tuple[Fault, ...] = ()

    def strike(self, step: int, *, is_kexec: bool) -> Fault | None:
        """The fault that step number ``step`` has to bear, if any.

        A freeze and bytes wait for the first kexec from their step on, which no oops strikes.
        """
        waits = ("freeze", "bytes")
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
