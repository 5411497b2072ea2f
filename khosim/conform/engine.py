"""Making the calls of a log again, one by one, and comparing each address.

A request is answered by khosim's memblock before the logged address is looked at. Where the two
differ, two hypotheses go on side by side: the log is right and the simulator was wrong, or the
other way round (a damaged log). Each carries its own memblock; what the rest of the log says
decides between them, so that one difference stays one. The better of two has fewer differences.

Some allocations log no request: node data (``mm/numa.c:alloc_node_data`` @ 7.3, aligned to a cache
line) and contiguous areas (``mm/cma.c:cma_alloc_mem``). There the reservation tells size and node,
the caller's rule the rest.
"""

from __future__ import annotations

from collections.abc import Callable

from khosim.conform.boot_facts import BootFacts
from khosim.conform.dmesg_calls import (
    Add,
    Doubled,
    Dump,
    Event,
    Free,
    Note,
    Remove,
    Request,
    Reserve,
    symbol_of,
)
from khosim.conform.dumps import compare_dump, compare_node_range
from khosim.conform.frees import free, note_percpu
from khosim.conform.handover import PRESERVING, HandoverWork
from khosim.conform.predecessor import Predecessor
from khosim.conform.requests import alloc_contiguous, call_text, simulate
from khosim.conform.silent_steps import SilentSteps
from khosim.conform.start import ramdisks
from khosim.conform.state import State
from khosim.conform.witnesses import Witnesses
from khosim.errors import KernelPanic, RamFault
from khosim.kernel.memblock import MEMBLOCK_RSRV_KERN, PHYS_ADDR_MAX, Memblock, numa_valid_node

__all__ = ("Engine",)

_MOST_STATES = 8
_SMP_CACHE_BYTES = 64
_ALLOCATORS = (
    "memblock_alloc_range_nid", "memblock_alloc_internal", "memblock_phys_alloc",
    "memblock_alloc_try_nid", "memblock_alloc_exact_nid", "memblock_alloc_hugetlb",
)  # fmt: skip
_HUGE = ("huge", "alloc_bootmem")
_END = ("slab-up", "later")


class Engine:
    """The replay of one boot's events."""

    def __init__(
        self,
        events: list[Event],
        facts: BootFacts,
        predecessor: Predecessor | None,
        incoming: list[tuple[int, int]],
    ) -> None:
        end = next(
            (i for i, e in enumerate(events) if isinstance(e, Note) and e.kind in _END), None
        )
        self.events = events[:end]
        self.facts = facts
        self.incoming = incoming
        self.steps = SilentSteps(facts, events)
        self.witnesses = Witnesses(self.events, facts)
        self.handover = HandoverWork(self.events, facts, predecessor, incoming, self.witnesses)
        reserves = [(i, event) for i, event in enumerate(self.events) if isinstance(event, Reserve)]
        self.nr_allocations = sum(self._by_allocator(event, i) for i, event in reserves)
        self.nr_preserved = sum(
            not event.flags and symbol_of(event.caller).startswith(PRESERVING)
            for _, event in reserves
        )
        self.ranges_from = {line: i for i, (line, *_) in enumerate(facts.node_ranges)}

    def run(self, starts: list[Memblock]) -> State:
        """Replay all events from each of ``starts`` on; the best hypothesis in the end."""
        states = [State(memblock) for memblock in starts]
        for state in states:
            state.scratch = list(self.incoming)
            for low, high in ramdisks(self.events, self.facts):
                state.held[low] = (high - low, "reserve_initrd")
            self.steps.start(state)
        for index, event in enumerate(self.events):
            after = [twin for state in states for twin in self._guarded(state, index, event)]
            states = after if len(after) == 1 else _best(after)
        for state in states:
            self._finish(state)
        return _best(states)[0]

    def _guarded(self, state: State, index: int, event: Event) -> list[State]:
        try:
            return self._step(state, index, event)
        except (KernelPanic, RamFault) as error:
            # Only a hypothesis that makes no sense comes to this.
            state.pending = None
            state.differ(event.line, f"impossible: {error}", None, None)
            return [state]

    def _finish(self, state: State) -> None:
        last = self.events[-1].line if self.events else 0
        if state.pending is not None:
            state = self._allocated(state, state.pending, None)[0]
        if state.expected:
            self.handover.missing(state, last, len(state.expected))

    def _step(self, state: State, index: int, event: Event) -> list[State]:
        if isinstance(event, Note):
            self.steps.before(state, event)
            self._note(state, event)
            return [state]
        if isinstance(event, Doubled):
            self._doubled(state, event)
            return [state]
        if self._is_nested(state, index, event):
            return [state]
        if state.pending is not None:
            request, state.pending = state.pending, None
            if isinstance(event, Reserve) and self._answers(state, index, request, event):
                return self._allocated(state, request, event)
            failed = self._allocated(state, request, None)
            return [twin for one in failed for twin in self._step(one, index, event)]
        self.handover.start(state, event)
        if state.expected and self.handover.expect(state, index, event):
            return [state]
        self.steps.before(state, event)
        states = self._dispatch(state, index, event)
        for one in states:
            self.steps.after(one, event)
        return states

    def _dispatch(self, state: State, index: int, event: Event) -> list[State]:
        memblock = state.memblock
        if isinstance(event, Request):
            if event.nid >= 0:
                self.steps.nodes(state)
            state.pending = event
            return [state]
        if isinstance(event, Reserve):
            if self._by_allocator(event, index):
                return self._direct(state, index, event)
            return self._reserved(state, index, event)
        if isinstance(event, Free):
            call = f"memblock_phys_free {event.caller}"
            again = self.witnesses.freed_again(index)
            return free(state, self.facts, event, call, again=again)
        if isinstance(event, Add):
            return self._added(state, index, event)
        if isinstance(event, Remove):
            size = event.end - event.base & PHYS_ADDR_MAX
            if symbol_of(event.caller) == "arm64_memblock_init" and size != PHYS_ADDR_MAX:
                # It removes all from an address on, and prints an end two bytes before it.
                start = event.end + 1 & PHYS_ADDR_MAX
                state.differ(event.line, "memblock_remove", event.base, start)
            memblock.memblock_remove(event.base, size)
            return [state]
        assert isinstance(event, Dump)
        compare_dump(state, event, self.facts)
        return [state]

    # Allocations

    def _by_allocator(self, event: Reserve, index: int) -> bool:
        symbol = symbol_of(event.caller)
        if symbol.startswith("0x") or not symbol:
            notes = self.witnesses.notes_after(index)
            return bool(event.flags & MEMBLOCK_RSRV_KERN and {"node-data", "cma"} & set(notes))
        return symbol.startswith(_ALLOCATORS)

    def _answers(self, state: State, index: int, request: Request, event: Reserve) -> bool:
        """Whether ``event`` is where ``request`` was served (else it failed without a line)."""
        symbol = symbol_of(event.caller)
        if not symbol.startswith(_ALLOCATORS) and not symbol.startswith("0x"):
            return False
        if event.end - event.base == request.size:
            return True
        return not {"node-data", "cma"} & set(self.witnesses.notes_after(index))

    def _allocated(self, state: State, request: Request, event: Reserve | None) -> list[State]:
        def run(memblock: Memblock) -> int:
            return simulate(memblock, request, state.scratch_overlap)

        known = len(state.differences)
        states = self._compare(state, run, request.size, event, request.line, call_text(request))
        for one in states:
            base, size = one.last
            moved = event is not None and (base, size) == (event.base, request.size)
            if moved and len(one.differences) > known and one.differences[-1].real == base:
                self._blame_limits(one, request, base)
            if size:
                note_percpu(one, self.facts, base, size, request.caller)
                if any(word in request.caller for word in _HUGE):
                    self._huge(one, base, size, request)
        return states

    def _blame_limits(self, state: State, request: Request, base: int) -> None:
        """Where the usual limits give the logged address, it is the request's line that is odd."""
        for start, end in self.witnesses.usual_limits(request):
            memblock = state.fork().memblock
            memblock.memblock_phys_free(base, request.size)
            usual = request._replace(start=start, end=end)
            if simulate(memblock, usual, state.scratch_overlap) == base:
                low = request.start != start
                real, own = (request.start, start) if low else (request.end, end)
                state.differences.pop()
                state.differ(request.line, f"{call_text(request)}: limits", real, own)
                return

    def _compare(
        self,
        state: State,
        run: Callable[[Memblock], int],
        size: int,
        event: Reserve | None,
        line: int,
        call: str,
    ) -> list[State]:
        found = run(state.memblock)
        caller = symbol_of(call.rpartition(" ")[2])
        own_end = found + size & PHYS_ADDR_MAX
        if event is None:
            state.last = (0, 0)
            if not found:
                return [state]
            failed = state.fork()
            failed.memblock.memblock_phys_free(found, size)
            failed.differ(line, call, None, found)
            state.differ(line, call, None, found)
            self._hold(state, found, size, caller)
            return [failed, state]
        nid = _nid_at(state.memblock, found) if found and size and self.facts.numa else event.nid
        if (found, own_end, nid) == (event.base, event.end, event.nid):
            state.same += 1
            self._hold(state, found, size, caller)
            return [state]
        real, own = (event.base, found) if event.base != found else (event.end, own_end)
        if (event.base, event.end) == (found, own_end):
            call, real, own = f"{call}: node", event.nid, nid
        states = []
        logged_size = event.end - event.base & PHYS_ADDR_MAX
        if logged_size < PHYS_ADDR_MAX >> 8:
            as_logged = state.fork()
            if found and size:
                as_logged.memblock.memblock_phys_free(found, size)
            as_logged.memblock.memblock_reserve_node(
                event.base, logged_size, event.nid, event.flags
            )
            as_logged.differ(event.line, call, real, own or None)
            self._hold(as_logged, event.base, logged_size, caller)
            states.append(as_logged)
        if found or not states:
            state.differ(event.line, call, real, own or None)
            self._hold(state, found, size, caller)
            states.append(state)
        return states

    def _hold(self, state: State, base: int, size: int, caller: str) -> None:
        state.last = (base, size)
        if size:
            state.held.pop(base, None)
            state.held[base] = (size, caller)

    def _huge(self, state: State, base: int, size: int, request: Request) -> None:
        # alloc_bootmem_huge_page: all but the head page.
        page = self.facts.page_size
        if size == request.align and size > page:
            state.memblock.memblock_reserved_mark_noinit(base + page, size - page)

    def _direct(self, state: State, index: int, event: Reserve) -> list[State]:
        notes = self.witnesses.notes_after(index)
        size = event.end - event.base & PHYS_ADDR_MAX
        if note := notes.get("node-data"):
            self.steps.nodes(state)
            nid = int(note.words[0])
            sizes = {size: None, self.witnesses.size_of(note): None}
            states = []
            for one in sizes:
                twin = state.fork() if len(sizes) > 1 else state
                states += self._node_data(twin, event, one, nid)
            return states
        if "cma" in notes:
            call = f"memblock_alloc_range_nid({size} bytes, nid {event.nid}) cma_alloc_mem"

            def run(memblock: Memblock) -> int:
                return alloc_contiguous(memblock, self.facts, size, event.nid)
        else:
            call = f"memblock_alloc_range_nid({size} bytes, nid {event.nid}) {event.caller}"

            def run(memblock: Memblock) -> int:
                return memblock.memblock_alloc_range_nid(
                    size, _SMP_CACHE_BYTES, 0, 0, event.nid, False
                )

        return self._compare(state, run, size, event, event.line, call)

    def _node_data(self, state: State, event: Reserve, size: int, nid: int) -> list[State]:
        def run(memblock: Memblock) -> int:
            return memblock.memblock_phys_alloc_try_nid(size, _SMP_CACHE_BYTES, nid)

        call = f"memblock_phys_alloc_try_nid({size} bytes, nid {nid}) alloc_node_data"
        return self._compare(state, run, size, event, event.line, call)

    # Calls that name their range

    def _reserved(self, state: State, index: int, event: Reserve) -> list[State]:
        return self._named(
            state, index, event, f"memblock_reserve {event.caller}", self._do_reserve
        )

    def _do_reserve(self, state: State, event: Reserve | Add, base: int, end: int) -> None:
        assert isinstance(event, Reserve)
        size = end - base & PHYS_ADDR_MAX
        state.memblock.memblock_reserve_node(base, size, event.nid, event.flags)
        if size < PHYS_ADDR_MAX >> 8:
            state.held.setdefault(base, (size, symbol_of(event.caller)))
        if self.facts.kho_boot and symbol_of(event.caller).startswith(PRESERVING):
            state.memblock.memblock_reserved_mark_noinit(base, size)
            state.preserved += 1

    def _added(self, state: State, index: int, event: Add) -> list[State]:
        return self._named(state, index, event, f"memblock_add {event.caller}", self._do_add)

    def _do_add(self, state: State, event: Reserve | Add, base: int, end: int) -> None:
        assert isinstance(event, Add)
        size = end - base & PHYS_ADDR_MAX
        if event.nid is None:
            state.memblock.memblock_add(base, size)
        else:
            state.memblock.memblock_add_node(base, size, event.nid, event.flags)

    def _named(
        self,
        state: State,
        index: int,
        event: Reserve | Add,
        call: str,
        do: Callable[[State, Reserve | Add, int, int], None],
    ) -> list[State]:
        """Do what a line says unless other lines know better; then do both, as hypotheses."""
        witness = self.witnesses.of(index)
        if witness is None:
            do(state, event, event.base, event.end)
            return [state]
        if witness.range is None:
            as_logged = state.fork()
            state.differ(event.line, call, event.base, None)
            if witness.sure or event.end <= event.base:
                return [state]
            do(as_logged, event, event.base, event.end)
            return [state, as_logged]
        base, end = witness.range
        real, own = (event.base, base) if event.base != base else (event.end, end)
        as_logged = state.fork()
        state.differ(event.line, call, real, own)
        do(state, event, base, end)
        if event.end <= event.base:
            return [state]
        if witness.line:
            as_logged.differ(witness.line, call, own, real)
        as_logged.suspicions += 1
        do(as_logged, event, event.base, event.end)
        return [state, as_logged]

    # The rest

    def _note(self, state: State, note: Note) -> None:
        if note.kind == "node-range":
            self.handover.extend(state)
            if not self.handover.node_ranges_used:
                nid, first, last = note.words
                start, end = int(first, 16), int(last, 16) + 1
                nth = self.ranges_from[note.line]
                compare_node_range(state, note.line, start, end, int(nid), nth)
        elif note.kind == "node-data":
            _, first, last = note.words
            base, end = int(first, 16), int(last, 16) + 1
            own = (state.last[0], sum(state.last))
            if own != (base, end) and not any(d.line == note.line - 1 for d in state.differences):
                real, simulated = (base, own[0]) if base != own[0] else (end, own[1])
                state.differ(note.line, "NODE_DATA", real, simulated)

    def _doubled(self, state: State, event: Doubled) -> None:
        call = f"memblock_double_array {event.name}"
        if state.doublings_seen >= len(state.doublings):
            self.steps.nodes(state)
        if state.doublings_seen >= len(state.doublings):
            state.differ(event.line, call, event.base, None)
            return
        name, regions, base = state.doublings[state.doublings_seen]
        state.doublings_seen += 1
        if (name, regions, base) != (event.name, event.max_regions, event.base):
            state.differ(event.line, call, event.base, base)

    def _is_nested(self, state: State, index: int, event: Event) -> bool:
        """Whether ``event`` is the inside of a doubling, which has been done already."""
        back = self.witnesses.previous(index)
        if isinstance(event, Free) and isinstance(back, Doubled):
            return True
        if not isinstance(event, Reserve):
            return False
        if isinstance(back, Free):
            back = self.witnesses.previous(index, 2)
        if not isinstance(back, Doubled):
            return False
        base = state.doublings[state.doublings_seen - 1][2] if state.doublings_seen else None
        if base is not None and base != event.base:
            state.differ(event.line, "memblock_double_array", event.base, base)
        return True


def _nid_at(memblock: Memblock, addr: int) -> int:
    reserved = memblock.reserved
    nid = reserved.nid[reserved.search(addr)]
    return nid if numa_valid_node(nid) else -1


def _best(states: list[State]) -> list[State]:
    """The hypotheses worth following, the likeliest first, each of its kind once."""
    kept: list[State] = []
    seen = set()
    for state in sorted(states, key=lambda state: (len(state.differences), state.suspicions)):
        signature = state.signature()
        if signature not in seen:
            seen.add(signature)
            kept.append(state)
    return kept[:_MOST_STATES]
