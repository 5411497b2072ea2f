"""Faults within a call, and between two: memory that is not there, a file that refuses, a death.

An allocation fails as in ``mm/fail_page_alloc.c`` @ 7.3, which counts requests; a refusing freeze
is a handler's ``freeze`` callback that returns -EBUSY (``kernel/liveupdate/luo_file.c:
luo_file_freeze_one``); an oops ends the task in the middle of what it did (``kernel/exit.c:
make_task_dead``) and leaves everything as it is then. Left out: the locks that it held.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from khosim.errors import InputError, KernelError, KhoSimError
from khosim.kernel.file import File

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from khosim.kernel.kernel import Kernel
    from khosim.kernel.liveupdate.file_ops import LiveupdateFileOpArgs, Op
    from khosim.kernel.trace import Event

__all__ = (
    "CALLBACKS",
    "Death",
    "Nth",
    "TaskDied",
    "failing_allocation",
    "kill",
    "oops",
    "refusing",
    "refusing_freeze",
)

CALLBACKS = ("preserve", "freeze", "can_finish")
"""Callbacks of a file handler that may say no, and be asked again."""


def _positive(name: str, n: object) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError(name, f"{n!r} is not a number from 1 on")


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


@contextmanager
def failing_allocation(kernel: Kernel, n: int) -> Iterator[Nth]:
    """Within, the ``n``-th request of ``kernel`` for memory fails, counted from 1, and no other.

    Whatever asks counts: slab as well as pages. Raises :class:`InputError` for ``n`` below 1.
    """
    _positive("failing_allocation: n", n)
    fault = Nth(n)
    before, kernel.pages.fail = kernel.pages.fail, fault
    try:
        yield fault
    finally:
        kernel.pages.fail = before


class TaskDied(KhoSimError):
    """The task that made a call is gone; :func:`oops` ends with it."""


class Death:
    """The ``n``-th event of ``kernel`` raises :class:`TaskDied`, until :meth:`undo`."""

    __slots__ = ("_before", "_kernel", "_left")

    def __init__(self, kernel: Kernel, n: int) -> None:
        self._kernel = kernel
        self._left = n
        self._before = kernel.trace
        kernel.trace = self._die

    def _die(self, event: Event) -> None:
        if self._before is not None:
            self._before(event)
        self._left -= event.symbol != "printk"
        if not self._left:
            self.undo()
            raise TaskDied(f"the task died in {event.symbol}")

    def undo(self) -> None:
        """Nobody dies any more."""
        self._kernel.trace = self._before


@contextmanager
def oops(kernel: Kernel, n: int) -> Iterator[None]:
    """Within, the task dies at the ``n``-th event of ``kernel``, counted from 1.

    What it had done by then stays done, what it had not stays undone, and the kernel lives on.
    Where fewer things happen, nothing does. Raises :class:`InputError` for ``n`` below 1.
    """
    _positive("oops: n", n)
    death = Death(kernel, n)
    try:
        yield
    except TaskDied:
        pass
    finally:
        death.undo()


def kill(kernel: Kernel, *files: File) -> None:
    """The agent that has ``files`` open, in the order of its descriptors, is killed (SIGKILL).

    It dies between two system calls, as a signal has it, and the kernel closes what it had open:
    see :meth:`khosim.kernel.process.Process.exit`.
    """
    process = kernel.process("agent")
    for file in files:
        if not isinstance(file, File):
            raise InputError("kill", f"{file!r} is no open file")
        process.install(file)
    process.kill()


@contextmanager
def refusing_freeze(kernel: Kernel, nth: int = 1) -> Iterator[None]:
    """Within, the ``nth`` file that is frozen says -EBUSY, whoever's file it is.

    ``kexec`` then raises :class:`~khosim.errors.KernelError` and the kernel lives on. Where fewer
    files are preserved nothing is refused.
    """
    _positive("refusing_freeze: nth", nth)
    with refusing(kernel, nth, callbacks=("freeze",)):
        yield


@contextmanager
def refusing(
    kernel: Kernel, nth: int = 1, *, callbacks: Sequence[str] = CALLBACKS
) -> Iterator[None]:
    """Within, the ``nth`` callback of a file handler that may say no does, whoever's it is.

    That is one of ``callbacks``: "preserve" and "freeze" say -EBUSY before they do anything,
    "can_finish" says that it cannot. What the user asked for is refused, and everything is as it
    was. Raises :class:`InputError` for others, and for ``nth`` below 1.
    """
    _positive("refusing: nth", nth)
    for name in callbacks:
        if name not in CALLBACKS:
            raise InputError("refusing: callbacks", f"{name!r} is none of {', '.join(CALLBACKS)}")
    left = nth

    def is_due() -> bool:
        nonlocal left
        left -= 1
        return not left

    def guarded(name: str, before: Op | None) -> Callable[[LiveupdateFileOpArgs], object]:
        def call(args: LiveupdateFileOpArgs) -> object:
            if is_due():
                if name == "can_finish":
                    return False
                raise KernelError(errno.EBUSY, name, f"callback number {nth} refuses")
            return name == "can_finish" if before is None else before(args)

        return call

    handlers = list(kernel.liveupdate.handlers.values())
    was = [(handler.ops, name, getattr(handler.ops, name)) for handler in handlers
           for name in callbacks]
    for ops, name, before in was:
        setattr(ops, name, guarded(name, before))
    try:
        yield
    finally:
        for ops, name, before in was:
            setattr(ops, name, before)
