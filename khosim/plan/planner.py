"""``khosim plan``: scratch areas, what they cost, what drives them, and what would not fit.

:func:`make_plan` takes the exact way where the memory map comes with a memblock trace of the same
command line, and the model otherwise. What a driver costs is found by planning again without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from khosim.errors import InputError
from khosim.kernel.cmdline import parse_words
from khosim.kernel.release import Release
from khosim.plan.advice import Driver, Suggestion, find_drivers, suggest
from khosim.plan.model import Assumptions
from khosim.plan.replayed import BootTrace, same_reservations
from khosim.plan.rules import newest, release_by_name, release_of_uname
from khosim.plan.simulated import Outcome, Simulation, simulate
from khosim.plan.source import Source

__all__ = ("Area", "Plan", "make_plan")

_COMPLAINTS = (
    "reserve_mem:", "HugeTLB: allocating", "HugeTLB: Invalid", "HugeTLB: unsupported",
    "cannot allocate crashkernel", "crashkernel reservation failed", "cma: Failed",
    "Malformed early option",
)  # fmt: skip

_OFF = "KHO turns itself off: "
_NOT_LOADED = "the same kernel cannot be loaded by kexec: "
_NOT_MODELLED = frozenset(
    ("memmap", "swiotlb", "hugetlb_cma", "cma_pernuma", "numa_cma", "nr_cpus", "possible_cpus",
     "page_owner", "memtest", "efi_fake_mem", "highmem", "kernelcore", "movable_node")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Area:
    """One scratch area: its name, and where it lies (bytes)."""

    name: str
    phys: int
    len_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be expected. Sizes are bytes; ``method`` is "trace" or "model".

    ``findings`` are what would go wrong, ``notes`` what one should know.
    """

    place: str
    release: Release
    arch: str
    page_size: int
    nr_nodes: int
    cmdline: str
    method: str
    ram_bytes: int
    areas: tuple[Area, ...]
    outcome: Outcome
    assumed: Assumptions
    drivers: tuple[Driver, ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    suggestion: Suggestion | None

    @property
    def scratch_bytes(self) -> int:
        """What scratch takes."""
        return self.outcome.scratch_bytes

    @property
    def share(self) -> float:
        """Scratch's share of RAM, from 0 to 1."""
        return self.scratch_bytes / self.ram_bytes

    def as_json(self) -> dict[str, Any]:
        """The plan for programs."""
        scale = self.outcome.scale_percent
        return {
            "place": self.place,
            "release": self.release.name,
            "arch": self.arch,
            "page_size": self.page_size,
            "nodes": self.nr_nodes,
            "cmdline": self.cmdline,
            "method": self.method,
            "ram_bytes": self.ram_bytes,
            "enabled": self.outcome.enabled,
            "scratch": [[area.phys, area.len_bytes] for area in self.areas],
            "areas": [area.name for area in self.areas],
            "reserved_bytes": self.scratch_bytes,
            "share": round(self.share, 6),
            "scale_percent": scale,
            "boot_reserved_bytes": self.outcome.boot_bytes,
            "owners": [
                {
                    "name": owner.name,
                    "reserved_bytes": owner.reserved_bytes,
                    "low_bytes": owner.low_bytes,
                    "node_bytes": owner.node_bytes,
                    "scratch_bytes": owner.scratch_bytes(scale),
                }
                for owner in self.outcome.owners
            ],
            "drivers": [driver.as_json() for driver in self.drivers],
            "findings": list(self.findings),
            "notes": list(self.notes),
            "suggestion": self.suggestion.as_json() if self.suggestion else None,
            "assumptions": self.assumed.as_json(),
        }


def make_plan(
    source: Source,
    *,
    cmdline: str | None = None,
    release: str | Release | None = None,
    given: dict[str, int | None] | None = None,
) -> Plan:
    """Predict scratch for ``source``.

    ``cmdline`` and ``release`` are those of the source unless told otherwise; ``given`` overrides
    dimensions of the model (:class:`~khosim.plan.model.Assumptions`), and with it any trace.
    """
    notes: list[str] = []
    chosen = _release(source, release, notes)
    if cmdline is None:
        cmdline = source.cmdline or ""
    memory_map = source.memory_map
    assumed = Assumptions(memory_map.arch, source.found, given or {})
    simulation = simulate(memory_map, source.page_size, cmdline, assumed, chosen)
    modelled = simulation.outcome
    traced = None if given else _traced(source, cmdline, chosen, notes)
    outcome = modelled if traced is None else traced
    names = {name for name, _ in parse_words(cmdline)}
    if traced is None:
        unknown = sorted(names & _NOT_MODELLED)
        notes += [f"the model knows nothing of {name}=" for name in unknown]
    if "kho" not in names:
        notes.append("no kho= option: taken as built with KHO on by default")
    findings = _findings(outcome, simulation, assumed, traced is not None)
    drivers: tuple[Driver, ...] = ()
    suggestion = None
    if outcome.asked:
        drivers = find_drivers(source, cmdline, assumed, chosen, modelled)
        useless = any(line.startswith((_OFF, _NOT_LOADED)) for line in findings)
        suggestion = suggest(source, cmdline, assumed, chosen, modelled, useless)
    else:
        notes.append("KHO is off: no scratch is reserved, and nothing can be handed over")
    if outcome.asked and not outcome.enabled and suggestion is None:
        notes.append("no kho_scratch= of 50% to 200% helps: a driver has to go")
    area_names = ["lowmem", "global", *(f"node {nid}" for nid in outcome.nodes)]
    return Plan(
        place=source.place,
        release=chosen,
        arch=memory_map.arch,
        page_size=source.page_size,
        nr_nodes=len(memory_map.online_nodes),
        cmdline=cmdline,
        method="model" if traced is None else "trace",
        ram_bytes=memory_map.ram_bytes,
        areas=tuple(
            Area(name, *area) for name, area in zip(area_names, outcome.areas, strict=False)
        ),
        outcome=outcome,
        assumed=assumed,
        drivers=drivers,
        findings=tuple(findings),
        notes=tuple(notes),
        suggestion=suggestion,
    )


def _release(source: Source, release: str | Release | None, notes: list[str]) -> Release:
    if release is not None:
        return release_by_name(release)
    if source.uname is None:
        return newest()
    found = release_of_uname(source.uname)
    if found is None:
        found = newest()
        notes.append(f"the log is of Linux {source.uname}: planned by the rules of {found.name}")
    return found


def _traced(
    source: Source, cmdline: str, release: Release, notes: list[str]
) -> Outcome | None:
    if source.log is None or "memblock_" not in source.log:
        return None
    if not same_reservations(cmdline, source.cmdline or ""):
        notes.append("the memblock trace is of another command line: not used")
        return None
    try:
        trace = BootTrace(source)
        outcome, different = trace.reserve(cmdline, release)
    except InputError as error:
        notes.append(f"the memblock trace is not used: {error.cause}")
        return None
    if different:
        notes.append(
            f"{different} of the trace's calls come out differently in a replay: see khosim replay"
        )
    return outcome


def _findings(
    outcome: Outcome, simulation: Simulation, assumed: Assumptions, traced: bool
) -> list[str]:
    findings = []
    if outcome.asked and not outcome.enabled:
        why = [line for line in outcome.messages if line.startswith("KHO: Failed")]
        findings.append(_OFF + (why[0] if why else "nothing is reserved"))
    modelled = simulation.outcome
    if modelled.panic and not traced:
        findings.append(f"the kernel dies in boot: {modelled.panic}")
    said = dict.fromkeys((*outcome.messages, *modelled.messages))
    findings += [line for line in said if line.startswith(_COMPLAINTS)]
    if outcome.enabled:
        refused = ""
        if modelled.areas == outcome.areas and not modelled.panic:
            refused = simulation.load()
        largest = max(size for _, size in outcome.areas)
        for name in ("kernel_bytes", "initrd_bytes"):
            if not refused and assumed[name] > largest:
                refused = f"{name.removesuffix('_bytes')} fits into no scratch area"
        if refused:
            findings.append(_NOT_LOADED + refused)
    return findings
