"""What all steps share: fields, how they say that something went otherwise, whole-group calls.

Preserving, restoring and freeing go through the calls of :class:`khosim.kernel.kernel.Kernel`, all
blocks of one order at a time where the kernel model offers it.
"""

from __future__ import annotations

import dataclasses
import errno
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from khosim.errors import InputError, KhoSimError
from khosim.kernel.kernel import Folio
from khosim.scenario.contents import I64
from khosim.scenario.fields import Table, did_you_mean
from khosim.scenario.group import LOCAL, PRESERVED, Group
from khosim.scenario.kho_user import preserve_range
from khosim.scenario.model import Limits, StepFact

if TYPE_CHECKING:
    from khosim.kernel.release import Release
    from khosim.scenario.play import Player

__all__ = (
    "ALL",
    "GroupStep",
    "StepBase",
    "Unexpected",
    "check_expect",
    "fact_of",
    "free_entries",
    "preserve_entries",
    "unpreserve_entries",
)

ALL = "*"
"""The name that stands for every group."""

_UNITS = {"folios": "folio", "pages": "range", "blob": "blob"}
_ERRNOS = {*errno.errorcode.values(), "ENOTSUPP"}


class Unexpected(KhoSimError):
    """A step met something that a sound handover does not show.

    ``word`` is what a step says under ``expect`` to ask for it.
    """

    def __init__(self, word: str, text: str) -> None:
        self.word = word
        super().__init__(text)


def check_expect(table: Table, word: str, words: tuple[str, ...]) -> None:
    """Refuse an ``expect`` that is neither one of ``words`` nor the name of an errno."""
    if word and word not in words and word not in _ERRNOS:
        known = (*words, "EINVAL", "ENOENT", "ENOMEM", "EEXIST", "E2BIG")
        raise table.error(f"expect: {word!r} is no outcome{did_you_mean(word, known)}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepBase:
    """Fields of every step."""

    do: ClassVar[str] = ""
    WORDS: ClassVar[tuple[str, ...]] = ()
    """What ``expect`` may be besides errnos."""
    place: str
    name: str
    expect: str
    optional: bool = False

    @classmethod
    def common(cls, table: Table, limits: Limits, *, name: str) -> dict[str, Any]:
        """The fields above, read from a table."""
        expect = table.text("expect", "")
        check_expect(table, expect, cls.WORDS)
        optional = table.flag("optional")
        return {"place": table.place, "name": name, "expect": expect, "optional": optional}

    def lacks(self, release: Release) -> str:
        """What it needs and kernels of that release do not have, or empty."""
        return ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GroupStep(StepBase):
    """A step about a part of one group, or of every group."""

    share: float = 1.0

    @classmethod
    def of_group(cls, table: Table, limits: Limits) -> dict[str, Any]:
        """:meth:`StepBase.common` with the name of a group that exists, or ``*``."""
        name = table.text("name")
        if name != ALL and name not in limits.names:
            raise table.error(
                f"name: no step before this makes {name!r}{did_you_mean(name, limits.names)}"
            )
        return cls.common(table, limits, name=name)

    def pick(self, player: Player, states: tuple[int, ...]) -> list[tuple[Group, I64]]:
        """The entries it is about; :class:`InputError` where there are none at all."""
        chosen = []
        for group in player.groups_named(self.name):
            entries = group.select(states, self.share)
            if len(entries):
                chosen.append((group, entries))
        if not chosen:
            what = "any group" if self.name == ALL else repr(self.name)
            raise InputError(self.place, f"nothing of {what} is there to {self.do}")
        return chosen


def fact_of(player: Player, chosen: list[tuple[Group, I64]], note: str = "") -> StepFact:
    """Blocks and bytes of some entries."""
    pages = sum(int(group.nr_pages[entries].sum()) for group, entries in chosen)
    blocks = sum(len(entries) for _, entries in chosen)
    kinds = {group.kind for group, _ in chosen}
    unit = _UNITS[kinds.pop()] if len(kinds) == 1 else "block"
    return StepFact(blocks, pages * player.kernel.arch.page_size, note, unit)


def preserve_entries(player: Player, group: Group, entries: I64) -> None:
    """Preserve blocks that the kernel holds; raises the kernel's refusal."""
    kernel = player.kernel
    if group.kind == "pages":
        for entry in entries.tolist():
            preserve_range(kernel, int(group.pfn[entry]), int(group.nr_pages[entry]))
    else:
        orders = group.order[entries]
        for order in np.unique(orders).tolist():
            kernel.kho_preserve_folios(group.pfn[entries[orders == order]], order)
    group.state[entries] = PRESERVED


def unpreserve_entries(player: Player, group: Group, entries: I64) -> None:
    """Take preserved blocks back."""
    kernel = player.kernel
    for entry in entries.tolist():
        pfn = int(group.pfn[entry])
        if group.kind == "pages":
            kernel.kho_unpreserve_pages(pfn, int(group.nr_pages[entry]))
        else:
            kernel.kho_unpreserve_folio(Folio(kernel, pfn, int(group.order[entry])))
    group.state[entries] = LOCAL


def free_entries(player: Player, group: Group, entries: I64) -> None:
    """Give blocks back to the page allocator and forget them."""
    kernel = player.kernel
    for entry in entries.tolist():
        pfn = int(group.pfn[entry])
        if group.kind == "pages":
            kernel.pages.free_range(pfn, pfn + int(group.nr_pages[entry]))
        else:
            Folio(kernel, pfn, int(group.order[entry])).put()
    group.drop(entries)
