"""Steps that allocate: folios of mixed orders, ranges of pages, blobs.

They stand for the users of ``kho_preserve_folio``, ``kho_preserve_pages`` and
``kho_alloc_preserve`` (``kernel/liveupdate/kexec_handover.c @ 7.3``).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from khosim.errors import KernelError
from khosim.scenario.contents import FILLS, I64, first_keys, write_pages
from khosim.scenario.fields import Table, count_text, size_text
from khosim.scenario.group import LOCAL, PRESERVED, Group
from khosim.scenario.kho_user import alloc_preserve, blob_is_subtree, place_of, publish
from khosim.scenario.model import MAX_CONTENT_BYTES, MAX_FOLIOS, Limits, StepFact
from khosim.scenario.places import RESERVED_NAMES
from khosim.scenario.steps_base import StepBase, fact_of, preserve_entries

if TYPE_CHECKING:
    from khosim.scenario.play import Player

__all__ = ("Blob", "Folios", "Pages")

_MAX_WEIGHT = 1_000_000


def _new_name(table: Table, limits: Limits) -> str:
    name = table.name("name")
    if name in RESERVED_NAMES:
        raise table.error(f"name: {name!r} names a place; choose another")
    if name in limits.files:
        raise table.error(f"name: {name!r} is a guest or a device; choose another")
    limits.names.add(name)
    return name


def _book(table: Table, limits: Limits, blocks: int, pages: int, filled_pages: int) -> None:
    # Refuse what the machine or this program cannot carry, before anything runs.
    ram = limits.ram_bytes
    if pages * limits.page_size > ram:
        raise table.error(
            f"{size_text(pages * limits.page_size)} do not fit into {size_text(ram)} of RAM"
        )
    limits.folios_left -= blocks * limits.repeats
    if limits.folios_left < 0:
        raise table.error(f"with this, the scenario allocates more than {MAX_FOLIOS:,} folios")
    limits.content_left -= filled_pages * limits.page_size * limits.repeats
    if limits.content_left < 0:
        raise table.error(
            f"with this, the scenario writes more than {size_text(MAX_CONTENT_BYTES)} of "
            'content: use fill = "ends" or "none"'
        )


def _filled(fill: int, nr_pages: int) -> int:
    return (0, min(nr_pages, 2), nr_pages)[fill]


def _group(player: Player, step: StepBase, kind: str, owner: str) -> Group:
    group = player.groups.get(step.name)
    if group is None:
        group = player.groups[step.name] = Group(step.name, kind, owner)
    elif group.kind != kind:
        raise player.error(step.place, f"{step.name!r} holds {group.kind} already, not {kind}")
    return group


def _enter(
    player: Player, group: Group, pfn: I64, nr_pages: I64, order: I64, fill: int, state: int
) -> I64:
    # Book the blocks and write their content.
    keys = first_keys(player.seed, f"{group.name}:{player.serial()}", len(pfn))
    entries = group.add(pfn, nr_pages, order, keys, fill=fill, state=state)
    pfns, page_keys = group.content(entries)
    write_pages(player.kernel.ram, pfns, page_keys, player.kernel.by(group.owner))
    return entries


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Folios(StepBase):
    """Allocate folios, write content, and preserve them; adds to the group if there is one."""

    do: ClassVar[str] = "folios"
    counts: tuple[tuple[int, int], ...]
    """``(order, folios)`` by ascending order."""
    owner: str
    node: int | None
    movable: bool
    fill: int
    preserve: bool

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Folios:
        """Read the step."""
        name = _new_name(table, limits)
        total = table.integer("count", 1, 1, MAX_FOLIOS)
        if table.has("order") and table.has("orders"):
            raise table.error("give 'order' or 'orders', not both")
        weights = _weights(table, limits) if table.has("orders") else None
        if weights is None:
            order = table.integer("order", 0, 0, 1 << 31)
            _check_order(table, order, limits)
            weights = {order: 1}
        counts = _shares(weights, total)
        fill = FILLS.index(table.choice("fill", FILLS, "ends"))
        pages = sum(count << order for order, count in counts)
        filled = sum(count * _filled(fill, 1 << order) for order, count in counts)
        _book(table, limits, total, pages, filled)
        return cls(
            **cls.common(table, limits, name=name),
            counts=counts,
            owner=table.name("owner", name),
            node=table.integer("node", 0, 0, 63) if table.has("node") else None,
            movable=table.flag("movable"),
            fill=fill,
            preserve=table.flag("preserve", True),
        )

    def run(self, player: Player) -> StepFact:
        """Allocate order by order, all folios of an order in one call."""
        kernel = player.kernel
        group = _group(player, self, "folios", self.owner)
        pfns, orders = [], []
        for order, count in self.counts:
            runs = kernel.alloc_folios(
                count, order, owner=self.owner, movable=self.movable, nid=self.node
            )
            first = np.array([pfn for pfn, _ in runs], dtype=np.int64)
            length = np.array([nr for _, nr in runs], dtype=np.int64)
            at = np.arange(count) - np.repeat(np.cumsum(length) - length, length)
            pfns.append(np.repeat(first, length) + (at << order))
            orders.append(np.full(count, order, dtype=np.int64))
        order_of = np.concatenate(orders)
        entries = _enter(
            player, group, np.concatenate(pfns), 1 << order_of, order_of, self.fill, LOCAL
        )
        if self.preserve:
            preserve_entries(player, group, entries)
        return fact_of(player, [(group, entries)], "preserved" if self.preserve else "kept")


def _check_order(table: Table, order: int, limits: Limits) -> None:
    if order > limits.max_order:
        raise table.error(f"order {order} is above the largest order {limits.max_order}")


def _weights(table: Table, limits: Limits) -> dict[int, int]:
    given = Table(table.any("orders"), f"{table.place}: orders")
    weights: dict[int, int] = {}
    for order in range(limits.max_order + 1):
        if given.has(str(order)):
            weight = given.integer(str(order), None, 0, _MAX_WEIGHT)
            if weight:
                weights[order] = weight
    for key in given.rest():
        if not key.isascii() or not key.isdigit():
            raise given.error(f"{key!r} is not an order (a number from 0 to {limits.max_order})")
        raise given.error(f"order {key} is above the largest order {limits.max_order}")
    if not weights:
        raise given.error("no order has a weight")
    return weights


def _shares(weights: dict[int, int], total: int) -> tuple[tuple[int, int], ...]:
    """``total`` divided by weight, to the last one: largest remainders first, then low orders."""
    whole = sum(weights.values())
    counts = {order: total * weight // whole for order, weight in weights.items()}
    by_rest = sorted(weights, key=lambda order: (-(total * weights[order] % whole), order))
    for order in by_rest[: total - sum(counts.values())]:
        counts[order] += 1
    return tuple(sorted((order, count) for order, count in counts.items() if count))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pages(StepBase):
    """Allocate a range of order-0 pages, write content, and preserve it with one call."""

    do: ClassVar[str] = "pages"
    count: int
    owner: str
    fill: int
    preserve: bool

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Pages:
        """Read the step."""
        name = _new_name(table, limits)
        count = table.integer("count", None, 1, 1 << 32)
        fill = FILLS.index(table.choice("fill", FILLS, "ends"))
        _book(table, limits, 1, count, _filled(fill, count))
        return cls(
            **cls.common(table, limits, name=name),
            count=count,
            owner=table.name("owner", name),
            fill=fill,
            preserve=table.flag("preserve", True),
        )

    def run(self, player: Player) -> StepFact:
        """``alloc_pages_exact`` and ``kho_preserve_pages``."""
        group = _group(player, self, "pages", self.owner)
        pfn = player.kernel.alloc_pages_exact(self.count, owner=self.owner)
        one = np.array([pfn], dtype=np.int64)
        entries = _enter(player, group, one, one * 0 + self.count, one * 0 - 1, self.fill, LOCAL)
        if self.preserve:
            preserve_entries(player, group, entries)
        note = f"{count_text(self.count, 'page')}, {'preserved' if self.preserve else 'kept'}"
        return fact_of(player, [(group, entries)], note)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Blob(StepBase):
    """``kho_alloc_preserve`` a blob, fill it, and hand it over as a subtree of its own."""

    do: ClassVar[str] = "blob"
    size: int
    owner: str
    fill: int

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Blob:
        """Read the step; sizes that the kernel refuses are for the kernel to refuse."""
        name = _new_name(table, limits)
        size = table.size("size", high=1 << 44)
        if size is None:
            raise table.missing("size")
        fill = FILLS.index(table.choice("fill", FILLS, "all"))
        pages = min(-(-size // limits.page_size), 1 << limits.max_order)
        _book(table, limits, 1, pages, _filled(fill, pages))
        common = cls.common(table, limits, name=name)
        return cls(**common, size=size, owner=table.name("owner", name), fill=fill)

    def run(self, player: Player) -> StepFact:
        """Allocate, fill, add the subtree."""
        kernel = player.kernel
        group = _group(player, self, "blob", self.owner)
        if len(group):
            raise player.error(self.place, f"there is a blob {self.name!r} already")
        folio = alloc_preserve(kernel, self.size)
        if blob_is_subtree(kernel):
            try:
                kernel.kho_add_subtree(self.name, folio.phys, folio.len_bytes)
            except KernelError:
                kernel.kho_unpreserve_free(folio)
                raise
        else:
            phys, told = publish(kernel, self.name, place_of(folio), self.owner)
            group.index.append((self.name, phys, told))
        one = np.array([folio.pfn], dtype=np.int64)
        order = one * 0 + folio.order
        entries = _enter(player, group, one, 1 << order, order, self.fill, PRESERVED)
        return fact_of(player, [(group, entries)], "subtree")
