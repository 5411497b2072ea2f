"""A21: a failure to preserve was reported as success."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage
from khosim.kernel.kho_vmalloc import KhoVmallocSlot, kho_preserve_vmalloc
from khosim.kernel.vmalloc import vmalloc

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """There is no memory for the second chunk of a vmalloc area's list."""
    kernel = stage.boot("128M")
    area = vmalloc(kernel, 600 << 12)
    assert area is not None
    where = kernel.alloc_folio(owner="driver")
    slot = KhoVmallocSlot(kernel, where.phys)
    chunks = iter([False, True])
    kernel.pages.fail = lambda order, owner: owner == "new_vmalloc_chunk" and next(chunks)
    stage.tell("600 pages want two chunks; for the second one there is no memory")
    stage.refuses("ENOMEM", "preserving the area", lambda: kho_preserve_vmalloc(kernel, area, slot))
    kernel.pages.fail = None
    kernel.kho_preserve_folio(where)


BUG = Bug(
    id="A21",
    name="vmalloc-enomem-zero",
    subject="kho_preserve_vmalloc(): don't return 0 when ENOMEM",
    commit="412a32f0e53f",
    broken="6.18",
    fixed="7.0, 6.19.y",
    release="6.18",
    with_fix={"vmalloc_enomem_told": True},
    caught_by=("errno-as-documented",),
    story="""
A long vmalloc area takes more than one chunk page for its list. Where there was no memory for
another one the function took everything back that it had preserved, properly, and then returned the
last error it had seen. That was 0: it had not stored one for this case.

The caller hands its descriptor over and trusts that the area will be there. It leads to a chunk
that was freed long before.

The fix sets the error.
""",
    scenario=scenario,
)
