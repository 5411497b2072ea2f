"""D18: a session was freed between being found and being used."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import boot, guest
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """Two threads ask for one session; the first is slow."""
    kernel = boot(stage)
    kernel.liveupdate.create_session("vm").preserve(guest(kernel), 1)
    sessions = kernel.kexec().liveupdate.sessions
    sessions.deserialize()

    def other() -> None:
        stage.tell("thread 2 retrieves 'vm', is done with it and closes it: it is freed")
        sessions.retrieve("vm").close()

    stage.tell("thread 1 looks for session 'vm' and finds it")
    sessions.retrieve("vm", meanwhile=other)
    stage.tell("thread 1 has its descriptor; thread 2 waited for the list")
    stage.refuses("EINVAL", "thread 2 retrieves 'vm'", lambda: sessions.retrieve("vm"))


BUG = Bug(
    id="D18",
    name="retrieve-toctou",
    subject="liveupdate: fix TOCTOU race in luo_session_retrieve()",
    commit="d3ae9e7fddb4",
    broken="6.19 to 7.1",
    fixed="7.2",
    release="7.3",
    without_fix={"luo_retrieve_holds_list": False},
    caught_by=("kernel-survives",),
    partly="two threads at once: here the second one is told when to come",
    story="""
The list of sessions has a lock, and each session has one of its own. To retrieve a session the
kernel took the first, looked for the name, gave the lock back, and then took the second: between
the two nothing held the session.

In that gap another thread can retrieve the same session, have all that it wants, and close it. The
last close takes the session off the list and frees it. The first thread then takes a lock that is
in freed memory and goes on from there.

The fix keeps the list's lock until the session has its descriptor. Taking a session off the list
has to wait that long, and the one who comes second is told -EINVAL.
""",
    scenario=scenario,
)
