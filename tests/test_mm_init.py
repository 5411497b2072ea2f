"""Zones, deferred initialisation and zone lists, beside the kernel's own page-by-page steps."""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim.kernel.arch import Arch, find_arch
from khosim.kernel.page_alloc import PageAllocator
from khosim.kernel.page_map import PageMap
from khosim.kernel.pageblock import CMA, MOVABLE

GOLDEN = Path(__file__).parent / "golden" / "captures"
X86 = find_arch("x86_64", 4096)
SMALL = dataclasses.replace(
    X86,
    max_page_order=3,
    pageblock_order=2,
    section_bytes=16 << 12,
    zone_ends_phys=(("DMA32", 64 << 12),),
)
Ranges = list[tuple[int, int, int]]


def laid_out(ranges: Ranges, arch: Arch = SMALL) -> PageAllocator:
    pages = PageAllocator(arch, PageMap())
    pages.free_area_init(iter(ranges))
    return pages


@st.composite
def machines(draw: st.DrawFn) -> Ranges:
    """Ascending memory with holes, on up to three nodes, in any order of nodes."""
    cuts = sorted(draw(st.sets(st.integers(0, 160), min_size=2, max_size=12)))
    ranges = []
    for start, end in pairwise(cuts):
        nid = draw(st.sampled_from([None, 0, 0, 1, 3]))
        if nid is not None:
            ranges.append((start, end, nid))
    return ranges


@settings(max_examples=200)
@given(machines())
def test_zones_hold_each_page_once(ranges: Ranges) -> None:
    """By node, then by address; spans go from the first page to the last."""
    pages = laid_out(ranges)
    plain = {}
    for start, end, nid in ranges:
        for pfn in range(start, end):
            plain[pfn] = (nid, "DMA32" if pfn < 64 else "Normal")
    for pfn in range(-1, 170):
        zone = pages.zone_of(pfn)
        assert plain.get(pfn) == (None if zone is None else (zone.nid, zone.name))
    names = [(zone.nid, zone.name) for zone in pages.zones]
    assert names == sorted(set(plain.values()))
    for zone in pages.zones:
        own = [pfn for pfn, name in plain.items() if name == (zone.nid, zone.name)]
        assert (zone.start_pfn, zone.end_pfn) == (min(own), max(own) + 1)
    for start, end in ((0, 170), (7, 8), (30, 100), (50, 50), (90, 20)):
        pieces = pages.pieces_in(start, end)
        covered = [pfn for low, high, _ in pieces for pfn in range(low, high)]
        assert covered == [pfn for pfn in sorted(plain) if start <= pfn < end]
        assert all(pages.zone_of(low) is zone for low, _, zone in pieces)
        assert all(low < high for low, high, _ in pieces)


def deferred_by_page(ranges: Ranges) -> dict[int, int]:
    """``first_deferred_pfn`` of each node, counting initialised pages as the kernel does."""
    found: dict[int, int] = {}
    for nid in {nid for _, _, nid in ranges}:
        own = [pfn for start, end, node in ranges if node == nid for pfn in range(start, end)]
        last_zone = [pfn for pfn in own if (pfn >= 64) == (max(own) >= 64)]
        for nr_initialised, pfn in enumerate(last_zone, 1):
            if nr_initialised > 16 and pfn % 16 == 0:
                found[nid] = pfn
                break
    return found


@settings(max_examples=200)
@given(machines())
def test_memory_past_a_section_of_the_last_zone_arrives_late(ranges: Ranges) -> None:
    """Early pages are free at once, the others at page_alloc_init_late; all are managed then."""
    pages = laid_out(ranges)
    first_deferred = deferred_by_page(ranges)
    assert pages.first_deferred_pfn == first_deferred
    early = 0
    for start, end, nid in ranges:
        pages.memblock_free_pages(start, end, nid)
        for pfn in range(start, end):
            is_early = pfn < first_deferred.get(nid, 1 << 60)
            assert pages.is_initialised(pfn, nid) == is_early
            early += is_early
    total = sum(end - start for start, end, _ in ranges)
    assert pages.nr_free_pages() == sum(zone.managed_pages for zone in pages.zones) == early
    assert pages.nr_deferred_pages() == total - early
    pages.page_alloc_init_late()
    assert pages.nr_free_pages() == sum(zone.managed_pages for zone in pages.zones) == total
    assert pages.nr_deferred_pages() == 0
    for start, _, nid in ranges:
        assert pages.is_initialised(start, nid)
    at_once = laid_out(ranges)
    at_once.first_deferred_pfn.clear()
    for start, end, nid in ranges:
        at_once.memblock_free_pages(start, end, nid)
    for zone, other in zip(pages.zones, at_once.zones, strict=True):
        lists = [[sorted(free) for free in one.free[MOVABLE]] for one in (zone, other)]
        assert lists[0] == lists[1]
        assert zone.nr_free == other.nr_free


def test_deferral_on_a_real_machine() -> None:
    """One section of 128 MiB is set up early, and what is left of the next."""
    pages = laid_out([(1, 0x9F, 0), (0x100, 0x40000, 0)], X86)
    assert pages.first_deferred_pfn == {0: 0x10000}
    pages = laid_out([(1, 0xA0000, 0), (0xA0000, 0xC0000, 1), (0x100000, 0x140000, 1)], X86)
    assert pages.first_deferred_pfn == {0: 0x10000, 1: 0x108000}
    pages = laid_out([(0x10000, 0x30000, 0)], find_arch("arm64", 16384))
    assert pages.first_deferred_pfn == {0: 0x12000}
    assert laid_out([(1, 0x8000, 0)], X86).first_deferred_pfn == {}


@pytest.mark.parametrize("capture", ["uma1g", "numa4g", "fixed2g", "arm64-16k"])
def test_zones_are_those_of_real_kernels(capture: str) -> None:
    """Name, node, first page, span and present pages, as /proc/zoneinfo had them."""
    text = (GOLDEN / capture / "gen0" / "zoneinfo").read_text()
    real, ranges = [], []
    for nid, name, body in re.findall(r"(?ms)^Node (\d), zone +(\w+)(.*?)(?=^Node|\Z)", text):
        lines = re.findall(r"(?m)(\w+):? +(\d+)$", body)
        number = {key: int(value) for key, value in lines}
        if number["present"]:
            start, spanned = number["start_pfn"], number["spanned"]
            real.append((int(nid), name, start, start + spanned))
            # Zoneinfo does not tell where a hole lies: any place inside makes the same zone.
            hole = spanned - number["present"]
            ranges += [(start, start + 1, int(nid)), (start + 1 + hole, start + spanned, int(nid))]
    arch = find_arch("arm64", 16384) if capture.startswith("arm64") else X86
    zones = laid_out(sorted(ranges), arch).zones
    assert [(zone.nid, zone.name, zone.start_pfn, zone.end_pfn) for zone in zones] == real


def test_zone_lists_begin_at_home_and_at_the_top() -> None:
    """Own node first, then the next higher ones, then the lower; in each the highest zone first."""
    ranges = [(0, 20, 0), (20, 40, 1), (40, 50, 2), (64, 80, 2), (80, 100, 0), (100, 120, 5)]
    pages = laid_out(ranges)

    def names(nid: int | None, this_node: bool) -> list[str]:
        return [f"{zone.nid}{zone.name[0]}" for zone in pages.zonelist(nid, this_node)]

    assert names(None, False) == names(0, False) == ["0N", "0D", "1D", "2N", "2D", "5N"]
    assert names(1, False) == ["1D", "2N", "2D", "5N", "0N", "0D"]
    assert names(2, False) == ["2N", "2D", "5N", "0N", "0D", "1D"]
    assert names(5, False) == ["5N", "0N", "0D", "1D", "2N", "2D"]
    assert names(3, False) == ["5N", "0N", "0D", "1D", "2N", "2D"]
    assert names(2, True) == ["2N", "2D"]
    assert names(3, True) == []
    assert names(None, True) == ["0N", "0D"]


def test_allocations_fall_back_over_nodes_in_that_order() -> None:
    """Each node is used up before the next; this_node stays at home."""
    pages = laid_out([(0, 8, 0), (8, 16, 1), (16, 24, 2)])
    for start, end, nid in [(0, 8, 0), (8, 16, 1), (16, 24, 2)]:
        pages.memblock_free_pages(start, end, nid)
    assert [pages.alloc_pages(3, "user", nid=1) for _ in range(4)] == [8, 16, 0, None]
    pages.free_pages(0, 3)
    assert pages.alloc_pages(0, "user", nid=1, this_node=True) is None
    assert pages.alloc_pages(0, "user", nid=7, this_node=True) is None
    assert pages.alloc_pages(0, "user", nid=7) == 0


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 40)), max_size=4),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 40)), max_size=4),
)
def test_scratch_colours_every_pageblock_it_overlaps(
    before: list[tuple[int, int]], ranges: list[tuple[int, int]]
) -> None:
    """kho_scratch_migratetype: rounded outwards, and only the last call counts."""
    pages = laid_out([(0, 240, 0)])
    pages.set_cma_ranges((start, start + size) for start, size in before)
    pages.set_cma_ranges((start, start + size) for start, size in ranges)
    marked = {pfn >> 2 for start, size in ranges for pfn in range(start, start + size)}
    types = [pages.migratetype_of(pfn) for pfn in range(240)]
    assert types == [CMA if pfn >> 2 in marked else MOVABLE for pfn in range(240)]
    pages.memblock_free_pages(0, 240, 0)
    pages.page_alloc_init_late()
    assert sum(zone.nr_free[CMA] for zone in pages.zones) == 4 * len({b for b in marked if b < 60})
    pages.set_cma_ranges(())
    assert pages.pageblocks.runs(0, 240) == [(0, 240, MOVABLE)]
