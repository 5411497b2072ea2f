"""Groups: blocks of memory that a scenario calls by one name, and what is known of their content.

The outside observer's book-keeping. A kernel learns none of it: what a successor needs to find its
blocks is in an index, a preserved blob that the root FDT names after the group.
"""

from __future__ import annotations

import numpy as np

from khosim.scenario.contents import I64, U64, content_pages

__all__ = ("INCOMING", "LOCAL", "PRESERVED", "Group")

LOCAL, PRESERVED, INCOMING = 0, 1, 2
"""Held by the running kernel; held and preserved; handed over to it and not restored yet."""


class Group:
    """Blocks of one name: entry ``i`` of each array is one block.

    ``kind`` is "folios", "pages" (ranges of order-0 pages, ``order`` -1) or "blob" (a folio that is
    a subtree of its own). ``index`` lists the parts of the preserved index as (subtree, phys,
    bytes) until they are read; ``is_lost`` says that a kernel refused the handover.
    """

    __slots__ = (
        "fill",
        "index",
        "is_lost",
        "key",
        "kind",
        "name",
        "nr_pages",
        "order",
        "owner",
        "pfn",
        "state",
    )

    def __init__(self, name: str, kind: str, owner: str) -> None:
        self.name = name
        self.kind = kind
        self.owner = owner
        self.pfn: I64 = np.zeros(0, dtype=np.int64)
        self.nr_pages: I64 = self.pfn
        self.order: I64 = self.pfn
        self.fill: I64 = self.pfn
        self.state: I64 = self.pfn
        self.key: U64 = np.zeros(0, dtype=np.uint64)
        self.index: list[tuple[str, int, bytes]] = []
        self.is_lost = False

    def __len__(self) -> int:
        return len(self.pfn)

    def add(
        self, pfn: I64, nr_pages: I64, order: I64, key: U64, *, fill: int, state: int
    ) -> I64:
        """Add blocks; returns their entries."""
        first = len(self.pfn)
        self.pfn = np.concatenate((self.pfn, pfn))
        self.nr_pages = np.concatenate((self.nr_pages, nr_pages))
        self.order = np.concatenate((self.order, order))
        self.key = np.concatenate((self.key, key))
        self.fill = np.concatenate((self.fill, np.full(len(pfn), fill, dtype=np.int64)))
        self.state = np.concatenate((self.state, np.full(len(pfn), state, dtype=np.int64)))
        self.is_lost = False
        return np.arange(first, len(self.pfn))

    def keep(self, entries: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> None:
        """Keep the entries where the mask is true."""
        self.pfn, self.nr_pages, self.order = (
            self.pfn[entries],
            self.nr_pages[entries],
            self.order[entries],
        )
        self.key, self.fill, self.state = self.key[entries], self.fill[entries], self.state[entries]

    def drop(self, entries: I64) -> None:
        """Forget some entries."""
        mask = np.ones(len(self.pfn), dtype=np.bool_)
        mask[entries] = False
        self.keep(mask)

    def select(self, states: tuple[int, ...], share: float = 1.0) -> I64:
        """The entries in one of ``states``; a part of them, spread evenly, where ``share`` < 1."""
        found = np.flatnonzero(np.isin(self.state, states))
        if share < 1 and len(found):
            wanted = max(1, round(len(found) * share))
            found = found[np.arange(wanted) * len(found) // wanted]
        return found

    def content(self, entries: I64) -> tuple[I64, U64]:
        """The pages with content of some entries, and their keys."""
        return content_pages(
            self.pfn[entries], self.nr_pages[entries], self.key[entries], self.fill[entries]
        )

    def packed_index(self, page_shift: int) -> bytes:
        """What the successor is told: address (with the order in its low bits) and pages, u64."""
        chosen = self.select((PRESERVED,))
        order = np.maximum(self.order[chosen], 0)
        columns = ((self.pfn[chosen] << page_shift) | order, self.nr_pages[chosen])
        return np.stack(columns, axis=1).astype("<u8").tobytes()

    def hand_over(self) -> None:
        """The jump: what was preserved comes in, what was not is gone with the kernel."""
        self.keep(self.state == PRESERVED)
        self.state[:] = INCOMING

    def lose(self) -> None:
        """The successor knows nothing of what was preserved."""
        self.is_lost = self.is_lost or len(self) > 0
        self.keep(np.zeros(len(self), dtype=np.bool_))
        self.index = []
