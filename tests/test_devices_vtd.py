"""The remapping unit: tables in RAM in the real layout, stale caches, faults, interrupts."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim.machine.devices import Bridge, Endpoint, Vtd
from khosim.machine.hardware import Hardware
from khosim.machine.memory_map import MemoryMap

NIC, RID = "0000:3b:00.0", 0x3B00
BASE = 0xFED9_0000
GCMD, GSTS, RTADDR, CCMD, FSTS, FECTL = 0x18, 0x1C, 0x20, 0x28, 0x34, 0x38
IQT, IQA, IRTA = 0x88, 0x90, 0xB8
ROOT, CONTEXTS, TABLE = 0x10_0000, 0x10_1000, 0x11_0000
QUEUE, IRTES, PID = 0x18_0000, 0x19_0000, 0x1A_0040
BY = (0, "test")
DID = 5
CONTEXT_GLOBAL, IOTLB_GLOBAL = 1 << 63 | 1 << 61, 1 << 63 | 1 << 60


class Rig:
    """A machine, its unit, and the tables that a kernel would write."""

    def __init__(self, **options):
        self.hardware = Hardware(
            MemoryMap.from_size("64M"),
            devices=[
                Vtd(**options),
                Bridge("00:01.0", secondary=0x3B),
                Endpoint(NIC, kind="nic"),
                Endpoint("0000:3b:00.1", bars=(1 << 16,)),
            ],
        )
        self.ram = self.hardware.ram
        self.devices = self.hardware.devices
        self.unit = self.devices.iommu
        for function in (NIC, "0000:3b:00.1"):
            self.devices.write_config(function, 4, 6, 2)
        self.next_table = TABLE + 4096

    def write(self, offset, value, size=4):
        self.devices.mmio_write(BASE + offset, value, size)

    def read(self, offset, size=4):
        return self.devices.mmio_read(BASE + offset, size)

    def start(self, table=TABLE, kind=0, did=DID):
        """Root table, context entry, translation on."""
        self.ram.write_u64(ROOT + 16 * 0x3B, CONTEXTS | 1, BY)
        self.attach(table, kind, did)
        self.write(RTADDR, ROOT, 8)
        self.write(GCMD, 1 << 30)
        self.write(GCMD, 1 << 31)

    def attach(self, table, kind=0, did=DID):
        self.ram.write(CONTEXTS, struct.pack("<QQ", table | kind << 2 | 1, 2 | did << 8), BY)

    def map(self, iova, phys, size=4096, rights=3):
        """One leaf, with the tables above it where they are missing."""
        table, shift = TABLE, 39
        while 1 << shift > size:
            at = table + (iova >> shift & 511) * 8
            if not self.ram.read_u64(at) & 3:
                self.ram.write_u64(at, self.next_table | 3, BY)
                self.next_table += 4096
            table, shift = self.ram.read_u64(at) & ~0xFFF, shift - 9
        leaf = phys | rights | (1 << 7 if size > 4096 else 0)
        self.ram.write_u64(table + (iova >> shift & 511) * 8, leaf if rights else 0, BY)

    def dma(self, iova, data=b"data"):
        return self.devices.dma(NIC, iova, len(data), data)

    def iotlb(self, value, address=0):
        ecap = self.read(0x10, 8)
        at = (ecap >> 8 & 0x3FF) * 16
        self.write(at, address, 8)
        self.write(at + 8, value, 8)
        return self.read(at + 8, 8)


def test_capabilities_are_those_that_linux_decodes() -> None:
    """Where things are, how wide, how many: by the macros of drivers/iommu/intel/iommu.h."""
    rig = Rig()
    cap, ecap = rig.read(0x08, 8), rig.read(0x10, 8)
    assert 1 << 4 + 2 * (cap & 7) == 1 << 16  # domains
    assert cap >> 8 & 0x1F == 0b00100  # tables of 4 levels
    assert (cap >> 16 & 0x3F) + 1 == 48
    assert (cap >> 24 & 0x3FF) * 16 == 0x400
    assert cap >> 34 & 0xF == 0b0011
    assert (cap >> 39 & 1, (cap >> 40 & 0xFF) + 1, cap >> 59 & 1, cap >> 7 & 1) == (1, 8, 1, 0)
    assert [bit for bit in range(9) if ecap >> bit & 1] == [0, 1, 3, 4, 6, 7]
    assert rig.read(0x0C) == cap >> 32
    assert rig.read(FECTL) == 1 << 31


def test_without_translation_everything_passes() -> None:
    """An I/O address is a physical one until TE is set."""
    rig = Rig()
    assert rig.dma(0x5000).runs == ((0x5000, 4),)
    rig.start()
    assert rig.read(GSTS) == 1 << 31 | 1 << 30
    assert rig.dma(0x5000).outcome == "fault"


def test_a_page_walk_by_hand() -> None:
    """Four levels with every word written here, found at the address worked out by hand."""
    rig = Rig()
    rig.start()
    iova = 0x0000_7F12_3456_7000
    # Its indices: 254, 72, 418, 359.
    assert [iova >> shift & 511 for shift in (39, 30, 21, 12)] == [254, 72, 418, 359]
    for table, index, entry in (
        (TABLE, 254, 0x12_0003),
        (0x12_0000, 72, 0x12_1003),
        (0x12_1000, 418, 0x12_2003),
        (0x12_2000, 359, 0x0050_0003),
    ):
        rig.ram.write_u64(table + 8 * index, entry, BY)
    event = rig.dma(iova + 0x10)
    assert (event.outcome, event.runs, event.rid) == ("done", ((0x50_0010, 4),), RID)
    assert rig.ram.read(0x50_0010, 4) == b"data"
    over = rig.dma(iova + 0xFFE)
    assert (over.outcome, over.runs) == ("fault", ((0x50_0FFE, 2),))


def test_many_leaves_at_once() -> None:
    """Forty leaves in a row: a table among them, rights that end, and an order that jumps."""
    rig = Rig()
    rig.start()
    for index in range(30):
        rig.map(index << 21, index << 21, 2 << 20)
    rig.map(20 << 21, 0, 2 << 20, rights=0)
    for page in range(512):
        rig.map((20 << 21) + (page << 12), 0x2_0000 + (page << 12), rights=3 if page < 100 else 1)
    read = rig.unit.translate(RID, 0x1000, 60 << 20, False)
    assert read.runs == (
        (0x1000, (40 << 20) - 0x1000),
        (0x2_0000, 2 << 20),
        (42 << 20, (18 << 20)),
    )
    assert read.fault == (6, RID, 60 << 20, False)
    write = rig.unit.translate(RID, 0x1000, 50 << 20, True)
    assert write.runs == ((0x1000, (40 << 20) - 0x1000), (0x2_0000, 100 << 12))
    assert write.fault == (5, RID, (40 << 20) + (100 << 12), True)


def test_a_right_that_was_added_counts_at_once() -> None:
    """A cached translation that lacks a right is looked up again before it is a fault."""
    rig = Rig()
    rig.start()
    rig.map(0x5000, 0x50_0000, rights=1)
    assert rig.devices.dma(NIC, 0x5000, 4).outcome == "done"
    rig.map(0x5000, 0x50_0000)
    assert rig.dma(0x5000).outcome == "done"


def test_faults_that_nobody_records() -> None:
    """A look at the tables alone records nothing, nor does an entry with FPD set."""
    rig = Rig()
    rig.start()
    assert rig.unit.walk(RID, 0x5000, 4, True).fault == (5, RID, 0x5000, True)
    assert rig.unit.walk(0x3B08, 0x5000, 4, True).fault.reason == 2
    rig.ram.write_u64(CONTEXTS, TABLE | 3, BY)
    assert rig.dma(0x5000).outcome == "fault"
    assert (rig.unit.faults, rig.read(FSTS)) == ([], 0)


def test_large_leaves() -> None:
    """Leaves of 2 MiB and 1 GiB, and a DMA from one into the other."""
    rig = Rig()
    rig.start()
    rig.map(0x4000_0000, 0, 1 << 30)
    rig.map(0x3FE0_0000, 0x20_0000, 2 << 20)
    event = rig.dma(0x4000_0000 - 2, b"abcd")
    assert event.runs == ((0x3F_FFFE, 2), (0, 2))
    assert rig.dma(0x4012_3456).runs == ((0x12_3456, 4),)


def test_pass_through() -> None:
    """A context entry of type 2 needs no tables."""
    rig = Rig()
    rig.start(table=0, kind=2)
    assert rig.dma(0x30_0000).runs == ((0x30_0000, 4),)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda rig: rig.ram.write_u64(ROOT + 16 * 0x3B, 0, BY), 1),
        (lambda rig: rig.ram.write_u64(CONTEXTS, 0, BY), 2),
        (lambda rig: rig.ram.write_u64(CONTEXTS + 8, 7, BY), 3),
        (lambda rig: rig.ram.write_u64(CONTEXTS + 8, 3, BY), 3),
        (lambda rig: rig.ram.write_u64(CONTEXTS, TABLE | 0xD, BY), 3),
        (lambda rig: rig.map(0x5000, 0x50_0000, rights=1), 5),
        (lambda rig: rig.map(0x5000, 0, rights=0), 5),
        (lambda rig: rig.ram.write_u64(TABLE, (1 << 40) | 3, BY), 7),
        (lambda rig: rig.write(RTADDR, 1 << 40, 8) or rig.write(GCMD, 3 << 30), 8),
        (lambda rig: rig.ram.write_u64(ROOT + 16 * 0x3B, 1 << 40 | 1, BY), 9),
    ],
)
def test_faults_are_recorded(spoil, reason) -> None:
    """The reasons of the specification, in the recording registers as Linux reads them."""
    rig = Rig()
    rig.start()
    rig.map(0x5000, 0x50_0000)
    spoil(rig)
    assert rig.dma(0x5004).outcome == "fault"
    assert rig.read(FSTS) == 1 << 1
    at = 0x400
    high = rig.read(at + 12)
    assert (high >> 31, high >> 30 & 1, high & 0xFF) == (1, 0, reason)
    assert rig.read(at + 8) & 0xFFFF == RID
    assert rig.read(at, 8) == 0x5000
    rig.write(at + 12, 1 << 31)
    assert rig.read(FSTS) == 0
    assert [fault.reason for fault in rig.unit.faults] == [reason]


def test_beyond_the_width_and_reads() -> None:
    """An address above 48 bits is refused; a refused read says that it was one."""
    rig = Rig()
    rig.start()
    assert rig.dma(1 << 48).outcome == "fault"
    assert rig.devices.dma(NIC, 0x5000, 4).outcome == "fault"
    assert [(f.reason, f.write) for f in rig.unit.faults] == [(4, True), (6, False)]
    assert rig.read(0x410 + 12) >> 30 & 1


def test_the_recording_registers_overflow() -> None:
    """Eight faults have room; the ninth sets the overflow bit."""
    rig = Rig()
    rig.start()
    for page in range(9):
        assert rig.read(FSTS) & 1 == 0
        rig.dma(page << 12)
    assert rig.read(FSTS) & 1
    assert len(rig.unit.faults) == 9


def test_a_fault_raises_the_units_own_interrupt() -> None:
    """Held back while masked, sent when it is unmasked, and at once from then on."""
    rig = Rig()
    rig.start()
    rig.write(0x3C, 0x31)
    rig.write(0x40, 0xFEE0_1000)
    rig.dma(0x5000)
    assert rig.read(FECTL) == 3 << 30
    assert rig.devices.interrupts.take() == {}
    rig.write(FECTL, 0)
    assert rig.read(FECTL) == 0
    assert rig.devices.interrupts.take() == {(1, 0x31): 1}
    rig.dma(0x5000)
    assert rig.devices.interrupts.take() == {(1, 0x31): 1}


def test_peers_meet_the_unit_where_acs_says_so() -> None:
    """Below one port a request goes straight to a peer; with P2P redirect it is translated."""
    rig = Rig()
    rig.start()
    bar = rig.devices.pci.named("0000:3b:00.1").bars[0][0]
    assert rig.dma(bar).outcome == "peer"
    assert rig.devices.mmio_read(bar) == int.from_bytes(b"data", "little")
    rig.devices.write_config(NIC, 0x106, 1 << 2, 2)
    assert rig.dma(bar).outcome == "fault"
    rig.map(0x7000, bar)
    event = rig.dma(0x7008, b"peer")
    assert (event.outcome, event.runs) == ("peer", ((bar + 8, 4),))
    assert rig.devices.mmio_read(bar + 8) == int.from_bytes(b"peer", "little")
    read = rig.devices.dma(NIC, 0x7008, 4)
    assert read.outcome == "peer"


def test_a_write_to_the_interrupt_range_is_a_message() -> None:
    """Four bytes to 0xfee..... are not memory, and no table translates them."""
    rig = Rig()
    rig.start()
    event = rig.dma(0xFEE0_3000, b"\x77\0\0\0")
    assert event.outcome == "interrupt"
    assert rig.devices.interrupts.take() == {(3, 0x77): 1}
    assert rig.dma(0xFEE0_3000, b"12345678").outcome == "unclaimed"


def test_a_stale_translation_is_used_until_invalidated() -> None:
    """The table changed and nobody told the unit: the device writes where it used to."""
    rig = Rig()
    rig.start()
    rig.map(0x5000, 0x50_0000)
    assert rig.dma(0x5000).runs[0][0] == 0x50_0000
    rig.map(0x5000, 0x60_0000)
    assert rig.dma(0x5000).runs[0][0] == 0x50_0000
    assert rig.unit.walk(RID, 0x5000, 4, True).runs == ((0x60_0000, 4),)
    answer = rig.iotlb(IOTLB_GLOBAL)
    assert (answer >> 63, answer >> 57 & 3) == (0, 1)
    assert rig.dma(0x5000).runs[0][0] == 0x60_0000


def test_a_stale_context_is_used_until_invalidated() -> None:
    """Another table for the device counts once the context cache is told."""
    rig = Rig()
    rig.start()
    rig.map(0x5000, 0x50_0000)
    rig.dma(0x5000)
    rig.attach(0x17_0000, did=6)
    assert rig.dma(0x5000).outcome == "done"
    rig.write(CCMD, CONTEXT_GLOBAL, 8)
    assert rig.read(CCMD, 8) >> 63 == 0
    assert rig.dma(0x5000).outcome == "fault"


@pytest.mark.parametrize(
    ("value", "address", "is_gone"),
    [
        (2 << 60 | DID << 32, 0, True),
        (2 << 60 | 9 << 32, 0, False),
        (3 << 60 | DID << 32, 0x5000, True),
        (3 << 60 | DID << 32, 0x6000, False),
        (3 << 60 | DID << 32, 0x4000 | 1, True),
        (3 << 60 | DID << 32, 0x6000 | 3, True),
    ],
)
def test_invalidation_is_as_selective_as_asked(value, address, is_gone) -> None:
    """By domain, by page, by an aligned power of two of pages."""
    rig = Rig()
    rig.start()
    rig.map(0x5000, 0x50_0000)
    rig.dma(0x5000)
    rig.map(0x5000, 0x60_0000)
    rig.iotlb(1 << 63 | value, address)
    assert (rig.dma(0x5000).runs[0][0] == 0x60_0000) == is_gone


@pytest.mark.parametrize("flushed", [0x20_0000, 0x3F_F000])
def test_a_large_leaf_goes_as_a_whole(flushed) -> None:
    """One translation of 2 MiB is cached by a touch of any page, and gone with any page of it."""
    rig = Rig()
    rig.start()
    rig.map(0x20_0000, 0x100_0000, 2 << 20)
    rig.dma(0x20_3000)
    rig.map(0x20_0000, 0x120_0000, 2 << 20)
    assert rig.dma(0x3F_0000).runs[0][0] == 0x11F_0000
    rig.iotlb(1 << 63 | 3 << 60 | DID << 32, flushed)
    assert rig.dma(0x20_3000).runs[0][0] == 0x120_3000
    assert rig.dma(0x3F_0000).runs[0][0] == 0x13F_0000


def test_the_queue_does_the_same() -> None:
    """Descriptors in RAM: contexts, translations, and a wait that writes its status."""
    rig = Rig()
    rig.start()
    rig.map(0x5000, 0x50_0000)
    rig.dma(0x5000)
    rig.map(0x5000, 0x60_0000)
    for index, words in enumerate(
        [(1 << 4 | 1, 0), (3 << 4 | DID << 16 | 2, 0x5000), (0xBEEF << 32 | 1 << 5 | 5, 0x1B_0000)]
    ):
        rig.ram.write(QUEUE + 16 * index, struct.pack("<QQ", *words), BY)
    rig.write(IQA, QUEUE, 8)
    rig.write(GCMD, 1 << 31 | 1 << 26)
    rig.write(IQT, 3 << 4, 8)
    assert rig.read(0x80, 8) == 3 << 4
    assert rig.ram.read_u32(0x1B_0000) == 0xBEEF
    assert rig.dma(0x5000).runs[0][0] == 0x60_0000
    rig.ram.write_u64(QUEUE + 48, 0xF, BY)
    rig.write(IQT, 4 << 4, 8)
    assert rig.read(FSTS) & 1 << 4
    assert rig.read(0x80, 8) == 3 << 4


def test_without_caches_nothing_goes_stale() -> None:
    """A unit that keeps nothing follows the tables at once."""
    rig = Rig(caches=False)
    rig.start()
    rig.map(0x5000, 0x50_0000)
    rig.dma(0x5000)
    rig.map(0x5000, 0x60_0000)
    assert rig.dma(0x5000).runs[0][0] == 0x60_0000


# -- a dumb model ---------------------------------------------------------------------------------

PAGES = 1024 + 8
FRAMES = st.integers(0, 40)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("map"), st.integers(0, PAGES - 1), FRAMES, st.integers(0, 3)),
        st.tuples(st.just("huge"), st.integers(0, 1), st.integers(1, 9), st.integers(0, 3)),
        st.tuples(st.just("dma"), st.integers(0, PAGES - 1), st.integers(1, 600), st.booleans()),
        st.tuples(st.just("flush"), st.integers(0, PAGES - 1), st.integers(0, 3), st.booleans()),
    ),
    max_size=12,
)


class PageByPage:
    """A unit that knows single pages only: table and cache are dictionaries."""

    def __init__(self):
        self.table, self.cache = {}, {}

    def flush(self, first, count):
        for page in range(first, first + count):
            held = self.cache.pop(page, None)
            if held and held[2]:
                for other in range(page & ~511, (page & ~511) + 512):
                    if self.cache.get(other, (0, 0, False))[2]:
                        del self.cache[other]

    def dma(self, page, count, write):
        """The frames that a device reaches, and whether it faulted."""
        need, found = 2 if write else 1, []
        for at in range(page, page + count):
            if not self.cache.get(at, (0, 0, False))[1] & need:
                held = self.table.get(at, (0, 0, False))
                whole = range(at & ~511, (at & ~511) + 512) if held[2] else (at,)
                for other in whole if held[1] else ():
                    self.cache[other] = self.table[other]
                if not held[1] & need:
                    return found, True
            found.append(self.cache[at][0])
        return found, False


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_it_does_what_a_page_by_page_unit_does(steps) -> None:
    """Random maps, DMAs and selective flushes: the same frames as a dictionary per page gives.

    The unit walks all of a DMA at once, so it may remember pages behind a fault: both forget
    everything after one.
    """
    rig = Rig()
    rig.start()
    model = PageByPage()
    for kind, first, second, third in steps:
        if kind == "map":
            if first >> 9 < 2 and model.table.get(first & ~511, (0, 0, False))[2]:
                continue  # below a leaf of 2 MiB there is no table
            rig.map(first << 12, 0x200_0000 + (second << 12), rights=third)
            model.table[first] = (0x2000 + second, third, False)
        elif kind == "huge" and third:
            rig.map(first << 21, second << 21, 2 << 20, rights=third)
            for page in range(512):
                model.table[(first << 9) + page] = ((second << 9) + page, third, True)
        elif kind == "flush":
            rig.iotlb(1 << 63 | 3 << 60 | DID << 32, first << 12 | second)
            model.flush(first & -(1 << second), 1 << second)
        elif kind == "dma":
            frames, faulted = model.dma(first, second, third)
            data = bytes(second << 12) if third else None
            event = rig.devices.dma(NIC, first << 12, second << 12, data)
            got = [
                frame
                for phys, length in event.runs
                for frame in range(phys >> 12, phys + length >> 12)
            ]
            assert got == frames
            assert (event.outcome == "fault") == faulted
            if faulted:
                rig.iotlb(IOTLB_GLOBAL)
                model.cache.clear()


# -- interrupts -----------------------------------------------------------------------------------


def arm(rig, address, data):
    """What a driver does: the MSI-X entry, unmasked, and the capability on."""
    bar = rig.devices.pci.named(NIC).bars[0][0]
    table = bar + (rig.devices.read_config(NIC, 0x54) & ~7)
    rig.devices.mmio_write(table, address, 8)
    rig.devices.mmio_write(table + 8, data)
    rig.devices.mmio_write(table + 12, 0)
    rig.devices.write_config(NIC, 0x52, 0x8000, 2)
    return rig.devices.pci.named(NIC)


def remap(rig, low, high):
    """An interrupt remapping table with one entry, number 3."""
    rig.ram.write(IRTES + 16 * 3, struct.pack("<QQ", low, high), BY)
    rig.write(IRTA, IRTES | 7, 8)
    rig.write(GCMD, 1 << 24)
    rig.write(GCMD, 1 << 25)


def test_a_message_waits_for_a_cpu() -> None:
    """Latched by destination and vector; a second joins it; taken once."""
    rig = Rig()
    nic = arm(rig, 0xFEE0_2000, 0x41)
    assert [nic.msix(0), nic.msix(0)] == ["latched", "merged"]
    assert rig.devices.interrupts.take() == {(2, 0x41): 2}
    assert rig.devices.interrupts.take() == {}
    assert rig.devices.interrupts.counts == {"latched": 1, "merged": 1, "taken": 2}


def test_masked_ones_stay_pending() -> None:
    """A masked entry sets its pending bit, and the message goes out when it is unmasked."""
    rig = Rig()
    nic = arm(rig, 0xFEE0_0000, 0x41)
    rig.devices.write_config(NIC, 0x52, 0xC000, 2)
    assert nic.msix(0) == "masked"
    bar = nic.bars[0][0]
    pba = bar + (rig.devices.read_config(NIC, 0x58) & ~7)
    assert rig.devices.mmio_read(pba, 8) == 1
    rig.devices.write_config(NIC, 0x52, 0x8000, 2)
    assert rig.devices.mmio_read(pba, 8) == 0
    assert rig.devices.interrupts.take() == {(0, 0x41): 1}
    nic.reset("flr")
    assert nic.msix(0) == "disabled"


def test_a_remapped_message() -> None:
    """Entry 3: vector 0x55 to APIC 7, for this requester only."""
    rig = Rig()
    nic = arm(rig, 0xFEE0_0010 | 3 << 5, 0)
    remap(rig, 7 << 40 | 0x55 << 16 | 1, 1 << 18 | RID)
    assert nic.msix(0) == "latched"
    assert rig.devices.interrupts.take() == {(7, 0x55): 1}
    rig.ram.write_u64(IRTES + 48, 0, BY)
    assert nic.msix(0) == "latched"  # the cached entry
    rig.write(IQA, QUEUE, 8)
    rig.ram.write(QUEUE, struct.pack("<QQ", 4, 0), BY)
    rig.write(GCMD, 1 << 25 | 1 << 26)
    rig.write(IQT, 1 << 4, 8)
    assert nic.msix(0) == "blocked"
    assert rig.unit.faults[-1].reason == 0x22


@pytest.mark.parametrize(
    ("address", "high", "reason"),
    [
        (0xFEE0_0000, 1 << 18 | RID, 0x25),
        (0xFEE0_0010 | 3 << 5, 1 << 18 | 0x1234, 0x26),
        (0xFEE0_0010 | 300 << 5, 1 << 18 | RID, 0x21),
    ],
)
def test_messages_that_are_blocked(address, high, reason) -> None:
    """The old format, somebody else's entry, an index behind the table's end."""
    rig = Rig()
    nic = arm(rig, address, 0)
    remap(rig, 7 << 40 | 0x55 << 16 | 1, high)
    assert nic.msix(0) == "blocked"
    assert [fault.reason for fault in rig.unit.faults] == [reason]


@pytest.mark.parametrize(
    ("high", "passes"),
    [
        (0, True),  # not checked
        (1 << 18 | RID, True),
        (1 << 18 | RID | 4, False),
        (1 << 18 | 1 << 16 | RID | 4, True),
        (1 << 18 | 2 << 16 | RID | 6, True),
        (1 << 18 | 1 << 16 | RID | 6, False),
        (1 << 18 | 3 << 16 | RID | 7, True),
        (1 << 18 | 3 << 16 | RID | 8, False),
        (2 << 18 | 0x3A3B, True),  # buses 3a to 3b
        (2 << 18 | 0x3C3D, False),
    ],
)
def test_who_may_use_an_entry(high, passes) -> None:
    """Source validation: exactly, without some bits of the function, or by bus."""
    rig = Rig()
    nic = arm(rig, 0xFEE0_0010 | 3 << 5, 0)
    remap(rig, 7 << 40 | 0x55 << 16 | 1, high)
    assert (nic.msix(0) == "latched") == passes


def test_a_message_without_bus_master_is_not_sent() -> None:
    """A message is a write like others."""
    rig = Rig()
    nic = arm(rig, 0xFEE0_0000, 0x41)
    rig.devices.write_config(NIC, 4, 2, 2)
    assert nic.msix(0) == "disabled"
    assert rig.devices.interrupts.take() == {}


def test_one_entry_is_forgotten_alone() -> None:
    """A selective invalidation of the interrupt entry cache leaves the others."""
    rig = Rig()
    nic = arm(rig, 0xFEE0_0010 | 3 << 5, 0)
    remap(rig, 7 << 40 | 0x55 << 16 | 1, 0)
    nic.msix(0)
    rig.ram.write_u64(IRTES + 48, 0, BY)
    rig.write(IQA, QUEUE, 8)
    rig.write(GCMD, 1 << 25 | 1 << 26)
    for number, (index, outcome) in enumerate([(4, "merged"), (3, "blocked")]):
        rig.ram.write(QUEUE + 16 * number, struct.pack("<QQ", index << 32 | 1 << 4 | 4, 0), BY)
        rig.write(IQT, number + 1 << 4, 8)
        assert nic.msix(0) == outcome
    rig.write(GCMD, 1 << 25)
    rig.write(GCMD, 1 << 25 | 1 << 26)
    assert rig.read(0x80, 8) == 0  # a queue that is switched on begins at its start


@pytest.mark.parametrize(
    ("how", "did", "sid", "ignored", "is_gone"),
    [
        (2, DID, 0, 0, True),
        (2, 9, 0, 0, False),
        (3, DID, RID, 0, True),
        (3, DID, RID | 1, 0, False),
        (3, DID, RID | 7, 3, True),
        (3, DID, RID | 4, 1, True),
        (3, DID, RID | 2, 1, False),
    ],
)
def test_contexts_go_as_selectively_as_asked(how, did, sid, ignored, is_gone) -> None:
    """By domain, by device, by device with some bits of the function ignored."""
    rig = Rig()
    rig.start()
    rig.map(0x5000, 0x50_0000)
    rig.dma(0x5000)
    rig.ram.write_u64(CONTEXTS, 0, BY)
    rig.write(CCMD, 1 << 63 | how << 61 | ignored << 32 | sid << 16 | did, 8)
    assert (rig.dma(0x5000).outcome == "fault") == is_gone


def test_a_posted_message_waits_in_memory() -> None:
    """The vector's bit and ON in the descriptor, one notification for several."""
    rig = Rig()
    nic = arm(rig, 0xFEE0_0010 | 3 << 5, 0)
    remap(rig, (PID >> 6 & 0x3FF_FFFF) << 38 | 0x91 << 16 | 1 << 15 | 1, 1 << 18 | RID)
    rig.ram.write_u64(PID + 32, 0xF2 << 16 | 4 << 40, BY)
    assert [nic.msix(0), nic.msix(0)] == ["posted", "posted"]
    assert rig.ram.read(PID, 32) == bytes(18) + b"\x02" + bytes(13)
    assert rig.ram.read_u64(PID + 32) == 0xF2 << 16 | 4 << 40 | 1
    assert rig.devices.interrupts.take() == {(4, 0xF2): 1}
    rig.ram.write_u64(PID + 32, 2, BY)
    nic.msix(0)
    assert rig.ram.read_u64(PID + 32) == 2  # suppressed: the bit is there, nobody is told
    assert rig.devices.interrupts.take() == {}


def test_the_card_goes_on_by_itself() -> None:
    """Rings in memory, seen through the tables: frames arrive and leave while nobody looks."""
    rig = Rig()
    rig.start()
    nic = arm(rig, 0xFEE0_0000, 0x41)
    for page in range(8):
        rig.map(0x8000 + (page << 12), 0x100_0000 + (page << 12))
    bar = nic.bars[0][0]
    for ring, base in ((0x2800, 0x8000), (0x3800, 0x8100)):
        rig.devices.mmio_write(bar + ring, base)
        rig.devices.mmio_write(bar + ring + 8, 4 * 16)
        rig.devices.mmio_write(bar + ring + 0x18, 2)
        for index in range(2):
            words = 0x9000 + 0x800 * index, 60 | 0x09 << 24 if ring == 0x3800 else 0
            at = 0x100_0000 + base - 0x8000 + 16 * index
            rig.ram.write(at, struct.pack("<QQ", *words), BY)
        rig.devices.mmio_write(bar + (0x100 if ring == 0x2800 else 0x400), 2)
    for _ in range(4):
        rig.devices.tick()
    heads = [rig.devices.mmio_read(bar + at) for at in (0x2810, 0x3810)]
    assert heads == [2, 2]
    assert [rig.ram.read(0x100_0000 + at, 1)[0] for at in (12, 28)] == [3, 3]
    assert [rig.ram.read(0x100_0100 + at, 1)[0] & 1 for at in (12, 28)] == [1, 1]
    assert rig.ram.read_u64(0x100_1000) == 1 << 32
    assert rig.devices.interrupts.take() == {(0, 0x41): 2}
    assert not nic.engine.busy


def test_a_card_that_cannot_read_its_ring_hangs() -> None:
    """One fault and it does no more, until a reset through its own register."""
    rig = Rig()
    rig.start()
    nic = rig.devices.pci.named(NIC)
    bar = nic.bars[0][0]

    def enable() -> None:
        rig.devices.mmio_write(bar + 0x2808, 64)
        rig.devices.mmio_write(bar + 0x2818, 2)
        rig.devices.mmio_write(bar + 0x100, 2)

    enable()
    rig.devices.tick()
    rig.devices.tick()
    assert [fault.iova for fault in rig.unit.faults] == [0]
    assert not nic.engine.busy
    rig.map(0, 0x50_0000)
    rig.devices.mmio_write(bar, 1 << 26)
    enable()
    assert nic.engine.busy
    rig.devices.tick()
    assert rig.devices.mmio_read(bar + 0x2810) == 1


def test_an_empty_frame_is_sent_without_its_data() -> None:
    """A transmit descriptor of length 0: the card reads it, and nothing else."""
    rig = Rig()
    bar = rig.devices.pci.named(NIC).bars[0][0]
    rig.ram.write(0x5000, struct.pack("<QQ", 0x6000, 0), BY)
    for register, value in ((0x3800, 0x5000), (0x3808, 64), (0x3818, 1), (0x400, 2)):
        rig.devices.mmio_write(bar + register, value)
    rig.devices.tick()
    dmas = [event.detail["dma"] for event in rig.devices.events if event.kind == "dma"]
    assert [(dma.iova, dma.len_bytes) for dma in dmas] == [(0x5000, 16)]
