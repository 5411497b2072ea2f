"""D14: sessions without a name, and with only a part of theirs."""

from __future__ import annotations

from khosim.abi import liveupdate as uapi
from khosim.bugs.bug import Bug
from khosim.bugs.live import boot
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """An agent creates sessions whose names are too short and too long."""
    kernel = boot(stage)
    agent = kernel.process("agent")
    device = agent.open("/dev/liveupdate")

    def create(name: bytes) -> None:
        agent.ioctl(device, uapi.LIVEUPDATE_IOCTL_CREATE_SESSION, uapi.create_session(name))

    stage.refuses("EINVAL", "a session with an empty name", lambda: create(b""))
    stage.refuses("EINVAL", "one with 64 letters, no NUL", lambda: create(b"v" * 63 + b"1"))
    for name in kernel.liveupdate.sessions.outgoing.sessions:
        stage.tell(f"there is a session called {name!r}")
    stage.carries_out("a session with the first 63 of them", lambda: create(b"v" * 63))


BUG = Bug(
    id="D14",
    name="session-name-length",
    subject="liveupdate: reject LIVEUPDATE_IOCTL_CREATE_SESSION with invalid name length",
    commit="e947433cd0d2",
    broken="6.19 to 7.1",
    fixed="7.2",
    release="7.3",
    without_fix={"luo_checks_names": False},
    caught_by=("call-succeeds", "errno-as-documented"),
    story="""
The call that creates a session has 64 bytes for its name, and no length beside it. Of what user
space wrote there the kernel kept up to 63 bytes and added the NUL itself.

An empty name was as good as any other. A name that filled all of the 64 bytes lost its last letter
without a word: the agent of the next kernel, who asks for the name that it knows, does not find
the session, and two names that differ in that letter are one.

Both are -EINVAL since: a name has 1 to 63 bytes and its NUL.
""",
    scenario=scenario,
)
