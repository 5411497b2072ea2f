"""The tables of a VT-d unit, as they lie in memory: constants and decoders.

Formats of Intel's Virtualization Technology for Directed I/O specification, legacy mode, which
``drivers/iommu/intel/iommu.h @ 7.3`` names too. Left out: scalable mode (PASID tables, first-stage
translation), device TLBs, snoop and memory types.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = (
    "ADDR_MASK",
    "READ",
    "WRITE",
    "ContextEntry",
    "Irte",
    "unpack_context",
    "unpack_irte",
)

READ, WRITE = 1, 2
ADDR_MASK = (1 << 52) - 4096


class ContextEntry(NamedTuple):
    """What a device's context entry says. ``levels`` is 0 where the entry makes no sense.

    ``rights`` (READ and WRITE) bound what the tables allow.
    """

    fault_silent: bool
    pass_through: bool
    table_phys: int
    levels: int
    did: int
    rights: int = 3


def unpack_context(low: int, high: int) -> ContextEntry | None:
    """A context entry from its two 64-bit words; None where it is not present."""
    if not low & 1:
        return None
    kind = low >> 2 & 3
    width = high & 7
    levels = 4 if width == 2 and kind != 3 else 0  # the one width that CAP offers
    return ContextEntry(bool(low & 2), kind == 2, low & ADDR_MASK, levels, high >> 8 & 0xFFFF)


class Irte(NamedTuple):
    """An interrupt remapping table entry; ``descriptor_phys`` is 0 for a remapped one."""

    vector: int
    dest: int
    descriptor_phys: int
    urgent: bool
    check: int
    qualifier: int
    sid: int


def unpack_irte(low: int, high: int) -> Irte | None:
    """An entry from its two 64-bit words; None where it is not present."""
    if not low & 1:
        return None
    check, qualifier, sid = high >> 18 & 3, high >> 16 & 3, high & 0xFFFF
    vector = low >> 16 & 0xFF
    if low >> 15 & 1:
        phys = (low >> 38 & 0x3FF_FFFF) << 6 | high >> 32 << 32
        return Irte(vector, 0, phys, bool(low >> 14 & 1), check, qualifier, sid)
    return Irte(vector, low >> 32, 0, False, check, qualifier, sid)
