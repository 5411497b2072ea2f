"""B2: a scratch area could not be left out."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """An area anywhere and one on the node are asked for, and none in low memory."""
    kernel = stage.boot("256M", cmdline="kho=on kho_scratch=0,32M,32M")
    for line in kernel.messages:
        if "kho" in line.lower():
            stage.tell(line)
    sizes = [size >> 20 for _, size in kernel.scratch_areas()]
    stage.tell(f"the scratch areas have {sizes} MiB")
    stage.expect(
        "Malformed early option 'kho_scratch'" not in kernel.messages,
        "call-succeeds",
        "kho_scratch=0,32M,32M was refused: the sizes are those of the default",
    )


BUG = Bug(
    id="B2",
    name="scratch-zero-rejected",
    subject="kho: allow scratch areas with zero size",
    commit="",
    broken="6.16, 6.17",
    fixed="6.18",
    release="6.17",
    with_fix={"scratch_arg_zeros": True},
    caught_by=("call-succeeds",),
    story="""
There are three kinds of scratch area: in low memory, anywhere, and on each node. Not every machine
needs all of them, and the sizes come as a triple.

Each of the three had to be larger than zero, or the whole argument was refused. A machine that
wanted no area in low memory had to give it one, or take what the default makes of it.

Since the fix only a triple of nothing but zeros is refused.
""",
    scenario=scenario,
)
