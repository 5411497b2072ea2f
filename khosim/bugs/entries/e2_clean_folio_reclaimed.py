"""E2: a page passed for clean, and reclaim threw it away."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import boot
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A page was only read before it was preserved; it is written to later."""
    kernel = boot(stage)
    file = kernel.memfd("guest", size="8K")
    file.inode.get_folios(0, 2, 2)
    stage.tell("a guest maps two pages and reads them: they are zeroed, up to date and clean")
    session = kernel.liveupdate.create_session("vm")
    session.preserve(file, 1)
    file.store(0, b"written late")
    stage.tell("the memfd is preserved; the guest then writes to the first page")
    got = kernel.kexec().liveupdate.retrieve_session("vm").retrieve(1)
    stage.tell(f"in the successor it reads {got.read(0, 12)!r}")
    stage.tell(f"memory is short: {got.reclaim()} clean pages are reclaimed")
    text = got.read(0, 12)
    stage.tell(f"now it reads {text!r}")
    stage.expect(text == b"written late", "content-equal", f"the guest's page reads as {text!r}")


BUG = Bug(
    id="E2",
    name="clean-folio-reclaimed",
    subject="mm: memfd_luo: always dirty all folios",
    commit="",
    broken="6.19",
    fixed="7.0, 6.19.y",
    release="7.3",
    without_fix={"memfd_makes_data": False},
    caught_by=("content-equal",),
    story="""
A page of a memfd that was only read is clean: it holds zeros, and when memory is short it can be
dropped, for whoever reads it next gets zeros again. The first write makes it dirty, and a dirty
page is written to swap before it goes.

As with the other flag (see not-uptodate-lost), what the record says is what was true when the file
was preserved. A page that was clean then and written to afterwards crossed the kexec as a clean
one, with the guest's data in it. All is well in the successor until memory gets short: reclaim
finds a clean page, drops it, and the guest reads zeros.

Preserved folios are always marked dirty since.
""",
    scenario=scenario,
)
