"""Where a scenario of the museum is played: machines of one release, and what is seen there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from khosim.bugs.promises import PROMISES
from khosim.checks.decode import decode_handover
from khosim.checks.formats import format_of, preserve_bits_of
from khosim.checks.preserved import covered_ranges
from khosim.checks.violation import Violation
from khosim.errors import KernelError, KernelPanic
from khosim.kernel.image import KernelConfig, KernelImage
from khosim.kernel.kernel import Kernel
from khosim.kernel.release import Release
from khosim.simulator import Machine

__all__ = ("Stage", "Stopped")


class Stopped(Exception):
    """A scenario cannot go on; what it showed by then counts."""


class Stage:
    """What a scenario works with.

    ``release`` is the release it is about, with the fix off or on. :meth:`machine` makes machines,
    whose invariants are all asked at the end; :meth:`tell` narrates; :meth:`says` reports a broken
    promise of a call.
    """

    def __init__(self, release: Release) -> None:
        self.release = release
        self.account: list[str] = []
        """What happened, a line for each step."""
        self.violations: list[Violation] = []
        self._machines: list[Machine] = []

    # -- machines -------------------------------------------------------------------------------

    def machine(self, ram: str = "256M", **options: Any) -> Machine:
        """A machine (see :class:`~khosim.simulator.Machine`).

        Its invariants are checked, unless ``checks`` is False.
        """
        machine = Machine(ram, **options)
        if options.get("checks", True):
            self._machines.append(machine)
        return machine

    def boot(
        self,
        ram: str = "256M",
        *,
        cmdline: str = "kho=on",
        config: KernelConfig | None = None,
        kernel_size: str | None = None,
        initrd: str | None = None,
        **options: Any,
    ) -> Kernel:
        """A machine and its first kernel, of this stage's release.

        ``config``, ``kernel_size`` and ``initrd`` are those of ``Machine.boot``, other options
        those of a machine.
        """
        machine = self.machine(ram, **options)
        return machine.boot(
            self.release, cmdline=cmdline, config=config, kernel_size=kernel_size, initrd=initrd
        )

    @property
    def last_machine(self) -> Machine:
        """The machine that was made last."""
        return self._machines[-1]

    def crash(self, kernel: Kernel, *, cmdline: str) -> Kernel:
        """Load a crash kernel with ``cmdline``, let ``kernel`` crash: the capture kernel."""
        machine = self.last_machine
        image = KernelImage.build(self.release, size="4M")
        kimage = kernel.kexec_file_load(
            image, initrd_bytes=1 << 20, cmdline=cmdline, on_crash=True
        )
        kernel.kernel_kexec(kimage)
        return machine.resume()

    def preserved_pages(self, kernel: Kernel) -> int:
        """How many pages ``kernel`` would hand over now, as the checkers read its map."""
        release, page_size = kernel.release, kernel.arch.page_size
        handover = decode_handover(
            kernel.ram,
            kernel.kho_out.handover_phys,
            page_size,
            preserve_bits=preserve_bits_of(release, page_size),
            written=format_of(release),
        )
        starts, ends = covered_ranges(handover.preserved)
        return int((ends - starts).sum())

    # -- what happens ---------------------------------------------------------------------------

    def tell(self, text: str) -> None:
        """Add a line to the account."""
        self.account.append(text)

    def says(self, promise: str, message: str, *, generation: int = 0, phys: int = 0) -> None:
        """Report that a promise of :data:`~khosim.bugs.promises.PROMISES` was broken."""
        assert promise in PROMISES, promise
        self.violations.append(Violation(promise, message, generation, phys))

    def expect(self, holds: bool, promise: str, message: str, *, generation: int = 0) -> bool:
        """Report a broken promise unless ``holds``; returns ``holds``."""
        if not holds:
            self.says(promise, message, generation=generation)
        return holds

    def refuses(self, errno_name: str, what: str, call: Callable[[], object]) -> None:
        """Make a call that has to be refused with ``errno_name``; report when it is not."""
        try:
            call()
        except KernelError as refused:
            self.tell(f"{what}: -{refused.name}")
            if refused.name != errno_name:
                self.says(
                    "errno-as-documented", f"{what} gave -{refused.name} and not -{errno_name}"
                )
        else:
            self.tell(f"{what}: went through")
            self.says("errno-as-documented", f"{what} went through and did not give -{errno_name}")

    def carries_out(self, what: str, call: Callable[[], object]) -> bool:
        """Make a call that must not be refused; reports, and returns False, when it is."""
        try:
            call()
        except KernelError as refused:
            self.tell(f"{what}: -{refused.name}")
            self.says("call-succeeds", f"{what} gave -{refused.name}")
            return False
        self.tell(f"{what}: done")
        return True

    def stop(self) -> None:
        """End the scenario here."""
        raise Stopped

    # -- the end --------------------------------------------------------------------------------

    def play(self, scenario: Callable[[Stage], None]) -> None:
        """Play ``scenario`` to its end, and then ask every invariant of every machine."""
        try:
            scenario(self)
        except Stopped:
            pass
        except KernelError as refused:
            self.tell(str(refused))
            self.says("call-succeeds", str(refused))
        except KernelPanic as panic:
            self.tell(f"Kernel panic - not syncing: {panic.message}")
            kind = "call-returns" if "soft lockup" in panic.message else "kernel-survives"
            self.says(kind, panic.message, generation=panic.generation)
        for machine in self._machines:
            self.violations += machine.check()

    @property
    def spoke(self) -> tuple[str, ...]:
        """The names of the invariants and promises that were broken, sorted."""
        return tuple(sorted({violation.invariant for violation in self.violations}))
