"""From counts to time: each count times its cost, summed by stage. Linear, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from khosim.blackout.costs import Costs
from khosim.blackout.tally import BLACKOUT, STAGES, Item, Tally
from khosim.scenario.model import ACCEPTED
from khosim.scenario.result import Result

__all__ = ("CAVEAT", "Counted", "Estimate", "Part", "count_handovers", "estimate")

CAVEAT = (
    "an estimate from counted steps and replaceable costs, most of them assumptions; no firmware, "
    "no driver's own state, no contention"
)
_NS = 1e9
_ONCE = (
    Item("jump", "shutdown_us"),
    Item("boot", "kernel_start_us"),
    Item("boot", "userspace_start_us"),
)
"""What each handover has once."""


class Counted(NamedTuple):
    """What one handover did, ready to be priced: also what a successor's boot does by RAM size."""

    generation: int
    """The kernel that handed over."""
    release: str
    """The successor's."""
    counts: dict[Item, float]
    nodes: int
    events: int
    preserved_bytes: int
    by_order: dict[str, int]


class Part(NamedTuple):
    """How often something was done, and what it costs."""

    item: Item
    number: float
    each_ns: float
    """For one, with threads taken into account."""

    @property
    def seconds(self) -> float:
        """Count times cost."""
        return self.number * self.each_ns / _NS


class Estimate(NamedTuple):
    """A priced handover."""

    counted: Counted
    parts: tuple[Part, ...]

    def stage_seconds(self, stage: str) -> float:
        """What a stage takes."""
        return sum(part.seconds for part in self.parts if part.item.stage == stage)

    @property
    def blackout_seconds(self) -> float:
        """How long guests stand still."""
        return sum(map(self.stage_seconds, BLACKOUT))

    @property
    def running_seconds(self) -> float:
        """How long it takes while guests still run."""
        return sum(self.stage_seconds(stage) for stage in STAGES if stage not in BLACKOUT)

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        counted = self.counted
        return {
            "generation": counted.generation,
            "release": counted.release,
            "preserved_bytes": counted.preserved_bytes,
            "by_order": counted.by_order,
            "blackout_events": counted.events,
            "guests_run_seconds": self.running_seconds,
            "blackout_seconds": self.blackout_seconds,
            "stages": {stage: self.stage_seconds(stage) for stage in STAGES},
            "parts": [
                {
                    "stage": part.item.stage,
                    "cost": part.item.cost,
                    **({"handler": part.item.handler} if part.item.handler else {}),
                    "count": part.number,
                    "each_ns": part.each_ns,
                    "seconds": part.seconds,
                }
                for part in self.parts
            ],
        }


def count_handovers(result: Result, tally: Tally) -> list[Counted]:
    """The accepted handovers of a run that ``tally`` listened to."""
    memory_map, page_size = result.scenario.memory_map, result.scenario.page_size
    found = []
    for giver, taker in zip(result.kernels, result.kernels[1:], strict=False):
        handover = tally.handovers.get(giver.generation)
        if taker.outcome != ACCEPTED or handover is None:
            continue
        counts = {item: count for item, count in handover.counts.items() if count}
        counts |= _struct_pages(
            memory_map.ram_bytes // page_size,
            _largest_share(result) if taker.deferred_struct_pages else 0.0,
            handover.preserved_pages,
        )
        if memory_map.arch != "x86_64":
            counts.pop(Item("boot", "decompress_mib_us"), None)  # an arm64 Image is not packed
        counts[Item("resume", "resume_session_us")] = counts.get(
            Item("retrieve", "retrieve_session_us"), 0
        )
        found.append(
            Counted(
                giver.generation,
                taker.release,
                counts,
                len(result.scenario.memory_map.online_nodes),
                handover.events,
                giver.preserved.len_bytes,
                dict(giver.preserved.by_order),
            )
        )
    return found


def _largest_share(result: Result) -> float:
    # Of all RAM, what the largest node has.
    memory_map = result.scenario.memory_map
    by_node: dict[int, int] = {}
    for node in memory_map.node_ranges:
        for start, end in memory_map.ram_ranges:
            common = max(0, min(end, node.end) - max(start, node.start))
            by_node[node.nid] = by_node.get(node.nid, 0) + common
    return max(by_node.values()) / memory_map.ram_bytes


def _struct_pages(ram_pages: int, share: float, preserved: int) -> dict[Item, float]:
    # Deferred, a node's thread leaves out what kho_preserved_memory_reserve has initialised. That
    # preserved memory is spread over the nodes as RAM is, is taken for granted.
    if not share:
        return {Item("boot", "struct_page_ns"): ram_pages}
    return {
        Item("boot", "struct_page_ns"): preserved,
        Item("boot", "deferred_struct_page_ns"): round((ram_pages - preserved) * share),
    }


def estimate(counted: Counted, costs: Costs) -> Estimate:
    """Price a handover."""
    host = costs.host
    counts: Mapping[Item, float] = {
        **counted.counts,
        **dict.fromkeys(_ONCE, 1),
        Item("boot", "cpu_bringup_us"): host.cpus,
    }
    threads = max(1, min(host.cpus // max(1, counted.nodes), host.deferred_threads_max))
    order = {name: i for i, name in enumerate((*costs.plain, *costs.by_handler))}
    parts = []
    for item in sorted(counts, key=lambda it: (STAGES.index(it.stage), order[it.cost], it.handler)):
        each = costs.ns(item.cost, item.handler)
        if item.cost == "deferred_struct_page_ns":
            each /= threads
        if counts[item]:
            parts.append(Part(item, counts[item], each))
    return Estimate(counted, tuple(parts))
