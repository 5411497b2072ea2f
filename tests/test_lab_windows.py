"""khosim's kernel between the memory of a real one: where it may be, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khosim.capture.folder import Capture
from khosim.checks.preserved import expand
from khosim.checks.reader import PageImage
from khosim.errors import InputError, KhoSimError
from khosim.inspect.memory import Memory, inspect_memory
from khosim.lab.belongings import csum_partial
from khosim.lab.guest_ram import RecordingReader
from khosim.lab.predecessor import DEFAULT_REGION, Handed, Predecessor
from khosim.lab.reach import read_the_rest
from khosim.lab.windows import carve, memmap_options, windows_of
from khosim.machine.memory_map import RAM, MemoryMap

GOLDEN = Path(__file__).parent / "golden" / "captures"
MIB = 1 << 20
FDT_PHYS = 0x4A6000


@given(st.lists(st.integers(16, 9000), min_size=1, max_size=4))
def test_windows_lie_inside_their_nodes(mebibytes: list[int]) -> None:
    """At most a quarter of a node, in its upper half, in whole blocks of the buddy allocator."""
    sizes = [size * MIB for size in mebibytes]
    if max(sizes) < 128 * MIB:
        with pytest.raises(InputError, match="no room for khosim's kernel"):
            windows_of(sizes)
        return
    if not any(size >= 512 * MIB for size in sizes):
        return  # what is left of a node around the hole below 4 GiB may be too small
    ends = np.cumsum(sizes)
    for start, end in windows_of(sizes):
        assert start % (4 * MIB) == end % (4 * MIB) == 0
        assert 32 * MIB <= end - start <= 256 * MIB
        offsets = [phys if phys < 3 << 30 else phys - (1 << 30) for phys in (start, end - 1)]
        assert not 3 << 30 <= start < 4 << 30
        nodes = np.searchsorted(ends, offsets, side="right").tolist()
        assert nodes[0] == nodes[1] < len(sizes)
        assert end - start <= sizes[nodes[0]] // 4


def test_windows_of_one_gibibyte() -> None:
    """They are told to the kernel as its memmap parameter takes them."""
    windows = windows_of([1 << 30])
    assert windows == [(512 * MIB, 768 * MIB)]
    assert memmap_options(windows) == "memmap=256M$0x20000000"


RANGES = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=4)


@given(RANGES)
def test_carving_keeps_what_is_to_be_kept(ranges: list[tuple[int, int]]) -> None:
    """Page by page: RAM is what was RAM and is kept; what was known otherwise is as it was."""
    memory_map = MemoryMap.from_size("16M")
    keep = [(2 * MIB, 14 * MIB)]  # a machine has some memory
    past = 0
    for start, length in sorted(ranges):
        low = max(start, past)
        if low < start + length:
            keep.append((low * 4096, (start + length) * 4096))
            past = start + length
    carved = carve(memory_map, keep)
    for page in range(360):
        phys = page * 4096
        was = any(a <= phys < b for a, b, kind in memory_map.entries if kind == RAM)
        wanted = was and any(low <= phys < high for low, high in keep)
        is_ram = any(a <= phys < b for a, b, kind in carved.entries if kind == RAM)
        assert is_ram == wanted
        known = any(a <= phys < b for a, b, _ in memory_map.entries)
        assert known == any(a <= phys < b for a, b, _ in carved.entries)


def test_the_checksum_of_the_kernel() -> None:
    """Sums with the carry added back, as the internet checksum before it is folded."""
    assert csum_partial(b"\x01\0\0\0\x02\0\0\0") == 3
    assert csum_partial(b"\xff\xff\xff\xff\x01\0\0\0") == 1
    assert csum_partial(b"") == 0
    data = np.random.default_rng(1).bytes(40_000)
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    assert csum_partial(data) % 0xFFFFFFFF == sum(words) % 0xFFFFFFFF


class Guest:
    """A guest's memory that only knows what was written to it."""

    def __init__(self) -> None:
        self.pages: dict[int, bytes] = {}

    def write(self, phys: int, data: bytes) -> None:
        """Keep whole pages."""
        assert phys % 4096 == len(data) % 4096 == 0
        for at in range(0, len(data), 4096):
            self.pages[(phys + at) >> 12] = data[at : at + 4096]


class Pages(PageImage):
    """Loose pages in which nothing can be searched for."""

    def pages_with(self, magic: bytes) -> list[int]:
        """Nothing."""
        return []


@pytest.fixture(scope="module")
def handed() -> tuple[Predecessor, Guest, Handed]:
    """What khosim's kernel puts into a guest like the golden machine of 1 GiB."""
    predecessor = Predecessor((1 << 30,), "kho=on reserve_mem=2M:4096:oops reserve_mem=64K:64K:b")
    guest = Guest()
    log = Capture(GOLDEN / "uma1g").generation(0).dmesg
    done = predecessor.hand_over(guest, log, "7.3.4", FDT_PHYS)  # type: ignore[arg-type]
    return predecessor, guest, done


def test_only_windows_and_the_root_fdt_are_written(
    handed: tuple[Predecessor, Guest, Handed],
) -> None:
    """Nothing of the real kernel, its scratch least of all, is touched."""
    predecessor, guest, _ = handed
    outside = [
        pfn
        for pfn in guest.pages
        if not any(low <= pfn << 12 < high for low, high in predecessor.windows)
    ]
    assert outside == [FDT_PHYS >> 12]


def test_the_guest_then_holds_a_sound_handover(
    handed: tuple[Predecessor, Guest, Handed],
) -> None:
    """The checkers read it from the written pages alone, and find all that was left in it."""
    _, guest, done = handed
    reader = RecordingReader(Pages(guest.pages, 4096))  # type: ignore[arg-type]
    report = inspect_memory(Memory("guest", "guest", reader, 4096), fdt_phys=FDT_PHYS)
    assert report.damage == []
    handover = report.handover
    assert expand(handover.preserved) == done.blocks
    assert (FDT_PHYS, 0) in done.blocks
    assert set(handover.subtrees) == {"LUO", "kexec-metadata", "kho_test", "memblock"}
    assert handover.kexec_metadata is not None
    assert handover.kexec_metadata.previous_release == done.uname == "7.3-khosim"
    assert set(handover.reserve_mem) == {"oops", "b"}
    for name, (start, content) in done.belongings.regions.items():
        assert handover.reserve_mem[name] == (start, len(content))
        first = start >> 12
        assert guest.pages[first] == content[:4096]
        assert guest.pages[first + len(content) // 4096 - 1] == content[-4096:]
    assert report.luo is not None
    sizes = {
        (session.name, file.token): file.memfd.size
        for session in report.luo.sessions
        for file in session.files
        if file.memfd is not None
    }
    assert sizes == {key: len(file.content) for key, file in done.belongings.files.items()}
    assert len(sizes) == 5


def test_the_test_modules_list_is_reached(
    handed: tuple[Predecessor, Guest, Handed],
) -> None:
    """Its chunk and the page with the folios' addresses are read, and no more."""
    _, guest, done = handed
    inner: Any = Pages(guest.pages, 4096)
    report = inspect_memory(Memory("guest", "guest", inner, 4096), fdt_phys=FDT_PHYS)
    reader = RecordingReader(inner)
    read_the_rest(report.handover, reader)
    blob = report.handover.subtrees["kho_test"].start >> 12
    chunk, listed = sorted(
        reader.pfns - {blob}, key=lambda pfn: guest.pages[pfn][16:24] != bytes(8)
    )
    assert int.from_bytes(guest.pages[chunk][8:16], "little") == listed << 12
    words = [int.from_bytes(guest.pages[listed][at : at + 8], "little") for at in range(0, 112, 8)]
    assert {(word & -4096, word & 4095) for word in words} <= set(done.blocks)
    assert len(reader.pfns) == 3


def test_every_order_is_preserved(handed: tuple[Predecessor, Guest, Handed]) -> None:
    """The real kernel gets blocks of each size that its own allocator has."""
    orders = {order for _, order in handed[2].blocks}
    assert orders == set(range(11))


def test_the_same_again(handed: tuple[Predecessor, Guest, Handed]) -> None:
    """A second run writes the same bytes."""
    predecessor, guest, _ = handed
    again = Guest()
    log = Capture(GOLDEN / "uma1g").generation(0).dmesg
    predecessor.hand_over(again, log, "7.3.4", FDT_PHYS)  # type: ignore[arg-type]
    assert again.pages == guest.pages


def test_a_region_for_those_who_name_none() -> None:
    """Real successor and khosim's kernel both get one, so that there is something to revive."""
    predecessor = Predecessor((1 << 30,), "kho=on")
    assert predecessor.cmdline == f"kho=on {DEFAULT_REGION}"
    assert predecessor.first_cmdline == f"kho=on {DEFAULT_REGION} memmap=256M$0x20000000"


def test_a_release_that_khosim_does_not_have() -> None:
    """The real kernel's release is named."""
    predecessor = Predecessor((1 << 30,), "kho=on")
    log = Capture(GOLDEN / "uma1g").generation(0).dmesg
    with pytest.raises(InputError, match=r"--predecessor: .* no release like '9.9.1'"):
        predecessor.hand_over(Guest(), log, "9.9.1", FDT_PHYS)  # type: ignore[arg-type]


def test_a_root_fdt_where_no_page_can_be(handed: tuple[Predecessor, Guest, Handed]) -> None:
    """A root FDT in khosim's own kernel image cannot be had, and nothing is written then."""
    guest = Guest()
    log = Capture(GOLDEN / "uma1g").generation(0).dmesg
    with pytest.raises(KhoSimError):
        handed[0].hand_over(guest, log, "7.3.4", 16 << 20)  # type: ignore[arg-type]
    assert guest.pages == {}
