"""vmalloc areas across releases: since 6.18, with the bugs that 6.18 had and those it lost."""

from __future__ import annotations

import pytest

from khosim import KernelError, KhoSimError, Machine
from khosim.abi.kho_vmalloc import pack_kho_vmalloc
from khosim.kernel.kho_vmalloc import (
    KhoVmallocSlot,
    kho_preserve_vmalloc,
    kho_restore_vmalloc,
    kho_unpreserve_vmalloc,
)
from khosim.kernel.release import find_release
from khosim.kernel.vmalloc import vmalloc

SINCE_6_18 = ["6.18", "6.19", "7.0", "7.1", "7.2", "7.3"]



def vmalloc_over(release, nr_pages, *, huge=False):
    """A kernel, an area with a number on each page, and its descriptor."""
    kernel = Machine("256M", checks=False).boot(release, cmdline="kho=on")
    area = vmalloc(kernel, nr_pages << 12, huge=huge)
    for page in range(nr_pages):
        area.write(page << 12, page.to_bytes(4, "little"), by="test")
    slot = KhoVmallocSlot(kernel)
    kho_preserve_vmalloc(kernel, area, slot)
    return kernel, area, slot


def handed(kernel, slot):
    """The successor, and the same descriptor there."""
    successor = kernel.kexec()
    return successor, KhoVmallocSlot(successor, stack=pack_kho_vmalloc(slot.load()))


@pytest.mark.parametrize("release", SINCE_6_18)
def test_vmalloc_areas_cross(release):
    """Since 6.18; the contents of every page, also beyond one chunk."""
    kernel, _, slot = vmalloc_over(release, 600)
    successor, slot = handed(kernel, slot)
    area = kho_restore_vmalloc(successor, slot)
    for page in (0, 511, 512, 599):
        assert area.read(page << 12, 4) == page.to_bytes(4, "little")


def test_no_vmalloc_before_6_18():
    """6.17 has no such call."""
    with pytest.raises(KhoSimError, match=r"Linux 6\.17 has no kho_preserve_vmalloc"):
        vmalloc_over("6.17", 1)


@pytest.mark.parametrize(("release", "second"), [("6.18", 0), ("6.19", 1)])
def test_pages_of_huge_blocks(release, second):
    """4bc84cd539df: 6.18 maps the first page of a block over and over."""
    kernel, _, slot = vmalloc_over(release, 512, huge=True)
    assert slot.load().order == 9
    successor, slot = handed(kernel, slot)
    area = kho_restore_vmalloc(successor, slot)
    assert area.read(4096, 4) == second.to_bytes(4, "little")


def test_unpreserving_huge_blocks():
    """7ecd2e439d12: with the bug only single pages are forgotten, and the block travels on."""
    for fixed in (True, False):
        release = find_release("7.0").evolve(vmalloc_unpreserves_blocks=fixed)
        kernel, _, slot = vmalloc_over(release, 512, huge=True)
        kho_unpreserve_vmalloc(kernel, slot)
        orders = {order for _, order, _ in kernel.kho_out.tree.marked()}
        assert (9 in orders) is not fixed


@pytest.mark.parametrize(("release", "told"), [("6.18", False), ("6.19", True)])
def test_no_memory_for_another_chunk(release, told):
    """412a32f0e53f: 6.18 says that all went well, and has forgotten the pages."""
    kernel = Machine("256M", checks=False).boot(release, cmdline="kho=on")
    area = vmalloc(kernel, 600 << 12)
    answers = iter([False, True])
    kernel.pages.fail = lambda order, symbol: symbol == "new_vmalloc_chunk" and next(answers)
    slot = KhoVmallocSlot(kernel)
    if told:
        with pytest.raises(KernelError, match="-ENOMEM"):
            kho_preserve_vmalloc(kernel, area, slot)
    else:
        kho_preserve_vmalloc(kernel, area, slot)
    phys = area.vmalloc_to_pfn(5) << 12
    marked = kernel.kho_out.tree.marked()
    assert not any(start <= phys < start + (n << order + 12) for start, order, n in marked)


def test_a_full_chunk_that_is_read_on():
    """Without the bound the words behind a full chunk are taken for pages, up to a zero."""
    kernel, _, slot = vmalloc_over("6.19+vmalloc_chunk_bounded=off", 511)
    first = slot.load().first
    kernel.ram.write(first + 4096, (0x5000).to_bytes(8, "little") + bytes(8), (0, "somebody"))
    kernel.kho_preserve_pages(5, 1)
    kho_unpreserve_vmalloc(kernel, slot)
    kept = {phys for phys, order, _ in kernel.kho_out.tree.marked() if not order}
    assert 0x5000 not in kept
    assert first not in kept
