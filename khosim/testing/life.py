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
from khosim.errors import InputError, KernelError, KernelPanic
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
    KINDS,
    Dma,
    Fault,
    failing_allocation,
    flipped,
    jump_with,
    kill,
    lost_memory,
    oops,
    overwritten,
    refusing,
    refusing_freeze,
    stale,
    torn,
)
from khosim.testing.plans import MachinePlan
from khosim.testing.program import PLACES, life_script
from khosim.testing.rules import Operation, Rules, release_source
from khosim.testing.step import Step, Thing, Written, call
from khosim.testing.strikes import BEFORE, damage, die, lose_memory
from khosim.testing.witness import Witness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from khosim.kernel.kernel import Kernel
    from khosim.kernel.release import Release

__all__ = ("Life",)

_TOOLS: dict[str, Any] = {
    "Dma": Dma,
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
    "kill": kill,
    "kho_preserve_vmalloc": kho_preserve_vmalloc,
    "kho_restore_vmalloc": kho_restore_vmalloc,
    "kho_unpreserve_vmalloc": kho_unpreserve_vmalloc,
    "KernelPanic": KernelPanic,
    "lost_memory": lost_memory,
    "oops": oops,
    "overwritten": overwritten,
    "refusing": refusing,
    "refusing_freeze": refusing_freeze,
    "stale": stale,
    "suppress": suppress,
    "torn": torn,
    "vfree": vfree,
    "vmalloc": vmalloc,
}
assert set(_TOOLS) == set(PLACES)
_WITH = {
    "allocation": "failing_allocation",
    "callback": "refusing",
    "freeze": "refusing_freeze",
}
_STRUCK = "fault: "
"""What the step of a fault that strikes between two others is called."""
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
        self.has_less = False
        """Some of its memory was lost at a jump."""
        self.is_loaded = False
        """The kernel that runs has loaded its successor's image."""
        self._names: dict[str, int] = {}
        self._has_state = bool(
            any(op.function for op in rules.ops)
            or rules.invariants
            or rules.hooks.on_boot
            or rules.hooks.before_kexec
            or rules.hooks.after_restore
        )
        self.carry(f"machine = {self.plan.source}")
        self.witness = Witness(self.machine) if witnessed else None
        self.cold_boot()

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

        An errno that is allowed leaves the books as they were, and counts as carried out. Raises
        :class:`~khosim.errors.InputError` for arguments that the operation has not.
        """
        if isinstance(op, str):
            op = self.rules.op(op)
        op.check(args)
        if fault is not None and fault.kind not in KINDS:
            cause = f"{fault.kind!r} is none of {', '.join(KINDS)}"
            raise InputError("khosim.testing: fault", cause)
        if fault is not None and fault.kind in BEFORE:
            self._strike(fault.kind, fault.n)
            fault = None
        if not op.is_possible(self):
            return False
        written = op.write(self, **args)
        if written is None:
            return False
        if fault is not None and not op.may_fail(fault):
            fault = None
        self.steps.append(Step(op.name, tuple(args.items()), fault))
        kind = "" if fault is None else fault.kind
        if fault is not None and kind == "bytes":
            damage(self, written, fault)
        elif fault is not None and kind == "oops":
            die(self, written, fault)
        elif fault is None or kind != "memory" or not lose_memory(self, written, fault):
            self._carry_out(op, written, None if kind == "memory" else fault)
        return True

    def _strike(self, kind: str, n: int) -> None:
        self.steps.append(Step(f"{_STRUCK}{kind}", (("n", n),)))
        BEFORE[kind](self, n)

    def replay(self, step: Step) -> bool:
        """Carry a step of another life out; see :meth:`do`."""
        if step.name.startswith(_STRUCK):
            self._strike(step.name.removeprefix(_STRUCK), **dict(step.args))
            return True
        return self.do(step.name, fault=step.fault, **dict(step.args))

    def check(self) -> None:
        """Ask every invariant, the books and the checks of the user; raises AssertionError."""
        if asserts.violations_of(self.machine):
            allowing = f", allowing={_DEAD!r}" if self.has_died else ""
            self.carry(f"assert_no_violations(machine{allowing})")
        self._check_books()
        self.carry("assert_preserved_is_held(kernel)", record=False)
        for function in self.rules.invariants:
            source = call(function).source
            self.use((function,))
            self.carry(source, record=False)

    def program(self) -> str:
        """The program so far as a script that runs by itself."""
        return life_script(self.lines, self.functions, self.extra_imports)

    # -- helpers ---------------------------------------------------------------------------------

    def _carry_out(self, op: Operation, written: Written, fault: Fault | None) -> None:
        self.begin(written)
        source = written.source
        if fault is not None:
            source = f"with {_WITH[fault.kind]}(kernel, {fault.n}):\n{indented(source)}"
        allowed = set(op.may_refuse)
        if fault is not None:
            allowed |= {"ENOMEM", "ENOSPC"} if fault.kind == "allocation" else {"EBUSY"}
        try:
            self.attempt(source)
        except Exception as error:
            if not (isinstance(error, KernelError) and error.name in allowed):
                self.tell(source, error)
                raise
            self.lines.append(f"with suppress(KernelError):\n{indented(source)}")
            return
        self.lines.append(source)
        written.done()
        for source in written.after:
            self.carry(source)

    def begin(self, written: Written) -> None:
        """What comes before the step itself."""
        self.use(written.functions)
        for source in written.before:
            self.carry(source)

    def carry(self, source: str, *, record: bool = True) -> None:
        """Run text of the program; an error that it raises carries the program as a note."""
        try:
            self.attempt(source)
        except Exception as error:
            self.tell(source, error)
            raise
        if record:
            self.lines.append(source)

    def attempt(self, source: str) -> None:
        """Run text that is not written down yet."""
        exec(compiled(source), self.vars)

    def tell(self, source: str, error: Exception) -> None:
        """``source``, the last of the program, has failed: the error says how to see it again."""
        self.lines.append(source)
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

    def use(self, functions: Iterable[Callable[..., Any]]) -> None:
        """The program names functions of the user's from here on."""
        for function in functions:
            if function not in self.functions:
                self.functions.append(function)
                self.vars[function.__name__] = function

    def new_machine(self) -> None:
        """Nothing is promised of the one there was any more."""
        self.carry(f"machine = {self.plan.source}")
        if self.witness is not None:
            self.witness = Witness(self.machine)
        self.has_died = self.has_less = False

    def cold_boot(self) -> None:
        """The first kernel of a machine, of which nothing survives: new books, a new model."""
        release, wanted = release_source(self.releases[0])
        if wanted:
            self.extra_imports.add(wanted)
            self.attempt(wanted)
        words = "" if release == "'7.3'" else f"{release}, "
        self.carry(f"kernel = machine.boot({words}cmdline={self.rules.cmdline!r})")
        self.things.clear()
        self.generation = 0
        self.is_loaded = False
        hooks = self.rules.hooks
        if self._has_state:
            self.use((hooks.new_state,))
            self.carry(f"state = {hooks.new_state.__name__}()")
        if hooks.on_boot is not None:
            self.use((hooks.on_boot,))
            self.carry(call(hooks.on_boot).source)

    def kexec(self) -> Written:
        """The step into the next kernel, with the hooks around it."""
        hooks = self.rules.hooks
        release, wanted = release_source(self.releases[1])
        if wanted:
            self.extra_imports.add(wanted)
            self.attempt(wanted)
        differs = self.generation == 0 and self.releases[0] != self.releases[1]
        words = f"release={release}" if differs else ""
        jump = "machine.jump(kernel)\nkernel = machine.resume()"
        after = [hook for hook in (hooks.on_boot, hooks.after_restore) if hook is not None]
        before = [hooks.before_kexec] if hooks.before_kexec is not None else []
        return Written(
            jump if self.is_loaded else f"kernel = kernel.kexec({words})",
            self._jumped,
            tuple(call(hook).source for hook in before),
            tuple(call(hook).source for hook in after),
            (*before, *after),
            is_kexec=True,
            options=(words,) if words else (),
        )

    def load(self) -> Written:
        """The step that loads the next kernel, for a kexec to come."""
        words = ", ".join(["kernel", *self.kexec().options])

        def done() -> None:
            self.is_loaded = True

        return Written(f"machine.load_image({words})", done)

    def _jumped(self) -> None:
        self.generation += 1
        self.is_loaded = False
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
                    self.carry(f"{name}(kernel, {pfn}, {thing.facts['nr']})", record=False)
