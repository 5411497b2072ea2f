"""A virtual machine monitor: what user space does to give a guest devices, and to bring it across.

Stands for QEMU with ``-device vfio-pci`` and iommufd, on the calls of the drivers here. One object
is one process on one kernel; its successor is made of files that a session gave back and of what
the host's management knows about the guest (its name, and where in its address space memory and
devices are), which is not the kernel's business.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from khosim.drivers.core import Drivers
from khosim.drivers.iommufd import Hwpt, IommufdFile
from khosim.drivers.kvm import KvmFile, VcpuFile
from khosim.drivers.vfio_pci import VfioDeviceFile
from khosim.errors import KernelError
from khosim.kernel.gup import memfd_pin_folios, unpin_folios

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from khosim.kernel.file import File
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.memfd import Memfd

__all__ = ("GUEST_BASE", "Vmm", "VmmPlan", "drivers_of", "piece_of")

GUEST_BASE = 1 << 40
"""Where guests have their memory unless told otherwise: above the memory of small hosts.

So a device whose requests nobody translates any more hits nothing.
"""
_UINT_MAX = (1 << 32) - 1
_HWPT_TOKEN = 1
_VECTOR = 0x40


_PIECE_OF = {"memory": "guest-memory", "iommufd": "iommu", "vm": "kvm"}


def piece_of(part: str) -> str:
    """The piece of live update that carries a file of :meth:`Vmm.files`, by its name there.

    vCPUs go with the machine, devices are "vfio".
    """
    return _PIECE_OF.get(part, "kvm" if part.startswith("vcpu") else "vfio")


class VmmPlan(NamedTuple):
    """What management knows of a guest.

    ``programmes`` has its (gpa, bytes, pattern) for each vCPU.
    """

    name: str
    gpa: int = GUEST_BASE
    encrypted: bool = False
    programmes: tuple[tuple[tuple[int, int, int], ...], ...] = ((),)


def drivers_of(kernel: Kernel) -> Drivers:
    """The drivers of a kernel; raises -ENODEV on a machine without devices."""
    if not isinstance(kernel.drivers, Drivers):
        raise KernelError(errno.ENODEV, "open", "this machine has no devices")
    return kernel.drivers


class Vmm:
    """The process behind one guest. ``devices`` are its open device files by name.

    ``memfd`` is None where its memory did not come.
    """

    __slots__ = ("devices", "drivers", "hwpt", "iommufd", "kernel", "memfd", "plan", "vcpus", "vm")

    def __init__(self, kernel: Kernel, plan: VmmPlan, memfd: Memfd | None) -> None:
        self.kernel = kernel
        self.plan = plan
        self.drivers = drivers_of(kernel)
        self.memfd = memfd
        self.iommufd: IommufdFile | None = None
        self.hwpt: Hwpt | None = None
        self.vm: KvmFile | None = None
        self.vcpus: list[VcpuFile] = []
        self.devices: dict[str, VfioDeviceFile] = {}

    @classmethod
    def start(cls, kernel: Kernel, plan: VmmPlan, memfd: Memfd) -> Vmm:
        """Boot a guest whose memory is all of ``memfd``; its vCPUs run. Raises what is refused."""
        vmm = cls(kernel, plan, memfd)
        pinned = memfd_pin_folios(memfd, 0, memfd.size - 1, _UINT_MAX)
        unpin_folios(memfd.inode, pinned)
        vmm.boot_vm()
        return vmm

    def boot_vm(self) -> None:
        """A machine around the memory, from its first instruction."""
        plan = self.plan
        assert self.memfd is not None
        self.vm = self.drivers.kvm.create_vm(plan.name, encrypted=plan.encrypted)
        self.vm.set_memory(plan.gpa, self.memfd)
        self.vcpus = [self.vm.create_vcpu(programme) for programme in plan.programmes]
        if plan.encrypted:
            self.vm.launch()
        for vcpu in self.vcpus:
            vcpu.run()

    # -- devices --------------------------------------------------------------------------------

    def assign(self, name: str, bdf: str) -> VfioDeviceFile:
        """Give the guest a device: open, attach, interrupts to vCPU 0, bus master on."""
        iommufd = self._iommufd()
        file = self.drivers.vfio_of().open(bdf)
        assert self.hwpt is not None
        file.attach(iommufd, self.hwpt)
        file.set_master()
        if self.vcpus:
            file.set_irq(0, self.vcpus[0].pi_desc, _VECTOR + len(self.devices))
        self.devices[name] = file
        return file

    def _iommufd(self) -> IommufdFile:
        # With the first device: all of the guest's memory, where the guest sees it.
        if self.iommufd is None:
            self.iommufd = IommufdFile(self.drivers.iommu_of())
            self.hwpt = self.iommufd.alloc_hwpt()
            assert self.memfd is not None
            self.iommufd.map_file(self.plan.gpa, self.memfd, 0, self.memfd.size)
            self.iommufd.mark_preserve(self.hwpt, _HWPT_TOKEN)
        return self.iommufd

    def map_peer(self, iova: int, peer: VfioDeviceFile) -> int:
        """Let this guest's devices reach the first BAR of ``peer`` at ``iova``; its size."""
        phys, size = peer.dev.bars[0]
        self._iommufd().map_bar(iova, phys, size)
        return size

    # -- across a kexec -------------------------------------------------------------------------

    def files(self) -> dict[str, File]:
        """All its files by what they are, in the order in which they can be preserved."""
        found: dict[str, File] = {}
        if self.memfd is not None:
            found["memory"] = self.memfd
        if self.iommufd is not None:
            found["iommufd"] = self.iommufd
        found.update(self.devices)
        if self.vm is not None:
            found["vm"] = self.vm
        found.update((f"vcpu{vcpu.vcpu_id}", vcpu) for vcpu in self.vcpus)
        return found

    @classmethod
    def resume(cls, kernel: Kernel, plan: VmmPlan, files: Mapping[str, File]) -> Vmm:
        """Put a guest together again from what came back, and let it run.

        ``files`` as :meth:`files` names them. Where machine or vCPUs did not come, the guest starts
        over; where the page table did not, its devices stay blocked; without memory there is no
        guest, and the devices go on.
        """
        vmm = cls(kernel, plan, files.get("memory"))  # type: ignore[arg-type]
        for name, file in files.items():
            if isinstance(file, IommufdFile):
                vmm.iommufd = file
                vmm.hwpt = file.hwpts[0]
            elif isinstance(file, VfioDeviceFile):
                vmm.devices[name] = file
            elif isinstance(file, KvmFile):
                vmm.vm = file
                file.name = plan.name
            elif isinstance(file, VcpuFile):
                vmm.vcpus.append(file)
        vmm.reconnect()
        return vmm

    def reconnect(self) -> None:
        """Devices to their page table, memory and vCPUs to the machine; vCPUs take what waited."""
        if self.iommufd is not None:
            for device in self.devices.values():
                if device.hwpt is None:
                    device.bind_retrieved(self.iommufd)
        if self.memfd is None:
            return
        if self.vm is None or not self.vcpus:
            self.boot_vm()
            return
        self.vm.set_memory(self.plan.gpa, self.memfd)
        for vcpu in self.vcpus:
            vcpu.bind(self.vm)
        self._reroute()
        for vcpu in self.vcpus:
            vcpu.sync_pir()
            vcpu.run()

    def _reroute(self) -> None:
        # Where messages went to a CPU, what it held was the old kernel's: a spurious interrupt of
        # each device makes up for it, as VFIO's proposal asks of a VMM.
        for number, device in enumerate(self.devices.values()):
            iommufd = device.iommufd
            if iommufd is not None and not iommufd.core.unit.posts_interrupts:
                device.set_irq(0, self.vcpus[0].pi_desc, _VECTOR + number)
                self.vcpus[0].inject(_VECTOR + number)

    def taken(self) -> Sequence[int]:
        """Vectors that wait for its vCPUs; they have been taken now."""
        return [vector for vcpu in self.vcpus for vector in vcpu.sync_pir()]

    def stop(self) -> None:
        """The process exits: vCPUs stop, devices are reset, memory is let go."""
        for device in self.devices.values():
            device.fput()
        if self.iommufd is not None:
            self.iommufd.fput()
        for vcpu in list(self.vcpus):
            vcpu.fput()
        if self.vm is not None:
            self.vm.fput()
        self.devices, self.vcpus, self.iommufd, self.vm = {}, [], None, None
