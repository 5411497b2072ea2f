"""Faults that a test can order: memory that is not there, a file that refuses, a crash.

An allocation fails as in ``mm/fail_page_alloc.c`` @ 7.3, which counts requests; a refusing freeze
is a handler's ``freeze`` callback that returns -EBUSY (``kernel/liveupdate/luo_file.c:
luo_file_freeze_one``); a crash is a cold boot, after which nothing that was preserved has a
future. Left out: faults of the hardware, and bytes that change on their own.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from khosim.errors import InputError, KernelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from khosim.kernel.kernel import Kernel
    from khosim.kernel.liveupdate.file_ops import LiveupdateFileOpArgs, Op

__all__ = ("KINDS", "Fault", "FaultPlan", "failing_allocation", "refusing_freeze")

KINDS = ("allocation", "freeze", "crash")


class Fault(NamedTuple):
    """One fault. ``kind`` is one of :data:`KINDS`, ``at`` the number of the step it strikes.

    "allocation": the ``n``-th allocation of that step fails, counted from 1. "freeze": the
    ``n``-th file refuses at the first kexec from that step on. "crash": before that step.
    """

    kind: str
    at: int
    n: int = 1


class FaultPlan(NamedTuple):
    """All faults of one life."""

    faults: tuple[Fault, ...] = ()

    def strike(self, step: int, *, is_kexec: bool) -> Fault | None:
        """The fault that step number ``step`` has to bear, if any.

        A freeze waits for the first kexec from its step on.
        """
        for fault in self.faults:
            if fault.at == step and fault.kind != "freeze":
                return fault
        waiting = [fault for fault in self.faults if fault.kind == "freeze" and fault.at <= step]
        return waiting[-1] if waiting and is_kexec else None

    def without(self, fault: Fault) -> FaultPlan:
        """The plan when ``fault`` has struck, and all those of its kind from before it."""
        return FaultPlan(
            tuple(f for f in self.faults if f.kind != fault.kind or f.at > fault.at)
        )


def _positive(name: str, n: object) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError(name, f"{n!r} is not a number from 1 on")


@contextmanager
def failing_allocation(kernel: Kernel, n: int) -> Iterator[None]:
    """Within, the ``n``-th request of ``kernel`` for memory fails, counted from 1, and no other.

    Whatever asks counts: slab as well as pages. Raises :class:`InputError` for ``n`` below 1.
    """
    _positive("failing_allocation: n", n)
    left = n

    def refuse(_order: int, _owner: str) -> bool:
        nonlocal left
        left -= 1
        return left == 0

    before, kernel.pages.fail = kernel.pages.fail, refuse
    try:
        yield
    finally:
        kernel.pages.fail = before


@contextmanager
def refusing_freeze(kernel: Kernel, nth: int = 1) -> Iterator[None]:
    """Within, the ``nth`` file that is frozen says -EBUSY, whoever's file it is.

    ``kexec`` then raises :class:`~khosim.errors.KernelError` and the kernel lives on. Where fewer
    files are preserved nothing is refused.
    """
    _positive("refusing_freeze: nth", nth)
    left = nth
    handlers = list(kernel.liveupdate.handlers.values())
    before = [handler.ops.freeze for handler in handlers]

    def guarded(freeze: Op | None) -> Callable[[LiveupdateFileOpArgs], None]:
        def call(args: LiveupdateFileOpArgs) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KernelError(errno.EBUSY, "freeze", f"file number {nth} refuses")
            if freeze is not None:
                freeze(args)

        return call

    for handler in handlers:
        handler.ops.freeze = guarded(handler.ops.freeze)
    try:
        yield
    finally:
        for handler, freeze in zip(handlers, before, strict=True):
            handler.ops.freeze = freeze
