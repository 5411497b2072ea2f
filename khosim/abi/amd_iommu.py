"""AMD IOMMU tables and commands in memory, as the kernel writes them.

Device table entries (``struct dev_table_entry``, ``DTE_*``) and commands (``CMD_*``) of
``drivers/iommu/amd/amd_iommu_types.h`` @ 7.3, page-table entries of
``drivers/iommu/generic_pt/fmt/amdv1.h``. Left out: guest tables, interrupt tables, page sizes that
are no level's own.
"""

from __future__ import annotations

import struct

__all__ = (
    "AMD_PTE_PRESENT",
    "AMD_PTE_READ",
    "AMD_PTE_WRITE",
    "CMD_BYTES",
    "DTE_BYTES",
    "amd_pte_next_level",
    "complete_all",
    "dte",
    "dte_domain",
    "dte_levels",
    "empty_dte",
    "invalidate_all",
    "invalidate_devtab_entry",
    "invalidate_domain",
)

DTE_BYTES, CMD_BYTES = 32, 16
AMD_PTE_PRESENT, AMD_PTE_READ, AMD_PTE_WRITE = 1, 1 << 61, 1 << 62
_NEXT_LEVEL_SHIFT, _NEXT_LEVEL = 9, 7
_VALID, _TRANSLATION = 1 << 0, 1 << 1
_ADDRESS = (1 << 52) - (1 << 12)
_DOMAIN = 0xFFFF
_ALL_PAGES = 0x7FFF_FFFF_FFFF_F000
_QUAD, _PAIR = struct.Struct("<QQQQ"), struct.Struct("<QQ")
_SIZE, _PDE = 1, 2


def dte(page_table: int, levels: int, domain_id: int) -> bytes:
    """``set_dte_v1``: translate through this page table, as this domain, to read and to write."""
    low = _VALID | _TRANSLATION | page_table & _ADDRESS | levels << _NEXT_LEVEL_SHIFT
    return _QUAD.pack(low | AMD_PTE_READ | AMD_PTE_WRITE, domain_id, 0, 0)


def empty_dte() -> bytes:
    """``init_device_table_dma``: valid, and nothing is let through."""
    return _QUAD.pack(_VALID | _TRANSLATION, 0, 0, 0)


def dte_levels(low: int) -> int:
    """The levels of the table that an entry's first word names; 0 where it names none."""
    return low >> _NEXT_LEVEL_SHIFT & _NEXT_LEVEL


def dte_domain(second: int) -> int:
    """The domain id in an entry's second word."""
    return second & _DOMAIN


def amd_pte_next_level(level: int) -> int:
    """The bits that name the level of the table below; 0: it is a leaf."""
    return level << _NEXT_LEVEL_SHIFT


def complete_all(store_phys: int, value: int) -> bytes:
    """``CMD_COMPL_WAIT``: store ``value`` when all commands before are done."""
    return _PAIR.pack(store_phys | 1 | 1 << 60, value)


def invalidate_devtab_entry(device_id: int) -> bytes:
    """``CMD_INV_DEV_ENTRY``."""
    return _PAIR.pack(device_id | 2 << 60, 0)


def invalidate_domain(domain_id: int) -> bytes:
    """``CMD_INV_IOMMU_PAGES`` of all pages of a domain."""
    return _PAIR.pack(domain_id << 32 | 3 << 60, _ALL_PAGES | _SIZE | _PDE)


def invalidate_all() -> bytes:
    """``CMD_INV_ALL``."""
    return _PAIR.pack(8 << 60, 0)
