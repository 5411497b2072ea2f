"""D13: sessions that could not be read were missing, and nobody was told."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import boot, fail_once, guest
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """Memory is short while the second of two sessions is read."""
    kernel = boot(stage)
    for name in ("a", "b"):
        kernel.liveupdate.create_session(name).preserve(guest(kernel), 1)
    stage.tell("sessions 'a' and 'b' are handed over")
    successor = kernel.kexec()
    fail_once(successor, "luo_session_alloc", after=1)
    live = successor.liveupdate
    stage.refuses("EIO", "opening /dev/liveupdate, short of memory", live.open)
    stage.refuses("EIO", "opening it again", live.open)
    found = ", ".join(map(repr, live.sessions.incoming.sessions))
    stage.tell(f"of the two, the successor knows {found}")


BUG = Bug(
    id="D13",
    name="session-alloc-return",
    subject="liveupdate: fix return value on session allocation failure",
    commit="",
    broken="6.19, 7.0",
    fixed="7.1",
    release="7.3",
    without_fix={"luo_remembers_deserialize": False},
    caught_by=("errno-as-documented",),
    story="""
The predecessor's sessions are read when /dev/liveupdate is opened for the first time, and only
then. What came of it is remembered, for a kernel with half of the sessions must not look like one
with all of them: each later open is to fail like the first.

Without memory for a session the function returned the error and left the variable that remembers
it alone, which said 0. The first agent got an error; whoever opened the device next was let in, to
the sessions that had been read by then. The others were -ENOENT, as if nobody had ever handed them
over, and their memory stayed reserved.
""",
    scenario=scenario,
)
