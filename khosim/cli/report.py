"""``khosim report [SCENARIO]``: a whole handover as one page of HTML."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from khosim.errors import InputError

if TYPE_CHECKING:
    from khosim.view.recording import Recording

__all__ = ("HELP", "configure", "run")

HELP = (
    "Play a scenario, or a bug of the museum with its fix off, and write what happened as one page "
    "of HTML that needs no network: memory at every moment, every event, the handover's trees and "
    "what the invariants say. Exit status: 0 all holds; 1 an invariant does not; 2 wrong input."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("scenario", metavar="SCENARIO", nargs="?", help="built-in name or TOML file")
    add("--bug", metavar="ID", help="a bug of the museum instead, as 'khosim bugs' lists them")
    add("--fixed", action="store_true", help="of --bug: with its fix on")
    add("--out", metavar="FILE", default="handover.html", help="where to (default: handover.html)")
    add("--release", metavar="R", help="kernel release of every generation, such as 7.3")
    add("--seed", metavar="N", help="where contents and the adversarial allocator start")


def run(args: argparse.Namespace) -> int:
    """Record and write: 0, or 1 where an invariant spoke."""
    if not Path(args.out).absolute().parent.is_dir():
        raise InputError(args.out, "its folder does not exist")
    if Path(args.out).is_dir():
        raise InputError(args.out, "a folder: --out names a file")
    if args.fixed and args.bug is None:
        raise InputError("--fixed", "it goes with --bug only")
    story = _bug(args) if args.bug is not None else _scenario(args)
    from khosim.scenario.fields import size_text
    from khosim.view.report import write_report

    size = write_report(story, args.out)
    found = len(story.violations)
    verdict = f"{found} violations" if found else "every invariant holds"
    print(
        f"{args.out}: {size_text(size)}, {len(story.moments)} moments, "
        f"{len(story.events):,} events, {verdict}"
    )
    return 1 if found else 0


def _scenario(args: argparse.Namespace) -> Recording:
    from khosim.scenario.library import load_scenario
    from khosim.scenario.parse import Overrides
    from khosim.view.recording import record

    overrides = Overrides(release=args.release, seed=args.seed)
    scenario = load_scenario(args.scenario or "small", overrides=overrides)
    story, _ = record(scenario, in_depth=True)
    return story


def _bug(args: argparse.Namespace) -> Recording:
    if args.scenario is not None or args.release is not None or args.seed is not None:
        raise InputError("--bug", "it is a scenario itself: no SCENARIO, --release or --seed")
    from khosim.bugs.catalogue import find_bug
    from khosim.view.museum import record_bug

    return record_bug(find_bug(args.bug), is_fixed=args.fixed)
