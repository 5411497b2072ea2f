"""Who wrote a range last, and a fingerprint of what it holds: taken with a moment, or never.

RAM goes on changing, so that what a page held at a moment has to be noted then. Pages that nobody
ever wrote cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from khosim.checks.digest import digest_ranges

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from khosim.machine.hardware import Hardware
    from khosim.view.moment import Layer, Moment

__all__ = ("EVIDENT", "Evidence", "take_evidence")

EVIDENT = ("preserved", "incoming", "handover", "image")
"""Layers whose content is looked at: what is to survive the jump."""

_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """For each range of a layer: ``content`` (uint64, 0: all zeros) and index into ``writers``.

    The writer is that of the range's first page, as ``"kernel 1: symbol"``; -1 where nobody wrote.
    """

    content: NDArray[np.uint64]
    writer: NDArray[np.int32]
    writers: tuple[str, ...]


def take_evidence(hardware: Hardware, moment: Moment) -> dict[str, Evidence]:
    """Look at what the ranges of some layers hold now."""
    return {name: _evidence(hardware, moment.layers[name]) for name in EVIDENT}


def _evidence(hardware: Hardware, layer: Layer) -> Evidence:
    shift, page_size = hardware.page_shift, hardware.page_size
    wanted = zip(layer.start.tolist(), layer.end.tolist(), strict=True)
    pages = digest_ranges(hardware.ram, wanted, page_size).pages
    content = np.zeros(len(layer), dtype=np.uint64)
    if pages:
        phys = np.fromiter(pages.keys(), np.int64, len(pages))
        digest = np.fromiter(pages.values(), np.uint64, len(pages))
        at = np.searchsorted(layer.start, phys + page_size - 1, side="right") - 1
        inside = (at >= 0) & (phys < layer.end[at])
        # A page's place counts, so that two pages that change places are a change.
        place = ((phys - layer.start[at]) >> shift).astype(np.uint64) * np.uint64(2) + _ODD
        np.add.at(content, at[inside], (digest * place)[inside])
    named: dict[str, int] = {}
    index = []
    for writer in hardware.ram.last_writers(layer.start >> shift):
        text = "" if writer is None else _named(writer.generation, writer.symbol)
        index.append(named.setdefault(text, len(named)) if text else -1)
    return Evidence(content, np.array(index, dtype=np.int32), tuple(named))


def _named(generation: int, symbol: str) -> str:
    return symbol if generation < 0 else f"kernel {generation}: {symbol}"
