"""All drivers of one kernel: brought up in the order of its initcalls, shut down before it leaves.

Models the order of ``drivers/`` @ 7.3: PCI is scanned in a subsys_initcall, the IOMMU comes up in a
rootfs_initcall, the rest are modules of device_initcall level; at a kexec ``device_shutdown`` comes
before ``machine_shutdown``, where the IOMMU is turned off. ``KernelConfig.without`` names the
pieces of live update that a kernel is built without (:data:`PIECES`): it treats those devices as
7.3 does.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from khosim.drivers.amd_iommu import AmdIommu
from khosim.drivers.iommu_core import IommuCore, IommuFlb
from khosim.drivers.iommufd import IommufdHandler
from khosim.drivers.kvm import Kvm
from khosim.drivers.kvm_luo import KvmVcpuHandler, KvmVmHandler
from khosim.drivers.pci_core import PciCore
from khosim.drivers.pci_liveupdate import PciLiveupdate
from khosim.drivers.sev import Sev, SnpFlb
from khosim.drivers.vfio_pci import VfioPci, VfioPciHandler
from khosim.drivers.vtd import IntelIommu
from khosim.errors import InputError, KernelError
from khosim.machine.devices.amd import AmdUnit
from khosim.machine.devices.vtd_registers import VtdUnit

if TYPE_CHECKING:
    from khosim.drivers.iommu_unit import IommuUnit
    from khosim.kernel.kernel import Kernel

__all__ = ("PIECES", "Drivers", "check_pieces", "initcall")

PIECES = ("guest-memory", "kvm", "iommu", "vfio", "pci", "snp")
"""What a live update preserves for guests with devices, each of which can be left out.

``guest-memory`` is user space's to leave out: the kernel has memfds all the same.
"""


def check_pieces(names: tuple[str, ...]) -> None:
    """Raise :class:`InputError` for a name that is no piece."""
    for name in names:
        if name not in PIECES:
            raise InputError("without", f"{name!r} is none of {', '.join(PIECES)}")


def initcall(kernel: Kernel, level: str) -> None:
    """Called by a booting kernel at each level of its initcalls."""
    if kernel.hardware.devices is None:
        return
    if level == "subsys":
        kernel.drivers = Drivers(kernel)
    drivers = kernel.drivers
    if isinstance(drivers, Drivers):
        drivers.initcall(level)


class Drivers:
    """The drivers of one kernel; those whose hardware is not there are None."""

    __slots__ = ("iommu", "kernel", "kvm", "pci", "sev", "vfio")

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        devices = kernel.hardware.devices
        assert devices is not None
        luo_on = kernel.liveupdate.enabled and bool(kernel.release.luo_flb)
        without = kernel.config.without

        def has(piece: str) -> bool:
            return luo_on and piece not in without

        self.pci = PciCore(kernel, devices, PciLiveupdate(kernel) if has("pci") else None)
        self.iommu: IommuCore | None = None
        self.vfio: VfioPci | None = None
        self.sev: Sev | None = None
        unit: IommuUnit | None = None
        if isinstance(devices.iommu, VtdUnit):
            unit = IntelIommu(kernel, devices, devices.iommu.base)
        elif isinstance(devices.iommu, AmdUnit):
            unit = AmdIommu(kernel, devices, devices.iommu.base)
        if unit is not None:
            self.iommu = IommuCore(kernel, unit, IommuFlb() if has("iommu") else None)
            self.vfio = VfioPci(kernel, self.pci, self.iommu)
        if devices.snp is not None:
            self.sev = Sev(kernel, devices.snp, SnpFlb() if has("snp") else None)
        self.kvm = Kvm(kernel, devices, self.sev)

    def iommu_of(self) -> IommuCore:
        """The IOMMU core; raises -ENODEV on a machine without a remapping unit."""
        if self.iommu is None:
            raise KernelError(errno.ENODEV, "iommufd", "no IOMMU")
        return self.iommu

    def vfio_of(self) -> VfioPci:
        """vfio-pci; raises -ENODEV on a machine without a remapping unit."""
        if self.vfio is None:
            raise KernelError(errno.ENODEV, "vfio", "no IOMMU")
        return self.vfio

    def initcall(self, level: str) -> None:
        """What is brought up at a level: "subsys", "rootfs" or "device"."""
        if level == "subsys":
            self.pci.scan()
        elif level == "rootfs":
            if self.iommu is not None:
                self.iommu.init(max((dev.bdf.rid for dev in self.pci.devs), default=0))
        elif level == "device":
            if self.sev is not None:
                self.sev.init()
            if self.kernel.liveupdate.enabled:
                self._register()

    def _register(self) -> None:
        luo, without = self.kernel.liveupdate, self.kernel.config.without
        if self.iommu is not None and self.iommu.flb is not None:
            iommufd = IommufdHandler(self.iommu)
            luo.register_file_handler(iommufd)
            self.iommu.register_flb(iommufd)
        if self.vfio is not None:
            vfio = VfioPciHandler(self.vfio, resets="vfio" in without)
            luo.register_file_handler(vfio)
            if self.pci.liveupdate is not None:
                self.pci.liveupdate.register_flb(vfio)
        if "kvm" not in without:
            machines = KvmVmHandler(self.kvm)
            luo.register_file_handler(machines)
            luo.register_file_handler(KvmVcpuHandler(self.kvm))
            if self.sev is not None:
                self.sev.register_flb(machines)

    def shutdown(self) -> None:
        """``kernel_restart_prepare`` and ``machine_shutdown`` of a kexec: nobody can refuse."""
        self.kvm.shutdown()
        self.pci.shutdown()
        if self.sev is not None:
            self.sev.shutdown()
        if self.iommu is not None:
            self.iommu.shutdown()
