"""RAM, its shadow of writers, and its snapshots, beside a model with nothing clever in it."""

from __future__ import annotations

import resource
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim.errors import InputError, RamFault
from khosim.machine.ram import MAX_PHYS, Ram, Writer
from khosim.machine.shadow import RunMap

TIB = 1 << 40
PAGE = 4096
BOOT = Writer(0, "memblock_alloc")
SECOND = Writer(1, "kho_preserve_folio")


def resident_bytes() -> int:
    """What this process has in memory now."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


# Used again


def test_memory_of_a_dead_machine_is_clean() -> None:
    """Whatever was written, noted or not, the next machine of that size reads zeros."""
    size = 1 << 20
    for life in range(4):
        ram = Ram(size)
        assert ram.read(0, size) == bytes(size)
        assert ram.touched_ranges() == []
        ram.write(5 * PAGE + 9, b"noted", BOOT)
        if life % 2:
            ram.write(size - 3, b"end", BOOT)
        ram.data[200 * PAGE] = 0xFF
        ram.data[17 * PAGE : 18 * PAGE] = 0xFF  # behind the shadow's back
        ram.data[0] = 1
        token = ram.snapshot()
        ram.zero(30 * PAGE, 40 * PAGE, SECOND)
        ram.write(31 * PAGE, b"x" * 3 * PAGE, SECOND)
        ram.rollback(token)
        ram.write(60 * PAGE, b"left in the log", SECOND)
        del ram


@pytest.mark.parametrize(
    "look",
    [
        lambda ram: ram.view(0, 8),
        lambda ram: ram.words[:1],
        lambda ram: ram.u64[:1],
        lambda ram: ram.writable_mv(0, 8, BOOT),
    ],
)
def test_memory_that_is_looked_at_is_not_used_again(look: Callable[[Ram], Any]) -> None:
    """A view outlives its machine, with the bytes it showed."""
    ram = Ram(1 << 20)
    ram.write(0, b"precious", BOOT)
    view = look(ram)
    del ram
    other = Ram(1 << 20)
    assert other.read(0, 8) == bytes(8)
    other.write(0, b"whatever", BOOT)
    assert view.tobytes() == b"precious"


def test_much_memory_is_not_kept() -> None:
    """A machine that touched a lot leaves nothing resident behind."""
    size = 64 << 20
    ram = Ram(size)
    ram.write(0, b"x" * (32 << 20), BOOT)
    before = resident_bytes()
    del ram
    assert before - resident_bytes() > 30 << 20


# Reading and writing


def test_fresh_ram_is_zero() -> None:
    """A new machine reads as zero everywhere and knows no writer."""
    ram = Ram(1 << 20)
    assert ram.read(0, 1 << 20) == bytes(1 << 20)
    assert ram.last_writer(0x1234) is None
    assert ram.touched_ranges() == []


def test_write_and_read_back() -> None:
    """Bytes, bytearrays, memoryviews and arrays all arrive where they were written."""
    ram = Ram(1 << 20)
    ram.write(10, b"abc", BOOT)
    ram.write(PAGE - 2, bytearray(b"wxyz"), BOOT)
    ram.write(0x3000, np.arange(3, dtype=np.uint32).data, BOOT)
    ram.write(0x5000, np.full(PAGE * 3, 7, dtype=np.uint8), BOOT)
    ram.write(0x9000, np.arange(20, dtype=np.uint8)[::2], BOOT)
    assert ram.read(8, 7) == b"\0\0abc\0\0"
    assert ram.read(PAGE - 3, 6) == b"\0wxyz\0"
    assert ram.read(0x3000, 12) == b"\0\0\0\0\1\0\0\0\2\0\0\0"
    assert ram.read(0x4FFF, 3 * PAGE + 2) == b"\0" + b"\7" * (3 * PAGE) + b"\0"
    assert ram.read(0x9000, 10) == bytes(range(0, 20, 2))


@pytest.mark.parametrize("phys", [0, 8, 0xFF8, 0xFFD, 0x1001, 0xFFFF8])
def test_numbers_are_little_endian(phys: int) -> None:
    """64-bit and 32-bit numbers, aligned, unaligned, and across a page's edge."""
    ram = Ram(1 << 20)
    ram.write_u64(phys, 0x1122334455667788, BOOT)
    assert ram.read(phys, 8) == bytes.fromhex("8877665544332211")
    assert ram.read_u64(phys) == 0x1122334455667788
    assert ram.read_u32(phys) == 0x55667788
    ram.write_u32(phys + 4, 0xA0B0C0D0, SECOND)
    assert ram.read_u64(phys) == 0xA0B0C0D055667788
    assert ram.last_writer(phys + 7) == SECOND


def test_views_are_windows_not_copies() -> None:
    """A view shows later writes and refuses to be written; a writable one writes RAM."""
    ram = Ram(1 << 20)
    view = ram.view(100, 4)
    ram.writable(100, 2, BOOT)[:] = [1, 2]
    ram.writable_mv(102, 2, SECOND)[:] = b"\3\4"
    assert view.tolist() == [1, 2, 3, 4]
    assert ram.last_writer(0) == SECOND
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 9


def test_array_of_another_kind_is_refused() -> None:
    """An array that is not a row of bytes is a mistake of the caller's, never a silent cast."""
    with pytest.raises(TypeError, match="uint8"):
        Ram(1 << 20).write(0, np.zeros(4, dtype=np.uint16), BOOT)


HOSTILE = [
    -1,
    -8,
    -(1 << 64),
    1 << 20,
    (1 << 20) - 3,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
    1 << 70,
]
ACCESSES: dict[str, Callable[[Ram, Any], object]] = {
    "read": lambda ram, phys: ram.read(phys, 4),
    "view": lambda ram, phys: ram.view(phys, 4),
    "read_u32": lambda ram, phys: ram.read_u32(phys),
    "read_u64": lambda ram, phys: ram.read_u64(phys),
    "write": lambda ram, phys: ram.write(phys, b"1234", BOOT),
    "write array": lambda ram, phys: ram.write(phys, np.zeros(4, dtype=np.uint8), BOOT),
    "write_u32": lambda ram, phys: ram.write_u32(phys, 1, BOOT),
    "write_u64": lambda ram, phys: ram.write_u64(phys, 1, BOOT),
    "writable": lambda ram, phys: ram.writable(phys, 4, BOOT),
    "writable_mv": lambda ram, phys: ram.writable_mv(phys, 4, BOOT),
    "zero": lambda ram, phys: ram.zero(phys, 4, BOOT),
    "copy from": lambda ram, phys: ram.copy(phys, 0, 4, BOOT),
    "copy to": lambda ram, phys: ram.copy(0, phys, 4, BOOT),
    "last_writer": lambda ram, phys: ram.last_writer(phys if phys < 0 else phys + 4),
    "writers_in": lambda ram, phys: ram.writers_in(phys, phys + 4),
    "touched_ranges": lambda ram, phys: ram.touched_ranges(phys, phys + 4),
}


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("phys", HOSTILE, ids=hex)
def test_hostile_addresses_fault(access: str, phys: int) -> None:
    """No address outside RAM, however large or negative, gets past the one error."""
    ram = Ram(1 << 20)
    with pytest.raises(RamFault) as caught:
        ACCESSES[access](ram, phys)
    assert caught.value.phys in (phys, phys + 4)
    assert ram.touched_ranges() == []


@pytest.mark.parametrize("len_bytes", [-1, -(1 << 64), 1 << 21, 1 << 64])
def test_hostile_lengths_fault(len_bytes: int) -> None:
    """Neither does any length."""
    ram = Ram(1 << 20)
    for access in (ram.read, ram.view):
        with pytest.raises(RamFault):
            access(16, len_bytes)
    for change in (ram.writable, ram.writable_mv, ram.zero):
        with pytest.raises(RamFault):
            change(16, len_bytes, BOOT)
    with pytest.raises(RamFault):
        ram.copy(16, 32, len_bytes, BOOT)


@pytest.mark.parametrize("pfn", [-1, 256, 1 << 40, (1 << 64) - 1])
def test_hostile_frames_fault(pfn: int) -> None:
    """Frames announced in bulk are checked too."""
    ram = Ram(1 << 20)
    with pytest.raises(RamFault):
        ram.note_writes([3, pfn], BOOT)
    with pytest.raises(RamFault):
        ram.last_writers([3, pfn])
    if pfn >= 0:
        with pytest.raises(RamFault):
            ram.note_writes(np.array([pfn], dtype=np.uint64), BOOT)


@pytest.mark.parametrize("phys", [0, 5, 1 << 20])
def test_nothing_is_always_possible(phys: int) -> None:
    """Accesses of no bytes succeed anywhere, the end included, and leave no trace."""
    ram = Ram(1 << 20)
    token = ram.snapshot()
    assert ram.read(phys, 0) == b""
    assert ram.view(phys, 0).size == 0
    ram.write(phys, b"", BOOT)
    ram.write(phys, np.zeros(0, dtype=np.uint8), BOOT)
    ram.zero(phys, 0, BOOT)
    ram.copy(phys, 0, 0, BOOT)
    ram.writable(phys, 0, BOOT)
    ram.note_writes([], BOOT)
    assert not ram.touched_ranges()
    assert not ram.writers_in(0, 1 << 20)
    ram.rollback(token)


def test_ram_may_end_inside_a_page() -> None:
    """The last page of RAM may be partial; its rest cannot be reached."""
    ram = Ram(0x9FC00)
    ram.write(0x9FBFF, b"x", BOOT)
    with pytest.raises(RamFault):
        ram.write(0x9FBFF, b"xy", BOOT)
    assert ram.touched_ranges() == [(0x9F000, 0xA0000)]
    ram.zero(0, 0x9FC00, BOOT)
    assert ram.read(0x9FBFF, 1) == b"\0"


@pytest.mark.parametrize(
    ("size_bytes", "page_size"),
    [(0, 4096), (-5, 4096), (MAX_PHYS + 1, 4096), (1 << 20, 8192), (1 << 20, 0)],
)
def test_impossible_ram_is_refused(size_bytes: int, page_size: int) -> None:
    """Sizes and page sizes that no machine has are bad input."""
    with pytest.raises(InputError, match="RAM"):
        Ram(size_bytes, page_size=page_size)


# What it costs


def test_sixteen_tebibytes_cost_what_they_touch() -> None:
    """A write at either end of 16 TiB, a zeroed and a copied TiB: a few pages of memory."""
    before = resident_bytes()
    ram = Ram(16 * TIB)
    ram.write(16 * TIB - 5, b"last!", BOOT)
    ram.write(0, b"first", BOOT)
    ram.zero(2 * TIB, TIB, BOOT)
    ram.copy(3 * TIB, 5 * TIB, TIB, BOOT)
    ram.copy(15 * TIB + 123, 8 * TIB + 123, TIB - 123, SECOND)
    assert ram.read(9 * TIB - 5, 5) == b"last!"
    assert ram.touched_ranges() == [
        (0, PAGE),
        (9 * TIB - PAGE, 9 * TIB),
        (16 * TIB - PAGE, 16 * TIB),
    ]
    assert resident_bytes() - before < 4 << 20


def test_zeroing_gives_memory_back() -> None:
    """Zeroing a large range returns it to the host."""
    ram = Ram(1 << 30)
    ram.writable(0, 32 << 20, BOOT)[:] = 1
    full = resident_bytes()
    ram.zero(0, 32 << 20, SECOND)
    assert full - resident_bytes() > 28 << 20
    assert ram.touched_ranges() == []
    assert ram.read_u64((32 << 20) - 8) == 0


def test_rolled_back_pages_do_not_pile_up() -> None:
    """Rolling back again and again elsewhere holds on to no memory, and loses no later write."""
    ram = Ram(1 << 30)
    before = resident_bytes()
    spots = range(0, 96 << 20, 1 << 20)
    for start in spots:
        token = ram.snapshot()
        for phys in range(start, start + (1 << 20), PAGE):
            ram.write(phys, b"x", BOOT)
        ram.rollback(token)
        ram.discard(token)
        ram.write_u64(start, start, SECOND)
    assert resident_bytes() - before < 48 << 20
    assert [ram.read_u64(start) for start in spots] == list(spots)
    assert not ram.view(PAGE, (1 << 20) - PAGE).any()


def test_ram_is_freed_at_once() -> None:
    """Nothing keeps a machine's memory alive once its last user lets go, not even a snapshot."""
    ram = Ram(64 << 20)
    ram.write(5, b"x", BOOT)
    ram.snapshot()
    ram.write(5, b"y", BOOT)
    gone = weakref.ref(ram)
    view = ram.view(5, 1)
    del ram
    assert gone() is None
    assert view[0] == ord("y")


# The shadow


def test_last_writer_is_the_last() -> None:
    """Small over large, large over small, zeroing, copying: the newest writer answers."""
    ram = Ram(1 << 30)
    early, late, wipe = Writer(0, "early"), Writer(2, "late"), Writer(3, "wipe")
    ram.write(0x5000, b"small", early)
    ram.writable(0, 1 << 20, late)
    assert ram.last_writer(0x5FFF) == late
    ram.write_u64(0x6000, 1, early)
    ram.writable(0x100000, 1 << 20, late)
    assert ram.last_writer(0x6008) == early
    ram.zero(0x5000, PAGE, wipe)
    ram.copy(0x6000, 0x8000, PAGE, wipe)
    assert ram.last_writers([4, 5, 6, 8, 511, 512]) == [late, wipe, early, wipe, late, None]
    assert ram.writers_in(0x4800, 0x9000) == [
        (0x4000, 0x5000, late),
        (0x5000, 0x6000, wipe),
        (0x6000, 0x7000, early),
        (0x7000, 0x8000, late),
        (0x8000, 0x9000, wipe),
    ]


@pytest.mark.parametrize("wipe", ["zero", "writable"])
def test_one_writer_before_and_after_a_large_write(wipe: str) -> None:
    """A writer who goes on after another one's large write is the last again."""
    ram = Ram(1 << 30)
    ram.write(0x5000, b"before", BOOT)
    getattr(ram, wipe)(0, 1 << 20, SECOND)
    assert ram.last_writers([5, 6]) == [SECOND, SECOND]
    ram.write(0x5000, b"after", BOOT)
    assert ram.last_writers([5, 6]) == [BOOT, SECOND]


def test_plain_tuples_are_writers() -> None:
    """A plain (generation, symbol) is accepted and comes back as a Writer."""
    ram = Ram(1 << 20)
    ram.write(0, b"x", (4, "kho_fill"))
    ram.writable(0x10000, 0x20000, (4, "kho_fill"))
    for phys in (0, 0x10000):
        writer = ram.last_writer(phys)
        assert writer is not None
        assert (writer.generation, writer.symbol) == (4, "kho_fill")


def test_bulk_writers_announce_their_frames() -> None:
    """Frames in any order, scattered or in runs, with repeats, under a snapshot or not."""
    ram = Ram(1 << 24)
    ram.write(7 * PAGE, b"kept", BOOT)
    token = ram.snapshot()
    scattered = np.array([900, 7, 3, 7, 2000], dtype=np.uint64)
    runs = np.concatenate((np.arange(100, 200), np.arange(300, 400)))
    ram.note_writes(scattered, SECOND)
    ram.note_writes(runs, SECOND)
    ram.data.reshape(-1, PAGE)[scattered] = 9
    ram.data.reshape(-1, PAGE)[runs] = 8
    frames = [(a // PAGE, b // PAGE) for a, b in ram.touched_ranges()]
    assert frames == [(3, 4), (7, 8), (100, 200), (300, 400), (900, 901), (2000, 2001)]
    assert ram.last_writers([3, 4, 199, 2000]) == [SECOND, None, SECOND, SECOND]
    ram.rollback(token)
    assert ram.touched_ranges() == [(7 * PAGE, 8 * PAGE)]
    assert ram.read(7 * PAGE, 5) == b"kept\0"
    assert ram.last_writer(7 * PAGE) == BOOT
    assert not ram.view(8 * PAGE, (1 << 24) - 8 * PAGE).any()


def test_touched_frames_where_pages_were_written_one_by_one() -> None:
    """Frame by frame between large writes; where one of these reached, there is no answer."""
    ram = Ram(1 << 24)
    for pfn in (99, 41, 30, 29, 40):
        ram.write(pfn * PAGE, b"x", BOOT)
    ram.zero(41 * PAGE, PAGE, BOOT)
    ram.write(50 * PAGE, b"y" * (30 * PAGE), BOOT)

    def frames(*ranges: tuple[int, int]) -> list[int] | None:
        starts, ends = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
        found = ram.touched_frames(starts, ends)
        return None if found is None else found.tolist()

    assert frames((0, 30), (40, 50), (80, 200)) == [29, 40, 99]
    assert frames((30, 31), (90, 99)) == [30]
    assert frames() == frames((42, 50)) == []
    assert frames((0, 51)) is None
    assert frames((0, 3), (60, 61), (90, 99)) is None
    assert frames((79, 80)) is None


def test_reset_is_a_new_machine() -> None:
    """A reset machine is as one never used."""
    ram = Ram(1 << 24)
    ram.write(5, b"x", BOOT)
    ram.snapshot()
    ram.writable(1 << 20, 1 << 20, BOOT)[:] = 1
    ram.reset()
    assert not ram.data.any()
    assert not ram.touched_ranges()
    assert not ram.writers_in(0, 1 << 24)
    with pytest.raises(InputError, match="not active"):
        ram.rollback(1)


# Snapshots


def test_snapshots_nest() -> None:
    """An inner rollback restores the inner state, an outer one the outer, and tokens last."""
    ram = Ram(1 << 24)
    ram.write(0, b"zero", BOOT)
    outer = ram.snapshot()
    ram.write(0, b"one!", SECOND)
    inner = ram.snapshot()
    for _ in range(2):
        ram.write(0, b"two!", BOOT)
        ram.zero(0, 1 << 24, BOOT)
        ram.write(PAGE, b"new", BOOT)
        ram.rollback(inner)
        assert ram.read(0, 4) == b"one!"
        assert ram.last_writer(0) == SECOND
        assert ram.touched_ranges() == [(0, PAGE)]
    ram.rollback(outer)
    assert ram.read(0, 4) == b"zero"
    assert ram.last_writer(0) == BOOT
    with pytest.raises(InputError, match=f"token {inner} is not active"):
        ram.rollback(inner)
    ram.discard(outer)
    with pytest.raises(InputError, match="not active"):
        ram.discard(outer)


def test_discarding_keeps_what_an_older_snapshot_needs() -> None:
    """Forgetting an inner snapshot keeps the writes, and the outer one can still undo them."""
    ram = Ram(1 << 24)
    ram.write(0, b"zero", BOOT)
    outer = ram.snapshot()
    inner = ram.snapshot()
    ram.write(0, b"one!", SECOND)
    ram.writable(1 << 20, 1 << 20, SECOND)[:] = 3
    ram.discard(inner)
    assert ram.read(0, 4) == b"one!"
    ram.rollback(outer)
    assert ram.read(0, 4) == b"zero"
    assert ram.touched_ranges() == [(0, PAGE)]
    assert not ram.view(1 << 20, 1 << 20).any()


def test_snapshot_of_a_terabyte_write_costs_what_was_touched() -> None:
    """Zeroing a TiB with three pages in it under a snapshot saves three pages."""
    ram = Ram(2 * TIB)
    spots = (5 * PAGE, TIB // 2, TIB - PAGE)
    for phys in spots:
        ram.write(phys, b"here", BOOT)
    before = resident_bytes()
    token = ram.snapshot()
    ram.zero(0, TIB, SECOND)
    ram.copy(TIB, 0, TIB, SECOND)
    assert ram.touched_ranges() == []
    ram.rollback(token)
    assert [ram.read(phys, 4) for phys in spots] == [b"here"] * 3
    assert ram.last_writers([5, 6, TIB // 2 // PAGE]) == [BOOT, None, BOOT]
    assert resident_bytes() - before < 4 << 20


@pytest.mark.parametrize("nested", [False, True])
def test_writing_again_saves_nothing_again(nested: bool) -> None:
    """Under a snapshot a page is saved once, however often it and its range are written."""
    ram = Ram(1 << 24)
    ram.writable(0, 3 << 20, BOOT)[:] = 1
    before = resident_bytes()
    token = ram.snapshot()
    for _ in range(40):
        inner = ram.snapshot() if nested else 0
        ram.writable(1 << 20, 2 << 20, SECOND)[:] = 2
        for phys in range(0, 1 << 20, PAGE):
            ram.write_u64(phys, 5, SECOND)
        if nested:
            ram.discard(inner)
    assert resident_bytes() - before < 16 << 20
    ram.rollback(token)
    assert ram.view(0, 3 << 20).min() == ram.view(0, 3 << 20).max() == 1


# Beside the model

FRAMES = 160  # more than the page-by-page limits of every store
SMALL_PAGE = 4096


class ModelRam:
    """All of RAM as one bytearray, one writer and one flag a page; snapshots are copies."""

    def __init__(self) -> None:
        self.data = bytearray(FRAMES * SMALL_PAGE)
        self.writer: list[Writer | None] = [None] * FRAMES
        self.touched = [False] * FRAMES
        self.saved: list[tuple[int, bytes, list[Writer | None], list[bool]]] = []

    def note(self, start: int, end: int, by: Writer) -> None:
        for pfn in range(start // SMALL_PAGE, -(-end // SMALL_PAGE) if end > start else 0):
            self.writer[pfn], self.touched[pfn] = by, True

    def write(self, start: int, data: bytes, by: Writer) -> None:
        self.note(start, start + len(data), by)
        self.data[start : start + len(data)] = data

    def zero(self, start: int, end: int, by: Writer) -> None:
        was = self.touched[:]
        self.note(start, end, by)
        self.data[start:end] = bytes(end - start)
        for pfn in range(FRAMES):
            low, high = pfn * SMALL_PAGE, (pfn + 1) * SMALL_PAGE
            whole = start <= low and high <= end
            if start < high and low < end and (whole or not was[pfn]):
                self.touched[pfn] = False

    def copy(self, start: int, end: int, to: int, by: Writer) -> None:
        was, data = self.touched[:], bytes(self.data[start:end])
        self.note(to, to + end - start, by)
        self.data[to : to + end - start] = data
        for pfn in range(to // SMALL_PAGE, -(-(to + end - start) // SMALL_PAGE) if data else 0):
            low, high = pfn * SMALL_PAGE, (pfn + 1) * SMALL_PAGE
            kept = was[pfn] and not (to <= low and high <= to + end - start)
            low, high = max(low, to) - to + start, min(high, to + end - start) - to + start
            sources = was[low // SMALL_PAGE : -(-high // SMALL_PAGE)]
            self.touched[pfn] = kept or any(sources)

    def restore(self, index: int) -> None:
        del self.saved[index + 1 :]
        _, data, writer, touched = self.saved[index]
        self.data[:], self.writer, self.touched = data, writer[:], touched[:]


writers = st.sampled_from([Writer(g, s) for g in (0, 1) for s in ("memcpy", "memset")])
frames = st.integers(0, FRAMES - 1)
lengths = st.one_of(st.integers(0, 9), st.integers(0, 5), st.integers(0, FRAMES)).map(int)
offsets = st.sampled_from([0, 0, 0, 1, 100, SMALL_PAGE - 1])
ranges = st.tuples(frames, lengths, offsets, offsets).map(
    lambda r: (
        min(r[0] * SMALL_PAGE + r[2], FRAMES * SMALL_PAGE),
        min(r[0] * SMALL_PAGE + r[2] + r[1] * SMALL_PAGE + r[3], FRAMES * SMALL_PAGE),
    )
)
operations = st.one_of(
    st.tuples(st.just("write"), ranges, writers, st.integers(1, 255)),
    st.tuples(st.just("number"), frames, writers, st.integers(1, 511)),
    st.tuples(st.just("zero"), ranges, writers, st.just(0)),
    st.tuples(st.just("copy"), ranges, writers, st.integers(0, FRAMES * SMALL_PAGE)),
    st.tuples(st.just("bulk"), st.lists(frames, max_size=40), writers, st.integers(1, 255)),
    st.tuples(st.just("bulk run"), ranges, writers, st.integers(1, 255)),
    st.tuples(st.sampled_from(["snapshot", "rollback", "discard"]), frames, writers, st.just(0)),
)


def apply_both(ram: Ram, model: ModelRam, operation: tuple[str, Any, Writer, int]) -> None:
    """One step on either; what is random about it was decided before."""
    name, where, by, number = operation
    if name in ("write", "zero", "copy"):
        start, end = where
        if name == "write":
            data = bytes([number]) * (end - start)
            ram.write(start, data, by)
            model.write(start, data, by)
        elif name == "zero":
            ram.zero(start, end - start, by)
            model.zero(start, end, by)
        else:
            to = min(number, FRAMES * SMALL_PAGE - (end - start))
            ram.copy(start, to, end - start, by)
            model.copy(start, end, to, by)
    elif name == "number":
        ram.write_u64(where * SMALL_PAGE + number * 8, number << 40, by)
        model.write(where * SMALL_PAGE + number * 8, (number << 40).to_bytes(8, "little"), by)
    elif name.startswith("bulk"):
        pfns = where
        if name == "bulk run":
            pfns = list(range(where[0] // SMALL_PAGE, where[1] // SMALL_PAGE))
        ram.note_writes(pfns, by)
        for pfn in pfns:
            ram.data[pfn * SMALL_PAGE : (pfn + 1) * SMALL_PAGE] = number
            model.write(pfn * SMALL_PAGE, bytes([number]) * SMALL_PAGE, by)
    elif name == "snapshot":
        model.saved.append((ram.snapshot(), bytes(model.data), model.writer[:], model.touched[:]))
    elif model.saved:
        index = where % len(model.saved)
        if name == "rollback":
            ram.rollback(model.saved[index][0])
            model.restore(index)
        else:
            ram.discard(model.saved.pop(index)[0])


@settings(derandomize=True, deadline=None, max_examples=250)
@given(st.lists(operations, min_size=1, max_size=25))
def test_ram_equals_its_model(steps: list[tuple[str, Any, Writer, int]]) -> None:
    """Any sequence of writes, copies and snapshots leaves bytes, writers and touched right."""
    ram, model = Ram(FRAMES * SMALL_PAGE), ModelRam()
    for step in steps:
        apply_both(ram, model, step)
    assert ram.read(0, FRAMES * SMALL_PAGE) == bytes(model.data)
    assert ram.last_writers(range(FRAMES)) == model.writer
    touched = np.zeros(FRAMES, dtype=bool)
    edges: list[int] = []
    for start, end in ram.touched_ranges():
        touched[start // SMALL_PAGE : end // SMALL_PAGE] = True
        edges += [start, end]
    assert touched.tolist() == model.touched
    assert edges == sorted(set(edges))
    low, high = [1, FRAMES // 2], [FRAMES // 3, FRAMES - 1]
    asked = [*range(low[0], high[0]), *range(low[1], high[1])]
    some = ram.touched_frames(np.array(low), np.array(high))
    assert some is None or some.tolist() == [pfn for pfn in asked if model.touched[pfn]]
    listed: list[Writer | None] = [None] * FRAMES
    for start, end, by in ram.writers_in(0, FRAMES * SMALL_PAGE):
        listed[start // SMALL_PAGE : end // SMALL_PAGE] = [by] * ((end - start) // SMALL_PAGE)
    assert listed == model.writer


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12), st.integers(0, 2)), max_size=15),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_run_map_equals_a_list(assigned: list[tuple[int, int, int]], first: int, end: int) -> None:
    """The map of runs answers as an array of one value a frame does, and keeps runs joined."""
    runs: RunMap[int] = RunMap()
    model: list[int | None] = [None] * 50
    states = []
    for start, length, value in assigned:
        states.append((runs.share(), model[:]))
        runs.assign(start, start + length, value)
        model[start : start + length] = [value] * length
    states.append((runs.share(), model))
    for state, expected in states:
        runs.restore(state)
        found = [runs.values[i] if (i := runs.find(pfn)) >= 0 else None for pfn in range(50)]
        assert found == expected
        for i in range(1, len(runs.starts)):
            assert (runs.ends[i - 1], runs.values[i - 1]) != (runs.starts[i], runs.values[i])
    gaps = [pfn for low, high in runs.gaps(first, end) for pfn in range(low, high)]
    assert gaps == [pfn for pfn in range(first, end) if model[pfn] is None]
