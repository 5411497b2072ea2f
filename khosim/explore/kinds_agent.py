"""Steps of an agent beyond its calls: it is killed, and it loads the next kernel early.

A process that is killed has its descriptors closed by the kernel, whatever it was about to do. An
image that is loaded early is jumped to when all is preserved, much later, or twice where somebody
refused at first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.explore.kinds import Args, Kind
from khosim.explore.kinds_boot import image_options, jumped, successors
from khosim.explore.kinds_luo import close_session, finish_session, is_busy

if TYPE_CHECKING:
    from khosim.explore.world import Item, World

__all__ = ("KINDS",)

_ORDERS = ("", "files first")


# -- killed ----------------------------------------------------------------------------------------


def _open_sessions(world: World) -> list[Item]:
    return [*world.of("session", "held", "arrived", "finished"), *world.of("crowd", "held")]


def _kill_choices(world: World) -> list[Args]:
    sessions = _open_sessions(world)
    if not sessions or any(is_busy(world, item.name) for item in sessions):
        return []  # whoever cannot be finished yet is told of by other steps
    return [(order,) for order in _ORDERS]


def _kill_source(world: World, order: str) -> str:
    sessions = [f"*{i.name}" if i.kind == "crowd" else i.name for i in _open_sessions(world)]
    files = [item.name for item in world.of("file", "held", "preserved", "arrived")]
    names = [*files, *sessions] if order else [*sessions, *files]
    return f"kill(kernel, {', '.join(names)})"


def _killed(world: World, args: Args) -> None:
    for item in _open_sessions(world):
        if item.state == "arrived":
            finish_session(world, (item.name,))
        close_session(world, (item.name,))
    for item in world.of("file", "held", "preserved", "arrived"):
        world.drop(item.name)


# -- an image that waits ---------------------------------------------------------------------------


def _load_choices(world: World) -> list[Args]:
    if not world.has_kernel or world.generation >= 3 or world.of("image"):
        return []
    lines = [(line,) for line in successors(world)]
    return [*lines, *((world.cmdline, more) for more in image_options(world))]


def _load_source(world: World, line: str, more: str = "") -> str:
    words = [] if line == world.cmdline else [f"cmdline={line!r}"]
    return f"machine.load_image({', '.join(['kernel', *words, *([more] if more else [])])})"


def _loaded(world: World, args: Args) -> None:
    world.add("image", "image", "held", line=args[0])


def _jump_choices(world: World) -> list[Args]:
    return [()] if world.of("image") and not world.is_stuck else []


def _jumped(world: World, args: Args) -> None:
    jumped(world, (world.items["image"]["line"],))


KINDS = (
    Kind(
        "kill",
        "agent",
        _kill_choices,
        _kill_source,
        _killed,
        can_fail=False,
        weight=2,
        locks=True,
    ),
    Kind(
        "load_image",
        "image",
        _load_choices,
        _load_source,
        _loaded,
        errnos=frozenset(("EADDRNOTAVAIL", "EINVAL", "ENOMEM")),
        takes_any=True,
        weight=2,
    ),
    Kind(
        "jump",
        "image",
        _jump_choices,
        lambda w: "machine.jump(kernel)\nkernel = machine.resume()",
        _jumped,
        errnos=frozenset(("EBUSY",)),
        asks=14,
        weight=8,
    ),
)
