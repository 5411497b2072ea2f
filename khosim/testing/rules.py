"""What a user hands in: operations of a subsystem, hooks around the jump, checks of a model."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hypothesis.strategies import SearchStrategy

from khosim.errors import InputError
from khosim.kernel.release import Release, find_release

if TYPE_CHECKING:
    from khosim.testing.faults import Fault
    from khosim.testing.life import Life
    from khosim.testing.step import Written

__all__ = (
    "Hooks",
    "Operation",
    "Rules",
    "check_strategy",
    "import_of",
    "operation",
    "release_source",
)

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that can happen in the life of a kernel.

    ``args`` are Hypothesis strategies by name (or functions of kernel and state that return one),
    ``weight`` is how often :func:`~khosim.testing.deep_lives` takes it. ``may_refuse`` names the
    errnos that are no failure. ``write`` gives its source text, or None where it has nothing to
    do now; ``when`` says whether it is possible.
    """

    name: str
    write: Callable[..., Written | None]
    args: Mapping[str, Any] = field(default_factory=dict)
    weight: int = 4
    may_refuse: frozenset[str] = frozenset()
    when: Callable[[Life], bool] | None = None
    can_fail: bool = True
    """It asks for memory, and a refusal leaves everything as it was."""
    function: Function | None = None
    """The user's function, None for what the kit brings along."""
    simplest: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that a life is made short with."""

    def __call__(self, *args: Any, **values: Any) -> Any:
        """Call the user's function, as a printed program does."""
        if self.function is None:
            raise InputError(f"khosim.testing: {self.name}", "only a Life can carry it out")
        return self.function(*args, **values)

    def check(self, args: Mapping[str, Any]) -> None:
        """Raise :class:`InputError` where ``args`` are not those it takes."""
        if set(args) != set(self.args):
            wanted = ", ".join(self.args) or "no arguments"
            told = ", ".join(args) or "none"
            raise InputError(f"khosim.testing: {self.name}", f"it takes {wanted}, not {told}")

    def may_fail(self, fault: Fault) -> bool:
        """Whether ``fault`` may strike within it.

        The kit's own leave everything as it was also where a callback refuses.
        """
        if fault.kind == "callback" and self.function is None:
            return True
        return self.can_fail or fault.kind not in ("allocation", "callback")

    def is_possible(self, life: Life) -> bool:
        """Whether it may be tried now."""
        return self.when is None or self.when(life)


def operation(
    *,
    weight: int = 4,
    may_refuse: Sequence[str] = (),
    when: Callable[[Any, Any], bool] | None = None,
    can_fail: bool = True,
    **args: Any,
) -> Callable[[Function], Operation]:
    """Make an :class:`Operation` of a function ``(kernel, state, **args)``.

    ``args`` are Hypothesis strategies, or functions of kernel and state that return one.
    ``when(kernel, state)`` says whether it is possible now. ``may_refuse`` are names of errnos
    (``"EBUSY"``). ``can_fail`` lets fault plans take memory away from it.

    The function has to stand in a module, under the name of the operation: a program that is
    printed imports it from there. Raises :class:`InputError` for one that does not.
    """
    from khosim.testing.step import call

    def decorate(function: Function) -> Operation:
        import_of(function)
        place = f"khosim.testing: {function.__name__}"
        if weight < 0:
            raise InputError(place, f"its weight {weight!r} is less than 0")
        for name in may_refuse:
            if name not in errno.errorcode.values():
                raise InputError(place, f"may_refuse: {name!r} is no errno")
        for name, value in args.items():
            if not callable(value):
                check_strategy(f"{place}: {name}", value)
        possible = None if when is None else lambda life: when(life.kernel, life.state)
        return Operation(
            function.__name__,
            lambda life, **values: call(function, **values),
            args,
            weight,
            frozenset(may_refuse),
            possible,
            can_fail,
            function,
        )

    return decorate


def check_strategy(place: str, value: object) -> None:
    """Raise :class:`InputError` where ``value`` is no strategy of Hypothesis."""
    if not isinstance(value, SearchStrategy):
        raise InputError(place, f"{value!r} is no strategy: st.just() makes one of a value")


def import_of(function: Function) -> tuple[str, str, str]:
    """Folder to put on the path, module and name that a program imports ``function`` by.

    Raises :class:`InputError` where no program could.
    """
    name = getattr(function, "__qualname__", "")
    if not name.isidentifier():
        what = name or repr(function)
        raise InputError(
            f"khosim.testing: {what}",
            "a printed program could not import it; define it at the top of a module",
        )
    module = function.__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        raise InputError(f"khosim.testing: {name}", f"its module {module!r} is no file")
    path = Path(file).resolve()
    if module == "__main__":
        return str(path.parent), path.stem, name
    is_package = path.stem == "__init__"
    folder = path.parents[module.count(".") + is_package]
    return str(folder), module, name


@dataclass(frozen=True, slots=True)
class Hooks:
    """Functions of a user's, called at fixed moments.

    ``new_state()`` makes the model that operations and checks get as ``state``; it lives as long
    as the machine is not switched off. ``on_boot(kernel, state)`` is called when a kernel is up,
    cold or not: register handlers here. ``before_kexec(kernel, state)`` comes right before the
    jump, again when the kexec was refused and is tried once more. ``after_restore(kernel, state)``
    comes in a successor, after ``on_boot``: take back and compare.
    """

    on_boot: Function | None = None
    before_kexec: Function | None = None
    after_restore: Function | None = None
    new_state: Function = SimpleNamespace


@dataclass(frozen=True, slots=True)
class Rules:
    """All that :func:`~khosim.testing.handover_machine` was given; see there."""

    ops: tuple[Operation, ...]
    invariants: tuple[Function, ...] = ()
    hooks: Hooks = field(default_factory=Hooks)
    faults: Any = None
    machines: Any = None
    releases: Any = None
    cmdline: str = "kho=on liveupdate=on"
    checks_every: int = 1

    def __post_init__(self) -> None:
        names = [op.name for op in self.ops]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError("khosim.testing: ops", f"there are two operations named {twice[0]!r}")
        if not self.ops:
            raise InputError("khosim.testing: ops", "there is no operation at all")
        hooks = self.hooks
        if not isinstance(hooks, Hooks):
            raise InputError("khosim.testing: hooks", f"{hooks!r} is no Hooks(...)")
        for name in ("faults", "machines", "releases"):
            if getattr(self, name) is not None:
                check_strategy(f"khosim.testing: {name}", getattr(self, name))
        for function in (hooks.on_boot, hooks.before_kexec, hooks.after_restore, *self.invariants):
            if function is not None:
                _check_takes_two(function)
                import_of(function)
        if hooks.new_state is not SimpleNamespace:
            import_of(hooks.new_state)

    def op(self, name: str) -> Operation:
        """The operation of that name. Raises :class:`InputError` where there is none."""
        for op in self.ops:
            if op.name == name:
                return op
        known = ", ".join(op.name for op in self.ops)
        raise InputError("khosim.testing: operation", f"{name!r} is none of {known}")


def _check_takes_two(function: Function) -> None:
    try:
        signature(function).bind(None, None)
    except TypeError:
        name = getattr(function, "__name__", repr(function))
        raise InputError(
            f"khosim.testing: {name}", "it has to take two arguments, kernel and state"
        ) from None


def release_source(release: str | Release) -> tuple[str, str]:
    """The text that names ``release`` in a program, and the import that it needs, if any."""
    if isinstance(release, str):
        find_release(release)
        return repr(release), ""
    return _told_by_changes(release)


def _told_by_changes(release: Release) -> tuple[str, str]:
    from dataclasses import fields

    from khosim.kernel.release import RELEASES

    base = RELEASES.get(release.name.split("+")[0])
    if base is None:
        return repr(release), "from khosim.kernel.release import Release"
    words = [base.name]
    for entry in fields(release):
        value = getattr(release, entry.name)
        if entry.name == "name" or value == getattr(base, entry.name):
            continue
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        if isinstance(value, bool):
            text = "on" if value else "off"
        words.append(f"{entry.name}={text}")
    return repr("+".join(words)), ""
