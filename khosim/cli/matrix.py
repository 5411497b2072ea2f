"""``khosim matrix``: every release hands over to every other, and what comes of it.

Nothing is looked up: each cell is a run of the simulator, and ``--program`` prints that run.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from typing import TYPE_CHECKING

from khosim.errors import InputError
from khosim.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.matrix.grid import Cell, Run

__all__ = ("HELP", "NO_RELEASE", "configure", "run")

HELP = (
    "Hand over between every pair of releases, and from each to the one before and back, and say "
    "what happens. Exit status: 0 whatever happens; 1 what was seen contradicts itself; 2 wrong "
    "input."
)
NO_RELEASE = "name releases after --from and --to, with commas, one of your own among them"
_WIDTH = 80
_LETTERS = {"right": "R", "refused": "c", "misread": "M", "panic": "P"}
_LEGEND = {
    "R": "right: accepted, and everything is there",
    "c": "refused: boots cold, all is lost",
    "M": "misread: accepted, and something goes wrong",
    "P": "panic: accepted, and the successor dies",
}
_ARCHES = {4096: "x86-64", 16384: "arm64"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("--from", dest="old", metavar="R,...", help="releases that hand over (default: all eight)")
    add("--to", dest="new", metavar="R,...", help="releases that take over (default: all eight)")
    add("--page-size", metavar="SIZE", help="4K (x86-64) or 16K (arm64) only")
    add("--only", metavar="NAME,...", help="what is in play, such as pages (default: everything)")
    add("--json", action="store_true", help="one JSON object, with a row for each cell")
    add("--out", metavar="FILE", help="a picture of one page size too, .svg or .png")
    add(
        "--program",
        nargs="+",
        metavar="R",
        help="print the program behind the cell FROM TO, or behind the round trip N N-1 N",
    )
    add("--unfinalized", action="store_true", help="of --program: user space does not finalize")


def run(args: argparse.Namespace) -> int:
    """Run the cells and tell; 1 where the ways to judge disagree."""
    from khosim.kernel.release import MAINLINE
    from khosim.matrix.grid import PAGE_SIZES, cells, play_all

    page_sizes = PAGE_SIZES if args.page_size is None else (_page_size(args.page_size),)
    if args.program is not None:
        if args.json or args.out or args.old is not None or args.new is not None:
            cause = "it takes releases itself, and no --json, --out, --from or --to"
            raise InputError("--program", cause)
        finalize = not args.unfinalized
        return _print_program(args.program, page_sizes[0], _things(args.only), finalize=finalize)
    if args.unfinalized:
        raise InputError("--unfinalized", "it goes with --program only")
    if args.out is not None:
        from khosim.view.pictures import check_name

        check_name(args.out)
    old = _releases("--from", args.old) or MAINLINE
    new = _releases("--to", args.new) or MAINLINE
    wanted = list(cells(old, new, page_sizes=page_sizes, only=_things(args.only)))
    runs = play_all(wanted, _Progress(len(wanted)))
    if args.out is not None:
        _draw(args.out, runs, page_sizes[0])
    if args.json:
        print(json.dumps(_as_json(runs), indent=1))
    else:
        print("\n".join(_told(runs)))
    return 1 if any(played.contradiction for played in runs) else 0


def _print_program(
    names: list[str], page_size: int, only: tuple[str, ...], *, finalize: bool
) -> int:
    from khosim.kernel.release import find_release
    from khosim.matrix.grid import Cell, program

    if len(names) not in (2, 3):
        raise InputError("--program", f"it takes two releases or three, not {len(names)}")
    found = [find_release(name) for name in names]
    if not finalize and not found[0].finalize:
        raise InputError("--unfinalized", f"Linux {found[0].name} has nothing to finalize")
    print(program(Cell(tuple(names), page_size, finalize, only)), end="")
    return 0


def _releases(option: str, text: str | None) -> tuple[str, ...]:
    from khosim.kernel.release import find_release

    if text is None:
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(names):
        raise InputError(option, f"{text!r} names no release between two commas")
    for name in names:
        find_release(name)
    return names


def _things(text: str | None) -> tuple[str, ...]:
    from khosim.matrix.handover import THINGS

    if text is None:
        return THINGS
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in THINGS:
            raise InputError("--only", f"{name!r} is not one of {', '.join(THINGS)}")
    return names


def _page_size(text: str) -> int:
    size = parse_size(text, what="--page-size")
    if size not in _ARCHES:
        raise InputError("--page-size", f"{text} is neither 4K nor 16K")
    return size


class _Progress:
    """Tells a terminal how far it is; a pipe hears nothing."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.is_shown = sys.stderr.isatty()

    def __call__(self, number: int, cell: Cell) -> None:
        if not self.is_shown:
            return
        end = "" if number + 1 < self.total else "\r\x1b[K"
        text = f"{number + 1} of {self.total}: {cell}"[: _WIDTH - 1]
        print(f"\r\x1b[K{text}", end=end, file=sys.stderr, flush=True)


def _as_json(runs: Sequence[Run]) -> dict[str, object]:
    pairs = [played for played in runs if len(played.cell.releases) == 2]
    return {
        "rows": [played.as_json() for played in pairs],
        "round_trips": [played.as_json() for played in runs if played not in pairs],
    }


# -- for people ---------------------------------------------------------------------------------


def _told(runs: Sequence[Run]) -> list[str]:
    lines: list[str] = []
    for page_size in dict.fromkeys(played.cell.page_size for played in runs):
        of_size = [played for played in runs if played.cell.page_size == page_size]
        pairs = [played for played in of_size if len(played.cell.releases) == 2]
        title = f"{page_size >> 10} KiB pages, {_ARCHES[page_size]}"
        lines += _table(title, [p for p in pairs if p.cell.finalized is not False])
        unfinalized = [p for p in pairs if p.cell.finalized is False]
        if unfinalized:
            lines += _table(f"{title}, not finalized", unfinalized)
        trips = [p for p in of_size if len(p.cell.releases) > 2]
        if trips:
            lines += [f"{title}, to the release before and back", ""]
            for trip in trips:
                letters = " ".join(_LETTERS[leg.outcome] for leg in trip.legs)
                line = f"  {' -> '.join(trip.cell.releases):<24} {letters:<5}"
                if trip.outcome == "right":
                    line += f"{', '.join(trip.missing) or 'nothing'} lost"
                lines.append(line.rstrip())
            lines.append("")
    lines += [f"{letter}  {text}" for letter, text in _LEGEND.items()]
    for word in ("panic", "misread", "refused", "right"):
        lines += _whys(word, runs)
    for played in runs:
        if played.contradiction:
            lines.append(_filled(f"CONTRADICTION {played.cell}: {played.contradiction}", 2))
    return lines


def _table(title: str, pairs: Sequence[Run]) -> list[str]:
    from khosim.kernel.release import find_release

    old = list(dict.fromkeys(played.cell.releases[0] for played in pairs))
    new = list(dict.fromkeys(played.cell.releases[1] for played in pairs))
    letters = {played.cell.releases: _LETTERS[played.outcome] for played in pairs}
    shown = {name: find_release(name).name for name in (*old, *new)}
    first = max(9, *(len(shown[name]) for name in old))
    widths = [max(5, len(shown[name]) + 1) for name in new]
    lines = [title, "", "from \\ to".ljust(first) + _row([shown[name] for name in new], widths)]
    for name in old:
        row = _row([letters[name, to] for to in new], widths)
        lines.append(shown[name].ljust(first) + row)
    return [*lines, ""]


def _row(words: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(word.rjust(width) for word, width in zip(words, widths, strict=True))


def _whys(word: str, runs: Sequence[Run]) -> list[str]:
    # Cells that say the same but for addresses share a line.
    groups: dict[str, dict[str, list[str]]] = {}
    for played in runs:
        leg = played.legs[0]
        if leg.outcome == word and len(played.cell.releases) == 2:
            why = re.sub(r"0x[0-9a-f]+|(?<=address: )[0-9a-f]+", "...", leg.why)
            kinds = groups.setdefault(why, {})
            kinds.setdefault(_kind(played.cell), []).append(f"{leg.old}>{leg.new}")
    if not groups:
        return []
    lines = ["", _LEGEND[_LETTERS[word]]]
    for why, kinds in groups.items():
        by_pairs: dict[str, list[str]] = {}
        for kind, pairs in kinds.items():
            by_pairs.setdefault(", ".join(pairs), []).append(kind)
        for cells, of_kinds in by_pairs.items():
            lines.append(_filled(f"  {cells} ({'; '.join(of_kinds)})", 2))
        lines.append(_filled(f"      {why}", 6))
    return lines


def _kind(cell: Cell) -> str:
    how = ", not finalized" if cell.finalized is False else ""
    return f"{cell.page_size >> 10} KiB{how}"


def _filled(text: str, later: int) -> str:
    return textwrap.fill(
        text, _WIDTH, subsequent_indent=" " * later, break_long_words=False, break_on_hyphens=False
    )


def _draw(path: str, runs: Sequence[Run], page_size: int) -> None:
    from khosim.view.pictures import matrix_picture, save_picture

    outcomes: dict[tuple[str, ...], str] = {
        run.cell.releases: run.outcome
        for run in runs
        if len(run.cell.releases) == 2
        and run.cell.page_size == page_size
        and run.cell.finalized is not False
    }
    title = f"what becomes of a handover, {page_size >> 10} KiB pages"
    save_picture(matrix_picture(outcomes, title=title), path)
