"""A10: memory in scratch could be preserved."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage
from khosim.kernel.image import KernelConfig

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A folio for movable memory happens to lie in scratch, and is preserved."""
    config = KernelConfig(release=stage.release, debug=True)
    kernel = stage.boot("128M", config=config, kernel_size="4M", initrd="1M")
    for addr, size in kernel.scratch_areas():
        stage.tell(f"scratch: {addr:#x} to {addr + size:#x}")
    while True:
        folio = kernel.alloc_folio(6, owner="page cache", movable=True)
        if kernel.kho_scratch_overlap(folio.phys, folio.len_bytes):
            break
    what = f"preserving the folio at {folio.phys:#x}, which lies in scratch,"
    stage.refuses("EINVAL", what, lambda: kernel.kho_preserve_folio(folio))
    kernel.finalize()


BUG = Bug(
    id="A10",
    name="scratch-overlap-unchecked",
    subject="kho: warn and fail on metadata or preserved memory in scratch area",
    commit="e38f65d317df",
    broken="6.16 to 6.18-rc5",
    fixed="6.18-rc6",
    release="6.18",
    without_fix={"scratch_overlap_checked": False},
    caught_by=(
        "errno-as-documented",
        "preserved-outside-scratch",
    ),
    story="""
Scratch is where the next kernel lives before it knows what was preserved: its image is copied
there, and its first allocations come from there. While this kernel runs scratch is lent to movable
memory, such as the page cache.

Nothing kept anybody from preserving such a page. The successor then wrote its own image over it,
reserved what was left of it, and gave it back as if nothing had happened.

The fix refuses it with a warning. It is for developers: only CONFIG_KEXEC_HANDOVER_DEBUG has it.
""",
    scenario=scenario,
)
