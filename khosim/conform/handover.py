"""The calls that the handover makes in one go, to be found in the log one after the other.

``kho_reserve_scratch``, ``kho_extend_scratch`` and ``kho_preserved_memory_reserve``
(``kernel/liveupdate/kexec_handover.c`` @ 7.3) depend on nothing but memblock and the predecessor.
At the first logged call of each the simulator makes them all; the log's lines are then compared
with these. A line that is missing, or one too many, is one difference.
"""

from __future__ import annotations

from khosim.conform import scratch
from khosim.conform.boot_facts import BootFacts
from khosim.conform.dmesg_calls import Event, Free, Request, Reserve, symbol_of
from khosim.conform.predecessor import Predecessor
from khosim.conform.requests import call_text
from khosim.conform.state import State
from khosim.conform.witnesses import Witnesses
from khosim.kernel.memblock import MEMBLOCK_RSRV_KERN

__all__ = ("PRESERVING", "HandoverWork")

PRESERVING = ("kho_", "__kho_", "deserialize_bitmap")
"""How the names of functions begin that reserve what a predecessor preserved."""


class HandoverWork:
    """The handover's part of one boot. ``node_ranges_used``: the log's own node ranges served."""

    def __init__(
        self,
        events: list[Event],
        facts: BootFacts,
        predecessor: Predecessor | None,
        incoming: list[tuple[int, int]],
        witnesses: Witnesses,
    ) -> None:
        self._events = events
        self._facts = facts
        self._predecessor = predecessor
        self._incoming = incoming
        self._witnesses = witnesses
        self.node_ranges_used = False

    def start(self, state: State, event: Event) -> None:
        """Begin what ``event`` is the first call of."""
        facts = self._facts
        if scratch.is_kho_init(event) and not facts.kho_boot and state.take("scratch"):
            scratch.reserve_scratch(state, facts, self._events)
        elif facts.kho_boot and scratch.is_kho_radix(event) and not state.did("extended"):
            if self._predecessor is not None and scratch.extend_scratch(state, self._predecessor):
                state.take("extended")
            state.take("extending")
        elif (
            facts.kho_boot
            and isinstance(event, Reserve)
            and not event.flags
            and self._predecessor is not None
            and symbol_of(event.caller).startswith(PRESERVING)
            and state.take("preserved")
        ):
            blocks = self._predecessor.preserved()
            if blocks is not None:
                scratch.reserve_preserved(state, blocks)
        if (
            state.did("extending")
            and not isinstance(event, Reserve)
            and not scratch.is_kho_radix(event)
        ):
            self.extend(state)

    def extend(self, state: State) -> None:
        """The extension without a tree, due at the first event after its allocations."""
        if state.did("extending") and state.take("extended"):
            scratch.extend_from_node_ranges(state, self._facts, self._incoming, self._events)
            self.node_ranges_used = True

    def expect(self, state: State, index: int, event: Event) -> bool:
        """Find ``event`` among the calls already made; False if it is none of them."""
        want = state.expected[0]
        following = self._witnesses.following(index)
        altered = (
            len(state.expected) > 1
            and following is not None
            and (_alike(state.expected[1], following) == "equal")
        )
        for ahead in range(1 if altered else min(4, len(state.expected))):
            if _alike(state.expected[ahead], event) == "equal":
                self.missing(state, event.line, ahead)
                self._count(state, event)
                state.expected.popleft()
                return True
        if not altered and following is not None and _alike(want, following) == "equal":
            if isinstance(event, (Request, Reserve, Free)):
                state.differ(event.line, "memblock call", _address(event), None)
            return True
        if _alike(want, event) != "kind":
            self.missing(state, event.line, len(state.expected))
            return False
        state.expected.popleft()
        assert isinstance(event, (Request, Reserve, Free))
        call = "memblock_reserve" if isinstance(event, Reserve) else "memblock_phys_free"
        if isinstance(event, Request):
            size, align = event.size != want[2], event.align
            real, own = (event.size, want[2]) if size else (align, want[3])
            state.differ(event.line, call_text(event), int(real), int(own))
            return True
        real, own = (event.base, want[1]) if event.base != want[1] else (event.end, want[2])
        state.differ(event.line, f"{call} {event.caller}", int(real), int(own))
        return True

    def _count(self, state: State, event: Event) -> None:
        if isinstance(event, Reserve):
            if event.flags & MEMBLOCK_RSRV_KERN:
                state.same += 1
            else:
                state.preserved += 1

    def missing(self, state: State, line: int, count: int) -> None:
        """Note that the next ``count`` calls are not in the log, where ``line`` stands."""
        for _ in range(min(count, len(state.expected))):
            want = state.expected.popleft()
            if not isinstance(want, Request):
                state.differ(line, f"missing: {type(want).__name__.lower()}", None, want.base)


def _alike(want: Event, event: Event) -> str:
    """How far ``event`` is the call ``want``: "equal", "kind" or not at all."""
    if isinstance(want, Request) and isinstance(event, Request):
        same = (want.size, want.align) == (event.size, event.align)
        return "equal" if same else "kind"
    if isinstance(want, Reserve) and isinstance(event, Reserve):
        own = bool(want.flags) == bool(event.flags)
        return ("equal" if want[1:3] == event[1:3] else "kind") if own else ""
    if isinstance(want, Free) and isinstance(event, Free):
        return "equal" if want[1:3] == event[1:3] else "kind"
    return ""


def _address(event: Request | Reserve | Free) -> int | None:
    return None if isinstance(event, Request) else event.base
