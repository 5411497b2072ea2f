"""The Live Update Orchestrator of one kernel.

Models ``kernel/liveupdate/luo_core.c`` @ 7.3: the ``liveupdate=`` switch, taking the predecessor's
state over early in boot, the state for the successor, ``liveupdate_reboot``; and the register of
file handlers and owned files of ``luo_file.c``. The device is in
:mod:`khosim.kernel.liveupdate.luo_dev`. Left out: locks.

As in the kernel, ``liveupdate=off`` only keeps user space out: what the predecessor handed over is
taken over all the same, and a kernel that cannot read it dies.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from khosim.abi.luo import LUO_KHO_ENTRY_NAME
from khosim.abi.memfd import LAYOUTS
from khosim.errors import KernelError, KernelPanic, KhoSimError
from khosim.kernel.kho_finalize import kho_finalize
from khosim.kernel.liveupdate.luo_dev import LiveupdateDevice
from khosim.kernel.liveupdate.luo_flb import LuoFlbs
from khosim.kernel.liveupdate.luo_format import FORMATS, LuoFormat
from khosim.kernel.liveupdate.luo_session import LuoSessions, Session
from khosim.kernel.liveupdate.memfd_luo import MemfdLuoHandler
from khosim.kernel.module import module_put, try_module_get
from khosim.kernel.slab import kmalloc

if TYPE_CHECKING:
    from khosim.kernel.file import File
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.liveupdate.file_ops import FileHandler
    from khosim.kernel.liveupdate.flb_ops import Flb
    from khosim.kernel.liveupdate.luo_file import LuoFile

__all__ = ("Luo",)

_ENTRY_NAME = LUO_KHO_ENTRY_NAME.encode() + b"\0"


class Luo:
    """``luo_global`` and all that hangs on it: ``kernel.liveupdate``.

    People call :meth:`create_session`, :meth:`retrieve_session` and, for subsystems of their own,
    the ``register`` and ``flb`` methods. Those who think in ioctls use :meth:`open`, or the file
    descriptors of a :class:`~khosim.kernel.process.Process`.

    ``enabled`` tells whether the orchestrator is on, ``liveupdate_num`` how many live updates came
    before this kernel, ``luo_ser_out`` the physical address of the root for the successor (or 0).
    ``handlers`` are the file handlers by name in order, ``preserved_files`` the files that LUO owns
    by the id that their handler gives them.
    """

    __slots__ = (
        "_flb",
        "_sessions",
        "enabled",
        "handlers",
        "in_use",
        "kernel",
        "liveupdate_num",
        "luo_ser_out",
        "misc_registered",
        "preserved_files",
        "retrieved",
    )

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.enabled = False
        self.liveupdate_num = 0
        self.luo_ser_out = 0
        self._sessions: LuoSessions | None = None
        self._flb: LuoFlbs | None = None
        self.handlers: dict[str, FileHandler] = {}
        self.preserved_files: dict[int, File] = {}
        self.retrieved: list[LuoFile] = []
        """One entry for each call of a handler's ``retrieve``; for checkers, no kernel has it."""
        self.misc_registered = False
        """``/dev/liveupdate`` exists."""
        self.in_use = False
        """``/dev/liveupdate`` is open."""

    def __repr__(self) -> str:
        state = "on" if self.enabled else "off"
        return f"Luo({state}, liveupdate_num={self.liveupdate_num})"

    # Made when somebody asks for them: most kernels boot without LUO.

    @property
    def format(self) -> LuoFormat:
        """How the state is laid out for the successor."""
        return FORMATS[self.kernel.release.luo](self.kernel)

    @property
    def sessions(self) -> LuoSessions:
        """``luo_session_global``."""
        if self._sessions is None:
            self._sessions = LuoSessions(self)
        return self._sessions

    @property
    def flb(self) -> LuoFlbs:
        """``luo_flb_global``."""
        if self._flb is None:
            self._flb = LuoFlbs(self.kernel)
        return self._flb

    # -- booting --------------------------------------------------------------------------------

    def early_init(self) -> None:
        """``liveupdate_early_init``: take the predecessor's state over, or panic."""
        kernel = self.kernel
        if not kernel.release.luo:
            return
        self.enabled = kernel.options.liveupdate
        try:
            self._early_startup()
        except KernelError as refused:
            self.enabled = False
            raise KernelPanic(
                "The incoming tree failed to initialize properly "
                f"[-{refused.name}], disabling live update",
                kernel.generation,
            ) from refused

    def _early_startup(self) -> None:
        # luo_early_startup
        kernel = self.kernel
        if not kernel.kho_enable:
            if self.enabled:
                kernel.printk("luo: Disabling liveupdate because KHO is disabled")
            self.enabled = False
            return
        tree = kernel.kho_in.fdt()
        if tree is None or _ENTRY_NAME not in bytes(tree):
            return  # -ENOENT, at a glance
        try:
            phys, size_bytes = kernel.kho_retrieve_subtree(LUO_KHO_ENTRY_NAME)
        except KernelError as refused:
            if refused.errno == errno.ENOENT:
                return
            kernel.printk(
                f"luo: failed to retrieve LUO state '{LUO_KHO_ENTRY_NAME}' from KHO: "
                f"-{refused.name}"
            )
            raise
        root = self.format.retrieve(phys, size_bytes)
        self.liveupdate_num = root.liveupdate_num
        kernel.printk(
            f"luo: Retrieved live update data, liveupdate number: {root.liveupdate_num}"
        )
        try:
            self.sessions.setup_incoming(root.sessions_pa)
        except KernelError:
            self.format.release(phys)
            raise
        self.flb.incoming_pa = root.flbs_pa
        self.format.release(phys)
        if kernel.trace is not None:
            kernel.emit("luo_early_startup", {"phys": phys}, root.liveupdate_num)

    def late_init(self) -> None:
        """``luo_late_startup`` and ``liveupdate_ioctl_init``."""
        if self.kernel.release.fix_luo_without_kho and not self.kernel.kho_enable:
            self.enabled = False
        if self.kernel.release.fix_luo_off and self.kernel.is_kho_boot and not self.enabled:
            self._finish_unwanted()
        if not self.enabled:
            return
        error = 0
        try:
            self.luo_ser_out = self.format.state_setup(self)
        except KernelError as refused:
            self.enabled = False
            error = -refused.errno
        if self.kernel.trace is not None:
            self.kernel.emit("luo_late_startup", {}, error)
        if self.enabled:
            self.misc_registered = True

    def _finish_unwanted(self) -> None:
        # No kernel has this yet: nobody can ever ask for the predecessor's sessions. Nor try again,
        # so that what reads them must not fail for want of memory (__GFP_NOFAIL).
        release = self.kernel.release
        if not release.memfd or not self.sessions.incoming.active:
            return
        handler = MemfdLuoHandler(LAYOUTS[release.memfd])
        self.handlers = {handler.compatible: handler}
        self.flb.links[handler] = []
        pages = self.kernel.pages
        try:
            fail, pages.fail = pages.fail, None
            try:
                self.sessions.deserialize()
            finally:
                pages.fail = fail
            for session in list(self.sessions.incoming.sessions.values()):
                session.retrieved = True
                self.sessions.release(session)
        except KernelError as refused:
            self.kernel.printk(f"luo: the predecessor's sessions cannot be finished: {refused}")
        self.handlers = {}

    def memfd_init(self) -> None:
        """``memfd_luo_init``."""
        if not self.enabled or not self.kernel.release.memfd:
            return  # -EOPNOTSUPP, which it does not mention
        try:
            self.register_file_handler(MemfdLuoHandler(LAYOUTS[self.kernel.release.memfd]))
        except KernelError as refused:
            self.kernel.printk(f"Could not register luo filesystem handler: -{refused.name}")

    # -- the reboot system call -----------------------------------------------------------------

    def reboot(self) -> None:
        """``liveupdate_reboot``: serialize everything; raises what a file's ``freeze`` raises."""
        if not self.enabled:
            return
        if self.kernel.release.fix_flb_reference and any(
            private.outgoing.references for private in self.flb.registered
        ):
            raise KernelError(errno.EBUSY, "liveupdate_reboot", "a shared object is in use")
        self.sessions.serialize()
        if self.kernel.release.luo_flb:
            self.flb.serialize()
        if self.kernel.release.finalize == "refresh":
            error = kho_finalize(self.kernel)
            if error:
                # The sessions stay frozen: nobody undoes their serialization.
                self.kernel.printk(f"luo: kho_finalize failed {error}")
                raise KernelError(errno.EAGAIN, "liveupdate_reboot", "kho_finalize failed")

    # -- for people -----------------------------------------------------------------------------

    def open(self) -> LiveupdateDevice:
        """``open("/dev/liveupdate")``: the one and only agent's way in.

        Raises -ENOENT where LUO is off, -EBUSY while somebody has it open, -EIO where the
        predecessor's sessions cannot be read.
        """
        self.kernel.check_alive()
        return LiveupdateDevice(self)

    def create_session(self, name: str) -> Session:
        """A new session; opens the device for the length of the call.

        Raises what :meth:`open` raises, and -EINVAL for a name that is not 1 to 63 bytes, -EEXIST.
        """
        device = self.open()
        try:
            return device.create_session(name)
        finally:
            device.close()

    def retrieve_session(self, name: str) -> Session:
        """The predecessor's session of that name; opens the device for the length of the call.

        Raises what :meth:`open` raises, and -ENOENT, or -EINVAL at the second time.
        """
        device = self.open()
        try:
            return device.retrieve_session(name)
        finally:
            device.close()

    # -- file handlers --------------------------------------------------------------------------

    def register_file_handler(self, handler: FileHandler) -> None:
        """``liveupdate_register_file_handler``: files of this kind can be preserved from now on.

        In a successor it has to happen before ``/dev/liveupdate`` is opened for the first time.
        Raises -EOPNOTSUPP where LUO is off, -EINVAL without the required callbacks, -EEXIST for a
        name in use.
        """
        symbol = "liveupdate_register_file_handler"
        kernel = self.kernel
        kernel.check_alive()
        if not self.enabled:
            raise KernelError(errno.EOPNOTSUPP, symbol, "live update is off")
        if missing := handler.ops.missing():
            raise KernelError(errno.EINVAL, symbol, f"{handler!r} has no {missing[0]}")
        if handler.compatible in self.handlers:
            kernel.printk(
                "luo: File handler registration failed: Compatible string "
                f"'{handler.compatible}' already registered."
            )
            raise KernelError(errno.EEXIST, symbol, handler.compatible)
        if kernel.release.luo_pins_modules and not try_module_get(handler.ops.owner):
            raise KernelError(errno.EAGAIN, symbol, "the module goes away")
        self.handlers[handler.compatible] = handler
        self.flb.links[handler] = []
        if kernel.trace is not None:
            kernel.emit(symbol, {"compatible": handler.compatible}, 0)

    def unregister_file_handler(self, handler: FileHandler) -> None:
        """``liveupdate_unregister_file_handler``; the handler's FLBs are unregistered from it."""
        if self.enabled:
            self.flb.unregister_all(handler)
            del self.handlers[handler.compatible]
            if self.kernel.release.luo_pins_modules:
                module_put(handler.ops.owner)

    def handler_of(self, file: File) -> FileHandler | None:
        """The first handler that wants ``file``, with a reference to its module."""
        for handler in self.handlers.values():
            assert handler.ops.can_preserve is not None
            if handler.ops.can_preserve(file):
                return handler if try_module_get(handler.ops.owner) else None
        return None

    # -- one file, one owner --------------------------------------------------------------------

    def own(self, handler: FileHandler, file: File, *, has_room: bool = False) -> None:
        """``xa_insert`` into ``luo_preserved_files``: raises -EBUSY for an owned file, -ENOMEM.

        ``has_room``: memory for it was set aside (``xa_reserve``).
        """
        if not self.kernel.release.luo_one_owner:
            return
        number = self._luo_get_id(handler, file)
        if number in self.preserved_files:
            raise KernelError(errno.EBUSY, "xa_insert", f"{file!r} is preserved already")
        if not has_room and not kmalloc(self.kernel, "xa_insert"):
            raise KernelError(errno.ENOMEM, "xa_insert", repr(file))
        self.preserved_files[number] = file

    def disown(self, handler: FileHandler, file: File) -> None:
        """``xa_erase``."""
        self.preserved_files.pop(self._luo_get_id(handler, file), None)

    def _luo_get_id(self, handler: FileHandler, file: File) -> int:
        is_memfd = isinstance(handler, MemfdLuoHandler)
        if handler.ops.get_id is None or (is_memfd and not self.kernel.release.memfd_id_is_inode):
            return id(file)
        return handler.ops.get_id(file)

    # -- shared state ---------------------------------------------------------------------------

    def register_flb(self, handler: FileHandler, flb: Flb) -> None:
        """``liveupdate_register_flb``: ``handler``'s files need ``flb``.

        Raises -EOPNOTSUPP where LUO is off and what :meth:`LuoFlbs.register` raises.
        """
        self._check_enabled("liveupdate_register_flb")
        known = self.handlers.get(handler.compatible) is handler
        self.flb.register(handler, flb, handler_is_known=known)

    def unregister_flb(self, handler: FileHandler, flb: Flb) -> None:
        """``liveupdate_unregister_flb``."""
        if self.enabled:
            self.flb.unregister(handler, flb)

    def flb_get_incoming(self, flb: Flb) -> Any:
        """``liveupdate_flb_get_incoming``: the predecessor's object, with a reference.

        Raises -EOPNOTSUPP where LUO is off and what :meth:`LuoFlbs.get_incoming` raises.
        """
        self._check_enabled("liveupdate_flb_get_incoming")
        return self.flb.get_incoming(flb)

    def flb_put_incoming(self, flb: Flb) -> None:
        """``liveupdate_flb_put_incoming``; where getting does not count, giving back does not."""
        if self.kernel.release.luo_flb_counts_incoming:
            self.flb.put_incoming(flb)

    def flb_get_outgoing(self, flb: Flb) -> Any:
        """``liveupdate_flb_get_outgoing``: the object for the successor, with a reference.

        Raises -EOPNOTSUPP where LUO is off, -ENOENT while no file needs it.
        """
        self._check_enabled("liveupdate_flb_get_outgoing")
        return self.flb.get_outgoing(flb)

    def flb_put_outgoing(self, flb: Flb) -> None:
        """``liveupdate_flb_put_outgoing``; where getting does not count, giving back does not."""
        if self.kernel.release.luo_flb_counts_outgoing:
            self.flb.state(flb).outgoing.references -= 1
            self.flb.put_outgoing(flb)

    def _check_enabled(self, symbol: str) -> None:
        self.kernel.check_alive()
        if not self.enabled:
            raise KernelError(errno.EOPNOTSUPP, symbol, "live update is off")
        if not self.kernel.release.luo_flb:
            raise KhoSimError(f"Linux {self.kernel.release.name} has no {symbol}")

