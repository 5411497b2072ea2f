"""Devices between any two events of the kernels: every interleaving of a few, many of a few more.

A :class:`Model` is a host of :data:`~khosim.explore.hosts.HOSTS`; a :class:`Plan` says what its
devices and vCPUs do after which event of a live update, from the first preserve of the old kernel
to the last finish of the new one, inside the jump and the early boot as well. Random plans depend
on ``"seed:number"`` alone. Exhaustively, depth 1 is every single act at every moment, depth 2 also
every pair of moments, at both of which everybody does everything.
"""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from itertools import combinations, islice
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from khosim.errors import InputError
from khosim.explore.hosts import HOSTS, Act, Host
from khosim.explore.limits import NoEnd, alarm
from khosim.explore.shrink import shape
from khosim.kernel.release import find_release

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from khosim.checks.violation import Violation

__all__ = (
    "DEPTH_MAX",
    "Batch",
    "Model",
    "Plan",
    "Said",
    "Spoken",
    "carry_out",
    "check_model",
    "draw",
    "every_plan",
    "moments",
    "nr_plans",
    "run",
    "shrink",
    "tell",
)

DEPTH_MAX = 2
_LENGTHS = (1, 2, 3, 5, 8, 20, 60, 200)
_WINDOWS = (3, 10, 40)
_TRACE_LINES = 12
_REFUSED_EVENTS = 12


class Model(NamedTuple):
    """What is explored: a host, its kernels' release, the pieces that they are built without."""

    host: str
    release: str = "7.3"
    without: tuple[str, ...] = ()


class Plan(NamedTuple):
    """One interleaving; see :meth:`Host.play` and :class:`Host` for what is no act."""

    acts: tuple[Act, ...] = ()
    updates: int = 1
    refused_by: str = ""
    backwards: bool = False
    allocator: str = "linux"
    seed: int = 0
    low: bool = False
    forgets: str = ""


class Said(NamedTuple):
    """What an invariant said."""

    invariant: str
    message: str

    @property
    def cause(self) -> tuple[str, str]:
        """What findings are grouped by."""
        return self.invariant, shape(self.message)


class Spoken(NamedTuple):
    """A plan in which something spoke, by its number."""

    number: int
    plan: Plan
    said: tuple[Said, ...]


class Batch(NamedTuple):
    """Some plans in a row, of a seed or of an exhaustive search to ``depth``."""

    model: Model
    seed: str
    depth: int
    first: int
    nr_plans: int


def check_model(model: Model) -> None:
    """Raise :class:`InputError` where there is no such host, piece or live update of devices."""
    if not find_release(model.release).luo_flb:
        raise InputError("release", f"{model.release} has no live update of devices; 7.0 and later")
    Host(model.host, release=model.release, without=model.without).close()


def _host(model: Model, plan: Plan) -> Host:
    return Host(
        model.host,
        release=model.release,
        without=model.without,
        allocator=plan.allocator,
        seed=plan.seed,
        low=plan.low,
    )


def run(model: Model, plan: Plan) -> list[Said]:
    """Carry a plan out; what speaks. A simulator that falls over is told as well."""
    try:
        with alarm():
            host = _host(model, plan)
            found = _play(host, plan)
            host.close()
    except NoEnd as stopped:
        return [Said("no-end", str(stopped))]
    except Exception as broken:  # the simulator's own fault: worth a report as well
        return [Said("simulator-crash", f"{type(broken).__name__}: {broken}")]
    return list(dict.fromkeys(Said(it.invariant, it.message) for it in found))


def _play(host: Host, plan: Plan) -> list[Violation]:
    return host.play(
        plan.acts,
        updates=plan.updates,
        refused_by=plan.refused_by,
        backwards=plan.backwards,
        forgets=plan.forgets,
    )


@lru_cache(maxsize=64)
def moments(model: Model) -> int:
    """How many events one live update has, where no device acts: what comes after each."""
    host = _host(model, Plan())
    host.live_update()
    host.close()
    return host.now


def _actions(model: Model) -> list[tuple[str, str]]:
    # A stray request is refused as long as somebody translates; else it may hit anything.
    found = HOSTS[model.host].actions()
    return [(who, what) for who, what in found if what != "stray" or not model.without]


# -- which plans ----------------------------------------------------------------------------------


def draw(model: Model, name: str) -> Plan:
    """The random plan of ``"seed:number"``."""
    random = Random(name)
    updates = 2 if random.random() < 0.25 else 1
    names = [device for device, _ in HOSTS[model.host].devices]
    refused_by = random.choice(names) if random.random() < 0.2 else ""
    allocator = "adversarial" if random.random() < 0.5 else "linux"
    wanted = [action for action in _actions(model) if random.random() < 0.6]
    wanted = wanted or _actions(model)
    end = moments(model) * updates + (_REFUSED_EVENTS if refused_by else 0)
    low, high = 0, end
    if random.random() < 0.5:
        low = random.randrange(end)
        high = min(end, low + random.choice(_WINDOWS))
    acts = [
        Act(random.randrange(low, high), *random.choice(wanted))
        for _ in range(random.choice(_LENGTHS))
    ]
    if random.random() < 0.1:
        who, what = random.choice(wanted)
        acts += [Act(moment, who, what) for moment in range(low, high)]
    return Plan(
        tuple(sorted(acts, key=lambda act: act.moment)),
        updates,
        refused_by,
        random.random() < 0.5,
        allocator,
        random.randrange(1 << 16) if allocator == "adversarial" else 0,
        not model.without and random.random() < 0.5,
        _forgotten(model, name),
    )


def _forgotten(model: Model, name: str) -> str:
    # Now and then a guest that nobody preserves, beside others.
    random, guests = Random(f"{name} forgets"), HOSTS[model.host].guests
    if model.without or len(guests) < 2 or random.random() > 0.25:
        return ""
    return random.choice(guests).name


def nr_plans(model: Model, depth: int) -> int:
    """How many plans :func:`every_plan` has."""
    count = moments(model)
    return count * len(_actions(model)) + (count * (count - 1) // 2 if depth > 1 else 0)


def every_plan(model: Model, depth: int) -> Iterator[Plan]:
    """Every single act at every moment; with depth 2 then every pair of moments, all acts at both.

    Guests' memory lies, as devices see it, where kernels have theirs, unless a piece is left out.
    """
    count, actions = moments(model), _actions(model)
    low = not model.without
    for moment in range(count):
        for who, what in actions:
            yield Plan((Act(moment, who, what),), low=low)
    if depth > 1:
        at = [tuple(Act(moment, *action) for action in actions) for moment in range(count)]
        for first, second in combinations(at, 2):
            yield Plan(first + second, low=low)


def carry_out(work: Batch, tick: Callable[[int], None]) -> list[Spoken]:
    """Carry out some plans; those in which something spoke."""
    found = []
    plans: Iterator[Plan]
    if work.depth:
        plans = islice(every_plan(work.model, work.depth), work.first, work.first + work.nr_plans)
    else:
        numbers = range(work.first, work.first + work.nr_plans)
        plans = (draw(work.model, f"{work.seed}:{number}") for number in numbers)
    for number, plan in enumerate(plans, work.first):
        tick(number)
        said = run(work.model, plan)
        if said:
            found.append(Spoken(number, plan, tuple(said)))
    return found


# -- telling --------------------------------------------------------------------------------------


def shrink(model: Model, plan: Plan, cause: tuple[str, str]) -> Plan:
    """The least of ``plan`` that still makes ``cause`` speak: acts taken away, options reset."""

    def speaks(smaller: Plan) -> bool:
        return any(said.cause == cause for said in run(model, smaller))

    def simplified() -> Plan:
        simple = plan
        for name, value in Plan._field_defaults.items():
            less = simple._replace(**{name: value})
            if name != "acts" and less != simple and speaks(less):
                simple = less
        return simple

    plan = simplified()
    width = len(plan.acts)
    while width:
        start = 0
        while start < len(plan.acts):
            less = plan._replace(acts=plan.acts[:start] + plan.acts[start + width :])
            if speaks(less):
                plan = less
            else:
                start += width
        width = min(width // 2, len(plan.acts))
    return simplified()


def tell(model: Model, plan: Plan) -> tuple[str, list[str]]:
    """The plan as a programme to run, and what its devices did."""
    host = _host(model, plan)
    with suppress(Exception):  # told already, if that is what it shows
        _play(host, plan)
    host.close()
    return _program(model, plan, host), [_line(host, i) for i in range(len(host.done))][
        -_TRACE_LINES:
    ]


def _program(model: Model, plan: Plan, host: Host) -> str:
    options = [repr(model.host)]
    told: list[tuple[str, object, object]] = [
        ("release", model.release, "7.3"),
        ("without", model.without, ()),
        ("allocator", plan.allocator, "linux"),
        ("seed", plan.seed, 0),
        ("low", plan.low, False),
    ]
    options += [f"{name}={value!r}" for name, value, default in told if value != default]
    lines = ["from khosim.explore.hosts import Host", "", f"host = Host({', '.join(options)})"]
    where = {done.act: done.event for done in host.done}
    for act in plan.acts:
        line = f"host.act({act.moment}, {act.who!r}, {act.what!r})"
        if act in where:
            line += f"  # kernel {where[act].generation}, {where[act].symbol}"
        lines.append(line)
    update = []
    if plan.refused_by:
        update.append(f"refused_by={plan.refused_by!r}")
    if plan.backwards:
        update.append("backwards=True")
    if plan.forgets:
        update.append(f"forgets={plan.forgets!r}")
    lines += [f"host.live_update({', '.join(update)})"] * plan.updates
    return "\n".join([*lines, 'print(*host.verdict(), sep="\\n")']) + "\n"


def _line(host: Host, number: int) -> str:
    act, event, outcome = host.done[number]
    where = f"{event.generation} {event.phase} {event.symbol}"
    return f"{act.moment} {where}: {act.who} {act.what}: {outcome}"
