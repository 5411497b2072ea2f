"""All kinds of steps, the groups that a search switches on and off, and the scenarios.

A scenario is a choice of groups. "successors", "faults" and "oops" are no kinds of steps: they say
that a successor may be a little different, that memory may be missing within a step, and that who
takes it may die there.
"""

from __future__ import annotations

from khosim.explore.kinds import Kind
from khosim.explore.kinds_agent import KINDS as AGENT
from khosim.explore.kinds_boot import KINDS as BOOT
from khosim.explore.kinds_calls import KINDS as CALLS
from khosim.explore.kinds_faults import KINDS as FAULTS
from khosim.explore.kinds_flb import KINDS as FLB
from khosim.explore.kinds_luo import KINDS as LUO
from khosim.explore.kinds_memfd import KINDS as MEMFD
from khosim.explore.kinds_memory import KINDS as MEMORY
from khosim.explore.kinds_vmalloc import KINDS as VMALLOC

__all__ = ("GIVES_BACK", "GROUPS", "KINDS", "SCENARIOS")

_ALL = (*BOOT, *MEMORY, *VMALLOC, *LUO, *MEMFD, *FLB, *AGENT, *CALLS, *FAULTS)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
GROUPS: tuple[str, ...] = tuple(sorted({kind.group for kind in KINDS.values() if kind.group}))

SCENARIOS: dict[str, tuple[str, ...]] = {
    "all": (*GROUPS, "successors", "faults", "oops"),
    "pages": ("folio", "pages", "blob", "faults"),
    "subtrees": ("blob", "subtree", "debugfs", "faults"),
    "vmalloc": ("vmalloc", "faults"),
    "sessions": ("session", "crowd", "memfd", "agent", "faults"),
    "memfd": ("session", "memfd", "faults"),
    "shared": ("session", "flb", "agent", "image", "faults"),
    "reserve-mem": ("region", "successors"),
    "successors": ("region", "folio", "session", "memfd", "image", "successors", "faults"),
    "bytes": ("bytes", "session", "memfd", "folio", "blob", "subtree"),
    "maps": ("map", "session", "memfd", "folio", "pages"),
    "devices": ("device", "folio", "successors"),
    "oops": ("oops", "session", "memfd", "flb", "folio", "vmalloc", "reset", "agent", "image"),
}
"""Which groups of steps a scenario is made of."""

GIVES_BACK = (
    "put_outgoing",
    "put_incoming",
    "restore_folio",
    "stop_device",
    "restore_pages",
    "restore_many",
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
    "unpreserve_many",
    "unpreserve_free",
    "unpreserve_vmalloc",
    "free_folio",
    "free_pages",
    "vfree",
    "reload",
)
"""Kinds of steps by which an author gives everything back, in that order."""
