"""What counting and pricing a live update costs: beside the run itself, and for a sweep over hosts.

``counting`` is a handover of a guest of 32 MiB that is listened to, against the same without a
listener. ``sweep`` is what one point of ``khosim blackout`` takes, for a host of 4 TiB in pages
(two small runs and a straight line), against starting a Python interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Context, Record, start_python

__all__ = ("blackout",)

_TEXT = """
[machine]
ram = "256M"
[kernel]
cmdline = "kho=on liveupdate=on"
[[generation]]
steps = [
  { do = "guest", name = "vm", size = "32M", pages = 8 },
  { do = "session", name = "s", files = ["vm"] },
]
[[generation]]
steps = [{ do = "retrieve", session = "s" }, { do = "finish", session = "s" }]
"""


def blackout(context: Context) -> Iterator[Record]:
    """A listener that counts, and a point of the sweep."""
    from khosim.blackout.costs import Costs
    from khosim.blackout.estimate import estimate
    from khosim.blackout.sweep import Point, line
    from khosim.blackout.tally import Tally
    from khosim.scenario.parse import parse_scenario
    from khosim.scenario.play import Player

    scenario = parse_scenario(_TEXT, "benchmark")

    def play(*, counts: bool) -> None:
        player = Player(scenario)
        if counts:
            player.machine.listen(Tally(scenario.page_size))
        for _ in player.generations():
            pass
        if not player.result.ok:
            raise AssertionError("the scenario failed")

    yield context.ratio(
        "blackout.counting",
        lambda: play(counts=True),
        lambda: play(counts=False),
        baseline="nobody listens",
        limit=2.5,
        rounds=15,
        note="a guest of 32 MiB in pages, one handover",
    )
    yield context.ratio(
        "blackout.sweep",
        lambda: estimate(line(Point(0, 16, 16, "7.3")).at(4 << 40), Costs.defaults()),
        start_python,
        baseline="python -c pass",
        limit=40,
        rounds=5,
        note="4 TiB in pages, 16 sessions, 16 devices",
    )
