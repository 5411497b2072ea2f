"""What one captured generation handed over, read once for all who ask.

Pages come from ``ram.npz``, the independent program's account from ``handover.json``; either may be
missing, and then ``why`` says so. A handover that was never captured is made with that reason.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from khosim.capture.folder import CapturedGeneration
from khosim.capture.page_rows import PageRows
from khosim.checks.decode import Handover
from khosim.checks.decode_luo import Luo
from khosim.checks.decode_root import read_blob
from khosim.errors import InputError
from khosim.inspect.memory import Memory, MemoryReport, inspect_memory

__all__ = ("Held",)

_PHYS_MAX = 1 << 52


class Held:
    """A generation's handover. ``report`` is None, and ``why`` says why, where it is not there."""

    def __init__(self, generation: CapturedGeneration, *, why: str = "") -> None:
        self.generation = generation
        self.why = why
        self.report: MemoryReport | None = None
        if why:
            return
        try:
            self.report = self._read()
        except InputError as error:
            self.why = str(error)

    def _read(self) -> MemoryReport:
        generation = self.generation
        if not generation.has("ram.npz"):
            raise InputError(f"{generation.name}/ram.npz", "no such file")
        pfn, data = generation.ram_pages
        hint = None if self.said is None else self.said.get("fdt_phys")
        memory = Memory(
            f"{generation.name}/ram.npz",
            f"{len(pfn)} pages of a capture",
            PageRows(pfn, data),
            generation.page_size,
            preserve_bits=generation.preserve_bits,
            fdt_hint=hint if isinstance(hint, int) and 0 <= hint < _PHYS_MAX else None,
        )
        return inspect_memory(memory, name=generation.name)

    @cached_property
    def said(self) -> dict[str, Any] | None:
        """``handover.json``; None where there is none that can be read."""
        try:
            return self.generation.handover if self.generation.has("handover.json") else None
        except InputError:
            return None

    @property
    def handover(self) -> Handover | None:
        """The handover as the checkers' decoder reads it."""
        return None if self.report is None else self.report.handover

    @property
    def luo(self) -> Luo | None:
        """Its live-update state."""
        return None if self.report is None else self.report.luo

    @property
    def reader(self) -> PageRows:
        """Its pages."""
        assert self.report is not None
        reader = self.report.memory.reader
        assert isinstance(reader, PageRows)
        return reader

    def root_fdt(self) -> bytes | None:
        """The root FDT's bytes."""
        return None if self.handover is None else self.handover.fdt

    def blob(self, name: str) -> bytes | None:
        """The bytes of a subtree's blob; None without one."""
        if self.handover is None or name not in self.handover.subtrees:
            return None
        return read_blob(self.reader, self.handover.subtrees[name])
