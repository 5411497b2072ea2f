"""Steps with memory: folios, runs of pages, ranges that somebody chose, blobs and subtrees.

Boundaries come from the machine: the smallest and largest order, sizes around whole pages, ranges
across the borders of nodes and zones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from khosim.explore.kinds import NEW, Args, Kind, gone, lost, nothing, of, preservable, to

if TYPE_CHECKING:
    from khosim.explore.world import World

__all__ = ("KINDS",)

_HELD_MAX = 4
_NAMES = ("t", "t@1", "s/t", "n" * 31, "m" * 256, "")
"""Of subtrees: any text. libfdt finds a node by its name without what stands behind an ``@``."""

# -- folios --------------------------------------------------------------------------------------


def _folio_choices(world: World) -> list[Args]:
    if not world.has_kernel or len(world.of("folio")) >= _HELD_MAX:
        return []
    top = world.kernel.arch.max_page_order
    return [(NEW, order) for order in (0, 1, top - 1, top)]


def _movable_choices(world: World) -> list[Args]:
    # What user space has; after a handover scratch serves it.
    return [args for args in _folio_choices(world) if args[1] in (0, 1)]


def _folio_done(world: World, args: Args) -> None:
    world.add("folio", args[0], order=args[1], twice=False)


def _once(kind: str) -> Any:
    def choices(world: World) -> list[Args]:
        return [(item.name,) for item in world.of(kind, "preserved") if not item["twice"]]

    return choices


def _quiet_folios(world: World) -> list[Args]:
    written = {item["at"] for item in world.of("device")}
    return [(item.name,) for item in world.of("folio", "held") if item.name not in written]


def _twice(world: World, args: Args) -> None:
    world.items[args[0]].facts["twice"] = True


def _unpreserved(world: World, args: Args) -> None:
    # Where two have preserved it, the second one's word still stands.
    item = world.items[args[0]]
    if item["twice"]:
        item.facts["twice"] = False
    else:
        item.state = "held"


# -- pages ---------------------------------------------------------------------------------------


def _pages_choices(world: World) -> list[Args]:
    if not world.has_kernel or len(world.of("pages")) >= _HELD_MAX:
        return []
    top = 1 << world.kernel.arch.max_page_order
    return [(NEW, nr) for nr in (1, 2, 3, 7, top - 1, top)]


def _pages_done(world: World, args: Args) -> None:
    world.add("pages", args[0], nr=args[1], twice=False)


def _range_choices(world: World) -> list[Args]:
    # Across the border of two zones or nodes: the smallest range that a block of its alignment
    # could be, and twice that.
    if not world.has_kernel or len(world.of("pages")) >= _HELD_MAX:
        return []
    found = []
    zones = world.kernel.pages.zones
    for border in [zone.start_pfn for zone in zones[1:]]:
        for order in (0, 1):
            half = (border & -border) << order
            found.append((NEW, border - half, 2 * half))
    return found


def _range_done(world: World, args: Args) -> None:
    world.add("pages", args[0], nr=args[2], twice=False)


def _page_runs(*states: str, preserves: bool = False) -> Any:
    def choices(world: World) -> list[Args]:
        if preserves and not world.can_preserve:
            return []
        return [(item.name, item["nr"]) for item in world.of("pages", *states)]

    return choices


def _parts(world: World) -> list[Args]:
    # Somebody else preserves the last page of a run as well.
    if not world.can_preserve:
        return []
    return [
        (item.name, item["nr"] - 1) for item in world.of("pages", "preserved") if item["nr"] > 1
    ]


def _many_choices(world: World) -> list[Args]:
    # More blocks than memblock has room for before its arrays grow.
    if not world.can_preserve or world.of("many"):
        return []
    return [(NEW, 200)]


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
        "alloc_movable",
        "folio",
        _movable_choices,
        lambda w, f, order: (
            f'{f} = kernel.alloc_folio({order}, movable=True)\n{f}.write(0, b"{f}")'
        ),
        _folio_done,
        letter="f",
        errnos=_NO_ROOM,
        can_fail=False,
        weight=3,
    ),
    Kind(
        "preserve_folio",
        "folio",
        preservable("folio"),
        lambda w, f: f"kernel.kho_preserve_folio({f})",
        to("preserved"),
        errnos=frozenset(("EINVAL",)),
        weight=10,
    ),
    Kind(
        "preserve_folio_again",
        "folio",
        _once("folio"),
        lambda w, f: f"kernel.kho_preserve_folio({f})",
        _twice,
        errnos=frozenset(("EEXIST",)),
        weight=2,
    ),
    Kind(
        "unpreserve_folio",
        "folio",
        of("folio", "preserved"),
        lambda w, f: f"kernel.kho_unpreserve_folio({f})",
        _unpreserved,
        weight=2,
        can_fail=False,
    ),
    Kind(
        "free_folio",
        "folio",
        _quiet_folios, lambda w, f: f"{f}.put()", gone,
        weight=1,
        can_fail=False,
    ),
    Kind(
        "restore_folio",
        "folio",
        of("folio", "incoming"),
        lambda w, f: (
            f"{f} = kernel.kho_restore_folio({f}.phys)\n"
            f'assert {f} and {f}.read(0, {len(f)}) == b"{f}"'
        ),
        to("held"),
        lost,
        weight=12,
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
        "take_range",
        "pages",
        _range_choices,
        lambda w, p, start, nr: f"{p} = take_range(kernel, {start:#x}, {nr:#x})",
        _range_done,
        letter="p",
        errnos=frozenset(("EBUSY", "EINVAL", "ENOMEM")),
        weight=8,
    ),
    Kind(
        "preserve_pages",
        "pages",
        _page_runs("held", preserves=True),
        lambda w, p, nr: f"kernel.kho_preserve_pages({p}, {nr})",
        to("preserved"),
        weight=10,
    ),
    Kind(
        "unpreserve_pages",
        "pages",
        _page_runs("preserved"),
        lambda w, p, nr: f"kernel.kho_unpreserve_pages({p}, {nr})",
        to("held"),
        weight=2,
        can_fail=False,
    ),
    Kind(
        "free_pages",
        "pages",
        _page_runs("held"),
        lambda w, p, nr: f"for pfn in range({p}, {p} + {nr}):\n    kernel.pages.free_pages(pfn, 0)",
        gone,
        weight=1,
        can_fail=False,
    ),
    Kind(
        "restore_pages",
        "pages",
        _page_runs("incoming"),
        lambda w, p, nr: (
            f"assert kernel.kho_restore_pages({p} << {w.kernel.arch.page_shift}, {nr}) == {p}"
        ),
        to("held"),
        lost,
        weight=12,
    ),
    Kind(
        "preserve_part",
        "pages",
        _parts,
        lambda w, p, at: f"kernel.kho_preserve_pages({p} + {at}, 1)",
        nothing,
        errnos=frozenset(("EEXIST",)),
        weight=1,
        can_fail=False,
    ),
    Kind(
        "preserve_many",
        "pages",
        _many_choices,
        lambda w, n, count: f"{n} = preserve_many(kernel, {count})",
        lambda w, args: w.add("many", args[0], "preserved"),
        letter="n",
        errnos=_NO_ROOM,
        weight=1,
        can_fail=False,
    ),
    Kind(
        "restore_many",
        "pages",
        of("many", "incoming"),
        lambda w, n: f"restore_many(kernel, {n})",
        gone,
        weight=8,
        can_fail=False,
    ),
    Kind(
        "unpreserve_many",
        "pages",
        of("many", "preserved"),
        lambda w, n: (
            f"for folio in {n}:\n    kernel.kho_unpreserve_folio(folio)\n    folio.put()"
        ),
        gone,
        weight=1,
        can_fail=False,
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
        gone,
        weight=1,
        can_fail=False,
    ),
    Kind(
        "restore_free",
        "blob",
        of("blob", "incoming"),
        lambda w, b: f"kernel.kho_restore_free({b}.phys)",
        gone,
        weight=4,
    ),
    Kind(
        "add_subtree",
        "subtree",
        _subtree_choices,
        lambda w, b, name, size: f"kernel.kho_add_subtree({name!r}, {b}.phys, {size})",
        _subtree_done,
        errnos=frozenset(("EEXIST", "EINVAL", "ENOMEM")),
        weight=8,
    ),
    Kind(
        "remove_subtree",
        "subtree",
        _in_subtree,
        lambda w, b: f"kernel.kho_remove_subtree({b}.phys)",
        _subtree_removed,
        weight=1,
        can_fail=False,
    ),
    Kind(
        "retrieve_subtree",
        "subtree",
        _found,
        lambda w, b, name, size: (
            f"assert kernel.kho_retrieve_subtree({name!r}) == ({b}.phys, {size})"
        ),
        nothing,
        weight=6,
        can_fail=False,
    ),
)
