"""Steps with live updates: sessions and the files in them.

Boundaries come from the formats: as many sessions and files as one block holds, one less and one
more (:func:`khosim.abi.kho_block.kho_block_capacity`), names of 1, 63 and 64 bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.abi.kho_block import kho_block_capacity
from khosim.abi.luo import (
    LIVEUPDATE_SESSION_NAME_LENGTH,
    LUO_FILE_SER_BYTES,
    LUO_SESSION_SER_BYTES,
)
from khosim.explore.kinds import NEW, Args, Kind, nothing

if TYPE_CHECKING:
    from khosim.explore.world import World
    from khosim.kernel.liveupdate.luo_session import Session

__all__ = ("KINDS", "close_session", "finish_session", "is_busy")

_MAX = LIVEUPDATE_SESSION_NAME_LENGTH
_SESSIONS_MAX = 3
_ROOM_BYTES = 8 << 20
"""Free memory that is enough for many of anything: no author wants half of them."""


# -- sessions ------------------------------------------------------------------------------------


def _create_choices(world: World) -> list[Args]:
    if not world.has_luo or len(world.of("session", "held")) >= _SESSIONS_MAX:
        return []
    used = {item["name"] for item in world.of("session", "held")}
    names = ("vm", "x" * (_MAX - 1), "x" * _MAX)
    return [(NEW, name) for name in names if name not in used]


def _create_done(world: World, args: Args) -> None:
    world.add("session", args[0], name=args[1], many=0)


def _twice_choices(world: World) -> list[Args]:
    if not world.has_luo:
        return []
    names = [item["name"] for item in world.of("session", "held")]
    names += [f"{item.name}_0" for item in world.of("crowd", "held")]
    return [(name,) for name in names]


def _crowd_choices(world: World) -> list[Args]:
    if not world.has_luo or world.of("crowd", "held") or world.free_bytes < _ROOM_BYTES:
        return []
    full = kho_block_capacity(world.kernel.arch.page_size, LUO_SESSION_SER_BYTES)
    left = full - len(world.of("session", "held"))
    return [(NEW, count) for count in (left - 1, left, left + 1)]


def close_session(world: World, args: Args) -> None:
    """Books: the session is no more; what was for the successor is its owner's again."""
    name = args[0]
    world.drop(name)
    for item in world.of("file"):
        if item["session"] == name:
            item.facts["session"] = ""
            item.state = "held"
        elif item["was"] == name:
            world.drop(item.name)


def _arriving(world: World) -> list[Args]:
    if not world.has_luo:
        return []
    tokens = any(item["type"] == "token" for item in world.of("file", "incoming"))
    if tokens and not world.of("ledger"):
        return []  # handlers have to be there before anybody asks for a session
    return [(item.name, item["name"]) for item in world.of("session", "incoming")]


def _arrived(world: World, args: Args) -> None:
    world.items[args[0]].state = "arrived"


def _finish_choices(world: World) -> list[Args]:
    return [(item.name,) for item in world.of("session", "arrived")]


def finish_session(world: World, args: Args) -> None:
    """Books: files that arrived are their owner's, the others are no more."""
    for item in world.of("file", "incoming", "lost"):
        if item["was"] == args[0]:
            world.drop(item.name)
    for item in world.of("file", "arrived"):
        if item["was"] == args[0]:
            item.state, item.facts["was"] = "held", ""
    world.items[args[0]].state = "finished"


def _close_choices(world: World) -> list[Args]:
    # The file itself is closed by its owner; whoever closes an arrived session finishes it.
    return [(item.name,) for item in world.of("session", "held", "finished")]


# -- files in them -------------------------------------------------------------------------------


def _session_files(world: World) -> list[Args]:
    if not world.has_luo:
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


def _owned_files(world: World) -> list[Args]:
    # Preserved already, in this session or in another one.
    return [
        (session.name, item.name, token)
        for session in world.of("session", "held")
        for item in world.of("file", "preserved")
        for token in (item["token"], 0x777)
    ]


def _many_choices(world: World) -> list[Args]:
    if not world.has_luo or world.free_bytes < _ROOM_BYTES:
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
        and (item["type"] != "token" or (world.of("ledger") and item["refuses"] != "retrieve"))
    ]


def _file_source(world: World, session: str, name: str, token: int, kind: str) -> str:
    if kind == "token":
        return f"{name} = {session}.retrieve({token:#x})\nassert {name}.value == 7"
    was = f"{name}_was"
    item = world.items[name]
    tag = "".join(f'\nassert {name}.read({at}, 1) == b"{text}"' for at, text in item["tags"])
    size, written = item["size"], len(item["tags"])
    if item["type"] == "poisoned":
        tag = f"\nassert is_poisoned({name}, {item['poison']})"
    elif written < size <= 1 << 16:
        tag += f"\nassert {name}.read(0, {size}).count(0) == {size - written}"
    if item["type"] == "reader":
        tag += f"\nassert {name}.is_writable == {was}.is_writable"
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
    # A handler is asked once; where it was not asked yet, the file goes on waiting.
    session: Session = world.vars[args[0]]
    asked = world.kernel.liveupdate.retrieved
    if any(file.token == args[2] and file in asked for file in session.session.file_set.files):
        world.items[args[1]].state = "lost"


def is_busy(world: World, session: str) -> bool:
    """Whether a token in it is going to say, once, that it cannot be finished yet."""
    asked = any(item["asked"] for item in world.of("ledger"))
    return not asked and any(
        item["type"] == "token" and item["was"] == session and item["refuses"] == "finish"
        for item in world.of("file", "incoming", "arrived")
    )


def _again_choices(world: World) -> list[Args]:
    # Whoever asks again gets the same file.
    return [
        (item["was"], item.name, item["token"])
        for item in world.of("file", "arrived")
        if world.has(item["was"], "session", "arrived")
    ]


def _folios(world: World, args: Args) -> int:
    # memfd_luo_retrieve_folios asks three times for each folio.
    item = world.items[args[1]]
    if item["type"] == "token":
        return 3
    arch = world.kernel.arch
    pages = -(-item["size"] // arch.page_size)
    nr_folios = pages if pages < arch.page_size // 8 else 1
    return 7 + 3 * nr_folios if pages else 3


def _asks_of_file(world: World, args: Args) -> int:
    # As for a file that has all its folios; more for those that it has not.
    size = world.items[args[1]]["size"] if world.items[args[1]]["type"] == "memfd" else 0
    return 13 if size <= world.kernel.arch.page_size else 29


def _was_asked(world: World, args: Args) -> None:
    for item in world.of("ledger"):
        item.facts["asked"] = True


def _unfinished(world: World) -> list[Args]:
    found = []
    for item in world.of("session", "arrived"):
        taken = any(file["was"] == item.name for file in world.of("file", "arrived"))
        if not (taken and is_busy(world, item.name)):
            found.append((item.name,))
    return found


def _close_unfinished(world: World, args: Args) -> None:
    # Whoever closes a session finishes it; where that is refused, it is as it was.
    if is_busy(world, args[0]):
        _was_asked(world, args)
        world.items[args[0]].state = "incoming"
        return
    finish_session(world, args)
    world.drop(args[0])


def _file_close(world: World) -> list[Args]:
    return [(item.name,) for item in world.of("file", "held")]


_EX = frozenset(("EEXIST",))
_SESSION = frozenset(("EINVAL",))

KINDS = (
    Kind(
        "create_session",
        "session",
        _create_choices,
        lambda w, s, name: f"{s} = kernel.liveupdate.create_session({name!r})",
        _create_done,
        letter="s",
        errnos=_SESSION,
        opens=True,
        weight=8,
        locks=True,
    ),
    Kind(
        "create_twice",
        "session",
        _twice_choices,
        lambda w, name: f"kernel.liveupdate.create_session({name!r})",
        nothing,
        errnos=_EX,
        opens=True,
        weight=1,
        locks=True,
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
        opens=True,
        can_fail=False,
        locks=True,
    ),
    Kind(
        "close_session",
        "session",
        _close_choices, lambda w, s: f"{s}.close()", close_session,
        weight=1,
        can_fail=False,
        locks=True,
    ),
    Kind(
        "retrieve_session",
        "session",
        _arriving,
        lambda w, s, name: f"{s} = kernel.liveupdate.retrieve_session({name!r})",
        _arrived,
        opens=True,
        weight=30,
        locks=True,
    ),
    Kind(
        "finish",
        "session",
        _finish_choices,
        lambda w, s: f"{s}.finish()",
        finish_session,
        _was_asked,
        errnos=frozenset(("EBUSY",)),
        weight=3,
        locks=True,
    ),
    Kind(
        "close_unfinished",
        "session",
        _unfinished,
        lambda w, s: f"{s}.close()",
        _close_unfinished,
        weight=1,
        locks=True,
    ),
    Kind(
        "retrieve_badly",
        "session",
        _arriving,
        lambda w, s, name: f"retrieve_badly(kernel, {name!r})",
        nothing,
        errnos=frozenset(("EFAULT",)),
        opens=True,
        can_fail=False,
        weight=1,
        locks=True,
    ),
    Kind(
        "preserve_file",
        "session",
        _session_files,
        lambda w, s, item, token: f"{s}.preserve({item}, {token:#x})",
        _session_file_done,
        errnos=frozenset(("EEXIST", "EBUSY", "ENOENT", "ENOTSUP")),
        asks=_asks_of_file,
        weight=30,
        locks=True,
    ),
    Kind(
        "preserve_file_twice",
        "session",
        _owned_files,
        lambda w, s, item, token: f"{s}.preserve({item}, {token:#x})",
        nothing,
        errnos=frozenset(("EEXIST", "EBUSY")),
        weight=2,
        can_fail=False,
        locks=True,
    ),
    Kind(
        "preserve_badly",
        "session",
        _session_files,
        lambda w, s, item, token: f"preserve_badly({s}, {item}, {token:#x})",
        nothing,
        errnos=frozenset(("EEXIST", "EBUSY", "ENOENT", "ENOTSUP", "EFAULT")),
        weight=1,
        can_fail=False,
        locks=True,
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
        locks=True,
    ),
    Kind(
        "retrieve_file",
        "session",
        _file_choices,
        _file_source,
        _file_done,
        _file_lost,
        errnos=frozenset(("EINVAL", "ENOSPC")),
        asks=_folios,
        weight=30,
        locks=True,
    ),
    Kind(
        "retrieve_again",
        "session",
        _again_choices,
        lambda w, s, item, token: (
            f"again = {s}.retrieve({token:#x})\nassert again is {item}\nagain.close()"
        ),
        nothing,
        can_fail=False,
        weight=1,
        locks=True,
    ),
    Kind(
        "close_file",
        "session",
        _file_close,
        lambda w, m: f"{m}.close()",
        lambda w, a: w.drop(a[0]),
        weight=1,
        can_fail=False,
    ),
)
