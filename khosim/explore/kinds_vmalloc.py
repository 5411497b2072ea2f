"""Steps with vmalloc areas.

Boundaries: sizes around whole pages, around huge blocks, and around what one chunk of an area lists
(:func:`khosim.abi.kho_vmalloc.kho_vmalloc_size`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.abi.kho_vmalloc import kho_vmalloc_size
from khosim.explore.kinds import NEW, Args, Kind, gone, nothing, of, preservable, to

if TYPE_CHECKING:
    from khosim.explore.world import World

__all__ = ("KINDS",)


def _area_choices(world: World) -> list[Args]:
    if not world.has_kernel or len(world.of("area")) >= 2:
        return []
    page = world.kernel.arch.page_size
    full = kho_vmalloc_size(page)
    huge = page << (world.kernel.arch.page_shift - 3)
    sizes = [(size, False) for size in (1, page + 1, full * page, (full + 1) * page)]
    sizes += [(size, True) for size in (page, huge, huge + 1, full * huge, (full + 1) * huge)]
    room = world.free_bytes // 2
    return [(NEW, size, is_huge) for size, is_huge in sizes if size < room]


def _area_done(world: World, args: Args) -> None:
    world.add("area", args[0], size=args[1], huge=args[2])


def _slot_done(world: World, args: Args) -> None:
    world.items[args[0]].state = "preserved"


_AREA = "from khosim.kernel.vmalloc import vfree, vmalloc\n"
_KHO = "from khosim.kernel.kho_vmalloc import KhoVmallocSlot, kho_{}_vmalloc\n"


def _area_source(world: World, name: str, size: int, huge: bool) -> str:
    more = ", huge=True" if huge else ""
    return (
        f"{_AREA}{name} = vmalloc(kernel, {size}{more})\nassert {name}, 'no area'\n"
        f'{name}.write(0, b"{name[0]}")\n{name}_order = {name}.page_order'
    )



def _used_source(world: World) -> str:
    held = "".join(f"{area.name}, " for area in world.of("area", "held"))
    return f"assert vmalloc_used(kernel) >= sum(v.nr_pages for v in ({held}))"


KINDS = (
    Kind(
        "vmalloc",
        "vmalloc",
        _area_choices,
        _area_source,
        _area_done,
        letter="v",
        can_fail=False,
    ),
    Kind(
        "preserve_vmalloc",
        "vmalloc",
        preservable("area"),
        lambda w, v: (
            f"{_KHO.format('preserve')}{v}_slot = KhoVmallocSlot(kernel)\n"
            f"kho_preserve_vmalloc(kernel, {v}, {v}_slot)"
        ),
        _slot_done,
        asks=8,
        weight=16,
    ),
    Kind(
        "unpreserve_vmalloc",
        "vmalloc",
        of("area", "preserved"),
        lambda w, v: f"{_KHO.format('unpreserve')}kho_unpreserve_vmalloc(kernel, {v}_slot)",
        to("held"),
        weight=2,
        can_fail=False,
    ),
    Kind(
        "restore_vmalloc",
        "vmalloc",
        of("area", "incoming"),
        lambda w, v: (
            f"from khosim.abi.kho_vmalloc import pack_kho_vmalloc\n{_KHO.format('restore')}"
            f"{v} = kho_restore_vmalloc(kernel, KhoVmallocSlot(kernel, "
            f"stack=pack_kho_vmalloc({v}_slot.load())))\n"
            f'assert {v} and {v}.read(0, 1) == b"{v[0]}"\nassert {v}.page_order == {v}_order'
        ),
        to("held"),
        weight=16,
    ),
    Kind(
        "vmalloc_used",
        "vmalloc",
        lambda w: [()] if w.has_kernel else [],
        _used_source,
        nothing,
        weight=4,
        can_fail=False,
    ),
    Kind(
        "vfree",
        "vmalloc",
        of("area", "held"), lambda w, v: f"{_AREA}vfree(kernel, {v})", gone,
        weight=1,
        can_fail=False,
    ),
)
