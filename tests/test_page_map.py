"""The memory map beside a dictionary with one entry for each page."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from khosim.kernel.page_map import ALLOCATED, INCOMING, RESERVED, PageMap, PageRun, PageState

PAGES = 48
STATES = [
    PageState(RESERVED, 0, False, "memblock"),
    PageState(ALLOCATED, 0, False, "user"),
    PageState(ALLOCATED, 2, True, "user"),
    PageState(ALLOCATED, 0, False, "kho"),
    PageState(INCOMING, 0, False, "predecessor"),
    PageState(INCOMING, 3, False, "predecessor"),
]
MAGIC = 0x4B484F50

places = st.integers(0, PAGES)
spans = st.tuples(places, places).map(lambda pair: (min(pair), max(pair)))
states = st.sampled_from(STATES)


def runs_of(pages: dict[int, PageState]) -> list[PageRun]:
    """The longest runs of equal neighbours."""
    runs: list[PageRun] = []
    for pfn in range(PAGES):
        state = pages.get(pfn)
        if state is None:
            continue
        if runs and runs[-1].end_pfn == pfn and runs[-1].state == state:
            runs[-1] = runs[-1]._replace(end_pfn=pfn + 1)
        else:
            runs.append(PageRun(pfn, pfn + 1, state))
    return runs


class MapMachine(RuleBasedStateMachine):
    """Drives a page map and a dictionary through the same calls."""

    def __init__(self) -> None:
        super().__init__()
        self.map = PageMap()
        self.pages: dict[int, PageState] = {}
        self.private: dict[int, int] = {}
        self.refs: dict[int, int] = {}

    def forget(self, start: int, end: int) -> None:
        for pfn in range(start, end):
            for plain in (self.pages, self.private, self.refs):
                plain.pop(pfn, None)

    @rule(span=spans, state=states)
    def set(self, span: tuple[int, int], state: PageState) -> None:
        self.map.set(*span, state)
        self.forget(*span)
        self.pages.update((pfn, state) for pfn in range(*span))

    @rule(pick=st.integers(0, PAGES), state=states)
    def set_a_run(self, pick: int, state: PageState) -> None:
        runs = runs_of(self.pages)
        if runs:
            start, end, _ = runs[pick % len(runs)]
            self.map.set(start, end, state)
            self.forget(start, end)
            self.pages.update(dict.fromkeys(range(start, end), state))

    @rule(runs=st.lists(st.tuples(spans, states), max_size=6))
    def set_each(self, runs: list[tuple[tuple[int, int], PageState]]) -> None:
        self.map.set_each((*span, state) for span, state in runs)
        for span, state in runs:
            self.forget(*span)
            self.pages.update(dict.fromkeys(range(*span), state))

    @rule(span=spans)
    def clear(self, span: tuple[int, int]) -> None:
        self.map.clear(*span)
        self.forget(*span)

    @rule(data=st.data())
    def add_many(self, data: st.DataObject) -> None:
        gaps = self.map.gaps(0, PAGES)
        pieces = [(pfn, pfn + 1) for start, end in gaps for pfn in range(start, end)]
        chosen = data.draw(st.lists(st.sampled_from(pieces), unique=True)) if pieces else []
        runs = [(start, end, data.draw(states)) for start, end in chosen]
        self.map.add_many(runs)
        self.pages.update((start, state) for start, _, state in runs)

    @rule(pfn=st.integers(0, PAGES - 1), value=st.integers(0, 9))
    def override(self, pfn: int, value: int) -> None:
        if pfn in self.pages:
            self.map.private[pfn] = self.private[pfn] = value
            self.map.refs[pfn] = self.refs[pfn] = value

    @invariant()
    def same_pages(self) -> None:
        runs = runs_of(self.pages)
        assert list(self.map.runs()) == runs
        assert len(self.map) == len(runs)
        assert list(zip(*self.map.columns(), strict=True)) == runs
        for pfn in range(-1, PAGES + 1):
            assert self.map.state(pfn) == self.pages.get(pfn)
            run = next((run for run in runs if run.start_pfn <= pfn < run.end_pfn), None)
            assert self.map.find(pfn) == run

    @invariant()
    def same_fields(self) -> None:
        assert self.map.private == self.private
        assert self.map.refs == self.refs
        for pfn in range(PAGES):
            state = self.pages.get(pfn)
            count = private = 0
            if state is not None:
                is_head = pfn % (1 << state.order) == 0
                count = 1 if state.kind != ALLOCATED or is_head else 0
                if state.kind == INCOMING and is_head:
                    private = MAGIC << 32 | state.order
            assert self.map.page_count(pfn) == self.refs.get(pfn, count)
            assert self.map.page_private(pfn, MAGIC) == self.private.get(pfn, private)

    @rule(span=spans)
    def look(self, span: tuple[int, int]) -> None:
        start, end = span
        inside = {pfn: state for pfn, state in self.pages.items() if start <= pfn < end}
        assert self.map.overlapping(start, end) == runs_of(inside)
        covered: list[int] = []
        for low, high in self.map.gaps(start, end):
            assert low < high
            assert not covered or covered[-1] < low - 1
            covered += range(low, high)
        assert covered == [pfn for pfn in range(start, end) if pfn not in self.pages]


MapMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=30)
TestMap = MapMachine.TestCase


@settings(max_examples=60)
@given(st.data())
def test_many_runs_at_once_equal_single_sets(data: st.DataObject) -> None:
    """More runs than are set one by one: in any order, beside what is there, empty ones too."""
    pieces = data.draw(st.permutations(range(100)))
    sizes = data.draw(st.lists(st.integers(0, 8), min_size=100, max_size=100))
    runs = [(8 * at, 8 * at + sizes[at], STATES[at % 2]) for at in pieces]
    old = [(800 + 8 * at, 800 + 8 * at + 8, STATES[at % 3]) for at in range(5)]
    whole, single = PageMap(), PageMap()
    for page_map in (whole, single):
        for run in old:
            page_map.set(*run)
    whole.add_many(runs)
    for run in runs:
        single.set(*run)
    assert list(whole.runs()) == list(single.runs())


def test_terabytes_in_one_state_are_one_run() -> None:
    """Neighbouring blocks of one state cost as much as one of them."""
    page_map = PageMap()
    for tebibyte in (0, 2, 1, 3):
        page_map.set(tebibyte << 28, (tebibyte + 1) << 28, STATES[0])
    assert list(page_map.runs()) == [PageRun(0, 4 << 28, STATES[0])]
    page_map.clear(5, 6)
    assert [run[:2] for run in page_map.runs()] == [(0, 5), (6, 4 << 28)]


@pytest.mark.parametrize("nr_overrides", [3, 40])
def test_clearing_forgets_overrides_whatever_there_are(nr_overrides: int) -> None:
    """Few overrides in a long range and many beside a short one are forgotten alike."""
    page_map = PageMap()
    page_map.set(0, 100, STATES[1])
    for pfn in range(nr_overrides):
        page_map.private[pfn] = page_map.refs[pfn] = 7
    page_map.clear(1, 11)
    kept = {pfn: 7 for pfn in range(nr_overrides) if not 1 <= pfn < 11}
    assert page_map.private == kept
    assert page_map.refs == kept
