"""Neighbouring folios, a whole range at a time, and the records of a memfd's folios by runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim import KernelError, Machine
from khosim.abi.memfd import MemfdLuoFolioSer, pack_memfd_luo_folio_ser
from khosim.kernel.folio_range import (
    FolioRun,
    RestoredLog,
    preserve_folio_runs,
    put_folio_range,
    restore_folio_range,
    unpreserve_folio_runs,
)
from khosim.kernel.kernel import Kernel
from khosim.kernel.liveupdate.memfd_records import read_records, write_records
from khosim.kernel.page_cache import CacheRun
from khosim.kernel.vmalloc import VmStruct, vmalloc


def boot(ram: str = "64M", **options: Any) -> tuple[Machine, Kernel]:
    machine = Machine(ram, checks=False, **options)
    return machine, machine.boot(cmdline="kho=on")


def preserved(kernel: Kernel) -> Counter[int]:
    keys: Counter[int] = Counter()
    for nr_keys, first in kernel.kho_out.tree.walk():
        keys.update(range(first, first + nr_keys) if nr_keys else ())
    return keys


RUNS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(1, 60)), min_size=1, max_size=8
)


def laid_out(runs: list[tuple[int, int, int]], low: int) -> list[FolioRun]:
    """Aligned runs one behind the other from ``low`` on, with gaps."""
    found, at = [], low
    for order, gap, count in runs:
        at = -(-(at + gap) >> order) << order
        found.append(FolioRun(at, order, count))
        at += count << order
    return found


@settings(max_examples=40)
@given(runs=RUNS, fail_at=st.none() | st.integers(0, 6))
def test_preserving_runs_is_preserving_folios(
    runs: list[tuple[int, int, int]], fail_at: int | None
) -> None:
    """The same tree, the same errors and counts, the same pages for the tree."""
    folios = laid_out(runs, 9_000)
    trees = []
    for whole in (False, True):
        _, kernel = boot("128M")
        if fail_at is not None:
            calls = iter(range(1 << 30))
            kernel.pages.fail = lambda order, owner, calls=calls: next(calls) >= fail_at
        if whole:
            error, done = preserve_folio_runs(kernel, folios)
        else:
            error, done = 0, 0
            for pfn, order, count in folios:
                for at in range(pfn, pfn + (count << order), 1 << order):
                    try:
                        if not error:
                            kernel.kho_out.preserve_folio(at, order)
                            done += 1
                    except KernelError as refusal:
                        error = -refusal.errno
        kernel.pages.fail = None
        state = (error, done, preserved(kernel), kernel.pages.nr_free_pages())
        unpreserve_folio_runs(kernel, folios if not error else [])
        trees.append((*state, preserved(kernel)))
    assert trees[0] == trees[1]


@settings(max_examples=40)
@given(
    runs=RUNS,
    as_pages=st.booleans(),
    holes=st.sets(st.integers(0, 200), max_size=3),
    extra=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 4)), max_size=2),
)
def test_restoring_a_range_is_restoring_folios(
    runs: list[tuple[int, int, int]],
    as_pages: bool,
    holes: set[int],
    extra: list[tuple[int, int]],
) -> None:
    """The same pages in the same states, up to the first that is not there."""
    folios = laid_out(runs, 6_000)
    results = []
    for whole in (False, True):
        machine, kernel = boot("128M")
        singles = [
            (at, order)
            for pfn, order, count in folios
            for at in range(pfn, pfn + (count << order), 1 << order)
        ]
        for number, (at, order) in enumerate(singles):
            if number not in holes:
                kernel.kho_out.preserve_folio(at, order)
        for at, order in extra:  # what a broken predecessor could have preserved besides
            kernel.kho_out.preserve_folio((6_000 + at) >> order << order, order)
        successor = machine.kexec(kernel)
        done = []
        for pfn, order, count in folios:
            if whole:
                done.append(restore_folio_range(successor, pfn, count, order, as_pages=as_pages))
                continue
            good = 0
            for at in range(pfn, pfn + (count << order), 1 << order):
                if as_pages:
                    fine = successor.kho_in.restore_pages(at << 12, 1 << order) is not None
                else:
                    fine = successor.kho_in.restore_folio(at << 12) is not None
                if not fine:
                    break
                good += 1
            done.append(good)
        runs_now = [tuple(run) for run in successor.pages.pages.runs()]
        managed = [zone.managed_pages for zone in successor.pages.zones]
        results.append((done, runs_now, managed, list(successor.kho_in.restored)))
        for (pfn, order, _), good in zip(folios, done, strict=True):
            put_folio_range(successor, pfn, good, order if not as_pages else 0)
    assert results[0] == results[1]


def test_dropping_references_of_a_range() -> None:
    """Folios that somebody else holds stay, with a reference less."""
    _, kernel = boot()
    runs = kernel.alloc_folios(64, 1, movable=True)
    free = kernel.pages.nr_free_pages()
    first, count = max(runs, key=lambda run: run[1])
    assert count > 8
    kernel.pages.get_page(first + 2)
    kernel.pages.get_page(first + 10)
    put_folio_range(kernel, first, count, 1)
    assert kernel.pages.nr_free_pages() == free + 2 * count - 4
    assert kernel.page(first + 2).refcount == kernel.page(first + 10).refcount == 1
    put_folio_range(kernel, first, count, 1)
    assert kernel.pages.nr_free_pages() == free + 2 * count
    assert sum("Bad page state" in line for line in kernel.messages) == count - 2


def test_the_log_of_what_was_restored() -> None:
    """A list of blocks to those who read it, and runs to those who can."""
    log = RestoredLog([(8, 0), (9, 0), (16, 2)])
    log.append_run(20, 2, 3)
    log.append_run(0, 0, 0)
    blocks = [(8, 0), (9, 0), (16, 2), (20, 2), (24, 2), (28, 2)]
    assert log == blocks
    assert log.runs == [(8, 0, 2), (16, 2, 4)]
    assert (len(log), log[0], log[-1], log[3]) == (6, (8, 0), (28, 2), (20, 2))
    assert (log[2:4], log[::-2], bool(log), bool(RestoredLog())) == (
        blocks[2:4],
        blocks[::-2],
        True,
        False,
    )
    with pytest.raises(IndexError):
        _ = log[6]


@settings(max_examples=60)
@given(runs=RUNS, far=st.booleans())
def test_records_by_runs(runs: list[tuple[int, int, int]], far: bool) -> None:
    """Written and read by runs, each record is what the layout says."""
    _, kernel = boot()
    folios = laid_out(runs, 1 << (50 if far else 12))
    cached, pgoff = [], 0
    for pfn, order, count in folios:
        pgoff = -(-pgoff >> order) << order
        cached.append(CacheRun(pgoff, pfn, order, count))
        pgoff += count << order
    expected = [
        MemfdLuoFolioSer(run.pfn + (n << run.order), 3, run.index + (n << run.order))
        for run in cached
        for n in range(run.nr_folios)
    ]
    area = vmalloc(kernel, len(expected) * 16)
    assert isinstance(area, VmStruct)
    write_records(kernel, area, cached, 3)
    assert area.read(0, len(expected) * 16) == b"".join(map(pack_memfd_luo_folio_ser, expected))
    seen = [
        MemfdLuoFolioSer(pfn + n * step, flags, index + n * step)
        for pfn, index, flags, step, count in read_records(kernel, area, len(expected))
        for n in range(count)
    ]
    assert seen == expected


@settings(max_examples=60)
@given(
    records=st.lists(
        st.tuples(st.integers(0, 1 << 52), st.integers(0, 4095), st.integers(0, (1 << 64) - 1))
        | st.tuples(st.integers(0, 6), st.just(3), st.integers(0, 6)),
        min_size=1,
        max_size=40,
    )
)
def test_any_records_are_read_as_they_stand(records: list[tuple[int, int, int]]) -> None:
    """Garbage, too: run by run it is the same list, without the holes."""
    _, kernel = boot()
    area = vmalloc(kernel, len(records) * 16)
    assert area is not None
    sers = [MemfdLuoFolioSer(pfn % (1 << 52), flags, index) for pfn, flags, index in records]
    area.write(0, b"".join(map(pack_memfd_luo_folio_ser, sers)))
    seen = [
        MemfdLuoFolioSer(pfn + n * step, flags, index + n * step)
        for pfn, index, flags, step, count in read_records(kernel, area, len(sers))
        for n in range(count)
    ]
    assert seen == [ser for ser in sers if ser.pfn]


@pytest.mark.parametrize("as_pages", [False, True])
@pytest.mark.parametrize("order", [2, 11])
@pytest.mark.parametrize(
    "switch",
    ["page_magic=off", "restore_clears_private=off", "restore_inits_refcounts=off",
     "restore_pages_compound=on", "restore_order_cap=on"],
)  # fmt: skip
def test_a_range_is_restored_as_the_release_restores(
    switch: str, order: int, as_pages: bool
) -> None:
    """With each way of restoring that a release can have, a range is its blocks one by one."""
    results = []
    for whole in (False, True):
        machine = Machine("128M", checks=False)
        kernel = machine.boot(f"7.3+{switch}", cmdline="kho=on")
        pfns = [(48 << 8) + (n << order) for n in range(3)]
        for pfn in pfns:
            kernel.kho_out.preserve_folio(pfn, order)
        successor = machine.kexec(kernel)
        if whole:
            done = restore_folio_range(successor, pfns[0], 3, order, as_pages=as_pages)
        else:
            done = 0
            for pfn in pfns:
                kho_in = successor.kho_in
                fine = (
                    kho_in.restore_pages(pfn << 12, 1 << order)
                    if as_pages
                    else kho_in.restore_folio(pfn << 12)
                )
                if fine is None:
                    break
                done += 1
        pages = [successor.page(pfn + n) for pfn in pfns for n in range(1 << order)]
        states = [(page.kind, page.refcount, page.compound) for page in pages]
        managed = [zone.managed_pages for zone in successor.pages.zones]
        private = dict(successor.pages.pages.private)
        results.append((done, states, managed, private))
    assert results[0] == results[1]
