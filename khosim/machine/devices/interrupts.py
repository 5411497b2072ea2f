"""Message signalled interrupts: from a device through remapping to a CPU or a descriptor in RAM.

While no kernel runs, CPUs take nothing: an interrupt that is remapped to a vector waits in the
CPU's request register (a second one for the same vector joins it), one that is posted waits in the
descriptor in RAM. What finds no entry, or comes from a device whose MSI-X is off, is gone. All are
counted, by source, so that somebody can tell whether one was lost for good.

Left out: priorities, level-triggered interrupts, logical destinations, NMIs and SMIs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from khosim.machine.devices.events import EventLog
from khosim.machine.ram import Ram

if TYPE_CHECKING:
    from khosim.machine.devices.amd import Unit
    from khosim.machine.devices.function import Function

__all__ = ("Interrupts", "is_interrupt")

_BASE, _END = 0xFEE0_0000, 0xFEF0_0000
_ON, _SN = 1, 2  # outstanding, suppressed: bits 256 and 257 of a descriptor
_CONTROL = 32
_BY = (-1, "iommu")


def is_interrupt(address: int) -> bool:
    """Whether a write to this address is a message to a CPU."""
    return _BASE <= address < _END


class Interrupts:
    """What became of every interrupt.

    ``latched`` maps (APIC id, vector) to how often it was raised since it was last taken.
    ``by_source`` counts outcomes by (function's name, MSI-X entry): "latched", "merged" (into one
    that was latched already), "posted", "masked", "unmasked", "blocked" (no entry in the remapping
    table), "disabled" (MSI-X off), "unclaimed" (no descriptor in RAM there), "discarded" (latched,
    and then cleared by :meth:`reset_apics`), "taken".
    """

    __slots__ = ("by_source", "is_ram", "latched", "log", "ram", "unit", "waiting")

    def __init__(self, ram: Ram, is_ram: Callable[[int, int], bool], log: EventLog) -> None:
        self.ram, self.is_ram, self.log = ram, is_ram, log
        self.unit: Unit | None = None
        self.latched: Counter[tuple[int, int]] = Counter()
        self.waiting: dict[tuple[int, int], list[tuple[str, int]]] = {}
        """Whose interrupts a latched vector stands for: sources, oldest first."""
        self.by_source: dict[tuple[str, int], Counter[str]] = {}

    @property
    def counts(self) -> Counter[str]:
        """Outcomes of all sources together."""
        total: Counter[str] = Counter()
        for counter in self.by_source.values():
            total.update(counter)
        return total

    def power_on(self) -> None:
        """Nothing latched, nothing counted."""
        self.latched.clear()
        self.waiting.clear()
        self.by_source.clear()

    def _count(self, source: tuple[str, int], outcome: str, **detail: int) -> str:
        self.by_source.setdefault(source, Counter())[outcome] += 1
        self.log.add("interrupt", source[0], entry=source[1], outcome=outcome, **detail)
        return outcome

    def disabled(self, function: Function, entry: int) -> str:
        """A device has something to say and MSI-X is off."""
        return self._count((function.name, entry), "disabled")

    def masked(self, function: Function, entry: int) -> str:
        """The device keeps it as pending."""
        return self._count((function.name, entry), "masked")

    def unmasked(self, function: Function, entry: int) -> None:
        """A pending one is about to be sent."""
        self._count((function.name, entry), "unmasked")

    def message(self, function: Function, entry: int, address: int, data: int) -> str:
        """A message from a device: what became of it."""
        source = (function.name, entry)
        if not function.bus_master:
            return self._count(source, "disabled")
        if not is_interrupt(address):
            return self._count(source, "unclaimed")
        unit = self.unit
        if unit is None or not unit.remaps_irqs or unit.segment != function.segment:
            return self._latch(source, address >> 12 & 0xFF, data & 0xFF)
        if not address >> 4 & 1 and unit.passes_compatible:
            return self._latch(source, address >> 12 & 0xFF, data & 0xFF)
        entry_found = unit.irte(function.bdf.rid, address, data)
        if entry_found is None:
            return self._count(source, "blocked")
        if entry_found.descriptor_phys:
            return self._post(
                source, entry_found.descriptor_phys, entry_found.vector, entry_found.urgent
            )
        dest = entry_found.dest if unit.extended_dest else entry_found.dest >> 8 & 0xFF
        return self._latch(source, dest, entry_found.vector)

    def _latch(self, source: tuple[str, int], dest: int, vector: int) -> str:
        where = dest, vector
        outcome = "merged" if where in self.latched else "latched"
        self.latched[where] += 1
        self.waiting.setdefault(where, []).append(source)
        return self._count(source, outcome, dest=dest, vector=vector)

    def _post(self, source: tuple[str, int], phys: int, vector: int, urgent: bool) -> str:
        if not self.is_ram(phys, 64):
            return self._count(source, "unclaimed", phys=phys)
        ram = self.ram
        word = phys + vector // 64 * 8
        Ram.write_u64(ram, word, ram.read_u64(word) | 1 << vector % 64, _BY)
        control = ram.read_u64(phys + _CONTROL)
        if not control & _ON and (urgent or not control & _SN):
            Ram.write_u64(ram, phys + _CONTROL, control | _ON, _BY)
            notified = control >> 16 & 0xFF
            dest = control >> 32
            unit = self.unit
            if unit is not None and not unit.extended_dest:
                dest = dest >> 8 & 0xFF
            self.latched[dest, notified] += 1
            self.waiting.setdefault((dest, notified), [])
        return self._count(source, "posted", phys=phys, vector=vector)

    def from_unit(self, address: int, data: int) -> None:
        """A message of the remapping unit itself, which is not remapped."""
        self._latch(("iommu", 0), address >> 12 & 0xFF, data & 0xFF)

    # -- the CPUs' side ---------------------------------------------------------------------------

    def take(self) -> dict[tuple[int, int], int]:
        """A kernel's CPUs take all that is latched: how often each was raised."""
        taken = dict(self.latched)
        self._settle("taken")
        return taken

    def reset_apics(self) -> dict[tuple[int, int], int]:
        """A kernel clears its CPUs' request registers unseen; what was in them is lost.

        Linux leaves them: they arrive once it enables interrupts, as vectors that nobody knows any
        more (``arch/x86/kernel/apic/apic.c:apic_clear_isr @ 7.3``).
        """
        cleared = dict(self.latched)
        self._settle("discarded")
        return cleared

    def _settle(self, outcome: str) -> None:
        for where in list(self.latched):
            for source in self.waiting.get(where, ()):
                self._count(source, outcome, dest=where[0], vector=where[1])
        self.latched.clear()
        self.waiting.clear()

    # -- state ------------------------------------------------------------------------------------

    def state(self) -> list[Any]:
        """All of it as plain data."""
        latched = [
            [list(where), count, [*map(list, self.waiting.get(where, ()))]]
            for where, count in self.latched.items()
        ]
        counts = [[list(source), dict(counter)] for source, counter in self.by_source.items()]
        return [latched, counts]

    def restore(self, state: list[Any]) -> None:
        """Become what :meth:`state` described."""
        self.power_on()
        for (dest, vector), count, sources in state[0]:
            self.latched[dest, vector] = count
            self.waiting[dest, vector] = [(name, entry) for name, entry in sources]
        for (name, entry), counter in state[1]:
            self.by_source[name, entry] = Counter(counter)
