"""Steps that are faults: bytes and memory that change between two kernels, devices, a look around.

Each is a line of the program before the kexec that it strikes at. What has to survive follows from
what it struck (:class:`khosim.faults.between.Between`): all of it, or nothing but the simulator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.explore.kinds import NEW, Args, Kind, gone, nothing
from khosim.faults.places import places

if TYPE_CHECKING:
    from khosim.explore.world import World

__all__ = ("KINDS",)

_SESSIONS = "/LUO/sessions/blocks[0]"
_FILES = "/LUO/sessions[0]/files"
_WRITTEN_LATE = (
    _SESSIONS,
    f"{_FILES}/blocks[0]",
    f"{_FILES}[0]",
    f"{_FILES}[0]/folios/chunks[0]",
    f"{_FILES}[0]/folios/areas[0]",
    "/LUO/flbs",
)
_WORDS = ("00000000", "ffffffffffffffff", "0100000000000000")
_OFFSETS = (0, 8, 16, 56, 64, 72, 80)


def _can(world: World) -> bool:
    return world.can_preserve and world.generation < 3 and not world.is_harmed


def _places(world: World) -> list[str]:
    return [*places(world.kernel), *(_WRITTEN_LATE if world.kernel.liveupdate.enabled else ())]


def _overwrite_choices(world: World) -> list[Args]:
    if not _can(world):
        return []
    return [(p, at, data) for p in _places(world) for at in _OFFSETS for data in _WORDS]


def _flip_choices(world: World) -> list[Args]:
    if not _can(world):
        return []
    bits = world.kernel.arch.page_size * 8
    return [(place, bit) for place in _places(world) for bit in (0, 70, 519, bits - 1)]


def _place_choices(world: World) -> list[Args]:
    return [(place,) for place in places(world.kernel)] if _can(world) else []


def _memory_choices(world: World) -> list[Args]:
    if not _can(world) or world.kernel.arch.name != "x86_64" or world.vars.get("whole_map"):
        return []
    memory = world.machine.hardware.memory_map
    top, block = memory.end_phys, 4 << 20
    found = [(top // 2 - block, top // 2), (top // 4, top // 4 + block), (top - block, top)]
    if len({node.nid for node in memory.node_ranges}) > 1:
        last = memory.node_ranges[-1]
        found.append((last.start, last.end))
    return found


def _memory_lost(world: World, args: Args) -> None:
    world.vars["whole_map"] = world.machine.hardware.memory_map


def _regain_choices(world: World) -> list[Args]:
    whole = world.vars.get("whole_map")
    is_less = whole is not None and world.machine.hardware.memory_map is not whole
    return [()] if _can(world) and is_less else []


def _device_choices(world: World) -> list[Args]:
    if not world.can_preserve or world.of("device") or world.is_harmed:
        return []
    return [(NEW, item.name) for item in world.of("folio", "preserved")]


def _stray_choices(world: World) -> list[Args]:
    # A device that nobody stopped, or that was let at what is not its own: anywhere in RAM.
    if not _can(world) or world.of("device"):
        return []
    top = world.machine.hardware.memory_map.end_phys
    somewhere = [f"{at:#x}" for at in (0x1000, top // 4, top // 2, top - 0x1000)]
    return [(NEW, place) for place in (*map(repr, places(world.kernel)), *somewhere)]


def _stray_source(world: World, name: str, place: str) -> str:
    at = place if place.startswith("0x") else f"places(kernel)[{place}]"
    return f"{name} = Dma(machine, {at})"


def _strays(world: World, args: Args) -> None:
    world.add("device", args[0], at="")
    world.is_harmed = True


def _device_stops(world: World) -> list[Args]:
    # Only there can be looked at what it wrote where the folio is in its owner's hands.
    return [
        (item.name, item["at"])
        for item in world.of("device")
        if world.has(item["at"], "folio", "held")
    ]


def _files_choices(world: World) -> list[Args]:
    files = world.kernel.debugfs.files() if world.can_preserve else []
    return [(path,) for path in dict.fromkeys(("out/fdt", *files))] if files else []


KINDS = (
    Kind(
        "overwritten",
        "bytes",
        _overwrite_choices,
        lambda w, place, at, data: f"machine.next_boot(overwritten({place!r}, {at}, {data!r}))",
        nothing,
        can_fail=False,
        weight=2,
    ),
    Kind(
        "flipped",
        "bytes",
        _flip_choices,
        lambda w, place, bit: f"machine.next_boot(flipped({place!r}, {bit}))",
        nothing,
        can_fail=False,
        weight=1,
    ),
    Kind(
        "stale",
        "bytes",
        _place_choices,
        lambda w, place: f"machine.next_boot(stale(kernel, {place!r}))",
        nothing,
        can_fail=False,
        weight=1,
    ),
    Kind(
        "torn",
        "bytes",
        _place_choices,
        lambda w, place: f"machine.next_boot(torn(kernel, {place!r}))",
        nothing,
        can_fail=False,
        weight=1,
    ),
    Kind(
        "lost_memory",
        "map",
        _memory_choices,
        lambda w, start, end: (
            "whole_map = machine.hardware.memory_map\n"
            f"machine.next_boot(lost_memory(machine.hardware, {start:#x}, {end:#x}))"
        ),
        _memory_lost,
        can_fail=False,
        weight=3,
    ),
    Kind(
        "regained_memory",
        "map",
        _regain_choices,
        lambda w: "machine.next_boot(regained_memory(whole_map))",
        nothing,
        can_fail=False,
    ),
    Kind(
        "device",
        "device",
        _device_choices,
        lambda w, d, f: f"{d} = Dma(machine, {f}.phys + 8)",
        lambda w, args: w.add("device", args[0], at=args[1]),
        letter="d",
        can_fail=False,
        weight=6,
    ),
    Kind(
        "stray_device",
        "device",
        _stray_choices,
        _stray_source,
        _strays,
        letter="d",
        can_fail=False,
        weight=1,
    ),
    Kind(
        "stop_device",
        "device",
        _device_stops,
        lambda w, d, f: (
            f'{d}.stop()\n'
            f'assert {f}.read(8, 8) == {d}.count.to_bytes(8, "little")'
        ),
        gone,
        gone,
        can_fail=False,
        weight=2,
    ),
    Kind(
        "read_debugfs",
        "debugfs",
        _files_choices,
        lambda w, path: f"read_debugfs(kernel, {path!r})",
        nothing,
        can_fail=False,
        weight=2,
    ),
)
