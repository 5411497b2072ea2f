"""What came of a scenario: the facts of each kernel, the verdict of each invariant."""

from __future__ import annotations

import dataclasses
from typing import Any

from khosim.checks.violation import Violation
from khosim.scenario.facts import GenerationFacts
from khosim.scenario.model import ACCEPTED, Scenario
from khosim.scenario.verdict import Verdict, verdicts

__all__ = ("Result",)


@dataclasses.dataclass(slots=True)
class Result:
    """What came of a scenario."""

    scenario: Scenario
    kernels: list[GenerationFacts] = dataclasses.field(default_factory=list)
    handovers: int = 0
    """Handovers that a successor accepted."""
    failures: list[str] = dataclasses.field(default_factory=list)
    """What went otherwise than the scenario says, in words."""
    violations: list[Violation] = dataclasses.field(default_factory=list)
    invariants: list[Verdict] = dataclasses.field(default_factory=list)

    @property
    def preserved_bytes(self) -> int:
        """Bytes that accepted handovers carried, summed over the handovers."""
        pairs = zip(self.kernels, self.kernels[1:], strict=False)
        return sum(
            giver.preserved.len_bytes for giver, taker in pairs if taker.outcome == ACCEPTED
        )

    @property
    def ok(self) -> bool:
        """Whether all went as the scenario says and exactly the expected invariants spoke."""
        return not self.failures

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists, in a fixed order."""
        scenario = self.scenario
        return {
            "scenario": scenario.name,
            "seed": scenario.seed,
            "release": scenario.kernel.release.name,
            "generations": len(self.kernels),
            "handovers": self.handovers,
            "preserved_bytes": self.preserved_bytes,
            "ok": self.ok,
            "invariants": {verdict.name: verdict.ok for verdict in self.invariants},
            "violations": [violation._asdict() for violation in self.violations],
            "expected_violations": sorted(scenario.violations),
            "failures": self.failures,
            "machine": {
                "arch": scenario.memory_map.arch,
                "page_size": scenario.page_size,
                "ram_bytes": scenario.memory_map.ram_bytes,
                "nodes": list(scenario.memory_map.online_nodes),
                "allocator": scenario.allocator,
            },
            "kernels": [facts.as_json() for facts in self.kernels],
        }

    def judge(self, violations: list[Violation]) -> None:
        """Take down what the invariants say in the end."""
        self.violations = violations
        self.invariants = verdicts(violations)
        spoke = {violation.invariant for violation in violations}
        expected = self.scenario.violations
        self.failures += [f"the invariant {name} is violated" for name in sorted(spoke - expected)]
        self.failures += [
            f"the invariant {name} was to be violated, and holds"
            for name in sorted(expected - spoke)
        ]
