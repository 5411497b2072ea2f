"""A6: any page could be restored, as often as one liked."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """Two parts of a kernel restore the same page, and a third a page that never was preserved."""
    kernel = stage.boot("128M")
    folio = kernel.alloc_folio(owner="guest")
    kernel.kho_preserve_folio(folio)
    successor = kernel.kexec()
    assert successor.kho_restore_folio(folio.phys) is not None
    stage.tell(f"restored: the page at {folio.phys:#x}")
    again = successor.kho_restore_folio(folio.phys)
    stage.tell(f"once more: {'refused' if again is None else 'restored again'}")
    mine = successor.alloc_folio(owner="driver")
    stranger = successor.kho_restore_folio(mine.phys)
    stage.tell(f"a driver's own page: {'refused' if stranger is None else 'restored'}")


BUG = Bug(
    id="A6",
    name="restore-nonkho-page",
    subject="kho: make sure page being restored is actually from KHO",
    commit="89a3ecca49ee",
    broken="6.16, 6.17",
    fixed="6.18",
    release="6.17",
    with_fix={"page_magic": True, "restore_clears_private": True},
    caught_by=(
        "page-budget",
        "restored-once",
    ),
    story="""
That a page was preserved, and with which order, is written into page->private of its struct page
early in boot. Restoring read the order from there and looked at nothing else, nor did it clear the
word afterwards.

So nothing told a preserved page from any other. A second call for the same address succeeded, and
so did one for a page in use: private is 0 there, which is order 0. Either way a page has two
owners, and whoever frees it first pulls it away from the other.

The fix puts a magic number beside the order, insists on it, and clears both once the page is
restored.
""",
    scenario=scenario,
)
