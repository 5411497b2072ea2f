"""``/dev/liveupdate``: the one door to the orchestrator.

Models ``luo_open`` and ``luo_release`` of ``kernel/liveupdate/luo_core.c`` @ 7.3. Only one open
file of the device exists at a time; the first to open it has the predecessor's sessions read.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from khosim.errors import KernelError
from khosim.kernel.file import File
from khosim.kernel.liveupdate.luo_ioctl import luo_ioctl
from khosim.kernel.liveupdate.luo_ready import missing_handler

if TYPE_CHECKING:
    from khosim.kernel.liveupdate.luo_core import Luo
    from khosim.kernel.liveupdate.luo_session import Session
    from khosim.kernel.process import Process
    from khosim.kernel.uaccess import UserBuffer

__all__ = ("LiveupdateDevice",)


class LiveupdateDevice(File):
    """The open device; made by :meth:`khosim.kernel.liveupdate.luo_core.Luo.open`."""

    __slots__ = ("_luo",)
    compat_behaviour = "fix_ioctl_compat"

    def __init__(self, luo: Luo) -> None:
        """``luo_open``; raises -ENOENT without a device, -EBUSY, -EIO."""
        if not luo.misc_registered:
            why = "there is no /dev/liveupdate: boot with kho=on liveupdate=on"
            raise KernelError(errno.ENOENT, "open", why)
        super().__init__(luo.kernel, "liveupdate")
        self._luo = luo
        if luo.in_use:
            raise KernelError(errno.EBUSY, "luo_open", "somebody has /dev/liveupdate open")
        luo.in_use = True
        try:
            if luo.kernel.release.fix_handler_late and (name := missing_handler(luo)):
                raise KernelError(errno.ENOENT, "missing_handler", name)
            luo.sessions.deserialize()
        except KernelError as refused:
            luo.in_use = False
            raise KernelError(errno.EIO, "luo_open", str(refused)) from refused

    def release(self) -> None:
        """``luo_release``: others may open the device now. Sessions are not affected."""
        self._luo.in_use = False

    def ioctl(self, process: Process, cmd: int, arg: UserBuffer) -> int:
        """See :func:`~khosim.kernel.liveupdate.luo_ioctl.luo_ioctl`."""
        self.check_open()
        return luo_ioctl(self._luo, process, cmd, arg)

    def create_session(self, name: str) -> Session:
        """See :meth:`~khosim.kernel.liveupdate.luo_session.LuoSessions.create`."""
        self.check_open()
        return self._luo.sessions.create(name)

    def retrieve_session(self, name: str) -> Session:
        """See :meth:`~khosim.kernel.liveupdate.luo_session.LuoSessions.retrieve`."""
        self.check_open()
        return self._luo.sessions.retrieve(name)
