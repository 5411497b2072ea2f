"""A program as text: what to print, and the trace of what happened in it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from khosim.explore.kinds import is_lawful
from khosim.explore.kit import PROGRAM
from khosim.explore.search import KINDS, is_drained
from khosim.explore.world import BROKEN, DIED, World
from khosim.program_text import imports_of, indented, script

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.explore.world import Problem, Step
    from khosim.kernel.behaviours import Release
    from khosim.kernel.trace import Event

__all__ = ("Told", "event_line", "tell")

_NOISE = ("kho_radix_alloc_node", "kho_preserved_memory_reserve", "kexec_add_buffer")
_TRACE_LINES = 10
_PLACES = {
    "suppress": "contextlib",
    "KernelError": "khosim",
    **dict.fromkeys(PROGRAM, "khosim.explore.kit"),
}
_NUMBER = re.compile(r"0x[0-9a-f]+")


class Told:
    """``program`` as text to run, ``trace`` as lines: the events that have to do with it."""

    __slots__ = ("program", "trace")

    def __init__(self, program: str, trace: list[str]) -> None:
        self.program = program
        self.trace = trace


def tell(steps: Sequence[Step], problem: Problem, release: str | Release) -> Told:
    """The program of ``steps``, which shows ``problem``; it is carried out once more."""
    world = World(KINDS, release, listens=True)
    blocks: list[tuple[str, Step, str]] = []
    for step in steps:
        kind = KINDS[step.kind]
        assert is_lawful(world, kind, step.args)
        source = kind.source(world, *step.args)
        blocks.append((source, step, world.run(step)))
        if world.is_over:
            break
    drained = not world.is_over and is_drained(world)
    lines: list[str] = []
    for at, (source, step, errno) in enumerate(blocks):
        told = "errno-as-documented" if errno != BROKEN else "promise-kept" * (at == problem.at)
        lines += _block(source, step, "" if errno == DIED or told == problem.invariant else errno)
    if problem.invariant not in ("promise-kept", "kernel-panic", "errno-as-documented"):
        arguments = "machine, drained=True" if drained else "machine"
        lines.append(f'print(*audit({arguments}), sep="\\n")')
    return Told(_whole(lines), _trace(world.events, problem))


def _block(source: str, step: Step, errno: str) -> list[str]:
    wrap = []
    if step.fault:
        wrap.append(step.wrapper)
    if errno:
        wrap.append("suppress(KernelError, AssertionError)")
    lines = source.splitlines()
    if not wrap:
        return lines
    imports = [line for line in lines if line.startswith("from ")]
    said = "" if not errno else f"  # {errno}" if errno == BROKEN else f"  # -{errno}"
    body = indented("\n".join(line for line in lines if not line.startswith("from ")))
    return [*imports, f"with {', '.join(wrap)}:{said}", *body.splitlines()]


def _whole(lines: list[str]) -> str:
    imports = [line for line in lines if line.startswith("from ")]
    body = "\n".join(line for line in lines if not line.startswith("from "))
    return script(body, [*imports, *imports_of(body, _PLACES)])


def _trace(events: list[Event], problem: Problem) -> list[str]:
    wanted = {int(text, 16) for text in _NUMBER.findall(problem.message)}
    told = [event for event in events if event.symbol not in _NOISE]
    chosen = [event for event in told if wanted & _numbers(event)] if wanted else []
    if len(chosen) < 3:
        chosen = told
    return [event_line(event) for event in chosen[-_TRACE_LINES:]]


def _numbers(event: Event) -> set[int]:
    found = {value for value in event.args.values() if isinstance(value, int)}
    if isinstance(event.result, int):
        found.add(event.result)
    return {value for value in found if value > 0xFF}


def event_line(event: Event) -> str:
    """An event in a line: generation, kernel function, arguments, result."""

    if event.symbol == "printk":
        return f"{event.generation} log: {event.args['message']}"
    args = ", ".join(f"{name}={_shown(value)}" for name, value in event.args.items())
    return f"{event.generation} {event.symbol}({args}) = {_shown(event.result)}"


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0xFFF:
        return f"{value:#x}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_shown, value))})"
    if isinstance(value, dict):
        return f"({', '.join(f'{name}={_shown(part)}' for name, part in value.items())})"
    return str(value)
