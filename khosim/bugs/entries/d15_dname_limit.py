"""D15: which session a descriptor belongs to could not be read off /proc."""

from __future__ import annotations

from functools import partial

from khosim.abi import liveupdate as uapi
from khosim.bugs.bug import Bug
from khosim.bugs.live import boot
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """An agent looks at its descriptors in /proc/self/fd."""
    kernel = boot(stage)
    agent = kernel.process("agent")
    device = agent.open("/dev/liveupdate")
    for name in (b"vm", b"vm-0123456789abcdef-0123456789abcdef-disk"):
        call = uapi.create_session(name)
        agent.ioctl(device, uapi.LIVEUPDATE_IOCTL_CREATE_SESSION, call)
        fd = uapi.CREATE_SESSION.unpack(call)[1]
        what = f"readlink of a session with {len(name)} letters"
        if stage.carries_out(what, partial(agent.readlink, fd)):
            stage.tell(f"it is {agent.readlink(fd)}")


BUG = Bug(
    id="D15",
    name="dname-limit",
    subject="dcache: permit dynamic_dname()s up to NAME_MAX",
    commit="97b67e64affb",
    broken="6.19, 7.0",
    fixed="7.1, 7.0.y",
    release="7.3",
    without_fix={"dname_max_bytes": 64},
    caught_by=("call-succeeds",),
    partly="of /proc there is only this one call, for files that need no path",
    story="""
A session's descriptor is an anonymous file, and its name holds the session's: what
/proc/PID/fd/N shows is "anon_inode:[luo_session] " and then up to 63 bytes. Tools that take a
machine apart after a fault, or a new agent that inherited descriptors, look there.

The function behind it made such names in a buffer of 64 bytes and refused longer ones. The fixed
part takes 25, so from 39 letters on readlink of a session said -ENAMETOOLONG, for a file that is
open and well.

The limit is that of file names since, 255 bytes.
""",
    scenario=scenario,
)
