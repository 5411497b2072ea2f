"""D22: a shared object was given up while a driver was writing to it."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import Device, DeviceHandler, SharedTable, boot
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """The update is called off while a driver has the table in its hands."""
    kernel = boot(stage)
    live = kernel.liveupdate
    handler, table = DeviceHandler(), SharedTable()
    live.register_file_handler(handler)
    live.register_flb(handler, table)
    session = live.create_session("vm")
    session.preserve(Device(kernel), 1)
    folio = live.flb_get_outgoing(table)
    stage.tell(f"a driver gets the table that is for the successor: pfn {folio.pfn:#x}")
    session.close()
    page = kernel.page(folio.pfn)
    stage.tell(f"the session is closed; the table's page belongs to: {page.owner or page.kind}")
    stage.expect(
        page.kind != "free",
        "references-hold",
        f"the driver still writes to the table at pfn {folio.pfn:#x}, which was freed",
    )
    live.flb_put_outgoing(table)
    stage.tell(f"the driver puts it back: the page is {kernel.page(folio.pfn).kind}")


BUG = Bug(
    id="D22",
    name="flb-outgoing-ref",
    subject="liveupdate: Reference count outgoing FLB data",
    commit="36882f339239",
    broken="7.0, 7.1, 7.2-rc",
    fixed="7.2",
    release="7.3",
    without_fix={"luo_flb_counts_outgoing": False},
    caught_by=("references-hold",),
    story="""
The other side of flb-incoming-ref. The object that is to be handed over is made when the first
file that needs it is preserved, and unpreserved with the last one, when an agent calls its update
off. Drivers keep it up to date meanwhile: they get it and write into it.

Nothing counted them. Where the session was closed just then, the memory they were writing to went
back to the page allocator, and from there to somebody else.

Since then getting the outgoing object takes a reference, and without any file there is nothing to
get: -ENOENT instead of an empty pointer.
""",
    scenario=scenario,
)
