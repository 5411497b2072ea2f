"""A5: an image loaded too early was given a page of rubbish."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """An image is loaded, and nobody has finalized the handover."""
    kernel = stage.boot("128M")
    folio = kernel.alloc_folio(owner="guest")
    kernel.kho_preserve_folio(folio)
    stage.tell("a page is preserved; the image is loaded without writing to out/finalize")
    successor = kernel.kexec(finalize=False)
    for line in successor.messages:
        if "KHO" in line:
            stage.tell(line)


BUG = Bug(
    id="A5",
    name="fill-kimage-unfinalized",
    subject="kho: only fill kimage if KHO is finalized",
    commit="f322a97aeb2a",
    broken="6.16, 6.17.0 to 6.17.3",
    fixed="6.18, 6.17.4",
    release="6.17",
    with_fix={"fill_kimage": "finalized"},
    caught_by=(
        "handover-wellformed",
        "metadata-preserved",
    ),
    story="""
Up to 6.18 the root FDT is written when user space finalizes the handover. Its page is allocated at
boot and not even cleared.

Loading an image only asked whether KHO was on. So an image that was loaded first, or without any
finalizing at all, got the address of a page that held whatever its last user had left there, and
the successor was told to read it as a device tree. With luck it is none, and the kernel says so;
without luck it is an old one.

The fix gives the handover only to images that are loaded after it was finalized.
""",
    scenario=scenario,
)
