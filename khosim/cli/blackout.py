"""``khosim blackout``: how long guests stand still, by memory, orders, sessions, devices, release.

Without ``--scenario`` a sweep over hosts; with it, every step of a scenario's handovers priced.
Costs have defaults with their sources, and a file replaces them. See ``docs/blackout.md``.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from khosim.errors import InputError
from khosim.printable import printable

if TYPE_CHECKING:
    from khosim.blackout.costs import Costs
    from khosim.blackout.estimate import Estimate

__all__ = ("HELP", "configure", "run")

HELP = (
    "Estimate how long guests stand still in a live update: steps counted in simulated runs, times "
    "costs that a file can replace. Exit status: 0; 2 wrong input."
)

_MEMORY = ("16G", "64G", "256G", "1T", "4T")
_SESSIONS, _DEVICES = (1, 16, 64), (0, 16, 128)
_RELEASES = ("6.18", "7.0", "7.1", "7.3")
_LEAST_MEMORY, _MOST_MEMORY = 1 << 30, 1 << 46
_MOST_SESSIONS, _MOST_DEVICES, _MOST_CPUS = 128, 512, 8192


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("--scenario", metavar="SCENARIO", help="price the handovers of a scenario, step by step")
    add("--costs", metavar="FILE", help="costs in TOML instead of the defaults")
    add("--print-costs", action="store_true", help="print the costs as such a file, with sources")
    add("--compare", action="store_true", help="published figures beside the model's")
    add("--cpus", metavar="N", help="CPUs of the host, instead of what the costs say")
    add("--json", action="store_true", help="one JSON object instead of tables")
    host = parser.add_argument_group("the host that the sweep varies")
    host.add_argument("--memory", metavar="SIZE", default="256G", help="guest memory in all")
    host.add_argument("--order", metavar="N", default="9", help="folios of guests: 0, 9 or 18")
    host.add_argument("--sessions", metavar="N", default="16", help="sessions, a guest in each")
    host.add_argument("--devices", metavar="N", default="16", help="device files in them")
    host.add_argument("--release", metavar="R", default="7.3", help="kernel release, such as 7.3")


def run(args: argparse.Namespace) -> int:
    """Print what was asked for: 0."""
    from khosim.blackout.costs import Costs, costs_text, read_costs

    costs = read_costs(args.costs) if args.costs is not None else Costs.defaults()
    if args.cpus is not None:
        costs = costs.with_cpus(_number("--cpus", args.cpus, 1, _MOST_CPUS))
    if args.print_costs:
        print(costs_text(costs), end="")
    elif args.compare:
        _compare(costs, as_json=args.json)
    elif args.scenario is not None:
        _scenario(args.scenario, costs, as_json=args.json)
    else:
        _sweep(args, costs)
    return 0


def _say(lines: list[str]) -> None:
    print(printable("\n".join(lines)), flush=True)


def _compare(costs: Costs, *, as_json: bool) -> None:
    from khosim.blackout.published import comparisons
    from khosim.cli import blackout_text

    rows = comparisons(costs)
    if as_json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
    else:
        _say(blackout_text.comparison_table(rows))


def _scenario(source: str, costs: Costs, *, as_json: bool) -> None:
    from khosim.blackout.estimate import count_handovers, estimate
    from khosim.blackout.tally import Tally
    from khosim.cli import blackout_text
    from khosim.scenario.library import load_scenario
    from khosim.scenario.play import Player

    scenario = load_scenario(source)
    tally = Tally(scenario.page_size)
    player = Player(scenario, listener=tally)
    for _ in player.generations():
        pass
    priced = [estimate(counted, costs) for counted in count_handovers(player.result, tally)]
    if as_json:
        facts = {"scenario": scenario.name, "cpus": costs.host.cpus}
        print(json.dumps({**facts, "handovers": [it.as_json() for it in priced]}, indent=1))
        return
    lines = blackout_text.heading(costs, scenario.name)
    for i, one in enumerate(priced, 1):
        lines += blackout_text.breakdown(i, one)
    _say(lines if priced else [*lines, "no successor takes anything over: no blackout to estimate"])


def _sweep(args: argparse.Namespace, costs: Costs) -> None:
    from khosim.blackout.estimate import estimate
    from khosim.blackout.sweep import ORDERS, Line, Point, line
    from khosim.cli import blackout_text
    from khosim.kernel.release import find_release
    from khosim.units import parse_size

    memory = parse_size(args.memory, what="--memory")
    if not _LEAST_MEMORY <= memory <= _MOST_MEMORY:
        raise InputError("--memory", f"{args.memory} is not from 1G to 64T")
    order = _number("--order", args.order, 0, ORDERS[-1])
    if order not in ORDERS:
        raise InputError("--order", f"{order} is none of {', '.join(map(str, ORDERS))}")
    base = Point(
        order,
        _number("--sessions", args.sessions, 0, _MOST_SESSIONS),
        _number("--devices", args.devices, 0, _MOST_DEVICES),
        args.release,
    )
    find_release(base.release)
    if base.devices and not base.sessions:
        raise InputError("--devices", "devices are held in sessions: there is none")
    lines: dict[Point, Line] = {}
    rows: list[dict[str, Any]] = []

    def price(axis: str, value: Any, point: Point, len_bytes: int) -> Estimate:
        if point not in lines:
            lines[point] = line(point)
        priced = estimate(lines[point].at(len_bytes), costs)
        facts = priced.as_json()
        for left_out in ("parts", "blackout_events", "generation"):
            del facts[left_out]
        host = {"memory_bytes": len_bytes, "order": point.order, "sessions": point.sessions}
        rows.append({"axis": axis, "value": value, **host, "devices": point.devices, **facts})
        return priced

    by_memory = [
        (size, [price("memory", size, _with(base, order=each), size) for each in ORDERS])
        for size in sorted({*map(parse_size, _MEMORY), memory})
    ]
    axes: dict[str, list[tuple[str, Estimate]]] = {}
    values = {"sessions": _SESSIONS, "devices": _DEVICES, "release": _RELEASES}
    for axis, known in values.items():
        own = getattr(base, axis)
        for value in dict.fromkeys((*known, own)) if axis == "release" else sorted({*known, own}):
            point = _with(base, **{axis: value})
            if point.devices and not point.sessions:
                continue
            row = (str(value), price(axis, value, point, memory))
            axes.setdefault(axis, []).append(row)
    if args.json:
        print(json.dumps({"cpus": costs.host.cpus, "rows": rows}, indent=1))
        return
    kernel = f"Linux {base.release}, {base.sessions} sessions, {base.devices} devices"
    text = [*blackout_text.heading(costs, kernel), ""]
    text += blackout_text.memory_table(ORDERS, by_memory)
    where = f"{args.memory} in blocks of order {order}"
    for axis, found in axes.items():
        text += ["", f"by {axis}, {where}", *blackout_text.stage_table(axis, found)]
    text.append("(to 6.18 there are no sessions: plain folios, and no guest to resume)")
    _say(text)


def _with(point: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(point, **changes)


def _number(option: str, text: str, low: int, high: int) -> int:
    shown = text if len(text) <= 30 else f"{text[:30]}..."
    if not text.isascii() or not text.isdigit() or len(text) > 30 or not low <= int(text) <= high:
        raise InputError(option, f"{shown!r} is not a whole number from {low} to {high}")
    return int(text)
