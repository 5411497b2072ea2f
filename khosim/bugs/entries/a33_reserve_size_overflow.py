"""A33: a preserved block of 4 GiB was not reserved at all."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A guest's 4 GiB are set aside at boot, and go over as one block of order 20."""
    cmdline = "kho=on kho_scratch=256M,64M,256M reserve_mem=4G:4G:guest"
    kernel = stage.boot("12G", cmdline=cmdline)
    found = kernel.reserve_mem.find_by_name("guest")
    assert found is not None
    start, nr_pages = found[0], found[1] >> 12
    stage.tell(f"preserved: {nr_pages} pages at {start:#x}, one block of order 20")
    successor = kernel.kexec()
    kind = successor.page(start >> 12).kind
    last = successor.page((start >> 12) + nr_pages - 1).kind
    stage.tell(f"in the successor the first page of it is {kind}, the last one {last}")


BUG = Bug(
    id="A33",
    name="reserve-size-overflow",
    subject="kho: fix size calculation in kho_preserved_memory_reserve()",
    commit="3a0b8fa2eb36",
    broken="6.16 to 7.1",
    fixed="7.2",
    release="7.1",
    with_fix={"reserve_size_is_int": False},
    caught_by=("map-agrees",),
    story="""
When the successor reserves a preserved block it computes its size as 1 << (order + PAGE_SHIFT), and
1 is an int in C. At order 19 (2 GiB) the result is negative, and the reservation reaches to the end
of the address space; from order 20 on the CPU shifts by 32 less, and 4 GiB become one byte.

Reserving a byte succeeds. So the block looked preserved while all of its memory but the first page
went to the page allocator, and the guest's memory was overwritten by whoever got it. While blocks
above MAX_PAGE_ORDER could not be restored anyway, nobody noticed; 7.1 lifted that.

The fix computes in 64 bits.
""",
    scenario=scenario,
)
