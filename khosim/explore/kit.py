"""What a printed program leans on: machines, faults, a file kind of its own, the audit at its end.

A :class:`Stage` is a machine whose next boot can be made to run out of memory at one place, or to
find bytes and memory that are not what was handed over (:mod:`khosim.faults`). All names of
:data:`PROGRAM` are known to programs.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from khosim.abi import liveupdate as uapi
from khosim.errors import KernelError
from khosim.explore.agent_calls import (
    ask_device,
    ask_session,
    call_off,
    create_32bit,
    finish_badly,
    is_poisoned,
    memory_failure,
    preserve_sparse,
)
from khosim.explore.expectations import is_expected_writer
from khosim.explore.hazards import fixed
from khosim.explore.oracles import Baseline, oracles
from khosim.explore.tokens import (
    Ledger,
    Token,
    TokenHandler,
    late_ledger,
    ledger,
    reload,
    second_ledger,
    tokens,
)
from khosim.faults.between import (
    Between,
    flipped,
    lost_memory,
    overwritten,
    regained_memory,
    stale,
    torn,
)
from khosim.faults.calls import Death, Nth, TaskDied, kill, oops
from khosim.faults.calls import failing_allocation as failing
from khosim.faults.device import Dma
from khosim.faults.places import places
from khosim.kernel.contig_range import alloc_contig_range
from khosim.kernel.page_map import ALLOCATED
from khosim.simulator import Machine

if TYPE_CHECKING:
    from khosim.checks.violation import Violation
    from khosim.kernel.file import File
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.liveupdate.luo_session import Session
    from khosim.kernel.page import Folio

__all__ = (
    "PROGRAM",
    "Death",
    "Dma",
    "Ledger",
    "Nth",
    "Stage",
    "TaskDied",
    "Token",
    "TokenHandler",
    "ask_device",
    "ask_session",
    "audit",
    "call_off",
    "create_32bit",
    "failing",
    "failing_boot",
    "finish_badly",
    "fixed",
    "flipped",
    "is_poisoned",
    "kill",
    "late_ledger",
    "ledger",
    "lost_memory",
    "memory_failure",
    "oops",
    "overwritten",
    "places",
    "preserve_badly",
    "preserve_many",
    "preserve_sparse",
    "read_debugfs",
    "regained_memory",
    "reload",
    "restore_many",
    "retrieve_badly",
    "second_ledger",
    "stale",
    "take_range",
    "tokens",
    "torn",
    "vmalloc_used",
)

_NOT_PRINTED = {"PROGRAM", "Death", "Ledger", "Nth", "TaskDied", "TokenHandler"}
PROGRAM = tuple(name for name in __all__ if name not in _NOT_PRINTED)
"""The names that programs use; what is printed imports those of them that it needs."""


class Stage(Machine):
    """A machine that remembers how each kernel began, and whose boots can go wrong.

    ``boot_fault`` is the number of the allocation that the next kernel is refused after it has
    taken preserved memory over, 0 for none; ``struck`` are the faults of the last jump.
    """

    __slots__ = ("_before", "_between", "baseline", "boot_fault", "struck")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.boot_fault = 0
        self.baseline: Baseline | None = None
        self.struck: list[Between] = []
        self._between: list[Between] = []
        self._before: Kernel | None = None

    def boot(self, *args: Any, **options: Any) -> Kernel:
        """See :meth:`khosim.Machine.boot`; nothing strikes any more."""
        self._between.clear()
        return super().boot(*args, **options)

    def next_boot(self, fault: Between) -> None:
        """``fault`` strikes at the next jump."""
        self._between.append(fault)

    def jump(self, kernel: Kernel) -> None:
        """See :meth:`khosim.Machine.jump`."""
        self.struck = []
        super().jump(kernel)
        self._before = kernel

    def resume(self) -> Kernel:
        """See :meth:`khosim.Machine.resume`."""
        before, self._before = self._before, None
        if before is not None:
            self.struck, self._between = self._between, []
            for fault in self.struck:
                fault.strike(before)
        return super().resume()

    def checkpoint(self, kernel: Kernel, stage: str) -> None:
        """See :meth:`khosim.Machine.checkpoint`."""
        if stage == "takeover" and self.boot_fault:
            kernel.pages.fail = Nth(self.boot_fault)
        elif stage == "booted":
            kernel.pages.fail = None
            self.baseline = Baseline.of(self.hardware, kernel)
        super().checkpoint(kernel, stage)


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
    found = [v for v in machine.check() if not is_expected_writer(v.invariant, v.writer)]
    if machine.kernel is not None:
        found += oracles(machine.hardware, machine.kernel, machine.baseline, drained=drained)
    return found


# -- calls that programs make ----------------------------------------------------------------------


def take_range(kernel: Kernel, start_pfn: int, nr_pages: int) -> int:
    """Pages that somebody chose, also across zones: ``alloc_contig_range`` for each; the first.

    Raises -EBUSY where one of them is taken, -EINVAL where there is a hole.
    """
    done: list[tuple[int, int]] = []
    pieces = kernel.pages.pieces_in(start_pfn, start_pfn + nr_pages)
    if sum(high - low for low, high, _ in pieces) != nr_pages:
        raise KernelError(errno.EINVAL, "alloc_contig_range", "a hole")
    for low, high, _ in pieces:
        try:
            alloc_contig_range(kernel, low, high - low)
        except KernelError:
            for first, end in done:
                kernel.pages.free_range(first, end)
            raise
        done.append((low, high))
    return start_pfn


def preserve_many(kernel: Kernel, count: int) -> list[Folio]:
    """``count`` pages, no two of them neighbours, preserved one by one. Raises -ENOMEM."""
    taken: list[Folio] = []
    try:
        while len(taken) < 2 * count:
            taken.append(kernel.alloc_folio(0))
    except KernelError:
        for folio in taken:
            folio.put()
        raise
    taken.sort(key=lambda folio: folio.phys)
    for folio in taken[1::2]:
        folio.put()
    for folio in taken[::2]:
        folio.write(0, b"n")
        kernel.kho_preserve_folio(folio)
    return taken[::2]


def restore_many(kernel: Kernel, folios: list[Folio]) -> None:
    """What :func:`preserve_many` of the predecessor preserved is there, and is given back."""
    for was in folios:
        folio = kernel.kho_restore_folio(was.phys)
        if folio is None or folio.read(0, 1) != b"n":
            raise AssertionError("one of many pages is not what it was")
        folio.put()


def read_debugfs(kernel: Kernel, path: str) -> bytes:
    """Read a file below ``/sys/kernel/debug/kho`` and see that it shows what it promises.

    ``out/fdt`` is the tree as it is now; other files show memory that is nobody else's. Raises
    -ENOENT.
    """
    blob = kernel.debugfs.blob(path)
    if blob is None:
        if path not in kernel.debugfs.files():
            raise KernelError(errno.ENOENT, "debugfs", path)
        return kernel.debugfs.read(path)
    data = kernel.debugfs.read(path)
    phys, size_bytes = blob
    if path == "out/fdt":
        whole = kernel.fdt_totalsize(kernel.kho_out.fdt_phys)
        if len(data) != whole:
            raise AssertionError(f"out/fdt shows {len(data)} bytes of {whole}")
    shift = kernel.arch.page_shift
    for pfn in range(phys >> shift, (phys + size_bytes - 1 >> shift) + 1):
        state = kernel.pages.pages.state(pfn)
        if state is None:
            raise AssertionError(f"{path} shows a page that is free")
        is_own = state.kind != ALLOCATED or path.startswith("out/") or state.owner == "kho_restore"
        if not is_own:
            raise AssertionError(f"{path} shows a page of {state.owner}")
    return data


def vmalloc_used(kernel: Kernel) -> int:
    """``VmallocUsed`` of ``/proc/meminfo`` in pages, before less than nothing is shown as 0."""
    return kernel.pages.nr_vmalloc


def retrieve_badly(kernel: Kernel, name: str) -> None:
    """An agent asks for a session with a structure that the answer cannot be written to: -EFAULT.

    Raises that, and what else the device answers.
    """
    process = kernel.process("agent")
    try:
        fd = process.open("/dev/liveupdate")
        size = uapi.RETRIEVE_SESSION.size
        asked = size.to_bytes(4, "little") + bytes(4) + name.encode()
        process.ioctl(fd, uapi.LIVEUPDATE_IOCTL_RETRIEVE_SESSION, asked.ljust(size, b"\0"))
    finally:
        process.exit()


def preserve_badly(session: Session, file: File, token: int) -> None:
    """An agent preserves a file with a structure that the answer cannot be written to: -EFAULT.

    Raises that, and what else the call raises; a call that failed has changed nothing.
    """
    process = session.kernel.process("agent")
    for shared in (session, file):
        shared.get_file()
    before, is_refused = session.tokens, False
    try:
        fds = [process.install(shared) for shared in (session, file)]
        asked = uapi.PRESERVE_FD.pack(uapi.PRESERVE_FD.size, fds[1], token)
        process.ioctl(fds[0], uapi.LIVEUPDATE_SESSION_PRESERVE_FD, asked)
    except KernelError:
        is_refused = True
        raise
    finally:
        process.exit()
        if is_refused and session.tokens != before:
            raise AssertionError("the file is preserved, though the call failed")
