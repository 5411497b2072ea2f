"""What tracking preserved memory costs, against a radix tree in C that is fed page by page."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Context, Record, best_of, best_of_each
from khosim import Machine
from khosim.kernel.kernel import Kernel
from khosim.kernel.kho_radix import KhoRadixTree

__all__ = ("tracking",)

_PAGE_SHIFT = 12
_TIB_PAGES = 1 << (40 - _PAGE_SHIFT)
_MILLION = 1_000_000
_GROWTH_GIB = (1, 16, 256, 1024, 4096)


def tracking(context: Context) -> Iterator[Record]:
    """Preserve and walk: one range of 1 TiB, and a million scattered pages in one call."""
    yield from _range(context)
    yield from _scattered(context)


def _range(context: Context) -> Iterator[Record]:
    with Machine("16T", nodes=1, checks=False) as machine:
        yield from _range_on(machine.boot(cmdline="kho=on"), context)


def _range_on(kernel: Kernel, context: Context) -> Iterator[Record]:
    def preserve(nr_pages: int) -> None:
        kernel.kho_preserve_pages(nr_pages, nr_pages)
        if _walked_pages(kernel) < nr_pages:
            raise AssertionError("the walk lost pages")
        kernel.kho_unpreserve_pages(nr_pages, nr_pages)

    native = context.native
    if native is None:
        yield Record(
            name="tracking.range", baseline="C, page by page", limit=0.1, note=context.why_no_native
        )
    else:
        measured, against = best_of_each(
            lambda: preserve(_TIB_PAGES),
            lambda: native.feed_run(_TIB_PAGES, _TIB_PAGES),
            rounds=context.rounds(3),
        )
        yield Record(
            name="tracking.range",
            baseline="C, page by page",
            measured=measured,
            against=against,
            limit=0.1,
            note="1 TiB as one range of pages",
        )
    one_gib = best_of(lambda: preserve(1 << (30 - _PAGE_SHIFT)), rounds=context.rounds(20))
    for gib in _GROWTH_GIB[1:]:
        nr_pages = gib << (30 - _PAGE_SHIFT)
        seconds = best_of(partial(preserve, nr_pages), rounds=context.rounds(20))
        yield Record(
            name=f"tracking.range.grow.{gib}G",
            baseline="the same for 1G",
            measured=seconds,
            against=one_gib,
        )


def _scattered(context: Context) -> Iterator[Record]:
    native = context.native
    for tib in (1, 16):
        pfns = _scattered_pfns(tib)
        name = "tracking.scattered" if tib == 1 else f"tracking.scattered.grow.{tib}T"
        limit = 5.0 if tib == 1 else None
        if native is None:
            yield Record(
                name=name, baseline="C, page by page", limit=limit, note=context.why_no_native
            )
            continue
        unsigned = pfns.astype(np.uint64)
        measured, against = best_of_each(
            partial(_preserve_scattered, pfns),
            partial(native.feed_pfns, unsigned),
            rounds=context.rounds(10 if tib == 1 else 3),
        )
        yield Record(
            name=name,
            baseline="C, page by page",
            measured=measured,
            against=against,
            limit=limit,
            note=f"{len(pfns)} order-0 pages of {tib} TiB, machine and boot included",
        )


def _scattered_pfns(tib: int) -> npt.NDArray[np.int64]:
    generator = np.random.default_rng(seed=tib)
    low, high = 1 << (33 - _PAGE_SHIFT), tib * _TIB_PAGES - (1 << (33 - _PAGE_SHIFT))
    pfns = np.unique(generator.integers(low, high, size=_MILLION + _MILLION // 50))
    return generator.permutation(pfns)[:_MILLION]


def _preserve_scattered(pfns: npt.NDArray[np.int64]) -> None:
    with Machine("16T", nodes=1, checks=False) as machine:
        kernel = machine.boot(cmdline="kho=on")
        nr_keys, phys_sum = _walked_keys(kernel)  # boot has preserved a few pages of its own
        kernel.kho_preserve_folios(pfns)
        expected = nr_keys + len(pfns), phys_sum + (int(pfns.sum()) << _PAGE_SHIFT)
        if _walked_keys(kernel) != expected:
            raise AssertionError("the walk lost pages")


def _walked_keys(kernel: Kernel) -> tuple[int, int]:
    """How many keys there are, and the sum of their addresses, as the yardstick counts them."""
    nr_keys = phys_sum = 0
    tree = kernel.kho_out.tree
    assert isinstance(tree, KhoRadixTree)
    for counts, values in tree.walk_arrays():
        firsts, lengths = values[counts > 0].astype(np.int64), counts[counts > 0]
        order_bit = np.frexp(firsts.astype(np.float64))[1] - 1
        blocks = firsts ^ (np.int64(1) << order_bit)
        sums = (lengths * blocks + lengths * (lengths - 1) // 2) << (52 - order_bit)
        nr_keys += int(lengths.sum())
        phys_sum += int(sums.sum()) << _PAGE_SHIFT
    return nr_keys, phys_sum


def _walked_pages(kernel: Kernel) -> int:
    total = 0
    for nr_keys, key in kernel.kho_out.tree.walk():
        if nr_keys:
            total += nr_keys << (64 - _PAGE_SHIFT - (key.bit_length() - 1))
    return total
