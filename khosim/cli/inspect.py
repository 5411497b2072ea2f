"""``khosim inspect PATH``: decode what a real kernel handed over, and say what is torn.

PATH is a capture, one of its generations, ``ram.npz``, a raw RAM image, an ELF dump, a saved
machine, a lone FDT or a debugfs folder. :mod:`khosim.inspect.source` tells them apart.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from khosim.errors import InputError
from khosim.printable import printable
from khosim.units import parse_size

if TYPE_CHECKING:
    from khosim.inspect.source import Report

__all__ = ("HELP", "configure", "run")

HELP = "decode a real handover: what it holds, and what is torn and where"

_PHYS_MAX = 1 << 52


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "path",
        metavar="PATH",
        help="a capture or one of its generations, ram.npz, a raw RAM image, an ELF dump, a saved "
        "machine, a device tree blob, or a debugfs kho folder",
    )
    parser.add_argument(
        "--fdt", metavar="ADDR", help="physical address of the root FDT (default: search for it)"
    )
    parser.add_argument(
        "--base", metavar="ADDR", help="physical address of a raw image's first byte (default: 0)"
    )
    parser.add_argument(
        "--page-size", metavar="SIZE", help="4K, 16K or 64K (default: what makes most sense)"
    )
    parser.add_argument(
        "--release",
        metavar="R",
        help="the kernel that wrote it, such as 6.18 or a file of your own (default: what it says)",
    )
    parser.add_argument("--no-content", action="store_true", help="do not digest files' content")
    parser.add_argument("--folios", action="store_true", help="list the folios of each file")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--dts", action="store_true", help="print the device trees as source")
    form.add_argument(
        "--json", action="store_true", help="one JSON object; of a capture, one per generation"
    )


def run(args: argparse.Namespace) -> int:
    """Tell what is there: 0, or 1 where something is torn; :class:`InputError` for bad input."""
    from khosim.inspect.source import Options, inspect_path
    from khosim.kernel.release import option_release

    options = Options(
        fdt_phys=_address(args.fdt, "--fdt"),
        base_phys=_address(args.base, "--base") or 0,
        page_size=None if args.page_size is None else _page_size(args.page_size),
        content=not args.no_content,
        release=option_release(args.release),
    )
    reports, are_named = inspect_path(args.path, options)
    if args.json:
        _print_json(reports, are_named)
    elif args.dts:
        from khosim.inspect.dts import report_dts

        print(printable("\n".join(filter(None, map(report_dts, reports)))), end="")
    else:
        _print_tables(reports, args.folios)
    return 1 if any(report.damage for report in reports) else 0


def _print_json(reports: list[Report], are_named: bool) -> None:
    from khosim.inspect.source import GapReport

    said: object
    if are_named:
        said = {
            report.name: report.to_json()
            for report in reports
            if report.damage or not isinstance(report, GapReport)
        }
    else:
        said = reports[0].to_json()
    print(json.dumps(said))


def _print_tables(reports: list[Report], folios: bool) -> None:
    from khosim.inspect.table import report_lines

    for number, report in enumerate(reports):
        if number:
            print()
        for line in report_lines(report, folios=folios):
            print(printable(line.rstrip()))


def _address(text: str | None, option: str) -> int | None:
    """An address: hexadecimal with 0x, decimal, or a size such as 1G."""
    if text is None:
        return None
    value = parse_size(text, what=option)
    if value >= _PHYS_MAX:
        raise InputError(option, f"{text} is no physical address")
    return value


def _page_size(text: str) -> int:
    value = parse_size(text, what="--page-size")
    if value not in (4096, 16384, 65536):
        raise InputError("--page-size", f"{text} is not one of 4K, 16K, 64K")
    return value
