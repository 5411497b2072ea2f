"""A26: one preserved block covered memory of two nodes."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A range that crosses from node 0 to node 1 is preserved in one call."""
    # Two nodes that meet at an odd MiB: a natural block of 2 MiB would lie across the border.
    kernel = stage.boot("256M", nodes=["129M", "127M"])
    border = 129 << 20
    stage.tell(f"node 0 ends and node 1 begins at {border:#x}")
    first, nr_pages = (border >> 12) - 256, 512
    kernel.kho_preserve_pages(first, nr_pages)
    stage.tell(f"preserve {nr_pages} pages from pfn {first:#x}: the border is in the middle")


BUG = Bug(
    id="A26",
    name="numa-span",
    subject="kho: make sure preservations do not span multiple NUMA nodes",
    commit="91e74fa8b1bc",
    broken="6.16 to 7.0",
    fixed="7.1",
    release="7.3",
    without_fix={"preserve_splits_at_nodes": False},
    caught_by=("one-node-per-block",),
    story="""
kho_preserve_pages cuts a range into the largest naturally aligned blocks. Nothing asked where one
NUMA node ends and the next begins, so a block could have its first page on one node and its last
on another.

The successor initialises the struct pages of a block as a whole and takes the node of its first
page for all of them: pages of node 1 are then counted, and after their restore freed, as pages of
node 0.

The fix halves a block until its first and its last page are on the same node.
""",
    scenario=scenario,
)
