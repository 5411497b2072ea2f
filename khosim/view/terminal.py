"""A recording in the terminal: memory maps, what changed, what is preserved, the phases.

Each function gives something that rich prints, at any width from 60 columns on. Nothing is told by
colour alone, so that a pipe and a terminal without colours lose nothing.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from khosim.printable import printable
from khosim.scenario.fields import size_text
from khosim.view.cells import RANK, SIGNS, bars, shown_in_cells
from khosim.view.changes import changes

if TYPE_CHECKING:
    from typing import IO

    from rich.console import RenderableType

    from khosim.view.moment import Layer, Moment
    from khosim.view.recording import Recording

__all__ = ("console", "diff_view", "map_view", "moments_view", "preserved_view", "timeline_view")

COLOURS = {
    "image": "magenta",
    "handover": "red",
    "preserved": "green",
    "incoming": "yellow",
    "scratch": "cyan",
    "reserved": "blue",
    "held": "blue",
    "ram": "bright_black",
}
ROWS_OF_A_NODE = 4
_ADDRESS = 15
_NAMES = {
    "image": "next kernel's image",
    "handover": "handover: FDT, map, blobs",
    "preserved": "preserved",
    "incoming": "preserved, not restored yet",
    "scratch": "scratch",
    "reserved": "reserved in memblock",
    "held": "held by kernel or users",
}


def console(file: IO[str] | None = None) -> Console:
    """Where views are printed: in colour on a terminal, 80 columns wide where nobody knows."""
    return Console(file=file, highlight=False, markup=False, emoji=False)


def map_view(moment: Moment, width: int) -> RenderableType:
    """All of memory at one moment: a few rows of cells for each node, and what they mean."""
    cells = max(16, width - _ADDRESS - 1)
    parts: list[RenderableType] = [_headline(moment)]
    seen: set[str] = set()
    for bar in bars(moment, cells * ROWS_OF_A_NODE):
        letters = shown_in_cells(moment, bar)
        seen.update(letters.lower())
        size = size_text(int(bar.edges[1] - bar.edges[0]))
        parts.append(Text(f"{bar.title}, {size} a letter", style="bold"))
        for first in range(0, len(letters), cells):
            row = Text(f"{int(bar.edges[first]):#{_ADDRESS - 1}x} ")
            for letter in letters[first : first + cells]:
                row.append(
                    letter, style=COLOURS[_LAYER_OF[letter.lower()]] if letter != " " else ""
                )
            parts.append(row)
    parts.append(_legend(moment, seen))
    return Group(*parts)


_LAYER_OF = {sign: name for name, sign in SIGNS.items() if name}


def _headline(moment: Moment) -> Text:
    text = f"generation {moment.generation}, Linux {moment.release}: {moment.title}"
    return Text(printable(f"{text} (moment {moment.index}, event {moment.event:,})"), style="bold")


def _legend(moment: Moment, seen: set[str]) -> Table:
    table = Table.grid(padding=(0, 1))
    for name in RANK:
        layer = moment.layers[name]
        if SIGNS[name] in seen:
            what = f"{_NAMES[name]}: {_amount(layer)}"
            table.add_row(Text(SIGNS[name].upper(), style=COLOURS[name]), what)
    table.add_row(SIGNS["ram"], "free")
    table.add_row("", "a capital fills half of its cell or more; the rarest thing is shown")
    return table


def _amount(layer: Layer) -> str:
    ranges = f"{len(layer):,} range" + ("s" if len(layer) != 1 else "")
    return f"{size_text(layer.total_bytes)} in {ranges}"


def preserved_view(moment: Moment) -> RenderableType:
    """What a handover preserves, by order and by owner, and the scratch areas."""
    layer = moment.layers["preserved"]
    scratch = Table(title="scratch areas", title_justify="left", box=None, pad_edge=False)
    scratch.add_column("start", justify="right")
    scratch.add_column("size", justify="right")
    areas = moment.layers["scratch"]
    for start, end in zip(areas.start.tolist(), areas.end.tolist(), strict=True):
        scratch.add_row(f"{start:#x}", size_text(end - start))
    if not len(layer):
        return Group(_headline(moment), scratch, Text("nothing is preserved"))
    orders = layer.order.astype(np.int64)
    size = (layer.end - layer.start) >> _page_shift(moment) >> orders
    by_order, by_owner = Table(box=None, pad_edge=False), Table(box=None, pad_edge=False)
    for table, what in ((by_order, "order"), (by_owner, "owner")):
        table.add_column(what, justify="right" if what == "order" else "left", overflow="fold")
        table.add_column("blocks", justify="right")
        table.add_column("bytes", justify="right")
    lengths = layer.end - layer.start
    for order in np.unique(orders).tolist():
        chosen = orders == order
        by_order.add_row(
            str(order), f"{int(size[chosen].sum()):,}", size_text(int(lengths[chosen].sum()))
        )
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for owner, blocks, length in zip(
        layer.owner_names(), size.tolist(), lengths.tolist(), strict=True
    ):
        totals[owner][0] += blocks
        totals[owner][1] += length
    for owner, (blocks, length) in sorted(totals.items(), key=lambda item: -item[1][1]):
        by_owner.add_row(printable(owner), f"{blocks:,}", size_text(length))
    both = Table.grid(padding=(0, 4))
    both.add_row(by_order, by_owner)
    return Group(_headline(moment), scratch, Text("preserved", style="italic"), both)


def _page_shift(moment: Moment) -> int:
    assert moment.handover is not None
    return moment.handover.page_size.bit_length() - 1


def diff_view(before: Moment, after: Moment) -> RenderableType:
    """What came and what went between two moments, largest first in each layer."""
    table = Table(box=None, pad_edge=False)
    for name, justify in (("", "left"), ("layer", "left"), ("owner", "left"), ("bytes", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]  # a literal to mypy
    table.add_column("first range", justify="right", no_wrap=True)
    table.add_column("ranges", justify="right")
    found = sorted(changes(before, after), key=lambda it: (it.layer, it.appeared, -it.total_bytes))
    for change in found:
        sign, style = ("+", "green") if change.appeared else ("-", "red")
        table.add_row(
            Text(sign, style=style),
            change.layer,
            printable(change.owner),
            size_text(change.total_bytes),
            f"{change.starts[0]:#x}",
            f"{len(change.starts):,}",
        )
    ends = (Text("from ") + _headline(before), Text("to   ") + _headline(after))
    return Group(*ends, table if found else Text("nothing changed"))


def moments_view(story: Recording) -> RenderableType:
    """The moments that can be shown, by number."""
    table = Table(box=None, pad_edge=False)
    for name in ("moment", "generation", "event"):
        table.add_column(name, justify="right")
    table.add_column("what")
    for moment in story.moments:
        where = (str(moment.index), str(moment.generation), f"{moment.event:,}")
        table.add_row(*where, printable(moment.title))
    return table


def timeline_view(story: Recording, width: int) -> RenderableType:
    """Every phase of every kernel with its events, as bars on one scale for all."""
    phases = story.phases()
    most = max((phase.end - phase.first for phase in phases), default=1)
    named = max((len(phase.name) for phase in phases), default=0)
    table = Table(box=None, pad_edge=False)
    table.add_column("kernel", justify="right")
    table.add_column("phase", no_wrap=True)
    table.add_column("events", justify="right")
    table.add_column("")
    room = max(8, width - named - 20)
    last = None
    for phase in phases:
        count = phase.end - phase.first
        bar = "#" * max(1, round(room * count / most))
        kernel = str(phase.generation) if phase.generation != last else ""
        last = phase.generation
        table.add_row(kernel, printable(phase.name), f"{count:,}", Text(bar[:room], style="cyan"))
    parts: list[RenderableType] = [Text(printable(story.title), style="bold"), table]
    if story.violations:
        parts.append(Text("violations", style="bold red"))
        parts.extend(Text(printable(str(violation))) for violation in story.violations)
    else:
        parts.append(Text("every invariant holds"))
    return Group(*parts)
