"""What a boot log says beside its memblock calls: architecture, page size, nodes, options.

These are the facts that the silent steps of a boot need. They are read from lines that other parts
of the kernel print (``drivers/acpi/numa/srat.c``, ``mm/numa_memblks.c``, ``mm/mm_init.c``,
``mm/percpu.c`` @ 7.3), never from an address that memblock handed out. Left out: what only a
firmware table says (device trees, EFI maps).
"""

from __future__ import annotations

from dataclasses import dataclass

from khosim.conform.dmesg_calls import Doubled, Dump, Event, Note, Request, symbol_of
from khosim.errors import InputError
from khosim.kernel.cmdline import kstrtobool, parse_words
from khosim.kernel.kho_scratch import ScratchSizes

__all__ = ("BootFacts", "NodeBlock", "read_facts")

_GIB = 1 << 30
_PHYS_MASK_SHIFT = 52
_DYNAMIC = 1 << 30  # regions in an array whose length the log does not tell


@dataclass(frozen=True, slots=True)
class NodeBlock:
    """A range of a node as firmware (or the kernel's own invention) gives it."""

    start: int
    end: int
    nid: int
    hotplug: bool = False


@dataclass(frozen=True, slots=True)
class BootFacts:
    """The facts of one boot. Addresses and sizes are bytes.

    ``blocks`` are the node ranges for ``numa_memblks_init`` in the order in which it learns them,
    ``node_ranges`` what ``free_area_init`` printed, with line numbers. ``percpu`` is ``(bytes used
    of a unit, unit size)`` or None. ``memory_max`` and ``reserved_max`` are the lengths of the
    static arrays. ``low_limit`` is ``ARCH_LOW_ADDRESS_LIMIT``. ``kho_asked`` is what ``kho=`` says.
    """

    place: str
    arch: str
    page_size: int
    uname: str
    cmdline: str
    kho_asked: bool | None
    scratch_sizes: ScratchSizes
    kho_boot: bool
    numa: bool
    blocks: tuple[NodeBlock, ...]
    node_ranges: tuple[tuple[int, int, int, int], ...]
    movable_node: bool
    mirrored: bool
    percpu: tuple[int, int] | None
    memory_max: int
    reserved_max: int
    low_limit: int
    dma_zone_end: int
    complete: bool


def read_facts(
    events: list[Event], *, place: str, arch: str | None = None, page_size: int | None = None
) -> BootFacts:
    """The facts in ``events``; ``arch`` and ``page_size`` where they are known from elsewhere.

    Raises :class:`InputError` where the beginning of the log is missing.
    """
    notes: dict[str, list[Note]] = {}
    for event in events:
        if isinstance(event, Note):
            notes.setdefault(event.kind, []).append(event)
    arch = arch or _arch(notes, place)
    if arch == "x86_64" and "e820" not in notes:
        raise InputError(place, "no BIOS-e820 lines: the beginning of the log is missing")
    if not any(isinstance(event, Dump) for event in events):
        raise InputError(place, "no memory map: the log ends before the first memblock dump")
    cmdline = notes["early-options"][0].words[0].strip() if "early-options" in notes else ""
    unknown = " ".join(note.words[0] for note in notes.get("unknown-options", []))
    words = [(name, value) for name, value in parse_words(cmdline) if name not in unknown]
    sizes = ScratchSizes()
    for name, value in words:
        if name == "kho_scratch":
            sizes.parse(value, _silent)
    node_ranges = tuple(
        (note.line, int(note.words[1], 16), int(note.words[2], 16) + 1, int(note.words[0]))
        for note in notes.get("node-range", [])
    )
    dma_end = _dma_zone_end(notes)
    memory_max, reserved_max = _array_lengths(events, arch)
    return BootFacts(
        place=place,
        arch=arch,
        page_size=page_size or _page_size(events, notes, arch),
        uname=notes["version"][0].words[0] if "version" in notes else "",
        cmdline=cmdline,
        kho_asked=_asked(words),
        scratch_sizes=sizes,
        kho_boot="kho-found" in notes,
        numa=not notes.keys().isdisjoint({"node-data", "faked-node", "no-numa", "srat"}),
        blocks=_blocks(notes, node_ranges),
        node_ranges=node_ranges,
        movable_node=any(name == "movable_node" for name, _ in words),
        mirrored=any(name == "kernelcore" and value == "mirror" for name, value in words),
        percpu=_percpu(notes),
        memory_max=memory_max,
        reserved_max=reserved_max,
        low_limit=0xFFFFFFFF if arch == "x86_64" else dma_end - 1,
        dma_zone_end=dma_end,
        complete=not notes.keys().isdisjoint({"slab-up", "later"}),
    )


def _asked(words: list[tuple[str, str | None]]) -> bool | None:
    """What ``kho=`` says; None where it says nothing and the kernel's build decides."""
    asked = [kstrtobool(value) for name, value in words if name == "kho"]
    valid = [answer for answer in asked if answer is not None]
    return valid[-1] if valid else None


def _silent(_line: str) -> None:
    pass


def _arch(notes: dict[str, list[Note]], place: str) -> str:
    if "e820" in notes:
        return "x86_64"
    if "arm64" in notes:
        return "arm64"
    raise InputError(place, "no memory map: the beginning of the log is missing")


def _page_size(events: list[Event], notes: dict[str, list[Note]], arch: str) -> int:
    if arch == "x86_64":
        return 4096
    for event in events:
        if isinstance(event, Request) and symbol_of(event.caller) == "early_pgtable_alloc":
            return event.size
    for note in notes.get("hash", []):
        order, size = int(note.words[0]), int(note.words[1])
        if size >> order in (4096, 16384, 65536):
            return size >> order
    return 4096


def _blocks(
    notes: dict[str, list[Note]], node_ranges: tuple[tuple[int, int, int, int], ...]
) -> tuple[NodeBlock, ...]:
    # The last configuration that the kernel tried; of_numa.c tells nothing, so there what came
    # out of it in the end has to do.
    def block(nid: str, first: str, last: str, more: str = "") -> NodeBlock:
        return NodeBlock(int(first, 16), int(last, 16) + 1, int(nid), "hotplug" in more)

    if "emulated-node" in notes:
        return tuple(block(*note.words[:3]) for note in notes["emulated-node"])
    if "faked-node" in notes:
        return (block("0", *notes["faked-node"][-1].words),)
    if "srat" in notes:
        return tuple(block(*note.words) for note in notes["srat"])
    return tuple(NodeBlock(start, end, nid) for _, start, end, nid in node_ranges)


def _percpu(notes: dict[str, list[Note]]) -> tuple[int, int] | None:
    if "percpu" not in notes:
        return None
    static, reserved, dynamic, unit = (int(word) for word in notes["percpu"][0].words)
    return static + reserved + dynamic, unit


def _dma_zone_end(notes: dict[str, list[Note]]) -> int:
    # arm64: arm64_dma_phys_limit, the end of the lowest DMA zone that the kernel has.
    for note in notes.get("zone", []):
        _, _, last, empty = note.words
        if not empty:
            return int(last, 16) + 1
    return 1 << _PHYS_MASK_SHIFT


def _array_lengths(events: list[Event], arch: str) -> tuple[int, int]:
    """How many regions the static arrays hold: 128 on x86; arm64's are a matter of its build.

    There the first doubling tells, and without one the arrays were long enough.
    """
    if arch == "x86_64":
        return 128, 128
    lengths = {"memory": _DYNAMIC, "reserved": _DYNAMIC}
    for event in events:
        if isinstance(event, Doubled) and lengths[event.name] == _DYNAMIC:
            lengths[event.name] = event.max_regions // 2
    return lengths["memory"], lengths["reserved"]
