"""A25: large blocks could be preserved and not be restored."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A range of 16 MiB is preserved; its natural order is 12, two more than the buddy has."""
    kernel = stage.boot("256M")
    start, nr_pages = 64 << 20, 4096
    kernel.kho_preserve_pages(start >> 12, nr_pages)
    stage.tell(f"preserved: {nr_pages} pages at {start:#x}, which is one block of order 12")
    successor = kernel.kexec()
    restored = successor.kho_restore_pages(start, nr_pages)
    stage.tell(f"the successor {'restores' if restored else 'refuses to restore'} them")
    stage.expect(
        restored is not None,
        "preserved-restorable",
        f"{nr_pages} pages at {start:#x} were preserved without complaint and cannot be restored",
        generation=1,
    )


BUG = Bug(
    id="A25",
    name="order-cap",
    subject="kho: drop restriction on maximum page order",
    commit="22bdab8e98b7",
    broken="6.16 to 7.0",
    fixed="7.1",
    release="7.3",
    without_fix={"restore_order_cap": True},
    caught_by=("preserved-restorable",),
    story="""
A range of pages is preserved as the largest naturally aligned blocks that fit, and those may be
larger than anything the page allocator knows: reserve_mem regions and guests' memory are.

The other side would have none of it: a block above MAX_PAGE_ORDER (4 MiB with 4 KiB pages) was
refused when it was to be restored, for no folio can be so large. A range, which is to become single
pages, need not care. The memory stayed reserved, out of reach of its owner and of everybody else.

The fix drops the check.
""",
    scenario=scenario,
)
