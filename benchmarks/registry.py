"""The benchmarks by name.

To add one: write ``def NAME(context: Context) -> Iterator[Record]`` in a module beside this one,
name its records ``NAME.WHAT``, and put it into :data:`BENCHMARKS`. ``context.ratio()`` times two
actions in turns; for memory, measure inside :func:`benchmarks.harness.in_child` and yield a
:class:`Record` with ``unit="bytes"``. With ``context.native`` None, yield a record without
measurements whose note is ``context.why_no_native``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from benchmarks.blackout import blackout
from benchmarks.devices import devices
from benchmarks.explore import explore
from benchmarks.handover import handover
from benchmarks.harness import Context, Record
from benchmarks.luo import luo
from benchmarks.memory import memory
from benchmarks.startup import startup
from benchmarks.tracking import tracking

__all__ = ("BENCHMARKS", "Benchmark")

Benchmark = Callable[[Context], Iterator[Record]]

BENCHMARKS: Mapping[str, Benchmark] = {
    "startup": startup,
    "handover": handover,
    "tracking": tracking,
    "memory": memory,
    "luo": luo,
    "devices": devices,
    "blackout": blackout,
    "explore": explore,
}
