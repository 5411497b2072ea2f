"""B11: EFI's memory map wiped scratch out."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage
from khosim.kernel.image import KernelConfig

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """An arm64 machine with EFI firmware is updated."""
    config = KernelConfig(release=stage.release, efi=True)
    kernel = stage.boot("512M", arch="arm64", config=config, kernel_size="4M", initrd="1M")
    folio = kernel.alloc_folio(owner="guest")
    kernel.kho_preserve_folio(folio)
    successor = kernel.kexec()
    stage.tell(f"the successor is up with {len(successor.scratch_areas())} scratch areas")


BUG = Bug(
    id="B11",
    name="efi-wipes-scratch",
    subject="efi: support booting with kexec handover (KHO) (subject not confirmed)",
    commit="",
    broken="6.16, 6.17",
    fixed="6.18",
    release="6.17",
    with_fix={"efi_keeps_scratch": True},
    caught_by=("kernel-survives",),
    story="""
On arm64 the device tree that a kernel is started with names memory, and in /chosen the handover.
Scratch is marked in memblock as soon as it is found there, and from then on nothing else may be
allocated.

With EFI firmware the kernel does not trust the device tree about memory. It throws away all that
memblock knows and fills it from the firmware's own map, which knows of no scratch. The confinement
remained, to areas that no longer existed: the first allocation failed, and the kernel was dead
before its console worked.

Since the fix what is marked as scratch stays when the rest is thrown away.
""",
    scenario=scenario,
)
