"""A14: pages were given back to an allocator that they were not from."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A handover is finalized and aborted."""
    kernel = stage.boot("128M")
    folio = kernel.alloc_folio(owner="guest")
    kernel.kho_preserve_folio(folio)
    kernel.debugfs.write("out/finalize", 1)
    kernel.debugfs.write("out/finalize", 0)
    stage.tell("finalized, and aborted: the chunks of the list are freed")
    reports = [line for line in kernel.messages if "Not a kmalloc allocation" in line]
    stage.expect(not reports, "right-allocator", "".join(reports))


BUG = Bug(
    id="A14",
    name="free-page-with-kfree",
    subject="kho: free chunks using free_page() instead of kfree()",
    commit="b15515155af7",
    broken="6.18",
    fixed="6.19",
    release="6.18",
    with_fix={"metadata_kfreed": False},
    caught_by=("right-allocator",),
    partly="a kfree that takes the page for a slab's; that of 6.18, as here, notices",
    story="""
When bitmaps and chunks became whole pages of the page allocator, in 6.18-rc6, the function that
frees the list after an abort was left as it was, with kfree.

kfree looks at the page, finds that it is neither a slab's nor a large object's, warns once and
leaves it alone. Each abort thus lost the pages of the list; on other configurations it is worse
than that.

The fix frees pages as pages.
""",
    scenario=scenario,
)
