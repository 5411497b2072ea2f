"""A11: one name for two formats."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A machine with Linux 6.17 is updated to the next release."""
    kernel = stage.machine("256M").boot("6.17", cmdline="kho=on")
    kernel.alloc_folios(20000, owner="guest")
    pages = [0x1000 << 12, 0x4800 << 12]
    for phys in pages:
        kernel.kho_preserve_phys(phys, 1 << 12)
    stage.tell(f"6.17 preserves pages of a guest at {', '.join(map(hex, pages))}")
    successor = kernel.kexec(release=stage.release)
    for line in successor.messages:
        if "KHO" in line:
            stage.tell(line)
    stage.tell(f"6.18 keeps {successor.pages.nr_pages('incoming')} pages as preserved")


BUG = Bug(
    id="A11",
    name="bitmap-size-abi-break",
    subject="kho: increase metadata bitmap size to PAGE_SIZE",
    commit="a2fff99f92da",
    broken="6.18 to 7.0 (this commit)",
    fixed="7.1, by kho-v3",
    release="6.18",
    with_fix={"kho_compatible": "kho-v2"},
    caught_by=("map-agrees",),
    story="""
The map of kho-v1 lists bitmaps: an address, and where the memory begins that its bits stand for.
How many bits there are is not written anywhere, it is a constant. In 6.18 it went from 4096 to
32768, a page for a bitmap, and the name of the format stayed "kho-v1".

A kernel of one side takes over from one of the other without any complaint. From old to new it
reads 512 bytes of bitmap and then whatever lies behind it, which are reservations that nobody made.
From new to old it reads the first eighth, and what the rest says is lost and overwritten.

What would have helped is what "compatible" is for: another name, so that the successor says that it
does not understand, and boots as if nothing had been preserved. kho-v3 brought that in 7.1; here it
is played on 6.18 with a name of its own.
""",
    scenario=scenario,
)
