"""``khosim conform CAPTURE``: khosim held against what real kernels did, item by item.

Each generation's log is replayed, its handover decoded and rebuilt byte for byte, and compared with
what the next kernel said and showed. ``?`` marks what the capture does not tell.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING

from khosim.printable import printable

if TYPE_CHECKING:
    from khosim.conform.conform import Report
    from khosim.conform.items import Item

__all__ = ("HELP", "configure", "run")

HELP = "hold khosim against what real kernels did in a capture, item by item"

_WIDTH = 100
_MARKS = {True: "ok", False: "DIFFERS", None: "?"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("path", metavar="CAPTURE", help="a capture folder")
    parser.add_argument(
        "--release",
        metavar="R",
        help="khosim's kernel to hold against it, such as 7.3 or FILE.py (default: as captured)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Compare: 0 when nothing differs, 1 when something does; :class:`InputError` else."""
    from khosim.conform.conform import conform_capture
    from khosim.kernel.release import option_release

    report = conform_capture(args.path, option_release(args.release))
    if args.json:
        print(json.dumps(report.as_json()))
    else:
        _show(report)
    return 0 if report.ok else 1


def _show(report: Report) -> None:
    capture = report.capture
    kib = capture.page_size >> 10
    head = f"{capture.name}: Linux {capture.release}, {capture.arch}, {kib} KiB pages"
    print(printable(head))
    for name, items in report.generations.items():
        print(f"\n{printable(name)}")
        for item in items:
            for line in _lines(item):
                print(printable(line.rstrip()))
    items = [item for items in report.generations.values() for item in items]
    counts = {mark: sum(item.ok is ok for item in items) for ok, mark in _MARKS.items()}
    print(f"\n{counts['ok']} items the same, {counts['DIFFERS']} differ, {counts['?']} not told")


def _lines(item: Item) -> list[str]:
    count = f"{item.same:,} of {item.total:,}" if item.total else "-"
    lines = [f"  {_MARKS[item.ok]:<8}{item.name:<24}{count:>16}  {item.note}"]
    for difference in item.differences:
        indent = " " * 12
        lines += textwrap.wrap(
            difference,
            _WIDTH,
            initial_indent=indent,
            subsequent_indent=indent + "  ",
            break_on_hyphens=False,
        )
    return lines
