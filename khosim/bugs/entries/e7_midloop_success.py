"""E7: half a memfd was returned as a whole one."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import boot, guest
from khosim.bugs.stage import Stage
from khosim.kernel.memfd import Memfd

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A driver has taken one of the memfd's pages for its own by mistake."""
    kernel = boot(stage)
    file = guest(kernel, pages=8)
    kernel.liveupdate.create_session("vm").preserve(file, 1)
    (run,) = file.inode.mapping
    successor = kernel.kexec()
    taken = successor.kho_restore_folio((run.pfn + 3) << 12)
    stage.tell(f"in the successor a driver restores pfn {run.pfn + 3:#x}, which is not its own")
    assert taken is not None
    session = successor.liveupdate.retrieve_session("vm")
    stage.refuses("EIO", "retrieving the memfd of 8 pages", lambda: session.retrieve(1))
    got = session.session.file_set.files[0].file
    if isinstance(got, Memfd):
        stage.tell(f"its size is {got.size >> 12} pages, {got.inode.mapping.nrpages} are there")


BUG = Bug(
    id="E7",
    name="midloop-success",
    subject="mm/memfd_luo: report error when restoring a folio fails mid-loop",
    commit="0fb1daf0b78d",
    broken="6.19, 7.0",
    fixed="7.1",
    release="7.3",
    without_fix={"memfd_tells_midloop": False},
    caught_by=("errno-as-documented", "luo-file-equal"),
    story="""
Retrieving a memfd is a loop over its folios. A variable for the error was set to -EIO before the
loop, so that a folio that cannot be restored would end it with that.

But each folio that went well left 0 in it. So only the first folio's failure was an error. Any
later one ended the loop, and the function returned success: a file of the right size with its
first pages in it and holes behind them. A guest that goes on with such memory reads zeros where its
data was.

The fix sets the error where it happens.
""",
    scenario=scenario,
)
