"""Steps with whole kernels: booting, handing over to a successor that is a little different.

A successor's command line is its predecessor's with one thing changed. Sizes of ``reserve_mem``
regions lie around pages and pageblocks; ``mem=``, ``hugepages=`` and ``kho_scratch=`` around what
the machine has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from khosim.explore.hazards import like, told
from khosim.explore.kinds import Args, Kind
from khosim.units import memparse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.explore.world import Item, World

__all__ = ("KINDS", "image_options", "jumped", "machine_weight", "successors")

_BASE = "kho=on liveupdate=on"
_MACHINES = (
    '"64M"',
    '"96M", nodes=2',
    '"64M", allocator="adversarial"',
    '"4G"',
    '"96M", nodes=["45M", "51M"]',
    '"64M", memoryless=[1]',
    '"512M", arch="arm64", page_size=65536',
)
"""Small and plain ones first; a node's border may be anywhere."""
_WEIGHTS = (10, 4, 4, 1, 3, 1, 1)


def machine_weight(spec: str, groups: Sequence[str]) -> int:
    """How often a machine is taken by a program of ``groups``.

    A list of huge pages that takes more than one page itself needs a machine of gigabytes, and so
    does memory that is initialised late, which boots that fail leave behind.
    """
    more = 1
    if spec == '"4G"':
        more = 8 if "vmalloc" in groups and len(groups) < 4 else 4 if "region" in groups else 1
    return more * _WEIGHTS[_MACHINES.index(spec)]



_NAMES = ("a", "b", "a@1", "n" * 15)
"""Of regions. libfdt finds a node by its name without what stands behind an ``@``, too."""
_LARGE = 8
"""The largest region is this part of memory: scratch is to fit beside it."""
_AREA = 4 << 20
"""An area of the contiguous allocator, of whole pageblocks."""
_ROOM = 512 << 20
"""Memory of a machine that sets some aside for crash kernels."""


def _ram_bytes(spec: str) -> int:
    return memparse(spec.split('"')[1])[0]


def _region_words(name: str, ram_bytes: int) -> list[str]:
    page, block = 4096, 2 << 20
    sizes = (64, page, page + 1, 3 * page - 1, block)
    words = [f"reserve_mem={size}:{align}:{name}" for size in sizes for align in (64, page)]
    large = ram_bytes // _LARGE
    return [*words, f"reserve_mem={large}:{page}:{name}", f"reserve_mem={page}:{block}:{name}"]


def _other_words(ram_bytes: int) -> list[str]:
    # What else sets memory aside, or is about how much there is.
    words = [f"mem={ram_bytes // 4 * n}" for n in (1, 2, 3)]
    words += [f"hugepages={n}" for n in (1, 4, 16)]
    words += ["memtest=1", "debugfs=off"]
    size = f"memory_corruption_check_size={ram_bytes // 8}"
    words.append(f"memory_corruption_check=1 {size}")
    if ram_bytes >= _ROOM:
        words.append(f"crashkernel={ram_bytes // 16}")
    # A little of memory is the BIOS's: its parts are not whole pageblocks.
    bases = [round(ram_bytes / part / _AREA) * _AREA for part in (16, 8, 4)]
    words += [f"cma={_AREA}@{base}" for base in bases]
    if ram_bytes >= 4 << 30:
        words.append("hugepagesz=1G hugepages=1")
    return words


def _regions(count: int) -> str:
    return " ".join(f"reserve_mem=4096:4096:r{i}" for i in range(count))


def _boot_choices(world: World) -> list[Args]:
    if world.has_kernel:
        return []
    lines = [_BASE]
    lines += [f"{_BASE} reserve_mem=4096:4096:a reserve_mem=8192:4096:b", "kho=off", "kho=on"]
    lines += [f"{_BASE} reserve_mem=4096:4096:a@1"]
    lines += [f"{_BASE} reserve_mem=4096:4096:a@1 reserve_mem=4096:4096:a"]
    lines += [f"{_BASE} {_regions(count)}" for count in (8, 9)]
    sizes = ["8M,8M,0", "1M,64M,1M", "300%", "8M,64M,8G", "8M,8G,8M", "8G,8M,8M"]
    sizes += ["0%", "1%", "0,0,0", "8M,0,0", "0,8M,0", "0,0,8M"]
    lines += [f"{_BASE} kho_scratch={size}" for size in sizes]
    lines.append(f"{_BASE} elfcorehdr=1M")
    release = world.release
    found = []
    for spec in _MACHINES:
        ram = _ram_bytes(spec)
        words = [*_region_words("a", ram), *_other_words(ram)]
        own = [lines[0], *(f"{_BASE} {word}" for word in words), *lines[1:]]
        found += [(spec, line, release) for line in own]
    return found


def _boot_source(world: World, spec: str, line: str, release: Any) -> str:
    world.vars["release"] = release
    word = told(release)
    more = "" if word == "'7.3'" else f"{word}, "
    return f"machine = Stage({spec})\nkernel = machine.boot({more}cmdline={line!r})"


def _booted(world: World, args: Args) -> None:
    world.cmdline = args[1]
    world.generation = 0
    world.vars["format"] = world.kernel.release.kho_compatible


def _words(line: str) -> list[str]:
    return line.split()


_ODD = (
    "mem=",
    "elfcorehdr=",
    "hugepages=",
    "hugepagesz=",
    "crashkernel=",
    "kho_scratch=",
    "memtest=",
    "debugfs=",
    "cma=",
    "memory_corruption_check",
)


def successors(world: World) -> list[str]:
    """Command lines of the next kernel: as this one's, and with one thing changed."""
    words = _words(world.cmdline)
    variants = [world.cmdline]
    regions = [word for word in words if word.startswith("reserve_mem=")]
    others = [word for word in words if word not in regions]
    ram = world.machine.hardware.memory_map.ram_bytes
    for i in range(len(regions)):
        left = regions[:i] + regions[i + 1 :]
        variants.append(" ".join(others + left))
        name = regions[i].rsplit(":", 1)[1]
        variants += [" ".join(others + left + [word]) for word in _region_words(name, ram)]
    names = {word.rsplit(":", 1)[1] for word in regions}
    for name in _NAMES:
        if name not in names and len(regions) < 3:
            variants += [f"{world.cmdline} {word}" for word in _region_words(name, ram)]
    if "kho=on" in words:
        variants.append(world.cmdline.replace("kho=on", "kho=off"))
    if "liveupdate=on" in words:
        variants.append(" ".join(word for word in words if word != "liveupdate=on"))
    odd = [word for word in words if word.startswith(_ODD)]
    variants += [" ".join(w for w in words if w != word) for word in odd]
    if not odd:
        variants += [f"{world.cmdline} {word}" for word in _other_words(ram)]
        variants += [f"{world.cmdline} elfcorehdr={text}" for text in ("1M", "x")]
    return list(dict.fromkeys(variants))


def _kexec_choices(world: World) -> list[Args]:
    if not world.has_kernel or world.generation >= 3 or world.is_stuck:
        return []
    lines = [(line,) for line in successors(world)]
    return [*lines, *((world.cmdline, more) for more in image_options(world))]


def image_options(world: World) -> list[str]:
    """Options of a kexec: what else may be different."""
    # Another image, initrd, release; what the release of a fixed protocol is called has no name.
    found = ['kernel_size="8M"', 'initrd="4M"', 'initrd="32M"']
    if isinstance(world.release, str):
        now = world.kernel.release.name.partition("+")[0]
        others = [name for name in ("7.3", "7.2", "7.1") if name != now]
        found += [f'release="{like(world.release, name)}"' for name in others]
    elif world.release.name.startswith("7.3"):
        found.append("release=fixed('7.2')")
    return found


def _kexec_source(world: World, line: str, more: str = "") -> str:
    words = [] if line == world.cmdline else [f"cmdline={line!r}"]
    return f"kernel = kernel.kexec({', '.join([*words, more] if more else words)})"


_LESS = ("mem=", "elfcorehdr=")


def jumped(world: World, args: Args) -> None:
    """Books: a kernel with that command line runs."""
    before, world.cmdline = _words(world.cmdline), args[0]
    now = _words(args[0])
    world.generation += 1
    on = "kho=on" in before
    is_less = "kho=off" in now or any(word.startswith(_LESS) for word in now)
    # Another format is refused by its name: all is lost, and it was said.
    is_foreign = world.kernel.release.kho_compatible != world.vars.get("format", "")
    world.vars["format"] = world.kernel.release.kho_compatible
    world.is_over = is_foreign or world.is_over
    is_less = is_less or is_foreign
    world.cursed = is_less or not on
    is_luo = "liveupdate=on" in now
    tokens = world.of("file", "preserved")
    came = any(item["type"] == "token" for item in tokens)
    has_ledger = any(item["flb"] for item in world.of("ledger"))
    world.came = {"ledger"} if came and has_ledger else set()
    if came and not is_luo:
        world.cursed = True  # whose handler is not there
    for device in world.of("device"):
        # A device that writes to what nobody preserved writes to somebody else's memory.
        if is_less or not on or not world.has(device["at"], "folio", "preserved"):
            world.is_harmed = True
    for item in list(world.items.values()):
        state = "" if is_less or not on else _after_jump(item)
        if item.kind in ("session", "crowd", "file", "ledger") and not is_luo:
            state = ""
        if state:
            item.state = state
        else:
            world.drop(item.name)


def _after_jump(item: Item) -> str:
    if item.kind == "device":
        return item.state
    if item.kind in ("session", "crowd"):
        return "incoming" if item.state == "held" else ""
    if item.state != "preserved":
        return ""
    if item.kind == "file":
        item.facts.update(was=item["session"], session="")
    return "incoming"


def _reset_choices(world: World) -> list[Args]:
    # A boot loader puts the kernel where it wants to be, and does not look for another place.
    if not world.has_kernel or world.generation >= 3 or world.is_harmed:
        return []
    return [] if world.vars.get("whole_map") else [()]


def _reset_source(world: World) -> str:
    word = told(world.release)
    more = "" if word == "'7.3'" else f"{word}, "
    return f"kernel = machine.boot({more}cmdline={world.cmdline!r})"


def _was_reset(world: World, args: Args) -> None:
    world.generation += 1
    world.cursed = world.has_died = world.is_stuck = world.has_failed = False
    world.vars["format"] = world.kernel.release.kho_compatible
    world.items.clear()
    world.came = set()


def _region_choices(world: World) -> list[Args]:
    if not world.has_kernel:
        return []
    return [(name,) for name, _, size in world.kernel.reserve_mem.regions if size]


KINDS = (
    Kind(
        "boot",
        "",
        _boot_choices,
        _boot_source,
        _booted,
        weight=0,
        can_fail=False,
        takes_any=True,
    ),
    Kind(
        "kexec",
        "",
        _kexec_choices,
        _kexec_source,
        jumped,
        lambda w, args: w.drop("image"),  # whose image is loaded now is not told
        errnos=frozenset(("EADDRNOTAVAIL", "EBUSY", "EINVAL", "ENOMEM")),
        takes_any=True,
        asks=14,
        weight=8,
    ),
    Kind(
        "reset",
        "reset",
        _reset_choices,
        _reset_source,
        _was_reset,
        can_fail=False,
        weight=1,
    ),
    Kind(
        "release_region",
        "region",
        _region_choices,
        lambda w, name: f"kernel.reserve_mem.release_by_name({name!r})",
        lambda w, args: None,
        can_fail=False,
        weight=2,
    ),
)
