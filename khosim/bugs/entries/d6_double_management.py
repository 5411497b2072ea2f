"""D6: one file could be preserved twice."""

from __future__ import annotations

from khosim.bugs.bug import Bug
from khosim.bugs.live import boot, guest
from khosim.bugs.stage import Stage

__all__ = ("BUG",)


def scenario(stage: Stage) -> None:
    """Two sessions want the same memfd."""
    kernel = boot(stage)
    file = guest(kernel)
    first, second = (kernel.liveupdate.create_session(name) for name in ("a", "b"))
    first.preserve(file, 1)
    stage.tell("session 'a' preserves a memfd")
    stage.refuses("EBUSY", "session 'b' preserves it as well", lambda: second.preserve(file, 1))
    kernel.kexec()


BUG = Bug(
    id="D6",
    name="double-management",
    subject="liveupdate: prevent double management of files",
    commit="00d0b372374f",
    broken="6.19, 7.0",
    fixed="7.1",
    release="7.3",
    without_fix={"luo_one_owner": False},
    caught_by=("errno-as-documented", "luo-one-owner"),
    story="""
Within one session a token can be used once, but nothing kept a file from being preserved under two
tokens, or in two sessions. Its handler wrote a record each time, and both records named the same
folios.

The successor believes records. The session that comes first restores the folios and makes a file
of them; the second one asks for pages that are somebody's already: with luck they are refused, and
its agent has lost a file that it was promised.

The fix keeps a table of all files that LUO has, by an identity that their handler gives, and
answers -EBUSY at the second attempt.
""",
    scenario=scenario,
)
