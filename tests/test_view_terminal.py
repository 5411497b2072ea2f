"""Views for the terminal, and the command: what they say, at which width, and wrong input."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khosim import Machine
from khosim.cli.main import main
from khosim.view.cells import RANK, bars, covered_bytes, shown_in_cells
from khosim.view.changes import changes
from khosim.view.moment import Layer
from khosim.view.pictures import matrix_picture, memory_map_picture, save_picture
from khosim.view.recording import Recording, recording
from khosim.view.terminal import console, diff_view, map_view, preserved_view, timeline_view

Ranges = list[tuple[int, int]]


@pytest.fixture(scope="module")
def story() -> Recording:
    """Two folios and a page are preserved on a machine of two nodes, and cross."""
    machine = Machine("128M", nodes=2)
    with recording(machine, "two nodes") as story:
        kernel = machine.boot(cmdline="kho=on kho_scratch=12M,4M,4M")
        first = kernel.alloc_folio(3, owner="guest a")
        second = kernel.alloc_folio(0, owner="guest b")
        kernel.kho_preserve_folio(first)
        kernel.kho_preserve_folio(second)
        kernel.kexec()
    return story


def _layer(ranges: Ranges, name: str = "held") -> Layer:
    start, end = (np.array(column, dtype=np.int64) for column in zip(*ranges, strict=True))
    count = len(ranges)
    return Layer(name, start, end, np.zeros(count, np.int8), np.zeros(count, np.int32), ("x",))


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=8),
    st.lists(st.integers(0, 70), min_size=2, max_size=9, unique=True),
)
def test_cells_cover_what_a_dumb_model_counts(starts_and_sizes: Ranges, edges: list[int]) -> None:
    """Byte by byte: how many of a cell's bytes are in any of the ranges."""
    ranges = sorted((start, start + size) for start, size in starts_and_sizes)
    edges.sort()
    expected = [
        sum(any(start <= at < end for start, end in ranges) for at in range(low, high))
        for low, high in pairwise(edges)
    ]
    assert covered_bytes(_layer(ranges), np.array(edges)).tolist() == expected


def test_every_letter_stands_for_memory_of_its_layer(story: Recording) -> None:
    """Where a cell is shown as preserved, something preserved is in it; likewise for all."""
    moment = next(moment for moment in story.moments if moment.stage == "jump")
    shown = set()
    for bar in bars(moment, 100):
        letters = shown_in_cells(moment, bar)
        assert len(letters) == len(bar.edges) - 1 <= 100
        for name in RANK:
            covered = covered_bytes(moment.layers[name], bar.edges)
            sign = {"image": "x", "handover": "t"}.get(name, name[0])
            at = [i for i, letter in enumerate(letters) if letter.lower() == sign]
            assert all(covered[at])
            shown.update(sign for _ in at)
    assert {"x", "s", "h"} <= shown


def _printed(show: Callable[[int], object], width: int) -> list[str]:
    file = io.StringIO()
    screen = console(file)
    screen.width = width
    screen.print(show(width))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_views_fit_and_are_plain_in_a_pipe(story: Recording, width: int) -> None:
    """No line is longer than the screen, and no escape codes are in a file."""
    last = story.moments[-1]
    views: list[Callable[[int], object]] = [
        lambda width: map_view(story.moments[2], width),
        lambda width: diff_view(story.moments[0], last),
        lambda width: preserved_view(story.moments[2]),
        lambda width: timeline_view(story, width),
    ]
    for view in views:
        lines = _printed(view, width)
        assert lines
        assert max(map(len, lines)) <= width
        assert not any("\x1b" in line for line in lines)


def test_the_map_has_a_part_for_each_node_and_a_legend(story: Recording) -> None:
    """Both nodes, the layers that are there, and how much they are."""
    jump = next(moment for moment in story.moments if moment.stage == "jump")
    text = "\n".join(_printed(lambda width: map_view(jump, width), 80))
    assert "node 0" in text
    assert "node 1" in text
    assert "about to jump" in text
    assert "S scratch: 24M in 4 ranges" in text
    assert "preserved, not restored yet" not in text


def test_preserved_is_told_by_order_and_owner(story: Recording) -> None:
    """A folio of order 3 is one block of 32 KiB, of its owner."""
    jump = next(moment for moment in story.moments if moment.stage == "jump")
    rows = [line.split() for line in _printed(lambda _: preserved_view(jump), 80)]
    assert any(row[:3] == ["3", "1", "32K"] for row in rows)
    assert any(row[-4:] == ["guest", "a", "1", "32K"] for row in rows)
    assert any(row[-4:] == ["guest", "b", "1", "4K"] for row in rows)


def test_changes_are_what_came_and_what_went(story: Recording) -> None:
    """A folio that is preserved comes to one layer and goes from none; backwards it goes."""
    booted = next(moment for moment in story.moments if moment.stage == "booted")
    jump = next(moment for moment in story.moments if moment.stage == "jump")
    came = [c for c in changes(booted, jump) if c.owner == "guest a" and c.layer == "preserved"]
    assert [(c.appeared, c.total_bytes) for c in came] == [(True, 32768)]
    went = [c for c in changes(jump, booted) if c.owner == "guest a" and c.layer == "preserved"]
    assert [(c.appeared, c.starts) for c in went] == [(False, came[0].starts)]
    assert changes(jump, jump) == []
    assert "nothing changed" in "\n".join(_printed(lambda _: diff_view(jump, jump), 80))


def test_the_timeline_names_violations(story: Recording) -> None:
    """What an invariant says stands below the phases."""
    assert _printed(lambda width: timeline_view(story, width), 80)[-1] == "every invariant holds"
    broken = Recording(Machine("64M"), "broken")
    kernel = broken.machine.boot(cmdline="kho=on")
    folio = kernel.alloc_folio(0, owner="guest")
    kernel.kho_preserve_folio(folio)
    broken.machine.load_successor(kernel)
    broken.machine.hardware.ram.write(folio.phys, b"\xff", by=(0, "device"))
    broken.machine.resume()
    broken.finish()
    assert broken.violations
    text = "\n".join(_printed(lambda width: timeline_view(broken, width), 80))
    assert broken.violations[0].invariant in text


@pytest.mark.parametrize("what", ["moments", "map", "diff", "preserved", "timeline"])
def test_the_command_shows_each(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each view of the small scenario is printed, 80 columns wide."""
    assert main(["view", what, "small", "--width", "80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["map", "small", "--at", "99"], "99"),
        (["map", "small", "--at", "x"], "'x'"),
        (["map", "small", "--at", "1,2"], "is not a moment"),
        (["diff", "small", "--at", "3"], "two moments"),
        (["map", "small", "--width", "9"], "9"),
        (["picture"], "'picture'"),
        (["map", "no-such"], "no-such"),
        (["diff", "small", "--out", "x.svg"], "text only"),
        (["map", "small", "--out", "x.gif"], ".svg"),
        (["map", "small", "--out", "/no/such/folder/x.svg"], "folder"),
    ],
)
def test_wrong_input_is_one_line(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2 and a line that names the cause."""
    assert main(["view", *argv]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert says in message


def test_pictures_are_files_with_equal_bytes(tmp_path: Path) -> None:
    """The same call gives the same SVG; a PNG is one; nothing else is left."""
    wanted = (("map", "a.svg"), ("map", "b.svg"), ("timeline", "c.png"))
    for what, name in wanted:
        assert main(["view", what, "small", "--out", str(tmp_path / name)]) == 0
    first, second, third = (tmp_path / name for _, name in wanted)
    assert first.read_bytes() == second.read_bytes()
    assert b"<svg" in first.read_bytes()[:500]
    assert third.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_map_has_a_panel_per_node(story: Recording) -> None:
    """Each panel spans its node; a page is wide enough to be seen."""
    jump = next(moment for moment in story.moments if moment.stage == "jump")
    figure = memory_map_picture(jump)
    assert [axes.get_xlabel().split(":")[0] for axes in figure.axes] == ["node 0", "node 1"]
    for axes in figure.axes:
        low, high = axes.get_xlim()
        for bars_drawn in axes.collections:
            for path in bars_drawn.get_paths():
                box = path.get_extents()
                assert box.width >= (high - low) / 801
                assert low <= box.x0 < high


def test_a_matrix_is_drawn_cell_by_cell(tmp_path: Path) -> None:
    """Each cell carries its word, so that colour is not needed."""
    cells = {("7.2", "7.3"): "right", ("7.2", "6.16"): "refused"}
    figure = matrix_picture(cells, title="two")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["right", "refused"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["7.3", "6.16"]
    save_picture(figure, tmp_path / "matrix.svg")
    assert (tmp_path / "matrix.svg").stat().st_size > 1000
