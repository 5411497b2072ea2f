"""Steps with calls at the edge of the interface: :mod:`khosim.explore.agent_calls`.

Boundaries: the numbers next to those that the device and sessions know, and each other's; files as
large as all memory, and as the largest counts on the way to being preserved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.abi.liveupdate import LIVEUPDATE_CMD_BASE, LIVEUPDATE_CMD_SESSION_BASE
from khosim.explore.kinds import NEW, Args, Kind, nothing
from khosim.explore.kinds_luo import finish_session
from khosim.explore.kinds_memfd import FILES_MAX
from khosim.kernel.kvmalloc import KVMALLOC_MAX_BYTES

if TYPE_CHECKING:
    from khosim.explore.world import World

__all__ = ("KINDS",)

_DEVICE_CALLS, _SESSION_CALLS = 2, 4
_POINTER_BYTES = 8
_FOLIOS_MAX = (1 << 32) - 1


# -- numbers -------------------------------------------------------------------------------------


def _device_choices(world: World) -> list[Args]:
    first = LIVEUPDATE_CMD_BASE + _DEVICE_CALLS
    return [(n,) for n in (first, LIVEUPDATE_CMD_SESSION_BASE, 0xFF)] if world.has_luo else []


def _session_choices(world: World) -> list[Args]:
    first = LIVEUPDATE_CMD_SESSION_BASE
    numbers = (first + _SESSION_CALLS, first - 1, LIVEUPDATE_CMD_BASE, 0xFF)
    sessions = world.of("session", "held", "arrived", "finished")
    return [(item.name, number) for item in sessions for number in numbers]


def _narrow_choices(world: World) -> list[Args]:
    # Whose structures have no pointers and no padding: as wide as the kernel's.
    taken = {item["name"] for item in world.of("session", "held")}
    return [("narrow",)] if world.has_luo and "narrow" not in taken else []


# -- finishing -----------------------------------------------------------------------------------


def _finish_choices(world: World) -> list[Args]:
    # With something in it, for an empty one has nothing to lose; not while a token is busy.
    return [
        (item.name,)
        for item in world.of("session", "arrived")
        if any(f["was"] == item.name and f["type"] == "memfd" for f in world.of("file"))
        and not any(f["was"] == item.name and f["type"] == "token" for f in world.of("file"))
    ]


# -- files with holes ----------------------------------------------------------------------------


def _sparse_choices(world: World) -> list[Args]:
    if not world.has_luo or "off" in {item["name"] for item in world.of("session", "held")}:
        return []
    page = world.kernel.arch.page_size
    pages = (KVMALLOC_MAX_BYTES // _POINTER_BYTES + 1, _FOLIOS_MAX + 1)
    return [(world.hardware_bytes,), *((count * page,) for count in pages)]


def _call_off_choices(world: World) -> list[Args]:
    if not world.has_luo:
        return []
    files = [item for item in world.of("file", "held") if item["type"] == "memfd"]
    return [(item.name,) for item in files if not item["was"]]


# -- how a file is open ---------------------------------------------------------------------------


def _reader_choices(world: World) -> list[Args]:
    files = world.of("file")
    is_one = any(item["type"] == "reader" for item in files)
    if not world.has_kernel or is_one or len(files) >= FILES_MAX:
        return []
    page = world.kernel.arch.page_size
    return [(NEW, size) for size in (page, 0)]


def _reader_source(world: World, name: str, size: int) -> str:
    # Who made it keeps the writable one to himself, and closes it.
    write = 'writer.write(0, b"m")\n' if size else ""
    return (
        f'writer = kernel.memfd("{name}", size={size})\n{write}'
        f"{name} = writer.open_read_only()\nwriter.close()"
    )


def _reader_done(world: World, args: Args) -> None:
    tags = ((0, "m"),) if args[1] else ()
    world.add("file", args[0], type="reader", session="", was="", size=args[1], tags=tags)


def _poison_choices(world: World) -> list[Args]:
    # Where something was written, for there is a page.
    files = [item for item in world.of("file", "held", "preserved") if item["type"] == "memfd"]
    return [(item.name, at) for item in files for at, _ in item["tags"]]


def _poisoned(world: World, args: Args) -> None:
    item = world.items[args[0]]
    item.facts.update(type="poisoned", tags=(), poison=args[1])


def _readlink_choices(world: World) -> list[Args]:
    # Of those that were made here it says what they are.
    files = world.of("file", "arrived")
    return [(item.name,) for item in files if item["type"] in ("memfd", "reader")]


KINDS = (
    Kind(
        "ask_device",
        "session",
        _device_choices,
        lambda w, number: f"ask_device(kernel, {number:#x})",
        nothing,
        errnos=frozenset(("ENOTTY",)),
        opens=True,
        can_fail=False,
        weight=0.3,
        locks=True,
    ),
    Kind(
        "ask_session",
        "session",
        _session_choices,
        lambda w, s, number: f"ask_session({s}, {number:#x})",
        nothing,
        errnos=frozenset(("ENOTTY",)),
        can_fail=False,
        weight=0.5,
        locks=True,
    ),
    Kind(
        "create_32bit",
        "session",
        _narrow_choices,
        lambda w, name: f"create_32bit(kernel, {name!r})",
        nothing,
        opens=True,
        can_fail=False,
        weight=0.3,
        locks=True,
    ),
    Kind(
        "finish_badly",
        "session",
        _finish_choices,
        lambda w, s: f"finish_badly({s})",
        finish_session,
        errnos=frozenset(("EFAULT",)),
        can_fail=False,
        goes_on=True,
        weight=3,
        locks=True,
    ),
    Kind(
        "preserve_sparse",
        "memfd",
        _sparse_choices,
        lambda w, size: f"preserve_sparse(kernel, {size:#x})",
        nothing,
        errnos=frozenset(("EFBIG", "ENOMEM", "ENOSPC")),
        opens=True,
        can_fail=False,
        goes_on=True,
        weight=0.3,
        locks=True,
    ),
    Kind(
        "call_off",
        "memfd",
        _call_off_choices,
        lambda w, m: f"call_off(kernel, {m})",
        nothing,
        opens=True,
        can_fail=False,
        goes_on=True,
        weight=0.5,
        locks=True,
    ),
    Kind(
        "read_only_memfd",
        "memfd",
        _reader_choices,
        _reader_source,
        _reader_done,
        letter="m",
        can_fail=False,
        weight=1,
    ),
    Kind(
        "readlink",
        "memfd",
        _readlink_choices,
        lambda w, m: f'assert {m}.d_path().startswith("/memfd:")',
        nothing,
        can_fail=False,
        goes_on=True,
        weight=4,
    ),
    Kind(
        "memory_failure",
        "memfd",
        _poison_choices,
        lambda w, m, at: f"memory_failure({m}, {at})",
        _poisoned,
        errnos=frozenset(("EBUSY",)),
        can_fail=False,
        weight=1,
    ),
)
