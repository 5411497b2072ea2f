"""Steps about blocks that exist: preserve, unpreserve, restore, free; and a range by address.

A successor finds a group's blocks where the bytes in RAM say: ``kho_retrieve_subtree`` leads to the
group's index, and each block is restored by the address found there.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from khosim.kernel.page import Folio
from khosim.scenario.fields import Table, count_text
from khosim.scenario.group import INCOMING, LOCAL, PRESERVED, Group
from khosim.scenario.kho_user import (
    blob_is_subtree,
    place_of,
    preserve_range,
    publish,
    restore_range,
)
from khosim.scenario.model import Limits, StepFact
from khosim.scenario.places import place_field, resolve
from khosim.scenario.steps_base import (
    GroupStep,
    StepBase,
    Unexpected,
    fact_of,
    free_entries,
    preserve_entries,
    unpreserve_entries,
)

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.release import Release
    from khosim.scenario.contents import I64
    from khosim.scenario.play import Player

__all__ = ("Free", "Preserve", "PreserveAt", "Restore", "Unpreserve")


def _parse_share(table: Table) -> float:
    return table.fraction("share", 1.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Preserve(GroupStep):
    """Preserve blocks that this kernel holds, such as those it restored."""

    do: ClassVar[str] = "preserve"

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Preserve:
        """Read the step."""
        return cls(**cls.of_group(table, limits), share=_parse_share(table))

    def run(self, player: Player) -> StepFact:
        """Preserve them; a blob becomes a subtree again."""
        chosen = self.pick(player, (LOCAL,))
        for group, entries in chosen:
            preserve_entries(player, group, entries)
            if group.kind == "blob":
                _preserve_blob(player.kernel, group)
        return fact_of(player, chosen)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Unpreserve(GroupStep):
    """Take preserved blocks back before the jump."""

    do: ClassVar[str] = "unpreserve"

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Unpreserve:
        """Read the step."""
        return cls(**cls.of_group(table, limits), share=_parse_share(table))

    def lacks(self, release: Release) -> str:
        """Until 6.18 only a failure, or an abort, took anything back."""
        return "" if release.has("kho_unpreserve_folio") else "kho_unpreserve_folio"

    def run(self, player: Player) -> StepFact:
        """Unpreserve them; a blob's subtree goes too."""
        chosen = self.pick(player, (PRESERVED,))
        for group, entries in chosen:
            if group.kind == "blob":
                phys = int(group.pfn[0]) << player.kernel.arch.page_shift
                if group.index:
                    phys = group.index.pop()[1]
                player.kernel.kho_remove_subtree(phys)
            unpreserve_entries(player, group, entries)
        return fact_of(player, chosen)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Free(GroupStep):
    """Give blocks that this kernel holds, and has not preserved, back to the page allocator."""

    do: ClassVar[str] = "free"

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Free:
        """Read the step."""
        return cls(**cls.of_group(table, limits), share=_parse_share(table))

    def run(self, player: Player) -> StepFact:
        """Free them."""
        chosen = self.pick(player, (LOCAL,))
        fact = fact_of(player, chosen)
        for group, entries in chosen:
            free_entries(player, group, entries)
        return fact


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Restore(GroupStep):
    """Take over what the predecessor preserved: the group's index first, then its blocks."""

    do: ClassVar[str] = "restore"
    WORDS: ClassVar[tuple[str, ...]] = ("refused", "damaged")

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Restore:
        """Read the step."""
        return cls(**cls.of_group(table, limits), share=_parse_share(table))

    def run(self, player: Player) -> StepFact:
        """Restore them; ``refused`` where the kernel returns NULL, -ENOENT without a handover."""
        for group in player.groups_named(self.name):
            if group.is_lost or group.index or group.kind == "blob":
                _read_index(player, group)
        chosen = self.pick(player, (INCOMING,))
        for group, entries in chosen:
            _restore_entries(player, group, entries)
        return fact_of(player, chosen)


def _preserve_blob(kernel: Kernel, group: Group) -> None:
    # A blob becomes a subtree again, or a subtree tells where it is.
    folio = Folio(kernel, int(group.pfn[0]), int(group.order[0]))
    if blob_is_subtree(kernel):
        kernel.kho_add_subtree(group.name, folio.phys, folio.len_bytes)
    else:
        phys, told = publish(kernel, group.name, place_of(folio), group.owner)
        group.index.append((group.name, phys, told))


def _read_index(player: Player, group: Group) -> None:
    # kho_retrieve_subtree; what was read of an index is freed. A blob is its own subtree.
    kernel = player.kernel
    if group.is_lost:
        kernel.kho_retrieve_subtree(group.name)
        return
    if group.kind == "blob" and not group.index:
        if len(group.select((INCOMING,))):
            phys, size = kernel.kho_retrieve_subtree(group.name)
            shift = kernel.arch.page_shift
            if (phys >> shift, size >> shift) != (int(group.pfn[0]), int(group.nr_pages[0])):
                raise Unexpected("damaged", f"the subtree {group.name!r} leads to {phys:#x}")
        return
    parts, group.index = group.index, []
    for subtree, _, written in parts:
        phys, size = kernel.kho_retrieve_subtree(subtree)
        if size != len(written) or kernel.ram.read(kernel.virt(phys, size), size) != written:
            raise Unexpected("damaged", f"the index of {group.name!r} is not what was written")
        folio = kernel.kho_restore_folio(phys)
        if folio is None:
            raise Unexpected("refused", f"the index of {group.name!r} at {phys:#x} is refused")
        folio.put()


def _restore_entries(player: Player, group: Group, entries: I64) -> None:
    kernel = player.kernel
    shift = kernel.arch.page_shift
    blocks = zip(
        entries.tolist(),
        group.pfn[entries].tolist(),
        group.order[entries].tolist(),
        group.nr_pages[entries].tolist(),
        strict=True,
    )
    restored = []
    for entry, pfn, order, nr_pages in blocks:
        if order < 0:
            if not restore_range(kernel, pfn, nr_pages, group.owner):
                break
        else:
            folio = kernel.kho_restore_folio(pfn << shift)
            if folio is None:
                break
            if folio.order != order:
                raise Unexpected(
                    "damaged",
                    f"{group.name!r}: the folio at {pfn << shift:#x} came back with order "
                    f"{folio.order}, not {order}",
                )
        restored.append(entry)
    group.state[np.array(restored, dtype=np.int64)] = LOCAL
    if len(restored) < len(entries):
        phys = int(group.pfn[entries[len(restored)]]) << shift
        raise Unexpected(
            "refused",
            f"{group.name!r}: the kernel returns NULL for {phys:#x}, "
            f"after {count_text(len(restored), 'block')}",
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PreserveAt(StepBase):
    """``kho_preserve_pages`` on a range by address, whoever owns it: a user's mistake."""

    do: ClassVar[str] = "preserve_at"
    at: int | str
    offset: int
    pages: int

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> PreserveAt:
        """Read the step."""
        return cls(
            **cls.common(table, limits, name=""),
            at=place_field(table, limits),
            offset=table.size("offset") or 0,
            pages=table.integer("pages", 1, 1, 1 << 32),
        )

    def run(self, player: Player) -> StepFact:
        """Preserve the range."""
        kernel = player.kernel
        phys = resolve(player, self.at, self.place) + self.offset
        if not kernel.hardware.is_ram(phys, self.pages * kernel.arch.page_size):
            raise player.error(self.place, f"{self.pages} pages at {phys:#x} are not all RAM")
        pfn = phys >> kernel.arch.page_shift
        if not pfn:
            raise player.error(self.place, "page 0 has no alignment that the kernel could use")
        preserve_range(kernel, pfn, self.pages)
        return StepFact(1, self.pages * kernel.arch.page_size, f"at {phys:#x}")
