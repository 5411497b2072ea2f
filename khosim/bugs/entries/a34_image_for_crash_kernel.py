"""A34: a crash kernel was handed the crashed kernel's memory."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A kernel with preserved memory crashes."""
    kernel = stage.boot("1G", cmdline="kho=on crashkernel=256M")
    folio = kernel.alloc_folio(owner="guest")
    kernel.kho_preserve_folio(folio)
    kernel.finalize()
    stage.tell("256 MiB are set aside for a crash kernel; a page is preserved")
    capture = stage.crash(kernel, cmdline="kho=on")
    for line in capture.messages:
        if "KHO" in line:
            stage.tell(line)
    stage.tell(f"the capture kernel is up with {capture.total_ram_pages() >> 8} MiB")


BUG = Bug(
    id="A34",
    name="image-for-crash-kernel",
    subject="kho: skip KHO for crash kernel",
    commit="a6715d7ec472",
    broken="6.16 to 7.0",
    fixed="7.1, 7.0.y",
    release="7.0",
    with_fix={"fill_crash_image": False},
    caught_by=(
        "images-in-scratch",
        "kernel-survives",
    ),
    story="""
A crash kernel is loaded long before the crash, into memory that was set aside for it, and is to
know nothing of the memory around: that is what it is there to save.

Loading it went through the same function as any other image, so it was given the root FDT and the
scratch areas of the kernel that loaded it. The capture kernel believed them. It took the scratch of
the crashed kernel for the only memory that it may use, and looked for a root FDT that it has no
mapping of: it died in early boot, and there was no dump.

The fix leaves crash images alone.
""",
    scenario=scenario,
)
