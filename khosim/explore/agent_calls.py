"""Calls that an agent makes as nobody should, or as nobody thought of: for programs of the search.

Each raises what the kernel answers. A call that failed has changed nothing: where it did all the
same, that is an AssertionError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.abi import liveupdate as uapi
from khosim.errors import KernelError
from khosim.kernel.memory_failure import memory_failure

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.liveupdate.luo_session import Session
    from khosim.kernel.memfd import Memfd

__all__ = (
    "ask_device",
    "ask_session",
    "call_off",
    "create_32bit",
    "finish_badly",
    "is_poisoned",
    "memory_failure",
    "preserve_sparse",
)


def ask_device(kernel: Kernel, number: int) -> None:
    """``ioctl`` of ``/dev/liveupdate`` by a number: whether the kernel has such a call. -ENOTTY."""
    process = kernel.process("agent")
    try:
        fd = process.open("/dev/liveupdate")
        process.ioctl(fd, uapi.liveupdate_io(number), bytearray(uapi.CREATE_SESSION.size))
    finally:
        process.exit()


def ask_session(session: Session, number: int) -> None:
    """``ioctl`` of a session by a number that it may know or not. -ENOTTY."""
    process = session.kernel.process("agent")
    session.get_file()
    try:
        fd = process.install(session)
        process.ioctl(fd, uapi.liveupdate_io(number), bytearray(uapi.GET_NAME.size))
    finally:
        process.exit()


def create_32bit(kernel: Kernel, name: str) -> None:
    """An agent that is a program of 32 bits creates a session, and exits."""
    process = kernel.process("agent", is_compat=True)
    try:
        fd = process.open("/dev/liveupdate")
        asked = uapi.create_session(name.encode())
        process.ioctl(fd, uapi.LIVEUPDATE_IOCTL_CREATE_SESSION, asked)
    finally:
        process.exit()


def finish_badly(session: Session) -> None:
    """Finish a session with a structure in memory that cannot be written to: -EFAULT.

    "If this operation fails, the resources remain preserved in memory."
    """
    process = session.kernel.process("agent")
    session.get_file()
    before = session.tokens
    try:
        fd = process.install(session)
        process.ioctl(fd, uapi.LIVEUPDATE_SESSION_FINISH, bytes(uapi.finish()))
    except KernelError:
        if session.tokens != before:
            raise AssertionError("the session is finished, though the call failed") from None
        raise
    finally:
        process.exit()


def call_off(kernel: Kernel, file: Memfd) -> None:
    """Preserve a memfd in a session of its own, and close that: the memfd has the pages it had."""
    before = file.inode.alloced
    session = kernel.liveupdate.create_session("off")
    try:
        session.preserve(file, 1)
    finally:
        session.close()
        if file.inode.alloced > before:
            more = file.inode.alloced - before
            raise AssertionError(f"the file has {more} pages more, though it is not preserved")


def is_poisoned(file: Memfd, offset: int) -> bool:
    """Whether reading there says that the memory is broken: -EIO."""
    try:
        file.read(offset, 1)
    except KernelError as refused:
        return refused.name == "EIO"
    return False


def preserve_sparse(kernel: Kernel, size_bytes: int) -> None:
    """As :func:`call_off`, of a memfd of that size with nothing in it."""
    file = kernel.memfd("sparse", size=size_bytes)
    try:
        call_off(kernel, file)
    finally:
        file.close()
