"""D21: a shared object was finished while somebody was using it."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import Device, DeviceHandler, SharedTable, boot
from khosim.bugs.stage import Stage
from khosim.kernel.kernel import Kernel

__all__ = ("BUG",)


def register(kernel: Kernel) -> SharedTable:
    """A kind of devices that share a table."""
    handler, table = DeviceHandler(), SharedTable()
    kernel.liveupdate.register_file_handler(handler)
    kernel.liveupdate.register_flb(handler, table)
    return table


def scenario(stage: Stage) -> None:
    """A driver looks something up in the table while the last device is finished."""
    kernel = boot(stage)
    register(kernel)
    kernel.liveupdate.create_session("vm").preserve(Device(kernel), 1)
    stage.tell("a device is handed over, and with it the table that devices share")
    successor = kernel.kexec()
    table = register(successor)
    live = successor.liveupdate
    folio = live.flb_get_incoming(table)
    stage.tell(f"a driver gets the table: pfn {folio.pfn:#x}, {folio.read(0, 5)!r}")
    live.retrieve_session("vm").close()
    owner = successor.page(folio.pfn).owner or successor.page(folio.pfn).kind
    stage.tell(f"the session is closed; the table's page belongs to: {owner}")
    stage.expect(
        successor.page(folio.pfn).kind != "free",
        "references-hold",
        f"the driver still reads the table at pfn {folio.pfn:#x}, which was freed",
        generation=successor.generation,
    )
    live.flb_put_incoming(table)
    stage.tell(f"the driver puts it back: the page is {successor.page(folio.pfn).kind}")


BUG = Bug(
    id="D21",
    name="flb-incoming-ref",
    subject="liveupdate: Reference count incoming FLB data",
    commit="d8e47bd066d7",
    broken="7.0, 7.1",
    fixed="7.2",
    release="7.3",
    without_fix={"luo_flb_counts_incoming": False},
    caught_by=("references-hold",),
    story="""
What belongs to no single file, such as the tables of an IOMMU, is handed over as a shared object
(file-lifecycle-bound data, FLB). It comes with the first file that needs it and goes with the
last: LUO counts the files. Drivers get at the object in between, with a call of their own.

That call only returned a pointer. In the successor the object was finished, and its memory freed,
when the last file was, whether or not a driver was in the middle of reading it.

Getting the object now counts like a file, and has to be given back: the object is finished when
both the files and the drivers are done.
""",
    scenario=scenario,
)
