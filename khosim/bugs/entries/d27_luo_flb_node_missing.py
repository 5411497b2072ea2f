"""D27: a node became mandatory, and the name of the format stayed."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import LIVE, guest
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """A live update from 6.19 to 7.0."""
    kernel = stage.machine("64M").boot("6.19", cmdline=LIVE)
    session = kernel.liveupdate.create_session("vm")
    session.preserve(guest(kernel), 1)
    stage.tell("Linux 6.19 hands session 'vm' over, as luo-v1")
    successor = kernel.kexec(release=stage.release)
    for line in successor.messages:
        if line.startswith("luo:"):
            stage.tell(line)
    file = successor.liveupdate.retrieve_session("vm").retrieve(1)
    stage.tell(f"the memfd begins with {file.read(0, 12)!r}")


BUG = Bug(
    id="D27",
    name="luo-flb-node-missing",
    subject="(never fixed: luo-v5 of 7.2 has another name) liveupdate: luo_flb: introduce "
    "File-Lifecycle-Bound global state",
    commit="cab056f2aae7",
    broken="7.0, 7.1",
    fixed="7.2",
    release="7.0",
    with_fix={"luo_flb_insisted": False},
    caught_by=("kernel-survives",),
    story="""
LUO's state begins with a name, "luo-v1". A successor that does not know the name refuses it, and
that is all the protection there is between kernels that mean different things by it.

7.0 brought shared objects, and with them a node of its own in that state. It writes the node
always, so it insists on it when it reads: without the node the state is torn, and LUO does not go
on with torn state but panics. The name stayed "luo-v1".

A 6.19 kernel writes "luo-v1" without the node. Updated to 7.0 the machine dies in early boot,
with all its guests. The right thing would have been a new name (then 7.0 had said that it cannot
read this, which is a panic as well) or to take a missing node for "no objects", as the fix here
does, which is khosim's own.
""",
    scenario=scenario,
)
