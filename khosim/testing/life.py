"""The life of a machine under test, kernel after kernel, written down as a program.

Each step is carried out by running its source text, in a namespace with the variables ``machine``,
``kernel`` and ``state``: what is printed is what was run. Beside it a :class:`Life` keeps books of
what its author holds, which tell what may be done next and what has to come back.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from khosim.checks.held import outgoing_pages
from khosim.checks.ranges import merged, minus, page_ranges
from khosim.errors import KernelError, KernelPanic
from khosim.kernel.kho_vmalloc import (
    KhoVmallocSlot,
    kho_preserve_vmalloc,
    kho_restore_vmalloc,
    kho_unpreserve_vmalloc,
)
from khosim.kernel.vmalloc import vfree, vmalloc
from khosim.program_text import compiled, indented
from khosim.simulator import Machine
from khosim.testing import asserts
from khosim.testing.faults import (
    DAMAGES,
    Fault,
    failing_allocation,
    flipped,
    jump_with,
    oops,
    overwritten,
    refusing_freeze,
    stale,
    torn,
)
from khosim.testing.plans import MachinePlan
from khosim.testing.program import PLACES, life_script
from khosim.testing.rules import Operation, Rules, release_source
from khosim.testing.step import Step, Thing, Written, call
from khosim.testing.witness import Witness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from khosim.kernel.kernel import Kernel
    from khosim.kernel.release import Release

__all__ = ("Life",)

_TOOLS: dict[str, Any] = {
    "KernelError": KernelError,
    "KhoVmallocSlot": KhoVmallocSlot,
    "Machine": Machine,
    "assert_no_violations": asserts.assert_no_violations,
    "assert_not_preserved": asserts.assert_not_preserved,
    "assert_preserved": asserts.assert_preserved,
    "assert_preserved_is_held": asserts.assert_preserved_is_held,
    "failing_allocation": failing_allocation,
    "flipped": flipped,
    "jump_with": jump_with,
    "kho_preserve_vmalloc": kho_preserve_vmalloc,
    "kho_restore_vmalloc": kho_restore_vmalloc,
    "kho_unpreserve_vmalloc": kho_unpreserve_vmalloc,
    "KernelPanic": KernelPanic,
    "oops": oops,
    "overwritten": overwritten,
    "refusing_freeze": refusing_freeze,
    "stale": stale,
    "suppress": suppress,
    "torn": torn,
    "vfree": vfree,
    "vmalloc": vmalloc,
}
assert set(_TOOLS) == set(PLACES)
_DEAD = ("luo-no-leftovers", "luo-preserved", "luo-references")
"""Invariants that a task which died in the middle of a call may have broken."""


class Life:
    """A machine, its kernels, and the program so far. It boots at once.

    ``releases`` are those of the first kernel and of its successors. ``witnessed`` has a
    :class:`~khosim.testing.Witness` listen, who adds a page's story to a failure.
    Raises whatever a step raises; the error then carries the program as a note.
    """

    def __init__(
        self,
        rules: Rules,
        *,
        machine: MachinePlan | None = None,
        releases: tuple[str | Release, str | Release] = ("7.3", "7.3"),
        witnessed: bool = False,
    ) -> None:
        self.rules = rules
        self.plan = machine or MachinePlan()
        self.releases = releases
        self.vars: dict[str, Any] = dict(_TOOLS)
        self.lines: list[str] = []
        """The program so far, without its imports."""
        self.steps: list[Step] = []
        """What :meth:`do` carried out."""
        self.functions: list[Callable[..., Any]] = []
        self.extra_imports: set[str] = set()
        self.things: dict[str, Thing] = {}
        self.generation = 0
        """Kernels since the machine was switched on, less one."""
        self.has_died = False
        """A task died in the middle of a call, on this machine."""
        self._names: dict[str, int] = {}
        self._has_state = bool(
            any(op.function for op in rules.ops)
            or rules.invariants
            or rules.hooks.on_boot
            or rules.hooks.before_kexec
            or rules.hooks.after_restore
        )
        self._exec(f"machine = {self.plan.source}")
        self.witness = Witness(self.machine) if witnessed else None
        self._cold_boot()

    # -- what operations ask ---------------------------------------------------------------------

    @property
    def machine(self) -> Machine:
        """The machine."""
        machine: Machine = self.vars["machine"]
        return machine

    @property
    def kernel(self) -> Kernel:
        """The kernel that runs."""
        kernel: Kernel = self.vars["kernel"]
        return kernel

    @property
    def state(self) -> Any:
        """The user's model."""
        return self.vars.get("state")

    def of(self, kind: str, *states: str) -> list[Thing]:
        """The things of a kind, in one of ``states`` or in any."""
        return [
            thing
            for thing in self.things.values()
            if thing.kind == kind and (not states or thing.state in states)
        ]

    def pick(self, number: int, kind: str, *states: str) -> Thing | None:
        """One of the things of a kind, by any number; None where there is none."""
        found = self.of(kind, *states)
        return found[number % len(found)] if found else None

    def fresh(self, kind: str) -> str:
        """The name of a variable that was not used yet."""
        number = self._names.get(kind, -1) + 1
        self._names[kind] = number
        return f"{kind}{number}"

    def add(self, name: str, kind: str, **facts: Any) -> None:
        """A new thing that its author holds."""
        self.things[name] = Thing(name, kind, facts=facts)

    # -- carrying out ----------------------------------------------------------------------------

    def do(self, op: Operation | str, *, fault: Fault | None = None, **args: Any) -> bool:
        """Carry an operation out; False where it is not possible or has nothing to do now.

        An errno that is allowed leaves the books as they were, and counts as carried out.
        """
        if isinstance(op, str):
            op = self.rules.op(op)
        if fault is not None and fault.kind == "crash":
            self._cold_boot()
            fault = None
            self.steps.append(Step("crash"))
        if not op.is_possible(self):
            return False
        written = op.write(self, **args)
        if written is None:
            return False
        if fault is not None and fault.kind == "allocation" and not op.can_fail:
            fault = None
        self.steps.append(Step(op.name, tuple(args.items()), fault))
        if fault is not None and fault.kind == "bytes":
            self._damage(written, fault)
        elif fault is not None and fault.kind == "oops":
            self._die(written, fault)
        else:
            self._carry_out(op, written, fault)
        return True

    def replay(self, step: Step) -> bool:
        """Carry a step of another life out; see :meth:`do`."""
        if step.name == "crash":
            self._cold_boot()
            self.steps.append(step)
            return True
        return self.do(step.name, fault=step.fault, **dict(step.args))

    def check(self) -> None:
        """Ask every invariant, the books and the checks of the user; raises AssertionError."""
        if self.machine.check():
            allowing = f", allowing={_DEAD!r}" if self.has_died else ""
            self._exec(f"assert_no_violations(machine{allowing})")
        self._check_books()
        self._exec("assert_preserved_is_held(kernel)", record=False)
        for function in self.rules.invariants:
            source = call(function).source
            self._use((function,))
            self._exec(source, record=False)

    def program(self) -> str:
        """The program so far as a script that runs by itself."""
        return life_script(self.lines, self.functions, self.extra_imports)

    # -- helpers ---------------------------------------------------------------------------------

    def _carry_out(self, op: Operation, written: Written, fault: Fault | None) -> None:
        self._use(written.functions)
        for source in written.before:
            self._exec(source)
        source = written.source
        if fault is not None:
            name = "failing_allocation" if fault.kind == "allocation" else "refusing_freeze"
            source = f"with {name}(kernel, {fault.n}):\n{indented(source)}"
        allowed = set(op.may_refuse)
        if fault is not None:
            allowed |= {"ENOMEM", "ENOSPC"} if fault.kind == "allocation" else {"EBUSY"}
        try:
            exec(compiled(source), self.vars)
        except KernelError as refused:
            if refused.name not in allowed:
                self.lines.append(source)
                self._tell(refused)
                raise
            self.lines.append(f"with suppress(KernelError):\n{indented(source)}")
            return
        except Exception as error:
            self.lines.append(source)
            self._tell(error)
            raise
        self.lines.append(source)
        written.done()
        for source in written.after:
            self._exec(source)

    def _damage(self, written: Written, fault: Fault) -> None:
        # Whatever the successor makes of it, nothing is promised any more: a new machine is next.
        what = DAMAGES[(fault.n - 1) % len(DAMAGES)]
        words = "".join(f", {word}" for word in written.options)
        line = f"jump_with(kernel, {what}{words})"
        self._exec(f"with suppress(KernelError, KernelPanic):\n{indented(line)}")
        self._exec(f"machine = {self.plan.source}")
        if self.witness is not None:
            self.witness = Witness(self.machine)
        self.has_died = False
        self._cold_boot()

    def _die(self, written: Written, fault: Fault) -> None:
        # What the task was at is nobody's; all else has to be as it was.
        self._use(written.functions)
        for source in written.before:
            self._exec(source)
        body = f"with oops(kernel, {fault.n}):\n{indented(written.source)}"
        self._exec(f"with suppress(KernelError):\n{indented(body)}")
        self.has_died = True
        words = set(re.findall(r"[A-Za-z_]\w*", written.source))
        for name in words & set(self.things):
            del self.things[name]

    def _exec(self, source: str, *, record: bool = True) -> None:
        try:
            exec(compiled(source), self.vars)
        except Exception as error:
            self.lines.append(source)
            self._tell(error)
            raise
        if record:
            self.lines.append(source)

    def _tell(self, error: Exception) -> None:
        error.add_note(f"khosim program:\n\n{self.program()}")
        if self.witness is not None:
            phys = self._page_of(str(error))
            if phys > 0:
                error.add_note(f"khosim story:\n\n{self.witness.story(phys)}")

    def _page_of(self, text: str) -> int:
        # The page that a failed assertion is about, or 0.
        found = re.search(r"pfn \[(0x[0-9a-f]+)-", text)
        if found is not None:
            return int(found[1], 16) << self.machine.hardware.page_shift
        return next((violation.phys for violation in self.machine.check()), 0)

    def _use(self, functions: Iterable[Callable[..., Any]]) -> None:
        for function in functions:
            if function not in self.functions:
                self.functions.append(function)
                self.vars[function.__name__] = function

    def _cold_boot(self) -> None:
        release, wanted = release_source(self.releases[0])
        if wanted:
            self.extra_imports.add(wanted)
            exec(compiled(wanted), self.vars)
        words = "" if release == "'7.3'" else f"{release}, "
        self._exec(f"kernel = machine.boot({words}cmdline={self.rules.cmdline!r})")
        self.things.clear()
        self.generation = 0
        hooks = self.rules.hooks
        if self._has_state:
            self._use((hooks.new_state,))
            self._exec(f"state = {hooks.new_state.__name__}()")
        if hooks.on_boot is not None:
            self._use((hooks.on_boot,))
            self._exec(call(hooks.on_boot).source)

    def kexec(self) -> Written:
        """The step into the next kernel, with the hooks around it."""
        hooks = self.rules.hooks
        release, wanted = release_source(self.releases[1])
        if wanted:
            self.extra_imports.add(wanted)
            exec(compiled(wanted), self.vars)
        differs = self.generation == 0 and self.releases[0] != self.releases[1]
        words = f"release={release}" if differs else ""
        after = [hook for hook in (hooks.on_boot, hooks.after_restore) if hook is not None]
        before = [hooks.before_kexec] if hooks.before_kexec is not None else []
        return Written(
            f"kernel = kernel.kexec({words})",
            self._jumped,
            tuple(call(hook).source for hook in before),
            tuple(call(hook).source for hook in after),
            (*before, *after),
            is_kexec=True,
            options=(words,) if words else (),
        )

    def _jumped(self) -> None:
        self.generation += 1
        for thing in list(self.things.values()):
            if thing.state == "preserved":
                thing.state = "incoming"
            else:
                del self.things[thing.name]

    def _check_books(self) -> None:
        # Whose bits are in the map, by the checkers' reading. Older maps are made at the end only.
        kernel = self.kernel
        if kernel.release.finalize or not kernel.kho_enable:
            return
        books = [
            (thing, self.vars[thing.name])
            for thing in self.things.values()
            if thing.kind in ("folio", "pages") and thing.state in ("held", "preserved")
        ]
        if not books:
            return
        outgoing = outgoing_pages(kernel.hardware, kernel)
        if outgoing is None:
            return
        for is_in in (True, False):
            firsts = [
                (value if thing.kind == "pages" else value.pfn, thing.facts["nr"])
                for thing, value in books
                if (thing.state == "preserved") == is_in
            ]
            pages = merged(page_ranges([(pfn, pfn + count) for pfn, count in firsts], 0))
            missing = minus(pages, outgoing)
            if is_in and not len(missing[0]):
                continue
            if not is_in and (pages[1] - pages[0]).sum() == (missing[1] - missing[0]).sum():
                continue
            name = "assert_preserved" if is_in else "assert_not_preserved"
            for thing, _ in books:
                if (thing.state == "preserved") == is_in:
                    pfn = thing.name if thing.kind == "pages" else f"{thing.name}.pfn"
                    self._exec(f"{name}(kernel, {pfn}, {thing.facts['nr']})", record=False)
