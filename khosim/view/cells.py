"""Memory cut into cells: how much of each cell a layer covers, and what is shown there.

A cell that holds several things shows the rarest of them by :data:`RANK`, in a capital letter where
it fills at least half of the cell. A page is not lost in a picture of terabytes this way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from khosim.checks.ranges import merged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from khosim.view.moment import Layer, Moment

__all__ = ("RANK", "SIGNS", "Bar", "bars", "covered_bytes", "shown_in_cells")

RANK = ("image", "handover", "preserved", "incoming", "scratch", "reserved", "held")
"""Layers from what is shown first to what is shown last; RAM that is none of them is free."""

SIGNS = {
    "image": "x",
    "handover": "t",
    "preserved": "p",
    "incoming": "i",
    "scratch": "s",
    "reserved": "r",
    "held": "h",
    "ram": ".",
    "": " ",
}
"""The letter of each layer; a dot is free RAM, a blank no RAM."""


class Bar(NamedTuple):
    """A stretch of addresses in equal cells: ``edges`` has one more entry than there are cells."""

    title: str
    edges: NDArray[np.int64]


def covered_bytes(layer: Layer, edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of each cell ``[edges[i], edges[i + 1])`` that the layer covers; edges ascend."""
    if not len(layer):
        return np.zeros(len(edges) - 1, dtype=np.int64)
    starts, ends = merged((layer.start, layer.end))
    before = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(ends - starts)))
    at = np.searchsorted(starts, edges, side="right")
    inside = np.where(at > 0, np.minimum(edges, ends[at - 1]) - starts[at - 1], 0)
    below = np.where(at > 0, before[at - 1] + inside, 0)
    covered: NDArray[np.int64] = np.diff(below)
    return covered


def bars(moment: Moment, cells: int) -> list[Bar]:
    """One bar per NUMA node, from its first byte of RAM to its last; cells are whole pages."""
    ram = moment.layers["ram"]
    names = np.array(ram.owner_names())
    made = []
    for node in ram.owners:
        chosen = names == node
        low, high = int(ram.start[chosen].min()), int(ram.end[chosen].max())
        pages = -(-(high - low) // 4096)
        size = -(-pages // cells) * 4096
        count = -(-(high - low) // size)
        made.append(Bar(node, np.minimum(low + np.arange(count + 1) * size, high)))
    return made


def shown_in_cells(moment: Moment, bar: Bar, layers: Sequence[str] = RANK) -> str:
    """One letter per cell of ``bar``; ``layers`` are those to show, by rank."""
    size = np.diff(bar.edges)
    ram = covered_bytes(moment.layers["ram"], bar.edges)
    letters = np.where(ram > 0, SIGNS["ram"], SIGNS[""])
    for name in reversed(layers):
        covered = covered_bytes(moment.layers[name], bar.edges)
        sign = np.where(2 * covered >= size, SIGNS[name].upper(), SIGNS[name])
        letters = np.where(covered > 0, sign, letters)
    return "".join(letters.tolist())
