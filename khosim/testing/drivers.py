"""Who lives the lives: Hypothesis with a state machine, or a driver that goes deep.

Hypothesis tries many short lives and shrinks what it finds. It spreads its steps thin over all
operations; :func:`deep_lives` takes them by their weights, for as many steps as it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from khosim.errors import InputError
from khosim.kernel.release import Release, find_release
from khosim.testing.faults import FaultPlan
from khosim.testing.life import Life
from khosim.testing.ops_sessions import chosen
from khosim.testing.plans import MachinePlan
from khosim.testing.rules import Hooks, Operation, Rules
from khosim.testing.shrink import Failure, failure_of, shrink

if TYPE_CHECKING:
    from unittest import TestCase

    from khosim.testing.faults import Fault

__all__ = ("deep_lives", "handover_machine")

_MACHINES = st.builds(
    lambda size, allocator, seed: MachinePlan(
        ram=size[0], nodes=size[1], allocator=allocator, seed=seed
    ),
    st.sampled_from((("64M", 1), ("64M", 1), ("96M", 2))),
    st.sampled_from(("linux", "adversarial")),
    st.integers(0, 1 << 16),
)


def handover_machine(
    ops: Sequence[Operation] = (),
    invariants: Sequence[Callable[..., Any]] = (),
    *,
    faults: Any = None,
    hooks: Hooks | None = None,
    standard: Sequence[str] = ("memory", "sessions"),
    machines: Any = None,
    release: str | Release = "7.3",
    releases: Any = None,
    cmdline: str = "kho=on liveupdate=on",
    name: str = "HandoverMachine",
) -> type[TestCase]:
    """A test case that pytest and unittest run: kernels that live, hand over and die.

    ``ops`` are operations of your own (:func:`~khosim.testing.operation`), ``standard`` the groups
    of the kit's that go with them: "memory", "vmalloc", "sessions"; there is always a kexec.
    ``invariants`` are functions ``(kernel, state)`` that assert something, called after each step
    with all of khosim's own. ``hooks`` are called at fixed moments, ``faults`` is a strategy of
    fault plans (:func:`~khosim.testing.fault_plans`), ``machines`` one of machine plans.
    ``releases`` is a strategy of (first kernel, successors); else all are ``release``.

    A failure is an error with the program as a note. It lives 25 lives of up to 30 steps; set
    ``settings`` on the class for more; hand the class to :func:`deep_lives` for deep ones. Raises
    :class:`~khosim.errors.InputError` for what no program could name.
    """
    find_release(release)
    rules = Rules(
        chosen(ops, standard),
        tuple(invariants),
        Hooks() if hooks is None else hooks,
        faults,
        _MACHINES if machines is None else machines,
        st.just((release, release)) if releases is None else releases,
        cmdline,
    )
    machine = _state_machine(rules, name)
    case: type[TestCase] = machine.TestCase

    def options(*, seed: int | None, release: str | None) -> None:
        if release is not None:
            machine.khosim_releases = st.just((release, release))
        if seed is not None:
            hypothesis_seed(seed)(machine)

    case.khosim_rules = rules  # type: ignore[attr-defined]
    case.khosim_machine = machine  # type: ignore[attr-defined]
    case.khosim_options = staticmethod(options)  # type: ignore[attr-defined]
    case.settings = settings(  # type: ignore[attr-defined]
        deadline=None,
        max_examples=25,
        stateful_step_count=30,
        suppress_health_check=[HealthCheck.too_slow],
    )
    return case


_TRIES = 4
"""So many draws for each step: often an operation has nothing to do."""


class _Driver:
    """Draws arguments and faults for a life, one step after the other."""

    def __init__(self, life: Life, faults: FaultPlan) -> None:
        self.life = life
        self.faults = faults

    def step(self, op: Operation, args: dict[str, Any]) -> None:
        """One step, with the fault that is due, and all checks."""
        life = self.life
        fault = self.fault(op)
        if life.do(op, fault=fault, **args):
            life.check()

    def fault(self, op: Operation) -> Fault | None:
        """The fault that strikes now, if any."""
        fault = self.faults.strike(len(self.life.steps), is_kexec=op.name == "kexec")
        if fault is not None:
            self.faults = self.faults.without(fault)
        return fault


def _begin(
    rules: Rules,
    machine: MachinePlan,
    releases: tuple[str | Release, str | Release],
    *,
    witnessed: bool = False,
) -> Life:
    return Life(rules, machine=machine, releases=releases, witnessed=witnessed)


def _state_machine(rules: Rules, name: str) -> type[RuleBasedStateMachine]:
    def start(self: Any, machine: Any, faults: Any, data: st.DataObject) -> None:
        releases = data.draw(self.khosim_releases, "releases")
        self.driver = _Driver(_begin(rules, machine, releases), faults)

    def holds(self: Any) -> None:
        if getattr(self, "driver", None) is not None:
            self.driver.life.check()

    members: dict[str, Any] = {"__doc__": "Kernels that live, hand over and die."}
    no_faults = st.just(FaultPlan()) if rules.faults is None else rules.faults
    members["khosim_releases"] = rules.releases
    members["start"] = initialize(machine=rules.machines, faults=no_faults, data=st.data())(
        _named(start, "start")
    )
    members["all_holds"] = invariant()(_named(holds, "all_holds"))
    for op in rules.ops:
        members[f"do_{op.name}"] = _rule_of(op)
    return type(name, (RuleBasedStateMachine,), members)


def _named(function: Any, name: str) -> Any:
    function.__name__ = function.__qualname__ = name
    return function


def _rule_of(op: Operation) -> Any:
    fixed = {name: value for name, value in op.args.items() if not callable(value)}
    by_state = {name: value for name, value in op.args.items() if callable(value)}

    def plain(self: Any, **args: Any) -> None:
        driver: _Driver = self.driver
        life = driver.life
        fault = driver.fault(op)
        for name, value in by_state.items():
            args[name] = args["data"].draw(value(life.kernel, life.state), name)
        args.pop("data", None)
        life.do(op, fault=fault, **args)

    if by_state:
        fixed["data"] = st.data()
    function: Any = rule(**fixed)(_named(plain, f"do_{op.name}"))  # type: ignore[no-untyped-call]
    if op.when is None:
        return function
    possible: Any = precondition(lambda self: op.is_possible(self.driver.life))
    return possible(function)


def deep_lives(
    case: type[TestCase], *, seed: int = 0, lives: int = 10, steps: int = 70
) -> int:
    """Live ``lives`` lives of ``steps`` steps each by the weights of the operations.

    ``case`` is what :func:`handover_machine` returned. Returns how many steps were carried out. The
    first failure is made short and raised, its program as a note; equal seeds give equal lives.
    """
    rules = getattr(case, "khosim_rules", None)
    if not isinstance(rules, Rules):
        raise InputError("deep_lives", f"{case!r} does not come from handover_machine")
    for name, value in (("lives", lives), ("steps", steps)):
        if value < 1:
            raise InputError(f"deep_lives: {name}", f"{value} is not a number from 1 on")
    releases = case.khosim_machine.khosim_releases  # type: ignore[attr-defined]
    found = _Deep(rules, releases, steps)
    found.run(seed, lives)
    return found.done


class _Deep:
    """The deep driver: Hypothesis draws, and nothing else; lives are shortened here."""

    def __init__(self, rules: Rules, releases: Any, steps: int) -> None:
        self.rules = rules
        self.releases = releases
        self.steps = steps
        self.done = 0
        self.failure: Failure | None = None
        self.begin: Callable[..., Life] | None = None

    def run(self, number: int, lives: int) -> None:
        """Live until one fails."""
        config = settings(
            max_examples=lives,
            phases=(Phase.generate,),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=False,
        )
        try:
            hypothesis_seed(number)(config(given(st.data())(self._live)))()
        except Exception:
            if self.failure is None:
                raise
        if self.failure is not None and self.begin is not None:
            short = shrink(self.begin, self.failure, self.rules.ops)
            told = failure_of(partial(self.begin, witnessed=True), short.steps)
            raise short.error if told is None else told.error

    def _live(self, data: st.DataObject) -> None:
        rules = self.rules
        machine = data.draw(rules.machines)
        releases = data.draw(self.releases)
        faults = FaultPlan() if rules.faults is None else data.draw(rules.faults)
        begin = partial(_begin, rules, machine, releases)
        life = begin()
        driver = _Driver(life, faults)
        # Hypothesis leans towards the ends of a range, which weights must not.
        random = Random(data.draw(st.integers(0, (1 << 32) - 1)))
        try:
            for _ in range(_TRIES * self.steps):
                if len(life.steps) >= self.steps:
                    break
                possible = [op for op in rules.ops if op.is_possible(life)]
                op = random.choices(possible, [op.weight for op in possible])[0]
                driver.step(op, _drawn(data, op, life))
        except Exception as error:
            if type(error).__module__.startswith("hypothesis"):
                raise
            if self.failure is None:
                self.failure, self.begin = Failure(error, tuple(life.steps)), begin
            raise  # Hypothesis lives it once more, to be sure
        self.done += len(life.steps)


def _drawn(data: st.DataObject, op: Operation, life: Life) -> dict[str, Any]:
    return {
        name: data.draw(value(life.kernel, life.state) if callable(value) else value)
        for name, value in op.args.items()
    }
