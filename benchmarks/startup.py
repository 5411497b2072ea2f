"""How long ``khosim --help`` takes, against starting Python and doing nothing."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Context, Record, start_python

__all__ = ("startup",)


def startup(context: Context) -> Iterator[Record]:
    """``khosim --help`` is a command line, not a simulator: it must not load one."""
    yield context.ratio(
        "startup.help",
        lambda: start_python("-m", "khosim", "--help"),
        start_python,
        baseline="python -c pass",
        limit=5,
        rounds=20,
    )
