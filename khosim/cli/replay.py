"""``khosim replay CAPTURE|DMESG``: the boots of a real kernel, replayed by khosim's memblock.

Every memblock call in a log of ``memblock=debug`` is made again and each address compared; then
scratch is reserved, or on a handover what was preserved. Lines are those of the log; a line 0 is a
file of the capture.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from khosim.printable import printable

if TYPE_CHECKING:
    from khosim.conform.replay import Replay

__all__ = ("HELP", "NO_RELEASE", "configure", "run")

HELP = "make a real kernel's boot-time memblock calls again and compare each address"
NO_RELEASE = "it makes the boot in the log again, of any release; 'khosim run' plays one of yours"

_SHOWN = 200


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "path",
        metavar="CAPTURE|DMESG",
        help="a capture folder, one of its generations, or the log of a memblock=debug boot",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Replay: 0 when all is the same, 1 when not; :class:`InputError` for what is no log."""
    from khosim.conform.replay import replay_path

    replays = replay_path(args.path)
    if args.json:
        print(json.dumps({"generations": {one.name: one.as_json() for one in replays}}))
    else:
        _show(replays)
    return 1 if any(one.differences for one in replays) else 0


def _show(replays: list[Replay]) -> None:
    from khosim.conform.state import told

    print(f"{'generation':<12} {'allocations':>11} {'same':>7} {'different':>9} {'preserved':>13}")
    for one in replays:
        preserved = f"{one.preserved} of {one.nr_preserved}" if one.nr_preserved else "-"
        print(
            f"{printable(one.name):<12} {one.allocations:>11} {one.same:>7}"
            f" {len(one.differences):>9} {preserved:>13}"
        )
    for one in replays:
        done = "taken over" if one.facts.kho_boot else "reserved"
        print(f"\n{printable(one.name)}: scratch {done}")
        for base, size in one.scratch:
            print(f"  [{base:#014x}-{base + size:#014x})  {size >> 10:>9} KiB")
        if not one.scratch:
            print("  none")
    if any(one.differences for one in replays):
        print("\ndifferences")
        for one in replays:
            for difference in one.differences[:_SHOWN]:
                print(printable(f"  {one.name}: {told(difference)}"))
            if len(one.differences) > _SHOWN:
                print(f"  {one.name}: and {len(one.differences) - _SHOWN} more")
