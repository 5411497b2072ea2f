"""Random search: programs drawn from a seed, each with some kinds of steps switched off.

Run ``n`` of seed ``s`` is drawn from the text ``"s:n"`` alone, so that runs can be made in any
order and by any worker. Switching groups of kinds off (swarm testing) lets a program go deep where
one with everything in it would go wide. The last steps of most programs give everything back, so
that what is left behind can be told.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from khosim.explore.catalog import GIVES_BACK, KINDS, SCENARIOS
from khosim.explore.kinds import NEW, Kind
from khosim.explore.world import Step, World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.kernel.behaviours import Release

__all__ = ("is_drained", "named", "random_run")

_STEPS_MAX = 24


def named(world: World, kind: Kind, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``args`` with a name for what the step defines."""
    if kind.letter and args[0] == NEW:
        return (world.fresh(kind.letter), *args[1:])
    return args


def random_run(seed: str, scenario: str, release: str | Release = "7.3") -> World:
    """One program of ``scenario`` drawn from ``seed``, carried out and judged."""
    random = Random(seed)
    chance = 0.5 if scenario == "all" else 0.85
    groups = [group for group in SCENARIOS[scenario] if random.random() < chance]
    world = World(KINDS, release)
    boot = KINDS["boot"]
    specs = boot.choices(world)
    plain = [args for args in specs if args[1] == "kho=on liveupdate=on"]
    odd = "region" in groups or ("successors" in groups and random.random() < 0.5)
    world.run(Step("boot", random.choice(specs if odd else plain)))
    if world.is_over:
        world.judge()
        return world
    kinds = [kind for kind in KINDS.values() if kind.weight and kind.group in ("", *groups)]
    for _ in range(random.randrange(3, _STEPS_MAX)):
        if not _random_step(world, random, kinds, groups):
            break
    drained = random.random() < 0.7 and _give_back(world)
    world.judge(drained=drained)
    return world


def _random_step(
    world: World, random: Random, kinds: Sequence[Kind], groups: Sequence[str]
) -> bool:
    left = [] if world.is_over else list(kinds)
    while left:
        kind = random.choices(left, [_weight(world, kind) for kind in left])[0]
        choices = kind.choices(world)
        if not choices:
            left.remove(kind)
            continue
        args = random.choice(choices)
        if kind.name == "kexec" and ("successors" not in groups or random.random() < 0.4):
            args = choices[0]
        fault, boot = 0, False
        if "faults" in groups and kind.can_fail and random.random() < 0.25:
            boot = kind.name == "kexec" and random.random() < 0.7
            fault = random.randrange(1, 40 if kind.name == "kexec" else 16)
        world.run(Step(kind.name, named(world, kind, args), fault, boot))
        return True
    return False


def _weight(world: World, kind: Kind) -> int:
    # Nobody learns much from a jump with nothing to hand over.
    if kind.name == "kexec" and all(item.state != "preserved" for item in world.items.values()):
        return 1
    return kind.weight


def is_drained(world: World) -> bool:
    """Whether the author holds nothing any more."""
    if world.cursed:
        return False
    return all(item.kind == "ledger" and not item["gets"] for item in world.items.values())


def _give_back(world: World) -> bool:
    for _ in range(0 if world.is_over else 120):
        for name in GIVES_BACK:
            choices = KINDS[name].choices(world)
            if choices and (name != "ledger" or world.of("file", "incoming")):
                step = Step(name, named(world, KINDS[name], choices[0]))
                if world.run(step) or world.is_over:
                    return False
                break
        else:
            return is_drained(world)
    return False
