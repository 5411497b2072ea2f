"""How the faults of a plan strike a life, and what its books forget for it.

Each function carries a fault out as text, as the steps are, and drops from the books what the fault
does not let survive (:attr:`khosim.testing.Fault.survives`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from khosim.errors import KernelError, KernelPanic
from khosim.program_text import indented
from khosim.testing.faults import DAMAGES

if TYPE_CHECKING:
    from collections.abc import Callable

    from khosim.testing.faults import Fault
    from khosim.testing.life import Life
    from khosim.testing.step import Written

__all__ = ("BEFORE", "damage", "die", "lose_memory")

_BLOCK = 4 << 20


def _crash(life: Life, n: int) -> None:
    # A boot loader does not look where memory is: after some was lost it is another machine.
    if life.has_less:
        life.new_machine()
    life.cold_boot()


def _kill(life: Life, n: int) -> None:
    sessions = life.of("session", "preserved", "arrived")
    files = life.of("memfd", "held", "preserved", "arrived")
    if not sessions and not files:
        return
    names = [thing.name for thing in (*sessions, *files)]
    if not n % 2:
        names.reverse()
    life.carry(f"kill(kernel, {', '.join(names)})")
    for session in sessions:
        for file in life.of("memfd"):
            if file.facts["session"] == session.name:
                life.things.pop(file.name)
        del life.things[session.name]
    for file in files:
        life.things.pop(file.name, None)


def _device(life: Life, n: int) -> None:
    folios = [f for f in life.of("folio", "preserved") if "device" not in f.facts]
    if not folios:
        return
    folio, name = folios[(n - 1) % len(folios)], life.fresh("device")
    life.carry(f"{name} = Dma(machine, {folio.name}.phys + 8)")
    folio.facts["device"] = name


BEFORE: dict[str, Callable[[Life, int], None]] = {
    "crash": _crash,
    "device": _device,
    "kill": _kill,
}
"""Faults that strike before a step, which then is as it would have been."""


def damage(life: Life, written: Written, fault: Fault) -> None:
    """Bytes of the handover are not what they were: whatever the successor makes of it."""
    what = DAMAGES[(fault.n - 1) % len(DAMAGES)]
    words = "".join(f", {word}" for word in written.options)
    line = f"jump_with(kernel, {what}{words})"
    life.carry(f"with suppress(KernelError, KernelPanic):\n{indented(line)}")
    life.new_machine()
    life.cold_boot()


def die(life: Life, written: Written, fault: Fault) -> None:
    """The task dies in the middle: what it was at is nobody's, all else has to be as it was."""
    life.begin(written)
    body = f"with oops(kernel, {fault.n}):\n{indented(written.source)}"
    life.carry(f"with suppress(KernelError):\n{indented(body)}")
    life.has_died = True
    words = set(re.findall(r"[A-Za-z_]\w*", written.source))
    for name in words & set(life.things):
        device = life.things.pop(name).facts.get("device")
        if device:
            life.carry(f"{device}.stop()")


def _ranges(life: Life) -> list[tuple[int, int]]:
    memory = life.machine.hardware.memory_map
    top = memory.end_phys
    found = [(top // 2 - _BLOCK, top // 2), (top // 4, top // 4 + _BLOCK), (top - _BLOCK, top)]
    last = memory.node_ranges[-1]
    return [*found, (last.start, last.end)] if last.nid else found


def lose_memory(life: Life, written: Written, fault: Fault) -> bool:
    """A kexec into less memory; False where there is none to be lost.

    Where nothing handed over lay there all survives; else another machine is next.
    """
    if life.machine.hardware.arch != "x86_64" or life.has_less:
        return False
    ranges = _ranges(life)
    start, end = ranges[(fault.n - 1) % len(ranges)]
    life.begin(written)
    life.carry(f"less = lost_memory(machine.hardware, {start:#x}, {end:#x})")
    words = "".join(f", {word}" for word in written.options)
    jump = f"kernel = jump_with(kernel, less{words})"
    less = life.vars["less"]
    try:
        life.attempt(jump)
    except (KernelError, KernelPanic) as error:
        if less.spares or not less.has_struck:
            life.tell(jump, error)
            raise
    if less.spares:
        life.lines.append(jump)
        life.has_less = True
        written.done()
        for source in written.after:
            life.carry(source)
    else:
        life.lines.append(f"with suppress(KernelError, KernelPanic):\n{indented(jump)}")
        life.new_machine()
        life.cold_boot()
    return True
