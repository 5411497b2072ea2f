"""B10: a successor that needed more early memory than scratch holds could not boot."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A machine with small scratch areas hands over: the successor has gigabytes to itself."""
    kernel = stage.boot(
        "4G", cmdline="kho=on kho_scratch=16M,16M,16M", kernel_size="4M", initrd="1M"
    )
    folio = kernel.alloc_folio(owner="guest")
    kernel.kho_preserve_folio(folio)
    stage.tell("three scratch areas of 16 MiB; one page of 4 GiB is preserved")
    stage.tell("struct pages of 4 GiB take 64 MiB, early in boot")
    successor = kernel.kexec()
    stage.tell(f"the successor is up with {successor.total_ram_pages() >> 8} MiB")


BUG = Bug(
    id="B10",
    name="early-boot-starvation",
    subject="kho: extend scratch",
    commit="14773e2aa4c5",
    broken="6.16 to 7.2",
    fixed="7.3",
    release="7.3",
    without_fix={"scratch_extension": False},
    caught_by=("kernel-survives",),
    story="""
Until it has reserved what was preserved, a successor may allocate in scratch only: anywhere else
it might hit a page that somebody wants back. Struct pages, hash tables and per-CPU areas are all
allocated in that time, and they grow with the machine.

Where scratch was too small for them the successor died in early boot, with gigabytes of memory
around it in which nothing was preserved.

Since 7.3 the successor walks the preserved-memory map before anything else, and opens every block
of 1 GiB in which neither a preserved page nor a page of the map lies to early allocations.
""",
    scenario=scenario,
)
