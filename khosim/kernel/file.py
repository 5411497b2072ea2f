"""Open files: ``struct file`` as far as preservation needs it.

Models ``include/linux/fs.h:struct file``, ``get_file`` and ``fput`` (``fs/file_table.c``) @ 7.3: a
position, a reference count, and a release when the last reference goes. The kernel puts that
release off to the end of the system call; here it happens at once. Left out: paths, permissions,
locks. File descriptors belong to processes, not to files.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

from khosim.errors import KernelError, KhoSimError

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.process import Process
    from khosim.kernel.uaccess import UserBuffer

__all__ = ("File",)


class File:
    """One open file of one kernel; a device of your own derives from it.

    Whoever makes a file holds its first reference. ``f_pos`` is the position in bytes.
    """

    __slots__ = ("__weakref__", "f_count", "f_pos", "kernel", "name")
    compat_behaviour: ClassVar[str] = ""
    """The behaviour with which there is ``compat_ioctl``; "" for never."""

    def __init__(self, kernel: Kernel, name: str = "") -> None:
        kernel.check_alive()
        self.kernel = kernel
        self.name = name
        self.f_pos = 0
        self.f_count = 1

    def __repr__(self) -> str:
        state = "" if self.f_count else ", released"
        return f"{type(self).__name__}({self.name!r}{state})"

    def get_file(self) -> None:
        """``get_file``: one more reference."""
        self.check_open()
        self.f_count += 1

    def fput(self) -> None:
        """``fput``: drop a reference; the last one releases the file."""
        self.check_open()
        self.f_count -= 1
        if not self.f_count:
            self.release()

    def close(self) -> None:
        """``close(2)`` on the only descriptor of this file: :meth:`fput`."""
        self.fput()

    def release(self) -> None:
        """``f_op->release``: what is left to do when nobody uses the file any more."""

    def d_path(self) -> str:
        """``d_path``: what ``/proc/PID/fd`` shows."""
        return f"/{self.name}"

    def ioctl(self, process: Process, cmd: int, arg: UserBuffer) -> int:
        """``f_op->unlocked_ioctl``: 0, or raises; -ENOTTY for a file without any."""
        raise KernelError(errno.ENOTTY, "vfs_ioctl", f"{self!r} has no ioctl {cmd:#x}")

    def compat_ioctl(self, process: Process, cmd: int, arg: UserBuffer) -> int:
        """``f_op->compat_ioctl``, for programs of 32 bits: -ENOTTY for a file without it."""
        if self.compat_behaviour and getattr(self.kernel.release, self.compat_behaviour):
            return self.ioctl(process, cmd, arg)  # compat_ptr_ioctl
        raise KernelError(errno.ENOTTY, "compat_sys_ioctl", f"{self!r} has no compat_ioctl")

    def check_open(self) -> None:
        """Raise where a user holds on to a released file, or to one of a kernel that is gone."""
        self.kernel.check_alive()
        if not self.f_count:
            raise KhoSimError(f"{self!r} is used after its last reference was dropped")
