"""B3: a node without memory turned KHO off."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A machine has memory on node 0, and only processors on node 1."""
    kernel = stage.boot("256M", memoryless=[1])
    for line in kernel.messages:
        if "KHO" in line:
            stage.tell(line)
    stage.tell(f"{len(kernel.scratch_areas())} scratch areas")
    stage.expect(
        kernel.kho_enable,
        "kho-stays-on",
        "there is memory for scratch on each node that has any, and KHO is off",
    )


BUG = Bug(
    id="B3",
    name="memoryless-nodes",
    subject="kho: skip memoryless NUMA nodes when reserving scratch areas",
    commit="427b2535f513",
    broken="6.16 to 6.18",
    fixed="6.19, 6.18.y",
    release="6.18",
    with_fix={"scratch_skips_memoryless": True},
    caught_by=("kho-stays-on",),
    story="""
Besides two areas for all, each node gets scratch of its own, so that the successor can allocate
close to where it runs. The loop over the nodes took all that are online, and a node may have
processors or devices and no memory.

On such a node nothing can be allocated. That was a failure to reserve scratch, and with that KHO
turned itself off: on these machines there never was a handover.

The fix asks for nodes with memory.
""",
    scenario=scenario,
)
