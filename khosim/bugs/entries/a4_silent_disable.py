"""A4: KHO was off, and nobody had been told."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """Scratch is to be larger than all memory; later somebody wants to update the kernel."""
    kernel = stage.boot("256M", cmdline="kho=on kho_scratch=1G,1G,1G")
    for line in kernel.messages:
        if "KHO" in line:
            stage.tell(line)
    stage.expect(not kernel.kho_enable, "kho-stays-on", "scratch of 1 GiB fits into 256 MiB")
    stage.expect(
        any("disabling kexec handover" in line for line in kernel.messages),
        "failure-is-told",
        "KHO has turned itself off without a word",
    )


BUG = Bug(
    id="A4",
    name="silent-disable",
    subject="kho: warn if KHO is disabled due to an error",
    commit="",
    broken="6.16.0 to 6.16.3",
    fixed="6.17, 6.16.4",
    release="6.16",
    with_fix={"scratch_failure_told": "that"},
    caught_by=("failure-is-told",),
    story="""
When scratch cannot be reserved there can be no handover, and KHO turns itself off at boot. It did
so without a line in the log.

From then on everything seemed to work: images load, the kernel jumps. Only afterwards the owner of
the memory learns that it was an ordinary kexec and that all is gone.

The fix is the line.
""",
    scenario=scenario,
)
