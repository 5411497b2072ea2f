"""What changed in memory between two moments, layer by layer and owner by owner."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from khosim.checks.ranges import merged, minus

if TYPE_CHECKING:
    from khosim.checks.ranges import Ranges
    from khosim.view.moment import Layer, Moment

__all__ = ("Change", "changes")


class Change(NamedTuple):
    """Memory that one owner came to have, or has no longer, in one layer.

    ``starts`` and ``ends`` are its ranges in physical addresses, ascending and disjoint.
    """

    layer: str
    owner: str
    appeared: bool
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        """How much memory it is."""
        return sum(self.ends) - sum(self.starts)


def changes(before: Moment, after: Moment) -> list[Change]:
    """All changes from one moment to another, in the order of layers and of owners' first ranges.

    What one owner loses to another is there twice: gone from the one, come to the other.
    """
    found = []
    for name, new in after.layers.items():
        old = before.layers[name]
        for owner in dict.fromkeys((*old.owners, *new.owners)):
            had, has = _owned(old, owner), _owned(new, owner)
            for appeared, (starts, ends) in ((False, minus(had, has)), (True, minus(has, had))):
                if len(starts):
                    change = Change(
                        name, owner, appeared, tuple(starts.tolist()), tuple(ends.tolist())
                    )
                    found.append(change)
    return found


def _owned(layer: Layer, owner: str) -> Ranges:
    if owner not in layer.owners:
        nothing = np.empty(0, dtype=np.int64)
        return nothing, nothing
    chosen = layer.owner == layer.owners.index(owner)
    return merged((layer.start[chosen], layer.end[chosen]))
