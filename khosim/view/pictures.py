"""Pictures for papers and slides: memory maps, timelines and matrices as SVG or PNG.

Drawn with matplotlib, which is the extra ``khosim[pictures]``. Equal input gives equal SVG bytes:
no date is written, and element names do not depend on chance. Colours are told apart by people who
see few of them; each layer also has a row of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from khosim.checks.ranges import merged
from khosim.errors import InputError
from khosim.scenario.fields import size_text
from khosim.view.whole_file import whole_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from khosim.view.moment import Moment
    from khosim.view.recording import Recording

__all__ = (
    "PICTURES",
    "check_name",
    "matrix_picture",
    "memory_map_picture",
    "save_picture",
    "timeline_picture",
    "write_picture",
)

PICTURES = ("map", "timeline")
"""What ``khosim view`` can draw."""

SUFFIXES = (".svg", ".png")

COLOURS = {
    "ram": "#d9d9d9",
    "scratch": "#56b4e9",
    "reserved": "#0072b2",
    "held": "#999999",
    "incoming": "#e69f00",
    "preserved": "#009e73",
    "handover": "#d55e00",
    "image": "#cc79a7",
}
OUTCOME_COLOURS = {
    "right": "#009e73",
    "refused": "#56b4e9",
    "misread": "#d55e00",
    "panic": "#000000",
}
_ROWS = ("ram", "held", "scratch", "incoming", "preserved", "handover", "image")
_PER_INCH = 150
_LEAST = 1 / 800
"""Share of the width that a range has at least, so that a page can be seen."""


def check_name(path: str) -> None:
    """Refuse a file that cannot be drawn or written, before anything is played."""
    if Path(path).suffix not in SUFFIXES:
        raise InputError(path, f"a picture ends in {' or '.join(SUFFIXES)}")
    if not Path(path).absolute().parent.is_dir():
        raise InputError(path, "its folder does not exist")
    _figure(1, 1)


def write_picture(path: str | Path, what: str, story: Recording, moment: Moment) -> None:
    """Draw the map at ``moment``, or the timeline of ``story``, into a file."""
    figure = memory_map_picture(moment) if what == "map" else timeline_picture(story)
    save_picture(figure, path)


def memory_map_picture(moment: Moment) -> Figure:
    """Physical memory to scale, a row per layer, a panel per NUMA node."""
    ram = moment.layers["ram"]
    nodes = ram.owners
    figure, panels = _figure(len(nodes), 0.32 * len(_ROWS) + 0.75)
    names = np.array(ram.owner_names())
    for axes, node in zip(panels, nodes, strict=True):
        chosen = names == node
        low, high = int(ram.start[chosen].min()), int(ram.end[chosen].max())
        unit, suffix = _unit(high)
        for row, name in enumerate(_ROWS):
            layer = moment.layers[name]
            starts, ends = merged((layer.start, layer.end)) if len(layer) else (layer.start,) * 2
            starts, ends = np.clip(starts, low, high), np.clip(ends, low, high)
            inside = starts < ends
            widths = np.maximum(ends - starts, int((high - low) * _LEAST))[inside]
            bars = zip((starts[inside] / unit).tolist(), (widths / unit).tolist(), strict=True)
            axes.broken_barh(list(bars), (row - 0.4, 0.8), facecolors=COLOURS[name])
        axes.set_yticks(range(len(_ROWS)), _ROWS)
        axes.set_ylim(len(_ROWS) - 0.4, -0.6)
        axes.set_xlim(low / unit, high / unit)
        axes.set_xlabel(f"{node}: physical address in {suffix}")
        _plain(axes)
    panels[0].set_title(_title(moment), loc="left", fontsize=10)
    return figure


def timeline_picture(story: Recording) -> Figure:
    """The phases of all kernels along their events, a row per kernel."""
    phases = story.phases()
    generations = sorted({phase.generation for phase in phases})
    figure, (axes,) = _figure(1, 0.6 * len(generations) + 0.9)
    names = list(dict.fromkeys(phase.name for phase in phases))
    shades = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#999999")
    for phase in phases:
        row = generations.index(phase.generation)
        shade = shades[names.index(phase.name) % len(shades)]
        width = phase.end - phase.first
        axes.broken_barh([(phase.first, width)], (row - 0.35, 0.7), facecolors=shade)
        if width > len(story.events) / 12:
            where = (phase.first + width / 2, row)
            axes.annotate(phase.name, where, ha="center", va="center", fontsize=7, color="white")
    for moment in story.moments:
        if moment.stage == "jump":
            axes.axvline(moment.event, color="#d55e00", linewidth=1.2)
            axes.annotate(" jump", (moment.event, -0.5), fontsize=7, color="#d55e00")
    axes.set_yticks(range(len(generations)), [f"kernel {number}" for number in generations])
    axes.set_ylim(len(generations) - 0.5, -0.7)
    axes.set_xlim(0, max(1, len(story.events)))
    axes.set_xlabel("events")
    axes.set_title(story.title, loc="left", fontsize=10)
    _plain(axes)
    return figure


def matrix_picture(cells: Mapping[tuple[str, ...], str], *, title: str = "") -> Figure:
    """Who hands over to whom: ``cells[writer, reader]`` is a word of :data:`OUTCOME_COLOURS`."""
    writers = list(dict.fromkeys(writer for writer, _ in cells))
    readers = list(dict.fromkeys(reader for _, reader in cells))
    figure, (axes,) = _figure(1, 0.42 * len(writers) + 1.1)
    for row, writer in enumerate(writers):
        for column, reader in enumerate(readers):
            word = cells.get((writer, reader), "")
            colour = OUTCOME_COLOURS.get(word, "#bbbbbb")
            axes.broken_barh([(column - 0.47, 0.94)], (row - 0.45, 0.9), facecolors=colour)
            axes.annotate(word, (column, row), ha="center", va="center", fontsize=7, color="white")
    axes.set_xticks(range(len(readers)), readers)
    axes.set_yticks(range(len(writers)), writers)
    axes.set_ylim(len(writers) - 0.5, -0.5)
    axes.set_xlim(-0.5, len(readers) - 0.5)
    axes.set_ylabel("hands over")
    axes.set_xlabel("takes over")
    axes.set_title(title, loc="left", fontsize=10)
    _plain(axes)
    return figure


def save_picture(figure: Figure, path: str | Path) -> None:
    """Write an SVG or a PNG, by the name's end; it takes its place when it is whole."""
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise InputError(str(path), f"a picture ends in {' or '.join(SUFFIXES)}")
    from matplotlib import rc_context

    metadata: dict[str, Any] = {"Date": None} if target.suffix == ".svg" else {}
    with whole_file(target) as file, rc_context({"svg.hashsalt": "khosim"}):
        figure.savefig(file, format=target.suffix[1:], dpi=_PER_INCH, metadata=metadata)


def _figure(rows: int, inches: float) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        cause = "drawn with matplotlib, which is not there: pip install 'khosim[pictures]'"
        raise InputError("picture", cause) from None
    figure = Figure(figsize=(8, rows * inches), layout="constrained")
    panels = figure.subplots(rows, 1, squeeze=False)
    return figure, list(panels[:, 0])


def _plain(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.tick_params(axis="x", labelsize=8)


def _title(moment: Moment) -> str:
    preserved = size_text(moment.layers["preserved"].total_bytes)
    return (
        f"generation {moment.generation}, Linux {moment.release}: {moment.title}"
        f" ({preserved} preserved)"
    )


def _unit(high: int) -> tuple[int, str]:
    for shift, suffix in ((40, "TiB"), (30, "GiB")):
        if high >> shift >= 2:
            return 1 << shift, suffix
    return 1 << 20, "MiB"
