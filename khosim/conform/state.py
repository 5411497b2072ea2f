"""One hypothesis about a boot: memblock as it would be, and what was found different so far.

A difference between log and simulator may be the simulator's fault or the log's. Both are kept as
states of their own, and what follows in the log tells which was right (see
:mod:`khosim.conform.replay`), so a state is cheap to split.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from khosim.conform.dmesg_calls import Free, Request, Reserve
from khosim.kernel.memblock import Memblock, RegionArray

__all__ = ("Difference", "Expected", "State", "told")


class Difference(NamedTuple):
    """One thing that the log says otherwise: addresses in bytes, None where there is none."""

    line: int
    call: str
    real: int | None
    simulated: int | None


def told(difference: Difference) -> str:
    """A difference in words."""
    where = f"line {difference.line}: " if difference.line else ""
    real, simulated = (
        "none" if number is None else f"{number:#x}"
        for number in (difference.real, difference.simulated)
    )
    return f"{where}{difference.call}: real {real}, simulated {simulated}"


Expected = Request | Reserve | Free
"""A call that the simulator has already made, and that the log must show next."""


class State:
    """Memblock and everything else that a hypothesis can differ in.

    ``held`` maps the start of each allocation and reservation that can be freed to its size and
    its caller. ``doublings`` are the arrays that grew, as (name, regions, address);
    ``percpu_frees`` the units of which the per-cpu allocator is about to give back the rest.
    ``same`` counts allocations found identical, ``preserved`` reservations of preserved blocks.
    ``suspicions`` counts what is odd but no difference, to tell equally good hypotheses apart.
    While ``record`` is a list it gets every memblock call. ``said`` are the simulator's messages.
    """

    __slots__ = (
        "differences",
        "doublings",
        "doublings_seen",
        "expected",
        "held",
        "last",
        "memblock",
        "pending",
        "percpu_frees",
        "preserved",
        "record",
        "said",
        "same",
        "scratch",
        "steps",
        "suspicions",
    )

    def __init__(self, memblock: Memblock) -> None:
        self.memblock = memblock
        self.differences: list[Difference] = []
        self.same = 0
        self.preserved = 0
        self.suspicions = 0
        self.record: list[tuple[str, tuple[Any, ...], Any]] | None = None
        self.held: dict[int, tuple[int, str]] = {}
        self.pending: Request | None = None
        self.last = (0, 0)
        self.expected: deque[Expected] = deque()
        self.doublings: list[tuple[str, int, int]] = []
        self.doublings_seen = 0
        self.percpu_frees: deque[int] = deque()
        self.steps: frozenset[str] = frozenset()
        self.scratch: list[tuple[int, int]] = []
        self.said: tuple[str, ...] = ()
        memblock.trace = self._trace

    def fork(self) -> State:
        """A copy that goes its own way."""
        twin = State(_copy_memblock(self.memblock))
        twin.differences = list(self.differences)
        twin.same = self.same
        twin.preserved = self.preserved
        twin.suspicions = self.suspicions
        twin.held = dict(self.held)
        twin.pending = self.pending
        twin.last = self.last
        twin.expected = deque(self.expected)
        twin.doublings = list(self.doublings)
        twin.doublings_seen = self.doublings_seen
        twin.percpu_frees = deque(self.percpu_frees)
        twin.steps = self.steps
        twin.scratch = list(self.scratch)
        twin.said = self.said
        return twin

    def scratch_overlap(self, phys: int, len_bytes: int) -> bool:
        """``kho_scratch_overlap``: whether a range meets a scratch area known so far."""
        return any(phys < base + size and base < phys + len_bytes for base, size in self.scratch)

    def differ(self, line: int, call: str, real: int | None, simulated: int | None) -> None:
        """Note a difference."""
        self.differences.append(Difference(line, call, real, simulated))

    def did(self, step: str) -> bool:
        """Whether the silent step was taken."""
        return step in self.steps

    def take(self, step: str) -> bool:
        """Note that a silent step is being taken; False if it was taken before."""
        if step in self.steps:
            return False
        self.steps |= {step}
        return True

    def signature(self) -> tuple[Any, ...]:
        """Equal for states that can never come to differ in what they will do."""
        memory, reserved = self.memblock.memory, self.memblock.reserved
        return (
            tuple(memory.base),
            tuple(memory.end),
            tuple(memory.flags),
            tuple(reserved.base),
            tuple(reserved.end),
            tuple(reserved.flags),
            tuple(reserved.nid),
            self.pending,
            tuple(self.expected),
            tuple(self.percpu_frees),
            self.steps,
        )

    def _trace(self, symbol: str, arguments: tuple[Any, ...], result: Any) -> None:
        if symbol == "memblock_double_array":
            name, regions = arguments
            self.doublings.append((name, regions, result))
        elif self.record is not None:
            self.record.append((symbol, arguments, result))


def _copy_array(array: RegionArray) -> RegionArray:
    twin = RegionArray(array.name, array.max)
    twin.base, twin.end = list(array.base), list(array.end)
    twin.flags, twin.nid = list(array.flags), list(array.nid)
    twin.total_size, twin.array_phys = array.total_size, array.array_phys
    return twin


def _copy_memblock(memblock: Memblock) -> Memblock:
    twin = type(memblock)(
        page_size=memblock.page_size,
        smp_cache_bytes=memblock.smp_cache_bytes,
        movable_node=memblock.movable_node,
        mirrored_kernelcore=memblock.mirrored_kernelcore,
    )
    twin.memory, twin.reserved = _copy_array(memblock.memory), _copy_array(memblock.reserved)
    twin.bottom_up = memblock.bottom_up
    twin.can_resize = memblock.can_resize
    twin.current_limit = memblock.current_limit
    twin.kho_scratch_only = memblock.kho_scratch_only
    twin.system_has_some_mirror = memblock.system_has_some_mirror
    return twin
