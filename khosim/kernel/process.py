"""A process: a table of file descriptors, and the system calls that live updates need.

Models ``fs/file.c`` (``get_unused_fd_flags``, ``fd_install``, ``fget``, ``close_files``),
``fs/ioctl.c`` (``vfs_ioctl``, ``compat_sys_ioctl``) and ``kernel/task_work.c:task_work_run`` @ 7.3
as far as an agent uses them. Failing calls raise :class:`~khosim.errors.KernelError`. Descriptors 0
to 2 are somebody else's. Left out: memory, threads, permissions, ``exec`` (so ``O_CLOEXEC`` means
nothing), the ioctls that every file has.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from khosim.errors import KernelError, KhoSimError
from khosim.kernel.file import File
from khosim.kernel.memfd import memfd_create

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.uaccess import UserBuffer

__all__ = ("Process",)

_FIRST_FD = 3


class Process:
    """One process on one kernel; ``rlimit_nofile`` bounds its descriptors (``RLIMIT_NOFILE``).

    ``is_compat`` is True for a program of 32 bits on a kernel of 64.
    """

    __slots__ = ("_fds", "_next_fd", "exited", "is_compat", "kernel", "name", "rlimit_nofile")

    def __init__(
        self,
        kernel: Kernel,
        name: str = "",
        *,
        rlimit_nofile: int = 1024,
        is_compat: bool = False,
    ) -> None:
        kernel.check_alive()
        self.kernel = kernel
        self.name = name
        self.rlimit_nofile = rlimit_nofile
        self.is_compat = is_compat
        self.exited = False
        self._fds: dict[int, File | None] = {}
        self._next_fd = _FIRST_FD  # no lower one is free

    def __repr__(self) -> str:
        return f"Process({self.name!r}, {len(self._fds)} descriptors)"

    @property
    def files(self) -> dict[int, File]:
        """The open files by descriptor."""
        return {fd: file for fd, file in sorted(self._fds.items()) if file is not None}

    # -- the table ------------------------------------------------------------------------------

    def get_unused_fd(self) -> int:
        """``get_unused_fd_flags``: the lowest free descriptor, set aside; raises -EMFILE."""
        self._check()
        fd = self._next_fd
        while fd in self._fds:
            fd += 1
        if fd >= self.rlimit_nofile:
            raise KernelError(errno.EMFILE, "get_unused_fd_flags", f"{fd} descriptors")
        self._fds[fd] = None
        self._next_fd = fd + 1
        return fd

    def put_unused_fd(self, fd: int) -> None:
        """``put_unused_fd``: give a descriptor back that was set aside."""
        del self._fds[fd]
        self._next_fd = min(self._next_fd, fd)

    def fd_install(self, fd: int, file: File) -> None:
        """``fd_install``: the reference to ``file`` is the descriptor's now."""
        self._fds[fd] = file

    def fget(self, fd: int) -> File | None:
        """``fget``, without the reference: the file, or None."""
        self._check()
        return self._fds.get(fd)

    def install(self, file: File) -> int:
        """A descriptor for a file that was made in Python; takes over its reference."""
        if file.kernel is not self.kernel:
            raise KhoSimError(f"{file!r} is open in another kernel")
        fd = self.get_unused_fd()
        self.fd_install(fd, file)
        return fd

    def file(self, fd: int) -> File:
        """The open file behind a descriptor; raises -EBADF."""
        file = self.fget(fd)
        if file is None:
            raise KernelError(errno.EBADF, "fget", f"descriptor {fd}")
        return file

    # -- system calls ---------------------------------------------------------------------------

    def open(self, path: str) -> int:
        """``open``; of the files in the world there are ``/dev/liveupdate`` and ``/dev/null``.

        Raises -ENOENT, -EMFILE, and for the device -EBUSY and -EIO.
        """
        fd = self.get_unused_fd()
        try:
            if path == "/dev/liveupdate":
                file: File = self.kernel.liveupdate.open()
            elif path == "/dev/null":
                file = File(self.kernel, "null")
            else:
                raise KernelError(errno.ENOENT, "open", path)
        except KernelError:
            self.put_unused_fd(fd)
            raise
        self.fd_install(fd, file)
        return fd

    def memfd_create(self, name: str, flags: int = 0) -> int:
        """``memfd_create``; raises its errors and -EMFILE."""
        fd = self.get_unused_fd()
        try:
            file = memfd_create(self.kernel, name, flags)
        except KernelError:
            self.put_unused_fd(fd)
            raise
        self.fd_install(fd, file)
        return fd

    def dup(self, fd: int) -> int:
        """``dup``: another descriptor of the same open file; raises -EBADF, -EMFILE."""
        file = self.file(fd)
        new = self.get_unused_fd()
        file.get_file()
        self.fd_install(new, file)
        return new

    def close(self, fd: int) -> None:
        """``close``: the last one releases the file; raises -EBADF."""
        file = self.file(fd)
        self.put_unused_fd(fd)
        file.fput()

    def ioctl(self, fd: int, cmd: int, arg: UserBuffer = None) -> int:
        """``ioctl``: 0, and ``arg`` may have changed; raises -EBADF, and -ENOTTY."""
        file = self.file(fd)
        return file.compat_ioctl(self, cmd, arg) if self.is_compat else file.ioctl(self, cmd, arg)

    def readlink(self, fd: int) -> str:
        """``readlink("/proc/self/fd/FD")``: raises -EBADF, and -ENAMETOOLONG."""
        return self.file(fd).d_path()

    def fork(self, name: str = "") -> Process:
        """``fork``: a child with the same open files."""
        self._check()
        child = Process(
            self.kernel,
            name or self.name,
            rlimit_nofile=self.rlimit_nofile,
            is_compat=self.is_compat,
        )
        for fd, file in self.files.items():
            file.get_file()
            child.fd_install(fd, file)
        return child

    def reboot(self) -> None:
        """``reboot(LINUX_REBOOT_CMD_KEXEC)``: into the loaded image; see ``kernel_kexec``."""
        self._check()
        self.kernel.kernel_kexec()

    def exit(self) -> None:
        """``do_exit``, also of a killed process: all descriptors are closed.

        Files that nobody else has open are released afterwards, the one that was closed last first.
        """
        self._check()
        self.exited = True
        last = []
        for file in self.files.values():
            file.check_open()
            file.f_count -= 1
            if not file.f_count:
                last.append(file)
        self._fds.clear()
        for file in reversed(last):
            file.release()

    def kill(self) -> None:
        """``SIGKILL``: as :meth:`exit`."""
        self.exit()

    def _check(self) -> None:
        self.kernel.check_alive()
        if self.exited:
            raise KhoSimError(f"{self!r} has exited")
