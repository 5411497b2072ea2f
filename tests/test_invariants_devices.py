"""The invariants of devices: each speaks for what it names, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from khosim import Machine
from khosim.drivers.vmm import GUEST_BASE, Vmm, VmmPlan
from khosim.kernel.kernel import Kernel
from khosim.machine.devices import Bridge, Devices, Endpoint, Snp, Transfer, Vtd, at, every
from khosim.machine.devices.walk import Extent

NIC, GPU, PORT = "0000:3b:00.0", "0000:3c:00.0", "0000:00:01.0"
PARTS = (
    Vtd(),
    Bridge(PORT, secondary=0x3B),
    Endpoint(NIC),
    Bridge("0000:00:02.0", secondary=0x3C),
    Endpoint(GPU),
    Snp(),
)
PLAN = VmmPlan("vm")
SECRET = VmmPlan("secret", encrypted=True)


class Host:
    """A machine at the jump: a guest with two devices, an encrypted guest without any."""

    def __init__(self, *, silent: bool = False) -> None:
        self.machine = Machine("256M", devices=PARTS)
        assert self.machine.hardware.devices is not None
        self.devices: Devices = self.machine.hardware.devices
        self.kernel = self.machine.boot(cmdline="kho=on liveupdate=on")
        self.files: dict[str, list[str]] = {}
        for plan in (PLAN, SECRET):
            vmm = Vmm.start(self.kernel, plan, self.kernel.memfd(plan.name, size="8M"))
            if plan is PLAN:
                self.vmm = vmm
                for name in (NIC, GPU):
                    vmm.assign(name, name)
                    engine = self.devices.pci.named(name).engine
                    assert engine is not None
                    engine.program([Transfer(GUEST_BASE + 4096, 4096, True)])
            self.files[plan.name] = list(vmm.files())
            session = self.kernel.liveupdate.create_session(plan.name)
            for token, file in enumerate(vmm.files().values()):
                session.preserve(file, token)
            self.pi_desc = self.vmm.vcpus[0].pi_desc
        assert self.vmm.hwpt is not None
        self.table = self.vmm.hwpt.domain.table
        self.root = self.vmm.drivers.iommu_of().unit.root
        if silent:
            self.devices.write_config(NIC, 4, 2, 2)
        self.machine.load_successor(self.kernel)

    def resume(self) -> Kernel:
        """The successor: both guests go on, and their sessions are finished."""
        kernel = self.machine.resume()
        for plan in (PLAN, SECRET):
            session = kernel.liveupdate.retrieve_session(plan.name)
            names = self.files[plan.name]
            Vmm.resume(kernel, plan, {name: session.retrieve(i) for i, name in enumerate(names)})
            session.finish()
            session.close()
        return kernel

    def spoke(self) -> set[str]:
        """The invariants that speak now."""
        return {violation.invariant for violation in self.machine.check()}


def test_nothing_speaks_where_nothing_happens() -> None:
    """DMA at every event, to the end of the update and behind it."""
    host = Host()
    host.devices.clock.schedule = every(1)
    host.devices.tick()
    host.devices.pci.named(NIC).msix(0)
    assert host.spoke() == set()
    host.resume()
    host.devices.tick()
    assert host.spoke() == set()


@pytest.mark.parametrize("moment", range(5, 150, 16))
def test_nothing_speaks_of_one_dma_at_any_moment(moment: int) -> None:
    """One device, one step, somewhere between the jump and the end of the update."""
    host = Host()
    host.devices.clock.schedule = at([(host.devices.clock.now + moment, NIC)])
    host.resume()
    dmas = [event for event in host.devices.events if event.kind == "dma"]
    assert [event.detail["dma"].outcome for event in dmas] == ["done"]
    assert host.spoke() == set()


def _reset(host: Host) -> None:
    host.devices.pci.named(NIC).reset("flr")


def _move(host: Host) -> None:
    host.devices.write_config(PORT, 0x19, 0x55, 1)


def _silence(host: Host) -> None:
    host.devices.write_config(NIC, 4, 2, 2)


def _silence_for_a_moment(host: Host) -> None:
    host.devices.write_config(NIC, 4, 2, 2)
    host.devices.tick(NIC)
    host.devices.write_config(NIC, 4, 6, 2)


def _unmap(host: Host) -> None:
    host.machine.hardware.ram.zero(host.table.pages()[-1], 4096, (9, "test"))


def _remap_for_a_moment(host: Host) -> None:
    ram = host.machine.hardware.ram
    leaf = host.table.pages()[3] + 8  # of the second page: root, two tables, and then leaves
    entry = ram.read_u64(leaf)
    ram.write_u64(leaf, entry + (2 << 20), (9, "test"))
    unit = host.devices.iommu
    assert unit is not None
    unit.iotlb.invalidate()
    host.devices.tick(NIC)
    ram.write_u64(leaf, entry, (9, "test"))


def _turn_off(host: Host) -> None:
    unit = host.devices.iommu
    assert unit is not None
    unit.write(0x18, 0)


def _detach(host: Host) -> None:
    ram = host.machine.hardware.ram
    contexts = ram.read_u64(host.root + 0x3B * 16) & ~0xFFF
    ram.zero(contexts, 16, (9, "test"))


def _take_a_page(host: Host) -> None:
    snp = host.devices.snp
    assert snp is not None
    start, end, entry = next(run for run in snp.rmp.runs() if run[2].kind == "guest-valid")
    snp.rmp.rmpupdate(start, end - start, assigned=False, page_size=entry.page_size)


def _end_the_guest(host: Host) -> None:
    snp = host.devices.snp
    assert snp is not None
    snp.shutdown()


def test_a_free_page_that_the_table_gives_away_is_told() -> None:
    """Before any jump: whoever gets it dies of a #PF(RMP)."""
    host = Host()
    kernel = host.resume()
    page = kernel.alloc_folio(0)
    phys = page.phys
    snp = host.devices.snp
    assert snp is not None
    assert not snp.rmp.rmpupdate(phys, 4096, assigned=True, immutable=True)
    assert host.spoke() == set()
    page.put()
    assert [violation.phys for violation in host.machine.check()] == [phys]
    assert host.spoke() == {"rmp-owner"}


@pytest.mark.parametrize(
    ("happens", "name"),
    [
        (_reset, "device-not-reset"),
        (_move, "device-identity"),
        (_silence, "device-identity"),
        (_silence_for_a_moment, "device-identity"),
        (_unmap, "translation-kept"),
        (_remap_for_a_moment, "translation-kept"),
        (_turn_off, "translation-kept"),
        (_detach, "translation-kept"),
        (_take_a_page, "rmp-owner"),
        (_end_the_guest, "rmp-owner"),
    ],
)
def test_one_speaks(happens: Callable[[Host], None], name: str) -> None:
    """What happens behind the kernels' backs is told by the invariant that is for it."""
    host = Host()
    happens(host)
    # Overwriting a table is also a change of preserved memory, whoever it is for.
    assert host.spoke() - {"preserved-content"} == {name}


def test_interrupts_that_were_posted_before_the_jump_stay() -> None:
    """A descriptor that is wiped on the way: what waited in it is gone."""
    machine = Machine("256M", devices=PARTS)
    devices = machine.hardware.devices
    assert devices is not None
    kernel = machine.boot(cmdline="kho=on liveupdate=on")
    vmm = Vmm.start(kernel, PLAN, kernel.memfd("vm", size="8M"))
    vmm.assign(NIC, NIC)
    session = kernel.liveupdate.create_session("vm")
    for token, file in enumerate(vmm.files().values()):
        session.preserve(file, token)
    assert devices.pci.named(NIC).msix(0) == "posted"
    pi_desc = vmm.vcpus[0].pi_desc
    machine.load_successor(kernel)
    assert not machine.check()
    machine.hardware.ram.zero(pi_desc, 32, (9, "test"))
    spoke = {violation.invariant for violation in machine.check()}
    # Wiping it is also a change of preserved memory.
    assert spoke - {"preserved-content"} == {"interrupt-kept"}


def test_dma_that_is_not_translated_any_more_is_told_once() -> None:
    """Translation off and an address outside of its guest: the cause speaks, not what it hit."""
    host = Host()
    unit = host.devices.iommu
    assert unit is not None
    unit.write(0x18, 0)
    host.devices.dma(NIC, 16 << 20, 8, b"x" * 8)
    assert host.spoke() == {"translation-kept"}


def test_dma_through_a_translation_that_was_forgotten_to_be_forgotten() -> None:
    """Unit, entry and tables are as they were, and the IOTLB knows of a page that is not mapped."""
    host = Host()
    unit = host.devices.iommu
    assert unit is not None
    assert host.vmm.hwpt is not None
    stale = Extent(1 << 20, (1 << 20) + 1, (64 << 20 >> 12) - (1 << 20), 3, 12)
    unit.iotlb.fill(host.vmm.hwpt.domain.domain_id, [stale])
    host.devices.dma(NIC, 1 << 32, 8, b"x" * 8)
    assert host.spoke() == {"dma-in-owner"}


def test_who_could_not_reach_the_bus_before_has_lost_no_interrupt() -> None:
    """A device that was shut off before the jump and tries to interrupt after it."""
    host = Host(silent=True)
    assert host.devices.pci.named(NIC).msix(0) == "disabled"
    assert host.spoke() == set()


def test_a_device_that_writes_to_another_guest() -> None:
    """Preserved memory that changes by a device whose it is not."""
    host = Host()
    page = host.vmm.memfd.inode.mapping.find(0)  # type: ignore[union-attr]
    assert page is not None
    phys = page.pfn_of(0) << 12
    host.machine.hardware.ram.write(phys, b"x", (-1, "device 0000:99:00.0"))
    assert host.spoke() == {"guest-bytes"}
