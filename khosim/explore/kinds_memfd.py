"""Steps with memfds: making, writing, sealing, allocating, cutting.

Boundaries: sizes around a page and a huge page, what lies behind the end, all flags and seals that
a memfd can have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.abi.memfd import (
    F_SEAL_EXEC,
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
)
from khosim.explore.kinds import NEW, Args, Kind, nothing
from khosim.kernel.memfd import MFD_ALLOW_SEALING, MFD_NOEXEC_SEAL

if TYPE_CHECKING:
    from khosim.explore.world import World

__all__ = ("FILES_MAX", "KINDS")

FILES_MAX = 4
_SEALS = (
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    F_SEAL_GROW,
    F_SEAL_WRITE,
    F_SEAL_FUTURE_WRITE,
    F_SEAL_EXEC,
)


def _memfd_choices(world: World) -> list[Args]:
    if not world.has_kernel or len(world.of("file")) >= FILES_MAX:
        return []
    page = world.kernel.arch.page_size
    sizes = (0, 1, page, page + 1, 5 * page, 130 * page)
    return [(NEW, size, flags) for size in sizes for flags in (MFD_ALLOW_SEALING, MFD_NOEXEC_SEAL)]


def _memfd_source(world: World, name: str, size: int, flags: int) -> str:
    lines = f'{name} = kernel.memfd("{name}", size={size}, flags={flags})'
    return lines if not size else f'{lines}\n{name}.write(0, b"{name[0]}")'


def _tags(args: Args) -> tuple[tuple[int, str], ...]:
    return ((0, args[0][0]),) if args[1] else ()


def _huge_choices(world: World) -> list[Args]:
    # Folios of a huge page, whole ones and one more byte.
    if not world.has_kernel or len(world.of("file")) >= FILES_MAX:
        return []
    arch = world.kernel.arch
    huge = arch.page_size << (arch.page_shift - 3)
    if 6 * huge > world.hardware_bytes:
        return []
    return [(NEW, huge), (NEW, huge + 1)]


def _huge_source(world: World, name: str, size: int) -> str:
    return f'{name} = kernel.memfd("{name}", size={size}, huge="always")\n{name}.write(0, b"m")'


def _huge_done(world: World, args: Args) -> None:
    world.add("file", args[0], type="memfd", session="", was="", size=args[1], tags=((0, "m"),))


def _memfd_done(world: World, args: Args) -> None:
    world.add("file", args[0], type="memfd", session="", was="", size=args[1], tags=_tags(args))


def _open_memfds(world: World) -> list[str]:
    return [item.name for item in world.of("file", "held", "preserved") if item["type"] == "memfd"]


def _seal_choices(world: World) -> list[Args]:
    return [(name, seal) for name in _open_memfds(world) for seal in _SEALS]


def _fallocate_choices(world: World) -> list[Args]:
    if not world.has_kernel:
        return []
    page = world.kernel.arch.page_size
    names = _writable(world)
    return [(name, at, mode) for name in names for at in (0, 8 * page) for mode in (0, 1, 3)]


def _seek_choices(world: World) -> list[Args]:
    return [(name, at) for name in _open_memfds(world) for at in (0, 3, 1 << 40)]


def _writable(world: World) -> list[str]:
    return [item.name for item in world.of("file", "held", "preserved") if item["type"] == "memfd"]


def _write_choices(world: World) -> list[Args]:
    found: list[Args] = []
    for name in _writable(world):
        size = world.items[name]["size"]
        found += [(name, at) for at in dict.fromkeys((0, size // 2, size - 1)) if 0 <= at < size]
    return found


def _write_done(world: World, args: Args) -> None:
    item = world.items[args[0]]
    tags = {**dict(item["tags"]), args[1]: "w"}
    item.facts["tags"] = tuple(sorted(tags.items()))


def _cut_choices(world: World) -> list[Args]:
    if not world.has_kernel:
        return []
    page = world.kernel.arch.page_size
    return [(name, size) for name in _writable(world) for size in (0, page, 3 * page)]


def _cut_done(world: World, args: Args) -> None:
    item = world.items[args[0]]
    item.facts["size"] = args[1]
    item.facts["tags"] = tuple((at, tag) for at, tag in item["tags"] if at < args[1])


def _fallocate_done(world: World, args: Args) -> None:
    item = world.items[args[0]]
    end = args[1] + world.kernel.arch.page_size
    if not args[2]:
        item.facts["size"] = max(item["size"], end)
    elif args[2] & 2:
        item.facts["tags"] = tuple(
            (at, tag) for at, tag in item["tags"] if not args[1] <= at < end
        )


KINDS = (
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
        nothing,
        errnos=frozenset(("EPERM", "EBUSY")),
        weight=4,
        can_fail=False,
    ),
    Kind(
        "fallocate",
        "memfd",
        _fallocate_choices,
        lambda w, m, at, mode: f"{m}.fallocate({at}, {w.kernel.arch.page_size}, {mode})",
        _fallocate_done,
        errnos=frozenset(("EPERM",)),
        weight=3,
    ),
    Kind(
        "lseek",
        "memfd",
        _seek_choices, lambda w, m, at: f"{m}.lseek({at})", nothing,
        weight=1,
        can_fail=False,
    ),
    Kind(
        "memfd_huge",
        "memfd",
        _huge_choices,
        _huge_source,
        _huge_done,
        letter="m",
        errnos=frozenset(("ENOMEM", "ENOSPC")),
        can_fail=False,
        weight=2,
    ),
    Kind(
        "write",
        "memfd",
        _write_choices,
        lambda w, m, at: f'{m}.write({at}, b"w")',
        _write_done,
        errnos=frozenset(("EPERM",)),
        can_fail=False,
        weight=3,
    ),
    Kind(
        "ftruncate",
        "memfd",
        _cut_choices,
        lambda w, m, size: f"{m}.ftruncate({size})",
        _cut_done,
        errnos=frozenset(("EPERM",)),
        can_fail=False,
        weight=1,
    ),
)
