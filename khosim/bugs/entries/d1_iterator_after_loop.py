"""D1: an unknown token could make the head of a list pass for a file."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import boot, guest
from khosim.bugs.stage import Stage

__all__ = ("BUG",)

PAGE_OFFSET = 0xFFFF888000000000


def scenario(stage: Stage) -> None:
    """An agent asks for tokens that nobody ever preserved anything under."""
    kernel = boot(stage)
    session = kernel.liveupdate.create_session("vm")
    session.preserve(guest(kernel), 1)
    files = session.session.file_set.block_set.head_pa
    stage.tell(f"a memfd is preserved under token 1; its session's array of files is at {files:#x}")
    successor = kernel.kexec()
    incoming = successor.liveupdate.retrieve_session("vm")
    stage.refuses("ENOENT", "retrieving token 2", lambda: incoming.retrieve(2))
    token = PAGE_OFFSET + files
    stage.refuses("ENOENT", f"retrieving token {token:#x}", lambda: incoming.retrieve(token))


BUG = Bug(
    id="D1",
    name="iterator-after-loop",
    subject="liveupdate: luo_file: don't use invalid list iterator",
    commit="b2135d1cb0e3",
    broken="6.19-rc",
    fixed="6.19",
    release="6.19",
    without_fix={"luo_checks_token": False},
    caught_by=("kernel-survives",),
    story="""
A loop over a session's files looked for the token, and the line behind the loop asked whether the
file at which it had ended was the right one. Where no file matches, such a loop of the kernel ends
at no file: its cursor then points into the structure that holds the head of the list.

What lies there in the place of a token is the address of the array that the files were handed over
in. So nearly every unknown token was refused as it should be, but this one number, which a fuzzer
or a curious agent can try, passed: the kernel took a lock and called functions through whatever
happened to lie around the list's head.

The fix decides inside of the loop, and has nothing to ask afterwards.
""",
    scenario=scenario,
)
