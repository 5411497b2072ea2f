"""B1: rubbish behind the sizes was accepted."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A line with a slip of the keyboard in it boots."""
    kernel = stage.boot("256M", cmdline="kho=on kho_scratch=16M,16M,16Mfoo")
    for line in kernel.messages:
        if "kho" in line.lower():
            stage.tell(line)
    stage.expect(
        "Malformed early option 'kho_scratch'" in kernel.messages,
        "errno-as-documented",
        "kho_scratch=16M,16M,16Mfoo was accepted and not refused with -EINVAL",
    )


BUG = Bug(
    id="B1",
    name="scratch-arg-trailing",
    subject="kho: make sure kho_scratch argument is fully consumed",
    commit="",
    broken="6.16, 6.17",
    fixed="6.18",
    release="6.17",
    with_fix={"scratch_arg_consumed": True},
    caught_by=("errno-as-documented",),
    story="""
kho_scratch= takes three sizes. They were read one after the other, and what followed the third was
not looked at: "16M,16M,16Mfoo" was as good as "16M,16M,16M", and so was a fourth size.

A mistake in a boot line that nobody is told of is one that stays, until a size that was meant is
missing.

The fix wants the argument to end where the third size ends.
""",
    scenario=scenario,
)
