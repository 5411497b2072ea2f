"""What a printed program leans on: faults, a file kind of its own, and the audit at its end.

A :class:`Stage` is a machine whose next boot can be made to run out of memory at one place.
:func:`failing` does the same to calls on a running kernel. :class:`Token` is a file that LUO can
preserve, :class:`Ledger` the shared state that tokens need; both keep to the rules of
``include/linux/liveupdate.h`` @ 7.3.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from khosim.errors import KernelError
from khosim.explore.oracles import Baseline, oracles
from khosim.kernel.file import File
from khosim.kernel.liveupdate.file_ops import FileHandler, LiveupdateFileOpArgs
from khosim.kernel.liveupdate.flb_ops import Flb, LiveupdateFlbOpArgs
from khosim.simulator import Machine

if TYPE_CHECKING:
    from khosim.checks.violation import Violation
    from khosim.kernel.kernel import Kernel

__all__ = ("Ledger", "Stage", "Token", "TokenHandler", "audit", "failing", "failing_boot", "ledger")


class Nth:
    """Refuses the ``n``-th request for memory, counted from 1, and no other."""

    __slots__ = ("left", "where")

    def __init__(self, n: int) -> None:
        self.left = n
        self.where = ""
        """Who was refused, once somebody was."""

    def __call__(self, order: int, owner: str) -> bool:
        """As ``kernel.pages.fail``."""
        self.left -= 1
        if self.left:
            return False
        self.where = owner
        return True


class Stage(Machine):
    """A machine that remembers how each kernel began, and whose boots can lack memory.

    ``boot_fault`` is the number of the allocation that the next kernel is refused after it has
    taken preserved memory over, 0 for none.
    """

    __slots__ = ("baseline", "boot_fault")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.boot_fault = 0
        self.baseline: Baseline | None = None

    def checkpoint(self, kernel: Kernel, stage: str) -> None:
        """See :meth:`khosim.Machine.checkpoint`."""
        if stage == "takeover" and self.boot_fault:
            kernel.pages.fail = Nth(self.boot_fault)
        elif stage == "booted":
            kernel.pages.fail = None
            self.baseline = Baseline.of(self.hardware, kernel)
        super().checkpoint(kernel, stage)


@contextmanager
def failing(kernel: Kernel, n: int) -> Iterator[Nth]:
    """Within, the ``n``-th allocation of ``kernel`` fails."""
    fault = kernel.pages.fail = Nth(n)
    try:
        yield fault
    finally:
        kernel.pages.fail = None


@contextmanager
def failing_boot(machine: Stage, n: int) -> Iterator[None]:
    """Within, the ``n``-th allocation of a kernel that boots fails, once memory is taken over."""
    machine.boot_fault = n
    try:
        yield
    finally:
        machine.boot_fault = 0


def audit(machine: Stage, *, drained: bool = False) -> list[Violation]:
    """Every invariant of the checkers, and what a user may expect beyond them.

    ``drained`` says that the program has given back all that it ever held: then whatever is not
    free is a leak.
    """
    found = list(machine.check())
    if machine.kernel is not None:
        found += oracles(machine.hardware, machine.kernel, machine.baseline, drained=drained)
    return found


# -- a kind of file ------------------------------------------------------------------------------


class Token(File):
    """A file of 8 bytes. ``refuses`` names the callback that says -EBUSY, if any."""

    __slots__ = ("refuses", "value")

    def __init__(self, kernel: Kernel, value: int = 0, refuses: str = "") -> None:
        super().__init__(kernel, "token")
        self.value = value
        self.refuses = refuses


class TokenHandler(FileHandler):
    """Preserves tokens: a page each."""

    compatible = "token-v1"

    def can_preserve(self, file: File) -> bool:
        """Tokens only."""
        return isinstance(file, Token)

    def preserve(self, args: LiveupdateFileOpArgs) -> None:
        """Take a page and write the value."""
        file = args.file
        assert isinstance(file, Token)
        if file.refuses == "preserve":
            raise KernelError(errno.EBUSY, "token_preserve")
        page = args.kernel.kho_alloc_preserve(8)
        page.write(0, file.value.to_bytes(8, "little"))
        args.serialized_data = page.phys
        args.private_data = page

    def freeze(self, args: LiveupdateFileOpArgs) -> None:
        """Refuse, if so told."""
        if isinstance(args.file, Token) and args.file.refuses == "freeze":
            raise KernelError(errno.EBUSY, "token_freeze")

    def unpreserve(self, args: LiveupdateFileOpArgs) -> None:
        """Give the page back."""
        args.kernel.kho_unpreserve_free(args.private_data)

    def retrieve(self, args: LiveupdateFileOpArgs) -> None:
        """Make the token again."""
        value = args.kernel.ram.read_u64(args.serialized_data)
        args.kernel.kho_restore_free(args.serialized_data)
        args.file = Token(args.kernel, value)

    def finish(self, args: LiveupdateFileOpArgs) -> None:
        """Free the page of a token that nobody wanted."""
        if not args.retrieve_status:
            args.kernel.kho_restore_free(args.serialized_data)


class Ledger(Flb):
    """What all tokens share: a page. ``is_open`` while this kernel holds it."""

    compatible = "ledger-v1"

    def __init__(self) -> None:
        super().__init__()
        self.is_open = False

    def preserve(self, args: LiveupdateFlbOpArgs) -> None:
        """Take the page."""
        args.obj = args.kernel.kho_alloc_preserve(8)
        args.data = args.obj.phys

    def unpreserve(self, args: LiveupdateFlbOpArgs) -> None:
        """Give it back."""
        args.kernel.kho_unpreserve_free(args.obj)

    def retrieve(self, args: LiveupdateFlbOpArgs) -> None:
        """Find it."""
        args.obj = args.data
        self.is_open = True

    def finish(self, args: LiveupdateFlbOpArgs) -> None:
        """Free the predecessor's."""
        args.kernel.kho_restore_free(args.obj)
        self.is_open = False


def ledger(kernel: Kernel) -> Ledger:
    """Register tokens and their ledger with a kernel's orchestrator; returns the ledger."""
    handler, flb = TokenHandler(), Ledger()
    kernel.liveupdate.register_file_handler(handler)
    kernel.liveupdate.register_flb(handler, flb)
    return flb
