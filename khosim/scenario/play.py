"""Carrying out a scenario: boots, steps, jumps, and what came of them.

A :class:`Player` goes from generation to generation and yields the facts of each; its
:class:`Result` is complete when the last one is through. It stops at the first thing that should
not have happened. Everything follows from the scenario: equal scenarios give equal results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from khosim.errors import HardwareFault, InputError, KernelError, KernelPanic, KhoSimError
from khosim.kernel.image import KernelConfig, KernelImage
from khosim.kernel.kernel import Kernel
from khosim.kernel.trace import Event
from khosim.scenario.agent import Agent
from khosim.scenario.contents import U64
from khosim.scenario.facts import (
    GenerationFacts,
    StepRecord,
    preserved_facts,
    scratch_facts,
    segment_facts,
    session_facts,
    struct_page_bytes,
)
from khosim.scenario.files import Carried
from khosim.scenario.group import PRESERVED, Group
from khosim.scenario.hosts import VmNote
from khosim.scenario.kho_user import publish, subtree_room
from khosim.scenario.model import (
    ACCEPTED,
    COLD,
    LEFT_OUT,
    PANIC,
    REFUSED,
    KernelSpec,
    KexecSpec,
    Scenario,
    Step,
    StepFact,
)
from khosim.scenario.result import Result
from khosim.scenario.steps_base import ALL, Unexpected
from khosim.scenario.steps_content import Corrupt
from khosim.scenario.steps_guest import register_devices
from khosim.simulator import Machine

__all__ = ("Player", "play")

_SMALL_RAM = 256 << 20
_SMALL_KERNEL, _SMALL_INITRD, _INITRD = 4 << 20, 1 << 20, 8 << 20


class Player:
    """Carries out one scenario.

    ``groups``, ``region_keys``, ``files``, ``vms`` and ``agent`` are the outside observer's notes.
    ``listener`` is told every event, ``after_step`` every step that is over.
    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        listener: Callable[[Event], None] | None = None,
        after_step: Callable[[Step], object] | None = None,
    ) -> None:
        scenario.check_releases()
        self.scenario = scenario
        self.seed = scenario.seed
        self.result = Result(scenario)
        self.groups: dict[str, Group] = {}
        self.region_keys: dict[str, U64] = {}
        self.files: dict[str, Carried] = {}
        self.vms: dict[str, VmNote] = {}
        self.agent = Agent()
        self.at_jump: list[Corrupt] = []
        self._after_step = after_step
        self._serial = 0
        self._spec = scenario.kernel
        self._kernel: Kernel | None = None
        self.machine = Machine(
            memory_map=scenario.memory_map,
            page_size=scenario.page_size,
            allocator=scenario.allocator,
            seed=scenario.seed,
            devices=scenario.parts,
        )
        if listener is not None:
            self.machine.listen(listener)

    # -- what steps use -------------------------------------------------------------------------

    @property
    def kernel(self) -> Kernel:
        """The running kernel; while bytes are corrupted at the jump, the one that just left."""
        assert self._kernel is not None
        return self._kernel

    @property
    def without(self) -> tuple[str, ...]:
        """Pieces of live update that are left out in the running kernel, and by its user space."""
        return self._spec.without

    def serial(self) -> int:
        """A number that was not given out before in this run."""
        self._serial += 1
        return self._serial

    def groups_named(self, name: str) -> list[Group]:
        """The group of a name, or every group."""
        return list(self.groups.values()) if name == ALL else [self.groups[name]]

    def carried(self, name: str, place: str) -> list[Carried]:
        """The guest or device of a name that runs here, or all; raises where there is none."""
        running = [it for it in self.files.values() if it.process is not None]
        found = running if name == ALL else [it for it in running if it.name == name]
        if not found:
            what = "no guest" if name == ALL else f"no {name!r}"
            raise InputError(place, f"{what} runs in generation {self.kernel.generation}")
        return found

    def let_go(self, files: Iterable[Carried]) -> None:
        """Sessions let go of some files: those that nobody else has open are gone."""
        for carried in list(files):
            if carried.process is None:
                self.files.pop(carried.name, None)

    def try_jump(self) -> None:
        """Leave for a kernel like this one; raises what refuses it, and nothing has happened."""
        self._load_and_jump(self._spec, crash=False)
        self._kernel = None

    def error(self, place: str, cause: str) -> InputError:
        """The error for a step that cannot be carried out."""
        return InputError(place, cause)

    # -- the run --------------------------------------------------------------------------------

    def generations(self) -> Iterator[GenerationFacts]:
        """Run, and yield each generation's facts when it is over; :attr:`result` is complete then.

        Raises :class:`InputError` where the scenario asks for what makes no sense.
        """
        facts = self._cold_boot()
        for number in range(self.scenario.generations):
            self.result.kernels.append(facts)
            if self._kernel is None or self.result.failures:
                self._stop(facts)
                yield facts
                break
            spec = self.scenario.spec_of(number)
            done = self._run_steps(spec.steps, facts)
            if not done or number == self.scenario.generations - 1:
                self._stop(facts)
                yield facts
                break
            successor = self._kexec(spec.kexec, facts)
            yield facts
            if successor is None:
                break
            facts = successor
        self.result.judge(self.machine.check())

    def _cold_boot(self) -> GenerationFacts:
        spec = self.scenario.kernel
        try:
            self._kernel = self.machine.boot(
                spec.release,
                cmdline=spec.cmdline,
                image=self._image(spec),
                initrd=self._initrd(spec),
            )
        except KernelPanic as panic:
            return self._panicked(spec, panic, "the first kernel")
        except InputError as error:
            raise InputError(f"{self.scenario.place}: {error.place}", error.cause) from None
        return self._begin(spec, COLD)

    def _begin(self, spec: KernelSpec, outcome: str) -> GenerationFacts:
        kernel = self.kernel
        register_devices(kernel)
        luo = kernel.liveupdate
        return GenerationFacts(
            generation=kernel.generation,
            release=spec.release.name,
            outcome=outcome,
            cmdline=kernel.cmdline,
            previous_release=kernel.kho_in.previous_release,
            kexec_count=kernel.kho_in.kexec_count,
            scratch=scratch_facts(kernel),
            struct_page_bytes=struct_page_bytes(kernel),
            deferred_struct_pages=spec.release.deferred_struct_pages,
            page_size=kernel.arch.page_size,
            liveupdate=luo.liveupdate_num if luo.enabled else -1,
        )

    def _panicked(self, spec: KernelSpec, panic: KernelPanic, who: str) -> GenerationFacts:
        self._kernel = None
        facts = GenerationFacts(self.machine.generation, spec.release.name, PANIC, spec.cmdline)
        facts.messages.append(f"Kernel panic - not syncing: {panic.message}")
        facts.end = PANIC
        if who:
            self.result.failures.append(f"{who} panicked: {panic.message}")
        return facts

    def _run_steps(self, steps: tuple[Step, ...], facts: GenerationFacts) -> bool:
        for step in steps:
            record = self._left_out(step) or self._run_step(step, facts)
            facts.steps.append(record)
            if self._after_step is not None:
                self._after_step(step)
            if record.outcome not in ("ok", LEFT_OUT, step.expect):
                return False
        return True

    def _left_out(self, step: Step) -> StepRecord | None:
        release = self.kernel.release
        lacking = step.lacks(release) if step.optional else ""
        if not lacking:
            return None
        return StepRecord(
            do=step.do,
            name=step.name,
            blocks=0,
            unit="block",
            len_bytes=0,
            outcome=LEFT_OUT,
            expect="",
            note=f"Linux {release.name} has no {lacking}",
        )

    def _run_step(self, step: Step, facts: GenerationFacts) -> StepRecord:
        fact = StepFact()
        outcome = "ok"
        try:
            fact = step.run(self)
            if step.expect:
                outcome, text = "not refused", f"went through, but {step.expect} was expected"
        except InputError as error:
            raise InputError(self._place(error.place, facts), error.cause) from None
        except KernelError as refused:
            outcome, text = refused.name, str(refused)
        except Unexpected as found:
            outcome, text = found.word, str(found)
        except (KernelPanic, HardwareFault) as panic:
            outcome, text = PANIC, f"the kernel panicked: {panic}"
            facts.end = PANIC
        except KhoSimError as error:
            raise InputError(self._place(step.place, facts), str(error)) from None
        if outcome not in ("ok", step.expect):
            self.result.failures.append(f"{self._place(step.place, facts)} ({step.do}): {text}")
        note = text if outcome != "ok" else fact.note
        return StepRecord(
            do=step.do,
            name=step.name,
            blocks=fact.blocks,
            unit=fact.unit,
            len_bytes=fact.len_bytes,
            outcome=outcome,
            expect=step.expect,
            note=note,
            by_order=fact.by_order,
        )

    def _place(self, place: str, facts: GenerationFacts) -> str:
        tables = len(self.scenario.specs)
        repeated = f" in generation {facts.generation}" if facts.generation >= tables else ""
        return place + repeated

    def _stop(self, facts: GenerationFacts) -> None:
        # This generation is the last.
        facts.end = facts.end or "running"
        if self._kernel is not None:
            self._measure(facts)

    def _measure(self, facts: GenerationFacts) -> None:
        kernel = self.kernel
        facts.messages = list(kernel.messages)
        facts.managed_pages = kernel.total_ram_pages()
        facts.free_pages = kernel.pages.nr_free_pages()
        facts.preserved = preserved_facts(kernel)
        names = {id(it.file): it.name for it in self.files.values() if it.file is not None}
        facts.sessions = session_facts(kernel, names)
        prefix = "out/sub_fdts/"
        facts.subtrees = [
            path.removeprefix(prefix)
            for path in kernel.debugfs.files()
            if path.startswith(prefix)
        ]

    # -- handing over ---------------------------------------------------------------------------

    def _kexec(self, kexec: KexecSpec, facts: GenerationFacts) -> GenerationFacts | None:
        """Leave for the successor; None where the run ends here."""
        kernel = self.kernel
        spec = self._successor_spec(kexec)
        try:
            if kernel.kho_enable and not kexec.crash:
                self._write_indexes()
                if kernel.release.finalize == "notifiers":
                    kernel.finalize()  # that is when subtrees are added, and regions preserved
            self._measure(facts)
            for carried in self.files.values():
                carried.remember()
            self._load_and_jump(spec, kexec.crash)
        except KernelError as refused:
            self._measure(facts)
            facts.end = f"load refused: {refused}"
            if refused.name != kexec.expect:
                self.result.failures.append(f"{self._place(kexec.place, facts)}: {refused}")
            return None
        except (KernelPanic, HardwareFault) as panic:
            facts.end = PANIC
            self.result.failures.append(
                f"{self._place(kexec.place, facts)}: the kernel panicked: {panic}"
            )
            return None
        facts.end = "crash" if kexec.crash else "kexec"
        facts.messages = list(kernel.messages)
        facts.segments = segment_facts(kernel, facts.scratch)
        was_offered = kernel.kho_enable and not kexec.crash
        for corrupt in self.at_jump:
            corrupt.strike(self, at_jump=True)
        self.at_jump.clear()
        self._spec = spec
        return self._arrive(spec, kexec, facts, was_offered)

    def _arrive(
        self, spec: KernelSpec, kexec: KexecSpec, facts: GenerationFacts, was_offered: bool
    ) -> GenerationFacts:
        place = self._place(kexec.place, facts)
        try:
            self._kernel = self.machine.resume()
        except KernelPanic as panic:
            who = "" if kexec.expect == PANIC else f"{place}: the successor"
            return self._panicked(spec, panic, who)
        outcome = COLD if not was_offered else REFUSED
        if self._kernel.is_kho_boot:
            outcome = ACCEPTED
            self.result.handovers += 1
        for group in self.groups.values():
            if outcome == ACCEPTED:
                group.hand_over()
            else:
                group.lose()
        self.agent.jump(accepted=outcome == ACCEPTED)
        for vm in self.vms.values():
            vm.vmm = None
        came = [it for note in self.agent.incoming.values() for it in note.files.values()]
        self.files = {it.name: it for it in came}
        for carried in came:
            carried.process = None
        successor = self._begin(spec, outcome)
        if outcome != kexec.expect:
            self.result.failures.append(
                f"{place}: the handover was to be {kexec.expect}, but {_OUTCOME_TEXTS[outcome]}"
            )
        return successor

    def _successor_spec(self, kexec: KexecSpec) -> KernelSpec:
        last = self._spec
        return KernelSpec(
            release=kexec.release or last.release,
            cmdline=last.cmdline if kexec.cmdline is None else kexec.cmdline,
            kernel_size=last.kernel_size if kexec.kernel_size is None else kexec.kernel_size,
            initrd=last.initrd if kexec.initrd is None else kexec.initrd,
            debug=last.debug if kexec.debug is None else kexec.debug,
            without=last.without if kexec.without is None else kexec.without,
        )

    def _load_and_jump(self, spec: KernelSpec, crash: bool) -> None:
        image, initrd = self._image(spec), self._initrd(spec)
        if crash:
            kimage = self.kernel.kexec_file_load(
                image, initrd_bytes=initrd, cmdline=spec.cmdline, on_crash=True
            )
            self.kernel.kernel_kexec(kimage)
        else:
            self.machine.load_successor(
                self.kernel, spec.release, cmdline=spec.cmdline, image=image, initrd=initrd
            )

    def _write_indexes(self) -> None:
        # Each owner tells its successor where its blocks are.
        kernel = self.kernel
        largest = subtree_room(kernel)
        for group in self.groups.values():
            if group.kind == "blob" or not len(group.select((PRESERVED,))):
                continue
            packed = group.packed_index(kernel.arch.page_shift)
            for part, at in enumerate(range(0, len(packed), largest)):
                piece = packed[at : at + largest]
                subtree = group.name + (f"+{part}" if part else "")
                phys, told = publish(kernel, subtree, piece, group.owner)
                group.index.append((subtree, phys, told))

    def _image(self, spec: KernelSpec) -> KernelImage:
        size = spec.kernel_size
        if size is None and self._is_small():
            size = _SMALL_KERNEL
        return KernelImage.build(
            spec.release,
            arch=self.scenario.memory_map.arch,
            page_size=self.scenario.page_size,
            config=KernelConfig(
                release=spec.release, debug=spec.debug, without=spec.without
            ),
            size=size,
        )

    def _initrd(self, spec: KernelSpec) -> int:
        if spec.initrd is not None:
            return spec.initrd
        return _SMALL_INITRD if self._is_small() else _INITRD

    def _is_small(self) -> bool:
        return self.scenario.memory_map.ram_bytes < _SMALL_RAM


_OUTCOME_TEXTS = {
    ACCEPTED: "it was accepted",
    REFUSED: "it was refused",
    COLD: "none was offered (KHO is off)",
}


def play(scenario: Scenario, *, listener: Callable[[Event], None] | None = None) -> Result:
    """Carry a scenario out and return what came of it."""
    player = Player(scenario, listener=listener)
    for _ in player.generations():
        pass
    return player.result
