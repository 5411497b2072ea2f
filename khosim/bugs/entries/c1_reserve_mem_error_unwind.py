"""C1: a failure half way left everything preserved."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage
from khosim.kernel.image import KernelConfig

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A successor gets one more reserve_mem region, and it lies where nothing can be preserved."""
    config = KernelConfig(release=stage.release, debug=True)
    old, new = "reserve_mem=1M:4K:old", "reserve_mem=1M:4K:new"
    kernel = stage.boot("256M", cmdline=f"kho=on {old}", config=config)
    successor = kernel.kexec(cmdline=f"kho=on {old} {new}")
    for line in successor.messages:
        if "memblock FDT" in line or "overlap" in line or "Revived" in line:
            stage.tell(line)
    successor.finalize()
    pages = stage.preserved_pages(successor)
    stage.tell(f"{pages} pages are preserved, one of them for the root FDT")
    stage.expect(
        pages == 1,
        "undo-restores-state",
        f"reserve_mem gave up and left {pages - 1} pages preserved",
        generation=1,
    )


BUG = Bug(
    id="C1",
    name="reserve-mem-error-unwind",
    subject="memblock: unpreserve memory in case of error",
    commit="f5bfd4793a93",
    broken="6.16 to 6.18",
    fixed="6.19",
    release="6.19",
    without_fix={"reserve_mem_unwinds": False},
    caught_by=("undo-restores-state",),
    story="""
reserve_mem preserves a page for its own subtree, then region after region. When one of them failed
the rest of the function was skipped, an error was logged, and what had been preserved by then
stayed so, the subtree's page and the first regions alike, with nothing that would lead to them.

It takes a reason to fail. Here it is a region that is new on the command line of a successor:
memory for it can only come from scratch, and a kernel built for debugging refuses to preserve that.

The fix takes back what was done. (It came in 6.19, together with the code that is shown; before, a
notifier did the same when the handover was finalized.)
""",
    scenario=scenario,
)
