"""``khosim view WHAT [SCENARIO]``: a handover in the terminal, or as a picture.

Plays a scenario, records it (:mod:`khosim.view.recording`) and shows one of: the moments that were
recorded, the memory map at one of them, what changed between two, what is preserved, the phases.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from khosim.errors import InputError

if TYPE_CHECKING:
    from khosim.view.moment import Moment
    from khosim.view.recording import Recording

__all__ = ("HELP", "configure", "run")

WHAT = ("moments", "map", "diff", "preserved", "timeline")

HELP = (
    "Play a scenario and show what happened: its moments (a list), the memory map at a moment, the "
    "diff of two moments, what is preserved, or the timeline of phases. --out writes the map or "
    "the timeline as a picture. Exit status: 0; 2 wrong input."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("what", metavar="WHAT", choices=WHAT, help=", ".join(WHAT))
    add("scenario", metavar="SCENARIO", nargs="?", help="built-in name or TOML file; else 'small'")
    add("--at", metavar="MOMENT", help="number of a moment, or N,M for a diff; else the last jump")
    add("--release", metavar="R", help="kernel release of every generation, such as 7.3")
    add("--seed", metavar="N", help="where contents and the adversarial allocator start")
    add("--width", metavar="COLUMNS", type=int, help="instead of the terminal's, from 60 on")
    add("--out", metavar="FILE", help="a picture, .svg or .png, instead of text")


def run(args: argparse.Namespace) -> int:
    """Play, record and show: 0."""
    if args.width is not None and not 60 <= args.width <= 10_000:
        raise InputError("--width", f"{args.width} is not from 60 to 10000")
    if args.out is not None:
        from khosim.view.pictures import PICTURES, check_name

        if args.what not in PICTURES:
            cause = f"{args.what} is text only; pictures are of {', '.join(PICTURES)}"
            raise InputError("--out", cause)
        check_name(args.out)
    from khosim.scenario.library import load_scenario
    from khosim.scenario.parse import Overrides
    from khosim.view.recording import record

    overrides = Overrides(release=args.release, seed=args.seed)
    story, _ = record(load_scenario(args.scenario or "small", overrides=overrides))
    chosen = _chosen(story, args.at, two=args.what == "diff")
    if args.out is not None:
        from khosim.view.pictures import write_picture

        write_picture(args.out, args.what, story, chosen[-1])
        return 0
    _print(args.what, story, chosen, args.width)
    return 0


def _print(what: str, story: Recording, chosen: list[Moment], width: int | None) -> None:
    from khosim.view import terminal

    screen = terminal.console()
    if width is not None:
        screen.width = width
    views = {
        "moments": lambda: terminal.moments_view(story),
        "map": lambda: terminal.map_view(chosen[-1], screen.width),
        "diff": lambda: terminal.diff_view(*chosen),
        "preserved": lambda: terminal.preserved_view(chosen[-1]),
        "timeline": lambda: terminal.timeline_view(story, screen.width),
    }
    screen.print(views[what]())


def _chosen(story: Recording, at: str | None, *, two: bool) -> list[Moment]:
    moments = story.moments
    if not moments:
        raise InputError("scenario", "it ended before there was anything to see")
    if at is None:
        jumps = [moment.index for moment in moments if moment.stage == "jump"]
        last = jumps[-1] if jumps else len(moments) - 1
        return [moments[0], moments[last]] if two else [moments[last]]
    numbers = at.split(",")
    if len(numbers) != (2 if two else 1):
        raise InputError("--at", f"{at!r} is not {'two moments, as in 3,7' if two else 'a moment'}")
    found = []
    for number in numbers:
        if not number.strip().isdecimal() or int(number) >= len(moments):
            cause = f"{number!r} is no moment: they are 0 to {len(moments) - 1}"
            raise InputError("--at", f"{cause} ('khosim view moments')")
        found.append(moments[int(number)])
    return found
