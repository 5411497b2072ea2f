"""``python -m benchmarks``: runs them all and prints a table, or JSON.

Exit status: 0 every limit holds, 1 one does not, 2 the call is wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence

from benchmarks.harness import Context, Record
from benchmarks.registry import BENCHMARKS

__all__ = ("main",)

HEADER = ("benchmark", "ratio", "limit", "ok", "measured", "baseline")
ROW = "{:<28} {:>9} {:>7} {:<4} {:>10}  {}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks that ``argv`` asks for and return the exit status."""
    args = _parser().parse_args(argv)
    records: list[Record] = []
    if not args.json:
        print(ROW.format(*HEADER))
    for record in _run(args.only or list(BENCHMARKS), quick=args.quick):
        records.append(record)
        if not args.json:
            print(_row(record), flush=True)
    failed = [record for record in records if record.ok is False]
    if args.json:
        print(json.dumps(_as_json(records, quick=args.quick, ok=not failed), indent=2))
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller inputs")
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        choices=list(BENCHMARKS),
        help=f"run this one (may be repeated): {', '.join(BENCHMARKS)}",
    )
    return parser


def _run(names: Sequence[str], *, quick: bool) -> Iterator[Record]:
    context = Context(quick=quick)
    for name in names:
        yield from BENCHMARKS[name](context)


def _row(record: Record) -> str:
    baseline = f"of {record.baseline}" + (f" ({record.note})" if record.note else "")
    if record.value is None or record.measured is None:
        return ROW.format(record.name, "skipped", _limit(record), "-", "-", baseline)
    verdict = {True: "yes", False: "NO", None: "-"}[record.ok]
    measured = _quantity(record.measured, record.unit)
    return ROW.format(
        record.name, f"{record.value:.3g}", _limit(record), verdict, measured, baseline
    )


def _limit(record: Record) -> str:
    return "-" if record.limit is None else f"{record.limit:g}"


def _quantity(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e3:,.3g} ms" if value < 1 else f"{value:,.3g} s"
    if unit == "bytes":
        return f"{value / 2**20:,.4g} MiB"
    return f"{value:,.4g} {unit}"


def _as_json(records: Sequence[Record], *, quick: bool, ok: bool) -> dict[str, object]:
    return {
        "ok": ok,
        "quick": quick,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "records": [record.as_json() for record in records],
    }


if __name__ == "__main__":
    sys.exit(main())
