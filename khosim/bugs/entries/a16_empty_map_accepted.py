"""A16: a handover without a map was taken over."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A kernel of 6.19 that nobody finalized hands over; its map is still empty."""
    kernel = stage.machine("128M").boot("6.19", cmdline="kho=on reserve_mem=1M:4K:log")
    found = kernel.reserve_mem.find_by_name("log")
    assert found is not None
    kernel.ram.write(found[0], b"precious", kernel.by("driver"))
    stage.tell(f"6.19 hands over a root FDT and a reserve_mem region at {found[0]:#x}, and no map")
    successor = kernel.kexec(release=stage.release, finalize=False)
    for line in successor.messages:
        if "KHO" in line:
            stage.tell(line)


BUG = Bug(
    id="A16",
    name="empty-map-accepted",
    subject="kho: verify deserialization status and fix FDT alignment access",
    commit="53f8f064eba3",
    broken="6.16 to 6.18",
    fixed="6.19",
    release="6.18",
    with_fix={"empty_map_accepted": False},
    caught_by=("subtrees-reserved",),
    story="""
Where the root FDT lies, and where the map of what is preserved, are two things that a successor is
told. Up to 6.18 it took the handover over for the first and went on without the second: a map that
was missing or 0 meant that there was nothing to reserve, and a log message at most.

But it was a KHO boot from then on. Subtrees were found in the root FDT and believed: reserve_mem
revived its region at the old address, in memory that nobody had reserved and that early boot was
free to use, and so were the pages of the subtrees themselves.

A kernel of 6.19 writes such a root FDT until the handover is finalized, for the fix came with it:
from 6.19 on a successor that finds no map boots as if there were no handover, and says so.
""",
    scenario=scenario,
)
