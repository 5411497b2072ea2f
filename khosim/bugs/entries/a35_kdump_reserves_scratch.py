"""A35: a crash kernel reserved scratch of its own in the little memory it has."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A kernel crashes; the capture kernel has kho=on on its command line as well."""
    kernel = stage.boot("1G", cmdline="kho=on crashkernel=256M")
    stage.tell("256 MiB are set aside for a crash kernel, which is loaded with kho=on")
    capture = stage.crash(kernel, cmdline="kho=on")
    taken = sum(size for _, size in capture.scratch_areas())
    stage.tell(f"the capture kernel boots; {taken >> 20} MiB of its memory are scratch")
    stage.expect(
        not taken,
        "kdump-undisturbed",
        f"the capture kernel put {taken >> 20} MiB of the crash kernel's memory aside for a "
        "handover that it will never make",
        generation=capture.generation,
    )


BUG = Bug(
    id="A35",
    name="kdump-reserves-scratch",
    subject="kho: do not reserve scratch in a kdump kernel (subject not confirmed)",
    commit="",
    broken="6.16 to 7.2",
    fixed="7.3",
    release="7.3",
    without_fix={"kdump_guard": False},
    caught_by=("kdump-undisturbed",),
    story="""
A crash kernel lives in the memory that crashkernel= set aside, often 256 MiB. Distributions boot
it with nearly the command line of the kernel that crashed, kho=on included, so it sized scratch
areas for a handover and reserved them: twice what its own boot had reserved.

What was left was too little to write the dump, and the capture kernel ran out of memory: no dump,
just when one was needed.

The fix asks is_kdump_kernel() first and turns KHO off, with a line in the log.
""",
    scenario=scenario,
)
