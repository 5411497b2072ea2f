"""shmem files: folios, holes, sizes, and what reading and writing does to them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim import KernelError, Machine
from khosim.errors import InputError, KhoSimError
from khosim.kernel.kernel import Kernel
from khosim.kernel.memfd import Memfd, memfd
from khosim.kernel.page_cache import AddressSpace, CacheRun
from khosim.kernel.shmem import MAX_LFS_FILESIZE, max_pagecache_order
from khosim.kernel.shmem_truncate import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE

PAGE = 4096
MIB = 1 << 20
PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
SEAL_SHRINK, SEAL_GROW, SEAL_WRITE, SEAL_FUTURE_WRITE = 2, 4, 8, 16


def boot(ram: str = "64M", **options: Any) -> Kernel:
    return Machine(ram, checks=False, **options).boot(cmdline="kho=on")


def refused(error: int, call: Callable[..., object], *args: object) -> None:
    with pytest.raises(KernelError) as caught:
        call(*args)
    assert caught.value.errno == error


def layout(file: Memfd) -> list[tuple[int, int, int]]:
    """(page, order, folios) of every run, neighbours in memory or not."""
    joined: list[tuple[int, int, int]] = []
    for run in file.inode.mapping:
        if joined and joined[-1][1] == run.order:
            index, order, count = joined[-1]
            if index + (count << order) == run.index:
                joined[-1] = (index, order, count + run.nr_folios)
                continue
        joined.append((run.index, run.order, run.nr_folios))
    return joined


def consistent(file: Memfd) -> None:
    """The runs are sorted, disjoint, and say the same as the page allocator."""
    kernel, inode = file.kernel, file.inode
    end = total = 0
    for run in inode.mapping:
        assert run.index >= end
        assert run.index % (1 << run.order) == run.pfn % (1 << run.order) == 0
        end = run.end
        total += run.nr_pages
        for pfn in (run.pfn, run.pfn_of(run.end - (1 << run.order))):
            page = kernel.page(pfn)
            assert (page.kind, page.order, page.head_pfn) == ("allocated", run.order, pfn)
    assert inode.mapping.nrpages == inode.alloced == total
    assert inode.i_blocks == total * kernel.arch.page_size // 512


# -- writing and reading --------------------------------------------------------------------------


def test_a_write_makes_pages_where_it_writes() -> None:
    """Folios appear on demand, dirty and up to date; the rest is a hole and reads as zeros."""
    kernel = boot()
    free = kernel.pages.nr_free_pages()
    file = memfd(kernel, "f", size="1M")
    assert file.write(5 * PAGE - 2, b"abcd") == 4
    assert layout(file) == [(4, 0, 2)]
    assert all(run.dirty and run.uptodate for run in file.inode.mapping)
    assert file.read(5 * PAGE - 4, 8) == b"\0\0abcd\0\0"
    assert file.read(0, MIB + 10) == bytes(5 * PAGE - 2) + b"abcd" + bytes(MIB - 5 * PAGE - 2)
    assert kernel.pages.nr_free_pages() == free - 2
    consistent(file)


def test_writing_grows_the_file() -> None:
    """Behind the end the file grows; reading ends there."""
    file = memfd(boot(), "f")
    assert file.write(10, b"xy") == 2
    assert file.size == 12
    assert file.read(0, 100) == bytes(10) + b"xy"
    assert file.read(12, 5) == b""
    assert file.write(0, b"") == 0


def test_stale_memory_never_shows() -> None:
    """Pages come from the allocator with old bytes in them: files read zeros all the same."""
    kernel = boot()
    folios = [kernel.alloc_folio(movable=True) for _ in range(600)]
    for folio in folios:
        folio.write(0, b"\xaa" * PAGE)
    for folio in folios:
        folio.put()
    for huge in ("never", "always"):
        file = memfd(kernel, "f", size="4M", huge=huge)
        file.write(3 * PAGE + 1, b"x")
        file.write(MIB + PAGE, b"y" * (3 * PAGE + 7))
        file.store(3 * MIB + 5, b"z")
        model = bytearray(4 * MIB)
        model[3 * PAGE + 1] = ord("x")
        model[MIB + PAGE : MIB + 4 * PAGE + 7] = b"y" * (3 * PAGE + 7)
        model[3 * MIB + 5] = ord("z")
        assert file.read(0, 4 * MIB) == model
        stale = [
            offset
            for run in file.inode.mapping
            for offset in range(run.pfn, run.pfn_of(run.end))
            if offset in {folio.pfn for folio in folios}
        ]
        assert stale, "the test lost its point: no page was used before"


def test_release_frees_everything() -> None:
    """The last fput gives all memory back; the file cannot be used afterwards."""
    kernel = boot()
    free = kernel.pages.nr_free_pages()
    file = memfd(kernel, "f", size="8M")
    file.fallocate(0, 8 * MIB)
    file.get_file()
    file.fput()
    assert kernel.pages.nr_free_pages() == free - 2048
    file.close()
    assert kernel.pages.nr_free_pages() == free
    with pytest.raises(KhoSimError, match="last reference"):
        file.read(0, 1)


def test_a_short_write_without_memory() -> None:
    """What fits is written and counted; the next write fails with -ENOMEM."""
    kernel = boot()
    file = memfd(kernel, "f", size="1M")
    left = iter([False] * 3)
    kernel.pages.fail = lambda order, owner: owner == "shmem_alloc_folio" and next(left, True)
    assert file.write(PAGE - 1, b"q" * 4 * PAGE) == 1 + 2 * PAGE
    refused(errno.ENOMEM, file.write, 512 * PAGE, b"q")
    assert file.read(0, 4 * PAGE) == bytes(PAGE - 1) + b"q" * (2 * PAGE + 1) + bytes(PAGE)
    consistent(file)


def test_limits_of_offsets() -> None:
    """Negative offsets are -EINVAL, the end of all files -EFBIG."""
    file = memfd(boot(), "f")
    refused(errno.EINVAL, file.write, -1, b"x")
    refused(errno.EINVAL, file.read, -1, 1)
    refused(errno.EFBIG, file.write, MAX_LFS_FILESIZE, b"x")
    refused(errno.EINVAL, file.ftruncate, -1)
    refused(errno.EFBIG, file.ftruncate, 1 << 63)
    refused(errno.EFBIG, file.fallocate, MAX_LFS_FILESIZE - 5, 10)
    refused(errno.EINVAL, file.fallocate, 0, 0)
    refused(errno.EOPNOTSUPP, file.fallocate, 0, 1, FALLOC_FL_PUNCH_HOLE)
    refused(errno.EOPNOTSUPP, file.fallocate, 0, 1, 8)


def test_stores_through_a_mapping() -> None:
    """They fault pages in, zeroed; behind the last page there is SIGBUS."""
    file = memfd(boot(), "f", size=PAGE + 1)
    file.store(PAGE, b"ab")
    assert file.size == PAGE + 1
    assert file.read(0, 2 * PAGE) == bytes(PAGE) + b"a"
    refused(errno.EFAULT, file.store, 2 * PAGE, b"x")
    refused(errno.EFAULT, file.store, -1, b"x")
    file.store(9 * PAGE, b"")


def test_seek() -> None:
    """Positions, data and holes."""
    file = memfd(boot(), "f", size=10 * PAGE)
    file.write(2 * PAGE + 5, b"x")
    file.fallocate(5 * PAGE, PAGE)
    assert file.lseek(7) == 7
    assert file.lseek(3, os.SEEK_CUR) == 10
    assert file.lseek(-1, os.SEEK_END) == 10 * PAGE - 1
    assert file.lseek(0, os.SEEK_DATA) == 2 * PAGE
    assert file.lseek(2 * PAGE + 9, os.SEEK_DATA) == 2 * PAGE + 9
    assert file.lseek(2 * PAGE, os.SEEK_HOLE) == 3 * PAGE
    assert file.lseek(9, os.SEEK_HOLE) == 9
    refused(errno.ENXIO, file.lseek, 3 * PAGE, os.SEEK_DATA)
    refused(errno.ENXIO, file.lseek, 10 * PAGE, os.SEEK_HOLE)
    refused(errno.EINVAL, file.lseek, -1)
    refused(errno.EINVAL, file.lseek, 0, 77)
    assert file.f_pos == 9


# -- sizes ----------------------------------------------------------------------------------------


def test_truncate_zeroes_the_rest_of_the_page() -> None:
    """Shrinking frees whole pages and zeroes the tail: growing again shows zeros."""
    kernel = boot()
    file = memfd(kernel, "f")
    file.write(0, b"a" * 5 * PAGE)
    file.ftruncate(2 * PAGE + 10)
    assert layout(file) == [(0, 0, 3)]
    file.ftruncate("1M")
    assert file.read(2 * PAGE, PAGE) == b"a" * 10 + bytes(PAGE - 10)
    consistent(file)


def test_punching_a_hole() -> None:
    """Whole pages go, parts of pages are zeroed, the size stays."""
    file = memfd(boot(), "f")
    file.write(0, b"a" * 5 * PAGE)
    file.fallocate(PAGE - 10, 2 * PAGE + 20, PUNCH)
    assert layout(file) == [(0, 0, 1), (3, 0, 2)]
    expected = b"a" * (PAGE - 10) + bytes(2 * PAGE + 20) + b"a" * (2 * PAGE - 10)
    assert file.read(0, 5 * PAGE) == expected
    file.fallocate(4 * PAGE + 1, 2, PUNCH)
    assert file.read(4 * PAGE, 4) == b"a\0\0a"
    consistent(file)


def test_fallocate() -> None:
    """Reserved folios are dirty and not up to date; a second fallocate zeroes them."""
    kernel = boot()
    file = memfd(kernel, "f")
    file.fallocate(PAGE, 3 * PAGE)
    assert file.size == 4 * PAGE
    assert [(run.dirty, run.uptodate) for run in file.inode.mapping] == [(True, False)]
    assert file.read(0, 4 * PAGE) == bytes(4 * PAGE)
    file.fallocate(2 * PAGE, PAGE)
    assert [run.uptodate for run in file.inode.mapping] == [False, True, False]
    file.fallocate(8 * PAGE, PAGE, FALLOC_FL_KEEP_SIZE)
    assert file.size == 4 * PAGE
    assert layout(file) == [(1, 0, 3), (8, 0, 1)]
    consistent(file)


def test_fallocate_without_memory() -> None:
    """What was added is taken back; what was there and used stays."""
    kernel = boot()
    file = memfd(kernel, "f")
    file.write(2 * PAGE, b"keep")
    free = kernel.pages.nr_free_pages()
    left = iter([False] * 3)
    kernel.pages.fail = lambda order, owner: owner == "shmem_alloc_folio" and next(left, True)
    refused(errno.ENOMEM, file.fallocate, 0, 10 * PAGE)
    assert layout(file) == [(2, 0, 1)]
    assert file.inode.fallocend == 0
    assert file.size == 2 * PAGE + 4
    assert kernel.pages.nr_free_pages() == free
    consistent(file)


@pytest.mark.parametrize(
    ("symbol", "error"),
    [
        ("shmem_alloc_folio", errno.ENOMEM),
        ("mem_cgroup_charge", errno.ENOMEM),
        ("shmem_add_to_page_cache", errno.ENOMEM),
        ("shmem_inode_acct_blocks", errno.ENOSPC),
    ],
)
def test_each_refusal_on_the_way_of_a_folio(symbol: str, error: int) -> None:
    """Whoever refuses: the errno is theirs, and no page is lost."""
    kernel = boot()
    file = memfd(kernel, "f", size="1M")
    free = kernel.pages.nr_free_pages()
    kernel.pages.fail = lambda order, owner: owner == symbol
    refused(error, file.write, 0, b"x")
    assert kernel.pages.nr_free_pages() == free
    consistent(file)


def test_a_frozen_file_keeps_its_size() -> None:
    """While it is preserved a file can be written, but not resized, filled or punched."""
    file = memfd(boot(), "f", size=3 * PAGE)
    file.inode.shmem_freeze(True)
    assert file.write(PAGE, b"x") == 1
    refused(errno.EPERM, file.write, 3 * PAGE - 1, b"xy")
    refused(errno.EPERM, file.ftruncate, 0)
    refused(errno.EPERM, file.ftruncate, 4 * PAGE)
    refused(errno.EPERM, file.fallocate, 0, PAGE)
    refused(errno.EPERM, file.fallocate, 0, PAGE, PUNCH)
    file.ftruncate(3 * PAGE)
    file.inode.shmem_freeze(False)
    file.ftruncate(0)


def test_a_write_across_the_end_of_a_frozen_file() -> None:
    """Permission is asked for 2 MiB at a time: the part before the last such border is written."""
    file = memfd(boot(), "f", size=3 * MIB)
    file.inode.shmem_freeze(True)
    assert file.write(MIB, b"x" * (2 * MIB + 1)) == MIB
    refused(errno.EPERM, file.write, 2 * MIB, b"x" * (MIB + 1))


# -- large folios ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("huge", "size", "offset", "expected"),
    [
        ("never", 8 * MIB, 5 * MIB, (1280, 0, 1)),
        ("advise", 8 * MIB, 5 * MIB, (1280, 0, 1)),
        ("deny", 8 * MIB, 5 * MIB, (1280, 0, 1)),
        ("always", 8 * MIB, 5 * MIB, (1024, 9, 1)),
        ("force", 8 * MIB, 5 * MIB, (1024, 9, 1)),
        ("within_size", 8 * MIB, 5 * MIB, (1024, 9, 1)),
        ("always", MIB, 5 * PAGE, (0, 9, 1)),
        ("within_size", MIB, 5 * PAGE, (0, 8, 1)),
        ("within_size", 7 * PAGE, 6 * PAGE, (6, 0, 1)),
        ("within_size", 8 * PAGE, 6 * PAGE, (0, 3, 1)),
    ],
)
def test_order_by_policy(huge: str, size: int, offset: int, expected: tuple[int, int, int]) -> None:
    """Each mode of huge= gives the folios it promises."""
    file = memfd(boot(), "f", size=size, huge=huge)
    file.write(offset, b"x")
    assert layout(file) == [expected]
    assert file.read(offset - 1, 3)[:2] == b"\0x"
    consistent(file)


def test_an_unknown_policy() -> None:
    """Nonsense is refused in one line."""
    with pytest.raises(InputError, match="huge: 'sometimes'"):
        memfd(boot(), "f", huge="sometimes")


def test_smaller_where_something_is_in_the_way() -> None:
    """Around a folio that is there already the next ones are as large as the hole allows."""
    file = memfd(boot(), "f", size=2 * MIB, huge="never")
    file.write(100 * PAGE, b"x")
    file.inode.huge = "always"
    file.fallocate(0, 2 * MIB)
    orders = [(run.index, run.order) for run in file.inode.mapping]
    assert (0, 6) in orders
    assert (256, 8) in orders
    assert (101, 0) in orders
    assert sum(nr << order for _, order, nr in layout(file)) == 512
    consistent(file)


def test_smaller_where_memory_is_scarce() -> None:
    """Without a block of the largest order the next smaller one is taken."""
    kernel = boot()
    file = memfd(kernel, "f", size=4 * MIB, huge="always")
    kernel.pages.fail = lambda order, owner: order > 7
    file.write(5 * PAGE, b"x")
    kernel.pages.fail = None
    assert layout(file) == [(0, 7, 1)]
    file.fallocate(0, 4 * MIB)
    assert layout(file) == [(0, 7, 2), (256, 8, 1), (512, 9, 1)]
    consistent(file)


def test_populating_is_a_few_runs() -> None:
    """A range is filled in whole runs, with the same pages as one by one."""
    one, many = boot("256M"), boot("256M")
    for kernel in (one, many):
        file = memfd(kernel, "f", size="64M")
        if kernel is many:
            file.fallocate(0, 64 * MIB)
        else:
            for index in range(64 * MIB // PAGE):
                file.fallocate(index * PAGE, PAGE)
        runs = [(run.index, run.pfn, run.nr_folios) for run in file.inode.mapping]
        if kernel is one:
            expected = runs
    assert runs == expected
    assert len(runs) < 100


def test_truncating_inside_a_large_folio() -> None:
    """It is split in halves towards the cut; what lies behind is freed."""
    kernel = boot()
    file = memfd(kernel, "f", size=4 * MIB, huge="always")
    file.write(0, b"a" * (2 * MIB))
    free = kernel.pages.nr_free_pages()
    file.ftruncate(3 * PAGE + 9)
    assert layout(file) == [(0, 1, 1), (2, 0, 2)]
    assert kernel.pages.nr_free_pages() == free + 508
    file.ftruncate(4 * MIB)
    assert file.read(0, 5 * PAGE) == b"a" * (3 * PAGE + 9) + bytes(2 * PAGE - 9)
    consistent(file)


def test_punching_inside_a_large_folio() -> None:
    """It is split at both ends of the hole."""
    file = memfd(boot(), "f", huge="always")
    file.write(0, b"a" * (2 * MIB))
    file.fallocate(16 * PAGE, 16 * PAGE, PUNCH)
    low = [(0, 4, 1), (32, 0, 2), (34, 1, 1), (36, 2, 1), (40, 3, 1), (48, 4, 1)]
    assert layout(file) == [*low, (64, 6, 1), (128, 7, 1), (256, 8, 1)]
    assert file.read(0, 2 * MIB) == b"a" * 16 * PAGE + bytes(16 * PAGE) + b"a" * (480 * PAGE)
    consistent(file)


def test_a_split_drops_what_lies_behind_the_end() -> None:
    """Pieces of a large folio behind the end of the file go, unless fallocate promised them."""
    for promised, behind in ((0, [(4, 2, 1)]), (20, [(4, 2, 1), (8, 3, 1), (16, 4, 1)])):
        file = memfd(boot(), "f", size=6 * PAGE, huge="always")
        file.write(0, b"a" * 6 * PAGE)
        assert layout(file) == [(0, 9, 1)]
        file.inode.fallocend = promised
        file.fallocate(3 * PAGE + 1, 1, PUNCH)
        assert layout(file) == [(0, 1, 1), (2, 0, 2), *behind]
        assert file.read(0, 6 * PAGE) == b"a" * (3 * PAGE + 1) + b"\0" + b"a" * (3 * PAGE - 2)
        consistent(file)


def test_a_pinned_large_folio_is_not_split() -> None:
    """It keeps its pages; what was cut off is zeroed."""
    file = memfd(boot(), "f", huge="always")
    file.write(0, b"a" * (2 * MIB))
    file.inode.mapping.mark(0, 1, pins=1)
    file.ftruncate(PAGE + 1)
    assert layout(file) == [(0, 9, 1)]
    file.ftruncate(2 * MIB)
    assert file.read(0, 2 * MIB) == b"a" * (PAGE + 1) + bytes(2 * MIB - PAGE - 1)


@pytest.mark.parametrize(("shift", "order"), [(12, 9), (14, 11), (16, 11)])
def test_largest_folio(shift: int, order: int) -> None:
    """2 MiB, 32 MiB, 128 MiB."""
    assert max_pagecache_order(shift) == order


# -- against a model ------------------------------------------------------------------------------


def test_runs_as_a_dictionary_would() -> None:
    """take() cuts runs at folio borders, insert() joins them again."""
    space = AddressSpace()
    space.insert(CacheRun(0, 64, 2, 8))
    taken = space.take(5, 9)
    assert [(run.index, run.pfn, run.nr_folios) for run in taken] == [(4, 68, 2)]
    assert list(space.holes(0, 40)) == [(4, 12), (32, 40)]
    assert (space.prev_end(6), space.next_start(6), space.nrpages) == (4, 12, 24)
    for run in taken:
        space.insert(run)
    assert [(run.index, run.nr_folios) for run in space] == [(0, 8)]
    space.mark(13, 14, dirty=True)
    assert [(run.index, run.nr_folios, run.dirty) for run in space] == [
        (0, 3, False),
        (12, 1, True),
        (16, 4, False),
    ]


STEP = st.tuples(
    st.sampled_from(["write", "store", "truncate", "punch", "allocate", "keep"]),
    st.integers(0, 1100 * PAGE),
    st.integers(1, 300 * PAGE),
)


@settings(max_examples=120)
@given(
    huge=st.sampled_from(["never", "always", "within_size", "force"]),
    steps=st.lists(STEP, min_size=1, max_size=12),
    seed=st.integers(0, 1 << 16),
    fail_at=st.none() | st.integers(0, 40),
)
def test_as_a_bytearray_would(
    huge: str, steps: list[tuple[str, int, int]], seed: int, fail_at: int | None
) -> None:
    """Any sequence of calls leaves the bytes that a plain array has; no page is lost."""
    kernel = boot(allocator="adversarial", seed=seed)
    free = kernel.pages.nr_free_pages()
    file = memfd(kernel, "f", huge=huge)
    if fail_at is not None:
        calls = iter(range(1 << 30))
        kernel.pages.fail = lambda order, owner: next(calls) == fail_at
    model = bytearray()
    errors: set[int] = set()
    for number, (what, offset, length) in enumerate(steps):
        text = bytes([number + 1]) * min(length, 9000)
        try:
            if what == "write":
                done = file.write(offset, text)
                model.extend(bytes(max(0, offset + done - len(model))))
                model[offset : offset + done] = text[:done]
            elif what == "store":
                file.store(offset, text[: max(0, len(model) - offset)])
                model[offset : offset + len(text)] = text[: max(0, len(model) - offset)]
            elif what == "truncate":
                file.ftruncate(offset)
                del model[offset:]
                model.extend(bytes(offset - len(model)))
            elif what == "punch":
                file.fallocate(offset, length, PUNCH)
                inside = max(0, min(len(model), offset + length) - offset)
                model[offset : offset + inside] = bytes(inside)
            else:
                file.fallocate(offset, length, FALLOC_FL_KEEP_SIZE * (what == "keep"))
                if what == "allocate":
                    model.extend(bytes(max(0, offset + length - len(model))))
        except KernelError as error:
            errors.add(error.errno)
        assert file.size == len(model)
        assert file.read(0, len(model)) == model
        consistent(file)
    assert errors <= {errno.ENOMEM, errno.ENOSPC, errno.EFAULT}
    file.fput()
    assert kernel.pages.nr_free_pages() == free
