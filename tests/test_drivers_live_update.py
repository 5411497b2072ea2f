"""Guests with assigned devices across a kexec: what goes on, and what breaks without each piece."""

from __future__ import annotations

import errno
from collections import Counter

import pytest

from khosim import KernelError, Machine
from khosim.drivers.core import PIECES
from khosim.drivers.kvm import VcpuFile
from khosim.drivers.vfio_pci import VfioDeviceFile
from khosim.drivers.vmm import GUEST_BASE, Vmm, VmmPlan, drivers_of
from khosim.kernel.file import File
from khosim.kernel.image import KernelConfig
from khosim.kernel.kernel import Kernel
from khosim.kernel.release import find_release
from khosim.machine.devices import Bridge, Endpoint, Snp, Transfer, Vtd, every

NIC, DISK = "0000:3b:00.0", "0000:3c:00.0"
MIB = 1 << 20
PLAN = VmmPlan("vm", programmes=(((GUEST_BASE + 9 * MIB, 4096, 0x77),),))
PARTS = (
    Vtd(),
    Bridge("0000:00:01.0", secondary=0x3B),
    Endpoint(NIC),
    Bridge("0000:00:02.0", secondary=0x3C),
    Endpoint(DISK),
)


def _machine(*parts: object, **options: object) -> Machine:
    return Machine("256M", devices=[*PARTS, *parts], **options)  # type: ignore[list-item, arg-type]


def _boot(machine: Machine, without: tuple[str, ...] = ()) -> Kernel:
    config = KernelConfig(release=find_release("7.3"), without=without)
    return machine.boot(cmdline="kho=on liveupdate=on", config=config, kernel_size="8M")


def _guest(kernel: Kernel, plan: VmmPlan = PLAN) -> Vmm:
    """A guest of 16 MiB with two devices, the first writing to page 1 and the second to page 2."""
    vmm = Vmm.start(kernel, plan, kernel.memfd("memory", size="16M"))
    for i, bdf in enumerate((NIC, DISK), 1):
        vmm.assign(bdf, bdf)
        engine = _function(kernel, bdf).engine
        assert engine is not None
        engine.program([Transfer(plan.gpa + 4096 * i, 4096, True, 16 * i)])
    return vmm


def _function(kernel: Kernel, name: str):  # type: ignore[no-untyped-def]
    devices = kernel.hardware.devices
    assert devices is not None
    return devices.pci.named(name)


def _preserve(vmm: Vmm, without: tuple[str, ...] = ()) -> list[str]:
    """Everything of the guest in a session; returns what each token stands for."""
    kinds = {"memory": "guest-memory", "iommufd": "iommu", "vm": "kvm", "vcpu0": "kvm"}
    session = vmm.kernel.liveupdate.create_session("vm")
    names = [name for name in vmm.files() if kinds.get(name) not in without]
    for token, name in enumerate(names):
        session.preserve(vmm.files()[name], token)
    return names


def _retrieve(kernel: Kernel, names: list[str]) -> dict[str, File]:
    session = kernel.liveupdate.retrieve_session("vm")
    return {name: session.retrieve(token) for token, name in enumerate(names)}


def _outcomes(machine: Machine, since: int = 0) -> Counter[str]:
    devices = machine.hardware.devices
    assert devices is not None
    return Counter(
        event.detail["dma"].outcome for event in devices.events[since:] if event.kind == "dma"
    )


def _jump(machine: Machine, kernel: Kernel, pci: str = "") -> tuple[Kernel, int]:
    """Into the successor, with a step of all devices after every event."""
    devices = machine.hardware.devices
    assert devices is not None
    since = len(devices.events)
    devices.clock.schedule = every(1)
    successor = kernel.kexec(cmdline=f"kho=on liveupdate=on {pci}")
    return successor, since


def test_dma_goes_on_all_the_way() -> None:
    """From before the freeze until after the finish, every DMA of both devices is done."""
    machine = _machine()
    kernel = _boot(machine)
    vmm = _guest(kernel)
    names = _preserve(vmm)
    phys = vmm.memfd.inode.mapping.find(1)
    assert phys is not None
    before = kernel.ram.read(phys.pfn_of(1) << 12, 4096)
    successor, since = _jump(machine, kernel)
    files = _retrieve(successor, names)
    vmm = Vmm.resume(successor, PLAN, files)
    assert set(_outcomes(machine, since)) == {"done"}
    assert _outcomes(machine, since)["done"] > 100
    assert vmm.memfd.read(4096, 4096) != before
    for bdf in (NIC, DISK):
        function = _function(successor, bdf)
        assert function.bus_master
        assert (function.resets, function.renumbered) == (1, 0)  # the reset is the first open's


def test_the_guest_goes_on_where_it_was() -> None:
    """A vCPU comes back with its count of steps, its programme and its descriptor."""
    machine = _machine()
    kernel = _boot(machine)
    vmm = _guest(kernel)
    devices = machine.hardware.devices
    assert devices is not None
    for _ in range(5):
        devices.tick()
    names = _preserve(vmm)
    vcpu = vmm.vcpus[0]
    successor = kernel.kexec()
    files = _retrieve(successor, names)
    back = files["vcpu0"]
    assert isinstance(back, VcpuFile)
    assert (back.rip, back.pi_desc, back.programme) == (5, vcpu.pi_desc, vcpu.programme)
    vmm = Vmm.resume(successor, PLAN, files)
    devices.tick()
    vmm.vcpus[0].pause()
    assert vmm.vcpus[0].rip == 6


def test_interrupts_of_the_blackout_wait_in_the_descriptor() -> None:
    """What devices raise while no kernel runs a guest is taken when it runs again."""
    machine = _machine()
    kernel = _boot(machine)
    names = _preserve(_guest(kernel))
    machine.load_successor(kernel)
    for bdf in (NIC, DISK):
        assert _function(kernel, bdf).msix(0) == "posted"
    successor = machine.resume()
    files = _retrieve(successor, names)
    vcpu = files["vcpu0"]
    assert isinstance(vcpu, VcpuFile)
    assert vcpu.sync_pir() == [0x40, 0x41]


def test_three_kernels_in_a_row() -> None:
    """What was retrieved and finished is preserved again, and arrives again."""
    machine = _machine()
    kernel = _boot(machine)
    vmm = _guest(kernel)
    for _ in range(3):
        names = _preserve(vmm)
        kernel, since = _jump(machine, kernel)
        session = kernel.liveupdate.retrieve_session("vm")
        files = {name: session.retrieve(token) for token, name in enumerate(names)}
        vmm = Vmm.resume(kernel, PLAN, files)
        session.finish()
        session.close()
        assert set(_outcomes(machine, since)) == {"done"}
        assert not kernel.pages.pages.private
    drivers = drivers_of(kernel)
    assert drivers.iommu is not None
    assert not drivers.iommu.incoming


def test_calling_it_off_leaves_memory_as_it_was() -> None:
    """A closed session gives back every page, and the mappings can be changed again."""
    machine = _machine(Snp())
    kernel = _boot(machine)
    vmm = _guest(kernel, PLAN._replace(encrypted=True))
    free, tracked = kernel.pages.nr_free_pages(), kernel.debugfs.files()
    for _ in range(2):
        _preserve(vmm)
        session = kernel.liveupdate.create_session("other")
        session.close()
        for open_session in list(kernel.liveupdate.sessions.outgoing.sessions.values()):
            kernel.liveupdate.sessions.release(open_session)
        assert kernel.pages.nr_free_pages() == free
    assert kernel.debugfs.files() == tracked
    assert vmm.iommufd is not None
    assert not vmm.iommufd.is_immutable
    assert not any(dev.outgoing for dev in drivers_of(kernel).pci.devs)


@pytest.mark.parametrize("nth", range(24))
def test_no_path_out_of_preserve_leaks(nth: int) -> None:
    """When the nth allocation fails, all is refused and memory is as it was."""
    machine = _machine(Snp(), checks=False)
    kernel = _boot(machine)
    vmm = _guest(kernel, PLAN._replace(encrypted=True))
    files = vmm.files()
    files.pop("memory")  # what a memfd leaves behind is its own story
    free = kernel.pages.nr_free_pages()
    session = kernel.liveupdate.create_session("vm")
    calls = 0

    def fail(_order: int, _owner: str) -> bool:
        nonlocal calls
        calls += 1
        return calls == nth + 1

    kernel.pages.fail = fail
    refused = 0
    for token, file in enumerate(files.values()):
        try:
            session.preserve(file, token)
        except KernelError as error:
            refused = error.errno
            break
    kernel.pages.fail = None
    session.close()
    assert refused in (0, errno.ENOMEM)
    assert refused or calls <= nth
    assert kernel.pages.nr_free_pages() == free
    assert not any(dev.outgoing for dev in drivers_of(kernel).pci.devs)


def test_a_refused_freeze_leaves_all_running() -> None:
    """A device that says no: nothing was stopped or reset, no DMA lost, and the next try works."""
    machine = _machine()
    kernel = _boot(machine)
    vmm = _guest(kernel)
    names = _preserve(vmm)
    disk = vmm.devices[DISK]
    disk.refuses_freeze = errno.EBUSY
    devices = machine.hardware.devices
    assert devices is not None
    devices.clock.schedule = every(1)
    with pytest.raises(KernelError, match="EBUSY"):
        kernel.kexec()
    assert set(_outcomes(machine)) == {"done"}
    assert vmm.vcpus[0].is_running
    assert not disk.is_frozen
    assert not vmm.devices[NIC].is_frozen
    disk.refuses_freeze = 0
    successor, since = _jump(machine, kernel)
    Vmm.resume(successor, PLAN, _retrieve(successor, names))
    assert set(_outcomes(machine, since)) == {"done"}


def test_a_preserved_device_is_only_in_its_session() -> None:
    """Until it is finished nobody else opens it, and it cannot be finished half put together."""
    machine = _machine()
    kernel = _boot(machine)
    names = _preserve(_guest(kernel))
    successor = kernel.kexec()
    vfio = drivers_of(successor).vfio_of()
    with pytest.raises(KernelError, match="EBUSY"):
        vfio.open(NIC)
    session = successor.liveupdate.retrieve_session("vm")
    files = {name: session.retrieve(token) for token, name in enumerate(names)}
    with pytest.raises(KernelError, match="EBUSY"):
        session.finish()
    Vmm.resume(successor, PLAN, files)
    session.finish()
    session.close()
    file = files[NIC]
    assert isinstance(file, VfioDeviceFile)
    file.fput()
    vfio.open(NIC)


def test_what_nobody_retrieves_is_stopped() -> None:
    """Finishing a session that nobody looked into resets its devices and frees all memory."""
    machine = _machine()
    kernel = _boot(machine)
    vmm = _guest(kernel)
    _preserve(vmm)
    assert vmm.hwpt is not None
    memory = vmm.memfd.inode.mapping.find(0)
    assert memory is not None
    tables = vmm.hwpt.domain.table.pages()
    gone = [*tables, vmm.vcpus[0].pi_desc, memory.pfn_of(0) << 12]
    successor, _ = _jump(machine, kernel)
    devices = machine.hardware.devices
    assert devices is not None
    session = successor.liveupdate.retrieve_session("vm")
    assert {successor.page(phys >> 12).kind for phys in gone[len(tables) :]} == {"incoming"}
    session.finish()
    session.close()
    for bdf in (NIC, DISK):
        assert not _function(successor, bdf).bus_master
        assert _function(successor, bdf).engine.running is False
    since = len(devices.events)
    devices.tick()
    assert not _outcomes(machine, since)
    assert {successor.page(phys >> 12).kind for phys in gone} == {"free"}


def test_a_successor_without_the_driver_cannot_open_the_sessions() -> None:
    """Built without vfio's handler: the sessions are lost, the devices go on undisturbed."""
    machine = _machine()
    kernel = _boot(machine)
    _preserve(_guest(kernel))
    devices = machine.hardware.devices
    assert devices is not None
    since = len(devices.events)
    devices.clock.schedule = every(1)
    config = KernelConfig(release=find_release("7.3"), without=("vfio",))
    successor = kernel.kexec(config=config, kernel_size="8M")
    with pytest.raises(KernelError, match="EIO"):
        successor.liveupdate.retrieve_session("vm")
    assert set(_outcomes(machine, since)) == {"done"}
    assert "No registered handler for compatible 'vfio-pci-v1-running'" in "".join(
        successor.messages
    )


def _without(piece: str, pci: str = "") -> tuple[Machine, Kernel, list[str], int]:
    machine = _machine(checks=False)
    kernel = _boot(machine, (piece,))
    names = _preserve(_guest(kernel), (piece,))
    successor, since = _jump(machine, kernel, pci)
    return machine, successor, names, since


def test_without_guest_memory_dma_hits_free_pages() -> None:
    """The devices go on writing where the new kernel thinks that nothing is."""
    machine, successor, _, since = _without("guest-memory")
    assert set(_outcomes(machine, since)) == {"done"}
    devices = machine.hardware.devices
    assert devices is not None
    last = next(e for e in reversed(devices.events) if e.kind == "dma").detail["dma"]
    assert successor.page(last.runs[0][0] >> 12).kind in ("free", "allocated")


def test_without_iommu_requests_are_not_translated() -> None:
    """Translation is turned off at the jump: requests go where no guest memory is."""
    machine, successor, names, since = _without("iommu")
    outcomes = _outcomes(machine, since)
    assert outcomes["unclaimed"]
    assert outcomes["fault"]
    assert "DMAR: Translation was enabled" not in "".join(successor.messages)
    files = _retrieve(successor, names)
    vmm = Vmm.resume(successor, PLAN, files)
    assert vmm.devices[NIC].hwpt is None


def test_without_vfio_devices_are_reset() -> None:
    """The published first phase: the device comes back, and is at rest."""
    _, successor, names, _ = _without("vfio")
    for bdf in (NIC, DISK):
        function = _function(successor, bdf)
        assert function.resets == 2
        assert not function.engine.running
    assert NIC in _retrieve(successor, names)


@pytest.mark.parametrize("pci", ["", "pci=assign-busses"])
def test_without_pci_bus_mastering_ends(pci: str) -> None:
    """``pci_device_shutdown`` silences every function; with the option, it is another one."""
    machine, successor, names, since = _without("pci", pci)
    assert _outcomes(machine, since)["master-abort"]
    function = _function(successor, NIC)
    assert not function.bus_master
    assert bool(function.renumbered) == bool(pci)
    if pci:
        with pytest.raises(KernelError, match="ENODEV"):
            _retrieve(successor, names)


def test_with_pci_the_option_changes_nothing() -> None:
    """A predecessor's devices keep their numbers, whatever the command line says."""
    machine = _machine()
    kernel = _boot(machine)
    names = _preserve(_guest(kernel))
    successor, since = _jump(machine, kernel, "pci=assign-busses")
    assert not _function(successor, NIC).renumbered
    assert set(_outcomes(machine, since)) == {"done"}
    assert NIC in _retrieve(successor, names)


def test_without_kvm_posted_interrupts_are_lost() -> None:
    """Nobody keeps the descriptor: it is a free page, and interrupts go there."""
    machine, successor, names, _ = _without("kvm")
    assert "vcpu0" not in names
    devices = machine.hardware.devices
    assert devices is not None
    assert _function(successor, NIC).msix(0) == "posted"
    last = devices.events[-1].detail["phys"]
    assert successor.page(last >> 12).kind in ("free", "allocated", "reserved")


@pytest.mark.parametrize("release", ["6.16", "6.19", "7.0", "7.2"])
def test_older_kernels_do_with_devices_what_they_can(release: str) -> None:
    """Without FLBs, or without LUO, nothing is preserved, and nothing stumbles."""
    machine = _machine(Snp())
    kernel = machine.boot(release, cmdline="kho=on liveupdate=on", kernel_size="8M")
    vmm = _guest(kernel)
    successor = kernel.kexec()
    assert bool(drivers_of(successor).pci.liveupdate) == bool(successor.release.luo_flb)
    assert not _function(successor, NIC).bus_master
    assert not machine.check()
    assert vmm.vcpus[0].rip == 0


def test_pieces_are_those_that_the_tests_leave_out() -> None:
    """Each piece has its test above or beside the encrypted guests'."""
    assert PIECES == ("guest-memory", "kvm", "iommu", "vfio", "pci", "snp")
