"""A program in the making: its machine, its variables, and what its author holds.

A program is a list of :class:`Step`. A step is carried out by running its source text, so that
what is printed is what was run. :class:`World` keeps the books beside it: which folios, files and
sessions the author holds, which of them are preserved, which wait in the successor. From these
books the kinds of steps (:mod:`khosim.explore.kinds`) tell what a lawful author may do next.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from khosim.checks.violation import Violation
from khosim.errors import KernelError, KernelPanic, KhoSimError
from khosim.explore import kit
from khosim.explore.expectations import is_expected_after_death, is_expected_panic
from khosim.explore.limits import EVENTS_MAX, NoEnd
from khosim.explore.oracles import is_warning
from khosim.kernel.pageblock import CMA
from khosim.program_text import FILENAME, compiled

if TYPE_CHECKING:
    from collections.abc import Callable

    from khosim.explore.kinds import Kind
    from khosim.kernel.behaviours import Release
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.trace import Event

__all__ = ("BROKEN", "DIED", "JUMPS", "LOADS", "Item", "Problem", "Step", "World")

LOADS = ("kexec", "load_image")
"""Steps with a successor's command line, image and release."""
JUMPS = ("kexec", "jump")
"""Steps into it."""


class Step(NamedTuple):
    """One step: its kind, its arguments (of which the first may be a name that it defines).

    ``fault``: the how many-th allocation fails within; ``boot`` says that it is one of the
    successor's boot, ``dies`` that it is no allocation but an event, at which the task dies.
    """

    kind: str
    args: tuple[Any, ...] = ()
    fault: int = 0
    boot: bool = False
    dies: bool = False

    @property
    def wrapper(self) -> str:
        """What stands behind ``with`` in the program; "" for a step without a fault."""
        if not self.fault:
            return ""
        if self.dies:
            return f"oops(kernel, {self.fault})"
        return f"failing{'_boot(machine' if self.boot else '(kernel'}, {self.fault})"


class Problem(NamedTuple):
    """What spoke: an invariant's name and words, and the number of the step that it came with."""

    invariant: str
    message: str
    at: int
    owner: str = ""


class Item:
    """Something that the author holds, by the name of its variable.

    ``state`` is "held", "preserved", or "incoming" from the jump until it is restored.
    """

    __slots__ = ("facts", "kind", "name", "state")

    def __init__(self, kind: str, name: str, state: str = "held", /, **facts: Any) -> None:
        self.kind = kind
        self.name = name
        self.state = state
        self.facts = facts

    def __getitem__(self, key: str) -> Any:
        return self.facts[key]

    def key(self) -> tuple[Any, ...]:
        """All of it, to compare."""
        return self.kind, self.name, self.state, tuple(sorted(self.facts.items()))


def _failed_line(failed: AssertionError, source: str) -> str:
    at = failed.__traceback__
    while at is not None and at.tb_frame.f_code.co_filename != FILENAME:
        at = at.tb_next
    return source.splitlines()[at.tb_lineno - 1] if at is not None else source


BROKEN = "broken promise"
"""What :meth:`World.run` answers of a step that broke one, of a kind that goes on."""
DIED = "task died"
"""What :meth:`World.run` answers of a step in which the task died."""


_LITTLE = 256 << 10
"""With less memory than that any call may be refused for want of it."""
_HUGE = 2 << 20
"""A file's last folio may be so much larger than what is in it."""
_LEFT = ("EBUSY", "EEXIST", "EINVAL", "ENOENT")


class World:
    """A machine with a program's variables. ``items`` are what its author holds."""

    def __init__(
        self, kinds: dict[str, Kind], release: str | Release = "7.3", *, listens: bool = False
    ) -> None:
        self.kinds = kinds
        self.release = release
        self.listens = listens
        self.vars: dict[str, Any] = {
            name: getattr(kit, name) for name in kit.PROGRAM
        }
        self.vars["suppress"] = suppress
        self.vars["KernelError"] = KernelError
        self.items: dict[str, Item] = {}
        self.steps: list[Step] = []
        self.problems: list[Problem] = []
        self.events: list[Event] = []
        self.cmdline = ""
        self.generation = -1
        self.cursed = False
        """The successor was told to do with less, by ``mem=`` or so: nothing is promised then."""
        self.is_harmed = False
        """Bytes or memory that the handover needs are not what they were: anything may happen, but
        for the simulator falling over."""
        self.has_died = False
        """A task died in the middle of a call, on this machine since it was last reset."""
        self.is_stuck = False
        """It held ``luo_session_serialize_rwsem``: a kexec would wait for it for ever."""
        self.has_failed = False
        """A task was refused memory, on this machine since it was last reset."""
        self.came: set[str] = set()
        """What tokens came with, from kernel to kernel: "ledger" where they had one."""
        self.has_fired = False
        """Whether the last step with a fault came as far as that."""
        self.is_over = False
        self.heard = 0
        """Events of this program's kernels; too many of them are no end."""
        self.watch: Callable[[Event], None] = lambda event: None
        """Called with each of them."""

    def close(self) -> None:
        """Free the machine at once; nothing of this program can be asked afterwards."""
        if "machine" in self.vars:
            self.machine.close()

    # -- what kinds ask -------------------------------------------------------------------------

    @property
    def machine(self) -> kit.Stage:
        """The machine; there is one from the first step on."""
        machine: kit.Stage = self.vars["machine"]
        return machine

    @property
    def kernel(self) -> Kernel:
        """The kernel that runs."""
        kernel: Kernel = self.vars["kernel"]
        return kernel

    @property
    def has_kernel(self) -> bool:
        """Whether one was booted."""
        return "kernel" in self.vars

    @property
    def hardware_bytes(self) -> int:
        """How much memory the machine has."""
        return self.machine.hardware.memory_map.ram_bytes

    @property
    def free_bytes(self) -> int:
        """How much memory is free and no scratch, which the kernel's own data cannot be in."""
        zones = self.kernel.pages.zones
        nr_pages = sum(zone.nr_free_pages() - zone.nr_free[CMA] for zone in zones)
        return nr_pages * self.kernel.arch.page_size

    @property
    def can_preserve(self) -> bool:
        """Whether KHO is on, which its users are to ask (``kho_is_enabled``)."""
        return self.has_kernel and self.kernel.kho_enable

    @property
    def has_luo(self) -> bool:
        """Whether there are sessions to be had: a kernel with Live Update on."""
        return self.has_kernel and self.kernel.liveupdate.enabled

    def of(self, kind: str, *states: str) -> list[Item]:
        """The items of a kind, in one of ``states`` or in any."""
        return [
            item
            for item in self.items.values()
            if item.kind == kind and (not states or item.state in states)
        ]

    def has(self, name: str, kind: str, *states: str) -> bool:
        """Whether there is such an item."""
        item = self.items.get(name)
        return item is not None and item.kind == kind and (not states or item.state in states)

    def add(self, kind: str, name: str, state: str = "held", /, **facts: Any) -> None:
        """A new item."""
        self.items[name] = Item(kind, name, state, **facts)

    def drop(self, name: str) -> None:
        """An item is gone."""
        self.items.pop(name, None)

    def fresh(self, letter: str) -> str:
        """The first name that nothing bears."""
        n = 0
        while f"{letter}{n}" in self.items:
            n += 1
        return f"{letter}{n}"

    def books(self) -> Hashable:
        """What the author holds: all that decides on what he may do next."""
        items = tuple(sorted(item.key() for item in self.items.values()))
        return self.generation, self.cmdline, items

    def state(self) -> Hashable:
        """Books and machine: pages and their owners, what is preserved, what the log warned of."""
        starts, ends, states = self.kernel.pages.pages.columns()
        out, luo = self.kernel.kho_out, self.kernel.liveupdate
        blobs = b""
        if out.fdt_phys:
            blobs = self.kernel.ram.read(out.fdt_phys, self.kernel.arch.page_size)
        sessions: tuple[tuple[str, bool, int], ...] = ()
        if luo.enabled:
            sessions = tuple(
                (name, session.retrieved, session.file_set.count)
                for side in (luo.sessions.incoming, luo.sessions.outgoing)
                for name, session in side.sessions.items()
            )
        told = tuple(m for m in self.kernel.messages if is_warning(m))
        return self.books(), tuple(starts), tuple(ends), tuple(states), blobs, sessions, told

    # -- carrying out ---------------------------------------------------------------------------

    def run(self, step: Step) -> str:
        """Carry ``step`` out: "" or the name of the errno it was refused with."""
        kind = self.kinds[step.kind]
        self.steps.append(step)
        before = len(self.kernel.messages) if self.has_kernel else 0
        kernel_before = self.vars.get("kernel")
        errno_name = self._execute(kind, step)
        if self.is_over:
            return errno_name
        if errno_name == DIED:
            self._bury(step)
            return errno_name
        if errno_name and errno_name != BROKEN:
            if kind.refused is not None:
                kind.refused(self, step.args)
            self._judge_errno(kind, step, errno_name)
        else:
            kind.done(self, step.args)
        if self.has_kernel and kernel_before is self.vars["kernel"]:
            self._look_at_log(before)
        return errno_name

    def _bury(self, step: Step) -> None:
        # Whatever the dead task was busy with is nobody's: no promise is left for it.
        self.cursed = self.has_died = True
        self.is_stuck = self.is_stuck or self.kinds[step.kind].locks
        source = self.kinds[step.kind].source(self, *step.args)
        words = {*step.args, *re.findall(r"\w+", source)}
        for name in [name for name in self.items if name in words]:
            self.items[name].state = "lost"
            for other in self.of("file"):
                if name in (other["session"], other["was"]):
                    other.state = "lost"

    def _execute(self, kind: Kind, step: Step) -> str:
        source = kind.source(self, *step.args)
        self.has_failed |= bool(step.fault)
        fault: kit.Nth | None = None
        machine: kit.Stage | None = self.vars.get("machine")
        died: kit.Death | None = None
        if step.fault and step.dies:
            died = kit.Death(self.kernel, step.fault)
        elif step.fault and step.boot and machine is not None:
            machine.boot_fault = step.fault
        elif step.fault:
            fault = self.kernel.pages.fail = kit.Nth(step.fault)
        kernel = self.vars.get("kernel")
        try:
            if step.kind == "boot":
                source, rest = source.split("\n", 1)
                exec(compiled(source), self.vars)
                self.machine.listen(self._note)
                source = rest
            exec(compiled(source), self.vars)
            self._look_at_damage("")
        except KernelError as refused:
            return refused.name
        except KernelPanic as panic:
            self._look_at_damage(panic.message)
            lines = (*step.args, *(item["line"] for item in self.of("image")))
            has_less = bool(step.fault) or any(" mem=" in str(line) for line in lines)
            expected = is_expected_panic(panic.message, lacks_memory=has_less)
            if not expected and not self.is_harmed:
                self._problem("kernel-panic", panic.message)
            self.is_over = True
        except kit.TaskDied:
            return DIED
        except AssertionError as failed:
            if self.is_harmed:
                return "EIO"
            if step.fault:  # a call that answers NULL where others raise
                return "ENOMEM"
            self._problem("promise-kept", str(failed) or _failed_line(failed, source))
            if kind.goes_on:
                return BROKEN
            self.is_over = True
        except KhoSimError as misused:
            if not self.is_harmed and not self.cursed:
                sleeps = "sleeps" in str(misused)
                self._problem("program-sleeps" if sleeps else "misuse", str(misused))
            self.is_over = True
        except NoEnd as stopped:
            self._problem("no-end", str(stopped))
            self.is_over = True
        except Exception as broken:  # the simulator's own fault: worth a report as well
            self._problem("simulator-crash", f"{type(broken).__name__}: {broken}")
            self.is_over = True
        finally:
            if died is not None:
                died.undo()
            if fault is not None and kernel is not None:
                kernel.pages.fail = None
                self.has_fired = bool(fault.where)
            if machine is not None:
                machine.boot_fault = 0
        return ""

    def _note(self, event: Event) -> None:
        self.heard += 1
        if self.heard > EVENTS_MAX:
            raise NoEnd(f"more than {EVENTS_MAX} events")
        self.watch(event)
        if self.listens and not event.symbol.startswith(("memblock", "__memblock")):
            self.events.append(event)

    def _look_at_damage(self, panic: str) -> None:
        """What struck between two kernels: is anything promised still, and was it noticed?"""
        machine: kit.Stage | None = self.vars.get("machine")
        struck = [] if machine is None else machine.struck
        is_astray = self.is_harmed  # somebody else's DMA may have been quicker
        for fault in struck:
            if not fault.has_struck or fault.spares:
                continue
            self.is_harmed = True
            kernel = self.machine.kernel
            said = [panic, *(kernel.messages if kernel else ())]
            is_unread = kernel is not None and not kernel.options.kho  # by whom KHO is off
            if len(struck) > 1 or not fault.words or is_unread or is_astray:
                continue
            if not any(word in text for word in fault.words for text in said):
                self._problem("damage-unnoticed", f"nobody said {fault.words[0]!r}")
        if machine is not None:
            machine.struck = []

    def _judge_errno(self, kind: Kind, step: Step, errno_name: str) -> None:
        if self.is_harmed:
            return
        if self.has_died and errno_name in _LEFT:
            return  # what a dead task had begun is in the way
        if kind.opens and errno_name == "EIO" and (self.has_failed or self._lacks_handler()):
            return
        # Of a file that is preserved, what is in scratch has to move.
        files = [item for item in self.of("file") if item.name in step.args and kind.locks]
        need = sum(item.facts.get("size", 0) + _HUGE for item in files)
        lacks_memory = bool(step.fault) or self.free_bytes < _LITTLE + need
        allowed = kind.errnos | ({"ENOMEM"} if lacks_memory else frozenset())
        if errno_name not in allowed:
            text = f"{step.kind} was refused with -{errno_name}"
            self._problem("errno-as-documented", text)

    def _lacks_handler(self) -> bool:
        # Sessions cannot be read before whoever knows the files in them is there. Of what came to a
        # kernel that was told to do with less there are no books.
        if self.cursed:
            return True
        tokens = any(item["type"] == "token" for item in self.of("file", "incoming"))
        return tokens and not self.of("ledger")

    def _look_at_log(self, before: int) -> None:
        if self.is_harmed:
            return
        for message in self.kernel.messages[before:]:
            if is_warning(message):
                self._problem("kernel-warned", message)

    def _problem(self, invariant: str, message: str, owner: str = "") -> None:
        problem = Problem(invariant, message, len(self.steps) - 1, owner)
        self.problems.append(problem)

    def judge(self, *, drained: bool = False) -> list[Problem]:
        """Ask every invariant now; all problems of this program so far."""
        silent = ("misuse", "no-end")
        if "machine" in self.vars and not any(p.invariant in silent for p in self.problems):
            try:
                self._ask(drained)
            except NoEnd as stopped:
                self._problem("no-end", f"the audit: {stopped}")
            except Exception as broken:  # as in a step
                self._problem("simulator-crash", f"the audit: {type(broken).__name__}: {broken}")
        return self.problems

    def _ask(self, drained: bool) -> None:
        known = {(p.invariant, p.message) for p in self.problems}
        found: list[Violation] = []
        try:
            found = kit.audit(self.machine, drained=drained)
        except KernelPanic:
            if not self.is_harmed:
                raise
        if self.is_harmed:
            return
        for violation in found:
            if self.has_died and is_expected_after_death(violation.invariant):
                continue
            if (violation.invariant, violation.message) not in known:
                owner = violation.owner or violation.writer
                self._problem(violation.invariant, violation.message, owner)
