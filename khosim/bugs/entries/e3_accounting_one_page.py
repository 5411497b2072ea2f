"""E3: a large folio was accounted as one page."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import boot
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A memfd of huge pages is handed over."""
    kernel = boot(stage, "128M")
    file = kernel.memfd("guest", size="4M", huge="always")
    file.write(0, b"guest memory")
    file.write(2 << 20, b"guest memory")
    stage.tell(f"a memfd in folios of 2 MiB: st_blocks is {file.inode.i_blocks}")
    kernel.liveupdate.create_session("vm").preserve(file, 1)
    got = kernel.kexec().liveupdate.retrieve_session("vm").retrieve(1)
    stage.tell(f"in the successor st_blocks is {got.inode.i_blocks}")


BUG = Bug(
    id="E3",
    name="accounting-one-page",
    subject="mm/memfd: use folio_nr_pages() for shmem inode accounting",
    commit="",
    broken="6.19, 7.0",
    fixed="7.1",
    release="7.3",
    without_fix={"memfd_accounts_pages": False},
    caught_by=("luo-file-equal",),
    story="""
A file's blocks are counted as its pages come and go: stat shows the number, quotas and the limits
of a mount rest on it.

When a memfd was put together again in the successor each folio counted as one page, however many
it had. A guest in huge pages of 2 MiB was 512 times smaller in the books than in memory. When such
a file was truncated, all the pages of a folio were given back at once, more than had ever been
accounted.

The fix counts the pages of each folio.
""",
    scenario=scenario,
)
