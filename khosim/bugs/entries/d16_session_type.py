"""D16: calls for sessions of the predecessor worked on own ones, and the other way round."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import boot, guest
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """An agent mixes up the session it got and the one it makes."""
    kernel = boot(stage)
    kernel.liveupdate.create_session("old").preserve(guest(kernel), 1)
    successor = kernel.kexec()
    incoming = successor.liveupdate.retrieve_session("old")
    outgoing = successor.liveupdate.create_session("new")
    file = guest(successor)
    outgoing.preserve(file, 1)
    stage.tell("'old' came from the predecessor; 'new' is for the successor, with a memfd in it")
    stage.refuses("EINVAL", "finishing 'new'", outgoing.finish)
    stage.refuses(
        "EINVAL", "preserving into 'old'", lambda: incoming.preserve(guest(successor), 2)
    )
    for line in successor.messages:
        if line.startswith("WARNING"):
            stage.tell(line)


BUG = Bug(
    id="D16",
    name="session-type",
    subject="liveupdate: validate session type before performing operation",
    commit="507e3b479f9c",
    broken="6.19 to 7.1",
    fixed="7.2",
    release="7.3",
    without_fix={"luo_checks_session_type": False},
    caught_by=("errno-as-documented", "luo-no-leftovers"),
    story="""
A session from the predecessor is there to retrieve files from and to finish; one that the kernel
makes itself is there to preserve files in. Both are the same kind of descriptor, and the calls did
not ask which one they got.

Finishing an own session gives its files up as if they had come from the predecessor: the handler
tries to restore pages that are in use, LUO forgets the file, and what was preserved for it is
handed over to a successor that will never hear of it. A file preserved into an incoming session was
never written down for anybody, and the session's end finished it as if it had been received; the
blocks that 7.2 keeps files in stop at least that, with a warning, as can be seen here.

The fix gives each call the kinds of session that it is for, and answers -EINVAL for the others.
""",
    scenario=scenario,
)
