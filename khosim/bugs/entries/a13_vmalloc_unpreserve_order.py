"""A13: only the first page of each block was taken back."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage
from khosim.kernel.kho_vmalloc import KhoVmallocSlot, kho_preserve_vmalloc, kho_unpreserve_vmalloc
from khosim.kernel.vmalloc import vmalloc

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A vmalloc area of huge blocks is preserved, and unpreserved again."""
    kernel = stage.boot("128M")
    area = vmalloc(kernel, 4 << 20, huge=True)
    assert area is not None
    before = stage.preserved_pages(kernel)
    slot = KhoVmallocSlot(kernel)
    kho_preserve_vmalloc(kernel, area, slot)
    stage.tell(f"preserved: 4 MiB in blocks of order {area.page_order}")
    kho_unpreserve_vmalloc(kernel, slot)
    after = stage.preserved_pages(kernel)
    stage.tell(f"unpreserved: {after - before} pages of it are still in the map")
    stage.expect(
        after == before,
        "undo-restores-state",
        f"{after - before} pages stay preserved after their area was unpreserved",
    )


BUG = Bug(
    id="A13",
    name="vmalloc-unpreserve-order",
    subject="kho: fix unpreservation of higher-order vmalloc preservations",
    commit="7ecd2e439d12",
    broken="6.18-rc1 to rc5",
    fixed="6.18-rc6",
    release="7.3",
    without_fix={"vmalloc_unpreserves_blocks": False},
    caught_by=("undo-restores-state",),
    story="""
An area of huge pages is preserved in blocks, one entry of the list for each. Unpreserving it went
through the entries and took back one page for each, whatever the order of the blocks.

A block is one bit in the map of its order, and its first page alone is a bit in another map that
was never set. So nothing was taken back: the pages went to the successor, which reserved them for
an owner who does not know of them, at every update more of them.

The fix takes back as many pages as an entry stands for.
""",
    scenario=scenario,
)
