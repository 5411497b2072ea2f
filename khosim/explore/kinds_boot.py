"""Steps with whole kernels: booting, handing over to a successor that is a little different.

A successor's command line is its predecessor's with one thing changed. Sizes of ``reserve_mem``
regions lie around pages and pageblocks; ``mem=``, ``hugepages=`` and ``kho_scratch=`` around what
the machine has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from khosim.explore.kinds import Args, Kind

if TYPE_CHECKING:
    from khosim.explore.world import Item, World

__all__ = ("KINDS",)

_BASE = "kho=on liveupdate=on"
_MACHINES = ('"64M"', '"96M", nodes=2', '"64M", allocator="adversarial"', '"4G"')


def _region_words(name: str) -> list[str]:
    page, block = 4096, 2 << 20
    sizes = (64, page, page + 1, 3 * page - 1, block)
    return [f"reserve_mem={size}:{align}:{name}" for size in sizes for align in (64, page)]


def _boot_choices(world: World) -> list[Args]:
    if world.has_kernel:
        return []
    lines = [_BASE]
    lines += [f"{_BASE} {word}" for word in _region_words("a")]
    lines += [f"{_BASE} reserve_mem=4096:4096:a reserve_mem=8192:4096:b", "kho=off", "kho=on"]
    sizes = ("8M,8M,0", "1M,64M,1M", "300%", "8M,64M,8G", "8M,8G,8M", "8G,8M,8M")
    lines += [f"{_BASE} kho_scratch={size}" for size in sizes]
    release = world.release
    return [(spec, line, release) for spec in _MACHINES for line in lines]


def _boot_source(world: World, spec: str, line: str, release: Any) -> str:
    world.vars["release"] = release
    told = f"{release!r}" if isinstance(release, str) else "release"
    more = "" if told == "'7.3'" else f"{told}, "
    return f"machine = Stage({spec})\nkernel = machine.boot({more}cmdline={line!r})"


def _booted(world: World, args: Args) -> None:
    world.cmdline = args[1]
    world.generation = 0


def _words(line: str) -> list[str]:
    return line.split()


def _successors(world: World) -> list[str]:
    words = _words(world.cmdline)
    variants = [world.cmdline]
    regions = [word for word in words if word.startswith("reserve_mem=")]
    others = [word for word in words if word not in regions]
    for i in range(len(regions)):
        left = regions[:i] + regions[i + 1 :]
        variants.append(" ".join(others + left))
        name = regions[i].rsplit(":", 1)[1]
        variants += [" ".join(others + left + [word]) for word in _region_words(name)]
    names = {word.rsplit(":", 1)[1] for word in regions}
    for name in ("a", "b"):
        if name not in names and len(regions) < 3:
            variants += [f"{world.cmdline} {word}" for word in _region_words(name)]
    if "kho=on" in words:
        variants.append(world.cmdline.replace("kho=on", "kho=off"))
    ram = world.machine.hardware.memory_map.ram_bytes
    if not any(word.startswith(("mem=", "elfcorehdr=", "hugepages=")) for word in words):
        variants += [f"{world.cmdline} mem={ram // 4 * n}" for n in (1, 2, 3)]
        variants += [f"{world.cmdline} elfcorehdr={text}" for text in ("1M", "x")]
        variants += [f"{world.cmdline} hugepages={n}" for n in (1, 4)]
    return list(dict.fromkeys(variants))


def _kexec_choices(world: World) -> list[Args]:
    if not world.has_kernel or world.generation >= 3:
        return []
    return [(line,) for line in _successors(world)]


def _kexec_source(world: World, line: str) -> str:
    if line == world.cmdline:
        return "kernel = kernel.kexec()"
    return f"kernel = kernel.kexec(cmdline={line!r})"


_LESS = ("mem=", "elfcorehdr=")


def _jumped(world: World, args: Args) -> None:
    before, world.cmdline = _words(world.cmdline), args[0]
    now = _words(args[0])
    world.generation += 1
    on = "kho=on" in before
    is_less = "kho=off" in now or any(word.startswith(_LESS) for word in now)
    world.cursed = is_less or not on
    for item in list(world.items.values()):
        state = "" if is_less or not on else _after_jump(item)
        if state:
            item.state = state
        else:
            world.drop(item.name)


def _after_jump(item: Item) -> str:
    if item.kind in ("session", "crowd"):
        return "incoming" if item.state == "held" else ""
    if item.state != "preserved":
        return ""
    if item.kind == "file":
        item.facts.update(was=item["session"], session="")
    return "incoming"


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
        _jumped,
        errnos=frozenset(("EADDRNOTAVAIL", "EBUSY", "ENOMEM")),
        weight=5,
        takes_any=True,
    ),
    Kind(
        "release_region",
        "region",
        _region_choices,
        lambda w, name: f"kernel.reserve_mem.release_by_name({name!r})",
        lambda w, args: None,
        can_fail=False,
    ),
)
