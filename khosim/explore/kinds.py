"""The kinds of steps: what each looks like, when an author may take it, and what it changes.

``choices`` lists the arguments that are lawful now, at boundary values derived from the machine and
the formats; a placeholder :data:`NEW` stands for the name of what the step defines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from khosim.explore.world import World

__all__ = (
    "NEW",
    "Args",
    "Kind",
    "gone",
    "is_lawful",
    "lost",
    "nothing",
    "of",
    "preservable",
    "to",
)

Args = tuple[Any, ...]
NEW = "?"


@dataclass(frozen=True)
class Kind:
    """One kind of step.

    ``group`` is what a search switches on and off together. ``source`` gives the statements,
    ``done`` and ``refused`` keep the books. ``errnos`` are the documented refusals of a lawful
    call; with a fault, -ENOMEM is one more.
    """

    name: str
    group: str
    choices: Callable[[World], Sequence[Args]]
    source: Callable[..., str]
    done: Callable[[World, Args], None]
    refused: Callable[[World, Args], None] | None = None
    letter: str = ""
    errnos: frozenset[str] = field(default_factory=frozenset)
    weight: float = 4
    can_fail: bool = True
    """It asks for memory, which a fault may refuse."""
    asks: int | Callable[[World, Args], int] = 4
    """How often it asks for memory, or nearly so."""
    locks: bool = False
    """It goes on with sessions locked against a kexec, which a task that dies there leaves so."""
    goes_on: bool = False
    """A promise that it breaks is told of; whoever knows may go on as if it had been kept."""
    opens: bool = False
    """It opens the device: -EIO only where a task was refused memory, or a handler is not there."""
    takes_any: bool = False
    """Any arguments are lawful, not only the listed ones: what goes onto a command line."""


def nothing(world: World, args: Args) -> None:
    """No books to keep."""


def of(kind: str, *states: str) -> Callable[[World], list[Args]]:
    """Choices: the items of a kind, in one of ``states`` or in any."""

    def choices(world: World) -> list[Args]:
        return [(item.name,) for item in world.of(kind, *states)]

    return choices


def preservable(kind: str) -> Callable[[World], list[Args]]:
    """Choices: the items of a kind that can be preserved now."""

    def choices(world: World) -> list[Args]:
        return [(item.name,) for item in world.of(kind, "held")] if world.can_preserve else []

    return choices


def to(state: str) -> Callable[[World, Args], None]:
    """Books: the item is in ``state`` from now on."""

    def done(world: World, args: Args) -> None:
        world.items[args[0]].state = state

    return done


def lost(world: World, args: Args) -> None:
    """Books: there is nothing that the author could do with the item any more."""
    world.items[args[0]].state = "lost"


def gone(world: World, args: Args) -> None:
    """Books: the item is no more."""
    world.drop(args[0])


def is_lawful(world: World, kind: Kind, args: Args) -> bool:
    """Whether the author of ``world`` may take this step now."""
    if kind.letter:
        if args[0] in world.items:
            return False
        args = (NEW, *args[1:])
    choices = kind.choices(world)
    return bool(choices) if kind.takes_any else args in choices
