"""How the lessons speak: lines of 78 characters, and what khosim's invariants say."""

from __future__ import annotations

import io
import textwrap
from collections import Counter

from rich.console import Console

from khosim import Machine
from khosim.explore.kit import Stage, audit
from khosim.view.moment import Moment
from khosim.view.terminal import map_view

__all__ = ("ask", "draw", "say", "title")


def title(text: str) -> None:
    """A heading."""
    print(f"\n{text}\n{'-' * len(text)}")


def say(text: str) -> None:
    """A few sentences."""
    print(textwrap.fill(text, 78, break_long_words=False, break_on_hyphens=False))


def ask(machine: Machine, most: int = 2) -> None:
    """Ask every invariant; of each that speaks, print the first ``most`` things it says.

    A ``Stage`` is asked also for what ``khosim explore`` wants to be true.
    """
    said: Counter[str] = Counter()
    for violation in audit(machine) if isinstance(machine, Stage) else machine.check():
        said[violation.invariant] += 1
        if said[violation.invariant] <= most:
            text = f"! {violation}"
            print(textwrap.fill(text, 78, subsequent_indent="  ", break_on_hyphens=False))
    for invariant, count in said.items():
        if count > most:
            print(f"! {invariant} says {count - most} more things of that kind")
    if not said:
        print("(no invariant speaks)")


def draw(moment: Moment) -> None:
    """Print the map of memory at a moment, without its heading; the same in every notebook."""
    page = io.StringIO()
    console = Console(file=page, width=80, color_system=None, force_jupyter=False)
    console.print(map_view(moment, 80))
    print("\n".join(line.rstrip() for line in page.getvalue().splitlines()[1:]))
