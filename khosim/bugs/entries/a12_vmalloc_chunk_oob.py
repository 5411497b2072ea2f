"""A12: a full chunk was read beyond its end."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage
from khosim.kernel.kho_vmalloc import KhoVmallocSlot, kho_preserve_vmalloc, kho_restore_vmalloc
from khosim.kernel.vmalloc import vmalloc

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A vmalloc area fills a chunk to the last entry; the page behind it belongs to somebody."""
    kernel = stage.boot("128M")
    area = vmalloc(kernel, 511 << 12)
    assert area is not None
    where = kernel.alloc_folio(owner="driver")
    slot = KhoVmallocSlot(kernel, where.phys)
    kho_preserve_vmalloc(kernel, area, slot)
    kernel.kho_preserve_folio(where)
    chunk = slot.load().first
    stage.tell(f"511 pages are preserved: the chunk at {chunk:#x} is full")
    successor = kernel.kexec()
    behind = chunk + (4 << 10)
    stage.tell(f"the page behind it, at {behind:#x}, is {successor.page(behind >> 12).kind}")
    successor.ram.write_u64(behind, 0x1000, successor.by("driver"))
    assert successor.kho_restore_folio(where.phys) is not None
    restored = kho_restore_vmalloc(successor, KhoVmallocSlot(successor, where.phys))
    stage.tell(f"the area is {'restored' if restored else 'not restored'}")
    stage.expect(
        restored is not None,
        "preserved-restorable",
        "an area of 511 pages was preserved and cannot be restored",
        generation=1,
    )


BUG = Bug(
    id="A12",
    name="vmalloc-chunk-oob",
    subject="kho: fix out-of-bounds access of vmalloc chunk",
    commit="",
    broken="6.18-rc1 to rc5",
    fixed="6.18-rc6",
    release="6.18",
    without_fix={"vmalloc_chunk_bounded": False},
    caught_by=("preserved-restorable",),
    story="""
A vmalloc area crosses the handover as a list of page addresses, 511 to a chunk page. The loops over
a chunk ended at the first entry that is zero, for a chunk that is not full has one.

A full chunk has none. The loop went on into the page behind the chunk and took what it found there
for addresses of preserved pages: restoring failed with a complaint about a page that had no magic,
or, when the list was unpreserved, other people's pages were.

The fix counts to 511 as well.
""",
    scenario=scenario,
)
