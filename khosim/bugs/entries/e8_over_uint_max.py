"""E8: of a very large memfd only the beginning was handed over."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import boot
from khosim.bugs.stage import Stage

__all__ = ("BUG",)

SIZE = (1 << 32) + 2 << 12


def scenario(stage: Stage) -> None:
    """A sparse memfd of 16 TiB and two pages, with something at its beginning and at its end."""
    kernel = boot(stage)
    file = kernel.memfd("guest", size=SIZE)
    file.write(0, b"the beginning")
    file.write(SIZE - 4096, b"the end")
    stage.tell(f"a memfd of {SIZE >> 12:#x} pages, two of which are used")
    session = kernel.liveupdate.create_session("vm")
    stage.refuses("EFBIG", "preserving it", lambda: session.preserve(file, 1))
    if not session.tokens:
        return
    got = kernel.kexec().liveupdate.retrieve_session("vm").retrieve(1)
    stage.tell(f"in the successor its last page begins with {got.read(SIZE - 4096, 7)!r}")


BUG = Bug(
    id="E8",
    name="over-uint-max",
    subject="mm/memfd_luo: reject memfds whose page count exceeds UINT_MAX",
    commit="d581fc99d3b9",
    broken="6.19, 7.0",
    fixed="7.1",
    release="7.3",
    without_fix={"memfd_checks_count": False},
    caught_by=("errno-as-documented", "luo-file-equal", "luo-wellformed"),
    story="""
To preserve a memfd all its folios are pinned, with an array of pointers that has room for as many
as the file has pages. That number was an unsigned int: 32 bits are enough for 16 TiB.

A file may be larger, if only because it is mostly holes. With two pages more than that the number
was 2: an array for two pointers, two pages pinned and preserved, and no error. In the successor the
file had its full size and nothing in it but these two pages.

The fix refuses such files with -EFBIG.
""",
    scenario=scenario,
)
