"""AMD's IOMMU: device table, page tables, commands and the log of events, in the real layout."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khosim.machine.devices import Amd, Bridge, Endpoint, Snp
from khosim.machine.devices.amd import unpack_dte
from khosim.machine.hardware import Hardware
from khosim.machine.memory_map import MemoryMap

NIC, RID = "0000:3b:00.0", 0x3B00
BASE = 0xFEB8_0000
TABLE, DTES, COMMANDS, EVENTS, WAIT = 0x11_0000, 0x20_0000, 0x18_0000, 0x19_0000, 0x1B_0000
BY = (0, "test")
DID = 5
RW = 3 << 61


class Rig:
    """A machine, its unit, and the tables that a kernel would write."""

    def __init__(self, *parts):
        self.hardware = Hardware(
            MemoryMap.from_size("64M"),
            devices=[Amd(), Bridge("00:01.0", secondary=0x3B), Endpoint(NIC, kind="nic"), *parts],
        )
        self.ram, self.devices = self.hardware.ram, self.hardware.devices
        self.devices.write_config(NIC, 4, 6, 2)
        self.commands = 0

    def write(self, offset, value, size=8):
        self.devices.mmio_write(BASE + offset, value, size)

    def read(self, offset, size=8):
        return self.devices.mmio_read(BASE + offset, size)

    def start(self, dte=TABLE | 4 << 9 | RW | 3):
        """The device table of 2 MiB, both buffers of 512 entries, everything on."""
        self.attach(dte)
        self.write(0x00, DTES | 0x1FF)
        self.write(0x08, COMMANDS | 9 << 56)
        self.write(0x10, EVENTS | 9 << 56)
        self.write(0x18, 1 | 1 << 2 | 1 << 12)

    def attach(self, dte):
        self.ram.write(DTES + 32 * RID, struct.pack("<QQ", dte, DID), BY)

    def map(self, iova, phys, rights=3):
        """A page of 4 KiB; the tables above it lie behind each other."""
        at = TABLE
        for level in (4, 3, 2):
            entry = (at + 4096) | level - 1 << 9 | RW | 1
            self.ram.write_u64(at + 8 * (iova >> 12 + 9 * (level - 1) & 511), entry, BY)
            at += 4096
        leaf = phys | rights << 61 | 1 if rights else 0
        self.ram.write_u64(at + 8 * (iova >> 12 & 511), leaf, BY)

    def dma(self, iova, data=b"data"):
        return self.devices.dma(NIC, iova, len(data), data)

    def command(self, *words):
        """One command of four 32-bit words, and its end awaited."""
        for command in (words, (WAIT | 1, 1 << 28, self.commands + 7, 0)):
            self.ram.write(COMMANDS + 16 * self.commands, struct.pack("<4I", *command), BY)
            self.commands += 1
        self.write(0x2008, 16 * self.commands)
        return self.ram.read_u64(WAIT) == self.commands - 2 + 7 and self.read(0x2000)

    def events(self):
        """(code, device, domain, flags, address), decoded as iommu_print_event does."""
        found = []
        for at in range(0, self.read(0x2018), 16):
            word = struct.unpack("<4I", self.ram.read(EVENTS + at, 16))
            flags = word[1] >> 16 & 0xFFF
            address = word[3] << 32 | word[2]
            found.append((word[1] >> 28, word[0] & 0xFFFF, word[1] & 0xFFFF, flags, address))
        return found


def test_a_page_walk_by_hand() -> None:
    """Mode 4: each entry names the level below; 0 is a leaf, of 2 MiB too."""
    rig = Rig()
    rig.start()
    iova = 0x0000_7F12_3456_7000  # indices 254, 72, 418, 359
    for table, index, entry in (
        (TABLE, 254, 0x12_0000 | 3 << 9 | RW | 1),
        (0x12_0000, 72, 0x12_1000 | 2 << 9 | RW | 1),
        (0x12_1000, 418, 0x12_2000 | 1 << 9 | RW | 1),
        (0x12_2000, 359, 0x0050_0000 | RW | 1),
        (0x12_1000, 419, 0x0060_0000 | RW | 1),
    ):
        rig.ram.write_u64(table + 8 * index, entry, BY)
    assert rig.dma(iova + 0x10).runs == ((0x50_0010, 4),)
    assert rig.dma(0x7F12_3460_1234).runs == ((0x60_1234, 4),)
    assert rig.ram.read(0x60_1234, 4) == b"data"
    assert rig.dma(iova + 0x1000).outcome == "fault"


@pytest.mark.parametrize(
    ("dte", "event"),
    [
        (1, 1),  # no translation
        (TABLE | 7 << 9 | RW | 3, 1),  # no such mode
        (TABLE | 4 << 9 | 1 << 61 | 3, 2),  # the device may only read
        (TABLE | 3 << 9 | RW | 3, 4),  # the tables have a level more than that
        (1 << 61 | 3, 2),  # passes, reads only
        (TABLE + 0x3F0_0000 | 4 << 9 | RW | 3, 4),  # where no RAM is
    ],
)
def test_entries_that_stop_a_device(dte, event) -> None:
    """What the log says of each: code, device, write, address."""
    rig = Rig()
    rig.map(0x5000, 0x50_0000)
    rig.start(dte)
    assert rig.dma(0x5004).outcome == "fault"
    (code, device, _, flags, address), = rig.events()
    assert (code, device, flags, address) == (event, RID, 0x20, 0x5004)
    assert rig.read(0x2020) == 0b11000


def test_entries_that_let_a_device_pass() -> None:
    """Not valid at all, or mode 0 with rights: an I/O address is a physical one."""
    assert unpack_dte(0, 0).pass_through
    for dte in (0, RW | 3):
        rig = Rig()
        rig.start(dte)
        assert rig.dma(0x30_0000).runs == ((0x30_0000, 4),)
    rig = Rig()
    rig.start()
    rig.write(0x00, DTES)  # one page: 128 devices
    assert rig.dma(0x5000).outcome == "fault"
    assert [event[0] for event in rig.events()] == [3]


def test_rights_are_those_of_every_level() -> None:
    """A page for reading only, and a table that takes the right to write away."""
    rig = Rig()
    rig.start()
    rig.map(0x5000, 0x50_0000, rights=1)
    assert rig.dma(0x5000).outcome == "fault"
    assert rig.devices.dma(NIC, 0x5000, 4).outcome == "done"
    rig.map(0x5000, 0x50_0000)
    above = rig.ram.read_u64(TABLE + 0x1000)
    rig.ram.write_u64(TABLE + 0x1000, above & ~(1 << 62), BY)
    assert rig.command(0, 8 << 28, 0, 0)
    assert rig.dma(0x5000).outcome == "fault"
    assert rig.devices.dma(NIC, 0x5000, 4).outcome == "done"


@pytest.mark.parametrize(
    ("command", "is_gone"),
    [
        ((0, 3 << 28 | DID, 0x5000, 0), True),
        ((0, 3 << 28 | DID, 0x6000, 0), False),
        ((0, 3 << 28 | DID + 1, 0x5000, 0), False),
        ((0, 3 << 28 | DID, 0x4000 | 1, 0), True),  # two pages from 0x4000 on
        ((0, 3 << 28 | DID, 0x6000 | 1, 0), False),
        ((0, 3 << 28 | DID, 0x3000 | 1, 0), True),  # eight pages from 0 on
        ((0, 3 << 28 | DID, 0x7000 | 1, 0), True),  # sixteen pages from 0 on
        ((0, 3 << 28 | DID, 0xFFFF_F000 | 3, 0x7FFF_FFFF), True),  # the whole domain
        ((0, 3 << 28 | DID + 1, 0xFFFF_F000 | 3, 0x7FFF_FFFF), False),
        ((0, 8 << 28, 0, 0), True),
        ((RID, 4 << 28, 0x5000, 0), False),
    ],
)
def test_a_stale_translation_until_it_is_invalidated(command, is_gone) -> None:
    """By page, by an aligned power of two of pages, by domain, or all."""
    rig = Rig()
    rig.start()
    rig.map(0x5000, 0x50_0000)
    rig.dma(0x5000)
    rig.map(0x5000, 0x60_0000)
    assert rig.dma(0x5000).runs[0][0] == 0x50_0000
    assert rig.command(*command)
    assert (rig.dma(0x5000).runs[0][0] == 0x60_0000) == is_gone


def test_a_stale_device_entry_until_it_is_invalidated() -> None:
    """A device that is detached goes on until the unit is told."""
    rig = Rig()
    rig.start()
    rig.map(0x5000, 0x50_0000)
    rig.dma(0x5000)
    rig.attach(1)
    assert rig.dma(0x5000).outcome == "done"
    assert rig.command(RID, 2 << 28, 0, 0)
    assert rig.dma(0x5000).outcome == "fault"


def test_a_new_buffer_is_read_from_its_start() -> None:
    """Writing the base of a buffer sets its head and tail to zero."""
    rig = Rig()
    rig.start()
    assert rig.command(0, 8 << 28, 0, 0) == 32
    rig.write(0x08, COMMANDS | 9 << 56)
    assert (rig.read(0x2000), rig.read(0x2008)) == (0, 0)


@pytest.mark.parametrize(
    ("odd", "stops"),
    [(0x100_0000 | RW, True), (0x100_0000 | 1, True), (0x100_0000 | RW | 1, False), (0, True)],
)
def test_one_odd_leaf_among_many(odd, stops) -> None:
    """Present without rights and rights without present are no translation."""
    rig = Rig()
    rig.start()
    for page in range(40):
        rig.map(0x10_0000 + (page << 12), 0x80_0000 + (page << 12))
    rig.ram.write_u64(TABLE + 0x3000 + 8 * (0x100 + 20), odd, BY)
    found = rig.devices.iommu.translate(RID, 0x10_0000, 40 << 12, True)
    assert (found.fault is not None) == stops
    assert found.runs[0] == (0x80_0000, 20 << 12)
    assert found.runs[1:] == (() if stops else ((0x100_0000, 4096), (0x81_5000, 19 << 12)))


def test_a_bad_command_stops_the_buffer() -> None:
    """An illegal command is logged with its address, and nothing after it is done."""
    rig = Rig()
    rig.start()
    assert not rig.command(0, 0xF << 28, 0, 0)
    assert rig.events() == [(5, 0, 0, 0, COMMANDS)]
    assert rig.read(0x2020) == 1 << 3


def test_the_log_overflows() -> None:
    """A full log stops and says so; the faults go on being refused."""
    rig = Rig()
    rig.start()
    rig.write(0x10, EVENTS | 2 << 56)  # four entries, so three events
    for _ in range(4):
        assert rig.dma(0x5000).outcome == "fault"
    assert len(rig.events()) == 3
    assert rig.read(0x2020) == 1 | 1 << 4
    rig.write(0x2020, 1)
    assert rig.read(0x2020) == 1 << 4


def test_a_write_to_a_confidential_page_is_logged() -> None:
    """An RMP_FAULT event with the physical address."""
    rig = Rig(Snp())
    rig.start()
    rig.map(0x5000, 0x50_0000)
    snp = rig.devices.snp
    snp.enable()
    snp.init()
    snp.rmp.rmpupdate(0x50_0000, 4096, assigned=True, asid=1)
    assert rig.dma(0x5008).outcome == "rmp"
    assert rig.events() == [(0xD, RID, 0, 0x20, 0x50_0008)]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), max_size=60), st.integers(1, 61))
def test_long_runs_of_leaves(pages, count) -> None:
    """One DMA over many leaves gives what one DMA over each page gives."""
    rig = Rig()
    rig.start()
    for index, (frame, rights) in enumerate(pages):
        rig.map(0x10_0000 + (index << 12), 0x100_0000 + (frame << 12), rights)
    expected = []
    for index in range(count):
        frame, rights = pages[index] if index < len(pages) else (0, 0)
        if not rights & 1:
            break
        expected.append(0x1000 + frame)
    event = rig.devices.dma(NIC, 0x10_0000, count << 12)
    got = [
        frame for phys, size in event.runs for frame in range(phys >> 12, phys + size >> 12)
    ]
    assert got == expected


def test_its_state_is_plain_data() -> None:
    """Registers and caches survive a snapshot."""
    rig = Rig()
    rig.start()
    rig.map(0x5000, 0x50_0000)
    rig.dma(0x5000)
    before = repr(rig.devices.state())
    token = rig.hardware.snapshot()
    rig.devices.power_on()
    rig.devices.write_config(NIC, 4, 6, 2)
    assert rig.dma(0x5000).runs == ((0x5000, 4),)
    rig.hardware.rollback(token)
    assert repr(rig.devices.state()) == before
    assert rig.dma(0x5000).runs == ((0x50_0000, 4),)
