"""A scenario as data: a machine, its first kernel, and what each generation does.

Made by :mod:`khosim.scenario.parse`, which has checked it: sizes, orders, names and counts are in
their bounds, so that carrying it out ends, and soon.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

from khosim.errors import InputError
from khosim.kernel.release import MAINLINE, RELEASES, Release
from khosim.machine.memory_map import MemoryMap

if TYPE_CHECKING:
    from khosim.machine.devices import Part
    from khosim.scenario.play import Player

__all__ = (
    "ACCEPTED",
    "COLD",
    "LEFT_OUT",
    "MAX_CONTENT_BYTES",
    "MAX_FOLIOS",
    "MAX_GENERATIONS",
    "MAX_GUEST_FOLIOS",
    "MAX_STEPS",
    "OUTCOMES",
    "PANIC",
    "REFUSED",
    "GenerationSpec",
    "KernelSpec",
    "KexecSpec",
    "Limits",
    "Scenario",
    "Step",
    "StepFact",
)

MAX_GENERATIONS = 1000
MAX_STEPS = 1000
"""Steps in one generation's table."""
MAX_FOLIOS = 1_000_000
"""Folios that all generations together may allocate."""
MAX_GUEST_FOLIOS = 1 << 24
"""Folios of all guests together: each takes a record of 16 bytes at every handover."""
MAX_CONTENT_BYTES = 4 << 30
"""Content that all generations together may write with new folios and pages."""

ACCEPTED, REFUSED, COLD, PANIC = "accepted", "refused", "cold", "panic"
OUTCOMES = (ACCEPTED, REFUSED, COLD, PANIC)
"""What becomes of a handover: taken over; found and refused; never offered; the successor died."""
LEFT_OUT = "left out"
"""What becomes of an optional step for which the release lacks something."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepFact:
    """What a step did: to how many blocks and bytes, in words where numbers do not say it."""

    blocks: int = 0
    len_bytes: int = 0
    note: str = ""
    unit: str = "block"
    """What the blocks are, in the singular."""
    by_order: dict[str, int] = dataclasses.field(default_factory=dict)
    """Folios by order, where that is worth telling."""


class Step(Protocol):
    """One thing that a generation does.

    ``expect`` is the name of an errno, or a word of the step's own.
    """

    @property
    def do(self) -> str:
        """What the step is called in scenario files."""
        ...

    @property
    def place(self) -> str:
        """Where it stands: file, generation, step."""
        ...

    @property
    def name(self) -> str:
        """The group that the step is about, or empty."""
        ...

    @property
    def expect(self) -> str:
        """The refusal that must come, or empty."""
        ...

    @property
    def optional(self) -> bool:
        """Whether it is left out where it lacks something."""
        ...

    def lacks(self, release: Release) -> str:
        """What it needs and kernels of that release do not have, or empty."""
        ...

    def run(self, player: Player) -> StepFact:
        """Do it. Raises the kernel's refusals, and :class:`khosim.InputError` for nonsense."""
        ...


@dataclasses.dataclass(slots=True)
class Limits:
    """What steps are checked against while a scenario is read."""

    page_size: int
    max_order: int
    ram_bytes: int
    repeats: int = 1
    """How often the table at hand is carried out."""
    names: set[str] = dataclasses.field(default_factory=set)
    """Groups that earlier steps made."""
    files: set[str] = dataclasses.field(default_factory=set)
    """Guests and devices that earlier steps start."""
    sessions: set[str] = dataclasses.field(default_factory=set)
    """Sessions that earlier steps make."""
    vms: set[str] = dataclasses.field(default_factory=set)
    """Machines that earlier steps start."""
    devices: dict[str, str] = dataclasses.field(default_factory=dict)
    """PCI addresses of the machine's devices by name."""
    seed: int = 0
    folios_left: int = MAX_FOLIOS
    guest_folios_left: int = MAX_GUEST_FOLIOS
    content_left: int = MAX_CONTENT_BYTES


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """A kernel to start; sizes in bytes, None for what suits the machine."""

    release: Release
    cmdline: str
    kernel_size: int | None = None
    initrd: int | None = None
    debug: bool = False
    without: tuple[str, ...] = ()
    """Pieces of live update that its drivers are built without."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KexecSpec:
    """How a generation ends; what is None stays as it was at the last boot.

    ``expect`` is one of :data:`OUTCOMES`, or the errno with which the load must be refused.
    """

    place: str
    release: Release | None = None
    cmdline: str | None = None
    kernel_size: int | None = None
    initrd: int | None = None
    debug: bool | None = None
    without: tuple[str, ...] | None = None
    crash: bool = False
    expect: str = ACCEPTED


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """What one generation does, and how it ends unless it is the last."""

    place: str
    steps: tuple[Step, ...]
    kexec: KexecSpec


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A machine and its kernels. ``specs`` may be fewer than ``generations``: the last repeats."""

    place: str
    name: str
    about: str
    seed: int
    memory_map: MemoryMap
    page_size: int
    allocator: str
    kernel: KernelSpec
    generations: int
    specs: tuple[GenerationSpec, ...]
    violations: frozenset[str] = frozenset()
    """Names of the invariants that must speak."""
    parts: tuple[Part, ...] = ()
    """What is in the machine besides memory."""
    devices: dict[str, str] = dataclasses.field(default_factory=dict)
    """PCI addresses of its devices by name."""

    def spec_of(self, generation: int) -> GenerationSpec:
        """The table of a generation, counted from 0."""
        return self.specs[min(generation, len(self.specs) - 1)]

    def check_releases(self) -> None:
        """Raise :class:`InputError` for a step whose kernel lacks what it needs.

        Optional steps are left out then, and those that expect a refusal may get it.
        """
        release = self.kernel.release
        seen: set[tuple[int, str]] = set()
        for number in range(self.generations):
            spec = self.spec_of(number)
            here = (id(spec), release.name)
            for step in () if here in seen else spec.steps:
                lacking = "" if step.optional or step.expect else step.lacks(release)
                if lacking:
                    others = [name for name in MAINLINE if not step.lacks(RELEASES[name])]
                    cause = f"Linux {release.name} has no {lacking}; {', '.join(others)} have"
                    raise InputError(f"{step.place} ({step.do})", cause)
            seen.add(here)
            release = spec.kexec.release or release
