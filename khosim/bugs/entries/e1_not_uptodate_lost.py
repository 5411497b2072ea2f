"""E1: what was written to a memfd after its preservation was zeroed in the successor."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import boot
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """Memory is allocated, preserved, and only then used."""
    kernel = boot(stage)
    file = kernel.memfd("guest")
    file.fallocate(0, 8192)
    session = kernel.liveupdate.create_session("vm")
    session.preserve(file, 1)
    stage.tell("two pages are allocated with fallocate and preserved")
    file.write(0, b"written late")
    stage.tell("the guest then writes to the first one")
    got = kernel.kexec().liveupdate.retrieve_session("vm").retrieve(1)
    text = got.read(0, 12)
    stage.tell(f"in the successor it reads {text!r}")
    stage.expect(text == b"written late", "content-equal", f"the guest's page reads as {text!r}")


BUG = Bug(
    id="E1",
    name="not-uptodate-lost",
    subject="mm: memfd_luo: always make all folios uptodate",
    commit="50d7b4332f27",
    broken="6.19",
    fixed="7.0, 6.19.y",
    release="7.3",
    without_fix={"memfd_makes_data": False},
    caught_by=("content-equal", "luo-file-equal"),
    story="""
fallocate gives a file its pages without touching them: they hold what they held before, and are
marked as not up to date. Whoever uses one first, with a read or a write, has it zeroed before.

A memfd may be preserved long before the reboot, and written to until the very end. The flags of
each folio were put down when it was preserved. For a page that was allocated and not yet used this
said "not up to date", and stayed so in the record when the guest had long filled it. The successor
believed the record: at the first access it zeroed the page.

The fix zeroes such pages at once, when they are preserved, and marks all of them as up to date.
""",
    scenario=scenario,
)
