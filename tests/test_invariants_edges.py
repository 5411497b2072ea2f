"""Corners of the checkers that only a changed checker shows: each was once untested."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from khosim import Machine
from khosim.checks.decode import Handover, decode_handover
from khosim.checks.decode_root import Region
from khosim.checks.preserved import Preserved
from khosim.checks.unpreserved import unpreserved
from khosim.kernel.page_map import PageState
from khosim.machine.memory_map import MemoryMap
from khosim.machine.memory_map import Region as MemoryRegion

PAGE = 4096


@pytest.mark.parametrize("release", ["6.18", "7.3"])
def test_two_keys_and_a_root_fdt_that_was_taken_back(release: str) -> None:
    """With overlapping blocks pages are compared, those taken back at once (6.18) among them."""
    machine = Machine("64M")
    kernel = machine.boot(cmdline="kho=on", release=release)
    folio = kernel.alloc_folio(2)
    kernel.kho_preserve_folio(folio)
    kernel.kho_preserve_pages(folio.pfn + 3, 1)
    successor = kernel.kexec()
    assert bool(successor.kho_in.restored) == (release == "6.18")
    assert {found.invariant for found in machine.check()} == {"one-key-per-frame"}


def test_a_page_on_a_list_of_largest_blocks() -> None:
    """A page that is held and in a run of free blocks of the largest order: both are named."""
    machine = Machine("64M")
    kernel = machine.boot(cmdline="kho=on")
    zone, start, nr_blocks = next(
        (zone, start, nr_blocks)
        for zone in kernel.pages.zones
        for runs in zone.max_runs
        for start, nr_blocks in runs
    )
    pfn = start + (nr_blocks << zone.max_order) - 1
    kernel.pages.pages.set(pfn, pfn + 1, PageState("allocated", 0, False, "squatter"))
    (found,) = machine.check()
    assert found.invariant == "one-owner-per-page"
    assert f"the free list of order {zone.max_order} in zone {zone.name}" in str(found)
    assert "squatter (allocated)" in str(found)


@pytest.mark.parametrize(
    ("region", "is_missed"),
    [
        (Region(0x800000, 0), False),
        (Region(0x800000, 100), False),
        (Region((1 << 63) - PAGE, PAGE), False),
        (Region(0x800000, PAGE), True),
    ],
)
def test_regions_without_pages_are_not_missed(region: Region, is_missed: bool) -> None:
    """Of a region less than a page long nothing is preserved; one beyond all memory is no claim."""
    one = np.array([1], dtype=np.int64)
    preserved = Preserved(PAGE, one * 4, one * 0x100, one, (), ())
    handover = _handover(preserved, region)
    paths = [problem.path for problem in unpreserved(handover, None)]
    assert paths == (["/memblock/oops"] if is_missed else [])


def _handover(preserved: Preserved, region: Region) -> Handover:
    machine = Machine("64M")
    kernel = machine.boot(cmdline="kho=on")
    found = decode_handover(machine.hardware.ram, kernel.kho_out.fdt_phys, PAGE)
    return replace(
        found, fdt_phys=0x100000, map_phys=PAGE, preserved=preserved, subtrees={},
        reserve_mem={"oops": region},
    )  # fmt: skip


def test_memory_told_in_pieces() -> None:
    """RAM that firmware tells of in three neighbouring pieces is one range, with no page lost."""
    whole = Machine("64M").hardware.memory_map
    ram = max(whole.entries, key=lambda entry: (entry.type == "System RAM", entry.end))
    cuts = [ram.start, 10 << 20, 30 << 20, ram.end]
    pieces = [MemoryRegion(low, high, ram.type) for low, high in pairwise(cuts)]
    entries = sorted([*(e for e in whole.entries if e != ram), *pieces])
    machine = Machine(memory_map=MemoryMap(tuple(entries)))
    machine.boot(cmdline="kho=on").kexec()
    assert machine.check() == []
