"""D12: a driver that knew of live updates could never be unloaded."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import Device, DeviceHandler, boot
from khosim.bugs.stage import Stage
from khosim.kernel.module import Module

__all__ = ("BUG",)


class DriversHandler(DeviceHandler):
    """The handler of a driver that is a module."""

    def __init__(self, module: Module) -> None:
        self.owner = module
        super().__init__()


def scenario(stage: Stage) -> None:
    """A driver is loaded, a device of its crosses nothing, and the driver is to go again."""
    kernel = boot(stage)
    driver = Module("device_driver")
    kernel.liveupdate.register_file_handler(DriversHandler(driver))
    stage.tell(f"a driver registers its handler: {driver.refcnt} references to its module")
    session = kernel.liveupdate.create_session("vm")
    session.preserve(Device(kernel), 1)
    stage.tell(f"a device is preserved: {driver.refcnt}")
    session.close()
    stage.tell(f"the session is closed: {driver.refcnt}")
    stage.expect(
        driver.refcnt == 0,
        "accounting-exact",
        f"nobody uses the driver, but its module counts {driver.refcnt} references: it can never "
        "be unloaded",
    )


BUG = Bug(
    id="D12",
    name="module-refcount",
    subject="liveupdate: defer file handler module refcounting to active sessions",
    commit="76be9983df33",
    broken="6.19, 7.0",
    fixed="7.1",
    release="7.3",
    without_fix={"luo_pins_modules": True},
    caught_by=("accounting-exact",),
    story="""
A module whose code somebody may call is held by a reference, and can be unloaded when there is
none. A driver registers its handler when it is loaded, and takes it back in its exit function.

Registering took a reference to the driver's own module, for as long as the handler was registered.
The exit function, which would have taken the handler back, only runs once nobody refers to the
module. So nobody ever could: rmmod said that the module is in use, until the next reboot. The same
held for modules with shared objects.

Since then a module is held while files of its are in sessions, and not a moment longer.
""",
    scenario=scenario,
)
