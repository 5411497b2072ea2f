"""Figures that others published, beside what the model says of the same case.

A default that was set from a figure cannot be tested by it: such rows are marked. The others can be
wrong, and some are. Where each stands is in ``docs/blackout.md``.
"""

from __future__ import annotations

from typing import NamedTuple

from khosim.blackout.costs import Costs
from khosim.blackout.estimate import Counted, Estimate, estimate
from khosim.blackout.sweep import Point, line
from khosim.blackout.tally import Item

__all__ = ("Comparison", "comparisons")

_GIB, _MIB = 1 << 30, 1 << 20
_TRACKING = ("preserve_key_radix_ns", "preserve_key_xarray_ns", "serialize_bitmap_ns")


class Comparison(NamedTuple):
    """What was measured, by whom, and both times; ``is_input`` where a default was set from it."""

    what: str
    source: str
    published: str
    seconds: float
    is_input: bool


def comparisons(costs: Costs) -> list[Comparison]:
    """Every published figure with the model's own; each from simulated runs or a single cost."""
    tracked = [
        _some(_host(costs, 48, order=0, sessions=1, devices=0, release=release), _TRACKING)
        for release in ("7.3", "6.17")
    ]
    huge = _host(costs, 500, order=18, sessions=0, devices=0)
    return [
        Comparison("48 GiB marked, table", "Yadav 2025", "469 ms", tracked[0], True),
        Comparison("48 GiB marked and listed", "Yadav 2025", "577 ms", tracked[1], True),
        Comparison(
            "deferred init, 384 GiB a node, 1 thread",
            "Jordan 2020",
            "1786 ms",
            _deferred(costs, 1),
            True,
        ),
        Comparison(
            "the same, 6 threads a node", "Jordan 2020", "359 ms", _deferred(costs, 6), False
        ),
        Comparison(
            "96 CPUs started", "Woodhouse 2022", "100 ms", _one(costs, "cpu_bringup_us", 96), True
        ),
        Comparison(
            "28 CPUs started", "Woodhouse 2022", "80 ms", _one(costs, "cpu_bringup_us", 28), False
        ),
        Comparison(
            "25 MB image copied",
            "Tatashin 2019",
            "22 ms",
            _one(costs, "relocate_mib_us", 25),
            True,
        ),
        Comparison(
            "380 MB image copied",
            "Tatashin 2019",
            "330 ms",
            _one(costs, "relocate_mib_us", 380),
            False,
        ),
        Comparison(
            "boot by kexec, 500 pages of 1 GiB",
            "Arif 2023",
            "1.3 to 3.9 s",
            huge.stage_seconds("boot") - _some(huge, ("userspace_start_us",)),
            False,
        ),
        Comparison(
            "one guest of 256 GB: save, boot, restore",
            "Hy-FiX 2021",
            "2.3 s + 7.6 s",
            _host(costs, 256, sessions=1).blackout_seconds,
            False,
        ),
        Comparison(
            "a host of a cloud updated in place (1 TiB)",
            "Microsoft 2020s",
            "10 s, 30 s",
            _host(costs, 1024, sessions=64, devices=128).blackout_seconds,
            False,
        ),
    ]


def _host(costs: Costs, gib: int, *, order: int = 9, sessions: int = 16, devices: int = 16,
          release: str = "7.3") -> Estimate:
    point = Point(order, sessions, devices, release)
    return estimate(line(point).at(gib * _GIB), costs)


def _some(priced: Estimate, names: tuple[str, ...]) -> float:
    return sum(part.seconds for part in priced.parts if part.item.cost in names)


def _one(costs: Costs, name: str, count: int) -> float:
    return costs.ns(name) * count / 1e9


def _deferred(costs: Costs, threads: int) -> float:
    nodes = 2
    item = Item("boot", "deferred_struct_page_ns")
    counted = Counted(0, "7.3", {item: 384 * _GIB >> 12}, nodes, 0, 0, {})
    return _some(estimate(counted, costs.with_cpus(nodes * threads)), (item.cost,))
