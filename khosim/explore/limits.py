"""Runs that do not end: how long one may go on, and what stops it.

The limit that counts is in events of the simulated kernels, so that equal programs are stopped at
equal places. The alarm by the clock is a last resort, for a loop in which no event happens. It
needs the main thread of a process; elsewhere there is none.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("BY_THE_CLOCK", "EVENTS_MAX", "SECONDS_MAX", "NoEnd", "alarm")

EVENTS_MAX = 100_000
"""Events of one program; programs that end have some hundreds, the largest a few thousand."""
SECONDS_MAX = 60.0
"""Time of one program; most take some hundredths."""
BY_THE_CLOCK = "it goes on for more than"
"""What an alarm's words begin with: such a program is not worth running a hundred times."""


class NoEnd(BaseException):
    """A program was stopped. No ``Exception``: no handler on the way may take it for an error."""


@contextmanager
def alarm(seconds: float = SECONDS_MAX) -> Iterator[None]:
    """Within, :class:`NoEnd` is raised after ``seconds``."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise NoEnd(f"{BY_THE_CLOCK} {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
