"""D4: after a reboot that failed, LUO had forgotten where it had put the files."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import Device, DeviceHandler, boot, guest
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A busy device refuses the jump; the agent then calls the update off."""
    kernel = boot(stage)
    kernel.liveupdate.register_file_handler(DeviceHandler())
    session = kernel.liveupdate.create_session("vm")
    session.preserve(guest(kernel), 1)
    session.preserve(Device(kernel, is_busy=True), 2)
    stage.tell("a memfd of four pages and a busy device are in session 'vm'")
    stage.refuses("EBUSY", "kexec", kernel.kexec)
    (memfd, _) = session.session.file_set.files
    stage.tell(f"the memfd's record is at {memfd.serialized_data:#x}")
    session.close()
    stage.tell("the session is closed: all of it is to be unpreserved")


BUG = Bug(
    id="D4",
    name="unfreeze-clears-handle",
    subject="liveupdate: luo_file: do not clear serialized_data on unfreeze",
    commit="011d4e52a76c",
    broken="6.19-rc",
    fixed="6.19",
    release="7.3",
    without_fix={"luo_unfreeze_keeps_handle": False},
    caught_by=("luo-no-leftovers",),
    story="""
When a file is preserved its handler returns a number, for a memfd the address of the record that
describes it. On the way into the reboot each file is frozen; where one refuses, all that were
frozen before it are unfrozen, the system call fails, and everything goes on.

Unfreezing set that number to zero, as if the file had never been preserved. A later unpreserve of
the memfd found nothing to do: its folios stayed pinned and preserved, into the next kernel, with
no record that leads to them. And the next attempt to reboot was refused with -EINVAL, for a memfd
without a record cannot be frozen.

The fix keeps the number: what was preserved stays so until it is unpreserved.
""",
    scenario=scenario,
)
