"""The machine: what is still there when a kernel is gone.

RAM, the firmware's memory map with its NUMA nodes, the page size its kernels are built for, and
devices that go on working by themselves. A kexec is a jump (``kernel/kexec_core.c:kernel_kexec @
7.3``), so none of this notices it.

Left out: CPUs and the firmware's code.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from khosim.errors import InputError
from khosim.machine.image import load_image, save_image
from khosim.machine.memory_map import MemoryMap
from khosim.machine.ram import Ram

if TYPE_CHECKING:
    from khosim.machine.devices import Devices, Part

__all__ = ("PAGE_SIZES", "Hardware")

PAGE_SIZES: Mapping[str, tuple[int, ...]] = {"x86_64": (4096,), "arm64": (4096, 16384, 65536)}


class Hardware:
    """One machine. ``page_size`` is what its kernels use: 4096 on x86_64, or 16384 or 65536.

    ``devices`` describes what else is in it (:mod:`khosim.machine.devices`); :attr:`devices` is
    what came of that, or None.
    """

    __slots__ = (
        "__weakref__",
        "_ends",
        "_starts",
        "arch",
        "devices",
        "memory_map",
        "page_shift",
        "page_size",
        "ram",
        "ram_ranges",
        "registers",
    )

    def __init__(
        self,
        memory_map: MemoryMap,
        page_size: int = 4096,
        *,
        ram: Ram | None = None,
        devices: Sequence[Part] = (),
    ) -> None:
        valid = PAGE_SIZES[memory_map.arch]
        if page_size not in valid:
            known = ", ".join(map(str, valid))
            raise InputError("page size", f"{page_size} on {memory_map.arch}, which has {known}")
        self.memory_map = memory_map
        self.arch = memory_map.arch
        self.page_size = page_size
        self.page_shift = page_size.bit_length() - 1
        self.ram = ram if ram is not None else Ram(memory_map.end_phys, page_size=page_size)
        if self.ram.page_size != page_size or self.ram.size_bytes < memory_map.end_phys:
            raise InputError("RAM", "it does not fit the memory map and page size")
        self.ram_ranges = memory_map.ram_ranges
        self._starts = [start for start, _ in self.ram_ranges]
        self._ends = [end for _, end in self.ram_ranges]
        self.devices: Devices | None = None
        self.registers: dict[str, int] = {}
        """What the CPU holds when it enters the next kernel: entry point and first argument."""
        if devices:
            self._attach(devices)

    def _attach(self, parts: Sequence[Part]) -> None:
        from khosim.machine.devices import Amd, Devices, Snp, Vtd

        for part in parts:
            if self.arch != "x86_64" and isinstance(part, (Vtd, Amd, Snp)):
                what = type(part).__name__
                raise InputError("devices", f"{what} does not stand in a machine of {self.arch}")
        self.devices = Devices(parts, self.ram, self.is_ram, self.ram_ranges)

    def _attach_saved(self, blob: bytes) -> None:
        from khosim.machine.devices import Devices

        self.devices = Devices.from_blob(blob, self.ram, self.is_ram, self.ram_ranges)

    def change_memory(self, memory_map: MemoryMap) -> None:
        """Other memory from now on: RAM that is gone, or back. Bytes stay where they were.

        Raises :class:`InputError` for RAM that never was there.
        """
        if memory_map.arch != self.arch or self.ram.size_bytes < memory_map.end_phys:
            raise InputError("RAM", "it does not fit the memory map")
        self.memory_map = memory_map
        self.ram_ranges = memory_map.ram_ranges
        self._starts = [start for start, _ in self.ram_ranges]
        self._ends = [end for _, end in self.ram_ranges]

    def is_ram(self, phys: int, len_bytes: int = 1) -> bool:
        """Whether all of [phys, phys + len_bytes) is RAM by the memory map, holes excluded.

        Entries that adjoin count as one. No bytes are RAM wherever a byte there would be.
        """
        index = bisect_right(self._starts, phys) - 1
        if index < 0 or len_bytes < 0 or phys >= self._ends[index]:
            return False
        end = phys + len_bytes
        while end > self._ends[index]:
            index += 1
            if index == len(self._starts) or self._starts[index] != self._ends[index - 1]:
                return False
        return True

    def nid_of_pfn(self, pfn: int) -> int:
        """The NUMA node of a page frame, or -1."""
        return self.memory_map.nid_of(pfn << self.page_shift)

    def tick(self) -> None:
        """Let every device do one step."""
        if self.devices is not None:
            self.devices.tick()

    def snapshot(self) -> int:
        """Begin a snapshot of RAM and devices; see :meth:`Ram.snapshot`."""
        token = self.ram.snapshot()
        if self.devices is not None:
            self.devices.snapshot(token)
        return token

    def rollback(self, token: int) -> None:
        """Restore RAM and devices as they were at the snapshot, which stays active."""
        self.ram.rollback(token)
        if self.devices is not None:
            self.devices.rollback(token)

    def discard(self, token: int) -> None:
        """Forget a snapshot and keep what was written."""
        self.ram.discard(token)
        if self.devices is not None:
            self.devices.discard(token)

    def save(self, path: str | Path, *, firmware: Mapping[str, bytes] | None = None) -> None:
        """Save RAM, memory map and what a boot loader hands over; see :func:`save_image`."""
        blobs = dict(firmware or {})
        blobs["registers"] = json.dumps(self.registers, sort_keys=True).encode()
        if self.devices is not None:
            blobs["devices"] = self.devices.to_blob()
        save_image(self.ram, self.memory_map, path, firmware=blobs)

    @classmethod
    def load(cls, path: str | Path) -> tuple[Hardware, dict[str, bytes]]:
        """A saved machine, its devices and its ``firmware`` blobs; see :func:`load_image`."""
        image = load_image(path)
        try:
            hardware = cls(image.memory_map, image.ram.page_size, ram=image.ram)
            blobs = dict(image.firmware)
            devices = blobs.pop("devices", None)
            if devices is not None:
                hardware._attach_saved(devices)
        except InputError as error:
            raise InputError(str(path), f"{error.place}: {error.cause}") from None
        hardware.registers = _parse_registers(blobs.pop("registers", b"{}"), str(path))
        return hardware, blobs


def _parse_registers(blob: bytes, place: str) -> dict[str, int]:
    try:
        registers = json.loads(blob)
    except ValueError:
        registers = None
    if not isinstance(registers, dict) or not all(
        isinstance(value, int) and 0 <= value < 1 << 64 for value in registers.values()
    ):
        raise InputError(place, "its CPU registers are damaged")
    return registers
