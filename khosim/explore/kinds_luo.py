"""Steps with live updates: sessions, memfds, tokens with their shared ledger.

Boundaries come from the formats: as many sessions and files as one block holds, one less and one
more (:func:`khosim.abi.kho_block.kho_block_capacity`), names of 1, 63 and 64 bytes, sizes around a
page, all flags and seals that a memfd can have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.abi.kho_block import kho_block_capacity
from khosim.abi.luo import (
    LIVEUPDATE_SESSION_NAME_LENGTH,
    LUO_FILE_SER_BYTES,
    LUO_SESSION_SER_BYTES,
)
from khosim.abi.memfd import F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_WRITE
from khosim.explore.kinds import NEW, Args, Kind
from khosim.kernel.memfd import MFD_ALLOW_SEALING, MFD_NOEXEC_SEAL

if TYPE_CHECKING:
    from collections.abc import Callable

    from khosim.explore.world import World

__all__ = ("KINDS",)

_MAX = LIVEUPDATE_SESSION_NAME_LENGTH
_SESSIONS_MAX, _FILES_MAX = 3, 4


def _is_on(world: World) -> bool:
    return world.has_kernel and world.kernel.liveupdate.enabled


def _nothing(world: World, args: Args) -> None:
    """No books to keep."""


# -- sessions ------------------------------------------------------------------------------------


def _create_choices(world: World) -> list[Args]:
    if not _is_on(world) or len(world.of("session", "held")) >= _SESSIONS_MAX:
        return []
    used = {item["name"] for item in world.of("session", "held")}
    names = ("vm", "x" * (_MAX - 1), "x" * _MAX)
    return [(NEW, name) for name in names if name not in used]


def _create_done(world: World, args: Args) -> None:
    world.add("session", args[0], name=args[1], many=0)


def _twice_choices(world: World) -> list[Args]:
    if not _is_on(world):
        return []
    names = [item["name"] for item in world.of("session", "held")]
    names += [f"{item.name}_0" for item in world.of("crowd", "held")]
    return [(name,) for name in names]


def _crowd_choices(world: World) -> list[Args]:
    if not _is_on(world) or world.of("crowd", "held"):
        return []
    full = kho_block_capacity(world.kernel.arch.page_size, LUO_SESSION_SER_BYTES)
    left = full - len(world.of("session", "held"))
    return [(NEW, count) for count in (left - 1, left, left + 1)]


def _close(world: World, args: Args) -> None:
    name = args[0]
    world.drop(name)
    for item in world.of("file"):
        if item["session"] == name:
            item.facts["session"] = ""
            item.state = "held"
        elif item["was"] == name:
            world.drop(item.name)


def _arriving(world: World) -> list[Args]:
    if not world.has_kernel or not world.kernel.liveupdate.enabled:
        return []
    tokens = any(item["type"] == "token" for item in world.of("file", "incoming"))
    if tokens and not world.of("ledger"):
        return []  # handlers have to be there before anybody asks for a session
    return [(item.name, item["name"]) for item in world.of("session", "incoming")]


def _arrived(world: World, args: Args) -> None:
    world.items[args[0]].state = "arrived"


def _finish_choices(world: World) -> list[Args]:
    return [(item.name,) for item in world.of("session", "arrived")]


def _finish_done(world: World, args: Args) -> None:
    for item in world.of("file", "incoming"):
        if item["was"] == args[0]:
            world.drop(item.name)
    for item in world.of("file", "arrived"):
        if item["was"] == args[0]:
            item.state, item.facts["was"] = "held", ""
    world.items[args[0]].state = "finished"


def _close_choices(world: World) -> list[Args]:
    # The file itself is closed by its owner; whoever closes an arrived session finishes it.
    return [(item.name,) for item in world.of("session", "held", "finished")]


# -- memfds and tokens ---------------------------------------------------------------------------


def _memfd_choices(world: World) -> list[Args]:
    if not world.has_kernel or len(world.of("file")) >= _FILES_MAX:
        return []
    page = world.kernel.arch.page_size
    sizes = (0, 1, page, page + 1, 5 * page)
    return [(NEW, size, flags) for size in sizes for flags in (MFD_ALLOW_SEALING, MFD_NOEXEC_SEAL)]


def _memfd_source(world: World, name: str, size: int, flags: int) -> str:
    lines = f'{name} = kernel.memfd("{name}", size={size}, flags={flags})'
    return lines if not size else f'{lines}\n{name}.write(0, b"{name[0]}")'


def _memfd_done(world: World, args: Args) -> None:
    world.add("file", args[0], type="memfd", session="", was="", size=args[1])


def _token_choices(world: World) -> list[Args]:
    if not _is_on(world) or not world.of("ledger") or len(world.of("file")) >= _FILES_MAX:
        return []
    return [(NEW, refuses) for refuses in ("", "preserve", "freeze")]


def _token_done(world: World, args: Args) -> None:
    world.add("file", args[0], type="token", session="", was="", refuses=args[1])


def _open_memfds(world: World) -> list[str]:
    return [item.name for item in world.of("file", "held", "preserved") if item["type"] == "memfd"]


def _seal_choices(world: World) -> list[Args]:
    seals = (F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE)
    return [(name, seal) for name in _open_memfds(world) for seal in seals]


def _fallocate_choices(world: World) -> list[Args]:
    if not world.has_kernel:
        return []
    page = world.kernel.arch.page_size
    names = [item.name for item in world.of("file", "held") if item["type"] == "memfd"]
    return [(name, at, mode) for name in names for at in (0, 8 * page) for mode in (0, 1)]


def _seek_choices(world: World) -> list[Args]:
    return [(name, at) for name in _open_memfds(world) for at in (0, 3)]


def _session_files(world: World) -> list[Args]:
    if not _is_on(world):
        return []
    return [
        (session.name, item.name, token)
        for session in world.of("session", "held")
        for item in world.of("file", "held")
        if not item["was"]
        for token in (int(item.name[1:]), (1 << 64) - 1)
    ]


def _session_file_done(world: World, args: Args) -> None:
    item = world.items[args[1]]
    item.state = "preserved"
    item.facts.update(session=args[0], token=args[2])


def _many_choices(world: World) -> list[Args]:
    if not _is_on(world):
        return []
    full = kho_block_capacity(world.kernel.arch.page_size, LUO_FILE_SER_BYTES)
    found = []
    for session in world.of("session", "held"):
        if session["many"]:
            continue
        left = full - sum(item["session"] == session.name for item in world.of("file"))
        found += [(session.name, count) for count in (left - 1, left, left + 1)]
    return found


def _many_done(world: World, args: Args) -> None:
    world.items[args[0]].facts["many"] = args[1]


def _file_choices(world: World) -> list[Args]:
    return [
        (item["was"], item.name, item["token"], item["type"])
        for item in world.of("file", "incoming")
        if world.has(item["was"], "session", "arrived")
        and (item["type"] != "token" or world.of("ledger"))
    ]


def _file_source(world: World, session: str, name: str, token: int, kind: str) -> str:
    if kind == "token":
        return f"{name} = {session}.retrieve({token:#x})\nassert {name}.value == 7"
    was = f"{name}_was"
    tag = ""
    if world.items[name]["size"]:
        tag = f'\nassert {name}.read(0, 1) == b"{name[0]}"'
    return (
        f"{was}, {name} = {name}, {session}.retrieve({token:#x})\n"
        f"assert {name}.inode.i_size == {was}.inode.i_size\n"
        f"assert {name}.f_pos == {was}.f_pos\n"
        f"assert {name}.seals == {was}.inode.seals\n"
        f"assert {name}.inode.alloced >= {was}.inode.alloced{tag}"
    )


def _file_done(world: World, args: Args) -> None:
    world.items[args[1]].state = "arrived"


def _file_lost(world: World, args: Args) -> None:
    world.items[args[1]].state = "lost"


def _file_close(world: World) -> list[Args]:
    return [(item.name,) for item in world.of("file", "held")]


# -- the ledger ----------------------------------------------------------------------------------


def _ledger_choices(world: World) -> list[Args]:
    return [(NEW,)] if _is_on(world) and not world.of("ledger") else []


def _ledger_done(world: World, args: Args) -> None:
    world.add("ledger", args[0], gets=0)


def _ledger_get(world: World) -> list[Args]:
    needed = any(item["type"] == "token" for item in world.of("file", "preserved"))
    return [(item.name,) for item in world.of("ledger") if needed and not item["gets"]]


def _incoming_get(world: World) -> list[Args]:
    # The ledger came over if a token's session did and is not finished yet.
    came = any(
        item["type"] == "token" and item["was"] for item in world.of("file", "incoming", "arrived")
    )
    return [(item.name,) for item in world.of("ledger") if came and not item["gets"]]


def _gets(count: int) -> Callable[[World, Args], None]:
    def done(world: World, args: Args) -> None:
        world.items[args[0]].facts["gets"] = count

    return done


_EX = frozenset(("EEXIST", "EIO"))
_SESSION = frozenset(("EINVAL", "EIO"))

KINDS = (
    Kind(
        "create_session",
        "session",
        _create_choices,
        lambda w, s, name: f"{s} = kernel.liveupdate.create_session({name!r})",
        _create_done,
        letter="s",
        errnos=_SESSION,
        weight=3,
    ),
    Kind(
        "create_twice",
        "session",
        _twice_choices,
        lambda w, name: f"kernel.liveupdate.create_session({name!r})",
        _nothing,
        errnos=_EX,
    ),
    Kind(
        "create_sessions",
        "crowd",
        _crowd_choices,
        lambda w, c, count: (
            f'{c} = [kernel.liveupdate.create_session(f"{c}_{{i}}") for i in range({count})]'
        ),
        lambda w, args: w.add("crowd", args[0], "held", count=args[1]),
        letter="c",
        errnos=frozenset(("EIO",)),
        can_fail=False,
    ),
    Kind("close_session", "session", _close_choices, lambda w, s: f"{s}.close()", _close),
    Kind(
        "retrieve_session",
        "session",
        _arriving,
        lambda w, s, name: f"{s} = kernel.liveupdate.retrieve_session({name!r})",
        _arrived,
        errnos=frozenset(("EIO",)),
        weight=10,
    ),
    Kind(
        "finish",
        "session",
        _finish_choices,
        lambda w, s: f"{s}.finish()",
        _finish_done,
        weight=6,
    ),
    Kind(
        "memfd",
        "memfd",
        _memfd_choices,
        _memfd_source,
        _memfd_done,
        letter="m",
        weight=6,
        can_fail=False,
    ),
    Kind(
        "add_seals",
        "memfd",
        _seal_choices,
        lambda w, m, seals: f"{m}.add_seals({seals})",
        _nothing,
        errnos=frozenset(("EPERM", "EBUSY")),
    ),
    Kind(
        "fallocate",
        "memfd",
        _fallocate_choices,
        lambda w, m, at, mode: f"{m}.fallocate({at}, {w.kernel.arch.page_size}, {mode})",
        _nothing,
        errnos=frozenset(("EPERM",)),
    ),
    Kind("lseek", "memfd", _seek_choices, lambda w, m, at: f"{m}.lseek({at})", _nothing),
    Kind(
        "preserve_file",
        "session",
        _session_files,
        lambda w, s, item, token: f"{s}.preserve({item}, {token:#x})",
        _session_file_done,
        errnos=frozenset(("EEXIST", "EBUSY", "ENOENT")),
        weight=14,
    ),
    Kind(
        "preserve_files",
        "crowd",
        _many_choices,
        lambda w, s, count: (
            f'for i in range({count}):\n    many = kernel.memfd("many", size=1)\n'
            f"    {s}.preserve(many, 0x1000 + i)\n    many.close()"
        ),
        _many_done,
        can_fail=False,
    ),
    Kind(
        "retrieve_file",
        "session",
        _file_choices,
        _file_source,
        _file_done,
        _file_lost,
        errnos=frozenset(("EINVAL", "ENOSPC")),
        weight=14,
    ),
    Kind(
        "close_file", "session", _file_close, lambda w, m: f"{m}.close()", lambda w, a: w.drop(a[0])
    ),
    Kind(
        "ledger",
        "flb",
        _ledger_choices,
        lambda w, g: f"{g} = ledger(kernel)",
        _ledger_done,
        letter="g",
        can_fail=False,
        weight=10,
    ),
    Kind(
        "token",
        "flb",
        _token_choices,
        lambda w, k, refuses: f"{k} = Token(kernel, 7{f', {refuses!r}' if refuses else ''})",
        _token_done,
        letter="k",
        can_fail=False,
        weight=6,
    ),
    Kind(
        "get_outgoing",
        "flb",
        _ledger_get,
        lambda w, g: f"kernel.liveupdate.flb_get_outgoing({g})",
        _gets(1),
        can_fail=False,
    ),
    Kind(
        "get_incoming",
        "flb",
        _incoming_get,
        lambda w, g: f"kernel.liveupdate.flb_get_incoming({g})",
        _gets(2),
        can_fail=False,
    ),
    Kind(
        "put_incoming",
        "flb",
        lambda w: [(i.name,) for i in w.of("ledger") if i["gets"] == 2],
        lambda w, g: f"kernel.liveupdate.flb_put_incoming({g})",
        _gets(0),
        can_fail=False,
    ),
    Kind(
        "put_outgoing",
        "flb",
        lambda w: [(i.name,) for i in w.of("ledger") if i["gets"] == 1],
        lambda w, g: f"kernel.liveupdate.flb_put_outgoing({g})",
        _gets(0),
        can_fail=False,
    ),
)
