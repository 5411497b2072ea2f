"""The exact way: a real boot's memblock calls made again, up to where it sizes scratch.

Takes :mod:`khosim.conform`'s replay as far as ``kho_memory_init`` (or to the end of memblock, for a
kernel that had KHO off) and then reserves scratch by any release's rules and any ``kho_scratch=``.
"""

from __future__ import annotations

import dataclasses

from khosim.conform.boot_facts import BootFacts, read_facts
from khosim.conform.dmesg_calls import (
    Dump,
    Event,
    Free,
    Note,
    Request,
    Reserve,
    parse_calls,
    symbol_of,
)
from khosim.conform.engine import Engine
from khosim.conform.scratch import is_kho_init
from khosim.conform.start import ramdisks, start_memblock
from khosim.errors import InputError
from khosim.kernel.arch import Arch, find_arch
from khosim.kernel.cmdline import kstrtobool, parse_words
from khosim.kernel.kho_scratch import ScratchSizes, kho_reserve_scratch, read_scratch_array
from khosim.kernel.memblock import MEMBLOCK_RSRV_KERN, numa_valid_node
from khosim.kernel.release import Release
from khosim.machine.ram import MAX_PHYS, Ram
from khosim.plan.ledger import Ledger, owner_of, owners_in
from khosim.plan.simulated import Outcome
from khosim.plan.source import Source

__all__ = ("BootTrace", "same_reservations")

_HARMLESS = frozenset(
    ("kho", "kho_scratch", "liveupdate", "memblock", "quiet", "splash", "ro", "rw", "root",
     "rootwait", "rootfstype", "console", "panic", "loglevel", "debug", "init", "BOOT_IMAGE")
)  # fmt: skip
"""Options that change nothing of what boot reserves before scratch."""


def same_reservations(cmdline: str, other: str) -> bool:
    """Whether two command lines make boot reserve the same (their own few bytes aside)."""
    left, right = (
        sorted(
            (name.replace("-", "_"), value or "")
            for name, value in parse_words(text)
            if name not in _HARMLESS
        )
        for text in (cmdline, other)
    )
    return left == right


class BootTrace:
    """The memblock calls of one cold boot, up to where scratch is sized.

    Raises :class:`InputError` for a log that has none, is cut short, or is of a handover boot,
    whose scratch was its predecessor's.
    """

    __slots__ = ("_arch", "_events", "_facts", "_starts", "nr_allocations")

    def __init__(self, source: Source) -> None:
        assert source.log is not None
        events = parse_calls(source.log, place=source.place)
        facts = read_facts(
            events, place=source.place, arch=source.memory_map.arch, page_size=source.page_size
        )
        if facts.kho_boot:
            raise InputError(source.place, "a handover boot: its scratch was its predecessor's")
        if not facts.complete:
            raise InputError(source.place, "cut short: boot does not come to the page allocator")
        self._facts = facts
        self._starts = start_memblock(events, facts, None)[0]
        kho = next((i for i, e in enumerate(events) if is_kho_init(e)), None)
        self._arch = self._find_arch(events)
        end = next(i for i, e in enumerate(events) if isinstance(e, Note) and _is_end(e))
        self._events = events[: end if kho is None else kho]
        self.nr_allocations = 0

    def _find_arch(self, events: list[Event]) -> Arch:
        arch = find_arch(self._facts.arch, self._facts.page_size)
        aligns = [
            event.align
            for event in events
            if isinstance(event, Request)
            and is_kho_init(event)
            and event.symbol == "memblock_phys_alloc_range"
        ]
        order = arch.max_page_order
        if max(aligns, default=0) > arch.pageblock_bytes:
            # The largest block is a matter of the build, and the log says which it was.
            order = (max(aligns) // arch.page_size).bit_length() - 1
        return dataclasses.replace(
            arch, low_address_limit=self._facts.low_limit, max_page_order=order
        )

    def reserve(self, cmdline: str, release: Release) -> tuple[Outcome, int]:
        """What comes of ``kho_scratch=`` in ``cmdline``; and how many logged calls came out else.

        KHO is on unless ``kho=`` says otherwise.
        """
        engine = Engine(self._events, self._facts, None, [])
        self.nr_allocations = engine.nr_allocations
        state = engine.run(self._starts)
        memblock = state.memblock
        memblock.trace = None
        sizes, asked = ScratchSizes(), True
        messages: list[str] = []
        for name, value in parse_words(cmdline):
            if name == "kho":
                enabled = kstrtobool(value)
                asked = asked if enabled is None else enabled
            elif name == "kho_scratch" and sizes.parse(value, messages.append):
                messages.append("Malformed early option 'kho_scratch'")
        owners = owners_in(
            memblock,
            _ledger(self._events, self._facts),
            self._arch.low_address_limit,
            excludes_hugetlb=release.scratch_excludes_hugetlb,
        )
        nodes = sorted({nid for nid in memblock.memory.nid if numa_valid_node(nid)}) or [0]
        areas: list[tuple[int, int]] = []
        if asked:
            ram = Ram(
                min(MAX_PHYS, memblock.memblock_end_of_DRAM()), page_size=self._facts.page_size
            )
            array, count, done = kho_reserve_scratch(
                memblock, ram, self._arch, release, sizes, nodes, (0, "plan"), messages.append
            )
            areas = read_scratch_array(ram.read(array, 16 * count)) if done else []
        outcome = Outcome(
            areas=tuple(areas),
            nodes=tuple(nodes),
            owners=owners,
            scale_percent=sizes.scale_percent,
            enabled=bool(areas),
            asked=asked,
            messages=tuple(messages),
        )
        return outcome, len(state.differences)


def _is_end(note: Note) -> bool:
    return note.kind in ("slab-up", "later")


def _ledger(events: list[Event], facts: BootFacts) -> Ledger:
    # The log names the caller of every call; what the first dump shows already has none.
    ledger = Ledger()
    first = next(event for event in events if isinstance(event, Dump))
    for row in first.reserved:
        if row.flags & MEMBLOCK_RSRV_KERN:
            owner = "kernel image" if facts.arch == "x86_64" else "page tables"
            ledger.take(row.base, row.end, owner)
    asked: Request | None = None
    for event in events:
        if isinstance(event, Request):
            asked = event
        elif isinstance(event, Reserve):
            symbol = symbol_of(asked.caller if asked is not None else event.caller)
            if event.flags & MEMBLOCK_RSRV_KERN:
                owner = owner_of(symbol)
                if asked is None and symbol == "setup_arch":
                    owner = "kernel image"  # reserve_brk
                elif asked is None and symbol.startswith("memblock_alloc_range_nid"):
                    owner = "node data"
                ledger.take(event.base, event.end, owner)
            asked = None
        elif isinstance(event, Free):
            ledger.free(event.base, event.end)
    for low, high in ramdisks(events, facts):
        ledger.take(low, high, "initrd")
    return ledger
