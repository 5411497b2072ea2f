"""A finding told as the life of the page that it is about: whose it was, who wrote it, and when.

The program is run twice: once to see which page what speaks is about, once to watch that page.
Events are numbered through a program, as ``generation.event``. A page's writer is looked at after
each event, so that a write is told with the first event that follows it; writes of one kernel
function in a row are one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from khosim.checks.history import History
from khosim.checks.look import AT_ANY_TIME, Look
from khosim.explore.kinds import is_lawful
from khosim.explore.kit import audit
from khosim.explore.limits import alarm
from khosim.explore.program import event_line
from khosim.explore.search import KINDS, is_drained
from khosim.explore.shrink import cause_of
from khosim.explore.world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from khosim.checks.ranges import Ranges
    from khosim.explore.world import Problem, Step
    from khosim.kernel.behaviours import Release
    from khosim.kernel.trace import Event

__all__ = ("Story", "explain", "pages_of")

_PHYS = re.compile(r"\bpage (0x[0-9a-f]+)")
_PFN = re.compile(r"\bpfn[: ](?:0x)?([0-9a-f]+)")
_NAME = re.compile(r"\b([a-z]\d+)\b")
_QUIET = ("memblock_add", "memblock_set_node", "memblock_trim_memory")
"""They are about all of memory, and so about no page in particular."""
_RESULT_PFN = ("alloc_pages", "alloc_pages_exact")
_RESULT_PHYS = ("kho_radix_alloc_node", "reserve_mem", "reserve_mem_kho_revive", "kexec_add_buffer")
_ADDRESSES = ("phys", "fdt_phys", "scratch_phys", "head_pa", "mem_map")


class Story(NamedTuple):
    """``spoke`` is what spoke this time, None for silence; ``lines`` tell the rest."""

    spoke: Problem | None
    lines: list[str]


def explain(steps: Sequence[Step], problem: Problem, release: str | Release) -> Story:
    """Run a finding's program again and tell the life of its page."""
    world = _run(steps, release)
    spoke = next((p for p in world.problems if cause_of(p) == cause_of(problem)), None)
    phys = _page_of(world, spoke or problem)
    watch = _Watch(phys, world.machine.hardware.page_shift)
    world.close()
    told = _run(steps, release, watch)
    lines = []
    if phys is not None:
        lines = [f"the life of page {phys:#x} (pfn {phys >> watch.shift:#x})", *watch.lines]
        writer = told.machine.hardware.ram.last_writer(phys)
        if writer is None:
            lines.append("nobody ever wrote it")
        elif writer.generation < 0:
            lines.append(f"last written by {writer.symbol}, which is no kernel")
        else:
            lines.append(f"last written by {writer.symbol} in generation {writer.generation}")
    else:
        lines = ["no page in particular: what the program did", *watch.lines]
    told.close()
    return Story(spoke, lines)


def _run(steps: Sequence[Step], release: str | Release, watch: _Watch | None = None) -> World:
    world = World(KINDS, release, listens=True)
    if watch is not None:
        world.watch = watch.hear(world)
    with alarm():
        for step in steps:
            kind = KINDS[step.kind]
            if not is_lawful(world, kind, step.args):
                break
            source = kind.source(world, *step.args)
            if watch is not None:
                watch.begin(source, step)
            errno = world.run(step)
            if watch is not None:
                watch.end(world, errno)
            if world.is_over:
                break
        world.judge(drained=not world.is_over and is_drained(world))
    return world


def _page_of(world: World, problem: Problem) -> int | None:
    # The page that an invariant names; else one that its words name; else that of a variable in
    # them; else the page of whatever else spoke.
    machine = world.machine
    size = machine.hardware.page_size
    found = audit(machine) if machine.kernel is not None else machine.check()
    told = {(v.invariant, v.message): v.phys for v in found if v.phys > 0}
    own = told.get((problem.invariant, problem.message), 0)
    own = own or next(iter(pages_of(problem.message, size)), 0)
    for name in [] if own else _NAME.findall(problem.message):
        value = world.vars.get(name)
        own = own or int(getattr(value, "phys", 0) or 0)
    own = own or next(iter(told.values()), 0)
    last = machine.hardware.ram.size_bytes
    return own - own % size if 0 < own < last else None


def pages_of(message: str, page_size: int) -> list[int]:
    """The pages that words name, as physical addresses."""
    found = [int(text, 16) for text in _PHYS.findall(message)]
    return found + [int(text, 16) * page_size for text in _PFN.findall(message)]


class _Watch:
    """Writes down, step by step, what becomes of one page; without one, all events but memblock's.

    ``lines`` are the story.
    """

    def __init__(self, phys: int | None, shift: int) -> None:
        self.phys = phys
        self.shift = shift
        self.lines: list[str] = []
        self._number = 0
        self._writer: object = None
        self._state = ""
        self._step = 0

    def hear(self, world: World) -> Callable[[Event], None]:
        """What ``world`` calls for each event."""

        def heard(event: Event) -> None:
            self._number += 1
            self._look(world, event.generation)
            if self._is_told(event):
                gloss = "" if self.phys is None else _gloss(event)
                number = f"{event.generation}.{self._number}"
                line = event_line(event).partition(" ")[2]
                self.lines.append(f"{number:>10}  {line}{gloss}")

        return heard

    def begin(self, source: str, step: Step) -> None:
        """A step is about to be taken."""
        self._step += 1
        code = [line for line in source.splitlines() if not line.startswith("from ")]
        boot = "of the successor's boot " if step.boot else ""
        fails = f"  # allocation {step.fault} {boot}fails" if step.fault else ""
        self.lines.append(f"{self._step}. {code[0]}{fails}")
        self.lines += [f"   {line}" for line in code[1:]]

    def end(self, world: World, errno: str) -> None:
        """It was taken."""
        kernel = world.machine.kernel
        if errno:
            self.lines.append(f"{'':10}  refused with -{errno}")
        if self.phys is None or kernel is None:
            return
        self._look(world, kernel.generation)
        page = kernel.page(self.phys >> self.shift)
        state = page.kind + (f", owner {page.owner}" if page.owner else "")
        outgoing = Look(kernel.hardware, kernel, AT_ANY_TIME, History()).outgoing
        if outgoing is not None and _holds(outgoing.covered, self.phys >> self.shift):
            state += "; preserved for the successor"
        if state != self._state:
            self._state = state
            self.lines.append(f"{'':10}  now it is {state}")

    def _look(self, world: World, generation: int) -> None:
        if self.phys is None:
            return
        writer = world.machine.hardware.ram.last_writer(self.phys)
        if writer != self._writer:
            self._writer = writer
            symbol = "nobody" if writer is None else writer.symbol
            self.lines.append(f"{generation}.{self._number}".rjust(10) + f"  written by {symbol}")

    def _is_told(self, event: Event) -> bool:
        if self.phys is None:
            return not event.symbol.startswith(("memblock", "kho_preserved_memory_reserve"))
        start, end = _range(event, self.shift)
        return start <= self.phys < end and event.symbol not in _QUIET


def _holds(covered: Ranges, pfn: int) -> bool:
    starts, ends = covered
    return bool(((starts <= pfn) & (pfn < ends)).any())


def _range(event: Event, shift: int) -> tuple[int, int]:
    # The bytes that an event is about; nothing for most events.
    args, result = event.args, event.result
    number = result if isinstance(result, int) and result > 0 else 0
    if "args" in args:
        return _memblock_range(args["args"], number)
    count = args.get("nr_pages") or args.get("nr_blocks", 1) << args.get("order", 0)
    if event.symbol in _RESULT_PFN:
        return number << shift, number + count << shift if number else 0
    if "pfn" in args:
        count = args.get("nr_pages") or args.get("nr_folios", 1) << args.get("order", 0)
        return args["pfn"] << shift, args["pfn"] + count << shift
    size = args.get("size") or args.get("memsz") or args.get("scratch_len") or count << shift
    if event.symbol in _RESULT_PHYS:
        return number, number + max(size, 1) if number else 0
    start = next((args[name] for name in _ADDRESSES if args.get(name)), 0)
    return start - start % (1 << shift), start + size if start else 0


def _memblock_range(args: tuple[int, ...], result: int) -> tuple[int, int]:
    if len(args) < 2 or not all(isinstance(arg, int) for arg in args[:2]):
        return 0, 0
    start, size = (result, args[0]) if result > 1 else args[:2]
    return start, start + size


_GLOSSES = {
    "alloc_pages": "given to {owner}",
    "alloc_pages_exact": "given to {owner}",
    "kho_preserve_folio": "preserved",
    "kho_preserve_pages": "preserved",
    "kho_preserved_memory_reserve": "its predecessor preserved it",
    "kho_radix_alloc_node": "a table of the map of preserved memory",
    "kho_restore_folio": "restored",
    "kho_restore_pages": "restored",
    "kho_unpreserve_folio": "not preserved any more",
    "kho_unpreserve_pages": "not preserved any more",
}


def _gloss(event: Event) -> str:
    if event.symbol == "folio_put":
        return ": freed" if event.result else ": a reference is dropped"
    if isinstance(event.result, int) and event.result < 0:
        return ": refused"
    words = _GLOSSES.get(event.symbol, "")
    return f": {words.format(owner=event.args.get('owner', 'somebody'))}" if words else ""
