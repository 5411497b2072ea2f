"""A kit for other people's tests: machines, faults, whole lives of kernels, and what must hold.

The names below are stable. Each is loaded when it is first asked for, so that the pytest plugin
(:mod:`khosim.testing.plugin`) costs projects nothing that do not use it. ``docs/testing.md`` shows
them at work. Needs ``pytest`` and ``hypothesis``: the extra ``khosim[testing]``.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own constant, without the cost of importing typing
if TYPE_CHECKING:
    from khosim.testing.asserts import (
        assert_no_violations,
        assert_not_preserved,
        assert_preserved,
        assert_preserved_is_held,
        assert_survives,
        violation_report,
    )
    from khosim.testing.drivers import deep_lives, handover_machine
    from khosim.testing.faults import (
        Dma,
        Fault,
        FaultPlan,
        failing_allocation,
        flipped,
        jump_with,
        kill,
        lost_memory,
        oops,
        overwritten,
        refusing,
        refusing_freeze,
        regained_memory,
        stale,
        torn,
    )
    from khosim.testing.life import Life
    from khosim.testing.plans import FolioPlan, MachinePlan, MemfdPlan, SessionPlan
    from khosim.testing.rules import Hooks, Operation, Rules, operation
    from khosim.testing.strategies import (
        cmdlines,
        fault_plans,
        folio_sets,
        machine_plans,
        machines,
        memfd_plans,
        memory_maps,
        mutated_cmdlines,
        release_pairs,
        session_plans,
    )
    from khosim.testing.witness import Witness

__all__ = (
    "Dma",
    "Fault",
    "FaultPlan",
    "FolioPlan",
    "Hooks",
    "Life",
    "MachinePlan",
    "MemfdPlan",
    "Operation",
    "Rules",
    "SessionPlan",
    "Witness",
    "assert_no_violations",
    "assert_not_preserved",
    "assert_preserved",
    "assert_preserved_is_held",
    "assert_survives",
    "cmdlines",
    "deep_lives",
    "failing_allocation",
    "fault_plans",
    "flipped",
    "folio_sets",
    "handover_machine",
    "jump_with",
    "kill",
    "lost_memory",
    "machine_plans",
    "machines",
    "memfd_plans",
    "memory_maps",
    "mutated_cmdlines",
    "oops",
    "operation",
    "overwritten",
    "refusing",
    "refusing_freeze",
    "regained_memory",
    "release_pairs",
    "session_plans",
    "stale",
    "torn",
    "violation_report",
)

_HOMES = {
    "asserts": (
        "assert_no_violations",
        "assert_not_preserved",
        "assert_preserved",
        "assert_preserved_is_held",
        "assert_survives",
        "violation_report",
    ),
    "drivers": ("deep_lives", "handover_machine"),
    "faults": (
        "Dma",
        "Fault",
        "FaultPlan",
        "failing_allocation",
        "flipped",
        "jump_with",
        "kill",
        "lost_memory",
        "oops",
        "overwritten",
        "refusing",
        "refusing_freeze",
        "regained_memory",
        "stale",
        "torn",
    ),
    "life": ("Life",),
    "plans": ("FolioPlan", "MachinePlan", "MemfdPlan", "SessionPlan"),
    "rules": ("Hooks", "Operation", "Rules", "operation"),
    "strategies": (
        "cmdlines",
        "fault_plans",
        "folio_sets",
        "machine_plans",
        "machines",
        "memfd_plans",
        "memory_maps",
        "mutated_cmdlines",
        "release_pairs",
        "session_plans",
    ),
    "witness": ("Witness",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Load a public name from its module, once."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"khosim.testing.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return what the module has, and what it would load."""
    return sorted({*globals(), *_HOME})
