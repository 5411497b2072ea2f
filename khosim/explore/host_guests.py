"""What guests' drivers prepare for their devices: buffers, descriptor rings, queues.

Stands for the software inside a guest. All of it lies in guest memory, at guest-physical addresses,
and is read and written by the devices through their page tables, for as long as they go on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from khosim.machine.devices import Transfer

if TYPE_CHECKING:
    from khosim.machine.devices import Devices

__all__ = ("Buffers", "Place", "arm")

_PAGE = 4096
_ENTRIES = 256
# Registers of Intel's 8254x: control, ring base, length, tail.
_RCTL, _RX_BASE, _RX_LEN, _RX_TAIL = 0x100, 0x2800, 0x2808, 0x2818
# Registers of the NVMe specification.
_CC, _AQA, _ASQ, _ACQ, _SQ_TAIL = 0x14, 0x24, 0x28, 0x30, 0x1000
_IDENTIFY = 6
_SQ_PAGES = 64 * _ENTRIES // _PAGE


class Place(NamedTuple):
    """Guest-physical addresses of one device: what it reads, writes (two pages) and works with."""

    reads: int
    writes: int
    work: int
    queue: int
    peer_offset: int


class Buffers:
    """Pages of one guest, from the start of its memory on."""

    def __init__(self, gpa: int) -> None:
        self._next = gpa
        self._places: dict[str, Place] = {}

    def page(self, count: int = 1) -> int:
        """The next free page; its guest-physical address."""
        found = self._next
        self._next += count * _PAGE
        return found

    def give(self, name: str) -> Place:
        """Pages for a device."""
        place = Place(
            self.page(), self.page(2), self.page(), self.page(_SQ_PAGES + 1), 64 * len(self._places)
        )
        self._places[name] = place
        return place

    def of(self, name: str) -> Place:
        """The pages of a device."""
        return self._places[name]


def arm(
    devices: Devices,
    bdf: str,
    maps: list[tuple[int, int, int]],
    buffers: Buffers,
    name: str,
) -> None:
    """Start a device's driver in a guest: something to read, and a full ring or queue of work.

    A NIC gets a ring of receive descriptors, an NVMe an admin queue of Identify commands, a plain
    device a free-running program. ``maps`` are the guest's (gpa, phys, bytes).
    """
    place, function = buffers.of(name), devices.pci.named(bdf)
    bar = function.bars[0][0]

    def store(gpa: int, data: bytes) -> None:
        assert not devices.vcpus.write_guest(maps, 0, gpa, data)

    store(place.reads, bytes(range(256)) * 16)
    if function.kind == "nic":
        descriptor = place.work.to_bytes(8, "little") + bytes(8)
        store(place.queue, descriptor * _ENTRIES)
        for offset, value in (
            (_RX_BASE, place.queue & 0xFFFF_FFFF),
            (_RX_BASE + 4, place.queue >> 32),
            (_RX_LEN, 16 * _ENTRIES),
            (_RX_TAIL, _ENTRIES - 1),
            (_RCTL, 2),
        ):
            devices.mmio_write(bar + offset, value)
    elif function.kind == "nvme":
        command = bytes([_IDENTIFY]) + bytes(23) + place.work.to_bytes(8, "little") + bytes(32)
        store(place.queue, command * _ENTRIES)
        completions = place.queue + _SQ_PAGES * _PAGE
        devices.mmio_write(bar + _AQA, (_ENTRIES - 1) << 16 | _ENTRIES - 1)
        for offset, base in ((_ASQ, place.queue), (_ACQ, completions)):
            devices.mmio_write(bar + offset, base & 0xFFFF_FFFF)
            devices.mmio_write(bar + offset + 4, base >> 32)
        devices.mmio_write(bar + _CC, 1)
        devices.mmio_write(bar + _SQ_TAIL, _ENTRIES - 1)
    else:
        engine = function.engine
        assert engine is not None
        engine.program([Transfer(place.work, _PAGE, True, 7), Transfer(place.reads, _PAGE, False)])
