"""memfds: flags, seals, and pinning their folios for long."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim import KernelError, Machine
from khosim.errors import KhoSimError
from khosim.kernel.gup import memfd_pin_folios, unpin_folios
from khosim.kernel.kernel import Kernel
from khosim.kernel.memfd import (
    F_ALL_SEALS,
    MFD_ALLOW_SEALING,
    MFD_CLOEXEC,
    MFD_EXEC,
    MFD_HUGETLB,
    MFD_NOEXEC_SEAL,
    HugetlbFile,
    Memfd,
    memfd,
    memfd_create,
)
from khosim.kernel.pageblock import CMA

PAGE = 4096
MIB = 1 << 20
SEAL, SHRINK, GROW, WRITE, FUTURE_WRITE, EXEC = 1, 2, 4, 8, 16, 32
PUNCH = 3


def boot(ram: str = "64M", **options: object) -> Kernel:
    machine = Machine(ram, checks=False, **options)  # type: ignore[arg-type]
    return machine.boot(cmdline="kho=on")


def refused(error: int, call: Callable[..., object], *args: object) -> None:
    with pytest.raises(KernelError) as caught:
        call(*args)
    assert caught.value.errno == error


def in_cma(file: Memfd) -> int:
    """How many pages of the file lie in CMA pageblocks, that is in scratch."""
    pages = file.kernel.pages
    return sum(
        pages.migratetype_of(pfn) == CMA
        for run in file.inode.mapping
        for pfn in range(run.pfn, run.pfn_of(run.end))
    )


def fill_cma_first(kernel: Kernel) -> None:
    """Take all memory outside of scratch, so that movable folios come from scratch."""
    while kernel.pages.alloc_pages(0, "hog") is not None:
        pass


# -- memfd_create ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "seals", "mode"),
    [
        (0, SEAL, 0o777),
        (MFD_CLOEXEC | MFD_EXEC, SEAL, 0o777),
        (MFD_ALLOW_SEALING, 0, 0o777),
        (MFD_NOEXEC_SEAL, EXEC, 0o666),
        (MFD_NOEXEC_SEAL | MFD_ALLOW_SEALING, EXEC, 0o666),
    ],
)
def test_seals_of_a_new_file(flags: int, seals: int, mode: int) -> None:
    """Sealed against seals unless asked for; NOEXEC takes the mode's x bits and seals them."""
    file = memfd_create(boot(), "name", flags)
    assert isinstance(file, Memfd)
    assert (file.seals, file.inode.i_mode, file.size, file.f_pos) == (seals, mode, 0, 0)


@pytest.mark.parametrize("flags", [0x20, MFD_EXEC | MFD_NOEXEC_SEAL, 21 << 26])
def test_bad_flags(flags: int) -> None:
    """Unknown flags, contradictions, and a huge page size without MFD_HUGETLB: -EINVAL."""
    refused(errno.EINVAL, memfd_create, boot(), "name", flags)


def test_names() -> None:
    """249 bytes are the longest name."""
    kernel = boot()
    memfd_create(kernel, "n" * 249)
    refused(errno.EINVAL, memfd_create, kernel, "n" * 250)


@pytest.mark.parametrize(
    ("symbol", "error"),
    [("shmem_alloc_inode", errno.ENOSPC), ("alloc_file_pseudo", errno.ENOMEM)],
)
def test_create_without_memory(symbol: str, error: int) -> None:
    """-ENOSPC for the inode, -ENOMEM for the file."""
    kernel = boot()
    kernel.pages.fail = lambda order, owner: owner == symbol
    refused(error, memfd_create, kernel, "name")


def test_hugetlb() -> None:
    """A hugetlb memfd has size and seals."""
    file = memfd_create(boot(), "name", MFD_HUGETLB | MFD_ALLOW_SEALING | 21 << 26)
    assert isinstance(file, HugetlbFile)
    file.ftruncate("4M")
    assert (file.size, file.seals) == (4 * MIB, 0)
    sealed = memfd_create(boot(), "name", MFD_HUGETLB | MFD_NOEXEC_SEAL)
    assert isinstance(sealed, HugetlbFile)
    assert sealed.seals == EXEC
    file.seals = SHRINK
    refused(errno.EPERM, file.ftruncate, 0)


def test_a_dead_kernels_file() -> None:
    """After the jump a file of the old kernel is no use."""
    machine = Machine("64M", checks=False)
    kernel = machine.boot(cmdline="kho=on")
    file = memfd(kernel, "f", size=PAGE)
    machine.kexec(kernel)
    with pytest.raises(KhoSimError, match="handed over"):
        file.write(0, b"x")
    with pytest.raises(KhoSimError, match="handed over"):
        memfd(kernel, "g")


# -- seals ----------------------------------------------------------------------------------------


def test_seals_forbid() -> None:
    """Each seal stops the calls it is named after, and no others."""
    kernel = boot()

    def sealed(seals: int) -> Memfd:
        file = memfd(kernel, "f", size=2 * PAGE)
        file.add_seals(seals)
        return file

    refused(errno.EPERM, sealed(SHRINK).ftruncate, PAGE)
    sealed(SHRINK).ftruncate(3 * PAGE)
    refused(errno.EPERM, sealed(GROW).ftruncate, 3 * PAGE)
    refused(errno.EPERM, sealed(GROW).write, 2 * PAGE - 1, b"xy")
    refused(errno.EPERM, sealed(GROW).fallocate, PAGE, 2 * PAGE)
    sealed(GROW).write(0, b"x")
    sealed(GROW).fallocate(0, 2 * PAGE)
    for seal in (WRITE, FUTURE_WRITE):
        refused(errno.EPERM, sealed(seal).write, 0, b"x")
        refused(errno.EPERM, sealed(seal).fallocate, 0, PAGE, PUNCH)
        sealed(seal).ftruncate(0)
    refused(errno.EPERM, sealed(WRITE).store, 0, b"x")
    sealed(FUTURE_WRITE).store(0, b"x")


def test_seals_can_only_be_added() -> None:
    """They add up; after F_SEAL_SEAL there are no more; unknown ones are -EINVAL."""
    file = memfd(boot(), "f")
    file.add_seals(SHRINK)
    file.add_seals(GROW)
    assert file.seals == SHRINK | GROW
    refused(errno.EINVAL, file.add_seals, 64)
    file.add_seals(SEAL)
    refused(errno.EPERM, file.add_seals, WRITE)
    refused(errno.EINVAL, file.add_seals, 64)
    refused(errno.EPERM, memfd(boot(), "f", flags=0).add_seals, SHRINK)
    assert F_ALL_SEALS == 63


def test_sealing_execution_seals_writing_where_the_mode_allows_it() -> None:
    """W^X: a file with x bits becomes read-only with F_SEAL_EXEC, one without does not."""
    kernel = boot()
    file = memfd(kernel, "f")
    file.add_seals(EXEC)
    assert file.seals == EXEC | SHRINK | GROW | WRITE | FUTURE_WRITE
    without = memfd(kernel, "f", flags=MFD_NOEXEC_SEAL)
    without.add_seals(EXEC)
    assert without.seals == EXEC


def test_pinned_folios_keep_the_write_seal_away() -> None:
    """Somebody may write to what they hold: -EBUSY, for pins and for plain references."""
    kernel = boot()
    file = memfd(kernel, "f", size=2 * PAGE)
    pins = memfd_pin_folios(file, 0, 2 * PAGE - 1, 2)
    refused(errno.EBUSY, file.add_seals, WRITE)
    file.add_seals(SHRINK | FUTURE_WRITE)
    unpin_folios(file.inode, pins)
    pfn = file.inode.mapping.overlapping(0, 1)[0].pfn
    kernel.pages.get_page(pfn)
    refused(errno.EBUSY, file.add_seals, WRITE)
    kernel.pages.free_pages(pfn, 0)
    file.add_seals(WRITE)


# -- pinning --------------------------------------------------------------------------------------


def test_pinning_fills_holes() -> None:
    """Every page of the range gets a zeroed folio from outside of scratch."""
    kernel = boot()
    file = memfd(kernel, "f", size=8 * PAGE)
    file.write(3 * PAGE, b"x")
    pins = memfd_pin_folios(file, 2 * PAGE, 6 * PAGE, 100)
    assert sum(run.nr_folios for run in pins) == 5
    assert (pins[0].index, pins[-1].end) == (2, 7)
    assert [(run.pins, run.uptodate) for run in file.inode.mapping] == [(1, True)] * len(
        list(file.inode.mapping)
    )
    assert in_cma(file) == 0
    unpin_folios(file.inode, pins)
    assert {run.pins for run in file.inode.mapping} == {0}


def test_pinning_takes_no_more_than_asked_for() -> None:
    """max_folios is the limit: for the pins, and for the holes that are filled."""
    file = memfd(boot(), "f", size=8 * PAGE)
    file.write(PAGE, b"x")
    pins = memfd_pin_folios(file, 0, 8 * PAGE - 1, 3)
    assert sum(run.nr_folios for run in pins) == 3
    assert {run.pins for run in file.inode.mapping} == {1}
    assert file.inode.mapping.nrpages == 3


def test_bad_ranges() -> None:
    """-EINVAL for a range that is not in the file."""
    file = memfd(boot(), "f", size=PAGE)
    for start, end, max_folios in ((-1, 0, 1), (1, 0, 1), (0, PAGE, 1), (0, 0, 0)):
        refused(errno.EINVAL, memfd_pin_folios, file, start, end, max_folios)


@pytest.mark.parametrize(("huge", "order"), [("never", 0), ("always", 9)])
def test_folios_leave_scratch(huge: str, order: int) -> None:
    """Movable folios may lie in scratch; pinning moves them, with their bytes and flags."""
    kernel = boot("256M")
    file = memfd(kernel, "f", size=4 * MIB, huge=huge)
    held = [kernel.alloc_folio(10) for _ in range(6)]
    fill_cma_first(kernel)
    file.write(0, b"a" * MIB)
    file.write(2 * MIB, b"b" * MIB)
    before = in_cma(file)
    assert before >= 512
    for folio in held:
        folio.put()
    free = kernel.pages.nr_free_pages()
    dirty = [(run.dirty, run.uptodate) for run in file.inode.mapping]
    holes = sum(end - start for start, end in file.inode.mapping.holes(0, 1024))
    pins = memfd_pin_folios(file, 0, 4 * MIB - 1, 1024)
    assert in_cma(file) == 0
    assert {run.order for run in pins} == {order}
    assert set(dirty) == {(True, True)}
    assert file.read(0, 3 * MIB) == b"a" * MIB + bytes(MIB) + b"b" * MIB
    assert kernel.pages.nr_free_pages() == free - holes


def test_a_large_folio_without_a_place_to_go_is_split() -> None:
    """No block outside of scratch is large enough, but single pages are there."""
    kernel = boot()
    held = [kernel.alloc_folio(0) for _ in range(4096)]
    fill_cma_first(kernel)
    file = memfd(kernel, "f", size=2 * MIB, huge="always")
    file.write(0, b"c" * 2 * MIB)
    assert [run.order for run in file.inode.mapping] == [9]
    assert in_cma(file) == 512
    for folio in held[::2]:
        folio.put()
    memfd_pin_folios(file, 0, 2 * MIB - 1, 512)
    assert {run.order for run in file.inode.mapping} == {0}
    assert in_cma(file) == 0
    assert file.read(0, 2 * MIB) == b"c" * 2 * MIB


def test_no_place_to_go() -> None:
    """-ENOMEM; what was moved stays moved, nothing is pinned, nothing lost."""
    kernel = boot()
    held = [kernel.alloc_folio(0) for _ in range(10)]
    fill_cma_first(kernel)
    file = memfd(kernel, "f", size=20 * PAGE)
    file.write(0, b"d" * 20 * PAGE)
    assert in_cma(file) == 20
    for folio in held:
        folio.put()
    free = kernel.pages.nr_free_pages()
    refused(errno.ENOMEM, memfd_pin_folios, file, 0, 20 * PAGE - 1, 20)
    assert in_cma(file) == 10
    assert {run.pins for run in file.inode.mapping} == {0}
    assert kernel.pages.nr_free_pages() == free
    assert file.read(0, 20 * PAGE) == b"d" * 20 * PAGE


def test_no_memory_for_a_hole() -> None:
    """-ENOMEM; the holes filled before stay filled."""
    kernel = boot()
    file = memfd(kernel, "f", size=10 * PAGE)
    left = iter([False] * 4)
    kernel.pages.fail = lambda order, owner: owner == "shmem_alloc_folio" and next(left, True)
    refused(errno.ENOMEM, memfd_pin_folios, file, 0, 10 * PAGE - 1, 10)
    assert file.inode.mapping.nrpages == 4
    assert {run.pins for run in file.inode.mapping} == {0}


def test_scratch_is_no_place_for_holes() -> None:
    """With nothing but scratch left a hole cannot be filled, though a write could fill it."""
    kernel = boot()
    fill_cma_first(kernel)
    file = memfd(kernel, "f", size=4 * PAGE)
    refused(errno.ENOMEM, memfd_pin_folios, file, 0, 4 * PAGE - 1, 4)
    assert file.inode.mapping.nrpages == 0
    file.write(0, b"x")
    assert in_cma(file) == 1


def test_pinned_pages_outlive_their_place_in_the_file() -> None:
    """Truncation takes them out of the file; the last unpin frees them."""
    kernel = boot()
    free = kernel.pages.nr_free_pages()
    file = memfd(kernel, "f", size=10 * PAGE)
    first = memfd_pin_folios(file, 0, 10 * PAGE - 1, 10)
    second = memfd_pin_folios(file, 5 * PAGE, 7 * PAGE, 10)
    file.ftruncate(PAGE)
    assert file.inode.mapping.nrpages == 1
    assert kernel.pages.nr_free_pages() == free - 10
    unpin_folios(file.inode, first)
    assert kernel.pages.nr_free_pages() == free - 4
    file.fput()
    assert kernel.pages.nr_free_pages() == free - 3
    unpin_folios(file.inode, second)
    assert kernel.pages.nr_free_pages() == free
    assert file.inode.detached == []


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1 << 16),
    huge=st.sampled_from(["never", "always", "within_size"]),
    writes=st.lists(st.tuples(st.integers(0, 1000 * PAGE), st.integers(1, 40 * PAGE)), max_size=6),
)
def test_pinning_changes_no_byte(seed: int, huge: str, writes: list[tuple[int, int]]) -> None:
    """Wherever the allocator put the folios: afterwards none is in scratch, all bytes are equal."""
    kernel = boot(allocator="adversarial", seed=seed)
    free = kernel.pages.nr_free_pages()
    file = memfd(kernel, "f", size=1040 * PAGE, huge=huge)
    for n, (offset, length) in enumerate(writes):
        file.write(offset, bytes([n + 1]) * length)
    content = file.read(0, file.size)
    pins = memfd_pin_folios(file, 0, file.size - 1, 1040)
    assert in_cma(file) == 0
    assert file.read(0, file.size) == content
    assert [run.index for run in pins] == [0, *(run.end for run in pins[:-1])]
    unpin_folios(file.inode, pins)
    file.fput()
    assert kernel.pages.nr_free_pages() == free


def test_reclaim_takes_clean_folios_only() -> None:
    """Written and pinned folios stay; what was only read goes, and reads as zeros again."""
    kernel = boot()
    file = memfd(kernel, "f", size=4 * PAGE)
    file.inode.get_folios(0, 4, 2)
    file.write(0, b"written")
    pins = memfd_pin_folios(file, PAGE, 2 * PAGE - 1, 1)
    assert file.reclaim() == 2
    assert [(run.index, run.end) for run in file.inode.mapping] == [(0, 1), (1, 2)]
    assert file.read(0, 7) == b"written"
    assert file.read(3 * PAGE, 4) == bytes(4)
    unpin_folios(file.inode, pins)
    assert file.reclaim() == 1
    assert file.inode.i_blocks == PAGE // 512
