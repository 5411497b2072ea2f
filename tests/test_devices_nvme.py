"""The NVMe controller: queues, doorbells, pointers to pages, phases, and what goes wrong."""

from __future__ import annotations

import struct

import pytest

from khosim.machine.devices import Endpoint
from khosim.machine.hardware import Hardware
from khosim.machine.memory_map import MemoryMap

DISK = "0000:00:04.0"
BY = (0, "driver")
ASQ, ACQ, SQ, CQ, DATA, LIST = 0x10_0000, 0x10_1000, 0x10_2000, 0x10_3000, 0x20_0000, 0x30_0000
READ, WRITE = 2, 1


class Driver:
    """What a driver does, on a disk without an IOMMU in front of it."""

    def __init__(self, entries=4):
        self.hardware = Hardware(
            MemoryMap.from_size("64M"), devices=[Endpoint(DISK, kind="nvme", msix=2)]
        )
        self.devices, self.ram = self.hardware.devices, self.hardware.ram
        self.devices.write_config(DISK, 4, 6, 2)
        self.function = self.devices.pci.named(DISK)
        self.bar = self.function.bars[0][0]
        self.entries, self.tails = entries, {0: 0, 1: 0}
        self.write(0x24, entries - 1 | (entries - 1) << 16)
        self.write(0x28, ASQ, 8)
        self.write(0x30, ACQ)
        self.write(0x34, 0)
        self.write(0x14, 0x0046_0001)

    def write(self, offset, value, size=4):
        self.devices.mmio_write(self.bar + offset, value, size)

    def read(self, offset, size=4):
        return self.devices.mmio_read(self.bar + offset, size)

    def submit(self, queue, opcode, prp1=0, prp2=0, cdw10=0, cdw11=0, cdw12=0, cid=7):
        """Put a command into a queue, ring, and let the disk do it."""
        base = SQ if queue else ASQ
        words = struct.pack("<BBHI16xQQIII12x", opcode, 0, cid, 1, prp1, prp2, cdw10, cdw11, cdw12)
        self.ram.write(base + 64 * self.tails[queue], words, BY)
        self.tails[queue] = (self.tails[queue] + 1) % self.entries
        self.write(0x1000 + 8 * queue, self.tails[queue])
        self.devices.tick()

    def make_queues(self):
        """An I/O queue pair of four entries, MSI-X entry 1."""
        size = (self.entries - 1) << 16 | 1
        self.submit(0, 5, prp1=CQ, cdw10=size, cdw11=1 << 16 | 3)
        self.submit(0, 1, prp1=SQ, cdw10=size, cdw11=1 << 16 | 1)
        assert self.completions(0, 2) == [(7, 0, 1), (7, 0, 1)]

    def completions(self, queue, count):
        """(command, status, phase) of the first entries of a queue."""
        found = []
        for at in range(count):
            base = (CQ if queue else ACQ) + 16 * at
            cid, status = struct.unpack("<12xHH", self.ram.read(base, 16))
            found.append((cid, status >> 1, status & 1))
        return found


def test_it_comes_up_with_its_admin_queue() -> None:
    """Enabled is ready; identify answers by DMA; the completion has head, id and phase."""
    disk = Driver()
    assert disk.read(0x1C) == 1
    assert disk.read(0, 8) & 0xFFFF == 255
    assert disk.read(4) >> 5 & 0xFF == 1  # the NVM command set
    disk.submit(0, 6, prp1=DATA, cid=0x1234)
    assert disk.ram.read(DATA + 4, 12) == DISK.encode()
    assert struct.unpack("<QHHHH", disk.ram.read(ACQ, 16)) == (0, 1, 0, 0x1234, 1)
    disk.write(0x14, 0)
    assert disk.read(0x1C) == 0


@pytest.mark.parametrize("blocks", [1, 8, 9, 16, 17, 40])
def test_what_is_written_is_read(blocks) -> None:
    """One page, two pages, a list of pages, with an offset in the first."""
    disk = Driver()
    disk.make_queues()
    text = bytes(range(1, 252)) * 100
    text = text[: 512 * blocks]
    source, target = DATA + 0x200, DATA + 0x10_0200
    disk.ram.write(source, text, BY)
    for start, opcode in ((source, WRITE), (target, READ)):
        prp2 = start - 0x200 + 4096
        if 512 * blocks > 4096 - 0x200 + 4096:
            words = [start - 0x200 + 4096 * page for page in range(1, 8)]
            disk.ram.write(LIST, struct.pack("<7Q", *words), BY)
            prp2 = LIST
        disk.submit(1, opcode, start, prp2, cdw10=100, cdw12=blocks - 1)
    assert disk.completions(1, 2) == [(7, 0, 1), (7, 0, 1)]
    assert disk.ram.read(target, 512 * blocks) == text
    assert disk.ram.last_writer(target) == (-1, f"device {DISK}")
    assert disk.ram.read(target + 512 * blocks, 64) == bytes(64)


def test_a_list_of_pages_goes_on_in_another_page() -> None:
    """The last entry of a full page leads on."""
    disk = Driver()
    disk.make_queues()
    pages = [0x100_0000 + 8192 * index for index in range(4)]
    disk.ram.write(LIST + 4096 - 16, struct.pack("<QQ", pages[1], LIST + 0x8000), BY)
    disk.ram.write(LIST + 0x8000, struct.pack("<QQ", *pages[2:]), BY)
    disk.submit(1, READ, pages[0], LIST + 4096 - 16, cdw10=0, cdw12=31)
    assert disk.completions(1, 1) == [(7, 0, 1)]
    first_words = [disk.ram.read_u64(page) for page in pages]
    assert first_words == [block << 8 for block in (0, 8, 16, 24)]


def test_the_phase_turns_with_the_queue() -> None:
    """Four entries hold three completions until the host has taken some; then the phase is 0."""
    disk = Driver()
    disk.make_queues()
    for cid in range(1, 5):
        disk.submit(1, 0, cid=cid)
    assert disk.completions(1, 4) == [(1, 0, 1), (2, 0, 1), (3, 0, 1), (0, 0, 0)]
    assert not disk.function.engine.busy
    disk.write(0x1000 + 12, 3)
    disk.devices.tick()
    disk.submit(1, 0, cid=5)
    assert disk.completions(1, 4) == [(5, 0, 0), (2, 0, 1), (3, 0, 1), (4, 0, 1)]


@pytest.mark.parametrize(
    ("queue", "command", "status"),
    [
        (0, {"opcode": 0x7F}, 0x001),
        (0, {"opcode": 5, "prp1": CQ, "cdw10": 3 << 16 | 1, "cdw11": 1}, 0x101),
        (0, {"opcode": 5, "prp1": CQ + 8, "cdw10": 3 << 16 | 2, "cdw11": 1}, 0x002),
        (0, {"opcode": 1, "prp1": SQ, "cdw10": 3 << 16 | 2, "cdw11": 9 << 16 | 1}, 0x100),
        (0, {"opcode": 4, "cdw10": 1}, 0x10C),
        (0, {"opcode": 0, "cdw10": 5}, 0x101),
        (1, {"opcode": 0x7F}, 0x001),
        (1, {"opcode": READ, "prp1": DATA, "cdw11": 1 << 16}, 0x080),
        (1, {"opcode": READ, "prp1": DATA, "prp2": DATA + 8, "cdw12": 15}, 0x013),
        (1, {"opcode": READ, "prp1": 1 << 40}, 0x004),
        (1, {"opcode": READ, "prp1": DATA, "prp2": LIST + 0xFF8, "cdw12": 31}, 0x013),
    ],
)
def test_commands_that_fail(queue, command, status) -> None:
    """The status of the specification, and the controller goes on."""
    disk = Driver()
    disk.make_queues()
    disk.ram.write_u64(LIST + 0xFF8, LIST + 0xFF8, BY)  # a list that leads to itself
    disk.submit(queue, **command)
    assert disk.completions(queue, 3)[2 if queue == 0 else 0][1] == status
    disk.submit(1, 0)
    assert disk.read(0x1C) == 1


def test_without_its_memory_it_stops_for_good() -> None:
    """Bus master off under a running controller: fatal, until it is enabled anew."""
    disk = Driver()
    disk.devices.write_config(DISK, 4, 2, 2)
    disk.submit(0, 6, prp1=DATA)
    assert disk.read(0x1C) == 3
    disk.devices.write_config(DISK, 4, 6, 2)
    assert not disk.function.engine.busy
    disk.write(0x14, 0)
    disk.write(0x14, 1)
    assert disk.read(0x1C) == 1


def test_its_state_is_plain_data() -> None:
    """Queues, doorbells and blocks go into a snapshot and come back."""
    disk = Driver()
    disk.make_queues()
    token = disk.hardware.snapshot()
    before = repr(disk.devices.state())
    disk.ram.write(DATA, b"block", BY)
    disk.submit(1, WRITE, DATA)
    assert disk.function.engine.block(0).startswith(b"block")
    disk.function.reset("flr")
    assert disk.function.engine.block(0).startswith(b"block")
    disk.hardware.rollback(token)
    assert repr(disk.devices.state()) == before
    assert disk.function.engine.block(0)[:8] == bytes(8)
