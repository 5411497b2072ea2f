"""Counts of hosts too large to simulate page by page: two small runs, and a straight line.

A :class:`Point` is a host. Its scenario is carried out with two small amounts of guest memory, on a
host that grows with them, and each count is drawn on through both: what a handover does for a block
it does for each of them, and the rest does not depend on memory. What is not straight: records of
folios take a chunk page more after every 511 pages of them, pages of the preserved-memory tree come
one by one, and memory that is handed out in pieces makes memblock's array grow with it (at 4 TiB
``reserve_scan_ns`` is met twice as often as the line says, which is 40 ms of 23 s).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from khosim.blackout.estimate import Counted, count_handovers
from khosim.blackout.tally import Item, Tally
from khosim.errors import InputError
from khosim.kernel.release import find_release
from khosim.scenario.parse import parse_scenario
from khosim.scenario.play import Player

__all__ = ("ORDERS", "Line", "Point", "line", "run_small", "scenario_text", "small_sizes")

ORDERS = (0, 9, 18)
"""4 KiB folios, 2 MiB folios, and 1 GiB blocks (``reserve_mem`` regions: no memfd has such)."""
_GIB = 1 << 30
_GIB_ORDER = 18
_RECORDS_A_PAGE = 256
_NOTHING = "the successor takes nothing over"


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """A host: how its guests' memory is cut, who holds it, and which kernel runs before and after.

    ``sessions`` share the memory and the ``devices``. Releases without live update have neither:
    there the memory is plain folios that somebody preserves.
    """

    order: int = 9
    sessions: int = 16
    devices: int = 16
    release: str = "7.3"

    @property
    def has_luo(self) -> bool:
        """Whether the release has sessions at all."""
        return bool(find_release(self.release).luo)


class Line(NamedTuple):
    """Two counted runs, of ``first`` and ``second`` bytes of guest memory."""

    first: int
    second: int
    low: Counted
    high: Counted

    def at(self, len_bytes: int) -> Counted:
        """What a handover of so much guest memory does."""
        place = (len_bytes - self.first) / (self.second - self.first)

        def drawn(one: float, two: float) -> float:
            value = one + (two - one) * place
            return round(max(0.0, value)) if isinstance(one, int) else max(0.0, value)

        counts: dict[Item, float] = {}
        for item in self.low.counts.keys() | self.high.counts.keys():
            one, two = (each.counts.get(item, 0) for each in (self.low, self.high))
            counts[item] = drawn(one, two)
        orders = self.low.by_order.keys() | self.high.by_order.keys()
        return self.high._replace(
            counts=counts,
            preserved_bytes=round(drawn(self.low.preserved_bytes, self.high.preserved_bytes)),
            by_order={
                order: round(drawn(*(one.by_order.get(order, 0) for one in (self.low, self.high))))
                for order in sorted(orders, key=int)
            },
        )


def line(point: Point) -> Line:
    """Carry a point's scenario out twice."""
    first, second = small_sizes(point)
    return Line(first, second, run_small(point, first), run_small(point, second))


def small_sizes(point: Point) -> tuple[int, int]:
    """Two amounts of guest memory (bytes) that are quick to run and a whole number of blocks each.

    Records of folios, of 16 bytes, fill whole pages.
    """
    if point.order == _GIB_ORDER:
        return 2 * _GIB, 4 * _GIB
    holders = max(1, point.sessions) if point.has_luo else 1
    unit = (_RECORDS_A_PAGE << point.order << 12) * holders
    # A bitmap marks so much: less would not tell what the preserved-memory map grows by.
    bitmap_bytes = find_release(point.release).bitmap_bytes or 1 << 12
    leaf = bitmap_bytes * 8 << point.order << 12
    first = -(-leaf // unit) * unit
    return first, 2 * first


def run_small(point: Point, len_bytes: int) -> Counted:
    """One run with so many bytes of guest memory, counted.

    Raises :class:`InputError` for a point that makes no sense or does not run.
    """
    place = "sweep"
    scenario = parse_scenario(scenario_text(point, len_bytes), place)
    tally = Tally(scenario.page_size)
    player = Player(scenario, listener=tally)
    for _ in player.generations():
        pass
    counted = count_handovers(player.result, tally)
    # Invariants may speak: memfd-v1 does not carry large folios whole, and costs what it costs.
    steps = [step for kernel in player.result.kernels for step in kernel.steps]
    refused = [step.note for step in steps if step.outcome != "ok"]
    if not counted or refused:
        raise InputError(f"{place}: Linux {point.release}", (refused or [_NOTHING])[0])
    return counted[0]


def scenario_text(point: Point, len_bytes: int) -> str:
    """The scenario of a point with so many bytes of guest memory: one handover."""
    cmdline = ["kho=on"]
    before: list[str] = []
    after: list[str] = []
    ram = len_bytes + len_bytes // 4 + 8 * _GIB
    if point.order == _GIB_ORDER:
        cmdline += ["kho_scratch=256M,256M,256M"]
        cmdline += [f"reserve_mem=1G:1G:gib{i}" for i in range(len_bytes // _GIB)]
    elif not point.has_luo:
        count = len_bytes >> 12 >> point.order
        what = f'name = "guest", count = {count}, order = {point.order}, fill = "none"'
        before = [f'{{ do = "folios", {what} }}']
        after = ['{ do = "restore", name = "*" }']
    if point.has_luo:
        cmdline += ["liveupdate=on"]
        before, after = _sessions(point, len_bytes)
    return "\n".join(
        [
            f"[machine]\nram = {ram}\nnodes = 2",
            f'[kernel]\nrelease = "{point.release}"\ncmdline = "{" ".join(cmdline)}"',
            f"[[generation]]\nsteps = [\n{_listed(before)}]",
            f"[[generation]]\nsteps = [\n{_listed(after)}]",
        ]
    )


def _sessions(point: Point, len_bytes: int) -> tuple[list[str], list[str]]:
    huge = "always" if point.order else "never"
    each = len_bytes // max(1, point.sessions)
    before = []
    for i in range(point.sessions):
        files = [f"device-{k}" for k in range(i, point.devices, point.sessions)]
        before += [f'{{ do = "device", name = "{name}" }}' for name in files]
        if point.order != _GIB_ORDER:
            files.insert(0, f"vm-{i}")
            what = f'size = {each}, pages = 0, huge = "{huge}", node = {i % 2}'
            before.append(f'{{ do = "guest", name = "vm-{i}", {what} }}')
        listed = ", ".join(f'"{name}"' for name in files)
        before.append(f'{{ do = "session", name = "tenant-{i}", files = [{listed}] }}')
    after = ['{ do = "retrieve", session = "*" }'] if point.sessions else []
    return before, after


def _listed(steps: list[str]) -> str:
    return "".join(f"  {step},\n" for step in steps)
