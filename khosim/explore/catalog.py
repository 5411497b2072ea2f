"""All kinds of steps, the groups that a search switches on and off, and the scenarios.

A scenario is a choice of groups. "successors" and "faults" are no kinds of steps: they say that a
successor may be a little different, and that something may fail within a step.
"""

from __future__ import annotations

from khosim.explore.kinds import Kind
from khosim.explore.kinds_boot import KINDS as BOOT
from khosim.explore.kinds_luo import KINDS as LUO
from khosim.explore.kinds_memory import KINDS as MEMORY

__all__ = ("GIVES_BACK", "GROUPS", "KINDS", "SCENARIOS")

KINDS: dict[str, Kind] = {kind.name: kind for kind in (*BOOT, *MEMORY, *LUO)}
GROUPS: tuple[str, ...] = tuple(sorted({kind.group for kind in KINDS.values() if kind.group}))

SCENARIOS: dict[str, tuple[str, ...]] = {
    "all": (*GROUPS, "successors", "faults"),
    "pages": ("folio", "pages", "blob", "faults"),
    "subtrees": ("blob", "subtree", "faults"),
    "vmalloc": ("vmalloc", "faults"),
    "sessions": ("session", "crowd", "memfd", "faults"),
    "memfd": ("session", "memfd", "faults"),
    "shared": ("session", "flb", "faults"),
    "reserve-mem": ("region", "successors"),
    "successors": ("region", "folio", "successors", "faults"),
}
"""Which groups of steps a scenario is made of."""

GIVES_BACK = (
    "put_outgoing",
    "put_incoming",
    "restore_folio",
    "restore_pages",
    "restore_free",
    "restore_vmalloc",
    "ledger",
    "retrieve_session",
    "retrieve_file",
    "finish",
    "close_session",
    "close_file",
    "remove_subtree",
    "unpreserve_folio",
    "unpreserve_pages",
    "unpreserve_free",
    "unpreserve_vmalloc",
    "free_folio",
    "free_pages",
    "vfree",
)
"""Kinds of steps by which an author gives everything back, in that order."""
