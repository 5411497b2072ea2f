"""VT-d tables in memory, as the kernel writes them.

Legacy mode: root and context entries (``struct root_entry``, ``struct context_entry`` of
``drivers/iommu/intel/iommu.h`` @ 7.3), second-stage page-table entries (``DMA_PTE_READ``,
``DMA_PTE_WRITE``, ``DMA_PTE_LARGE_PAGE``), interrupt remapping entries and posted-interrupt
descriptors (``struct irte``, ``struct pi_desc``). Left out: scalable mode, first-stage tables.
"""

from __future__ import annotations

import struct

__all__ = (
    "CONTEXT_ENTRY_BYTES",
    "IRTE_BYTES",
    "LEVEL_BITS",
    "PI_DESC_BYTES",
    "PTE_LARGE",
    "PTE_READ",
    "PTE_WRITE",
    "ROOT_ENTRY_BYTES",
    "address_of",
    "context_entry",
    "is_present",
    "posted_irte",
    "root_entry",
)

ROOT_ENTRY_BYTES = 16
CONTEXT_ENTRY_BYTES = 16
IRTE_BYTES = 16
PI_DESC_BYTES = 64
LEVEL_BITS = 9
PTE_READ, PTE_WRITE, PTE_LARGE = 1 << 0, 1 << 1, 1 << 7

_PAIR = struct.Struct("<QQ")
_PRESENT = 1
_ADDRESS = (1 << 52) - (1 << 12)
_POSTED = 1 << 15
_AGAW_OF_LEVELS = {3: 1, 4: 2, 5: 3}


def root_entry(context_table: int) -> bytes:
    """The entry of one bus: where its context table is."""
    return _PAIR.pack(context_table | _PRESENT, 0)


def context_entry(page_table: int, levels: int, domain_id: int) -> bytes:
    """The entry of one function: translate through this page table, as this domain."""
    return _PAIR.pack(page_table | _PRESENT, domain_id << 8 | _AGAW_OF_LEVELS[levels])


def is_present(entry: int) -> bool:
    """Whether the low half of a root or context entry says that it counts."""
    return bool(entry & _PRESENT)


def address_of(entry: int) -> int:
    """The physical address in an entry of any table."""
    return entry & _ADDRESS


def posted_irte(pi_desc: int, vector: int, source_id: int) -> bytes:
    """An interrupt of ``source_id`` goes to the descriptor of a vCPU as ``vector``.

    ``struct irte`` in posted format: P, IM (bit 15), vector (16..23), bits 6..31 of the
    descriptor's address in 38..63; then source id (0..15), SVT 1 (18..19), the address's upper
    half in 32..63.
    """
    low = _PRESENT | _POSTED | vector << 16 | (pi_desc >> 6 & (1 << 26) - 1) << 38
    high = source_id | 1 << 18 | (pi_desc >> 32) << 32
    return _PAIR.pack(low, high)
