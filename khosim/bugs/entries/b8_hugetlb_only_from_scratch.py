"""B8: each update left a host with fewer huge pages."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)

_GIB = 1 << 30


def scenario(stage: Stage) -> None:
    """A host with a gigantic page at boot is updated, with the same command line."""
    kernel = stage.boot("6G", cmdline="kho=on kho_scratch=192M,64M,192M hugepagesz=1G hugepages=2")
    before = kernel.huge_pages.get(_GIB, 0)
    stage.tell(f"the first kernel has {before} pages of 1 GiB")
    successor = kernel.kexec()
    after = successor.huge_pages.get(_GIB, 0)
    stage.tell(f"its successor has {after}")
    stage.expect(
        after == before,
        "huge-pages-kept",
        f"{before} pages of 1 GiB became {after}, though memory for them was free",
        generation=1,
    )


BUG = Bug(
    id="B8",
    name="hugetlb-only-from-scratch",
    subject="memblock: make HugeTLB bootmem allocation work with KHO",
    commit="7d163a75f821",
    broken="6.16 to 7.2",
    fixed="7.3",
    release="7.3",
    without_fix={"hugetlb_outside_scratch": False, "scratch_extension": False},
    caught_by=("huge-pages-kept",),
    story="""
Gigantic pages can only be had at boot, from memblock. In a successor memblock hands out scratch
and nothing else until preserved memory is reserved, and it was asked for gigantic pages in that
time: there is no GiB in one piece in scratch.

Where pages were found in scratch it was worse: huge pages are guests' memory, the very thing to be
preserved at the next update, and nothing in scratch can be preserved.

The fix gives huge pages an allocator of their own that looks at the whole of memory, leaves out
what was preserved, and leaves out the scratch areas.
""",
    scenario=scenario,
)
