"""One behaviour of a release after the other, each with the release before and after."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from khosim import KernelError, KernelPanic, Machine
from khosim.kernel.image import KernelConfig
from khosim.kernel.kho_chunks import KhoChunks
from khosim.kernel.kho_radix import KhoRadixTree
from khosim.kernel.kho_scratch import ScratchSizes
from khosim.kernel.kho_tracker import make_tracker, radix_depth
from khosim.kernel.release import find_release

GIB, MIB = 1 << 30, 1 << 20


@pytest.mark.parametrize(
    ("text", "in_6_17", "in_6_18"),
    [
        ("8M,8M,8M", 0, 0),
        ("8M,0,8M", -errno.EINVAL, 0),
        ("0,0,0", -errno.EINVAL, -errno.EINVAL),
        ("8M,8M,8Mfoo", 0, -errno.EINVAL),
        ("8M,8M", -errno.EINVAL, -errno.EINVAL),
        ("150%", 0, 0),
    ],
)
def test_the_scratch_argument(text, in_6_17, in_6_18):
    """6.18 takes zeros, and wants nothing behind the three sizes."""
    for release, expected in (("6.17", in_6_17), ("6.18", in_6_18)):
        assert ScratchSizes().parse(text, lambda _: None, find_release(release)) == expected


@pytest.mark.parametrize(
    ("release", "is_on", "told"),
    [("6.16", False, 0), ("6.17", False, 1), ("6.18", False, 1), ("6.19", True, 0)],
)
def test_a_node_without_memory(release, is_on, told):
    """427b2535f513 in 6.19; before, no scratch can be had and KHO goes off, in 6.16 silently."""
    machine = Machine("512M", nodes=2, memoryless=(2,))
    kernel = machine.boot(release, cmdline="kho=on")
    assert kernel.kho_enable is is_on
    messages = [line for line in kernel.messages if "Failed to reserve scratch" in line]
    assert len(messages) == told


@pytest.mark.parametrize(("release", "spoke"), [("7.1", True), ("7.2", False)])
def test_explicit_sizes_that_are_no_pageblocks(release, spoke):
    """0e39380a7316: the pageblock behind the end of an area is freed with it, whosever it is."""
    machine = Machine("256M")
    kernel = machine.boot(release, cmdline="kho=on kho_scratch=9M,9M,9M")
    sizes = {size for _, size in kernel.scratch_areas()}
    assert (9 * MIB in sizes) is spoke
    assert bool(machine.check()) is spoke


@pytest.mark.parametrize(("release", "given"), [("7.0", True), ("7.0.y", False), ("7.1", False)])
def test_crash_images(release, given):
    """a6715d7ec472: a crash image gets the handover's address and scratch."""
    machine = Machine("1G")
    kernel = machine.boot(release, cmdline="kho=on crashkernel=64M")
    image = kernel.kexec_file_load(
        machine._last_boot[0], initrd_bytes=1 << 20, cmdline="kho=on", on_crash=True
    )
    assert (image.kho_scratch is not None) is given
    assert bool(image.kho_fdt) is given


def test_a_range_over_two_nodes():
    """91e74fa8b1bc: from 7.1 on a block keeps to one node; the invariant speaks before."""
    for release, spoke in (("7.0", True), ("7.1", False)):
        machine = Machine("256M", nodes=["130M", "126M"])
        kernel = machine.boot(release, cmdline="kho=on")
        border = machine.hardware.memory_map.node_ranges[-1].start >> 12
        start = border - 512 & -1024
        kernel.kho_preserve_pages(start, 1024)
        kernel.finalize()
        told = {v.invariant for v in machine.check()}
        assert ("one-node-per-block" in told) is spoke


def test_taking_back_a_range_over_two_nodes():
    """8fd2f26fa2a3: without the same split other blocks are cleared, and the real ones stay."""
    for fixed in (True, False):
        machine = Machine("256M", nodes=["130M", "126M"], checks=False)
        release = find_release("7.1").evolve(unpreserve_splits_at_nodes=fixed)
        kernel = machine.boot(release, cmdline="kho=on")
        border = machine.hardware.memory_map.node_ranges[-1].start >> 12
        before = list(kernel.kho_out.tree.walk())
        start = border - 512 & -1024
        kernel.kho_preserve_pages(start, 1024)
        kernel.kho_unpreserve_pages(start, 1024)
        runs = [run for run in kernel.kho_out.tree.walk() if run[0]]
        assert (runs == [run for run in before if run[0]]) is fixed


@pytest.mark.parametrize(("release", "fits"), [("7.1", False), ("7.2", True)])
def test_a_block_of_2_gib(release, fits):
    """3a0b8fa2eb36: its size is negative, so that all memory above is reserved, too."""
    machine = Machine("12G", checks=False)
    kernel = machine.boot(release, cmdline="kho=on")
    kernel.kho_preserve_pages((8 * GIB) >> 12, (2 * GIB) >> 12)
    try:
        successor = kernel.kexec()
    except KernelPanic:
        assert not fits  # nothing is left to boot with
        return
    reserved = sum(
        end - base
        for base, end in zip(
            successor.memblock.reserved.base, successor.memblock.reserved.end, strict=True
        )
        if base >= 8 * GIB
    )
    assert (reserved >= 4 * GIB) is not fits


def test_depths_of_the_radix_tree():
    """The table of sizes and depths: one level too few with 16 KiB pages before the fix."""
    depths = {4096: (6, 6), 16384: (4, 5), 65536: (4, 4)}
    for page_size, (without, with_bit) in depths.items():
        for ignores, depth in ((True, without), (False, with_bit)):
            release = find_release("7.1").evolve(tree_depth_ignores_order_bit=ignores)
            machine = Machine("3G", arch="arm64", page_size=page_size, checks=False)
            assert radix_depth(machine.boot(release)) == depth


def test_the_wrong_depth_is_deadly():
    """d64b0372760e: the successor decodes an order-0 key as a block that no machine has."""
    machine = Machine("2G", arch="arm64", page_size=16384)
    kernel = machine.boot("7.1+tree_depth_ignores_order_bit=on", cmdline="kho=on")
    with pytest.raises(KernelPanic, match="kho_preserved_memory_reserve"):
        kernel.kexec()
    assert any(v.invariant == "handover-wellformed" for v in machine.check())


@pytest.mark.parametrize(("release", "number"), [("7.2", 0), ("7.3", -errno.ERANGE)])
def test_keys_that_are_too_wide(release, number):
    """955409ba5715: refused in 7.3, cut before."""
    tree = make_tracker(Machine("64M", checks=False).boot(release, cmdline="kho=on"))
    assert isinstance(tree, KhoRadixTree)
    assert tree.init_tree() == 0
    assert tree.add_key(1 << 60) == number


def test_trackers_by_name():
    """Chunks to 7.0, a radix tree since."""
    for release, kind in (("7.0", KhoChunks), ("7.1", KhoRadixTree)):
        kernel = Machine("64M", checks=False).boot(release, cmdline="kho=off")
        assert isinstance(kernel.kho_out.tree, kind)


@pytest.mark.parametrize(("release", "from_slab"), [("7.1", True), ("7.2", True), ("7.3", False)])
def test_where_the_root_table_comes_from(release, from_slab):
    """kzalloc until 7.2: its page belongs to a cache."""
    kernel = Machine("64M").boot(release, cmdline="kho=on")
    owner = kernel.page(kernel.kho_out.tree.root >> 12).owner
    assert (owner == "kmalloc-4096") is from_slab


@pytest.mark.parametrize(("release", "is_restored"), [("6.16", True), ("6.18", True),
                                                      ("6.19", False), ("7.0", False),
                                                      ("7.3", False)])  # fmt: skip
def test_the_root_fdt_is_restored_at_once_or_never(release, is_restored):
    """Up to 6.18 its page is the successor's own after boot; later it waits like any other."""
    kernel = Machine("128M").boot(release, cmdline="kho=on")
    successor = kernel.kexec()
    pfn = successor.kho_in.fdt_phys >> 12
    assert (successor.page(pfn).kind == "incoming") == (not is_restored)
    assert ((pfn, 0) in successor.kho_in.restored) == is_restored


def test_scratch_of_a_stable_6_18():
    """6.18.y rounds sizes from the command line, and rounds the global area after subtracting."""
    cmdline = "kho=on kho_scratch=3M,5M,6M"
    sizes = {
        name: [size for _, size in Machine("256M").boot(name, cmdline=cmdline).scratch_areas()]
        for name in ("6.18", "6.18.y")
    }
    mib = 1 << 20
    assert sizes == {"6.18": [3 * mib, 5 * mib, 6 * mib], "6.18.y": [4 * mib, 6 * mib, 6 * mib]}


@pytest.mark.parametrize(
    ("release", "is_checked"),
    [("6.18", True), ("7.0", True), ("6.18+scratch_overlap_checked=off", False)],
)
def test_a_page_for_the_map_may_not_be_scratch(release, is_checked, monkeypatch):
    """e38f65d317df, with DEBUG: a bitmap's page out of scratch is -EINVAL, and is given back."""
    config = KernelConfig(release=find_release(release), debug=True)
    kernel = Machine("128M", checks=False).boot(config=config, cmdline="kho=on")
    folio = kernel.alloc_folio(3)
    scratch_pfn = kernel.scratch_areas()[0][0] >> 12
    freed = []
    monkeypatch.setattr(type(kernel.pages), "alloc_pages", lambda *them: scratch_pfn)
    monkeypatch.setattr(type(kernel.pages), "free_pages", lambda self, *page: freed.append(page))
    if is_checked:
        with pytest.raises(KernelError, match="EINVAL"):
            kernel.kho_preserve_folio(folio)
        assert freed == [(scratch_pfn, 0)]
        assert any("xa_load_or_alloc" in line for line in kernel.messages)
    else:
        kernel.kho_preserve_folio(folio)
        assert freed == []


@pytest.mark.parametrize("is_checked", [True, False])
def test_folios_by_the_array_are_checked_as_well(is_checked):
    """With DEBUG none of many folios may lie in scratch; those before it stay as they were."""
    release = find_release("7.3").evolve(scratch_overlap_checked=is_checked)
    config = KernelConfig(release=release, debug=True)
    kernel = Machine("128M", checks=False).boot(config=config, cmdline="kho=on")
    pfns = np.array([kernel.alloc_folio().pfn, kernel.scratch_areas()[0][0] >> 12], dtype=np.int64)
    if is_checked:
        with pytest.raises(KernelError, match="EINVAL"):
            kernel.kho_out.preserve_folios(pfns, 0)
    else:
        kernel.kho_out.preserve_folios(pfns, 0)


def test_a_block_of_2_gib_bears_the_magic_too():
    """7.1 reserves it with a negative size, and marks it like any other: it can be restored."""
    cmdline = "kho=on kho_scratch=64M,64M,64M reserve_mem=2G:2G:guest"
    kernel = Machine("8G", checks=False).boot("7.1", cmdline=cmdline)
    start, size = kernel.reserve_mem.find_by_name("guest")
    assert (start % (2 * GIB), size) == (0, 2 * GIB)
    successor = kernel.kexec()
    assert successor.pages.pages.private[start >> 12] == 0x4B48_4F50 << 32 | 19
