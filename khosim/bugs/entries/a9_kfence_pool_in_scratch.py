"""A9: a part of the map lay in scratch."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage
from khosim.kernel.image import KernelConfig

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A kernel with KFENCE takes a handover over, and preserves a page in its turn."""
    config = KernelConfig(release=stage.release, kfence_objects=63)
    kernel = stage.boot("128M", config=config, kernel_size="4M", initrd="1M")
    successor = kernel.kexec()
    folio = successor.alloc_folio(owner="guest")
    successor.kho_preserve_folio(folio)
    successor.finalize()
    stage.tell("the second kernel preserves a page and finalizes the handover")
    for addr, size in successor.scratch_areas():
        stage.tell(f"scratch: {addr:#x} to {addr + size:#x}")


BUG = Bug(
    id="A9",
    name="kfence-pool-in-scratch",
    subject="kho: allocate metadata directly from the buddy allocator",
    commit="fa759cd75bce",
    broken="6.16 to 6.18-rc5",
    fixed="6.18-rc6",
    release="6.17",
    with_fix={"metadata_from_slab": False},
    caught_by=("map-outside-scratch",),
    story="""
The bitmaps of the map, and the chunks that list them, came from kmalloc. They are not preserved
themselves: the successor reads them first of all, while it touches nothing but scratch. So they
have to be anywhere but in scratch, and ordinary kernel memory is never there.

KFENCE is the exception. It lets kmalloc take an object from a pool of its own every now and then,
to catch those who use it wrongly. The pool is reserved early in boot; in a kernel that took a
handover over, early memory is scratch. At the next update the new kernel is copied to scratch, over
a part of the map that it then reads: bits that nobody set, an address that leads nowhere, once in a
while.

The fix takes whole pages from the page allocator, for what is a page anyway.
""",
    scenario=scenario,
)
