"""A15: an aborted update forgot what others had preserved."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A page is preserved; the update is prepared, called off, and tried again."""
    kernel = stage.boot("128M")
    folio = kernel.alloc_folio(owner="driver")
    folio.write(0, b"precious")
    kernel.kho_preserve_folio(folio)
    kernel.debugfs.write("out/finalize", 1)
    kernel.debugfs.write("out/finalize", 0)
    kernel.debugfs.write("out/finalize", 1)
    stage.tell("preserved, finalized, aborted, finalized again; the driver was never told of it")
    successor = kernel.kexec()
    restored = successor.kho_restore_folio(folio.phys)
    stage.expect(
        restored is not None,
        "preserved-restorable",
        f"the page at {folio.phys:#x} was preserved and never unpreserved, and cannot be restored",
        generation=1,
    )


BUG = Bug(
    id="A15",
    name="abort-drops-all",
    subject="kho: don't unpreserve memory during abort",
    commit="99cd2ffac697",
    broken="6.16 to 6.18",
    fixed="6.19",
    release="6.18",
    with_fix={"abort_unpreserves": False},
    caught_by=("preserved-restorable",),
    story="""
Memory may be preserved at any time, and users often do it when they allocate it. Up to 6.18 user
space finalizes the handover at the end, and may abort it if anything else goes wrong.

An abort threw every bitmap away: not what finalizing had added, but all that was ever preserved.
The owners were not asked to preserve it again and went on to believe that it was. The next attempt
then succeeded, and handed over nothing of it.

Since the fix an abort only undoes what finalizing did.
""",
    scenario=scenario,
)
