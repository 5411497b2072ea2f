"""D23: a shared object that could not be retrieved was retrieved again."""

from __future__ import annotations

import errno

from khosim.bugs.bug import Bug
from khosim.bugs.live import Device, DeviceHandler, SharedTable, boot
from khosim.bugs.stage import Stage
from khosim.errors import KernelError
from khosim.kernel.liveupdate.flb_ops import LiveupdateFlbOpArgs

__all__ = ("BUG",)


class FussyTable(SharedTable):
    """A table that the successor cannot read: its page is restored, looked at and freed."""

    def retrieve(self, args: LiveupdateFlbOpArgs) -> None:
        """The page again, but what is in it is not what was expected."""
        args.kernel.kho_restore_free(args.data)
        raise KernelError(errno.EINVAL, "table_retrieve", "not a table of ours")


def scenario(stage: Stage) -> None:
    """Two drivers ask for the object, one after the other."""
    kernel = boot(stage)
    handler, table = DeviceHandler(), FussyTable()
    kernel.liveupdate.register_file_handler(handler)
    kernel.liveupdate.register_flb(handler, table)
    kernel.liveupdate.create_session("vm").preserve(Device(kernel), 1)
    successor = kernel.kexec()
    handler, table = DeviceHandler(), FussyTable()
    live = successor.liveupdate
    live.register_file_handler(handler)
    live.register_flb(handler, table)
    for number in (1, 2):
        what = f"driver {number} gets the table"
        stage.refuses("EINVAL", what, lambda: live.flb_get_incoming(table))
    for line in successor.messages:
        if line.startswith("WARNING"):
            stage.tell(line)


BUG = Bug(
    id="D23",
    name="flb-retry",
    subject="liveupdate: Remember FLB retrieve() status",
    commit="5c4a03afcb21",
    broken="7.0, 7.1, 7.2-rc",
    fixed="7.2",
    release="7.3",
    without_fix={"luo_flb_remembers_retrieve": False},
    caught_by=("luo-retrieved-once",),
    story="""
A shared object is retrieved by the first who asks for it in the successor. That was noted where it
worked, and forgotten where it did not: as for files (see retrieve-retry), each further request ran
the object's retrieve again, though what the predecessor had left was restored and freed by the
first attempt.

Here a driver's second attempt restores a page that is free by then; the kernel notices that this
page is not from a predecessor any more, and warns. A handler that trusts the address it was given
reads memory of somebody else.

The fix stores the error, and every later request gets it.
""",
    scenario=scenario,
)
