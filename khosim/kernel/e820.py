"""The E820 table of an x86-64 kernel: the firmware's map, put in order and cut to size.

Models ``arch/x86/kernel/e820.c:e820__memory_setup_default``, ``e820__update_table``,
``e820__range_remove`` and ``e820__mapped_all`` @ 7.3 over lists of ``(address, size, type)`` in
bytes. Left out: ``memmap=``, extended tables, soft-reserved memory.
"""

from __future__ import annotations

from itertools import pairwise

from khosim.abi.boot_params import E820_RAM, BootParams

__all__ = (
    "Entries",
    "end_of_ram",
    "mapped_all",
    "memory_setup",
    "range_remove",
    "update_table",
)

Entries = list[tuple[int, int, int]]

_U64 = (1 << 64) - 1
_LOWMEM_BYTES = 0x9F000
_HIGH_MEMORY = 0x100000
_MAXMEM = 1 << 46
_E820_ACPI = 3


def memory_setup(params: BootParams) -> Entries:
    """``e820__memory_setup``: the table in order; a guess where the boot loader gave none."""
    entries: Entries = []
    for addr, size, type_ in params.e820:
        if size and addr > (addr + size - 1 & _U64):
            entries = []
            break
        entries.append((addr, size, type_))
    if not entries:
        entries = [(0, _LOWMEM_BYTES, E820_RAM), (_HIGH_MEMORY, params.alt_mem_bytes, E820_RAM)]
    return update_table(entries)


def update_table(entries: Entries) -> Entries:
    """``e820__update_table``: sorted, without overlaps (the higher type wins), neighbours joined.

    A table of one entry, or with one that wraps, stays as it is.
    """
    if len(entries) < 2 or any(addr + size > _U64 + 1 for addr, size, _ in entries):
        return entries
    end, last_type, in_order = 0, -1, True
    for addr, size, type_ in entries:
        if not size or addr < end or (addr == end and type_ == last_type):
            in_order = False
            break
        end, last_type = addr + size, type_
    return entries if in_order else _sanitize(entries)


def _sanitize(entries: Entries) -> Entries:
    entries = [entry for entry in entries if entry[1]]
    borders = sorted({addr for addr, _, _ in entries} | {addr + size for addr, size, _ in entries})
    result: Entries = []
    for start, end in pairwise(borders):
        types = [type_ for addr, size, type_ in entries if addr <= start and end <= addr + size]
        if not types:
            continue
        addr, size, type_ = result[-1] if result else (0, 0, -1)
        if type_ == max(types) and addr + size == start:
            result[-1] = (addr, end - addr, type_)
        else:
            result.append((start, end - start, max(types)))
    return result


def range_remove(entries: Entries, start: int, end: int, only_type: int = 0) -> Entries:
    """``e820__range_remove``: cut [start, end) out of the entries of one type, or of all."""
    kept: Entries = []
    for addr, size, type_ in entries:
        stop = addr + size
        if (only_type and type_ != only_type) or stop <= start or addr >= end:
            kept.append((addr, size, type_))
            continue
        if addr < start:
            kept.append((addr, start - addr, type_))
        if stop > end:
            kept.append((end, stop - end, type_))
    return kept


def mapped_all(entries: Entries, start: int, end: int, type_: int) -> bool:
    """``e820__mapped_all``: whether entries of ``type_`` cover all of [start, end)."""
    for addr, size, kind in entries:
        if kind != type_ or addr >= end or addr + size <= start:
            continue
        if addr <= start:
            start = addr + size
        if start >= end:
            return True
    return False


def end_of_ram(entries: Entries) -> int:
    """``e820__end_of_ram_pfn``, as an address: the end of the highest page of RAM or ACPI data."""
    end = 0
    for addr, size, type_ in entries:
        if type_ not in (E820_RAM, _E820_ACPI) or addr >= _MAXMEM:
            continue
        stop = addr + size & _U64
        if stop > _MAXMEM:
            return _MAXMEM
        end = max(end, stop & -4096)
    return end
