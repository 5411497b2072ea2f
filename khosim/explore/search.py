"""Programs: drawn from a seed, or carried out again from their steps.

Run ``n`` of seed ``s`` is drawn from the text ``"s:n"`` alone (:mod:`khosim.explore.draw`), so that
runs can be made in any order and by any worker. The kinds of steps are in
:mod:`khosim.explore.catalog`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.explore.catalog import GROUPS, KINDS, SCENARIOS
from khosim.explore.draw import is_drained, named, random_run
from khosim.explore.kinds import is_lawful
from khosim.explore.world import Problem, Step, World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.kernel.behaviours import Release

__all__ = (
    "GROUPS",
    "KINDS",
    "SCENARIOS",
    "is_drained",
    "named",
    "problems_of",
    "random_run",
    "replay",
)


def replay(
    steps: Sequence[Step], release: str | Release = "7.3", *, listens: bool = False
) -> World | None:
    """Carry a program out again and judge it; None where it is not lawful."""
    world = World(KINDS, release, listens=listens)
    for step in steps:
        kind = KINDS[step.kind]
        if step.kind != "boot" and not world.has_kernel:
            return None
        if not is_lawful(world, kind, step.args):
            return None
        world.run(step)
        if world.is_over:
            break
    if "machine" not in world.vars:
        return None
    world.judge(drained=not world.is_over and is_drained(world))
    return world


def problems_of(world: World | None) -> list[Problem]:
    """What spoke, nothing for an unlawful program."""
    return [] if world is None else world.problems
