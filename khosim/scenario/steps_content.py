"""Steps about bytes: write new content, verify content, corrupt memory.

Content is known from the scenario's seed; what is verified was computed, never read back before.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from khosim.errors import RamFault
from khosim.scenario.contents import (
    damaged_pages,
    first_keys,
    next_keys,
    page_contents,
    write_pages,
)
from khosim.scenario.fields import Table, count_text, size_text
from khosim.scenario.group import LOCAL, PRESERVED
from khosim.scenario.model import Limits, StepFact
from khosim.scenario.places import place_field, resolve
from khosim.scenario.steps_base import ALL, GroupStep, StepBase, Unexpected, fact_of
from khosim.scenario.steps_guest import file_name, running_guests

if TYPE_CHECKING:
    from khosim.scenario.contents import I64, U64
    from khosim.scenario.play import Player

__all__ = ("Check", "Corrupt", "Write")

_MAX_CORRUPT_BYTES = 16 << 20
_BY = (-1, "scenario: corrupt")


class _ContentStep(GroupStep):
    """A step about the content of a group, of a reserve_mem region, or of a guest."""

    __slots__ = ()

    @classmethod
    def of_content(cls, table: Table, limits: Limits) -> dict[str, Any]:
        """The common fields, and ``region`` and ``guest``, empty where a group is meant."""
        if sum(table.has(key) for key in ("name", "region", "guest")) != 1:
            raise table.error("give 'name' (a group), 'region' (of reserve_mem=) or 'guest'")
        if table.has("name"):
            return {**cls.of_group(table, limits), "region": "", "guest": ""}
        if table.has("guest"):
            guest = file_name(table, "guest", limits)
            return {**cls.common(table, limits, name=guest), "region": "", "guest": guest}
        region = table.text("region")
        return {**cls.common(table, limits, name=""), "region": region, "guest": ""}


def _regions(player: Player, wanted: str, place: str) -> list[tuple[str, I64]]:
    # (name, first and last page) of the kernel's reserve_mem regions that have a whole page.
    kernel = player.kernel
    page = kernel.arch.page_size
    found = []
    for name, start, size in kernel.reserve_mem.regions:
        first, end = -(-start // page), (start + size) // page
        if wanted in (ALL, name) and first < end:
            found.append((name, np.array(sorted({first, end - 1}), dtype=np.int64)))
    if not found:
        what = "has no reserve_mem region" + ("" if wanted == ALL else f" {wanted!r}")
        text = f"generation {kernel.generation} {what}"
        if player.region_keys:
            raise Unexpected("missing", text)
        raise player.error(place, f"{text} of a page or more")
    return found


def _page_keys(key: U64, nr_pages: int) -> U64:
    return np.add(key, np.arange(nr_pages, dtype=np.uint64), dtype=np.uint64)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Write(_ContentStep):
    """Write new content into blocks that this kernel holds, or into reserve_mem regions."""

    do: ClassVar[str] = "write"
    region: str = ""
    guest: str = ""

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Write:
        """Read the step."""
        return cls(**cls.of_content(table, limits), share=table.fraction("share", 1.0))

    def run(self, player: Player) -> StepFact:
        """Write it: of a region, the first and the last page."""
        kernel = player.kernel
        if self.region:
            regions = _regions(player, self.region, self.place)
            for name, pfns in regions:
                key = first_keys(player.seed, f"region {name}:{player.serial()}", 1)
                player.region_keys[name] = key
                write_pages(kernel.ram, pfns, _page_keys(key, len(pfns)), kernel.by(name))
            return StepFact(note=f"{count_text(len(regions), 'reserve_mem region')}, at the ends")
        if self.guest:
            return self._guests(player)
        chosen = self.pick(player, (LOCAL, PRESERVED))
        for group, entries in chosen:
            group.key[entries] = next_keys(group.key[entries])
            pfns, keys = group.content(entries)
            write_pages(kernel.ram, pfns, keys, kernel.by(group.owner))
        return fact_of(player, chosen)

    def _guests(self, player: Player) -> StepFact:
        # New content in a part of the pages that have content; raises what the store raises.
        written = pages = 0
        for guest, memfd in running_guests(player, self.guest, self.place):
            wanted = max(1, round(len(guest.pages) * self.share)) if len(guest.pages) else 0
            chosen = np.arange(wanted) * len(guest.pages) // max(1, wanted)
            keys = next_keys(guest.keys[chosen])
            contents = page_contents(memfd.kernel.arch.page_size, keys)
            guest.store(memfd, guest.pages[chosen], contents)
            guest.keys[chosen] = keys
            written, pages = written + contents.nbytes, pages + wanted
        return StepFact(pages, written, "", "page")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check(_ContentStep):
    """Verify content byte for byte."""

    do: ClassVar[str] = "check"
    WORDS: ClassVar[tuple[str, ...]] = ("damaged", "missing")
    region: str = ""
    guest: str = ""

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Check:
        """Read the step."""
        return cls(**cls.of_content(table, limits), share=table.fraction("share", 1.0))

    def run(self, player: Player) -> StepFact:
        """Compare; ``damaged`` where a byte differs, ``missing`` where a region is gone."""
        kernel = player.kernel
        if self.region:
            regions = _regions(player, self.region, self.place)
            checked = 0
            for name, pfns in regions:
                key = player.region_keys.get(name)
                if key is not None:
                    damaged = damaged_pages(kernel.ram, pfns, _page_keys(key, len(pfns)))
                    self._judge(player, f"region {name}", damaged)
                    checked += len(pfns)
            size = checked * kernel.arch.page_size
            return StepFact(0, size, f"{count_text(len(regions), 'reserve_mem region')}")
        if self.guest:
            return self._guests(player)
        chosen = self.pick(player, (LOCAL, PRESERVED))
        checked = 0
        for group, entries in chosen:
            pfns, keys = group.content(entries)
            checked += len(pfns)
            self._judge(player, group.name, damaged_pages(kernel.ram, pfns, keys))
        fact = fact_of(player, chosen)
        return dataclasses.replace(fact, len_bytes=checked * kernel.arch.page_size)

    def _guests(self, player: Player) -> StepFact:
        pages = 0
        for guest, memfd in running_guests(player, self.guest, self.place):
            fault = guest.content_fault(memfd)
            if fault:
                raise Unexpected("damaged", f"{guest.name}: {fault}")
            pages += len(guest.pages)
        return StepFact(pages, pages * player.kernel.arch.page_size, "", "page")

    @staticmethod
    def _judge(player: Player, what: str, damaged: I64) -> None:
        if not len(damaged):
            return
        phys = int(damaged[0]) << player.kernel.arch.page_shift
        writer = player.kernel.ram.last_writer(phys)
        text = f"{what}: {count_text(len(damaged), 'page')} damaged, the first at {phys:#x}"
        if writer is not None:
            text += f", last written by {writer.symbol} in generation {writer.generation}"
        raise Unexpected("damaged", text)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Corrupt(StepBase):
    """Overwrite bytes of RAM, as a stray DMA write would.

    ``when`` is "now", or "jump": after the jump and before the successor's first instruction.
    """

    do: ClassVar[str] = "corrupt"
    at: int | str
    offset: int
    data: bytes
    zero: int
    flip: int
    when: str

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Corrupt:
        """Read the step."""
        ways = [key for key in ("bytes", "zero", "flip") if table.has(key)]
        if len(ways) != 1:
            raise table.error("give one of 'bytes' (hex), 'zero' (a size) and 'flip' (a mask)")
        return cls(
            **cls.common(table, limits, name=""),
            at=place_field(table, limits),
            offset=table.size("offset") or 0,
            data=_hex_field(table) if ways == ["bytes"] else b"",
            zero=(table.size("zero", low=1, high=_MAX_CORRUPT_BYTES) if ways == ["zero"] else 0)
            or 0,
            flip=table.integer("flip", None, 1, 255) if ways == ["flip"] else 0,
            when=table.choice("when", ("jump", "now"), "jump"),
        )

    def run(self, player: Player) -> StepFact:
        """Do it now, or leave it for the jump."""
        note = f"{self.at if isinstance(self.at, str) else hex(self.at)}"
        note += f" + {self.offset:#x}" if self.offset else ""
        size = len(self.data) or self.zero or 1
        if self.when == "jump":
            player.at_jump.append(self)
            return StepFact(0, size, f"{note}, at the jump")
        self.strike(player, at_jump=False)
        return StepFact(0, size, note)

    def strike(self, player: Player, *, at_jump: bool) -> None:
        """Change the bytes; :class:`InputError` where there is no RAM."""
        ram = player.machine.hardware.ram
        phys = resolve(player, self.at, self.place, at_jump=at_jump) + self.offset
        try:
            if self.zero:
                ram.write(phys, bytes(self.zero), _BY)
            elif self.flip:
                ram.write(phys, bytes([ram.read(phys, 1)[0] ^ self.flip]), _BY)
            else:
                ram.write(phys, self.data, _BY)
        except RamFault:
            size = size_text(len(self.data) or self.zero or 1)
            raise player.error(self.place, f"{size} at {phys:#x} are not in RAM") from None


def _hex_field(table: Table) -> bytes:
    text = table.text("bytes", max_chars=2 * _MAX_CORRUPT_BYTES)
    try:
        data = bytes.fromhex(text)
    except ValueError:
        raise table.error("bytes: not an even number of hexadecimal digits") from None
    if not data:
        raise table.error("bytes: there are none")
    return data
