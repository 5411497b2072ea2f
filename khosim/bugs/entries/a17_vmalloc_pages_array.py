"""A17: a restored area showed the first page of each block over and over."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage
from khosim.kernel.kho_vmalloc import KhoVmallocSlot, kho_preserve_vmalloc, kho_restore_vmalloc
from khosim.kernel.vmalloc import vmalloc

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A vmalloc area of huge blocks is written to, handed over and read."""
    kernel = stage.boot("128M")
    area = vmalloc(kernel, 2 << 20, huge=True)
    assert area is not None
    for page in range(512):
        area.write(page << 12, page.to_bytes(8, "little"))
    where = kernel.alloc_folio(owner="driver")
    kho_preserve_vmalloc(kernel, area, KhoVmallocSlot(kernel, where.phys))
    kernel.kho_preserve_folio(where)
    stage.tell(f"512 pages, each with its number in it, in blocks of order {area.page_order}")
    successor = kernel.kexec()
    assert successor.kho_restore_folio(where.phys) is not None
    restored = kho_restore_vmalloc(successor, KhoVmallocSlot(successor, where.phys))
    assert restored is not None
    read = [int.from_bytes(restored.read(page << 12, 8), "little") for page in range(512)]
    stage.tell(f"restored; pages 0 to 3 say {read[:4]}")
    stage.expect(
        read == list(range(512)),
        "content-equal",
        f"page 1 of the restored area is page {read[1]} of the preserved one",
        generation=1,
    )


BUG = Bug(
    id="A17",
    name="vmalloc-pages-array",
    subject="kho: kho_restore_vmalloc: fix initialization of pages array",
    commit="4bc84cd539df",
    broken="6.18",
    fixed="6.19",
    release="6.18",
    with_fix={"vmalloc_fills_pages": True},
    caught_by=("content-equal",),
    story="""
To give a preserved vmalloc area an address again, the successor collects its pages in an array and
maps them one behind the other. The list it goes by has an entry for each block, and a block may be
512 pages.

For each of the 512 it put the first page of the block into the array. The right pages were reserved
and restored, and their bytes were there; but reading the area showed the first page of each block
512 times, and writing went all to that one page.

The fix counts up within the block.
""",
    scenario=scenario,
)
