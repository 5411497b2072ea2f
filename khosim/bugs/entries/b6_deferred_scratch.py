"""B6: scratch was ordinary memory after a handover."""

from __future__ import annotations

from contextlib import suppress

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage
from khosim.errors import KernelError

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A guest of the successor gets as much memory as there is."""
    kernel = stage.boot("512M", cmdline="kho=on kho_scratch=32M,32M,64M")
    successor = kernel.kexec()
    scratch = successor.scratch_areas()
    stage.tell(f"scratch: {', '.join(f'{size >> 20} MiB at {addr:#x}' for addr, size in scratch)}")
    types = {successor.page(addr >> 12).migratetype for addr, _ in scratch}
    stage.tell(f"their pageblocks are of type {sorted(types)}")
    folios = []
    with suppress(KernelError):
        while True:
            folios.append(successor.alloc_folio(9, owner="guest"))
    for _ in range(4):
        folios.pop().put()
    for folio in folios:
        successor.kho_preserve_folio(folio)
    stage.tell(f"a guest gets all that there is, {2 * len(folios)} MiB, and it is preserved")


BUG = Bug(
    id="B6",
    name="deferred-scratch",
    subject="kho: fix deferred initialization of scratch areas",
    commit="bf480c613346",
    broken="7.2-rc (with deferred struct pages)",
    fixed="7.2",
    release="7.2",
    without_fix={"scratch_stays_cma": False},
    caught_by=("preserved-outside-scratch",),
    story="""
While a kernel runs, its scratch areas are lent to movable memory only. That is a property of their
pageblocks, which are of the type CMA. What cannot be moved away must not get there: it may be
preserved some day, and the next kernel is copied to these very places.

A successor gave its scratch that type early in boot, as it had always done. With deferred
initialisation most struct pages are set up later, and the thread that does it gives each pageblock
a type as well: the ordinary one. The areas were still listed, and held anything. Memory of a guest
was allocated in them, preserved, and overwritten at the next update.

The fix has the late initialisation ask where scratch is.
""",
    scenario=scenario,
)
