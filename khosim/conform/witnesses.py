"""What other lines of a log know about a call that names its own range.

Reservations and additions of memory cannot be predicted, but most are told twice: ACPI names each
table before it is reserved, ``reserve_real_mode`` always takes the first MiB, memory comes from the
firmware's map, and the next dump shows what came of it all. Where these contradict a line, one of
the two is damaged.
"""

from __future__ import annotations

from typing import NamedTuple

from khosim.conform.boot_facts import BootFacts
from khosim.conform.dmesg_calls import (
    Add,
    Dump,
    Event,
    Free,
    Note,
    Remove,
    Request,
    Reserve,
    symbol_of,
)
from khosim.conform.start import covered, page_cut, subtract, variants

__all__ = ("Witness", "Witnesses")

_MIB = 1 << 20
_SOON = 64  # events within which a second free of the same range is looked for
Range = tuple[int, int]


class Witness(NamedTuple):
    """Another account of a call: its range if known, and the line that gives it (0: none).

    Without a range the call cannot have been; ``sure`` tells whether nothing speaks for it.
    """

    range: Range | None
    line: int
    sure: bool = True


class Witnesses:
    """The lines around each event of a log."""

    def __init__(self, events: list[Event], facts: BootFacts) -> None:
        self._events = events
        self._facts = facts
        self._adds = self._firmware_adds()
        self._dumps = [i for i, event in enumerate(events) if isinstance(event, Dump)]

    def previous(self, index: int, back: int = 1) -> Event | None:
        """The ``back``-th event before ``index`` that is no note."""
        for at in range(index - 1, -1, -1):
            if not isinstance(self._events[at], Note):
                back -= 1
                if not back:
                    return self._events[at]
        return None

    def usual_limits(self, request: Request) -> set[Range]:
        """The limits that calls from the same function have elsewhere in the log, and none."""
        limits = {
            (event.start, event.end)
            for event in self._events
            if isinstance(event, Request) and event.caller == request.caller
        }
        return (limits | {(0, 0)}) - {(request.start, request.end)}

    def following(self, index: int) -> Event | None:
        """The next event after ``index`` that is no note."""
        rest = self._events[index + 1 :]
        return next((event for event in rest if not isinstance(event, Note)), None)

    def notes_after(self, index: int) -> dict[str, Note]:
        """The notes between event ``index`` and the next memblock call, by kind."""
        found: dict[str, Note] = {}
        for event in self._events[index + 1 :]:
            if not isinstance(event, Note):
                break
            found.setdefault(event.kind, event)
        return found

    def size_of(self, note: Note) -> int:
        """Bytes of the range at the end of a note."""
        return int(note.words[-1], 16) + 1 - int(note.words[-2], 16)

    def of(self, index: int) -> Witness | None:
        """The account that contradicts event ``index``; None where nothing does."""
        event = self._events[index]
        if isinstance(event, Reserve):
            told = self._told(index, event) or self._paired(index, event)
            if told is not None:
                return told if told.range != (event.base, event.end) else None
        elif isinstance(event, Add):
            paired = self._paired(index, event)
            if paired is not None:
                return paired
            said = self._adds.get(index)
            if said is not None:
                return Witness(said, 0) if said != (event.base, event.end) else None
        else:
            return None
        return self._dumped(index, event)

    def _told(self, index: int, event: Reserve) -> Witness | None:
        if symbol_of(event.caller) == "reserve_real_mode":
            return Witness((0, _MIB), event.line)
        before = self._events[index - 1] if index else None
        if isinstance(before, Note) and before.kind in ("acpi-table", "mp-table"):
            first, last = before.words
            return Witness((int(first, 16), int(last, 16) + 1), before.line)
        return None

    def _paired(self, index: int, event: Reserve | Add) -> Witness | None:
        """arm64_memblock_init adds the initrd's memory and then reserves it: one range twice."""
        step = 1 if isinstance(event, Add) else -1
        if symbol_of(event.caller) != "arm64_memblock_init" or not 0 <= index + step < len(
            self._events
        ):
            return None
        other = self._events[index + step]
        if not isinstance(other, Add if step < 0 else Reserve):
            return None
        touching = other.base == event.base or other.end == event.end
        if not touching and other.end - other.base != event.end - event.base:
            return None
        own, its = (event.base, event.end), (other.base, other.end)
        if own == its or self._edges(own) >= self._edges(its):
            return None
        return Witness(its, other.line)

    def _edges(self, range_: Range) -> int:
        """How many ends of a range meet the end of something reserved in the first dump."""
        if not self._dumps:
            return 0
        rows = self._rows(self._dumps[0], False)
        edges = {edge for row in rows for edge in row}
        for event in self._events[: self._dumps[0]]:
            if isinstance(event, Reserve):
                edges |= {event.base, event.end} if (event.base, event.end) != range_ else set()
        return sum(edge in edges for edge in range_)

    def _dumped(self, index: int, event: Reserve | Add) -> Witness | None:
        """Whether a dump shows that ``event`` cannot be: all of them surely, one of them maybe."""
        if isinstance(event, Reserve):
            wanted = (event.base, event.end)
        else:
            wanted = page_cut(event.base, event.end, self._facts.page_size)
        shown = []
        for at in (i for i in self._dumps if i > index):
            if any(
                isinstance(other, (Free, Remove)) and _meet(other, event)
                for other in self._events[index:at]
            ):
                break
            known = covered(*wanted, self._rows(at, isinstance(event, Add)))
            shown.append(event.base < event.end and known)
        if all(shown):
            return None
        return Witness(None, 0, sure=not any(shown))

    def _rows(self, at: int, memory: bool) -> list[Range]:
        dump = self._events[at]
        assert isinstance(dump, Dump)
        if memory:
            ways = variants(dump.memory, dump.memory_size)
        else:
            ways = variants(dump.reserved, dump.reserved_size)
        return [(row.base, row.end) for rows in ways for row in rows]

    def freed_again(self, index: int) -> bool:
        """Whether the range that event ``index`` gives back is given back once more, untaken."""
        event = self._events[index]
        assert isinstance(event, Free)
        for other in self._events[index + 1 : index + _SOON]:
            if isinstance(other, Reserve) and _meet(event, other):
                return False
            if isinstance(other, Free) and (other.base, other.end) == (event.base, event.end):
                return True
        return False

    def _firmware_adds(self) -> dict[int, Range]:
        """What x86's firmware map says about each ``memblock_add``, if it is about as many."""
        ram: list[Range] = []
        for event in self._events:
            if not isinstance(event, Note):
                continue
            if event.kind == "e820":
                first, last, kind = event.words
                if kind.startswith(("System RAM", "usable")):
                    ram.append((int(first, 16), int(last, 16) + 1))
            elif event.kind == "e820-change":
                what, first, last, more = event.words
                if what == "remove" or "==>" in more:
                    ram = subtract(ram, [(int(first, 16), int(last, 16) + 1)])
        adds = [
            i
            for i, event in enumerate(self._events)
            if isinstance(event, Add) and symbol_of(event.caller) == "e820__memblock_setup"
        ]
        if len(adds) != len(ram):
            return {}
        said = dict(zip(adds, ram, strict=True))
        wrong = 0
        for i, told in said.items():
            event = self._events[i]
            assert isinstance(event, Add)
            wrong += told != (event.base, event.end)
        return said if wrong <= 1 else {}


def _meet(one: Free | Remove, other: Reserve | Add) -> bool:
    return one.base < other.end and other.base < one.end
