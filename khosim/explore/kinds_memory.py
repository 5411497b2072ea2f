"""Steps with memory: folios, runs of pages, blobs and subtrees, vmalloc areas.

Boundaries come from the machine: the smallest and largest order, sizes around whole pages and
around what one chunk of a vmalloc area lists (:func:`khosim.abi.kho_vmalloc.kho_vmalloc_size`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from khosim.abi.kho_vmalloc import kho_vmalloc_size
from khosim.explore.kinds import NEW, Args, Kind

if TYPE_CHECKING:
    from khosim.explore.world import World

__all__ = ("KINDS",)

_HELD_MAX = 4
_NAMES = ("t", "n" * 31, "m" * 63)


def _nothing(world: World, args: Args) -> None:
    """No books to keep."""


# -- folios --------------------------------------------------------------------------------------


def _folio_choices(world: World) -> list[Args]:
    if not world.has_kernel or len(world.of("folio")) >= _HELD_MAX:
        return []
    top = world.kernel.arch.max_page_order
    return [(NEW, order) for order in (0, 1, top - 1, top)]


def _folio_done(world: World, args: Args) -> None:
    world.add("folio", args[0], order=args[1])


def _of(kind: str, *states: str) -> Any:
    def choices(world: World) -> list[Args]:
        return [(item.name,) for item in world.of(kind, *states)]

    return choices


def _preservable(kind: str) -> Any:
    def choices(world: World) -> list[Args]:
        return [(item.name,) for item in world.of(kind, "held")] if world.can_preserve else []

    return choices


def _to(state: str) -> Any:
    def done(world: World, args: Args) -> None:
        world.items[args[0]].state = state

    return done


def _lost(world: World, args: Args) -> None:
    world.items[args[0]].state = "lost"


def _gone(world: World, args: Args) -> None:
    world.drop(args[0])


# -- pages ---------------------------------------------------------------------------------------


def _pages_choices(world: World) -> list[Args]:
    if not world.has_kernel or len(world.of("pages")) >= _HELD_MAX:
        return []
    top = 1 << world.kernel.arch.max_page_order
    return [(NEW, nr) for nr in (1, 2, 3, 7, top - 1, top)]


def _pages_done(world: World, args: Args) -> None:
    world.add("pages", args[0], nr=args[1])


def _page_runs(*states: str, preserves: bool = False) -> Any:
    def choices(world: World) -> list[Args]:
        if preserves and not world.can_preserve:
            return []
        return [(item.name, item["nr"]) for item in world.of("pages", *states)]

    return choices


# -- blobs and subtrees --------------------------------------------------------------------------


def _blob_choices(world: World) -> list[Args]:
    if not world.can_preserve or len(world.of("blob")) >= _HELD_MAX:
        return []
    page = world.kernel.arch.page_size
    top = page << world.kernel.arch.max_page_order
    return [(NEW, size) for size in (1, page, page + 1, top, top + 1)]


def _blob_done(world: World, args: Args) -> None:
    world.add("blob", args[0], "preserved", size=args[1], subtree="")


def _subtree_choices(world: World) -> list[Args]:
    blobs = [blob for blob in world.of("blob", "preserved") if not blob["subtree"]]
    return [(blob.name, name, blob["size"]) for blob in blobs for name in _NAMES]


def _subtree_done(world: World, args: Args) -> None:
    world.items[args[0]].facts["subtree"] = args[1]


def _in_subtree(world: World) -> list[Args]:
    return [(blob.name,) for blob in world.of("blob", "preserved") if blob["subtree"]]


def _subtree_removed(world: World, args: Args) -> None:
    world.items[args[0]].facts["subtree"] = ""


def _found(world: World) -> list[Args]:
    return [
        (blob.name, blob["subtree"], blob["size"])
        for blob in world.of("blob", "incoming")
        if blob["subtree"]
    ]


def _free_blobs(world: World) -> list[Args]:
    return [(blob.name,) for blob in world.of("blob", "preserved") if not blob["subtree"]]


# -- vmalloc -------------------------------------------------------------------------------------


def _area_choices(world: World) -> list[Args]:
    if not world.has_kernel or len(world.of("area")) >= 2:
        return []
    page = world.kernel.arch.page_size
    full = kho_vmalloc_size(page)
    huge = page << (world.kernel.arch.page_shift - 3)
    plain = [(NEW, size, False) for size in (1, page + 1, full * page, (full + 1) * page)]
    sizes = (page, huge, huge + 1, full * huge, (full + 1) * huge)
    room = world.kernel.total_ram_pages() * page // 2
    return [*plain, *((NEW, size, True) for size in sizes if size < room)]


def _area_done(world: World, args: Args) -> None:
    world.add("area", args[0], size=args[1], huge=args[2])


def _slot_done(world: World, args: Args) -> None:
    world.items[args[0]].state = "preserved"


_AREA = "from khosim.kernel.vmalloc import vfree, vmalloc\n"
_KHO = "from khosim.kernel.kho_vmalloc import KhoVmallocSlot, kho_{}_vmalloc\n"
_TAG = 'b"{0}"'


def _area_source(world: World, name: str, size: int, huge: bool) -> str:
    more = ", huge=True" if huge else ""
    return (
        f"{_AREA}{name} = vmalloc(kernel, {size}{more})\nassert {name}, 'no area'\n"
        f'{name}.write(0, b"{name[0]}")\n{name}_order = {name}.page_order'
    )


_NO_ROOM = frozenset(("ENOMEM",))

KINDS = (
    Kind(
        "alloc_folio",
        "folio",
        _folio_choices,
        lambda w, f, order: f'{f} = kernel.alloc_folio({order})\n{f}.write(0, b"{f}")',
        _folio_done,
        letter="f",
        errnos=_NO_ROOM,
    ),
    Kind(
        "preserve_folio",
        "folio",
        _preservable("folio"),
        lambda w, f: f"kernel.kho_preserve_folio({f})",
        _to("preserved"),
        weight=6,
    ),
    Kind(
        "unpreserve_folio",
        "folio",
        _of("folio", "preserved"),
        lambda w, f: f"kernel.kho_unpreserve_folio({f})",
        _to("held"),
    ),
    Kind("free_folio", "folio", _of("folio", "held"), lambda w, f: f"{f}.put()", _gone),
    Kind(
        "restore_folio",
        "folio",
        _of("folio", "incoming"),
        lambda w, f: (
            f"{f} = kernel.kho_restore_folio({f}.phys)\n"
            f'assert {f} and {f}.read(0, {len(f)}) == b"{f}"'
        ),
        _to("held"),
        _lost,
        weight=8,
    ),
    Kind(
        "alloc_pages",
        "pages",
        _pages_choices,
        lambda w, p, nr: f"{p} = kernel.alloc_pages_exact({nr})",
        _pages_done,
        letter="p",
        errnos=_NO_ROOM,
    ),
    Kind(
        "preserve_pages",
        "pages",
        _page_runs("held", preserves=True),
        lambda w, p, nr: f"kernel.kho_preserve_pages({p}, {nr})",
        _to("preserved"),
        weight=6,
    ),
    Kind(
        "unpreserve_pages",
        "pages",
        _page_runs("preserved"),
        lambda w, p, nr: f"kernel.kho_unpreserve_pages({p}, {nr})",
        _to("held"),
    ),
    Kind(
        "free_pages",
        "pages",
        _page_runs("held"),
        lambda w, p, nr: f"for pfn in range({p}, {p} + {nr}):\n    kernel.pages.free_pages(pfn, 0)",
        _gone,
    ),
    Kind(
        "restore_pages",
        "pages",
        _page_runs("incoming"),
        lambda w, p, nr: (
            f"assert kernel.kho_restore_pages({p} << {w.kernel.arch.page_shift}, {nr}) == {p}"
        ),
        _to("held"),
        _lost,
        weight=8,
    ),
    Kind(
        "alloc_preserve",
        "blob",
        _blob_choices,
        lambda w, b, size: f"{b} = kernel.kho_alloc_preserve({size})",
        _blob_done,
        letter="b",
        errnos=frozenset(("ENOMEM", "E2BIG")),
    ),
    Kind(
        "unpreserve_free",
        "blob",
        _free_blobs,
        lambda w, b: f"kernel.kho_unpreserve_free({b})",
        _gone,
    ),
    Kind(
        "restore_free",
        "blob",
        _of("blob", "incoming"),
        lambda w, b: f"kernel.kho_restore_free({b}.phys)",
        _gone,
        weight=8,
    ),
    Kind(
        "add_subtree",
        "subtree",
        _subtree_choices,
        lambda w, b, name, size: f"kernel.kho_add_subtree({name!r}, {b}.phys, {size})",
        _subtree_done,
        errnos=frozenset(("EEXIST", "ENOMEM")),
    ),
    Kind(
        "remove_subtree",
        "subtree",
        _in_subtree,
        lambda w, b: f"kernel.kho_remove_subtree({b}.phys)",
        _subtree_removed,
    ),
    Kind(
        "retrieve_subtree",
        "subtree",
        _found,
        lambda w, b, name, size: (
            f"assert kernel.kho_retrieve_subtree({name!r}) == ({b}.phys, {size})"
        ),
        _nothing,
    ),
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
        _preservable("area"),
        lambda w, v: (
            f"{_KHO.format('preserve')}{v}_slot = KhoVmallocSlot(kernel)\n"
            f"kho_preserve_vmalloc(kernel, {v}, {v}_slot)"
        ),
        _slot_done,
        weight=6,
    ),
    Kind(
        "unpreserve_vmalloc",
        "vmalloc",
        _of("area", "preserved"),
        lambda w, v: f"{_KHO.format('unpreserve')}kho_unpreserve_vmalloc(kernel, {v}_slot)",
        _to("held"),
    ),
    Kind(
        "restore_vmalloc",
        "vmalloc",
        _of("area", "incoming"),
        lambda w, v: (
            f"from khosim.abi.kho_vmalloc import pack_kho_vmalloc\n{_KHO.format('restore')}"
            f"{v} = kho_restore_vmalloc(kernel, KhoVmallocSlot(kernel, "
            f"stack=pack_kho_vmalloc({v}_slot.load())))\n"
            f'assert {v} and {v}.read(0, 1) == b"{v[0]}"\nassert {v}.page_order == {v}_order'
        ),
        _to("held"),
        _lost,
        weight=8,
    ),
    Kind("vfree", "vmalloc", _of("area", "held"), lambda w, v: f"{_AREA}vfree(kernel, {v})", _gone),
)
