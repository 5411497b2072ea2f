"""A8: taking back what was never there did not end."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A driver unwinds after an error, and takes back a page more than it preserved."""
    kernel = stage.boot("256M")
    folio = kernel.alloc_folio(3, owner="driver")
    stage.tell("a folio of order 3 was to be preserved, but it never came to that")
    kernel.kho_unpreserve_folio(folio)
    for line in kernel.messages:
        if "__kho_unpreserve" in line:
            stage.tell(line)
    stage.tell("taken back; the driver goes on")


BUG = Bug(
    id="A8",
    name="unpreserve-infinite-loop",
    subject="kho: warn and exit when unpreserved page wasn't preserved",
    commit="b05addf6f059",
    broken="6.16 to 6.18-rc5",
    fixed="6.18-rc6, 6.17.9",
    release="6.19",
    without_fix={"unpreserve_missing": "loop"},
    caught_by=("call-returns",),
    story="""
Unpreserving goes through a range block by block and clears a bit for each. Where the bitmap of a
block did not exist it went on with the next round of the loop, and forgot to go on in the range: it
looked for the same bitmap again, for ever.

It takes an error path to get there, one that takes back more than was preserved, as they do; and
then a CPU hangs in the kernel while the machine was only about to report an error.

The fix warns once and returns. (It is shown on 6.19, the first release in which anybody may
unpreserve; before that it took a failure inside of KHO itself.)
""",
    scenario=scenario,
)
