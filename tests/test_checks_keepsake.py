"""What memory held, compared with what it holds, beside a plain copy of all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim.checks import keepsake
from khosim.checks.keepsake import Keepsake
from khosim.checks.ranges import merged, minus
from khosim.machine.ram import Ram

if TYPE_CHECKING:
    from khosim.checks.ranges import Ranges

PAGE = 4096
NR_PAGES = 64
BEFORE, AFTER = (0, "before"), (1, "after")

runs = st.lists(st.tuples(st.integers(0, NR_PAGES - 9), st.integers(1, 8)), max_size=5)
contents = st.sampled_from([b"\0", b"a", b"b" * 5000, b"c" * 90_000])
writes = st.lists(st.tuples(st.integers(0, NR_PAGES * PAGE - 1), contents), max_size=8)


def ranges_of(drawn: list[tuple[int, int]]) -> Ranges:
    """Return (first, pages) pairs as a canonical set."""
    starts = np.array([start for start, _ in drawn], dtype=np.int64)
    return merged((starts, starts + np.array([count for _, count in drawn], dtype=np.int64)))


def apply(ram: Ram, drawn: list[tuple[int, bytes]], by: tuple[int, str]) -> None:
    """Write; a write of one zero byte wipes the whole page instead."""
    for phys, data in drawn:
        if data == b"\0":
            ram.zero(phys // PAGE * PAGE, PAGE, by)
        else:
            ram.write(phys, data[: NR_PAGES * PAGE - phys], by)


@pytest.mark.parametrize(
    ("few_pages", "copy_bytes"), [(256, 1 << 20), (0, 1 << 20), (0, 0)], ids=str
)
@settings(max_examples=50)
@given(kept=runs, given_up=runs, before=writes, after=writes)
def test_changes_are_those_of_a_plain_copy(
    few_pages: int,
    copy_bytes: int,
    kept: list[tuple[int, int]],
    given_up: list[tuple[int, int]],
    before: list[tuple[int, bytes]],
    after: list[tuple[int, bytes]],
) -> None:
    """However content is kept, changed pages are those whose bytes differ, within what is asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keepsake, "_FEW_PAGES", few_pages)
        patch.setattr(keepsake, "_COPY_BYTES", copy_bytes)
        ram = Ram(NR_PAGES * PAGE)
        apply(ram, before, BEFORE)
        ranges = ranges_of(kept)
        memento, copy = Keepsake(ram, ranges, PAGE), ram.read(0, NR_PAGES * PAGE)
        assert memento.changed(ranges) == []
        apply(ram, after, AFTER)
        asked = minus(ranges, ranges_of(given_up))
        watched = [
            pfn
            for start, end in zip(*(part.tolist() for part in asked), strict=True)
            for pfn in range(start, end)
        ]
        assert memento.changed(asked) == [
            pfn
            for pfn in watched
            if copy[pfn * PAGE : (pfn + 1) * PAGE] != ram.read(pfn * PAGE, PAGE)
        ]


def test_ranges_beyond_ram() -> None:
    """A set that names what is no memory is watched as far as there is memory."""
    ram = Ram(3 * PAGE + 100)
    beyond = (np.array([2, 1 << 50], dtype=np.int64), np.array([9, 1 << 51], dtype=np.int64))
    for few_pages in (0, 1 << 60):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(keepsake, "_FEW_PAGES", few_pages)
            memento = Keepsake(ram, beyond, PAGE)
            assert memento.changed(beyond) == []
            ram.write(2 * PAGE, b"x", AFTER)
            ram.write(3 * PAGE + 99, b"x", AFTER)
            assert memento.changed(beyond) == [2, 3]
            ram.reset()
