"""A3: struct pages of preserved memory were never set up."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A page high in memory is handed over, restored and freed."""
    kernel = stage.boot("5G")
    runs = kernel.alloc_folios(1 << 17, owner="guest")
    pfn = runs[-1][0] + runs[-1][1] - 1
    kernel.kho_preserve_phys(pfn << 12, 1 << 12)
    successor = kernel.kexec()
    restored = successor.kho_restore_folio(pfn << 12)
    assert restored is not None
    page = successor.page(pfn)
    stage.tell(f"restored: the page at {pfn << 12:#x}, which is said to be in zone {page.zone}")
    restored.put()
    stage.tell("freed")


BUG = Bug(
    id="A3",
    name="deferred-pages-allowed",
    subject="kho: mm: don't allow deferred struct page with KHO",
    commit="",
    broken="6.16.0 to 6.16.3",
    fixed="6.17, 6.16.4",
    release="6.16",
    without_fix={"deferred_struct_pages": True},
    caught_by=("free-in-own-zone",),
    story="""
Each page of memory has a struct page. On large machines only the first of them are set up early in
boot, and the others later, by many threads, where the configuration has deferred initialisation.

A successor writes the order of each preserved block into the struct page of its first page, very
early, and marks the block so that nobody sets its struct pages up again. With deferred
initialisation nobody ever did: all of the struct page but that one word is what its memory happened
to hold. Here that is zeros, which read as the first zone of node 0. So when the page was restored
it was counted in a zone that it is not in, and when it was freed, it went to that zone's free
lists. Where the memory is poisoned for debugging the kernel dies instead.

The fix forbids deferred initialisation together with KHO. It took until 7.2 to get on with it.
""",
    scenario=scenario,
)
