"""A32: with 16 KiB pages the tree was one level short."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """Single pages and a larger block are preserved on a machine with 16 KiB pages."""
    kernel = stage.boot("1G", arch="arm64", page_size=16384)
    folio = kernel.alloc_folio(owner="guest")
    kernel.kho_preserve_folio(folio)
    stage.tell(f"a page is preserved, at {folio.phys:#x}")
    successor = kernel.kexec()
    for line in successor.messages:
        if "KHO" in line:
            stage.tell(line)


BUG = Bug(
    id="A32",
    name="tree-depth-16k",
    subject="kho: fix KHO_TREE_MAX_DEPTH for non-4KB page sizes",
    commit="d64b0372760e",
    broken="7.1-rc1 to rc5",
    fixed="7.1",
    release="7.1",
    without_fix={"tree_depth_ignores_order_bit": True},
    caught_by=(
        "handover-wellformed",
        "kernel-survives",
        "metadata-preserved",
    ),
    story="""
A block's key in the radix tree is its address with one bit more in front, which tells the order.
How many levels a tree needs follows from the bits of a key, and the formula had forgotten that one.

With 4 KiB pages it makes no difference, for the levels are rounded up. With 16 KiB pages it does:
the key of a single page has 51 bits, and four levels decide 50. The order bit fell off at the top,
so that single pages were entered as something else, and read back as blocks of absurd orders at
addresses that no machine has. The successor died on the first of them, in early boot.

The fix counts the bit. The format kept its name, for with 4 KiB and 64 KiB pages nothing changes.
""",
    scenario=scenario,
)
