"""D24: the call that tells a session's name was checked as a different call."""

from __future__ import annotations

from khosim.abi import liveupdate as uapi
from khosim.bugs.bug import Bug
from khosim.bugs.live import boot
from khosim.bugs.stage import Stage

__all__ = ("BUG",)

NAME = b"a-virtual-machine"


def scenario(stage: Stage) -> None:
    """An agent asks for a session's name, with a buffer that was used before and with none."""
    kernel = boot(stage)
    agent = kernel.process("agent")
    device = agent.open("/dev/liveupdate")
    create = uapi.create_session(NAME)
    agent.ioctl(device, uapi.LIVEUPDATE_IOCTL_CREATE_SESSION, create)
    session = uapi.CREATE_SESSION.unpack(create)[1]

    def get_name(call: bytearray) -> None:
        agent.ioctl(session, uapi.LIVEUPDATE_SESSION_GET_NAME, call)

    used = bytearray(uapi.GET_NAME.pack(uapi.GET_NAME.size, 0, b"a name from an earlier call"))
    if stage.carries_out("GET_NAME into a buffer that was used", lambda: get_name(used)):
        stage.tell(f"it is {uapi.GET_NAME.unpack(used)[2].split(bytes(1))[0]!r}")
    short = bytearray(uapi.RETRIEVE_FD.pack(uapi.RETRIEVE_FD.size, 0, 0))
    stage.refuses("EINVAL", "GET_NAME with room for 8 letters", lambda: get_name(short))
    stage.tell(f"behind the header there is now {bytes(short[8:])!r}")


BUG = Bug(
    id="D24",
    name="getname-validation",
    subject="liveupdate: fix GET_NAME ioctl argument validation",
    commit="4416f8a9ed5f",
    broken="7.2-rc",
    fixed="7.2",
    release="7.3",
    without_fix={"luo_get_name_sized": False},
    caught_by=("call-succeeds", "errno-as-documented"),
    partly="what else of the kernel's stack reached user space",
    story="""
Each call on a session has a structure, and a table says how large it is and how much of it user
space must bring along. The line for GET_NAME was copied from RETRIEVE_FD and kept its structure:
16 bytes instead of 72.

So the kernel took the 64 bytes in which it is to write the name for an extension that it does not
know. Such must be zero: an agent who used the same buffer twice got -E2BIG. One who brought 16
bytes, without room for a name, was not refused but got the first 8 letters. And of the kernel's own
copy only 16 bytes were ever filled in, so what followed the name on its way out was left over from
an earlier use of the stack.

The fix names the structure of GET_NAME.
""",
    scenario=scenario,
)
