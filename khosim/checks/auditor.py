"""Watches a machine and its kernels from outside, and says which promises are broken.

The auditor looks at fixed stages: when a kernel is frozen and about to jump, when its successor has
reserved what was preserved, when that one is up, and whenever somebody asks. At the jump it
remembers the handover (:mod:`khosim.checks.history`); at every look it asks the invariants
(:mod:`khosim.checks.invariants`). It reads RAM and plain data of the kernel and changes neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from khosim.checks.decode import decode_handover
from khosim.checks.device_watch import DeviceWatch
from khosim.checks.dma_watch import DmaWatch
from khosim.checks.formats import format_of
from khosim.checks.history import Handed, History
from khosim.checks.invariants import INVARIANTS, Invariant
from khosim.checks.invariants.base import DEVICES
from khosim.checks.look import (
    AT_ANY_TIME,
    BOOTED,
    IN_BETWEEN,
    JUMP,
    REBOOT,
    RETRIEVED,
    TAKEOVER,
    Look,
)
from khosim.checks.ranges import merged

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from khosim.checks.kernel_view import KernelView
    from khosim.checks.violation import Violation
    from khosim.machine.hardware import Hardware

__all__ = ("Auditor",)

_Checks: TypeAlias = "Mapping[str, Sequence[Callable[[Look], Sequence[Violation]]]]"


def _by_stage(invariants: Sequence[Invariant]) -> _Checks:
    return {
        stage: tuple(invariant.check for invariant in invariants if stage in invariant.stages)
        for stage in (IN_BETWEEN, TAKEOVER, BOOTED, RETRIEVED, JUMP, AT_ANY_TIME)
    }


_ALL = _by_stage(INVARIANTS)
_WITHOUT_DEVICES = _by_stage([it for it in INVARIANTS if it.kind != DEVICES])


class Auditor:
    """The watcher of one machine, for as many kernels as it runs.

    ``invariants`` is what it asks about; all of them by default. Each violation is reported once.
    """

    __slots__ = (
        "_by_stage",
        "_dma",
        "_history",
        "_known",
        "_leaving",
        "_violations",
        "hardware",
        "invariants",
    )

    def __init__(self, hardware: Hardware, invariants: Sequence[Invariant] = INVARIANTS) -> None:
        self.hardware = hardware
        self.invariants = tuple(invariants)
        everyday = _ALL if hardware.devices is not None else _WITHOUT_DEVICES
        self._by_stage = everyday if invariants is INVARIANTS else _by_stage(invariants)
        self._history = History()
        self._dma = None if hardware.devices is None else DmaWatch(hardware, self._history)
        self._leaving: DeviceWatch | None = None
        self._violations: list[Violation] = []
        self._known: set[tuple[str, int, str]] = set()

    def power_on(self) -> None:
        """A cold boot begins: what was handed over before has no future."""
        self._history = History()
        if self._dma is not None:
            self._dma.history = self._history
            self._dma.run(None)

    def observe(self, kernel: KernelView, stage: str) -> None:
        """A kernel has reached a stage: "takeover", "booted", "retrieved", "reboot" or "jump"."""
        history = self._history
        if stage == REBOOT:
            self._leaving = DeviceWatch(self.hardware, kernel, history.devices)
            return
        if stage == RETRIEVED:
            self._ask(Look(self.hardware, kernel, RETRIEVED, history))
            return
        if stage == TAKEOVER:
            self._take_over(kernel)
            return
        handed = history.handed
        if handed is not None:
            handed.settle(kernel)
        look = Look(self.hardware, kernel, stage, history)
        self._ask(look)
        self._note_scratch(look)
        if stage == BOOTED and handed is not None:
            handed.given_back()
        elif stage == JUMP:
            self._remember(look)
        if self._dma is not None:
            self._dma.run(kernel if stage == BOOTED else None)

    def check(self, kernel: KernelView | None) -> list[Violation]:
        """Ask every invariant that can be asked now; all violations of this machine so far."""
        history = self._history
        handed = history.handed
        if kernel is not None:
            if handed is not None:
                handed.settle(kernel)
            look = Look(self.hardware, kernel, AT_ANY_TIME, history)
            self._ask(look)
            self._note_scratch(look)
        elif handed is not None and handed.reader is None:
            self._ask(Look(self.hardware, None, IN_BETWEEN, history))
        return list(self._violations)

    def _take_over(self, kernel: KernelView) -> None:
        history = self._history
        if history.handed is None and kernel.kho_in.fdt_phys:
            history.handed = self._find(kernel)
        handed = history.handed
        if handed is not None:
            handed.meet(kernel)
        look = Look(self.hardware, kernel, TAKEOVER, history)
        if look.refused:
            history.scratch = None  # the chain ends; a new one may begin
        self._ask(look)
        self._note_scratch(look)
        if look.refused:
            history.handed = None
        elif handed is not None:
            starts, ends, _ = look.incoming
            handed.taken_over(kernel.generation, merged((starts, ends)))

    def _ask(self, look: Look) -> None:
        for check in self._by_stage[look.stage]:
            found = check(look)
            if found:
                self._report(found)
        look.history.strays.clear()
        machine, watch = look.hardware.devices, look.history.devices
        if machine is not None and watch is not None:
            watch.seen = len(machine.events)

    def _report(self, found: Sequence[Violation]) -> None:
        for violation in found:
            key = violation.invariant, violation.phys, violation.message
            if key not in self._known:
                self._known.add(key)
                self._violations.append(violation)

    def _note_scratch(self, look: Look) -> None:
        self._history.scratch = look.scratch if look.has_scratch else None

    def _remember(self, look: Look) -> None:
        outgoing, kernel = look.outgoing, look.kernel
        self._history.devices, self._leaving = self._leaving, None
        self._history.handed = None
        if outgoing is not None and kernel is not None:
            self._history.handed = Handed(
                self.hardware,
                outgoing.handover,
                outgoing.covered,
                not outgoing.problems,
                outgoing.scratch,
                kernel.generation,
                kernel,
            )

    def _find(self, kernel: KernelView) -> Handed:
        # A handover whose jump nobody watched: what the new kernel found is all that is known.
        hardware = self.hardware
        handover = decode_handover(
            hardware.ram,
            kernel.kho_in.fdt_phys,
            hardware.page_size,
            written=format_of(kernel.release),
        )
        scratch = Look(hardware, kernel, TAKEOVER, self._history).scratch
        is_sound = not handover.problems
        return Handed(hardware, handover, None, is_sound, scratch, kernel.generation - 1, None)
