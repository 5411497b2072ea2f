"""The promises that are checked, one module for each family.

:data:`INVARIANTS` lists them all, in the order in which a handover goes through them.
"""

from __future__ import annotations

from khosim.checks.invariants import content, devices, incoming, liveupdate, outgoing, pages
from khosim.checks.invariants.base import Invariant

__all__ = ("INVARIANTS", "Invariant")

INVARIANTS: tuple[Invariant, ...] = (
    *outgoing.INVARIANTS,
    *incoming.INVARIANTS,
    *content.INVARIANTS,
    *pages.INVARIANTS,
    *liveupdate.INVARIANTS,
    *devices.INVARIANTS,
)
