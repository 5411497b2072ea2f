"""KVM: virtual machines and their vCPUs, as far as a live update has to keep them.

Models ``virt/kvm/kvm_main.c`` and ``arch/x86/kvm`` @ 7.3 in outline: memory slots backed by memfds,
vCPUs that run while nobody stops them, and posted-interrupt descriptors
(``arch/x86/kvm/vmx/posted_intr.c``). What a vCPU executes is the machine's
(:mod:`khosim.machine.devices`); KVM knows how far it has come.

Left out: instructions, nested page tables in memory (they are built anew from the slots, as
upstream does), emulated devices, the local APIC but for its posted requests.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from khosim.abi.kvm import KVM_X86_DEFAULT_VM, KVM_X86_SNP_VM
from khosim.abi.vtd import PI_DESC_BYTES
from khosim.errors import KernelError
from khosim.kernel.file import File
from khosim.kernel.page import Folio
from khosim.machine.devices import GuestWrite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.drivers.sev import Sev, SnpGuest
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.memfd import Memfd
    from khosim.machine.devices import Devices

__all__ = ("Kvm", "KvmFile", "MemorySlot", "VcpuFile")

_CONTROL = 32
_ON, _SN = 1, 2
POSTED_INTR_VECTOR = 0xF2


class MemorySlot(NamedTuple):
    """``struct kvm_memory_slot``: guest memory at ``gpa`` is bytes of a memfd."""

    gpa: int
    len_bytes: int
    memfd: Memfd
    offset: int


class Kvm:
    """KVM of one kernel: its ``vms`` and ``vcpus`` that are open."""

    __slots__ = ("devices", "kernel", "sev", "vcpus", "vms")

    def __init__(self, kernel: Kernel, devices: Devices, sev: Sev | None) -> None:
        self.kernel = kernel
        self.devices = devices
        self.sev = sev
        self.vms: list[KvmFile] = []
        self.vcpus: list[VcpuFile] = []

    def create_vm(self, name: str, *, encrypted: bool = False) -> KvmFile:
        """``KVM_CREATE_VM``.

        An SNP guest with ``encrypted``. Raises -EINVAL without SNP, -ENOMEM.
        """
        guest = None
        if encrypted:
            if self.sev is None:
                raise KernelError(errno.EINVAL, "kvm_create_vm", "no SEV-SNP here")
            guest = self.sev.create_guest()
        return KvmFile(self, name, guest)

    def shutdown(self) -> None:
        """``kvm_shutdown``: virtualization is turned off; vCPUs that still run stop."""
        for vcpu in self.vcpus:
            vcpu.pause()
        for vm in self.vms:
            vm.let_go_of_lost_memory()


class KvmFile(File):
    """A virtual machine. ``guest`` is its SNP context, None for an ordinary one."""

    __slots__ = ("guest", "kvm", "slots", "vcpus")

    def __init__(self, kvm: Kvm, name: str, guest: SnpGuest | None = None) -> None:
        super().__init__(kvm.kernel, name)
        self.kvm = kvm
        self.guest = guest
        self.slots: list[MemorySlot] = []
        self.vcpus: list[VcpuFile] = []
        kvm.vms.append(self)

    @property
    def type(self) -> int:
        """What ``KVM_CREATE_VM`` was asked for."""
        return KVM_X86_DEFAULT_VM if self.guest is None else KVM_X86_SNP_VM

    def set_memory(self, gpa: int, memfd: Memfd, offset: int = 0, len_bytes: int = 0) -> None:
        """``KVM_SET_USER_MEMORY_REGION2``; all of the memfd from ``offset`` on by default."""
        self.check_open()
        size = len_bytes or memfd.size - offset
        memfd.get_file()
        self.slots.append(MemorySlot(gpa, size, memfd, offset))

    def let_go_of_lost_memory(self) -> None:
        """An encrypted guest goes on and some of its memory is in no session: the host's again.

        The next kernel takes those pages for free, and would get a #PF(RMP) for writing there.
        """
        sev, guest = self.kvm.sev, self.guest
        if sev is not None and guest is not None and guest.outgoing:
            lost = [slot for slot in self.slots if not slot.memfd.inode.frozen]
            for _, phys, size in self.maps(lost):
                sev.make_shared(phys, size)

    def maps(self, slots: Sequence[MemorySlot] | None = None) -> list[tuple[int, int, int]]:
        """``(gpa, phys, len_bytes)`` of all memory that has folios, adjoining ones as one.

        Only of some ``slots`` where they are given.
        """
        found: list[tuple[int, int, int]] = []
        for slot in self.slots if slots is None else slots:
            shift = slot.memfd.kernel.arch.page_shift
            end = slot.offset + slot.len_bytes
            pages = slot.memfd.inode.mapping.overlapping(slot.offset >> shift, -(-end >> shift))
            for run in pages:
                low, high = max(slot.offset, run.index << shift), min(end, run.end << shift)
                gpa = slot.gpa + low - slot.offset
                phys = low + (run.pfn - run.index << shift)
                if found and (sum(found[-1][::2]), sum(found[-1][1:])) == (gpa, phys):
                    found[-1] = found[-1][0], found[-1][1], found[-1][2] + high - low
                else:
                    found.append((gpa, phys, high - low))
        return found

    def launch(self) -> None:
        """``KVM_SEV_SNP_LAUNCH_*``: all memory becomes the guest's; raises -EIO."""
        assert self.guest is not None
        assert self.kvm.sev is not None
        self.kvm.sev.launch(self.guest, self.maps(), [vcpu.vmsa for vcpu in self.vcpus])

    def create_vcpu(self, programme: tuple[tuple[int, int, int], ...] = ()) -> VcpuFile:
        """``KVM_CREATE_VCPU``: ``programme`` are its writes, as (gpa, bytes, pattern)."""
        self.check_open()
        kernel = self.kernel
        pi_desc = kernel.alloc_folio(0, owner="pi_desc", zero=True).phys
        vmsa = 0
        if self.guest is not None:
            vmsa = kernel.alloc_folio(0, owner="vmsa", zero=True).phys
        vcpu = VcpuFile(self.kvm, self.name, len(self.vcpus), programme, pi_desc, vmsa)
        vcpu.bind(self)
        vcpu.write_control(running=False)
        return vcpu

    def release(self) -> None:
        """``kvm_destroy_vm``: memory of an encrypted guest is the host's again, and is let go."""
        if self.guest is not None and self.kvm.sev is not None:
            self.kvm.sev.free_guest(self.guest, self.maps())
        for slot in self.slots:
            slot.memfd.fput()
        self.slots = []
        self.kvm.vms.remove(self)


class VcpuFile(File):
    """A vCPU: ``rip`` counts what it did; ``pi_desc`` and ``vmsa`` are physical addresses.

    ``vm`` is None for one that came from the predecessor, until it is bound.
    """

    __slots__ = (
        "is_running",
        "kvm",
        "pauses_for_update",
        "pi_desc",
        "programme",
        "rip",
        "vcpu_id",
        "vm",
        "vmsa",
    )

    def __init__(
        self,
        kvm: Kvm,
        vm_name: str,
        vcpu_id: int,
        programme: tuple[tuple[int, int, int], ...],
        pi_desc: int,
        vmsa: int,
        rip: int = 0,
    ) -> None:
        super().__init__(kvm.kernel, f"{vm_name}/{vcpu_id}")
        self.kvm = kvm
        self.vm: KvmFile | None = None
        self.vcpu_id = vcpu_id
        self.programme = programme
        self.pi_desc = pi_desc
        self.vmsa = vmsa
        self.rip = rip
        self.is_running = False
        self.pauses_for_update = False
        """Stopped by ``freeze``: to be run again where the update fails."""
        kvm.vcpus.append(self)

    def bind(self, vm: KvmFile) -> None:
        """It belongs to ``vm``, and has its name."""
        vm.get_file()
        self.vm = vm
        self.name = f"{vm.name}/{self.vcpu_id}"
        vm.vcpus.append(self)

    def run(self) -> None:
        """``KVM_RUN``: it runs from now on; raises -EINVAL without a machine around it."""
        self.check_open()
        if self.vm is None:
            raise KernelError(errno.EINVAL, "kvm_vcpu_ioctl", f"{self!r} has no machine")
        if self.is_running:
            return
        guest = self.vm.guest
        self.write_control(running=True)
        self.kvm.devices.vcpus.enter(
            self.name,
            self.vm.maps(),
            asid=0 if guest is None else guest.asid,
            program=[GuestWrite(*write) for write in self.programme],
            steps=self.rip,
        )
        self.is_running = True
        if self.kernel.trace is not None:
            self.kernel.emit("vcpu_run", {"vcpu": self.name}, self.rip)

    def pause(self) -> None:
        """A signal: it leaves the guest, and its state is here."""
        if not self.is_running:
            return
        vcpus = self.kvm.devices.vcpus
        if self.name in vcpus.running:
            self.rip = vcpus.stop(self.name)
        self.is_running = False
        self.write_control(running=False)
        if self.kernel.trace is not None:
            self.kernel.emit("vcpu_pause", {"vcpu": self.name}, self.rip)

    # -- posted interrupts ----------------------------------------------------------------------

    def write_control(self, *, running: bool) -> None:
        """``vmx_vcpu_pi_load``, ``vmx_vcpu_pi_put``: notify nobody while it does not run."""
        kernel = self.kernel
        old = kernel.ram.read_u64(self.pi_desc + _CONTROL)
        new = old & _ON | POSTED_INTR_VECTOR << 16 | (0 if running else _SN)
        kernel.ram.write_u64(self.pi_desc + _CONTROL, new, kernel.by("vmx_vcpu_pi_load"))

    def inject(self, vector: int) -> None:
        """``KVM_SIGNAL_MSI``: an interrupt of user space waits for the vCPU."""
        kernel, word = self.kernel, self.pi_desc + vector // 64 * 8
        value = kernel.ram.read_u64(word) | 1 << vector % 64
        kernel.ram.write_u64(word, value, kernel.by("vmx_deliver_interrupt"))

    def sync_pir(self) -> list[int]:
        """``vmx_sync_pir_to_irr``: the vectors that were posted, which the guest takes now."""
        kernel = self.kernel
        found = []
        for word in range(4):
            bits = kernel.ram.read_u64(self.pi_desc + 8 * word)
            found += [64 * word + bit for bit in range(64) if bits >> bit & 1]
        by = kernel.by("vmx_sync_pir_to_irr")
        kernel.ram.zero(self.pi_desc, PI_DESC_BYTES // 2, by)
        control = kernel.ram.read_u64(self.pi_desc + _CONTROL)
        kernel.ram.write_u64(self.pi_desc + _CONTROL, control & ~_ON, by)
        if kernel.trace is not None:
            kernel.emit("vmx_sync_pir_to_irr", {"vcpu": self.name}, len(found))
        return found

    def release(self) -> None:
        """``kvm_vcpu_destroy``."""
        self.pause()
        kernel = self.kernel
        if self.vmsa and self.kvm.sev is not None:
            self.kvm.sev.make_shared(self.vmsa, kernel.arch.page_size)
        for phys in (self.pi_desc, self.vmsa):
            if phys:
                Folio(kernel, phys >> kernel.arch.page_shift, 0).put()
        self.kvm.vcpus.remove(self)
        if self.vm is not None:
            self.vm.vcpus.remove(self)
            self.vm.fput()
