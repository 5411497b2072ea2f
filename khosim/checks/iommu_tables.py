"""What an IOMMU's tables in RAM say, read by the layouts of the specifications.

VT-d in legacy mode (root and context entries, second-stage tables) and AMD's device table and page
tables. Shares nothing with the drivers that wrote them, nor with the unit that uses them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from khosim.machine.devices.amd import AmdUnit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from khosim.machine.hardware import Hardware

__all__ = (
    "AmdTables",
    "Tables",
    "VtdTables",
    "frames_of",
    "look_up",
    "tables_of",
    "top_of",
)

_ADDRESS = (1 << 52) - 4096


class Tables(Protocol):
    """One unit's tables."""

    def entry(self, hardware: Hardware, root: int, rid: int) -> bytes:
        """A requester's entry below ``root``; zeros where there is none."""

    def is_leaf(self, entry: int) -> bool:
        """Whether an entry above the lowest level of a page table maps memory itself."""

    def is_there(self, entry: int) -> bool:
        """Whether an entry of a page table counts."""


class VtdTables(NamedTuple):
    """Root table and a context table for each bus, 16 bytes an entry."""

    def entry(self, hardware: Hardware, root: int, rid: int) -> bytes:
        """The context entry."""
        if not root or not hardware.is_ram(root, 4096):
            return bytes(16)
        bus = hardware.ram.read_u64(root + (rid >> 8) * 16)
        at = (bus & _ADDRESS) + (rid & 0xFF) * 16
        return hardware.ram.read(at, 16) if bus & 1 and hardware.is_ram(at, 16) else bytes(16)

    def is_leaf(self, entry: int) -> bool:
        """Bit 7, page size."""
        return bool(entry & 1 << 7)

    def is_there(self, entry: int) -> bool:
        """It can be read or written."""
        return bool(entry & 3)


class AmdTables(NamedTuple):
    """A device table, 32 bytes an entry, of which the first half is about translation."""

    def entry(self, hardware: Hardware, root: int, rid: int) -> bytes:
        """The device table entry; zeros also where it names no page table."""
        at = root + 32 * rid
        if not root or not hardware.is_ram(at, 32):
            return bytes(32)
        found = hardware.ram.read(at, 32)
        return found if found[1] >> 1 & 7 else bytes(32)

    def is_leaf(self, entry: int) -> bool:
        """Next level 0 (or 7, for a size that is no level's)."""
        return entry >> 9 & 7 in (0, 7)

    def is_there(self, entry: int) -> bool:
        """Bit 0, present."""
        return bool(entry & 1)


def tables_of(unit: Any) -> Tables:
    """How the tables of a machine's unit are to be read."""
    return AmdTables() if isinstance(unit, AmdUnit) else VtdTables()


def frames_of(tables: Tables, ram: Any, table: int, level: int = 3) -> Iterator[int]:
    """Physical addresses of a page table and of all below it."""
    yield table
    if not level:
        return
    entries = np.frombuffer(ram.read(table, 4096), dtype=np.uint64)
    for entry in entries[entries != 0].tolist():
        if not tables.is_leaf(entry):
            yield from frames_of(tables, ram, entry & _ADDRESS, level - 1)


def top_of(entry: bytes) -> int:
    """The page table that a requester's entry names."""
    return int.from_bytes(entry[:8], "little") & _ADDRESS


def look_up(tables: Tables, ram: Any, top: int, iova: int) -> int | None:
    """Where an I/O address leads by the page table at ``top``; None: nowhere."""
    at = top
    for bits in (39, 30, 21, 12):
        entry = ram.read_u64(at + 8 * (iova >> bits & 511))
        if not tables.is_there(entry):
            return None
        at = entry & _ADDRESS
        if bits == 12 or tables.is_leaf(entry):
            found: int = at + (iova & (1 << bits) - 1)
            return found
    return None
