"""A1: a restored block was not fit to be freed."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A folio of four pages is handed over, restored and freed."""
    kernel = stage.boot("128M")
    folio = kernel.alloc_folio(2, owner="guest")
    kernel.kho_preserve_folio(folio)
    successor = kernel.kexec()
    restored = successor.kho_restore_folio(folio.phys)
    assert restored is not None
    counts = [successor.page(folio.pfn + n).refcount for n in range(4)]
    stage.tell(f"restored: the four pages have {counts} references")
    stage.expect(
        counts == [1, 0, 0, 0],
        "accounting-exact",
        f"the pages of a restored folio have {counts} references and not 1 for the folio",
        generation=1,
    )


BUG = Bug(
    id="A1",
    name="tail-pages-uninit",
    subject="kho: initialize tail pages for higher order folios properly",
    commit="",
    broken="6.16-rc1",
    fixed="6.16",
    release="6.16",
    without_fix={"restore_inits_refcounts": False},
    caught_by=(
        "accounting-exact",
        "page-budget",
    ),
    story="""
Until it is restored a preserved page is a reserved one: each has a reference of its own, and no
zone counts it as memory that it manages. Once restored as a folio, only the first page may have a
reference; the others are tails of it.

The first version made the pages a folio and left their references alone, and told no zone of them.
So freeing a restored folio was a report of bad pages, tails that somebody still refers to, and the
zone then had more free memory than it managed.

The fix sets the references of head and tails, and adds the pages to what the zone manages.
""",
    scenario=scenario,
)
