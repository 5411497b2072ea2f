"""Encrypted guests across a kexec: context pages, the reverse map table, keys."""

from __future__ import annotations

import pytest

from khosim import KernelError, Machine
from khosim.drivers.kvm import KvmFile
from khosim.drivers.vmm import GUEST_BASE, Vmm, VmmPlan, drivers_of
from khosim.errors import RmpFault
from khosim.kernel.image import KernelConfig
from khosim.kernel.kernel import Kernel
from khosim.kernel.release import find_release
from khosim.machine.devices import Snp

PAGE = 4096
PLAN = VmmPlan("vm", encrypted=True, programmes=(((GUEST_BASE + PAGE, 4096, 0x77),),))


def _boot(without: tuple[str, ...] = ()) -> Kernel:
    config = KernelConfig(release=find_release("7.3"), without=without)
    machine = Machine("256M", devices=[Snp()], checks=False)
    return machine.boot(cmdline="kho=on liveupdate=on", config=config, kernel_size="8M")


def _guest(kernel: Kernel) -> Vmm:
    vmm = Vmm.start(kernel, PLAN, kernel.memfd("memory", size="8M", huge="always"))
    _machine(kernel).tick()
    return vmm


def _machine(kernel: Kernel):  # type: ignore[no-untyped-def]
    devices = kernel.hardware.devices
    assert devices is not None
    return devices


def _seen(vmm: Vmm, gpa: int, len_bytes: int = 16) -> bytes:
    """What the guest itself reads."""
    assert vmm.vm is not None
    assert vmm.vm.guest is not None
    devices = _machine(vmm.kernel)
    found = devices.vcpus.read_guest(vmm.vm.maps(), vmm.vm.guest.asid, gpa, len_bytes)
    assert isinstance(found, bytes)
    return found


def _preserve(vmm: Vmm, without: tuple[str, ...] = ()) -> list[str]:
    session = vmm.kernel.liveupdate.create_session("vm")
    names = list(vmm.files())
    for token, name in enumerate(names):
        session.preserve(vmm.files()[name], token)
    return names


def _retrieve(kernel: Kernel, names: list[str]) -> Vmm:
    session = kernel.liveupdate.retrieve_session("vm")
    vmm = Vmm.resume(kernel, PLAN, {name: session.retrieve(i) for i, name in enumerate(names)})
    session.finish()
    session.close()
    return vmm


def test_the_guest_reads_in_the_successor_what_it_wrote() -> None:
    """Its plaintext is there for it, never for a host; it goes on, and its pages stay its own."""
    kernel = _boot()
    vmm = _guest(kernel)
    written = _seen(vmm, GUEST_BASE + PAGE)
    assert any(written)
    assert vmm.vm is not None
    phys = vmm.vm.maps()[0][1]
    assert kernel.ram.read(phys + PAGE, 16) != written
    names = _preserve(vmm)
    runs = _machine(kernel).snp.rmp.runs()
    successor = kernel.kexec()
    assert _machine(successor).snp.rmp.runs() == runs
    vmm = _retrieve(successor, names)
    assert _seen(vmm, GUEST_BASE + PAGE) == written
    _machine(successor).tick()
    assert _seen(vmm, GUEST_BASE + PAGE) != written
    assert not _machine(successor).vcpus.exits[1:]


def test_no_kernel_can_write_to_a_guest() -> None:
    """A store to guest memory or to its context page is #PF(RMP), in both kernels."""
    kernel = _boot()
    vmm = _guest(kernel)
    assert vmm.vm is not None
    assert vmm.vm.guest is not None
    pages = [vmm.vm.maps()[0][1], vmm.vm.guest.gctx_phys, vmm.vcpus[0].vmsa]
    _preserve(vmm)
    for running in (kernel, kernel.kexec()):
        for phys in pages:
            with pytest.raises(RmpFault):
                running.ram.write(phys, b"x", running.by("test"))


def test_two_updates_in_a_row() -> None:
    """Preserved again by the successor, adopted again by its own."""
    kernel = _boot()
    vmm = _guest(kernel)
    written = _seen(vmm, GUEST_BASE + PAGE)
    vmm.vcpus[0].pause()
    for _ in range(2):
        names = _preserve(vmm)
        kernel = kernel.kexec()
        vmm = _retrieve(kernel, names)
        vmm.vcpus[0].pause()
        assert _seen(vmm, GUEST_BASE + PAGE) == written


def test_a_guest_that_ends_gives_everything_back() -> None:
    """After the last file is closed the host may use memory, context page and ASID again."""
    kernel = _boot()
    free = kernel.pages.nr_free_pages()
    for _ in range(2):
        vmm = _guest(kernel)
        memfd = vmm.memfd
        vmm.stop()
        memfd.fput()
        assert _machine(kernel).snp.rmp.runs() == []
        assert kernel.pages.nr_free_pages() == free
        _machine(kernel).snp.df_flush()


def test_a_guest_that_nobody_retrieves_is_ended() -> None:
    """Finishing decommissions it; its memory is the memfd's, which nobody could free before."""
    kernel = _boot()
    vmm = _guest(kernel)
    assert vmm.vm is not None
    assert vmm.vm.guest is not None
    gctx_phys, vmsa = vmm.vm.guest.gctx_phys, vmm.vcpus[0].vmsa
    _preserve(vmm)
    successor = kernel.kexec()
    session = successor.liveupdate.retrieve_session("vm")
    session.finish()
    session.close()
    snp = _machine(successor).snp
    assert snp.platform_status()["guest_count"] == 0
    for phys in (gctx_phys, vmsa):
        assert snp.rmp.entry(phys >> 12).kind == "hypervisor"
        assert successor.page(phys >> 12).kind == "free"


def test_without_snp_the_key_is_gone() -> None:
    """Firmware is shut down and set up anew: every page is the host's, the guest is lost."""
    kernel = _boot(("snp",))
    vmm = _guest(kernel)
    _preserve(vmm)
    successor = kernel.kexec()
    snp = _machine(successor).snp
    assert snp.rmp.runs() == []
    session = successor.liveupdate.retrieve_session("vm")
    names = list(vmm.files())
    assert session.retrieve(names.index("memory")).size == 8 << 20
    with pytest.raises(KernelError, match="EIO"):
        session.retrieve(names.index("vm"))


def test_no_asid_no_guest() -> None:
    """ASIDs are few; without a secure processor there are no encrypted guests at all."""
    kernel = Machine("256M", devices=[Snp(asids=1)], checks=False).boot()
    drivers = drivers_of(kernel)
    assert isinstance(drivers.kvm.create_vm("a", encrypted=True), KvmFile)
    with pytest.raises(KernelError, match="EBUSY"):
        drivers.kvm.create_vm("b", encrypted=True)


# -- no page of a guest is free -------------------------------------------------------------------


def _assigned(kernel: Kernel) -> int:
    """Bytes that the table gives to guests or firmware."""
    return sum(end - start for start, end, _ in _machine(kernel).snp.rmp.runs())


def _use_all_memory(kernel: Kernel) -> None:
    """Write to every page that the kernel has to give."""
    order = 8
    while True:
        try:
            kernel.alloc_folio(order, zero=True)
        except KernelError:
            if not order:
                return
            order -= 1


def _two_guests() -> tuple[Kernel, list[Vmm]]:
    machine = Machine("128M", devices=[Snp()])
    kernel = machine.boot(cmdline="kho=on liveupdate=on")
    plans = [VmmPlan(name, encrypted=True) for name in "ab"]
    return kernel, [Vmm.start(kernel, it, kernel.memfd(it.name, size="8M")) for it in plans]


def test_a_guest_beside_that_nobody_preserves_leaves_nothing_assigned() -> None:
    """The firmware goes on for one guest; pages of the other are anybody's in the successor."""
    kernel, vmms = _two_guests()
    before = _assigned(kernel)
    session = kernel.liveupdate.create_session("a")
    for token, file in enumerate(vmms[0].files().values()):
        session.preserve(file, token)
    machine = kernel.host
    assert isinstance(machine, Machine)
    successor = machine.kexec(kernel)
    assert _assigned(successor) == before // 2
    _use_all_memory(successor)
    assert machine.check() == []


def test_memory_that_is_in_no_session_is_the_hosts_again() -> None:
    """The machine goes on without it; the successor may write there."""
    kernel, (vmm, _) = _two_guests()
    session = kernel.liveupdate.create_session("a")
    for token, (name, file) in enumerate(vmm.files().items()):
        if name != "memory":
            session.preserve(file, token)
    machine = kernel.host
    assert isinstance(machine, Machine)
    successor = machine.kexec(kernel)
    assert _assigned(successor) == 2 * PAGE  # context page and save area
    _use_all_memory(successor)
    assert machine.check() == []


def test_a_guest_that_was_not_taken_back_before_the_next_jump() -> None:
    """Its session is lost with the second jump, and nothing of it stays assigned."""
    kernel, vmms = _two_guests()
    for vmm in vmms:
        session = kernel.liveupdate.create_session(vmm.plan.name)
        for token, file in enumerate(vmm.files().values()):
            session.preserve(file, token)
    machine = kernel.host
    assert isinstance(machine, Machine)
    names = list(vmms[0].files())
    second = machine.kexec(kernel)
    session = second.liveupdate.retrieve_session("a")
    back = {name: session.retrieve(token) for token, name in enumerate(names)}
    vmm = Vmm.resume(second, vmms[0].plan, back)
    session.finish()
    session.close()
    session = second.liveupdate.create_session("again")
    for token, file in enumerate(vmm.files().values()):
        session.preserve(file, token)
    before = _assigned(second)
    third = machine.kexec(second)
    assert _assigned(third) == before // 2
    _use_all_memory(third)
