"""B7: preserved pages had struct pages that nobody had set up."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A folio of a guest on node 1 is handed over, restored and freed."""
    kernel = stage.boot("1G", nodes=2)
    folio = kernel.alloc_folio(3, owner="guest", nid=1)
    kernel.kho_preserve_folio(folio)
    stage.tell(f"preserved: a folio at {folio.phys:#x}, on node {kernel.page(folio.pfn).nid}")
    successor = kernel.kexec()
    restored = successor.kho_restore_folio(folio.phys)
    assert restored is not None
    page = successor.page(folio.pfn)
    stage.tell(f"restored: it is said to be on node {page.nid}, in zone {page.zone}")
    restored.put()
    stage.tell("freed")


BUG = Bug(
    id="B7",
    name="deferred-preserved",
    subject="kho: make preserved pages compatible with deferred struct page init",
    commit="c6073743d0c7",
    broken="7.2-rc (with deferred struct pages)",
    fixed="7.2",
    release="7.2",
    without_fix={"preserved_pages_initialised": False},
    caught_by=("free-in-own-zone",),
    story="""
Setting up all struct pages in early boot takes long on large machines, so that most of them are
left to threads later on. From 6.16.4 to 7.1 KHO could not be built together with that, for
preserved memory is written to before: the order of each block goes to its first struct page, and
the block is marked so that it is not set up afterwards.

Once the two were allowed together again, those struct pages were never set up by anybody. What was
in them is what their memory had held; zeros, here, say that a page is in the first zone of node 0.
A guest's folio on node 1 came back as one of node 0, and went to the wrong free list at its end.

The fix sets the struct pages of a block up before anything is written into them.
""",
    scenario=scenario,
)
