"""``khosim plan MEMORY-MAP``: the scratch areas that a kernel will set aside, before it boots.

From a log with a memblock trace (``memblock=debug``) exact; otherwise by a simulated boot of a
kernel of a distribution's dimensions, each of which an option overrides.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING

from khosim.errors import InputError
from khosim.printable import printable
from khosim.units import format_size, parse_size

if TYPE_CHECKING:
    from khosim.plan.advice import Driver
    from khosim.plan.planner import Plan

__all__ = ("HELP", "configure", "run")

HELP = "predict the scratch areas of a kernel, what they cost and what drives it"

_WIDTH = 80
_SHOWN_BYTES = 4 << 10
_SIZES = {
    "kernel_size": ("kernel_bytes", "2M", "1G", "the kernel image in memory"),
    "initrd": ("initrd_bytes", "0", "16G", "the initrd, 0 for none"),
    "percpu": ("percpu_bytes", "4K", "2M", "one CPU's per-cpu area"),
    "log_buf": ("log_buf_bytes", "4K", "32M", "the built-in log buffer, a power of two"),
    "cma": ("cma_bytes", "0", "1T", "the CMA area that is built in, 0 for none"),
    "swiotlb": ("swiotlb_bytes", "0", "1G", "bounce buffers, 0 for none"),
}
_NAMES = {
    "kernel_bytes": "kernel",
    "initrd_bytes": "initrd",
    "nr_cpus": "CPUs",
    "cma_bytes": "CMA",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "map",
        metavar="MEMORY-MAP",
        help="a dmesg, /proc/iomem, a capture folder, or a size such as 16G",
    )
    parser.add_argument("--cmdline", help="kernel command line (default: the log's own)")
    parser.add_argument("--release", help="kernel release such as 7.0 (default: the log's)")
    parser.add_argument("--nodes", type=int, help="NUMA nodes of a machine given as a size")
    parser.add_argument("--arch", choices=("x86_64", "arm64"), help="of a machine given as a size")
    parser.add_argument("--page-size", help="arm64: 4K, 16K or 64K")
    for option, (_, _, _, text) in _SIZES.items():
        parser.add_argument(f"--{option.replace('_', '-')}", metavar="SIZE", help=text)
    parser.add_argument("--cpus", type=int, help="CPUs that the kernel reserves areas for")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Plan: 0 when nothing stands against it, 1 when something was found."""
    from khosim.plan.planner import make_plan
    from khosim.plan.source import read_source

    given = _given(args)
    page_size = None if args.page_size is None else parse_size(args.page_size, what="--page-size")
    source = read_source(args.map, nodes=args.nodes, arch=args.arch, page_size=page_size)
    plan = make_plan(source, cmdline=args.cmdline, release=args.release, given=given)
    if args.json:
        print(json.dumps(plan.as_json()))
    else:
        _show(plan)
    return 1 if plan.findings else 0


def _given(args: argparse.Namespace) -> dict[str, int | None]:
    given: dict[str, int | None] = {}
    for option, (name, least, most, _) in _SIZES.items():
        text = getattr(args, option)
        if text is None:
            continue
        flag = f"--{option.replace('_', '-')}"
        size = parse_size(text, what=flag)
        if not parse_size(least) <= size <= parse_size(most):
            raise InputError(flag, f"{text} is not from {least} to {most}")
        given[name] = size
    log_buf = given.get("log_buf_bytes")
    if log_buf is not None and log_buf & log_buf - 1:
        raise InputError("--log-buf", f"{args.log_buf} is not a power of two")
    if args.cpus is not None:
        if not 1 <= args.cpus <= 8192:
            raise InputError("--cpus", f"{args.cpus} is not from 1 to 8192")
        given["nr_cpus"] = args.cpus
    return given


def _size(len_bytes: int) -> str:
    for suffix, shift in (("T", 40), ("G", 30), ("M", 20)):
        if len_bytes >= 1 << shift:
            return f"{_number(len_bytes / (1 << shift), 1 if suffix == 'M' else 2)}{suffix}"
    return f"{len_bytes >> 10}K" if len_bytes else "0"


def _number(value: float, places: int) -> str:
    text = f"{value:.{0 if value >= 100 else places}f}"
    return text.rstrip("0").removesuffix(".") if "." in text else text


def _show(plan: Plan) -> None:
    _show_machine(plan)
    outcome = plan.outcome
    print(f"\nscratch  {_size(plan.scratch_bytes):>7}  {plan.share:.1%} of RAM")
    for area in plan.areas:
        where = f"at {area.phys:#x}" if area.len_bytes else ""
        print(f"  {area.name:<8} {_size(area.len_bytes):>7}  {where}".rstrip())
    if outcome.owners:
        _show_owners(plan)
    for driver in plan.drivers:
        _say(_told(driver))
    for finding in plan.findings:
        _say(f"found: {finding}")
    for note in plan.notes:
        _say(f"note: {note}")
    if plan.suggestion is not None:
        _say(
            f"{plan.suggestion.option} would make scratch {_size(plan.suggestion.scratch_bytes)}; "
            "tried in the simulator: the same kernel and initrd, handed over to with nothing but "
            "scratch to boot in, came up"
        )


def _show_machine(plan: Plan) -> None:
    nodes = f"{plan.nr_nodes} node" + "s" * (plan.nr_nodes != 1)
    _say(
        f"{_size(plan.ram_bytes)} of RAM on {nodes}, {plan.arch}, {plan.page_size >> 10} KiB "
        f"pages; Linux {plan.release.name}"
    )
    if plan.cmdline:
        _say(f"command line {plan.cmdline}")
    if plan.method == "trace":
        _say("exact: the memblock calls of the log, made again")
        return
    words = []
    for name, word in _NAMES.items():
        value, source = plan.assumed.values[name].value, plan.assumed.values[name].source
        text = str(value) if name == "nr_cpus" else format_size(value) if value else "none"
        if name == "nr_cpus":
            number = f"{text} {word}"[: -1 if value == 1 else None]
        else:
            number = f"{word} {_round(text, value)}"
        words.append(number + ("" if source == "default" else f" ({source})"))
    _say(f"by a model: {', '.join(words)}; what is not marked is a distribution's default")


def _round(text: str, value: int | None) -> str:
    return text if not value or len(text) <= 5 else _size(value)


def _show_owners(plan: Plan) -> None:
    outcome = plan.outcome
    scale = outcome.scale_percent
    print(f"\nboot reserves {_size(outcome.boot_bytes)}")
    if scale:
        _say(
            f"Each byte counts {scale} % in lowmem or global, and as much again in its node's "
            "area where it was reserved on a known node."
        )
    print(f"  {'for':<16} {'reserved':>9}" + (f" {'of scratch':>11}" if scale else ""))
    for owner in outcome.owners:
        if owner.reserved_bytes < _SHOWN_BYTES:
            continue
        line = f"  {owner.name:<16} {_size(owner.reserved_bytes):>9}"
        print(line + (f" {_size(owner.scratch_bytes(scale)):>11}" if scale else ""))
    print()


def _told(driver: Driver) -> str:
    text = f"{driver.what} reserves {_size(driver.reserved_bytes)} at boot"
    if driver.reserved_bytes < _SHOWN_BYTES:
        text = f"{driver.what} takes memory that does not count"
    if driver.without_bytes is None:
        return f"{text}; without it KHO turns itself off"
    if not driver.scratch_bytes:
        return f"{text}; without it KHO stays on, with {_size(driver.without_bytes)} of scratch"
    costs = driver.scratch_bytes - driver.without_bytes
    if not costs:
        return f"{text}; it changes nothing of scratch"
    if costs < 0:
        return f"{text}; without it scratch is {_size(driver.without_bytes)}"
    return (
        f"{text}, which makes {_size(costs)} of scratch: without it {_size(driver.without_bytes)}"
    )


def _say(text: str) -> None:
    wrapped = textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    print(printable(wrapped))
