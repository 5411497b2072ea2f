"""D20: a handler was asked for a file's identity after its module could go."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import Device, DeviceHandler, boot
from khosim.bugs.stage import Stage
from khosim.errors import KernelPanic
from khosim.kernel.file import File
from khosim.kernel.kernel import Kernel
from khosim.kernel.module import Module

__all__ = ("BUG",)


class Driver(Module):
    """A module that somebody wants to unload: it goes as soon as nobody refers to it."""

    def __init__(self) -> None:
        super().__init__("device_driver")
        self.is_loaded = True

    def __setattr__(self, name: str, value: object) -> None:
        if name == "refcnt" and value == 0 and getattr(self, "refcnt", 0) == 1:
            self.is_loaded = False
        super().__setattr__(name, value)


class DriversHandler(DeviceHandler):
    """The handler in that module; its code is gone with the module."""

    def __init__(self, kernel: Kernel, module: Driver) -> None:
        self.kernel = kernel
        self.owner = self.module = module
        super().__init__()

    def get_id(self, file: File) -> int:
        """Who the device is."""
        if not self.module.is_loaded:
            raise KernelPanic(
                "BUG: unable to handle page fault: luo_get_id calls into a module that is gone",
                self.kernel.generation,
            )
        return id(file)


def scenario(stage: Stage) -> None:
    """The last file of a driver is unpreserved, while rmmod waits for that."""
    kernel = boot(stage)
    kernel.liveupdate.register_file_handler(DriversHandler(kernel, Driver()))
    session = kernel.liveupdate.create_session("vm")
    session.preserve(Device(kernel), 1)
    stage.tell("a device is in session 'vm'; its driver is to be unloaded as soon as it can be")
    session.close()
    stage.tell("the session is closed")


BUG = Bug(
    id="D20",
    name="file-uaf",
    subject="liveupdate: fix u-a-f in luo_file_unpreserve_files() and luo_file_finish()",
    commit="291dcd37c8c8",
    broken="7.1",
    fixed="7.2",
    release="7.3",
    without_fix={"luo_puts_module_last": False},
    caught_by=("kernel-survives",),
    partly="rmmod on another CPU: here the module goes the moment it can",
    story="""
A handler often belongs to a module, and LUO holds a reference to the module for each file that the
handler has, so that its code stays where it is.

When a file was unpreserved or finished, LUO gave that reference back and then, one line below,
asked the handler for the file's identity, to strike the file off the table of those it has. With
the last reference gone the module may be unloaded in between, and the question is a call into
memory that was freed.

The fix asks first and lets go of the module afterwards.
""",
    scenario=scenario,
)
