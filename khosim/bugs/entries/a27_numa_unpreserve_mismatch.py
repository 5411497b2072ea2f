"""A27: what crossed a node could not be taken back."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A range that crosses from node 0 to node 1 is preserved, and unpreserved again."""
    kernel = stage.boot("256M", nodes=["129M", "127M"])
    before = stage.preserved_pages(kernel)
    first, nr_pages = (129 << 8) - 256, 512
    kernel.kho_preserve_pages(first, nr_pages)
    stage.tell(f"preserved: {nr_pages} pages, half of them on node 0 and half on node 1")
    kernel.kho_unpreserve_pages(first, nr_pages)
    after = stage.preserved_pages(kernel)
    stage.tell(f"unpreserved: {after - before} pages of them are still in the map")
    stage.expect(
        after == before,
        "undo-restores-state",
        f"{after - before} pages stay preserved after they were unpreserved",
    )


BUG = Bug(
    id="A27",
    name="numa-unpreserve-mismatch",
    subject="kho: fix order calculation for kho_unpreserve_pages()",
    commit="8fd2f26fa2a3",
    broken="7.1-rc, with the fix of numa-span",
    fixed="7.1",
    release="7.3",
    without_fix={"unpreserve_splits_at_nodes": False},
    caught_by=("undo-restores-state",),
    story="""
What a range was cut into is not written down anywhere: whoever unpreserves it computes the blocks
again. When blocks were made to end where a node ends, only the side that preserves learned of it.

The other one computed the large block across the border, did not find it, and left the two that
there were. They went on to the successor, preserved for an owner that had given them up.

The fix has both sides use the same function.
""",
    scenario=scenario,
)
