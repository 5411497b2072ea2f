"""A18: a restored range could not be freed page by page."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage
from khosim.kernel.page import Folio

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A range of eight pages is restored as single pages; one of them is freed."""
    kernel = stage.boot("128M")
    first = kernel.alloc_pages_exact(8, owner="driver")
    kernel.kho_preserve_pages(first, 8)
    successor = kernel.kexec()
    assert successor.kho_restore_pages(first << 12, 8) is not None
    counts = [successor.page(first + n).refcount for n in range(8)]
    what = "still one compound page" if successor.page(first).compound else "single pages"
    stage.tell(f"restored: eight pages, {what}, with {counts} references")
    Folio(successor, first + 3, 0).put()
    reports = [line for line in successor.messages if "Bad page" in line]
    stage.expect(not reports, "pages-freeable", "".join(reports), generation=1)


BUG = Bug(
    id="A18",
    name="contiguous-order0-restore",
    subject="kho: fix restoring of contiguous ranges of order-0 pages",
    commit="7b71205ae112",
    broken="6.18",
    fixed="6.19",
    release="6.18",
    with_fix={"restore_pages_compound": False},
    caught_by=("pages-freeable",),
    story="""
kho_restore_pages gives back a range that was single pages before, and each is to be one again: with
a reference of its own, to be freed on its own.

It went about it as for a folio: each block of the range became a compound page first, and was then
split. But split_page is for blocks that are no compound pages. It gave each page its reference, and
left all but the first of them tails. The owner, who knows of eight pages, frees the fourth; the
kernel takes that for the end of all eight, finds references on those behind the first, and reports
bad pages.

The fix restores the pages of a range as single ones from the start.
""",
    scenario=scenario,
)
