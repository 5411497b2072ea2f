"""Corners of taking a handover over that only changed code shows: each was once untested."""

from __future__ import annotations

from random import Random

import pytest

from khosim import Machine
from khosim.explore.hazards import fixed
from khosim.kernel.kernel import Kernel
from khosim.kernel.kho_radix_key import kho_encode_radix_key
from khosim.kernel.kho_reserve import reserve_blocks
from khosim.kernel.page_map import INCOMING
from khosim.kernel.release import Release

BASE = 0x2000
"""A page frame in free memory."""


def booted(release: str | Release = "7.3", cmdline: str = "kho=on") -> Kernel:
    """The first kernel of a small machine."""
    return Machine("64M").boot(release=release, cmdline=cmdline, kernel_size="4M", initrd="1M")


def preserving(release: str | Release = "7.3") -> Kernel:
    """A kernel that hands a folio over."""
    kernel = booted(release)
    kernel.kho_preserve_folio(kernel.alloc_folio(2))
    return kernel


@pytest.mark.parametrize("release", ["6.16", "7.0", "7.1"])
def test_blocks_over_blocks_are_what_was_written_last(release: str) -> None:
    """Whatever a misread map holds: a head says what was last written to it, all else nothing."""
    kernel = booted(release)
    magic, page_map = kernel.kho_page_magic << 32, kernel.pages.pages
    random = Random(release)
    for _ in range(150):
        page_map.clear(BASE - 64, BASE + 192)
        is_aligned = random.random() < 0.5
        runs, written, covered = [], {}, set()
        for _ in range(random.randint(1, 4)):
            order = random.randint(0, 4)
            pfn = BASE + random.randrange(64) & -(1 << order if is_aligned else 1)
            nr_blocks = random.randint(1, 3)
            runs.append((pfn << 12, order, nr_blocks))
            heads = [pfn + (n << order) for n in range(nr_blocks)]
            written.update(dict.fromkeys(heads, magic | order))
            covered.update(range(pfn, pfn + (nr_blocks << order)))
        reserve_blocks(kernel, runs, "deserialize_bitmap")
        window = range(BASE - 64, BASE + 192)
        said = {pfn: page_map.page_private(pfn, kernel.kho_page_magic) for pfn in window}
        assert said == {pfn: written.get(pfn, 0) for pfn in window}
        states = [(pfn, page_map.state(pfn)) for pfn in window]
        assert {p for p, state in states if state and state.kind == INCOMING} == covered
        assert all(kernel.memblock.memblock_is_reserved(pfn << 12) for pfn in covered)


def test_a_block_of_2_gib_reserves_all_above() -> None:
    """Its size is an int that is negative, until 7.2."""
    kernel = booted("7.1")
    reserve_blocks(kernel, [(BASE << 12, 19, 1)], "kho_preserved_memory_reserve")
    memblock = kernel.memblock
    assert memblock.memblock_is_region_reserved((BASE << 12) + (1 << 40), 1)
    assert memblock.reserved.end[-1] == (1 << 64) - 1 - (1 << 31) + (BASE << 12) + 1


def test_blocks_of_a_map_that_overlap() -> None:
    """The smaller one comes later and wins where it lies; the rest of the larger is lost to it."""
    kernel = booted()
    pfn = kernel.alloc_folio(5).phys >> 12
    for at, order in ((pfn, 4), (pfn + 2, 1), (pfn + 9, 0)):
        assert kernel.kho_out.tree.add_key(kho_encode_radix_key(at << 12, order, 12)) == 0
    kernel = kernel.kexec()
    orders = [
        (run.start_pfn, run.end_pfn, run.state.order)
        for run in kernel.pages.pages.overlapping(pfn, pfn + 16)
    ]
    assert orders == [
        (pfn, pfn + 2, 4), (pfn + 2, pfn + 4, 1), (pfn + 4, pfn + 9, 4),
        (pfn + 9, pfn + 10, 0), (pfn + 10, pfn + 16, 4),
    ]  # fmt: skip
    assert kernel.kho_restore_folio((pfn + 9) << 12) is not None
    assert kernel.kho_restore_folio((pfn + 2) << 12) is not None
    assert kernel.kho_restore_folio((pfn + 4) << 12) is None


def test_a_trace_tells_each_step_of_taking_over() -> None:
    """Who listens hears of finding, opening, reserving, the initcall and restoring, in order."""
    machine = Machine("64M")
    heard: list[tuple[str, object]] = []
    kernel = machine.boot(cmdline="kho=on", kernel_size="4M", initrd="1M")
    folio = kernel.alloc_folio(2)
    kernel.kho_preserve_folio(folio)
    machine.listeners.append(lambda event: heard.append((event.symbol, event.result)))
    kernel = kernel.kexec()
    kernel.kho_restore_folio(folio.phys)
    wanted = {
        "kho_populate": True,
        "kho_memory_init_early": None,
        "kho_memory_init": True,
        "kho_init": 0,
        "kho_restore_folio": folio.phys >> 12,
    }
    assert [(symbol, result) for symbol, result in heard if symbol in wanted] == [*wanted.items()]


@pytest.mark.parametrize("release", ["6.16", "6.18", "6.19", "7.0"])
def test_the_root_fdt_is_one_page_and_restored_where_it_was(release: str) -> None:
    """Up to 6.18 the page of the predecessor's root FDT is in use from the start."""
    kernel = preserving(release)
    fdt = kernel.kho_out.fdt_phys >> 12
    state = kernel.pages.pages.state(fdt)
    assert state is not None
    assert state.order == 0
    kernel = kernel.kexec()
    assert ((fdt, 0) in kernel.kho_in.restored) == kernel.release.restores_root_fdt
    assert kernel.release.restores_root_fdt == (release in ("6.16", "6.18"))


def test_a_restored_head_forgets_its_order_where_it_is_cleared() -> None:
    """page->private is 0 again since 6.18; before, the order stays in it."""
    for is_cleared, left in ((True, 0), (False, 2)):
        kernel = booted(fixed("7.3").evolve(restore_clears_private=is_cleared))
        pfn = kernel.alloc_pages_exact(4)
        kernel.kho_preserve_pages(pfn, 4)
        kernel = kernel.kexec()
        assert kernel.kho_restore_pages(pfn << 12, 4) is not None
        assert kernel.pages.pages.private.get(pfn, 0) == left


def test_pages_without_references_of_their_own() -> None:
    """Where restoring leaves the counts of a block alone, each page still comes back with one."""
    kernel = booted(fixed("7.3").evolve(restore_inits_refcounts=False))
    pfn = kernel.alloc_pages_exact(4)
    kernel.kho_preserve_pages(pfn, 4)
    kernel = kernel.kexec()
    assert kernel.kho_restore_pages(pfn << 12, 4) is not None
    assert [kernel.page(pfn + n).refcount for n in range(4)] == [1] * 4


def test_pages_that_come_back_compound_have_a_reference_each() -> None:
    """In 6.18 alone split_page gives each page one and leaves them a compound page."""
    kernel = booted("6.18")
    pfn = kernel.alloc_pages_exact(4)
    kernel.kho_preserve_pages(pfn, 4)
    kernel = kernel.kexec()
    assert kernel.kho_restore_pages(pfn << 12, 4) is not None
    assert [kernel.page(pfn + n).refcount for n in range(4)] == [1] * 4


@pytest.mark.parametrize(("release", "is_shown"), [("7.3", False), (fixed("7.3"), True)])
def test_a_successor_shows_its_own_fdt(release: str | Release, is_shown: bool) -> None:
    """Only with the fix is there an out/fdt on a KHO boot."""
    kernel = preserving(release)
    assert "out/fdt" in kernel.debugfs.files()
    assert ("out/fdt" in kernel.kexec().debugfs.files()) == is_shown


@pytest.mark.parametrize("is_on", [True, False])
def test_who_ran_before_is_told_by_a_cold_boot(is_on: bool) -> None:
    """The first kernel always leaves a record; later ones where the release says so."""
    release = fixed("7.3").evolve(kexec_metadata_on_kho_boot=is_on)
    kernel = preserving(release).kexec()
    assert kernel.kho_in.kexec_count == 1
    assert kernel.kexec().kho_in.kexec_count == (2 if is_on else 0)


@pytest.mark.parametrize("release", ["7.3", fixed("7.3")])
def test_a_kdump_kernel_without_a_handover_has_no_kho(release: str | Release) -> None:
    """The fix is for successors alone."""
    kernel = booted(release, "kho=on elfcorehdr=0x1000000")
    assert "KHO: disabled in the kdump kernel" in kernel.messages
    assert not kernel.kho_enable
