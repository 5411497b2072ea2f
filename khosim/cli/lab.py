"""``khosim lab BZIMAGE``: a real kernel in QEMU, handed over N times, kept as a capture.

The guest is emulated in software, so any kernel of x86-64 runs on any host. What comes of it is a
folder that ``khosim conform``, ``replay``, ``inspect`` and ``plan`` read.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from khosim.lab.verdict import Item

__all__ = ("HELP", "NO_RELEASE", "configure", "run")

HELP = "boot a real kernel in QEMU, hand over, and leave a capture of what it did"
NO_RELEASE = "a real kernel is booted, of its own release; 'khosim run' plays one of yours"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("kernel", metavar="BZIMAGE", help="an x86-64 kernel with KHO")
    parser.add_argument(
        "--out", metavar="DIR", default="khosim-lab", help="the capture (default: khosim-lab)"
    )
    parser.add_argument(
        "--generations",
        metavar="N",
        type=_count,
        default=2,
        help="handovers (default: 2); 0 only boots",
    )
    parser.add_argument("--memory", metavar="SIZE", default="1G", help="RAM (default: 1G)")
    parser.add_argument("--numa", metavar="SIZE,SIZE...", help="RAM of each node; their sum is all")
    parser.add_argument("--append", metavar="CMDLINE", default="", help="added to the command line")
    parser.add_argument(
        "--cmdline",
        metavar="CMDLINE",
        help="instead of 'kho=on liveupdate=on log_buf_len=16M memblock=debug quiet'",
    )
    parser.add_argument(
        "--initrd-size", metavar="SIZE", default="0", help="at least so large (default: as needed)"
    )
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=_count, default=300, help="per boot (default: 300)"
    )
    parser.add_argument(
        "--predecessor",
        choices=("linux", "khosim"),
        default="linux",
        help="whose handover the second kernel gets (default: linux, what the first one made)",
    )
    parser.add_argument("--arch", choices=("x86_64",), default="x86_64", help="x86_64 only")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Do it: 0 when all holds, 1 when not or the guest fails; :class:`InputError` without QEMU."""
    from khosim.lab.experiment import Experiment, run_experiment
    from khosim.lab.run import GuestTrouble

    began = time.monotonic()

    def progress(line: str) -> None:
        if sys.stderr.isatty():
            print(f"[{time.monotonic() - began:6.1f} s] {line}", file=sys.stderr)

    experiment = Experiment.of(
        kernel=args.kernel,
        out=args.out,
        handovers=args.generations,
        memory=args.memory,
        numa=args.numa,
        cmdline=args.cmdline,
        append=args.append,
        initrd_size=args.initrd_size,
        timeout=args.timeout,
        predecessor=args.predecessor,
    )
    try:
        outcome = run_experiment(experiment, progress)
    except GuestTrouble as trouble:
        _show_trouble(trouble.finding, trouble.console, args.json)
        return 1
    bad = any(not item.ok for item in outcome.items)
    if args.json:
        said = {
            "capture": args.out,
            "release": outcome.release,
            "generations": outcome.names,
            "items": [item._asdict() for item in outcome.items],
            "notes": outcome.notes,
        }
        print(json.dumps(said))
    else:
        _show(outcome.items, outcome.notes)
        print(f"\n{args.out}: {len(outcome.names)} generations of Linux {outcome.release}")
    return 1 if bad else 0


def _show(items: list[Item], notes: list[str]) -> None:
    width = max((len(item.name) for item in items), default=0)
    for generation, name, ok, detail in items:
        print(f"{generation}  {name:<{width}}  {'ok' if ok else 'NOT OK':<6}  {detail}")
    for note in notes:
        print(f"note: {note}")


def _show_trouble(finding: str, console: list[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"finding": finding, "console": console}))
        return
    print(finding)
    if console:
        print("\nthe console's last lines:")
        for line in console:
            print(f"  {line}")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) > 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 100000")
    return int(text)
