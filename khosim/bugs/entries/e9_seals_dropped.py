"""E9: a sealed memfd came back unsealed."""

from __future__ import annotations

from khosim.abi.memfd import F_SEAL_GROW, F_SEAL_SHRINK
from khosim.bugs.bug import Bug
from khosim.bugs.live import boot, guest
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """Guest memory is sealed against changes of its size, as a device in user space asks for."""
    kernel = boot(stage)
    file = guest(kernel)
    file.add_seals(F_SEAL_SHRINK | F_SEAL_GROW)
    kernel.liveupdate.create_session("vm").preserve(file, 1)
    stage.tell("a memfd that can neither shrink nor grow is handed over")
    got = kernel.kexec().liveupdate.retrieve_session("vm").retrieve(1)
    stage.refuses("EPERM", "shrinking it in the successor", lambda: got.ftruncate(4096))


BUG = Bug(
    id="E9",
    name="seals-dropped",
    subject="mm: memfd_luo: preserve file seals",
    commit="",
    broken="6.19, 7.0",
    fixed="7.1",
    release="7.3",
    without_fix={"memfd": "memfd-v1"},
    caught_by=("errno-as-documented", "luo-file-equal"),
    story="""
Seals on a memfd are promises to others who map it: that it will not shrink under them, for then
they would get SIGBUS, or that nobody writes to it any more. Once set, a seal cannot be taken off.

The record of memfd-v1 has no place for them, and the file that the successor made of it had none.
It could not even get them back: a memfd that was made without the permission to seal is sealed
against sealing. The other process, which had checked the seals once and relied on them for good,
was exposed again to what they were to keep away.

memfd-v2 has a field for seals, and the successor sets them before anybody has the file.
""",
    scenario=scenario,
)
