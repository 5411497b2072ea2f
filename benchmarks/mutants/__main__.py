"""``python -m benchmarks.mutants``: seed defects, and tell which were noticed, and which not.

``switches`` flips each behaviour of a release in turn; ``code AREA`` changes code and runs its
tests, which needs the package cosmic-ray (the extra "mutants"). Exit status: 0, or 1 where a
flipped switch was neither noticed nor is known to change nothing that anybody could notice.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from benchmarks.mutants.code import AREAS, Judged, as_json, run_area
from benchmarks.mutants.reasons import flip_reason
from benchmarks.mutants.switches import LOOKERS, Noticed, flips, judge
from khosim.explore.hazards import fixed

__all__ = ("main",)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what ``argv`` asks for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    code = commands.add_parser("code", help="change khosim's code, run its tests")
    code.add_argument("area", choices=list(AREAS))
    code.add_argument("--count", type=int, default=300, help="how many mutants (default 300)")
    code.add_argument("--seconds", type=float, help="stop after so long")
    told = "CPU time of the tests for one mutant, the quickest first (default: all of them)"
    code.add_argument("--budget", type=float, metavar="S", default=float("inf"), help=told)
    switches = commands.add_parser("switches", help="flip behaviours of 7.3 with all hazards fixed")
    switches.add_argument("--runs", type=int, default=200, help="of a search (default 200)")
    told = "of a search for a flip that nobody noticed and that has no reason (default: no more)"
    switches.add_argument("--more-runs", type=int, default=0, metavar="RUNS", help=told)
    told = "flip behaviours of this name only; '*' stands for anything: 'fix_*'"
    switches.add_argument("--only", metavar="NAME", default="*", help=told)
    for command in (code, switches):
        command.add_argument("--seed", type=int, default=0, help="which sample")
        command.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    return _code(args) if args.command == "code" else _switches(args)


def _switches(args: argparse.Namespace) -> int:
    base = fixed("7.3")
    found = []
    for flip in flips(base):
        if not fnmatchcase(flip.name, args.only):
            continue
        one = judge(flip, base, args.runs, args.seed)
        if not one.spoke and flip_reason(flip) is None and args.more_runs > args.runs:
            one = judge(flip, base, args.more_runs, args.seed)
        found.append(one)
        if not args.json:
            print(_line(found[-1]), flush=True)
    gaps = [one for one in found if not one.spoke and flip_reason(one.flip) is None]
    if args.json:
        print(json.dumps([_plain(one) for one in found], indent=1))
    else:
        for looker in LOOKERS:
            print(f"{looker}: {sum(looker in one.spoke for one in found)} of {len(found)}")
        noticed = sum(bool(one.spoke) for one in found)
        print(f"noticed: {noticed} of {len(found)}; unexplained: {len(gaps)}")
    return 1 if gaps else 0


def _plain(one: Noticed) -> dict[str, Any]:
    why = None if one.spoke else flip_reason(one.flip)
    return {"flip": str(one.flip), "spoke": one.spoke, "runs": one.runs, "why": why}


def _line(one: Noticed) -> str:
    if not one.spoke:
        return f"{one.flip!s:<36} -- {flip_reason(one.flip) or 'UNEXPLAINED'}"
    runs = {"search": f" (run {one.runs})"}
    told = [f"{looker}{runs.get(looker, '')}: {what}" for looker, what in one.spoke.items()]
    return f"{one.flip!s:<36} {'; '.join(told)}"


def _code(args: argparse.Namespace) -> int:
    def tell(judged: Judged) -> None:
        mark = {"killed": ".", "timeout": "t", "unreached": "u", "survived": "S"}
        print(mark[judged.verdict.outcome], end="", file=sys.stderr, flush=True)

    limits = {"seconds": args.seconds, "budget": args.budget}
    judged = run_area(args.area, args.count, args.seed, **limits, progress=tell)
    print(file=sys.stderr)
    report = as_json(judged)
    if args.json:
        print(json.dumps(report, indent=1))
        return 0
    told = ", ".join(f"{number} {outcome}" for outcome, number in report["outcomes"].items())
    print(f"{args.area}: {report['mutants']} mutants, seed {args.seed}: {told}")
    for one in judged:
        if one.verdict.outcome in ("survived", "unreached"):
            print(f"\n{one.verdict.outcome}, {one.verdict.tests} tests\n{one.mutant}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
