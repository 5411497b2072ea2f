"""Memory that early boot sets aside on a handover boot: for devices, for a crash kernel."""

from __future__ import annotations

import pytest

from khosim.explore.catalog import KINDS
from khosim.explore.kinds_boot import successors
from khosim.explore.kit import Stage
from khosim.explore.world import Step, World
from khosim.kernel.pageblock import CMA
from khosim.kernel.vmalloc import VM_MAP_PUT_PAGES, vfree, vmalloc

MIB = 1 << 20
AREA = "cma=4M@4M"


def test_an_area_is_free_for_movable_allocations_alone() -> None:
    """``cma_init_reserved_areas`` frees all of it, as CMA."""
    kernel = Stage("64M").boot(cmdline=f"kho=off {AREA}")
    assert "cma: Reserved 4 MiB at 0x0000000000400000" in kernel.messages
    assert sum(zone.nr_free[CMA] for zone in kernel.pages.zones) == 1024
    assert sum(zone.cma_pages for zone in kernel.pages.zones) == 1024


@pytest.mark.parametrize("where", ["4M", "56M"])
def test_an_area_outside_of_scratch_is_refused_with_the_switch(where: str) -> None:
    """Where something may have been preserved; on a cold boot and without an address it is not."""
    machine = Stage("64M")
    kernel = machine.boot("7.3+fix_cma_fixed=on", cmdline="kho=on")
    areas = kernel.scratch_areas()
    at = int(where[:-1]) * MIB
    assert not any(addr < at + 4 * MIB and at < addr + size for addr, size in areas)
    kernel = kernel.kexec(cmdline=f"kho=on cma=4M@{where}")
    assert "cma: Failed to reserve 4 MiB" in kernel.messages
    kernel = kernel.kexec(cmdline="kho=on cma=4M")
    (found,) = [line for line in kernel.messages if line.startswith("cma: Reserved 4 MiB at ")]
    at = int(found.split()[-1], 16)
    assert any(addr <= at < addr + size for addr, size in areas)
    assert not machine.check()


def test_an_area_in_free_scratch_is_not_refused() -> None:
    """Nothing that has to stay lies there."""
    kernel = Stage("512M").boot("7.3+fix_cma_fixed=on", cmdline="kho=on")
    addr, size = max(kernel.scratch_areas(), key=lambda area: area[1])
    at = addr + size // 2 & -4 * MIB
    kernel = kernel.kexec(cmdline=f"kho=on cma=4M@{at}")
    said = [line for line in kernel.messages if line.startswith("cma: ")]
    assert said == [f"cma: Reserved 4 MiB at 0x{at:016x}"]


def test_the_search_asks_for_areas_that_can_be() -> None:
    """At whole pageblocks, though memory is not a whole number of them; one has the root FDT."""
    world = World(KINDS)
    world.run(Step("boot", ('"64M"', "kho=on", "7.3")))
    places = [line.split("@")[1] for line in successors(world) if "cma=" in line]
    assert places == [str(at * MIB) for at in (4, 8, 16)]
    assert 4 * MIB <= world.kernel.kho_out.fdt_phys < 8 * MIB
    world.close()


@pytest.mark.parametrize("word", ["crashkernel=256M", "crashkernel=64M@1G"])
def test_a_crash_kernel_has_its_memory_late_with_the_switch(word: str) -> None:
    """Anywhere, once all that was preserved is reserved; without it scratch is too small."""
    for release, is_there in (("7.3", False), ("7.3+fix_crash_kernel=on", True)):
        machine = Stage("4G")
        kernel = machine.boot(release, cmdline="kho=on")
        folios = [kernel.alloc_folio(10) for _ in range(8)]
        for folio in folios:
            kernel.kho_preserve_folio(folio)
        kernel = kernel.kexec(cmdline=f"kho=on {word}")
        assert bool(kernel.crashk_res) is is_there
        for folio in folios:
            assert kernel.kho_restore_folio(folio.phys) is not None
        assert not machine.check()


def test_vmalloc_pages_are_counted() -> None:
    """Each area's pages, of whatever order, and of no area that vfree does not count."""
    kernel = Stage("64M").boot(cmdline="kho=on")
    assert kernel.pages.nr_vmalloc == 0
    small, huge = vmalloc(kernel, 3 * 4096), vmalloc(kernel, 2 * MIB, huge=True)
    assert small is not None
    assert huge is not None
    assert kernel.pages.nr_vmalloc == 3 + 512
    vfree(kernel, huge)
    assert kernel.pages.nr_vmalloc == 3
    small.flags |= VM_MAP_PUT_PAGES
    vfree(kernel, small)
    assert kernel.pages.nr_vmalloc == 3
    assert vmalloc(kernel, 60 * MIB) is None
    assert kernel.pages.nr_vmalloc == 3
