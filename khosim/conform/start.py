"""What memblock holds when the log of its calls begins.

``memblock=debug`` takes effect in ``parse_early_param`` (``mm/memblock.c:early_memblock`` @ 7.3).
What happened before that is in no line of its own, but in the first dump: on x86 the kernel image,
the initrd, setup_data, low memory and scratch; on arm64 memory itself (the device tree's) and the
tree. So the start is what the first dump shows, but not what came of requests before it. Calls
before it that name their range are made again all the same: they find it taken.

A row of a dump says a range and its size, so one wrong number on it shows, and is mended by the
sums in the dump's head. Nothing here depends on where an allocation was logged.
"""

from __future__ import annotations

from khosim.conform.boot_facts import BootFacts
from khosim.conform.dmesg_calls import (
    Dump,
    Event,
    Free,
    Note,
    Remove,
    Request,
    Reserve,
    Row,
    symbol_of,
)
from khosim.errors import InputError
from khosim.kernel.memblock import (
    MEMBLOCK_KHO_SCRATCH,
    MEMBLOCK_NOMAP,
    MEMBLOCK_RSRV_KERN,
    Memblock,
    RegionArray,
)

__all__ = (
    "covered",
    "mended",
    "merged_ranges",
    "page_cut",
    "ramdisks",
    "start_memblock",
    "subtract",
    "variants",
)

_MIB = 1 << 20
_SMP_CACHE_BYTES = 64
_EFI = ("efi_init", "reserve_regions")
Range = tuple[int, int]


def start_memblock(
    events: list[Event], facts: BootFacts, scratch: list[Range] | None
) -> tuple[list[Memblock], list[Range]]:
    """Memblock as it was before the first logged call, and the incoming scratch areas.

    ``scratch`` lists the predecessor's areas as (address, length); without it they are read from
    the first dump. Where later lines contradict that dump there is a second memblock, after them.
    Raises :class:`InputError` where the log ends within the first dump.
    """
    at = next(i for i, event in enumerate(events) if isinstance(event, Dump))
    dump = events[at]
    assert isinstance(dump, Dump)
    if not dump.whole:
        raise InputError(f"{facts.place}: line {dump.line}", "the first memblock dump is cut short")
    ram = merged_ranges([(start, end) for _, start, end, _nid in facts.node_ranges])
    later = _later_reserved(events[at + 1 :])
    memory = mended(dump.memory, dump.memory_size, ram)
    known = [(low, high) for low, high, _ in later]
    reservations = variants(dump.reserved, dump.reserved_size, known)
    if any(isinstance(event, Request) for event in events[:at]):
        # arm64 allocates page tables before its first dump, but reserves as its own only later.
        reservations = [
            [row for row in rows if not row.flags & MEMBLOCK_RSRV_KERN] for rows in reservations
        ]
    if not facts.kho_boot:
        scratch = []
    elif scratch is None:
        low = _MIB if facts.arch == "x86_64" else 0
        marked = merged_ranges([(r.base, r.end) for r in memory if r.flags & MEMBLOCK_KHO_SCRATCH])
        scratch = [(max(base, low), end - max(base, low)) for base, end in marked if end > low]
    memories = [merged_ranges([(row.base, row.end) for row in memory])]
    if facts.arch == "x86_64":
        memories = [[]]  # e820__memblock_setup adds it all, in the log
    elif ram and ram != memories[0] and not _is_replaced(events[at + 1 :]):
        memories.append(ram)
    if facts.arch == "x86_64":
        reservations = [_moved_to(rows, 0, 64 << 10) for rows in reservations]
    moved = [_as_later(row, reservations[0], later) for row in reservations[0]]
    for low, high in ramdisks(events, facts):
        moved = _moved_to(moved, low, high)
    if moved != reservations[0]:
        reservations.append(moved)
        edges = {event.base for event in events[:at] if isinstance(event, Reserve)}
        edges |= {event.end for event in events[:at] if isinstance(event, Reserve)}
        # The likelier first: where what was reserved meets the ends of what the dump shows.
        reservations.sort(key=lambda rows: -sum(r.base in edges or r.end in edges for r in rows))
    starts = []
    for ranges in memories:
        for rows in reservations:
            memblock = _empty(facts)
            for base, end in ranges:
                memblock.memblock_add(base, end - base)
                for row in memory:
                    if row.flags & MEMBLOCK_NOMAP and base <= row.base < end:
                        memblock.memblock_mark_nomap(row.base, row.size)
            for base, size in scratch:
                memblock.memblock_add(base, size)
                memblock.memblock_mark_kho_scratch(base, size)
            if facts.kho_boot:
                memblock.memblock_set_kho_scratch_only()
            for row in rows:
                memblock.memblock_reserve_node(row.base, row.size, -1, row.flags)
            starts.append(memblock)
    return starts, scratch


def ramdisks(events: list[Event], facts: BootFacts) -> list[Range]:
    """Where x86 says that the initrd lies, to the end of its last page."""
    page = facts.page_size
    found = []
    for event in events:
        if isinstance(event, Note) and event.kind == "ramdisk":
            start, last = (int(word, 16) for word in event.words)
            found.append((start, (last + page) // page * page))
    return found


class _UmaMemblock(Memblock):
    """memblock in a kernel built without NUMA: everything is on node 0."""

    __slots__ = ()

    def _add_range(self, array: RegionArray, base: int, size: int, nid: int, flags: int) -> int:
        return super()._add_range(array, base, size, 0, flags)

    def _set_node(self, array: RegionArray, base: int, size: int, nid: int) -> int:
        return 0


def _is_replaced(after: list[Event]) -> bool:
    """Whether the memory of the first dump is thrown away for EFI's, as efi_init does on arm64."""
    upto = next((i for i, event in enumerate(after) if isinstance(event, Request)), len(after))
    return any(
        symbol_of(event.caller) in _EFI for event in after[:upto] if isinstance(event, Remove)
    )


def _empty(facts: BootFacts) -> Memblock:
    kind = Memblock if facts.numa else _UmaMemblock
    return kind(
        page_size=facts.page_size,
        smp_cache_bytes=_SMP_CACHE_BYTES,
        memory_max=facts.memory_max,
        reserved_max=facts.reserved_max,
        movable_node=facts.movable_node,
        mirrored_kernelcore=facts.mirrored,
    )


def _later_reserved(after: list[Event]) -> list[tuple[int, int, int]]:
    """What the next dump has reserved, as (base, end, flags), and what was given back until it."""
    found: list[tuple[int, int, int]] = []
    for event in after:
        if isinstance(event, Free):
            found.append((event.base, event.end, 0))
        elif isinstance(event, Dump):
            rows = mended(event.reserved, event.reserved_size)
            return found + [(row.base, row.end, row.flags) for row in rows]
    return []


def _moved_to(rows: list[Row], low: int, high: int) -> list[Row]:
    """``rows`` with the one of that size moved to [low, high), where x86 surely reserves."""
    alike = [i for i, row in enumerate(rows) if row.size == high - low]
    if len(alike) != 1 or covered(low, high, [(row.base, row.end) for row in rows]):
        return rows
    return [
        row._replace(base=low, end=high) if i == alike[0] else row for i, row in enumerate(rows)
    ]


def _as_later(row: Row, rows: list[Row], later: list[tuple[int, int, int]]) -> Row:
    """``row``, or if the next dump contradicts it, the same moved to where that has it."""
    if not later or covered(row.base, row.end, [(low, high) for low, high, _ in later]):
        return row
    known = {(one.base, one.end) for one in rows}
    for low, high, flags in later:
        if flags == row.flags and high - low == row.size and (low, high) not in known:
            return row._replace(base=low, end=high)
    for low, high, _flags in later:
        for base in (low, high - row.size):
            if base < row.end and row.base < base + row.size and base >= low:
                return row._replace(base=base, end=base + row.size)
    return row


def page_cut(base: int, end: int, page_size: int) -> Range:
    """[base, end) as ``memblock_trim_memory`` leaves it."""
    return -(-base // page_size) * page_size, end // page_size * page_size


def mended(rows: tuple[Row, ...], total: int, later: list[Range] | None = None) -> list[Row]:
    """``rows`` with a range that contradicts its printed size put right, see :func:`variants`."""
    return variants(rows, total, later)[0]


def variants(
    rows: tuple[Row, ...], total: int, later: list[Range] | None = None
) -> list[list[Row]]:
    """``rows`` with a range that contradicts its printed size put right, the likeliest way first.

    The sum of all sizes says whether the size is wrong or an end; which end, the rows around it,
    else what ``later`` lines know, else nothing: then there are two variants.
    """
    # A total may count what memblock_trim_memory has shaved off, less than two pages a region.
    sizes_fit = 0 <= total - sum(row.size for row in rows) < len(rows) << 17
    done: list[list[Row]] = [[]]
    for i, row in enumerate(rows):
        if row.end - row.base == row.size:
            fits = [row]
        elif not sizes_fit:
            fits = [row._replace(size=row.end - row.base)] if row.end > row.base else []
        else:
            fits = [row._replace(end=row.base + row.size), row._replace(base=row.end - row.size)]
            below = rows[i - 1].end if i else 0
            above = rows[i + 1].base if i + 1 < len(rows) else 1 << 64
            fits = [one for one in fits if below <= one.base and one.end <= above] or fits
            fits = [one for one in fits if covered(one.base, one.end, later or [])] or fits
            fits.sort(key=lambda one: -_roundness(one.base))
        done = [[*before, *one] for before in done for one in ([[f] for f in fits] or [[]])][:4]
    return done


def _roundness(addr: int) -> int:
    return (addr & -addr) if addr else 1 << 63


def merged_ranges(ranges: list[Range]) -> list[Range]:
    """``ranges`` in order, with those joined that touch or overlap."""
    merged: list[Range] = []
    for base, end in sorted(ranges):
        if merged and base <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((base, end))
    return merged


def subtract(ranges: list[Range], cuts: list[Range]) -> list[Range]:
    """What of ``ranges`` no range of ``cuts`` touches."""
    left = ranges
    for low, high in cuts:
        pieces: list[Range] = []
        for base, end in left:
            if high <= base or end <= low or high <= low:
                pieces.append((base, end))
                continue
            if base < low:
                pieces.append((base, low))
            if high < end:
                pieces.append((high, end))
        left = pieces
    return left


def covered(base: int, end: int, ranges: list[Range]) -> bool:
    """Whether [base, end) lies wholly in the union of ``ranges``."""
    return not subtract([(base, end)], ranges)
