"""D25: a field that must be zero was not looked at."""

from __future__ import annotations

from khosim.abi import liveupdate as uapi
from khosim.bugs.bug import Bug
from khosim.bugs.live import boot, guest
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """An agent, written for a kernel to come, finishes a session with a flag."""
    kernel = boot(stage)
    kernel.liveupdate.create_session("vm").preserve(guest(kernel), 1)
    successor = kernel.kexec()
    agent = successor.process("agent")
    device = agent.open("/dev/liveupdate")
    call = uapi.retrieve_session(b"vm")
    agent.ioctl(device, uapi.LIVEUPDATE_IOCTL_RETRIEVE_SESSION, call)
    session = uapi.RETRIEVE_SESSION.unpack(call)[1]
    flagged = bytearray(uapi.FINISH.pack(uapi.FINISH.size, 1))
    stage.refuses(
        "EINVAL",
        "FINISH with a 1 in its reserved field",
        lambda: agent.ioctl(session, uapi.LIVEUPDATE_SESSION_FINISH, flagged),
    )
    left = successor.liveupdate.sessions.incoming.sessions["vm"].file_set.count
    stage.tell(f"files that can still be retrieved: {left}")


BUG = Bug(
    id="D25",
    name="finish-reserved",
    subject="liveupdate: reject nonzero reserved value for SESSION_FINISH",
    commit="05cf3d87a0bf",
    broken="6.19 to 7.1, 7.2-rc",
    fixed="7.2",
    release="7.3",
    without_fix={"luo_checks_reserved": False},
    caught_by=("errno-as-documented",),
    story="""
Structures of system calls keep a field in reserve, and kernels refuse what they find in it: only
then can it mean something one day, and only then can a program find out whether its kernel knows.

SESSION_FINISH did not look. A program that sets a flag there, say "only those files that were
retrieved", would have been told that all went well by a kernel which has no such flag, and its
other files would have been freed.
""",
    scenario=scenario,
)
