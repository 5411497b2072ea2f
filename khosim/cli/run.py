"""``khosim run [SCENARIO]``: boot, preserve, hand over for some generations, check every invariant.

What a scenario is stands in ``docs/scenarios.md``. The account is printed generation by
generation, or with ``--json`` as one object at the end; equal arguments give equal bytes.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from typing import TYPE_CHECKING

from khosim.errors import InputError
from khosim.printable import printable

if TYPE_CHECKING:
    from khosim.blackout.estimate import Estimate
    from khosim.blackout.tally import Tally
    from khosim.scenario.parse import Overrides
    from khosim.scenario.play import Player

__all__ = ("HELP", "configure", "run")

HELP = (
    "Boot a machine, preserve memory, hand over from kernel to kernel and check every invariant. "
    "Without SCENARIO: the cloud-host scenario. Exit status: 0 all holds; 1 an invariant or an "
    "expectation of the scenario does not; 2 wrong input."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add(
        "scenario",
        metavar="SCENARIO",
        nargs="?",
        help="name of a built-in scenario, or a TOML file; - for stdin",
    )
    add("--list", action="store_true", help="list the built-in scenarios")
    add("--show", action="store_true", help="print the text of a built-in scenario")
    add("--json", action="store_true", help="one JSON object instead of the account")
    add("--trace", metavar="FILE", help="write every event of every kernel to FILE, a line each")
    change = parser.add_argument_group("instead of what the scenario says")
    add = change.add_argument
    add("--seed", metavar="N", help="where contents and the adversarial allocator start")
    add("--release", metavar="R", help="kernel release of every generation, such as 7.3")
    add("--machine", metavar="CAPTURE", help="memory map and command line of a real capture")
    add("--ram", metavar="SIZE", help="RAM, such as 16G")
    add("--nodes", metavar="N", help="number of NUMA nodes")
    add("--generations", metavar="N", help="kernels in a row; the last table repeats")
    add(
        "--without",
        metavar="PIECE",
        action="append",
        default=[],
        help="leave a piece of live update out (several times for several): guest-memory, kvm, "
        "iommu, vfio, pci, snp",
    )
    add("--allocator", metavar="NAME", help="which free pages are handed out: linux, adversarial")


def run(args: argparse.Namespace) -> int:
    """Carry the scenario out: 0, or 1 where something does not hold."""
    from khosim.scenario.library import DEFAULT, builtin_scenarios, builtin_text, load_scenario

    if args.list:
        return _list(builtin_scenarios(), as_json=args.json)
    if args.show:
        print(builtin_text(args.scenario or DEFAULT), end="")
        return 0
    scenario = load_scenario(args.scenario or DEFAULT, overrides=_overrides(args))
    from khosim.blackout.tally import Tally
    from khosim.cli.trace_file import TraceFile
    from khosim.scenario.play import Player

    with ExitStack() as stack:
        listener = stack.enter_context(TraceFile(args.trace)) if args.trace else None
        player = Player(scenario, listener=listener)
        tally = Tally(scenario.page_size)
        player.machine.listen(tally)
        if args.json:
            for _ in player.generations():
                pass
        else:
            _tell(player, tally)
    if args.json:
        blackout = [priced.as_json() for priced in _priced(player, tally)]
        print(json.dumps({**player.result.as_json(), "blackout": blackout}, indent=1))
    return 0 if player.result.ok else 1


def _priced(player: Player, tally: Tally) -> list[Estimate]:
    from khosim.blackout.costs import Costs
    from khosim.blackout.estimate import count_handovers, estimate

    costs = Costs.defaults()
    return [estimate(counted, costs) for counted in count_handovers(player.result, tally)]


def _tell(player: Player, tally: Tally) -> None:
    from khosim.cli import blackout_text, run_text

    print(printable("\n".join(run_text.heading(player.scenario))))
    before = None
    for facts in player.generations():
        print(printable("\n".join(run_text.generation(facts, before))), flush=True)
        before = facts
    blackout = blackout_text.short(_priced(player, tally))
    print(printable("\n".join(run_text.verdict(player.result, blackout))))


def _list(scenarios: dict[str, str], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(scenarios, indent=1))
        return 0
    width = max(map(len, scenarios))
    for name, about in scenarios.items():
        print(f"{name:<{width}}  {about}")
    return 0


def _overrides(args: argparse.Namespace) -> Overrides:
    from khosim.scenario.model import MAX_GENERATIONS
    from khosim.scenario.parse import MAX_SEED, Overrides
    from khosim.simulator import ALLOCATORS

    if args.allocator is not None and args.allocator not in ALLOCATORS:
        cause = f"{args.allocator!r} is not one of {', '.join(ALLOCATORS)}"
        raise InputError("--allocator", cause)
    return Overrides(
        seed=_number("--seed", args.seed, 0, MAX_SEED),
        release=args.release,
        capture=args.machine,
        ram=args.ram,
        nodes=_number("--nodes", args.nodes, 1, 64),
        generations=_number("--generations", args.generations, 1, MAX_GENERATIONS),
        allocator=args.allocator,
        without=_pieces(args.without),
    )


def _pieces(names: list[str]) -> tuple[str, ...]:
    from khosim.drivers.core import PIECES

    for name in names:
        if name not in PIECES:
            raise InputError("--without", f"{name!r} is none of {', '.join(PIECES)}")
    return tuple(dict.fromkeys(names))


def _number(option: str, text: str | None, low: int, high: int) -> int | None:
    if text is None:
        return None
    shown = text if len(text) <= 30 else f"{text[:30]}..."
    if not text.isascii() or not text.lstrip("-").isdigit() or len(text) > 30:
        raise InputError(option, f"{shown!r} is not a whole number from {low} to {high}")
    if not low <= int(text) <= high:
        raise InputError(option, f"{shown} is not from {low} to {high}")
    return int(text)
