"""E5: after an error the wrong pages were freed."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import boot, fail_once, guest
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """Memory gets short while a memfd is put together."""
    kernel = boot(stage)
    file = guest(kernel, pages=8)
    kernel.liveupdate.create_session("vm").preserve(file, 1)
    pfns = [pfn for run in file.inode.mapping for pfn in range(run.pfn, run.pfn + run.nr_pages)]
    stage.tell(f"a memfd of 8 pages, from pfn {min(pfns):#x} to {max(pfns):#x}, is handed over")
    successor = kernel.kexec()
    session = successor.liveupdate.retrieve_session("vm")
    fail_once(successor, "shmem_add_to_page_cache", after=2)
    what = "retrieving it, short of memory at the third"
    stage.refuses("ENOMEM", what, lambda: session.retrieve(1))
    session.close()
    left = [pfn for pfn in pfns if successor.page(pfn).kind == "incoming"]
    stage.tell(f"the session is closed; {len(left)} pages are still reserved")
    stage.expect(
        not left,
        "failure-frees",
        f"{len(left)} pages of the memfd wait for somebody to restore them, and nobody will",
        generation=successor.generation,
    )


BUG = Bug(
    id="E5",
    name="put-folios-pfn",
    subject="mm/memfd_luo: fix physical address conversion in put_folios cleanup",
    commit="",
    broken="6.19, 7.0",
    fixed="7.1",
    release="7.3",
    without_fix={"memfd_puts_by_address": False},
    caught_by=("failure-frees",),
    story="""
When a memfd cannot be put together again, the folios behind the one that failed have to be restored
all the same, for only then can they be freed: there is no second attempt.

The loop that does it passed the record's page frame number to a function that takes an address.
Page 0x5000 of the machine is at address 0x5000000; what was "restored" instead is page 5, the one
at address 0x5000. Nothing preserved lies there, so the function refused, and the pages meant stayed
reserved until the next kexec. (In a kernel that cannot tell preserved pages from others it would
have freed somebody's page.)

The fix makes an address of the number, and skips holes, whose number is 0.
""",
    scenario=scenario,
)
