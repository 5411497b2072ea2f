"""B4: what was released as scratch was more than scratch."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A size for low memory is given that is no whole number of pageblocks."""
    kernel = stage.boot("256M", cmdline="kho=on kho_scratch=17M,16M,16M")
    for addr, size in kernel.scratch_areas():
        stage.tell(f"scratch: {addr:#x} to {addr + size:#x}")


BUG = Bug(
    id="B4",
    name="explicit-size-unaligned",
    subject="kho: make sure scratch size is always aligned by CMA_MIN_ALIGNMENT_BYTES",
    commit="0e39380a7316",
    broken="6.16 to 7.1",
    fixed="7.2",
    release="7.1",
    with_fix={"scratch_explicit_rounded": True},
    caught_by=("one-owner-per-page",),
    story="""
Scratch goes to the page allocator in whole pageblocks, 2 MiB each on x86, because that is what can
be of the type CMA. So sizes are rounded up to pageblocks; those that the command line gives for low
memory and for the area anywhere were forgotten.

With 17 MiB the last pageblock is half scratch and half somebody else's. All of it was released.
What was in the other half was then free and in use at the same time: here it had been free before
and is on two free lists, so that two users will get the same page.

The fix rounds every size.
""",
    scenario=scenario,
)
