"""How long guests stand still, for people: plain text of at most 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import wrap

from khosim.blackout.costs import Costs
from khosim.blackout.estimate import CAVEAT, Estimate
from khosim.blackout.published import Comparison
from khosim.blackout.tally import BLACKOUT, STAGES
from khosim.scenario.fields import count_text, size_text

__all__ = (
    "breakdown",
    "comparison_table",
    "heading",
    "memory_table",
    "short",
    "stage_table",
    "time_text",
)

_WIDTH = 80
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def time_text(seconds: float) -> str:
    """Three digits and a unit: ``"1.87 s"``, ``"36.1 ms"``, ``"0"``."""
    for size, unit in _UNITS:
        if seconds >= size * 0.9995:
            value = seconds / size
            digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
            return f"{value:.{digits}f} {unit}"
    return "0"


def short(estimates: Sequence[Estimate]) -> list[str]:
    """A few lines for the end of a run."""
    if not estimates:
        return []
    lines = ["", "blackout, estimated"]
    for i, priced in enumerate(estimates, 1):
        events = count_text(priced.counted.events, "event")
        lines += wrap(
            f"handover {i}: guests stand still {time_text(priced.blackout_seconds)}, {events} of "
            f"the trace: {_split(priced, BLACKOUT)}",
            _WIDTH,
            initial_indent="  ",
            subsequent_indent="    ",
        )
        before = [stage for stage in STAGES if stage not in BLACKOUT]
        lines.append(f"    before that, while they run: {_split(priced, before)}")
    return lines + wrap(f"({CAVEAT}: khosim blackout)", _WIDTH, initial_indent="  ",
                        subsequent_indent="  ")


def _split(priced: Estimate, stages: Iterable[str]) -> str:
    return ", ".join(f"{stage} {time_text(priced.stage_seconds(stage))}" for stage in stages)


def breakdown(number: int, priced: Estimate) -> list[str]:
    """Every count of one handover with its cost."""
    counted = priced.counted
    orders = ", ".join(f"{order}: {count:,}" for order, count in counted.by_order.items())
    size = size_text(counted.preserved_bytes)
    lines = ["", f"handover {number}, to Linux {counted.release}: {size}"]
    lines += wrap(f"blocks by order {orders}", _WIDTH, initial_indent="  ", subsequent_indent="  ")
    lines.append(f"  {'stage':<9} {'cost':<42} {'count':>13} {'time':>10}")
    for part in priced.parts:
        item = part.item
        name = f"{item.cost} {item.handler}".rstrip()
        count = f"{part.number:,}" if isinstance(part.number, int) else f"{part.number:,.2f}"
        shown = name if len(name) <= 42 else f"{name[:39]}..."
        lines.append(
            f"  {item.stage:<9} {shown:<42} {count:>13} {time_text(part.seconds):>10}"
        )
    lines.append(f"  guests run    {time_text(priced.running_seconds)}")
    events = count_text(counted.events, "event")
    lines.append(f"  blackout      {time_text(priced.blackout_seconds)}, {events} of the trace")
    return lines


def memory_table(
    orders: Sequence[int], rows: Sequence[tuple[int, Sequence[Estimate]]]
) -> list[str]:
    """Guest memory against order: time while guests run, and blackout."""
    names = {0: "4 KiB folios", 9: "2 MiB folios", 18: "1 GiB blocks"}
    head = f"{'':8}" + "".join(f"{names[order]:^24}" for order in orders)
    under = f"{'memory':<8}" + f"{'guests run':>12}{'blackout':>12}" * len(orders)
    lines = [head.rstrip(), under]
    for len_bytes, estimates in rows:
        cells = "".join(
            f"{time_text(it.running_seconds):>12}{time_text(it.blackout_seconds):>12}"
            for it in estimates
        )
        lines.append(f"{size_text(len_bytes):<8}{cells}")
    return lines


def stage_table(axis: str, rows: Sequence[tuple[str, Estimate]]) -> list[str]:
    """One axis: every stage of each row, and the blackout."""
    lines = [f"{axis:<8}" + "".join(f"{stage:>9}" for stage in STAGES) + f"{'blackout':>9}"]
    for label, priced in rows:
        cells = "".join(f"{time_text(priced.stage_seconds(stage)):>9}" for stage in STAGES)
        lines.append(f"{label:<8}{cells}{time_text(priced.blackout_seconds):>9}")
    return lines


def comparison_table(rows: Sequence[Comparison]) -> list[str]:
    """Published figures beside the model's."""
    lines = [f"{'':<42} {'source':<14} {'published':>13} {'model':>7}"]
    for row in rows:
        mark = "*" if row.is_input else " "
        text = f"{row.what:<42} {row.source:<14} {row.published:>13} {time_text(row.seconds):>7}"
        lines.append((text + mark).rstrip())
    return [*lines, "* a default was set from this figure: it tests nothing"]


def heading(costs: Costs, what: str) -> list[str]:
    """What is priced, what the host is taken to be, and what the result is worth."""
    return wrap(f"{what}, {costs.host.cpus} CPUs: {CAVEAT}", _WIDTH)
