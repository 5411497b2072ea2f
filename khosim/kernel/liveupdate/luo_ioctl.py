"""The ioctls of ``/dev/liveupdate`` and of sessions.

Models ``luo_ioctl`` (``kernel/liveupdate/luo_core.c``) and ``luo_session_ioctl``
(``luo_session.c``) with the functions they dispatch to @ 7.3, checks in the kernel's order:
-EINVAL for an unknown number, -EFAULT, -ENOTTY for a known number of another type, -EINVAL for the
wrong kind of session or too short a structure, -E2BIG for one with more in it than the kernel
knows, then what the call itself refuses.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from khosim.abi import liveupdate as uapi
from khosim.errors import KernelError
from khosim.kernel.uaccess import copy_struct_from_user, copy_to_user, get_user_u32

if TYPE_CHECKING:
    from khosim.kernel.file import File
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.liveupdate.luo_core import Luo
    from khosim.kernel.liveupdate.luo_session import Session
    from khosim.kernel.process import Process
    from khosim.kernel.uaccess import UserBuffer

__all__ = ("luo_ioctl", "luo_session_ioctl")

_FD_OFFSET = 4
_NAME_OFFSET = 8
_WORD = 8


class LuoUcmd(NamedTuple):
    """``struct luo_ucmd``: a call's structure in user memory, and the kernel's copy of it."""

    process: Process
    user: UserBuffer
    user_size: int
    cmd: bytearray

    def respond(self) -> None:
        """``luo_ucmd_respond``: write the copy back, as far as user space has room."""
        copy_to_user(self.user, self.cmd[: min(self.user_size, len(self.cmd))])

    def set_fd(self, fd: int) -> None:
        """Enter a descriptor into the copy."""
        self.cmd[_FD_OFFSET : _FD_OFFSET + 4] = fd.to_bytes(4, "little", signed=True)


class DeviceOp(NamedTuple):
    """``struct luo_ioctl_op`` of the device."""

    ioctl_num: int
    layout: Struct
    execute: Callable[[Luo, LuoUcmd], None]


class SessionOp(NamedTuple):
    """``struct luo_ioctl_op`` of sessions: ``incoming`` says which kind, None for both."""

    ioctl_num: int
    layout: Struct
    incoming: bool | None
    execute: Callable[[Session, LuoUcmd], None]


def _fetch(process: Process, user: UserBuffer, user_size: int, layout: Struct) -> LuoUcmd:
    # All of a structure's fields are there from the first version on: size is min_size, too.
    if user_size < layout.size:
        why = f"a structure of {user_size} bytes, not {layout.size}"
        raise KernelError(errno.EINVAL, "luo_ioctl", why)
    cmd = copy_struct_from_user(layout.size, user, user_size)
    return LuoUcmd(process, user, user_size, cmd)


def _unknown(kernel: Kernel) -> int:
    # The interface's own documentation says that an unknown number is -ENOTTY.
    return errno.ENOTTY if kernel.release.fix_ioctl_number else errno.EINVAL


def luo_ioctl(luo: Luo, process: Process, cmd: int, arg: UserBuffer) -> int:
    """``luo_ioctl``: a call on the device; 0, or raises."""
    number = uapi.ioc_nr(cmd) - uapi.LIVEUPDATE_CMD_BASE
    if number >= len(_DEVICE_OPS):
        raise KernelError(_unknown(luo.kernel), "luo_ioctl", f"number {number:#x}")
    user_size = get_user_u32(arg)
    op = _DEVICE_OPS[number]
    if op.ioctl_num != cmd:
        raise KernelError(errno.ENOTTY, "luo_ioctl", f"command {cmd:#x}")
    op.execute(luo, _fetch(process, arg, user_size, op.layout))
    return 0


def luo_session_ioctl(session: Session, process: Process, cmd: int, arg: UserBuffer) -> int:
    """``luo_session_ioctl``: a call on a session; 0, or raises."""
    symbol = "luo_session_ioctl"
    number = uapi.ioc_nr(cmd) - uapi.LIVEUPDATE_CMD_SESSION_BASE
    known = len(_SESSION_OPS) if session.kernel.release.luo_get_name else len(_SESSION_OPS) - 1
    if not 0 <= number < known:
        raise KernelError(_unknown(session.kernel), symbol, f"number {uapi.ioc_nr(cmd):#x}")
    user_size = get_user_u32(arg)
    op = _SESSION_OPS[number]
    if op.ioctl_num != cmd:
        raise KernelError(errno.ENOTTY, symbol, f"command {cmd:#x}")
    session.check_direction(op.incoming)
    layout = op.layout
    if layout is uapi.GET_NAME and not session.kernel.release.luo_get_name_sized:
        layout = uapi.RETRIEVE_FD
    ucmd = _fetch(process, arg, user_size, layout)
    session.down_read()
    op.execute(session, ucmd)
    return 0


# -- on the device --------------------------------------------------------------------------------


def _name(cmd: bytearray) -> str:
    raw = bytes(cmd[_NAME_OFFSET : _NAME_OFFSET + uapi.LIVEUPDATE_SESSION_NAME_LENGTH])
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _fput(file: File) -> None:
    file.fput()


def _answer_with_fd(
    ucmd: LuoUcmd, make: Callable[[], File], undo: Callable[[File], None] = _fput
) -> None:
    # The descriptor is set aside first, and given to the file when the answer has been written.
    fd = ucmd.process.get_unused_fd()
    try:
        ucmd.set_fd(fd)
        file = make()
        try:
            ucmd.respond()
        except KernelError:
            undo(file)
            raise
    except KernelError:
        ucmd.process.put_unused_fd(fd)
        raise
    ucmd.process.fd_install(fd, file)


def _create_session(luo: Luo, ucmd: LuoUcmd) -> None:
    # luo_ioctl_create_session
    _answer_with_fd(ucmd, lambda: luo.sessions.create(_name(ucmd.cmd)))


def _retrieve_session(luo: Luo, ucmd: LuoUcmd) -> None:
    # luo_ioctl_retrieve_session; a session whose descriptor cannot be told is finished at once.
    def undo(file: File) -> None:
        if luo.kernel.release.fix_session_fault:
            luo.sessions.unretrieve(_name(ucmd.cmd))
        else:
            file.fput()

    _answer_with_fd(ucmd, lambda: luo.sessions.retrieve(_name(ucmd.cmd)), undo)


_DEVICE_OPS = (
    DeviceOp(uapi.LIVEUPDATE_IOCTL_CREATE_SESSION, uapi.CREATE_SESSION, _create_session),
    DeviceOp(uapi.LIVEUPDATE_IOCTL_RETRIEVE_SESSION, uapi.RETRIEVE_SESSION, _retrieve_session),
)


# -- on a session ---------------------------------------------------------------------------------


def _preserve_fd(session: Session, ucmd: LuoUcmd) -> None:
    # luo_session_preserve_fd
    _, fd, token = uapi.PRESERVE_FD.unpack(ucmd.cmd)
    session.session.file_set.preserve(token, ucmd.process.fget(fd))
    try:
        ucmd.respond()
    except KernelError:
        if session.kernel.release.fix_preserve_fault:
            session.session.file_set.unpreserve_last()
            raise
        session.kernel.printk(
            "luo: The file was successfully preserved, but response to user failed"
        )
        raise


def _retrieve_fd(session: Session, ucmd: LuoUcmd) -> None:
    # luo_session_retrieve_fd
    _, _, token = uapi.RETRIEVE_FD.unpack(ucmd.cmd)
    _answer_with_fd(ucmd, lambda: session.session.file_set.retrieve(token))


def _check_reserved(reserved: int, symbol: str) -> None:
    if reserved:
        raise KernelError(errno.EINVAL, symbol, f"reserved {reserved}")


def _finish(session: Session, ucmd: LuoUcmd) -> None:
    # luo_session_finish
    _, reserved = uapi.FINISH.unpack(ucmd.cmd)
    if session.kernel.release.luo_checks_reserved:
        _check_reserved(reserved, "luo_session_finish")
    session.session.file_set.finish()
    if not session.kernel.release.fix_finish_fault:
        ucmd.respond()


def _get_name(session: Session, ucmd: LuoUcmd) -> None:
    # luo_session_get_name; strscpy copies words, so the name's last one is filled up with zeros.
    # The kernel's copy has room for the largest structure; what user space did not give is what
    # was on the stack, zeros here.
    ucmd.cmd.extend(bytes(uapi.GET_NAME.size - len(ucmd.cmd)))
    _, reserved, _ = uapi.GET_NAME.unpack(ucmd.cmd)
    _check_reserved(reserved, "luo_session_get_name")
    name = session.name.encode("utf-8", "surrogateescape") + b"\0"
    name += bytes(-len(name) % _WORD)
    ucmd.cmd[_NAME_OFFSET : _NAME_OFFSET + len(name)] = name
    ucmd.respond()


_SESSION_OPS = (
    SessionOp(uapi.LIVEUPDATE_SESSION_PRESERVE_FD, uapi.PRESERVE_FD, False, _preserve_fd),
    SessionOp(uapi.LIVEUPDATE_SESSION_RETRIEVE_FD, uapi.RETRIEVE_FD, True, _retrieve_fd),
    SessionOp(uapi.LIVEUPDATE_SESSION_FINISH, uapi.FINISH, True, _finish),
    SessionOp(uapi.LIVEUPDATE_SESSION_GET_NAME, uapi.GET_NAME, None, _get_name),
)
