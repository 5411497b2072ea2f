"""What a boot gives back, against what it holds.

``memblock_phys_free`` names its range itself, so there is nothing to predict but this: a range
given back is one that was taken, or the rest of a per-cpu unit (``mm/percpu.c``,
``pcpu_embed_first_chunk`` @ 7.3), whose place follows from the sizes that ``percpu:`` prints.
"""

from __future__ import annotations

from khosim.conform.boot_facts import BootFacts
from khosim.conform.dmesg_calls import Free, symbol_of
from khosim.conform.start import covered
from khosim.conform.state import State

__all__ = ("free", "note_percpu")

_PERCPU = ("pcpu_", "memblock_free")
_CANDIDATES = 3


def note_percpu(state: State, facts: BootFacts, base: int, size: int, caller: str) -> None:
    """Expect the rests of units in a per-cpu area that was just allocated."""
    if facts.percpu is None or not symbol_of(caller).startswith("pcpu_"):
        return
    _, unit = facts.percpu
    if unit and size and size % unit == 0:
        state.percpu_frees.extend(range(base, base + size, unit))


def free(state: State, facts: BootFacts, event: Free, call: str, *, again: bool) -> list[State]:
    """Give back what ``event`` says, or, where that was never taken, what it may have meant.

    ``again`` tells that the log gives the same range back once more. Returns the hypotheses that
    come of it.
    """
    size = event.end - event.base
    rest = _percpu_rest(state, facts, event)
    held = _is_held(state, event.base, size)
    meant = [(rest, True)] if rest else _meant(state, event)
    usual = held and not again and not _belongs_elsewhere(state, event, meant)
    if (rest is None and usual) or rest == (event.base, event.end):
        _give_back(state, event.base, size)
        return [state]
    reserved = state.memblock.reserved
    known = list(zip(reserved.base, reserved.end, strict=True))
    plausible = not size or (size > 0 and covered(event.base, event.end, known))
    states = []
    for (base, end), _ in meant:
        twin = state.fork()
        real, own = (event.base, base) if event.base != base else (event.end, end)
        twin.differ(event.line, call, real, own)
        _give_back(twin, base, end - base)
        states.append(twin)
    if not plausible or (any(sure for _, sure in meant) and not held):
        own_base = meant[0][0][0] if meant else None
        state.differ(event.line, call, event.base, own_base)
    state.suspicions += 1
    _give_back(state, event.base, size)
    return [*states, state]


def _is_held(state: State, base: int, size: int) -> bool:
    held = state.held.get(base)
    return held is not None and held[0] == size


def _belongs_elsewhere(
    state: State, event: Free, meant: list[tuple[tuple[int, int], bool]]
) -> bool:
    """Whether code of quite another name took the range, and the code that frees took its like."""
    family = _family(symbol_of(event.caller))
    if family in ("memblock", _family(state.held[event.base][1])):
        return False
    return any(family == _family(state.held[base][1]) for (base, _), _ in meant)


def _family(symbol: str) -> str:
    return symbol.lstrip("_").partition("_")[0]


def _percpu_rest(state: State, facts: BootFacts, event: Free) -> tuple[int, int] | None:
    """The rest of the next unit, if ``event`` is about it."""
    if not state.percpu_frees or facts.percpu is None:
        return None
    used, unit = facts.percpu
    start = state.percpu_frees[0]
    size = event.end - event.base
    named = symbol_of(event.caller).startswith(_PERCPU)
    inside = start <= event.base < start + unit or start < event.end <= start + unit
    inside = inside or event.base == start + used
    if not named or not (size in (unit - used, unit) or inside):
        return None
    state.percpu_frees.popleft()
    whole = event.base == start and event.end == start + unit
    return (start if whole else start + used), start + unit


def _meant(state: State, event: Free) -> list[tuple[tuple[int, int], bool]]:
    """What was taken and looks most like ``event``: the likeliest few, the likeliest first.

    With each whether it is certain enough to doubt the log: the function that gives back took it.
    """
    size = event.end - event.base
    caller = symbol_of(event.caller)
    found: list[tuple[tuple[int, int], tuple[int, int], bool]] = []
    latest: list[tuple[tuple[int, int], bool]] = []
    for base, (held_bytes, by) in state.held.items():
        range_ = (base, base + held_bytes)
        if range_ == (event.base, event.end):
            continue
        touches = base == event.base or range_[1] == event.end
        if touches or held_bytes == size:
            mine = by == caller
            rank = (0 if mine else 1 if touches else 2, abs(base - event.base))
            found.append((rank, range_, mine))
            latest.append((range_, mine))
    nearest = [(range_, mine) for _, range_, mine in sorted(found)[:_CANDIDATES]]
    return nearest + [one for one in latest[: -_CANDIDATES - 1 : -1] if one not in nearest]


def _give_back(state: State, base: int, size: int) -> None:
    if size > 0:
        state.memblock.memblock_phys_free(base, size)
        held = state.held.get(base)
        if held is not None and held[0] <= size:
            del state.held[base]
