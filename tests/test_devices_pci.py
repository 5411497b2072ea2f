"""PCI: configuration space, BARs, bridges, resets, and where a DMA may go without an IOMMU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khosim.errors import InputError
from khosim.machine.devices import Bdf, Bridge, Endpoint, Transfer
from khosim.machine.hardware import Hardware
from khosim.machine.memory_map import MemoryMap

ONES = 0xFFFF_FFFF
NIC, PEER, FAR = "0000:3b:00.0", "0000:3b:00.1", "0000:3c:00.0"


def machine(*parts):
    """A small machine with its devices."""
    return Hardware(MemoryMap.from_size("64M"), devices=parts)


def host(**options):
    """Two functions behind one port, a third behind another."""
    hardware = machine(
        Bridge("00:01.0", secondary=0x3B),
        Bridge("00:02.0", secondary=0x3C),
        Endpoint(NIC, kind="nic", vfs=2),
        Endpoint(PEER, bars=(1 << 20,), **options),
        Endpoint(FAR, bars=(1 << 16, 1 << 21)),
    )
    return hardware, hardware.devices


def enable(devices, bdf):
    """What a driver does first: memory space and bus master on."""
    devices.write_config(bdf, 4, 0x6, 2)


def test_addresses_are_read_and_written() -> None:
    """An address is what lspci shows, and 16 bits on the bus."""
    bdf = Bdf.parse("0001:3b:1f.7")
    assert bdf == (1, 0x3B, 0x1F, 7)
    assert (str(bdf), bdf.rid, bdf.devfn) == ("0001:3b:1f.7", 0x3BFF, 0xFF)
    assert Bdf.parse("3b:00.0") == Bdf.of_rid(0, 0x3B00)
    for text in ("", "3b:20.0", "3b:00.8", "3b:00", "x:3b:00.0"):
        with pytest.raises(InputError, match="PCI address"):
            Bdf.parse(text)


def test_configuration_space_says_who_it_is() -> None:
    """Ids, class, header type and the chains of capabilities, byte by byte."""
    _, devices = host()
    read = devices.read_config
    assert read(NIC, 0x00) == 0x10D3_1AF4
    assert read(NIC, 0x08) >> 8 == 0x020000
    assert read(NIC, 0x0E, 1) == 0x80  # more than one function
    assert read("00:01.0", 0x0E, 1) == 0x01
    assert [read("00:01.0", at, 1) for at in (0x18, 0x19, 0x1A)] == [0, 0x3B, 0x3B]
    at, found = read(NIC, 0x34, 1), []
    while at:
        found.append((at, read(NIC, at, 1)))
        at = read(NIC, at + 1, 1)
    assert found == [(0x40, 0x01), (0x50, 0x11), (0x60, 0x10)]
    at, extended = 0x100, []
    while at:
        header = read(NIC, at)
        extended.append((at, header & 0xFFFF, header >> 16 & 0xF))
        at = header >> 20
    assert extended == [(0x100, 0x0D, 1), (0x140, 0x10, 1), (0x200, 0x03, 1)]
    assert read(NIC, 0x64) >> 28 & 1  # it can do a function level reset
    assert read("00:01.0", 0x62, 2) == 0x42  # a root port
    assert read("7f:00.0", 0) == ONES


def test_function_0_says_that_there_are_more() -> None:
    """A scan stops after function 0 where bit 7 of the header type is not set: ports too."""
    devices = machine(
        Bridge("00:01.0", secondary=1),
        Bridge("00:01.1", secondary=2),
        Bridge("00:02.0", secondary=3),
        Endpoint("01:00.0"),
    ).devices
    types = [devices.read_config(bdf, 0x0E, 1) for bdf in ("00:01.0", "00:02.0", "01:00.0")]
    assert types == [0x81, 0x01, 0x00]


def test_bars_tell_their_size() -> None:
    """Write ones, read the size: the driver's way of asking, and the way back."""
    _, devices = host()
    was = [devices.read_config(FAR, at) for at in (0x10, 0x14, 0x18, 0x1C, 0x20)]
    for at in (0x10, 0x14, 0x18, 0x1C, 0x20):
        devices.write_config(FAR, at, ONES)
    probed = [devices.read_config(FAR, at) for at in (0x10, 0x14, 0x18, 0x1C, 0x20)]
    assert probed == [0xFFFF_000C, ONES, 0xFFE0_000C, ONES, 0]
    for at, value in zip((0x10, 0x14, 0x18, 0x1C), was, strict=False):
        devices.write_config(FAR, at, value)
    (first, _), (second, size) = devices.pci.named(FAR).bars
    assert first == was[0] & ~0xF | was[1] << 32
    assert second == was[2] & ~0xF | was[3] << 32
    assert second % size == 0


@given(st.integers(0, 1023), st.integers(0, ONES))
def test_read_only_bits_stay(word: int, value: int) -> None:
    """No write to identity, status or capability headers changes them."""
    _, devices = host()
    before = devices.pci.named(FAR).config[:]
    devices.write_config(FAR, 4 * word, value)
    config = devices.pci.named(FAR).config
    for start, end in ((0, 4), (6, 12), (0x2C, 0x38), (0x40, 0x44), (0x50, 0x52), (0x60, 0x68)):
        assert config[start:end] == before[start:end]


def test_a_bar_answers_while_memory_is_enabled() -> None:
    """Reads give ones with memory off, in D3, and with the bridge's window shut."""
    _, devices = host()
    (bar, _), _ = devices.pci.named(FAR).bars
    devices.mmio_write(bar + 0x40, 0xAA)
    assert devices.mmio_read(bar + 0x40) == ONES
    enable(devices, FAR)
    assert devices.mmio_read(bar + 0x40) == 0
    devices.mmio_write(bar + 0x40, 0x1234_5678)
    assert devices.mmio_read(bar + 0x40) == 0x1234_5678
    assert devices.mmio_read(bar + 0x42, 2) == 0x1234
    devices.write_config("00:02.0", 4, 0, 2)
    assert devices.mmio_read(bar + 0x40) == ONES
    devices.write_config("00:02.0", 4, 6, 2)
    devices.write_config(FAR, 0x44, 3, 2)
    assert devices.mmio_read(bar + 0x40) == ONES


def test_a_function_level_reset_forgets() -> None:
    """Command, BARs and program are gone; identity is not; others do not notice."""
    _, devices = host()
    enable(devices, FAR)
    function = devices.pci.named(FAR)
    function.engine.program([Transfer(0x1000, 64, True)])
    devices.write_config(FAR, 0x68, 0x8000 | devices.read_config(FAR, 0x68, 2), 2)
    assert (function.resets, function.engine.running) == (1, False)
    assert devices.read_config(FAR, 4, 2) == 0
    assert function.bars[0][0] == 0
    assert devices.read_config(FAR, 0) == 0x10F0_1AF4
    assert not devices.read_config(FAR, 0x68, 2) & 0x8000
    assert [event.kind for event in devices.events] == ["reset"]
    assert devices.pci.named(NIC).resets == 0


def test_other_resets_are_counted_too() -> None:
    """The bus behind a bridge, and the way back from D3hot."""
    _, devices = host()
    devices.write_config("00:01.0", 0x3E, 0x40, 2)
    devices.write_config("00:01.0", 0x3E, 0, 2)
    devices.write_config(FAR, 0x44, 3, 2)
    devices.write_config(FAR, 0x44, 0, 2)
    resets = [(e.source, e.detail["how"]) for e in devices.events if e.kind == "reset"]
    assert resets == [(NIC, "bus"), (PEER, "bus"), (FAR, "d3hot")]


def test_bus_numbers_are_what_bridges_say() -> None:
    """A new secondary number moves a function, its requester id and its name on the bus."""
    hardware, devices = host()
    enable(devices, FAR)
    devices.write_config("00:02.0", 0x18, 0x0050_5000)
    function = devices.pci.named(FAR)
    assert devices.pci.find(FAR) is None
    assert devices.pci.find("50:00.0") is function
    assert (str(function.bdf), function.renumbered) == ("0000:50:00.0", 1)
    assert devices.dma(FAR, 0x1000, 4, b"abcd").rid == 0x5000
    moved = [e.detail for e in devices.events if e.kind == "renumbered"]
    assert moved == [{"old": FAR, "new": "0000:50:00.0"}]
    assert hardware.ram.read(0x1000, 4) == b"abcd"


def test_bus_master_gates_dma() -> None:
    """Without the bit, or without it in the bridge above, nothing leaves the device."""
    hardware, devices = host()
    assert devices.dma(FAR, 0x1000, 4, b"abcd").outcome == "master-abort"
    enable(devices, FAR)
    devices.write_config("00:02.0", 4, 2, 2)
    assert devices.dma(FAR, 0x1000, 4, b"abcd").outcome == "master-abort"
    devices.write_config("00:02.0", 4, 6, 2)
    done = devices.dma(FAR, 0xFFE, 4, b"abcd")
    assert (done.outcome, done.runs, done.rid) == ("done", ((0xFFE, 4),), 0x3C00)
    assert hardware.ram.last_writer(0x1000) == (-1, f"device {FAR}")
    assert devices.dma(FAR, 1 << 30, 4, b"abcd").outcome == "unclaimed"
    end = hardware.ram_ranges[-1][1]
    over_the_end = devices.dma(FAR, end - 2, 4, b"abcd")
    assert over_the_end.runs == ((end - 2, 2),)
    assert over_the_end.outcome == "unclaimed"


def test_a_peer_is_written_to() -> None:
    """A write to another function's BAR lands there, wherever that one is."""
    hardware, devices = host()
    for bdf in (NIC, PEER, FAR):
        enable(devices, bdf)
    for target in (PEER, FAR):
        bar = devices.pci.named(target).bars[0][0]
        event = devices.dma(NIC, bar + 16, 4, b"peer")
        assert (event.outcome, event.runs) == ("peer", ((bar + 16, 4),))
        assert devices.mmio_read(bar + 16) == int.from_bytes(b"peer", "little")
    assert hardware.ram.touched_ranges() == []


def test_a_write_over_the_end_of_a_bar() -> None:
    """What lies in the peer arrives; behind it nobody answers."""
    _, devices = host()
    for bdf in (NIC, PEER):
        enable(devices, bdf)
    start, size = devices.pci.named(PEER).bars[0]
    event = devices.dma(NIC, start + size - 2, 4, b"peer")
    assert (event.outcome, event.runs) == ("unclaimed", ((start + size - 2, 2),))
    assert devices.mmio_read(start + size - 2, 2) == int.from_bytes(b"pe", "little")


def test_nobody_is_behind_an_unnumbered_bridge() -> None:
    """With bus numbers of zero, as after a reset, no access goes through."""
    _, devices = host()
    devices.write_config("00:01.0", 0x18, 0)
    assert devices.pci.find("00:00.0") is None
    assert devices.pci.find(NIC) is None
    devices.write_config("00:01.0", 0x18, 0x003B_3B00)
    assert devices.pci.find(NIC).name == NIC
    assert devices.pci.named(NIC).renumbered == 2


def test_a_reset_clears_what_a_driver_set_up() -> None:
    """Memory behind BARs, pending interrupts, and the virtual functions' own registers."""
    _, devices = host()
    enable(devices, PEER)
    peer, nic = devices.pci.named(PEER), devices.pci.named(NIC)
    devices.mmio_write(peer.bars[0][0] + 64, 1)
    devices.write_config(PEER, 0x52, 0xC000, 2)
    assert peer.msix(0) == "masked"
    devices.write_config(NIC, 0x150, 2, 2)
    devices.write_config(NIC, 0x148, 0x9, 2)
    devices.write_config("3b:02.0", 4, 4, 2)
    peer.reset("flr")
    nic.reset("flr")
    assert peer.msix_pending == 0
    assert peer.bar_memory[0].read(64, 4) == bytes(4)
    devices.write_config(NIC, 0x150, 2, 2)
    devices.write_config(NIC, 0x148, 0x9, 2)
    assert devices.read_config("3b:02.0", 4, 2) == 0


def test_virtual_functions_come_and_go() -> None:
    """They appear with VF Enable, at the offset that the capability tells, and go with a reset."""
    _, devices = host()
    assert devices.pci.find("3b:02.0") is None
    devices.write_config(NIC, 0x150, 2, 2)
    devices.write_config(NIC, 0x148, 0x9, 2)
    vf = devices.pci.find("3b:02.1")
    assert vf is devices.pci.named(NIC).vfs[1]
    assert devices.read_config("3b:02.1", 0) == ONES
    devices.write_config("3b:02.1", 4, 4, 2)
    assert devices.dma(vf, 0x2000, 4, b"abcd").rid == 0x3B11
    (bar, size), = vf.bars
    devices.mmio_write(bar, 0x77)
    assert (devices.mmio_read(bar), size) == (0x77, 1 << 14)
    devices.write_config(NIC, 0x68, 0x8000, 2)
    assert devices.pci.find("3b:02.1") is None
    assert devices.dma(vf, 0x2000, 4, b"abcd").outcome == "no-power"


@pytest.mark.parametrize(
    ("parts", "cause"),
    [
        ([Endpoint("00:01.0"), Endpoint("0000:00:01.0")], "two of them"),
        ([Bridge("01:01.0", secondary=1)], "bus numbers"),
        ([Bridge("00:01.0", secondary=1), Bridge("00:02.0", secondary=1)], "two bridges"),
        ([Endpoint("00:01.0", kind="gpu")], "none of nic"),
        ([Endpoint("00:01.0", bars=(5000,))], "powers of two"),
        ([Endpoint("00:01.0", vfs=1), Endpoint("00:03.0")], "virtual function at 0000:00:03.0"),
        (["nic"], "each is a"),
    ],
)
def test_parts_that_do_not_fit(parts, cause) -> None:
    """One line says what is wrong."""
    with pytest.raises(InputError, match=cause):
        machine(*parts)
