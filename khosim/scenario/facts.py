"""Facts about a kernel, taken down while a scenario runs: plain data, ready for JSON.

What is preserved is counted in the tree that the kernel hands over, not in what a scenario meant to
preserve. Sizes are bytes, addresses physical.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from khosim.errors import HardwareFault, KernelPanic
from khosim.kernel.kernel import Kernel
from khosim.kernel.kho_radix_key import kho_decode_radix_key
from khosim.kernel.kho_scratch import ScratchSizes
from khosim.units import format_size

__all__ = (
    "GenerationFacts",
    "PreservedFacts",
    "ScratchFact",
    "SegmentFact",
    "SessionFact",
    "StepRecord",
    "orders_of",
    "preserved_facts",
    "scratch_facts",
    "segment_facts",
    "session_facts",
    "struct_page_bytes",
)

_STRUCT_PAGE_BYTES = 64


@dataclasses.dataclass(frozen=True, slots=True)
class ScratchFact:
    """One scratch area; ``why`` says what its size comes from."""

    name: str
    phys: int
    len_bytes: int
    why: str


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentFact:
    """One segment of the image that a kernel left for; ``area`` is the scratch area it lies in."""

    name: str
    phys: int
    len_bytes: int
    area: str


@dataclasses.dataclass(frozen=True, slots=True)
class PreservedFacts:
    """What a kernel's preserved-memory tree holds: blocks by order, bytes, the tree's own pages."""

    blocks: int = 0
    len_bytes: int = 0
    by_order: dict[str, int] = dataclasses.field(default_factory=dict)
    table_pages: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class StepRecord:
    """One step that was carried out; ``unit`` is what its blocks are.

    ``outcome`` is "ok", or what the kernel or the check said, or "left out" where the release lacks
    what an optional step needs; ``expect`` is what it was to be, and empty for "ok".
    """

    do: str
    name: str
    blocks: int
    unit: str
    len_bytes: int
    outcome: str
    expect: str
    note: str
    by_order: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class SessionFact:
    """A session for the successor: the names of its files by token, and what carries each."""

    name: str
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    handlers: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class GenerationFacts:
    """One kernel, from its boot to its end."""

    generation: int
    release: str
    outcome: str
    """How it came up: "cold", "accepted", "refused" or "panic"."""
    cmdline: str = ""
    previous_release: str = ""
    kexec_count: int = 0
    scratch: list[ScratchFact] = dataclasses.field(default_factory=list)
    page_size: int = 4096
    struct_page_bytes: int = 0
    deferred_struct_pages: bool = False
    """Whether the kernel initialises struct pages late, in threads."""
    managed_pages: int = 0
    free_pages: int = 0
    messages: list[str] = dataclasses.field(default_factory=list)
    steps: list[StepRecord] = dataclasses.field(default_factory=list)
    preserved: PreservedFacts = dataclasses.field(default_factory=PreservedFacts)
    subtrees: list[str] = dataclasses.field(default_factory=list)
    liveupdate: int = -1
    """How many live updates came before this kernel; -1 where live update is off."""
    sessions: list[SessionFact] = dataclasses.field(default_factory=list)
    segments: list[SegmentFact] = dataclasses.field(default_factory=list)
    end: str = ""
    """How it ended: "running", "kexec", "crash", "load refused" or "panic"."""

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return dataclasses.asdict(self)


def scratch_facts(kernel: Kernel) -> list[ScratchFact]:
    """The scratch areas by name, and what drove their sizes."""
    areas = kernel.scratch_areas()
    names = ["lowmem", "global", *(f"node {nid}" for nid in kernel.memory_nodes())]
    names += [f"area {i}" for i in range(len(names), len(areas))]
    if kernel.is_kho_boot:
        whys = ["as handed over"] * len(areas)
    else:
        whys = _size_reasons(kernel.scratch_sizes, areas)
    return [
        ScratchFact(name, phys, size, why)
        for name, (phys, size), why in zip(names, areas, whys, strict=False)
    ]


def _size_reasons(sizes: ScratchSizes, areas: list[tuple[int, int]]) -> list[str]:
    percent = sizes.scale_percent
    if not percent:
        return ["as kho_scratch= says"] * len(areas)

    def about(size: int) -> str:
        return format_size(max(1, size * 100 // percent + (1 << 20) - 1 >> 20) << 20)

    # The kernel scales what boot had reserved and rounds up: it was at most that much.
    low = areas[0][1] if areas else 0
    both = low + (areas[1][1] if len(areas) > 1 else 0)
    reasons = [
        f"{percent} % of {about(low)} below 4G",
        f"{percent} % of {about(both)}, less lowmem",
    ]
    return reasons + [f"{percent} % of {about(size)} on the node" for _, size in areas[2:]]


def struct_page_bytes(kernel: Kernel) -> int:
    """Bytes of struct pages (the memmap), by far the most that boot reserves."""
    sections = sum(end - first for first, end in kernel.present_sections)
    return sections * (kernel.arch.section_bytes >> kernel.arch.page_shift) * _STRUCT_PAGE_BYTES


def preserved_facts(kernel: Kernel) -> PreservedFacts:
    """Walk the outgoing tree; nothing where it cannot be walked (a scenario damaged it)."""
    tree = kernel.kho_out.tree
    if not kernel.kho_enable or not (tree.root or kernel.release.finalize):
        return PreservedFacts()
    shift = kernel.arch.page_shift
    counts: dict[int, int] = {}
    tables = 0
    try:
        for nr_keys, key in tree.walk():
            if not nr_keys:
                tables += 1
                continue
            while nr_keys:
                # Keys of one order have one bit length: a run may pass from one to the next.
                same = min(nr_keys, (1 << key.bit_length()) - key)
                order = kho_decode_radix_key(key, shift)[1]
                counts[order] = counts.get(order, 0) + same
                key, nr_keys = key + same, nr_keys - same
    except (KernelPanic, HardwareFault):
        return PreservedFacts()
    return PreservedFacts(
        sum(counts.values()),
        sum(count << (shift + order) for order, count in counts.items() if order >= 0),
        {str(order): counts[order] for order in sorted(counts)},
        tables,
    )


def orders_of(rows: Iterable[tuple[int, int, int, int]]) -> dict[str, int]:
    """Folios by order, from rows of (page, pfn, order, number)."""
    counts: dict[int, int] = {}
    for _, _, order, number in rows:
        counts[order] = counts.get(order, 0) + number
    return {str(order): counts[order] for order in sorted(counts)}


def session_facts(kernel: Kernel, names: Mapping[int, str]) -> list[SessionFact]:
    """The sessions that the kernel holds for its successor; ``names`` are by ``id`` of the file."""
    if not kernel.liveupdate.enabled:
        return []
    found = []
    for session in kernel.liveupdate.sessions.outgoing.sessions.values():
        files = session.file_set.files
        found.append(
            SessionFact(
                session.name,
                {f"{file.token:#x}": names.get(id(file.file), "") for file in files},
                {f"{file.token:#x}": file.handler.compatible for file in files},
            )
        )
    return found


def segment_facts(kernel: Kernel, scratch: Iterable[ScratchFact]) -> list[SegmentFact]:
    """Where the image that the kernel left for was put."""
    if kernel.kexec_image is None:
        return []
    areas = list(scratch)
    found = []
    for segment in kernel.kexec_image.segments:
        end = segment.mem + segment.memsz
        area = next(
            (a.name for a in areas if a.phys <= segment.mem and end <= a.phys + a.len_bytes), ""
        )
        found.append(SegmentFact(segment.name, segment.mem, segment.memsz, area))
    return sorted(found, key=lambda fact: fact.phys)
