"""DMA of a running kernel's devices, each judged at its moment, from boot on."""

from __future__ import annotations

import pytest

from khosim import Machine
from khosim.drivers.vmm import GUEST_BASE, Vmm, VmmPlan
from khosim.machine.devices import Amd, Bridge, Devices, Endpoint, Part, Transfer, Vtd, every

NIC = "0000:3b:00.0"
UNITS: list[Part] = [Vtd(), Amd()]
PLAN = VmmPlan("vm")


def _start(unit: Part = UNITS[0]) -> tuple[Machine, Devices, Vmm]:
    parts = [unit, Bridge("0000:00:01.0", secondary=0x3B), Endpoint(NIC)]
    machine = Machine("128M", devices=parts)
    kernel = machine.boot(cmdline="kho=on liveupdate=on")
    vmm = Vmm.start(kernel, PLAN, kernel.memfd("vm", size="8M"))
    vmm.assign("nic", NIC)
    devices = machine.hardware.devices
    assert devices is not None
    return machine, devices, vmm


def _said(machine: Machine) -> list[tuple[str, str]]:
    return [(violation.invariant, violation.message) for violation in machine.check()]


@pytest.mark.parametrize("unit", UNITS, ids=["vtd", "amd"])
def test_before_the_first_jump_all_is_judged_and_silent(unit: Part) -> None:
    """Reads and writes, over folios, through mappings that come and go."""
    machine, devices, vmm = _start(unit)
    assert vmm.iommufd is not None
    for _ in range(2):
        vmm.iommufd.map_file(1 << 32, vmm.memfd, 4096, 8192)  # type: ignore[arg-type]
        assert devices.dma(NIC, 1 << 32, 8192, bytes(8192)).outcome == "done"
        vmm.iommufd.unmap(1 << 32, 8192)
        assert devices.dma(NIC, 1 << 32, 8).outcome == "fault"
    assert devices.dma(NIC, GUEST_BASE + 4095, 2 << 20).outcome == "done"
    assert _said(machine) == []


@pytest.mark.parametrize("unit", UNITS, ids=["vtd", "amd"])
def test_a_table_that_leads_elsewhere_is_told_before_any_jump(unit: Part) -> None:
    """By the memfd, and not by the table: a leaf that was changed and changed back."""
    machine, devices, vmm = _start(unit)
    assert vmm.hwpt is not None
    ram = machine.hardware.ram
    leaf = vmm.hwpt.domain.table.pages()[3]
    entry = ram.read_u64(leaf)
    ram.write_u64(leaf, entry + (16 << 20), (0, "test"))
    found = devices.dma(NIC, GUEST_BASE, 8)
    ram.write_u64(leaf, entry, (0, "test"))
    phys = found.runs[0][0]
    text = f"{NIC} reached {phys:#x}, and not {phys - (16 << 20):#x}"
    assert _said(machine) == [("dma-in-owner", text)]


def test_a_flush_that_was_forgotten_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unmapped, unpinned, and still in the IOTLB: the device reaches what is no more mapped."""
    machine, devices, vmm = _start()
    assert vmm.iommufd is not None
    assert vmm.memfd is not None
    vmm.iommufd.map_file(1 << 32, vmm.memfd, 0, 4096)
    assert devices.dma(NIC, 1 << 32, 8).outcome == "done"
    unit = vmm.iommufd.core.unit
    monkeypatch.setattr(type(unit), "flush", lambda self, domain_id=None: None)
    vmm.iommufd.unmap(1 << 32, 4096)
    at = devices.dma(NIC, 1 << 32, 8).runs[0][0]
    assert _said(machine) == [
        ("dma-in-owner", f"{NIC} reached {at:#x}, which nobody mapped for it")
    ]


def test_a_device_that_nobody_has_open_is_to_reach_nothing() -> None:
    """An entry that is left behind when the file is closed."""
    machine, devices, vmm = _start()
    assert vmm.hwpt is not None
    core = vmm.drivers.iommu_of()
    table = vmm.hwpt.domain.table
    vmm.devices.pop("nic").fput()
    core.unit.set_context(0x3B00, table, 1)
    devices.write_config(NIC, 4, 6, 2)
    at = devices.dma(NIC, GUEST_BASE, 8).runs[0][0]
    assert _said(machine) == [("dma-in-owner", f"{NIC} reached {at:#x}, and nobody lets it")]


def test_memory_that_goes_while_a_device_that_came_back_goes_on() -> None:
    """A page table that came back pins nothing: who gives the memory away has a device in it."""
    machine, devices, vmm = _start()
    files = list(vmm.files().items())
    session = machine.kernel.liveupdate.create_session("vm")  # type: ignore[union-attr]
    for token, (_, file) in enumerate(files):
        session.preserve(file, token)
    engine = devices.pci.named(NIC).engine
    assert engine is not None
    engine.program([Transfer(GUEST_BASE, 4096, True)])
    devices.clock.schedule = every(1)
    assert machine.kernel is not None
    kernel = machine.kexec(machine.kernel)
    session = kernel.liveupdate.retrieve_session("vm")
    back = {name: session.retrieve(token) for token, (name, _) in enumerate(files)}
    vmm = Vmm.resume(kernel, PLAN, back)
    session.finish()
    session.close()
    devices.tick()
    assert _said(machine) == []
    for vcpu in list(vmm.vcpus):
        vcpu.fput()
    assert vmm.vm is not None
    assert vmm.memfd is not None
    vmm.vm.fput()
    vmm.memfd.fput()
    devices.clock.schedule = every(1 << 30)
    devices.tick()
    (name, message), *more = _said(machine)
    assert not more
    assert name == "dma-in-owner"
    assert message.endswith("which is free")


def test_another_power_cycle_begins_anew() -> None:
    """A device of the kernel before is nobody's any more, and has no bus to reach."""
    machine, devices, _ = _start()
    machine.boot(cmdline="kho=on")
    assert devices.dma(NIC, GUEST_BASE, 8).outcome == "master-abort"
    assert _said(machine) == []
