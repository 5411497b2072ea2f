"""E12: a failed retrieve left the file's record behind."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import boot, fail_once
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """An empty memfd cannot be made again for want of memory."""
    kernel = boot(stage)
    session = kernel.liveupdate.create_session("vm")
    session.preserve(kernel.memfd("empty"), 1)
    pfn = session.session.file_set.files[0].serialized_data >> 12
    stage.tell(f"an empty memfd is preserved: all there is of it is its record, in pfn {pfn:#x}")
    successor = kernel.kexec()
    incoming = successor.liveupdate.retrieve_session("vm")
    fail_once(successor, "alloc_file_pseudo")
    stage.refuses("ENOMEM", "retrieving it, short of memory", lambda: incoming.retrieve(1))
    incoming.close()
    kind = successor.page(pfn).kind
    stage.tell(f"the session is closed; the record's page is {kind}")
    stage.expect(
        kind != "incoming",
        "failure-frees",
        f"the record at pfn {pfn:#x} waits for somebody to restore it, and nobody will",
        generation=successor.generation,
    )


BUG = Bug(
    id="E12",
    name="zero-size-retrieve-leak",
    subject="(commit not confirmed: one of those that made retrieve clean up after itself)",
    commit="",
    broken="6.19, 7.0",
    fixed="7.1",
    release="7.3",
    without_fix={"memfd_frees_header": False},
    caught_by=("failure-frees",),
    story="""
A memfd's record is a preserved page of its own. When the file was retrieved the record had served
its purpose and was freed, at the end of the function; each path that left the function earlier,
because something was refused, forgot it.

For a retrieve there is no second chance, and a file that somebody tried to retrieve is left alone
when its session is finished. So nobody came back for the page: it stayed reserved until the next
kexec. It is easiest to see with an empty file, which has nothing else.
""",
    scenario=scenario,
)
