"""What the kit does with live updates: sessions, memfds in them, and the step into the next kernel.

As an agent would (``Documentation/userspace-api/liveupdate.rst`` @ 7.3): a file is in one session,
an incoming session is retrieved once and finished once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from khosim.errors import InputError
from khosim.testing.ops_memory import MEMORY, VMALLOC
from khosim.testing.rules import Operation
from khosim.testing.step import Thing, Written

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from khosim.testing.life import Life

__all__ = ("KEXEC", "LOAD", "SESSIONS", "STANDARD", "chosen")

_PICK = st.integers(0, 7)
_TOKENS = (0, 1, 2, (1 << 64) - 1)
_SLOT = 4096
_MEMFDS_MAX, _SESSIONS_MAX = 6, 4
_OPEN = "kernel.liveupdate.open().close()"


def _create_session(life: Life) -> Written | None:
    if len(life.of("session", "preserved")) >= _SESSIONS_MAX:
        return None
    name = life.fresh("session")

    def done() -> None:
        life.add(name, "session")
        life.things[name].state = "preserved"

    # The first to open the device reads what came; memory that is missing then is missing forever.
    before = (_OPEN,) if life.rules.faults is not None else ()
    return Written(f"{name} = kernel.liveupdate.create_session({name!r})", done, before=before)


def _close_session(life: Life, pick: int) -> Written | None:
    session = life.pick(pick, "session", "preserved")
    if session is None:
        return None

    def done() -> None:
        del life.things[session.name]
        for file in _files_of(life, session):
            file.state = "held"

    return Written(f"{session.name}.close()", done)


def _files_of(life: Life, session: Thing) -> list[Thing]:
    return [file for file in life.of("memfd") if file.facts["session"] == session.name]


def _memfd(life: Life, nr_pages: int) -> Written | None:
    if len(life.of("memfd")) >= _MEMFDS_MAX:
        return None
    name = life.fresh("memfd")
    size = nr_pages * _SLOT
    return Written(
        f"{name} = kernel.memfd({name!r}, size={size})",
        lambda: life.add(name, "memfd", size=size, content={}, session=""),
    )


def _write_memfd(life: Life, pick: int, slot: int, content: bytes) -> Written | None:
    file = life.pick(pick, "memfd", "held", "preserved", "arrived")
    if file is None or not file.facts["size"]:
        return None
    at = slot * _SLOT % file.facts["size"]

    def done() -> None:
        old = file.facts["content"].get(at, b"")
        file.facts["content"][at] = content + old[len(content) :]

    return Written(f"{file.name}.write({at}, {content!r})", done)


def _preserve_file(life: Life, pick: int, session: int, token: int) -> Written | None:
    file = life.pick(pick, "memfd", "held")
    into = life.pick(session, "session", "preserved")
    if file is None or into is None:
        return None
    if token in [other.facts["token"] for other in _files_of(life, into)]:
        return None

    def done() -> None:
        file.state = "preserved"
        file.facts.update(session=into.name, token=token)

    return Written(f"{into.name}.preserve({file.name}, token={token})", done)


def _retrieve_session(life: Life, pick: int) -> Written | None:
    session = life.pick(pick, "session", "incoming")
    if session is None:
        return None

    def done() -> None:
        session.state = "arrived"

    name = session.name
    return Written(f"{name} = kernel.liveupdate.retrieve_session({name!r})", done)


def _retrieve_file(life: Life, pick: int) -> Written | None:
    found = [
        file
        for session in life.of("session", "arrived")
        for file in _files_of(life, session)
        if file.state == "incoming"
    ]
    if not found:
        return None
    file = found[pick % len(found)]
    name = file.name

    def done() -> None:
        file.state = "arrived"

    after = [f"assert {name}.size == {file.facts['size']}"]
    for at, content in sorted(file.facts["content"].items()):
        after.append(f"assert {name}.read({at}, {len(content)}) == {content!r}")
    source = f"{name} = {file.facts['session']}.retrieve({file.facts['token']})"
    return Written(source, done, after=tuple(after))


def _finish_session(life: Life, pick: int) -> Written | None:
    session = life.pick(pick, "session", "arrived")
    if session is None:
        return None

    def done() -> None:
        del life.things[session.name]
        for file in _files_of(life, session):
            file.facts["session"] = ""
            if file.state == "arrived":
                file.state = "held"
            else:
                del life.things[file.name]

    return Written(f"{session.name}.finish()\n{session.name}.close()", done)


_CONTENT = st.binary(min_size=1, max_size=4)
_SIMPLEST = {"pick": 0, "session": 0, "nr_pages": 1, "slot": 0, "token": 0, "content": b"a"}


def _op(
    name: str, write: Any, weight: int, *needs: str, can_fail: bool = False, **args: Any
) -> Operation:
    # needs: "KIND STATE ..." each, of the things of which there has to be one.
    simplest = {arg: _SIMPLEST[arg] for arg in args}

    def when(life: Life) -> bool:
        if not life.kernel.liveupdate.enabled:
            return False
        return all(life.of(*need.split()) for need in needs)

    return Operation(name, write, args, weight, can_fail=can_fail, when=when, simplest=simplest)


SESSIONS: tuple[Operation, ...] = (
    _op("create_session", _create_session, 4, can_fail=True),
    _op("close_session", _close_session, 2, "session preserved", pick=_PICK),
    _op("memfd", _memfd, 4, nr_pages=st.integers(0, 5)),
    _op(
        "write_memfd",
        _write_memfd,
        4,
        "memfd held preserved arrived",
        pick=_PICK,
        slot=st.integers(0, 4),
        content=_CONTENT,
    ),
    _op(
        "preserve_file",
        _preserve_file,
        8,
        "memfd held",
        "session preserved",
        can_fail=True,
        pick=_PICK,
        session=_PICK,
        token=st.sampled_from(_TOKENS),
    ),
    _op("retrieve_session", _retrieve_session, 6, "session incoming", pick=_PICK),
    _op("retrieve_file", _retrieve_file, 8, "memfd incoming", "session arrived", pick=_PICK),
    _op("finish_session", _finish_session, 4, "session arrived", pick=_PICK),
)
"""Sessions and memfds."""

KEXEC = Operation("kexec", lambda life: life.kexec(), {}, 4)
"""The step into the next kernel; always there."""

def _can_load(life: Life) -> bool:
    # Where a handover is finalized nothing can be preserved behind it.
    return not life.is_loaded and not life.kernel.release.finalize


LOAD = Operation("load_image", lambda life: life.load(), {}, 1, when=_can_load)
"""The next kernel is loaded, and jumped to when a kexec is next."""

_GROUPS = {"memory": MEMORY, "vmalloc": VMALLOC, "sessions": SESSIONS}
STANDARD: tuple[Operation, ...] = (*MEMORY, *VMALLOC, *SESSIONS, LOAD, KEXEC)
"""All that the kit brings along."""


def chosen(ops: Iterable[Operation], standard: Sequence[str]) -> tuple[Operation, ...]:
    """The user's operations, those of the groups named, the load and the kexec."""
    picked: list[Operation] = []
    for op in ops:
        if not isinstance(op, Operation):
            what = getattr(op, "__name__", repr(op))
            cause = "no operation: decorate it with @operation()"
            raise InputError(f"khosim.testing: {what}", cause)
        picked.append(op)
    for group in standard:
        if group not in _GROUPS:
            known = ", ".join(_GROUPS)
            raise InputError("khosim.testing: standard", f"{group!r} is none of {known}")
        picked += _GROUPS[group]
    return (*picked, LOAD, KEXEC)
