"""A30: the count of handovers began anew each time."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """Three kernels in a row; each reads who handed over to it, and how often that happened."""
    kernel = stage.boot("128M")
    for expected in (1, 2, 3):
        kernel = kernel.kexec()
        count = kernel.kho_in.kexec_count
        stage.tell(f"generation {kernel.generation} is told of {count} handovers")
        stage.expect(
            count == expected,
            "accounting-exact",
            f"generation {expected} was told of {count} handovers",
            generation=expected,
        )


BUG = Bug(
    id="A30",
    name="metadata-one-path",
    subject="kho: call kho_kexec_metadata_init() for both boot paths",
    commit="76aa46b9e404",
    broken="in review, before 7.1",
    fixed="7.1",
    release="7.1",
    without_fix={"kexec_metadata_on_kho_boot": False},
    caught_by=("accounting-exact",),
    story="""
kexec-metadata tells a kernel which release handed over to it, and how many handovers there were
since the last cold boot. Each kernel adds one to what it was told.

In an early version only one of the two ways through kho_init published it, that of a cold boot. A
kernel that had itself been handed to published nothing, so the third kernel of a chain was told
nothing, took 0 for the count, and so on. It was found before 7.1, in review and testing.

The fix calls the function on both ways.
""",
    scenario=scenario,
)
