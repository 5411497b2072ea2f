"""D5: a retrieve that had failed was tried again, on what the first attempt had left."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import boot, fail_once, guest
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """Memory is short at the first attempt; the agent tries once more."""
    kernel = boot(stage)
    kernel.liveupdate.create_session("vm").preserve(guest(kernel), 1)
    successor = kernel.kexec()
    session = successor.liveupdate.retrieve_session("vm")
    fail_once(successor, "shmem_add_to_page_cache", after=2)
    stage.refuses("ENOMEM", "retrieving the memfd, short of memory", lambda: session.retrieve(1))
    stage.refuses("ENOMEM", "retrieving it once more", lambda: session.retrieve(1))
    session.close()
    for line in successor.messages:
        if line.startswith("WARNING"):
            stage.tell(line)


BUG = Bug(
    id="D5",
    name="retrieve-retry",
    subject="liveupdate: luo_file: remember retrieve() status",
    commit="f85b1c6af5bc",
    broken="6.19",
    fixed="7.0, 6.19.y",
    release="7.3",
    without_fix={"luo_remembers_retrieve": False},
    caught_by=("errno-as-documented", "luo-retrieved-once"),
    story="""
A handler's retrieve takes the pages of its file over, one after the other, and cleans up where it
fails half way: what it had by then is freed, and the record with it. There is nothing left that a
second attempt could work with.

LUO only noted a retrieve that had worked. After a failure the file still counted as not retrieved,
so the agent's next attempt ran the handler again over memory that had been freed, and finish, for
its part, freed it once more: warnings, and pages of others in danger.

The fix stores the error and returns it to whoever asks again, and tells the handler of it in
finish.
""",
    scenario=scenario,
)
