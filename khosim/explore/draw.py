"""Random search: programs drawn from a seed, each with some kinds of steps switched off.

Run ``n`` of seed ``s`` is drawn from the text ``"s:n"`` alone, so that runs can be made in any
order and by any worker. Switching groups of kinds off (swarm testing) lets a program go deep where
one with everything in it would go wide. The last steps of most programs give everything back, so
that what is left behind can be told.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from khosim.explore import agent_calls
from khosim.explore.catalog import GIVES_BACK, KINDS, SCENARIOS
from khosim.explore.kinds import NEW, Args, Kind, is_lawful
from khosim.explore.kinds_boot import machine_weight
from khosim.explore.world import JUMPS, LOADS, Step, World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.kernel.behaviours import Release

__all__ = ("is_drained", "named", "random_run")

_STEPS_MAX = 36
_REFUSALS_MAX = 3
_NO_OOPS = (*JUMPS, "reset", "kill", *agent_calls.__all__)
"""Where no task dies: agents of those calls clean up after themselves, which the dead cannot."""
_SWEEP_MAX = 16
_FACTORS = (0.2, 1, 1, 3)
"""A program has its own likings: kinds of steps that it takes seldom, or often."""
_SHARE = {"bytes": 1, "maps": 1, "devices": 1, "oops": 1, "memfd": 5, "shared": 5, "sessions": 4}
"""Of scenarios in "all", where it is not 2: what has more kinds of steps wants more programs."""


def named(world: World, kind: Kind, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``args`` with a name for what the step defines."""
    if kind.letter and args[0] == NEW:
        return (world.fresh(kind.letter), *args[1:])
    return args


def random_run(
    seed: str,
    scenario: str,
    release: str | Release = "7.3",
    random: Random | None = None,
) -> World:
    """One program of ``scenario`` drawn from ``seed``, carried out and judged.

    With ``random`` it is drawn from that instead.
    """
    random = random or Random(seed)
    groups = _groups(random, scenario)
    world = World(KINDS, release)
    world.run(Step("boot", _machine(random, world, groups)))
    if world.is_over:
        world.judge()
        return world
    kinds = {
        kind.name: kind.weight * random.choice(_FACTORS)
        for kind in KINDS.values()
        if kind.weight and kind.group in ("", *groups)
    }
    for _ in range(random.randrange(3, _STEPS_MAX)):
        if not _random_step(world, random, kinds, groups):
            break
    drained = random.random() < 0.7 and _give_back(world)
    world.judge(drained=drained)
    return world


def _groups(random: Random, scenario: str) -> list[str]:
    # Most programs of "all" are about one thing, with a little of all others.
    chance = 0.92
    wanted = SCENARIOS[scenario]
    extra: list[str] = []
    if scenario == "all":
        if random.random() < 0.8:
            names = [name for name in SCENARIOS if name != "all"]
            wanted = SCENARIOS[random.choices(names, [_SHARE.get(name, 2) for name in names])[0]]
            extra = [group for group in SCENARIOS["all"] if random.random() < 0.08]
        else:
            chance = 0.4
    return list(dict.fromkeys([g for g in wanted if random.random() < chance] + extra))


def _machine(random: Random, world: World, groups: Sequence[str]) -> tuple[Any, ...]:
    choices = KINDS["boot"].choices(world)
    specs = list(dict.fromkeys(args[0] for args in choices))
    spec = random.choices(specs, [machine_weight(spec, groups) for spec in specs])[0]
    lines = [args for args in choices if args[0] == spec]
    odd = "region" in groups or "successors" in groups
    if not odd or random.random() > 0.6:
        return lines[0]
    return _by_change(random, lines[0][1], [(args[1], args) for args in lines])


def _random_step(
    world: World, random: Random, kinds: dict[str, float], groups: Sequence[str]
) -> bool:
    left = [] if world.is_over else [KINDS[name] for name in kinds]
    while left:
        weights = [_weight(world, kind, kinds[kind.name]) for kind in left]
        kind = random.choices(left, weights)[0]
        choices = kind.choices(world)
        if not choices:
            left.remove(kind)
            continue
        args = random.choice(choices)
        if kind.name in LOADS:
            args = choices[0]
            if "successors" in groups and random.random() < 0.6:
                args = _by_change(random, world.cmdline, [(args[0], args) for args in choices])
        step = Step(kind.name, named(world, kind, args), *_fault(random, world, kind, args, groups))
        errno = world.run(step)
        if errno == "ENOMEM" and world.has_fired and not step.boot and random.random() < 0.6:
            _sweep(world, kind, step)
        return True
    return False


def _sweep(world: World, kind: Kind, step: Step) -> None:
    # What was refused memory and may be tried again is refused at each later place, until it works.
    for fault in range(step.fault + 1, step.fault + _SWEEP_MAX):
        if world.is_over or not world.has_fired or not is_lawful(world, kind, step.args):
            return
        step = step._replace(fault=fault)
        if world.run(step) != "ENOMEM":
            return


def _by_change(random: Random, before: str, choices: list[tuple[str, Args]]) -> Args:
    # One way to change a command line is as likely as another, however many values it has.
    ways: dict[tuple[Any, ...], list[Args]] = {}
    words = before.split()
    for line, args in choices:
        now = line.split()
        more = tuple(word.split("=")[0] for word in now if word not in words)
        less = tuple(word.split("=")[0] for word in words if word not in now)
        ways.setdefault((more, less, len(args)), []).append(args)
    return random.choice(ways[random.choice(list(ways))])


def _fault(
    random: Random, world: World, kind: Kind, args: Args, groups: Sequence[str]
) -> tuple[int, bool, bool]:
    if "oops" in groups and kind.name not in _NO_OOPS and random.random() < 0.1:
        return random.randrange(1, random.choice((4, 12))), False, True
    if "faults" not in groups or not kind.can_fail or random.random() > 0.25:
        return 0, False, False
    boot = kind.name in JUMPS and random.random() < 0.7
    asks = kind.asks if isinstance(kind.asks, int) else kind.asks(world, args)
    chance = random.random()
    if chance < 0.2:  # the last one is where most has been done that may have to be undone
        return asks, boot, False
    return random.randrange(1, (asks if chance < 0.9 else 3 * asks) + 1), boot, False


def _weight(world: World, kind: Kind, weight: float) -> float:
    # Nobody learns much from a jump with nothing to hand over.
    is_jump = kind.name in JUMPS
    if is_jump and all(item.state != "preserved" for item in world.items.values()):
        return 1
    return weight


def is_drained(world: World) -> bool:
    """Whether the author holds nothing any more, but for an image that is loaded."""
    if world.cursed:
        return False
    return all(
        item.state == "lost"
        or item.kind == "image"
        or (item.kind == "ledger" and not item["gets"])
        for item in world.items.values()
    )


def _give_back(world: World) -> bool:
    refused = 0
    for _ in range(0 if world.is_over else 120):
        for name in GIVES_BACK:
            choices = KINDS[name].choices(world)
            if choices and (name != "ledger" or world.of("file", "incoming")):
                step = Step(name, named(world, KINDS[name], choices[0]))
                refused += bool(world.run(step))
                if world.is_over or refused > _REFUSALS_MAX:
                    return False
                break
        else:
            return is_drained(world)
    return False
