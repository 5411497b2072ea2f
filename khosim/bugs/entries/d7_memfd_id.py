"""D7: two open files of one memfd passed for two files."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import boot, guest
from khosim.bugs.stage import Stage
from khosim.kernel.memfd import Memfd

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A memfd was opened a second time, through /proc/self/fd."""
    kernel = boot(stage)
    file = guest(kernel)
    again = Memfd(kernel, file.inode, file.name)
    session = kernel.liveupdate.create_session("vm")
    session.preserve(file, 1)
    stage.tell("a memfd is preserved under token 1")
    stage.refuses(
        "EBUSY", "another open file of it, under token 2", lambda: session.preserve(again, 2)
    )
    kernel.kexec()


BUG = Bug(
    id="D7",
    name="memfd-id",
    subject="memfd: implement get_id for memfd_luo",
    commit="bc3a5763f466",
    broken="6.19, 7.0",
    fixed="7.1",
    release="7.3",
    without_fix={"memfd_id_is_inode": False},
    caught_by=("errno-as-documented", "luo-one-owner"),
    story="""
LUO refuses to preserve a file that it has already. By default a file is what struct file is: one
open. But a memfd can be opened again, through /proc/self/fd, and then has two of them, with two
positions and one content.

What a memfd hands over is the content, the folios of its inode. Preserved through both of its open
files they were in two records, and the successor would have had to give every page to two owners.

The memfd handler now answers the question who a file is with its inode.
""",
    scenario=scenario,
)
