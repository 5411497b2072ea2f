"""A shorter life that fails in the same way: steps are left out, then arguments made simple."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from khosim.testing.life import Life
    from khosim.testing.rules import Operation
    from khosim.testing.step import Step

__all__ = ("Failure", "failure_of", "shrink")

_NUMBERS = re.compile(r"0x[0-9a-f]+|\d+")
_REPLAYS_MAX = 250


@dataclass(frozen=True, slots=True)
class Failure:
    """How a life ended: the error, and the steps that led there."""

    error: Exception
    steps: tuple[Step, ...]

    @property
    def cause(self) -> tuple[str, str]:
        """What two failures share that are the same: words without numbers."""
        first = str(self.error).split("\n", 2)
        return type(self.error).__name__, _NUMBERS.sub("#", " ".join(first[:2]))


def failure_of(begin: Callable[[], Life], steps: tuple[Step, ...]) -> Failure | None:
    """Live ``steps`` from the beginning, with all checks after each; None where nothing fails.

    Steps that are not possible any more are passed over.
    """
    life = begin()
    try:
        for step in steps:
            if life.replay(step):
                life.check()
    except Exception as error:
        return Failure(error, tuple(life.steps))
    return None


def shrink(begin: Callable[[], Life], failure: Failure, ops: Iterable[Operation]) -> Failure:
    """The shortest failure of the same cause that was found within some hundred lives."""
    left = _REPLAYS_MAX
    simple = {(op.name, name): value for op in ops for name, value in op.simplest.items()}
    best = failure_of(begin, failure.steps)
    if best is None or best.cause != failure.cause:
        return failure
    is_better = True
    while is_better and left > 0:
        is_better = False
        for steps in _smaller(best.steps, simple):
            left -= 1
            found = failure_of(begin, steps)
            if found is not None and found.cause == failure.cause and _size(found) < _size(best):
                best = found
                is_better = True
                break
            if left <= 0:
                break
    return best


def _size(failure: Failure) -> tuple[int, int, int]:
    steps = failure.steps
    faults = sum(step.fault is not None for step in steps)
    return len(steps), faults, sum(_weight(value) for step in steps for _, value in step.args)


def _weight(value: Any) -> int:
    if isinstance(value, int):
        return abs(value)
    return len(value) if isinstance(value, (bytes, str, tuple, list)) else 0


def _smaller(
    steps: tuple[Step, ...], simple: dict[tuple[str, str], Any]
) -> Iterator[tuple[Step, ...]]:
    size = len(steps) // 2
    while size:
        for start in range(len(steps) - size, -1, -size):
            yield steps[:start] + steps[start + size :]
        size //= 2
    for i, step in enumerate(steps):
        if step.fault is not None:
            yield (*steps[:i], step._replace(fault=None), *steps[i + 1 :])
        for n, (name, value) in enumerate(step.args):
            simplest = simple.get((step.name, name), value)
            if simplest != value:
                args = (*step.args[:n], (name, simplest), *step.args[n + 1 :])
                yield (*steps[:i], step._replace(args=args), *steps[i + 1 :])
