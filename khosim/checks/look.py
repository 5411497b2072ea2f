"""One look at a machine: what the invariants are asked about.

A :class:`Look` is made for one stage of one kernel and thrown away. It decodes and computes on
demand, once, what several invariants need.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np

from khosim.checks.census import take_census
from khosim.checks.decode import decode_handover
from khosim.checks.decode_luo import decode_luo
from khosim.checks.formats import format_of, preserve_bits_of
from khosim.checks.history import owner_of, scratch_areas
from khosim.checks.preserved import covered_ranges
from khosim.checks.unpreserved import unpreserved
from khosim.checks.violation import Violation

if TYPE_CHECKING:
    from khosim.checks.census import Census
    from khosim.checks.decode import Handover
    from khosim.checks.decode_luo import Luo
    from khosim.checks.history import Handed, History
    from khosim.checks.kernel_view import ImageView, KernelView
    from khosim.checks.ranges import I64, Ranges
    from khosim.checks.reader import Problem
    from khosim.machine.hardware import Hardware

__all__ = (
    "AT_ANY_TIME",
    "BOOTED",
    "IN_BETWEEN",
    "JUMP",
    "REBOOT",
    "RETRIEVED",
    "TAKEOVER",
    "Look",
    "Outgoing",
    "contains",
)

IN_BETWEEN = "in between"
"""The old kernel is gone and the new one has not begun."""
TAKEOVER = "takeover"
"""What was preserved is reserved; memblock still serves and nothing is free."""
BOOTED = "booted"
JUMP = "jump"
"""The kernel is frozen and about to leave."""
REBOOT = "reboot"
"""The kernel is about to be frozen: nothing was asked of its devices yet."""
RETRIEVED = "retrieved"
"""A file of a session was retrieved just now, and nobody has used it yet."""
AT_ANY_TIME = "check"
"""Whenever somebody asks a running kernel."""


class Outgoing:
    """The handover that a kernel is about to give, or would give now."""

    __slots__ = ("_covered", "handover", "problems", "scratch")

    def __init__(self, handover: Handover, scratch: list[tuple[int, int]], compatible: str) -> None:
        self.handover = handover
        self.scratch = scratch
        self.problems = handover.problems
        """What is wrong with its bytes. A name of its own is no fault of a release."""
        if self.problems and handover.compatible == compatible:
            self.problems = tuple(p for p in self.problems if p.code != "kho-compatible")
        self._covered: Ranges | None = None

    @property
    def covered(self) -> Ranges:
        """The preserved pages."""
        if self._covered is None:
            self._covered = covered_ranges(self.handover.preserved)
        return self._covered


class Look:
    """A stage of a kernel; ``kernel`` is None where none runs."""

    __slots__ = (
        "_census",
        "_changed",
        "_incoming",
        "_luo",
        "_outgoing",
        "_scratch",
        "handed",
        "hardware",
        "history",
        "image",
        "kernel",
        "page_shift",
        "page_size",
        "refused",
        "stage",
    )

    def __init__(
        self, hardware: Hardware, kernel: KernelView | None, stage: str, history: History
    ) -> None:
        self.hardware = hardware
        self.page_size = hardware.page_size
        self.page_shift = hardware.page_shift
        self.kernel = kernel
        self.stage = stage
        self.history = history
        self.handed: Handed | None = history.handed
        self.image: ImageView | None = None
        if stage == JUMP and kernel is not None:
            self.image = kernel.kexec_image
        self._outgoing: Outgoing | bool | None = False
        self._luo: tuple[Luo, tuple[Problem, ...]] | bool | None = False
        self._scratch: list[tuple[int, int]] | None = None
        self._changed: list[int] | None = None
        self._census: Census | None = None
        self._incoming: tuple[I64, I64, I64] | None = None
        self.refused = stage == TAKEOVER and kernel is not None and not kernel.kho_in.fdt_phys
        """The kernel boots without the handover it may have been given."""

    @property
    def has_scratch(self) -> bool:
        """Whether the kernel has scratch areas, its own or its predecessor's."""
        kernel = self.kernel
        return (
            kernel is not None
            and bool(kernel.kho_scratch_phys)
            and (kernel.kho_enable or bool(kernel.kho_in.fdt_phys))
        )

    @property
    def incoming(self) -> tuple[I64, I64, I64]:
        """``(start_pfn, end_pfn, order)`` of what the kernel reserved as preserved."""
        if self._incoming is None:
            columns: tuple[list[int], ...] = ([], [], [])
            if self.kernel is not None:
                starts, ends, states = self.kernel.pages.pages.columns()
                chosen = [state.kind == "incoming" for state in states]
                orders = (state.order for state in states)
                columns = tuple(list(compress(part, chosen)) for part in (starts, ends, orders))
            first, past, order = (np.array(part, dtype=np.int64) for part in columns)
            self._incoming = first, past, order
        return self._incoming

    @property
    def census(self) -> Census | None:
        """All pages of the running kernel, counted."""
        if self._census is None and self.kernel is not None:
            handed = self.handed
            held = None if handed is None else handed.held
            ram = self.hardware.ram_ranges
            self._census = take_census(self.kernel, ram, self.page_shift, held)
        return self._census

    @property
    def scratch(self) -> list[tuple[int, int]]:
        """The kernel's scratch areas as ``(address, size)``, read from RAM."""
        if self._scratch is None:
            kernel = self.kernel
            self._scratch = (
                []
                if kernel is None
                else scratch_areas(
                    self.hardware.ram, kernel.kho_scratch_phys, kernel.kho_scratch_cnt
                )
            )
        return self._scratch

    @property
    def outgoing(self) -> Outgoing | None:
        """The handover in the making; None where there is none, as in a crash image."""
        if isinstance(self._outgoing, bool):
            self._outgoing = self._find_outgoing()
        return self._outgoing

    @property
    def luo(self) -> tuple[Luo, tuple[Problem, ...]] | None:
        """What LUO tells the successor, and what is wrong with it; None where LUO is off."""
        if isinstance(self._luo, bool):
            self._luo = self._find_luo()
        return self._luo

    def _find_luo(self) -> tuple[Luo, tuple[Problem, ...]] | None:
        kernel, outgoing = self.kernel, self.outgoing
        if kernel is None or outgoing is None or not kernel.liveupdate.enabled:
            return None
        handover = outgoing.handover
        blob = handover.subtrees.get("LUO")
        if blob is None:
            return None
        ram, page_size = self.hardware.ram, self.page_size
        luo = decode_luo(ram, blob, page_size, handover.preserved, content=False)
        own = [p for p in unpreserved(handover, luo) if p.path.startswith("/LUO")]
        return luo, (*luo.problems, *own)

    def _find_outgoing(self) -> Outgoing | None:
        kernel, image = self.kernel, self.image
        if kernel is None:
            return None
        if image is not None:
            fdt_phys = 0 if image.kho_scratch is None else image.kho_fdt
        else:
            fdt_phys = kernel.kho_out.handover_phys if kernel.kho_enable else 0
        if not fdt_phys:
            return None
        release = kernel.release
        handover = decode_handover(
            self.hardware.ram,
            fdt_phys,
            self.page_size,
            preserve_bits=preserve_bits_of(release, self.page_size),
            written=format_of(release),
        )
        return Outgoing(handover, self.scratch, kernel.release.kho_compatible)

    def changed(self) -> list[int]:
        """Pages of the last handover whose content is not what it was; see :class:`Handed`."""
        if self._changed is None:
            self._changed = [] if self.handed is None else self.handed.changed()
        return self._changed

    def owner(self, pfn: int) -> str:
        """Who holds a page of the running kernel; "" for a free one."""
        if self.kernel is None:
            return ""
        phys = pfn << self.page_shift
        for name, start, size in self.kernel.reserve_mem.regions:
            if start <= phys < start + size:
                return f"reserve_mem {name}"
        return owner_of(self.kernel.pages.pages, pfn)

    def by_kernels(self, pfns: list[int]) -> list[int]:
        """The pages of ``pfns`` that no device, guest or secure processor wrote to last.

        What those write while kernels come and go is for the invariants of devices to judge.
        """
        if self.hardware.devices is None or not pfns:
            return pfns
        writers = self.hardware.ram.last_writers(pfns)
        return [
            pfn for pfn, by in zip(pfns, writers, strict=True) if by is None or by[0] >= 0
        ]

    def says(
        self, invariant: str, message: str, phys: int, owner: str = "", *, generation: int = -1
    ) -> Violation:
        """A violation at ``phys``, with the last writer of its page.

        ``generation`` is the running kernel's, or that of the last one to run, unless given.
        """
        if generation < 0:
            if self.kernel is not None:
                generation = self.kernel.generation
            elif self.handed is not None:
                generation = self.handed.generation
        ram = self.hardware.ram
        writer = ram.last_writer(phys) if 0 <= phys < ram.size_bytes else None
        if writer is None:
            return Violation(invariant, message, generation, phys, owner)
        by_generation, symbol = writer
        return Violation(invariant, message, generation, phys, owner, symbol, by_generation)


def contains(ranges: list[tuple[int, int]], start: int, end: int) -> bool:
    """Whether one of the sorted, disjoint ranges holds all of [start, end)."""
    at = bisect_right(ranges, (start, 1 << 65)) - 1
    return at >= 0 and end <= ranges[at][1]
