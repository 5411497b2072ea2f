"""``khosim explore [SCENARIO]``: draw programs, run them, tell what broke and how to see it.

Every finding is the shortest program found that makes an invariant speak, with the events that
have to do with it. Equal arguments with ``--runs`` give equal bytes; with ``--seconds`` it depends
on the machine how far a search comes. Progress is shown on a terminal only.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from khosim.cli.printable import printable
from khosim.errors import InputError

if TYPE_CHECKING:
    from khosim.explore.campaign import Campaign

__all__ = ("HELP", "configure", "run")

HELP = (
    "Search for what breaks a release: random programs over the public API with faults and odd "
    "successors, judged by every invariant. Exit status: 0 nothing was found; 1 something was; 2 "
    "wrong input."
)

_RUNS = 300


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("scenario", metavar="SCENARIO", nargs="?", default="all", help="what to try; see --list")
    add("--list", action="store_true", help="list the scenarios and the steps of each")
    add("--release", metavar="R", default="7.3", help="kernel release, such as 7.3")
    add("--fixed", action="store_true", help="with every known hazard of 7.3 switched off")
    add("--seed", metavar="N", default="0", help="where the search starts")
    add("--runs", metavar="N", help=f"how many programs to run (default {_RUNS})")
    add("--seconds", metavar="S", help="how long to go on, instead of --runs")
    add("--exhaustive", metavar="DEPTH", help="every program of that many steps, not random ones")
    add("--json", action="store_true", help="one JSON object instead of the account")


def run(args: argparse.Namespace) -> int:
    """Search, and tell: 0, or 1 where something was found."""
    from khosim.explore.campaign import Campaign
    from khosim.explore.hazards import fixed
    from khosim.explore.search import SCENARIOS
    from khosim.kernel.release import find_release

    if args.list:
        print("\n".join(f"{name:<12} {', '.join(groups)}" for name, groups in SCENARIOS.items()))
        return 0
    if args.scenario not in SCENARIOS:
        known = ", ".join(SCENARIOS)
        raise InputError("SCENARIO", f"{args.scenario!r} is not one of {known}")
    if args.runs is not None and args.seconds is not None:
        raise InputError("--seconds", "not together with --runs")
    seed = _number("--seed", args.seed, 0)
    seconds = None if args.seconds is None else _number("--seconds", args.seconds, 1)
    runs = None if seconds else _number("--runs", args.runs or str(_RUNS), 1)
    find_release(args.release)
    release = fixed(args.release) if args.fixed else args.release
    campaign = Campaign(str(seed), args.scenario, release)
    show = _progress if sys.stderr.isatty() else None
    if args.exhaustive is not None:
        campaign.exhaust(_number("--exhaustive", args.exhaustive, 1))
    else:
        campaign.run(runs=runs, seconds=seconds, progress=show)
    if show is not None:
        print("\r\033[K", end="", file=sys.stderr)
    result = campaign.as_json()
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print(printable(_text(result)), end="")
    return 1 if campaign.findings else 0


def _text(result: dict[str, object]) -> str:
    findings = result["findings"]
    assert isinstance(findings, list)
    heading = f"{result['explored']} programs of scenario {result['scenario']} on Linux"
    lines = [f"{heading} {result['release']}, seed {result['seed']}: {len(findings)} findings"]
    for n, finding in enumerate(findings, 1):
        where = f"in {finding['count']} programs, first {finding['seed']}"
        lines += ["", f"-- {n}. {finding['invariant']} ({where})", finding["message"], ""]
        lines += [f"    {line}".rstrip() for line in finding["program"].splitlines()]
        lines += ["", *(f"    | {line}" for line in finding["trace"])]
    return "\n".join(lines) + "\n"


def _progress(campaign: Campaign) -> None:
    if campaign.explored % 10 == 0:
        text = f"\r{campaign.explored} programs, {len(campaign.findings)} findings"
        print(text, end="", file=sys.stderr, flush=True)


def _number(option: str, text: str, low: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 12 or int(text) < low:
        shown = text if len(text) <= 30 else f"{text[:30]}..."
        raise InputError(option, f"{shown!r} is not a whole number from {low} on")
    return int(text)
