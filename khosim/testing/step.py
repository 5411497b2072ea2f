"""Steps as text: what is printed is what was run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from khosim.testing.faults import Fault

__all__ = ("Step", "Thing", "Written", "call")


class Step(NamedTuple):
    """One step of a life: an operation's name, its arguments, and the fault that it bears."""

    name: str
    args: tuple[tuple[str, Any], ...] = ()
    fault: Fault | None = None


def _nothing() -> None:
    """No books to keep."""


@dataclass(slots=True)
class Written:
    """A step as source text. ``done`` keeps the books when ``source`` went through.

    Only ``source`` may be refused. ``before`` and ``after`` (left out after a refusal) are not.
    """

    source: str
    done: Callable[[], None] = _nothing
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    """Functions of the user's that the text names."""
    is_kexec: bool = False
    options: tuple[str, ...] = ()
    """Of a kexec: its arguments, as text."""


@dataclass(slots=True)
class Thing:
    """Something that the author of a program holds, by the name of its variable.

    ``state`` is "held", "preserved", "incoming" from the jump until it is restored, and "arrived"
    for a file whose session is not finished.
    """

    name: str
    kind: str
    state: str = "held"
    facts: dict[str, Any] = field(default_factory=dict)


def call(function: Callable[..., Any], **values: Any) -> Written:
    """A call of a user's function with the kernel, its model and arguments."""
    words = "".join(f", {name}={value!r}" for name, value in values.items())
    return Written(f"{function.__name__}(kernel, state{words})", functions=(function,))
