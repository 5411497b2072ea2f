"""What is known of one handover, and its outcome in a sentence."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ("INTACT", "SEVERITY", "Leg")

INTACT = "intact"
SEVERITY = ("right", "refused", "misread", "panic")
"""What a handover can come to, from best to worst."""
HARMLESS = ("KHO: found", "Revived", "KHO: exec from", "luo: Retrieved")


@dataclass
class Leg:
    """One handover. Blocks are what the map has keys for; ``fates`` are told by name."""

    old: str
    new: str
    outcome: str = ""
    names: list[str] = field(default_factory=list)
    """What is in play."""
    cause: str = ""
    """What the two releases understand differently under one name."""
    panic: str = ""
    where: str = ""
    """What a kernel that died was about."""
    preserved: int = 0
    """Blocks in the predecessor's map."""
    lost: int = 0
    """Blocks that were preserved and not reserved."""
    phantom: int = 0
    """Blocks that were reserved and not preserved."""
    fates: dict[str, str] = field(default_factory=dict)
    unclaimed: list[str] = field(default_factory=list)
    """What was preserved and is beyond the successor: it has no calls for it."""
    log: list[str] = field(default_factory=list)
    """The successor's words about the handover."""
    violations: dict[str, list[str]] = field(default_factory=dict)

    @property
    def contradiction(self) -> str:
        """Where the ways to judge disagree: damage that no invariant speaks of; else empty."""
        if self.outcome == "misread" and not self.violations:
            return "there is damage, and no invariant speaks"
        if self.outcome == "misread" and (self.lost or self.phantom):
            return "" if "map-agrees" in self.violations else "map-agrees does not speak"
        if self.outcome == "refused" and INTACT in self.fates.values():
            return "it was refused, and something came through"
        return ""

    @property
    def damage(self) -> dict[str, str]:
        """The fates that are none to wish for."""
        return {name: fate for name, fate in self.fates.items() if fate != INTACT}

    @property
    def why(self) -> str:
        """The outcome in a sentence."""
        if self.outcome == "panic":
            told = [line for line in self.log if not line.startswith(HARMLESS)]
            before = "; ".join([self._misread() or "accepted", *told])
            return f"{before}; then, {self.where}: {self.panic}"
        if self.outcome == "refused":
            said = " / ".join(self.log) or "nothing was handed over, and nothing is said about it"
            return f"{said}; lost: {', '.join(self.damage) or 'nothing'}"
        if self.outcome == "misread":
            return self._misread()
        alone = f"; {self.new} has no calls for: {', '.join(self.unclaimed)}"
        text = f"all {self.preserved} blocks reserved, all content intact"
        return text + (alone if self.unclaimed else "")

    @property
    def gone(self) -> list[str]:
        """What the successor does not have, or not as it was; all of it where it died."""
        return sorted(self.names if self.panic else self.damage)

    def _misread(self) -> str:
        parts = [self.cause] if self.cause and (self.lost or self.phantom) else []
        if self.lost:
            parts.append(f"{self.lost} of {self.preserved} blocks not reserved")
        if self.phantom:
            parts.append(f"{self.phantom} phantom reservations")
        parts += [f"{name}: {fate}" for name, fate in self.damage.items()]
        if not parts:
            parts = [f"{name} is broken" for name in self.violations]
        return "; ".join(parts)

    def __str__(self) -> str:
        lines = [f"{self.old} -> {self.new}: {self.outcome}", f"  {self.why}"]
        lines += [f"  log: {line}" for line in self.log]
        for name, messages in self.violations.items():
            lines.append(f"  {name}, {len(messages)}: {messages[0]}")
        return "\n".join(lines)
