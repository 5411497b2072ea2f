"""Programs drawn by Hypothesis instead of from a seed of their own.

One engine draws a whole piece of runs, since it looks for programs that it did not draw before: run
``n`` of seed ``s`` depends on ``s``, ``n`` and the number of its piece. Hypothesis only draws here.
Shrinking is khosim's own, which takes steps and lawfulness into account.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

__all__ = ("DRAWN_TOGETHER", "drawn_by_hypothesis", "hypothesis_version")

DRAWN_TOGETHER = 20
"""Runs of one engine."""


def hypothesis_version() -> str:
    """Which version draws; raises :class:`InputError` where there is none."""
    try:
        import hypothesis
    except ImportError:
        cause = "hypothesis is not installed: pip install 'khosim[testing]'"
        raise InputError("--engine", cause) from None
    return str(hypothesis.__version__)


class _Enough(BaseException):
    """Ends an engine: its runs cannot be left out one by one, each draws after the other."""


def drawn_by_hypothesis(
    seed: str, first: int, count: int, skip: Sequence[int], run: Callable[[int, Random], None]
) -> int:
    """Call ``run`` with the numbers of runs from ``first`` on and what they are drawn from.

    All ``count`` belong to one engine. Those before them are run as well, for what an engine draws
    depends on all that it drew before; at one to ``skip`` it ends. Returns how many of the
    ``count`` were carried out: fewer where the engine gave a program up.
    """
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st
    from hypothesis.errors import HypothesisException

    start = first - first % DRAWN_TOGETHER
    made = [0, 0]
    is_enough: list[bool] = []

    @settings(
        max_examples=DRAWN_TOGETHER,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @seeded(f"{seed}:{start}")
    @given(st.randoms(use_true_random=False))
    def draw(random: Random) -> None:
        number = start + made[0]
        made[0] += 1
        if number >= first + count or number in skip:
            is_enough.append(True)
            raise _Enough
        run(number, random)
        made[1] += number >= first

    try:
        draw()
    except (_Enough, HypothesisException):  # it minds that a program ends before anything is drawn
        if not is_enough:
            raise
    return made[1]
