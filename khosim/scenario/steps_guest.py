"""Steps about what sessions carry: start guests and devices, and stop them.

A guest's memory is a memfd of shmem folios (``mm/memfd.c``, ``mm/shmem.c`` @ 7.3). Its content is
sparse: pages here and there, zeros everywhere else.
"""

from __future__ import annotations

import dataclasses
import errno
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from khosim.abi import memfd as abi
from khosim.errors import InputError, KernelError
from khosim.kernel.memfd import Memfd
from khosim.kernel.shmem import HUGE_MODES, MAX_LFS_FILESIZE
from khosim.scenario.contents import first_keys
from khosim.scenario.facts import orders_of
from khosim.scenario.fields import Table, count_text, did_you_mean, size_text
from khosim.scenario.files import Carried, Device, DeviceFile, DeviceHandler, Guest, folio_rows
from khosim.scenario.model import MAX_CONTENT_BYTES, MAX_GUEST_FOLIOS, Limits, StepFact
from khosim.scenario.places import RESERVED_NAMES
from khosim.scenario.steps_base import ALL, StepBase

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.scenario.contents import I64
    from khosim.scenario.play import Player

__all__ = (
    "DeviceStep",
    "GuestStep",
    "Stop",
    "file_name",
    "register_devices",
    "running_guests",
)

_MAX_PAGES = 10_000
_LARGE = ("always", "within_size", "force")
_PMD_ORDER = 9
_SEALS = {
    "seal": abi.F_SEAL_SEAL,
    "shrink": abi.F_SEAL_SHRINK,
    "grow": abi.F_SEAL_GROW,
    "write": abi.F_SEAL_WRITE,
    "future_write": abi.F_SEAL_FUTURE_WRITE,
    "exec": abi.F_SEAL_EXEC,
}


def file_name(table: Table, key: str, limits: Limits) -> str:
    """The name of a guest or device that a step before this one starts, or ``*``."""
    name = table.text(key)
    if name != ALL and name not in limits.files:
        close = did_you_mean(name, limits.files)
        raise table.error(f"{key}: no step before this starts {name!r}{close}")
    return name


def register_devices(kernel: Kernel) -> None:
    """Make the kernel know the devices of scenarios, where live update is on."""
    if kernel.liveupdate.enabled:
        kernel.liveupdate.register_file_handler(DeviceHandler())


def running_guests(player: Player, name: str, place: str) -> list[tuple[Guest, Memfd]]:
    """The guest of a name, or all, with their memory; :class:`InputError` where none runs."""
    found = []
    for carried in player.carried(name, place):
        memfd = carried.memfd if isinstance(carried, Guest) else None
        if isinstance(carried, Guest) and memfd is not None:
            found.append((carried, memfd))
    if not found:
        what = "no guest runs here" if name == ALL else f"{name!r} is no guest"
        raise InputError(place, what)
    return found


def _new_name(table: Table, limits: Limits) -> str:
    name = table.name("name")
    if name in RESERVED_NAMES or name in limits.names:
        raise table.error(f"name: {name!r} names something else; choose another")
    limits.files.add(name)
    return name


def _enter(player: Player, step: StepBase, carried: Carried) -> None:
    if step.name in player.files:
        raise player.error(step.place, f"there is a {step.name!r} already")
    player.files[step.name] = carried


def _guest_size(table: Table, limits: Limits) -> int:
    value = table.any("size")
    if value is None:
        raise table.missing("size")
    if not isinstance(value, str) or not value.endswith("%"):
        return table.bytes_of("size", value, 0, MAX_LFS_FILESIZE)
    digits = value[:-1]
    if not digits.isascii() or not digits.isdigit() or not 1 <= int(digits[:9]) <= 1000:
        raise table.error(f"size: {value!r} is not a share of RAM from 1% to 1000%")
    size = limits.ram_bytes * int(digits) // 100
    most = table.size("most", low=1)
    return min(size, most or size) // limits.page_size * limits.page_size


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GuestStep(StepBase):
    """Start a guest: a memfd with content in some of its pages.

    Of ``small`` pages each gets a folio of its own, whatever ``huge`` says: the large folios that
    come to lie between them are of all orders.
    """

    do: ClassVar[str] = "guest"
    size: int
    huge: str
    node: int | None
    pages: int
    small: int
    seals: int
    position: int

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> GuestStep:
        """Read the step."""
        name = _new_name(table, limits)
        size = _guest_size(table, limits)
        pages = table.integer("pages", 64, 0, _MAX_PAGES)
        huge = table.choice("huge", HUGE_MODES, "never")
        small = table.integer("small", 0, 0, _MAX_PAGES)
        seals = 0
        for what, word in enumerate(table.items("seals", len(_SEALS)), 1):
            if not isinstance(word, str) or word not in _SEALS:
                close = did_you_mean(str(word), _SEALS)
                raise table.error(f"seals, entry {what}: {word!r} is no seal{close}")
            seals |= _SEALS[word]
        whole = size // limits.page_size
        if size <= limits.ram_bytes:
            folios = whole
            if huge in _LARGE:
                folios = min(whole, (whole >> _PMD_ORDER) + 2 * _PMD_ORDER * (small + pages))
            limits.guest_folios_left -= folios * limits.repeats
            if limits.guest_folios_left < 0:
                most = f"{MAX_GUEST_FOLIOS:,} folios"
                raise table.error(f"with this, guests have more than {most}: use huge = 'always'")
        limits.content_left -= (min(pages, whole) + small) * limits.page_size * limits.repeats
        if limits.content_left < 0:
            most = size_text(MAX_CONTENT_BYTES)
            raise table.error(f"with this, the scenario writes more than {most} of content")
        return cls(
            **cls.common(table, limits, name=name),
            size=size,
            huge=huge,
            node=table.integer("node", 0, 0, 63) if table.has("node") else None,
            pages=min(pages, whole),
            small=min(small, whole),
            seals=seals,
            position=table.size("position", high=MAX_LFS_FILESIZE) or 0,
        )

    def run(self, player: Player) -> StepFact:
        """``memfd_create``, ``ftruncate``, content, seals; raises the kernel's refusal."""
        kernel = player.kernel
        keys = first_keys(player.seed, f"{self.name}:{player.serial()}", self.pages + self.small)
        whole = self.size // kernel.arch.page_size
        content = _spread(keys[: self.pages], whole)
        small = _spread(keys[self.pages :], whole)
        guest = Guest(self.name, self.size, content, keys[: self.pages], self.position)
        _enter(player, self, guest)
        memfd = kernel.memfd(self.name, nid=self.node)
        try:
            self._fill(guest, memfd, small)
        except KernelError:
            memfd.fput()
            del player.files[self.name]
            raise
        guest.hold(kernel, memfd)
        by_order = orders_of(folio_rows(memfd))
        text = f"a memfd, {count_text(self.pages, 'page')} written"
        return StepFact(sum(by_order.values()), self.size, text, "folio", by_order)

    def _fill(self, guest: Guest, memfd: Memfd, small: I64) -> None:
        kernel = memfd.kernel
        memfd.ftruncate(self.size)
        for page in small.tolist():
            memfd.store(page << kernel.arch.page_shift, b"\0")
        # What an administrator sets in sysfs: from here on, large folios.
        memfd.inode.huge = self.huge
        guest.write(memfd)
        if self.position:
            memfd.lseek(self.position)
        if self.seals:
            memfd.add_seals(self.seals)
        guest.seals = memfd.seals


def _spread(keys: np.ndarray[tuple[int], np.dtype[np.uint64]], nr_pages: int) -> I64:
    """A page for each key, ascending, one in each of as many equal parts of the file."""
    count = len(keys)
    part = max(1, nr_pages // max(1, count))
    shift = (keys % np.uint64(part)).astype(np.int64)
    spread: I64 = np.arange(count, dtype=np.int64) * part + shift
    return spread


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStep(StepBase):
    """Open a device with a value; with ``refuses`` it answers ``freeze`` with that errno."""

    do: ClassVar[str] = "device"
    refuses: int

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> DeviceStep:
        """Read the step: the device again, with another answer, where it is there already."""
        name = _new_name(table, limits)
        word = table.text("refuses", "")
        number = getattr(errno, word, 0) if word.startswith("E") else 0
        if word and not number:
            raise table.error(f"refuses: {word!r} is not the name of an errno")
        return cls(**cls.common(table, limits, name=name), refuses=number)

    def run(self, player: Player) -> StepFact:
        """Open it, or give it another answer and another value."""
        kernel = player.kernel
        value = int(first_keys(player.seed, f"{self.name}:{player.serial()}", 1)[0])
        known = player.files.get(self.name)
        if known is None:
            known = Device(self.name, value)
            _enter(player, self, known)
            known.hold(kernel, DeviceFile(kernel, self.name, value))
        file = known.file
        if not isinstance(known, Device) or not isinstance(file, DeviceFile):
            raise player.error(self.place, f"{self.name!r} is no device of this kernel")
        known.value = file.value = value
        file.refusal = self.refuses
        text = f"refuses with {errno.errorcode[self.refuses]}" if self.refuses else "ready"
        return StepFact(0, 0, text)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stop(StepBase):
    """A guest or a device goes: its process exits. What a session holds stays with it."""

    do: ClassVar[str] = "stop"

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Stop:
        """Read the step."""
        return cls(**cls.common(table, limits, name=file_name(table, "name", limits)))

    def run(self, player: Player) -> StepFact:
        """Exit."""
        chosen = player.carried(self.name, self.place)
        size = 0
        for carried in chosen:
            assert carried.process is not None
            assert carried.file is not None
            size += carried.bytes_of(carried.file)
            carried.remember()
            carried.process.exit()
            carried.process = None
            if not carried.session:
                del player.files[carried.name]
        return StepFact(len(chosen), size, "", "file")
