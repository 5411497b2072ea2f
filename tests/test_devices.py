"""Devices of a machine as a whole: their clock, snapshots, images, power cycles, and big hosts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from khosim import Machine
from khosim.errors import InputError
from khosim.machine.devices import (
    Amd,
    Bridge,
    Endpoint,
    GuestWrite,
    Part,
    Snp,
    Transfer,
    Vtd,
    at,
    every,
    never,
    seeded,
)
from khosim.machine.hardware import Hardware
from khosim.machine.memory_map import MemoryMap

GIB = 1 << 30
NIC, PLAIN = "0000:3b:00.0", "0000:00:03.0"
PARTS = (
    Vtd(),
    Snp(),
    Bridge("00:01.0", secondary=0x3B),
    Endpoint(NIC, kind="nic", vfs=2),
    Endpoint(PLAIN, bars=(1 << 16,)),
)


def host():
    """A small host whose plain device writes a page of its own, again and again."""
    machine = Machine("64M", devices=PARTS, drivers=False)
    return machine, machine.hardware.devices


def run(devices, phys):
    """Let the plain device write there."""
    devices.write_config(PLAIN, 4, 6, 2)
    engine = devices.pci.named(PLAIN).engine
    engine.program([Transfer(phys, 64, True, 1)])
    return engine


def busy(devices):
    """Bring something into every part of the state."""
    run(devices, 0x5000)
    devices.write_config(NIC, 0x150, 2, 2)
    devices.write_config(NIC, 0x148, 9, 2)
    nic = devices.pci.named(NIC)
    devices.write_config(NIC, 4, 6, 2)
    devices.write_config(NIC, 0x52, 0x8000, 2)
    table = nic.bars[0][0] + (1 << 16)
    devices.mmio_write(table, 0xFEE0_0000, 8)
    devices.mmio_write(table + 12, 0)
    nic.msix(0)
    nic.msix(1)
    nic.engine.program([Transfer(0x6000, 8, True)])
    devices.mmio_write(devices.pci.named(PLAIN).bars[0][0] + 8, 0xABCD)
    ram = devices.snp.ram
    for phys, word in ((0x10_03B0, 0x10_2001), (0x10_2000, 9), (0x10_2008, 0x102)):
        ram.write_u64(phys, word, (0, "test"))
    devices.mmio_write(0xFED9_0020, 0x10_0000, 8)
    devices.mmio_write(0xFED9_0018, 1 << 30)
    devices.snp.enable()
    devices.snp.init()
    devices.snp.rmp.rmpupdate(0x8000, 4096, assigned=True, immutable=True)
    devices.snp.gctx_create(0x8000)
    devices.vcpus.enter("vm/0", [(0, 0x9000, 4096)], program=[GuestWrite(0, 8)])
    devices.tick()
    devices.mmio_write(0xFED9_0018, 1 << 31)
    devices.tick()


def test_a_machine_without_devices_has_none() -> None:
    """Nothing is attached, nothing listens, nothing is written to an image."""
    machine = Machine("64M")
    assert machine.hardware.devices is None
    kernel = machine.boot()
    assert kernel.trace is None
    with pytest.raises(InputError, match="has its own"):
        Machine(hardware=machine.hardware, devices=PARTS)


def test_schedules() -> None:
    """Who acts after which event is a matter of its number alone."""
    assert [t for t in range(9) if every(3).acting(t)] == [2, 5, 8]
    assert not any(never().acting(t) for t in range(9))
    moments = at([3, (5, "b"), (5, "a")])
    assert [moments.acting(t) for t in (2, 3, 5)] == [(), ("",), ("b", "a")]
    times = [t for t in range(1000) if seeded(7, 0.25).acting(t)]
    assert times == [t for t in range(1000) if seeded(7, 0.25).acting(t)]
    assert 180 < len(times) < 320
    assert times != [t for t in range(1000) if seeded(8, 0.25).acting(t)]
    assert len([t for t in range(100) if seeded(7, 1).acting(t)]) == 100
    for bad in (lambda: every(0), lambda: seeded(1, 2)):
        with pytest.raises(InputError, match="schedule"):
            bad()


def test_devices_act_between_events_of_both_kernels() -> None:
    """The clock goes on through the jump, and the DMA lands where it did before."""
    machine, devices = host()
    seen = []
    machine.listen(seen.append)
    kernel = machine.boot(cmdline="kho=on")
    folio = kernel.alloc_folio(0)
    kernel.kho_preserve_folio(folio)
    engine = run(devices, folio.phys)
    devices.clock.schedule = every(5)
    before = devices.clock.now
    machine.load_successor(kernel)
    jumped = devices.clock.now
    successor = machine.resume()
    assert devices.clock.now == len(seen) > jumped > before
    dmas = [event for event in devices.events if event.kind == "dma"]
    assert [event.time for event in dmas] == [
        t + 1 for t in range(before, devices.clock.now) if t % 5 == 4
    ]
    assert any(event.time <= jumped for event in dmas)
    assert any(event.time > jumped for event in dmas)
    assert engine.steps == len(dmas)
    assert {event.detail["dma"].outcome for event in dmas} == {"done"}
    words = successor.ram.read_u64(folio.phys)
    assert words == engine.steps << 32 ^ 1
    assert not machine.check()  # whose page a device may write to is the business of drivers


def test_one_device_at_one_moment() -> None:
    """An explicit list of events names who acts."""
    _, devices = host()
    run(devices, 0x5000)
    devices.clock.schedule = at([(4, PLAIN), (6, NIC), 9])
    for _ in range(12):
        devices.clock.event()
    assert [(e.time, e.source) for e in devices.events] == [(5, PLAIN), (10, PLAIN)]


def test_a_listener_hears_at_once() -> None:
    """An observer sees RAM at the moment of each DMA."""
    machine, devices = host()
    run(devices, 0x5000)
    heard = []
    devices.listen(lambda event: heard.append(machine.hardware.ram.read_u64(0x5000) >> 32))
    devices.tick()
    devices.tick()
    assert heard == [1, 2]


def test_a_snapshot_includes_everything() -> None:
    """All state goes back, nested snapshots too, and the record with it."""
    machine, devices = host()
    hardware = machine.hardware
    fresh = devices.state()
    outer = hardware.snapshot()
    busy(devices)
    full = devices.state()
    nr_events = len(devices.events)
    assert all(one != other for one, other in zip(fresh[1:], full[1:], strict=True))
    inner = hardware.snapshot()
    devices.pci.named(PLAIN).reset("flr")
    devices.iommu.power_on()
    devices.snp.power_on()
    devices.at_jump()
    devices.interrupts.take()
    assert all(one != other for one, other in zip(full[1:], devices.state()[1:], strict=True))
    hardware.rollback(inner)
    assert devices.state() == full
    assert len(devices.events) == nr_events
    hardware.rollback(outer)
    assert devices.state() == fresh
    assert devices.events == []
    with pytest.raises(InputError, match="not active"):
        hardware.rollback(inner)
    hardware.discard(outer)


def test_an_image_holds_the_devices(tmp_path) -> None:
    """State and parts, to the last byte; a power cycle afterwards is the same too."""
    machine, devices = host()
    fresh = devices.state()[1:]
    busy(devices)
    machine.save(tmp_path / "image")
    loaded = Machine.load(tmp_path / "image").hardware.devices
    assert loaded.parts == PARTS
    assert repr(loaded.state()) == repr(devices.state())
    for one in (devices, loaded):
        one.tick()
        assert one.mmio_read(one.pci.named(PLAIN).bars[0][0] + 8) == 0xABCD
    assert repr(loaded.state()) == repr(devices.state())
    assert [e[1:] for e in loaded.events] == [e[1:] for e in devices.events[-len(loaded.events) :]]
    for one in (devices, loaded):
        one.power_on()
        assert repr(one.state()[1:]) == repr(fresh)


@pytest.mark.parametrize(
    "blob", [b"", b"{}", b"[[],[]]", b'[[["Disk",{}]],[]]', b"[[[]],[]]", b"[" * 5000]
)
def test_a_damaged_image(tmp_path, blob) -> None:
    """One line, whatever stands in the blob."""
    hardware = Hardware(MemoryMap.from_size("64M"))
    hardware.save(tmp_path / "image", firmware={"devices": blob})
    with pytest.raises(InputError, match="image: devices: "):
        Machine.load(tmp_path / "image")


def test_a_cold_boot_is_a_power_cycle() -> None:
    """Programs and settings are gone after pressing reset; a kexec leaves them."""
    machine, devices = host()
    kernel = machine.boot(cmdline="kho=on")
    engine = run(devices, 0x5000)
    kernel.kexec()
    assert engine.running
    machine.boot()
    assert not engine.running
    assert devices.read_config(PLAIN, 4, 2) == 0


def test_a_kernel_that_writes_to_a_guest_dies() -> None:
    """#PF(RMP) in a successor that takes a guest's page for free memory."""
    machine, devices = host()
    kernel = machine.boot(cmdline="kho=on")
    devices.snp.enable()
    devices.snp.init()
    machine.load_successor(kernel)
    start = machine.hardware.ram_ranges[0][0]
    devices.snp.rmp.rmpupdate(start, 48 << 20, assigned=True, asid=1)
    with pytest.raises(Exception, match=r"#PF\(RMP\)"):
        machine.resume()


def test_a_big_host_is_cheap() -> None:
    """128 devices, 2 TiB of encrypted memory mapped with leaves of 1 GiB: set-up, DMA, snapshot."""
    parts = [Vtd(), Snp()]
    for index in range(128):
        parts.append(Bridge(f"00:{index >> 3:02x}.{index & 7}", secondary=index + 1))
        parts.append(Endpoint(f"{index + 1:02x}:00.0", kind="nic"))
    hardware = Hardware(MemoryMap.from_size("4T"), devices=parts)
    devices, ram, by = hardware.devices, hardware.ram, (0, "test")
    unit, rmp = devices.iommu, devices.snp.rmp
    table = 0x100_0000
    ram.write_u64(table, table + 0x1000 | 3, by)
    for level in range(4):
        ram.write_u64(table + 8 * level, table + 0x1000 * (level + 1) | 3, by)
    for gib in range(2048):
        ram.write_u64(table + 0x1000 + 8 * gib, (1 << 40) + (gib << 30) | 0x83, by)
    for index in range(128):
        ram.write_u64(0x10_0000 + 16 * (index + 1), 0x20_0001 + 4096 * index, by)
        ram.write_u64(0x20_0000 + 4096 * index, table | 1, by)
        ram.write_u64(0x20_0008 + 4096 * index, 1 << 8 | 2, by)
    unit.write(0x20, 0x10_0000, 8)
    unit.write(0x18, 1 << 30)
    unit.write(0x18, 1 << 31)
    whole = unit.translate(0x0100, 0, 2048 * GIB, True)
    assert whole.runs == ((1 << 40, 2048 * GIB),)
    devices.snp.enable()
    for guest in range(64):
        phys = (1 << 40) + guest * 32 * GIB
        given = {"assigned": True, "asid": guest + 1, "gpa": 0, "page_size": 2 << 20}
        assert rmp.rmpupdate(phys, 32 * GIB, **given) == 0
    token = hardware.snapshot()
    for index in range(128):
        name = f"0000:{index + 1:02x}:00.0"
        devices.write_config(name, 4, 6, 2)
        devices.pci.named(name).engine.program([Transfer(index * 16 * GIB, 1500, True)])
    devices.tick()
    hardware.rollback(token)
    assert {event.kind for event in devices.events} == {"rmp"}
    assert len(rmp.runs()) == 64


def test_the_program_in_the_document_runs() -> None:
    """All Python blocks of docs/devices.md, one after the other, and all outcomes are in it."""
    text = (Path(__file__).parent.parent / "docs" / "devices.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    exec(compile("\n".join(blocks), "devices.md", "exec"), names)
    cells = " ".join(re.findall(r"^\| (.*?) \|", text, re.MULTILINE))
    outcomes = {"done", "peer", "interrupt", "fault", "rmp", "unclaimed", "master-abort"}
    assert outcomes <= set(re.findall(r"`([a-z-]+)`", cells))


@pytest.mark.parametrize("part", [Vtd(), Amd(), Snp()], ids=lambda part: type(part).__name__)
def test_what_stands_in_no_arm64_machine(part: Part) -> None:
    """Units and the secure processor are of x86-64; functions are of any."""
    assert Machine("64M", arch="arm64", devices=[Endpoint("0000:00:01.0")], checks=False)
    with pytest.raises(InputError, match="arm64"):
        Machine("64M", arch="arm64", devices=[part])
