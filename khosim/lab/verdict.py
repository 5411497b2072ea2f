"""What can be held against each other in a guest's handovers, item by item.

Left out, because ``khosim conform`` does it: everything that needs the simulator.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from khosim.checks.preserved import expand
from khosim.inspect.memory import MemoryReport
from khosim.lab.run import Generation

__all__ = ("Item", "reserved_blocks", "verdict")

_RESERVE = re.compile(
    r"memblock_reserve: \[(0x[0-9a-f]+)-(0x[0-9a-f]+)\] .*"
    r"(?:kho_preserved_memory_reserve|kho_mem_deserialize)\+"
)
_MAX_BLOCKS = 1 << 22
_EMPTY = hashlib.sha256().hexdigest()


class Item(NamedTuple):
    """One comparison: whose, of what, whether it holds, and what was found."""

    generation: str
    name: str
    ok: bool
    detail: str


def verdict(generations: Sequence[Generation]) -> list[Item]:
    """Each handover against itself and against what its successor said of it."""
    items: list[Item] = []
    for old, new in pairwise(generations):
        report = old.handover
        if report is None:
            continue
        damage = len(report.damage)
        items.append(Item(old.name, "handover decodes", not damage, f"{damage} things torn"))
        items.append(_taken_over(report, new))
        reserved = _reserved(report, new)
        if reserved is not None:
            items.append(reserved)
        files = _files(report, new)
        if files is not None:
            items.append(files)
    return items


def reserved_blocks(dmesg: str) -> list[tuple[int, int]]:
    """The blocks (phys, bytes) that a ``memblock=debug`` log says were taken over, in order."""
    return [
        (int(match[1], 16), int(match[2], 16) + 1 - int(match[1], 16))
        for match in _RESERVE.finditer(dmesg)
    ]


def _text(generation: Generation, name: str) -> str:
    return generation.files.files.get(name, b"").decode("utf-8", "replace")


def _taken_over(report: MemoryReport, new: Generation) -> Item:
    same = new.files.files.get("kho/in/fdt") == report.handover.fdt
    return Item(new.name, "root FDT received", same, "byte for byte" if same else "another one")


def _reserved(report: MemoryReport, new: Generation) -> Item | None:
    said = reserved_blocks(_text(new, "dmesg"))
    if "memblock=debug" not in _text(new, "cmdline").split():
        return None
    page = report.handover.page_size
    wanted = [(phys, page << order) for phys, order in _expanded(report)]
    same = sum(a == b for a, b in zip(said, wanted, strict=False))
    ok = said == wanted and bool(wanted)
    detail = f"{same} of {len(wanted)} blocks, in order"
    if len(said) != len(wanted):
        detail += f"; the log has {len(said)}"
    return Item(new.name, "preserved blocks reserved", ok, detail)


def _expanded(report: MemoryReport) -> list[tuple[int, int]]:
    return expand(report.handover.preserved, limit=_MAX_BLOCKS)


def _files(report: MemoryReport, new: Generation) -> Item | None:
    if report.luo is None or not (report.luo.sessions or new.retrieved):
        return None
    total = same = 0
    for session in report.luo.sessions:
        for file in session.files:
            if file.memfd is None:
                continue
            total += 1
            got = new.retrieved.get((session.name, file.token))
            if got is None:
                continue
            same += (
                got.sha256 == (file.memfd.sha256 or _EMPTY)
                and (got.size, got.pos) == (file.memfd.size, file.memfd.pos)
                and got.seals == file.memfd.seals
            )
    return Item(new.name, "memfds read back", same == total, f"{same} of {total}")
