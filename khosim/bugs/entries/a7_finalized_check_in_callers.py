"""A7: what was preserved too late went missing without a word."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage
from khosim.errors import KernelError
from khosim.kernel.kho_vmalloc import KhoVmallocSlot, kho_preserve_vmalloc, kho_restore_vmalloc
from khosim.kernel.vmalloc import vmalloc

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """The handover is finalized; then somebody preserves a vmalloc area."""
    kernel = stage.boot("128M")
    area = vmalloc(kernel, 2 << 20, huge=True)
    assert area is not None
    where = kernel.alloc_folio(owner="driver")
    kernel.kho_preserve_folio(where)
    kernel.finalize()
    stage.tell("finalized: the bitmaps are listed, the root FDT is written")
    slot = KhoVmallocSlot(kernel, where.phys)
    try:
        kho_preserve_vmalloc(kernel, area, slot)
    except KernelError as refused:
        stage.tell(f"preserving an area now: refused, -{refused.name}")
        return
    stage.tell("preserving an area now: done, says the kernel")
    successor = kernel.kexec()
    assert successor.kho_restore_folio(where.phys) is not None
    restored = kho_restore_vmalloc(successor, KhoVmallocSlot(successor, where.phys))
    stage.tell(f"the successor has {'the area' if restored else 'no such area'}")
    stage.expect(
        restored is not None,
        "preserved-restorable",
        "an area was preserved without complaint, but after the map had been written",
        generation=1,
    )


BUG = Bug(
    id="A7",
    name="finalized-check-in-callers",
    subject="kho: check if kho is finalized in __kho_preserve_order()",
    commit="469661d0d3a5",
    broken="6.16, 6.17",
    fixed="6.18",
    release="6.18",
    without_fix={"busy_when_finalized": False},
    caught_by=("preserved-restorable",),
    story="""
Up to 6.18 the map is written when the handover is finalized: a list of the bitmaps that there are
by then. A block whose bitmap is made later is in none of them; so from then on preserving is to be
refused.

Each of the two calls that there were asked for itself whether it was too late. No call went wrong
in a release, but vmalloc areas were about to come, which use neither of the two: here one is
preserved as it would have been, without the question. The call succeeds, and nothing of it arrives.

The fix asks in the one function that sets the bits. (An area is then refused with -ENOMEM, not
-EBUSY: what fails is the page for its list.)
""",
    scenario=scenario,
)
