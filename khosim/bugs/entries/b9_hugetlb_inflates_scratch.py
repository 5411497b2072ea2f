"""B9: scratch was sized by huge pages too, and then did not fit."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A third of the memory goes to gigantic pages at boot."""
    kernel = stage.boot("4G", cmdline="kho=on hugepagesz=1G hugepages=1")
    for line in kernel.messages:
        if "KHO" in line or "HugeTLB" in line:
            stage.tell(line)
    stage.expect(
        kernel.kho_enable,
        "kho-stays-on",
        "1 GiB of huge pages asked for 2 GiB of scratch, which do not fit: KHO is off",
    )


BUG = Bug(
    id="B9",
    name="hugetlb-inflates-scratch",
    subject="kho: exclude hugetlb memory from scratch size calculation",
    commit="fdd843f2be1a",
    broken="6.16 to 7.2",
    fixed="7.3",
    release="7.3",
    without_fix={"scratch_excludes_hugetlb": False},
    caught_by=("kho-stays-on",),
    story="""
Unless told otherwise, KHO reserves twice as much scratch as boot had reserved from memblock by
then: what this kernel needed, the next one will need too, and some more.

Huge pages that hugepages= takes at boot are memblock reservations as well. So a host that gives
most of its memory to guests in huge pages asked for twice that much as scratch. There is not so
much memory left, the reservation fails, and KHO turns itself off at boot: the next update of this
host is an ordinary reboot.

The fix leaves huge pages out of the sum, for the successor does not need scratch for them.
""",
    scenario=scenario,
)
