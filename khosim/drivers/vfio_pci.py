"""vfio-pci: device files of user space, and how they cross a kexec.

Models ``drivers/vfio/pci/vfio_pci_core.c`` (``vfio_pci_core_enable``, ``vfio_pci_core_disable``)
and ``drivers/vfio/device_cdev.c`` @ 7.3, and the file handler of "vfio/pci: Base Live Update
support for VFIO" v5 (Vipin Sharma, 2026-07-14; no release has it). That series is the first of five
phases: its ``freeze`` resets the device. The handler here does so only where it is told to; else it
is what the fourth phase announces: the device goes on, its bus master and DMA with it, and is not
reset when it is retrieved.

Beyond the proposals: the record names the page table that the device is attached to; a device that
nobody retrieved is reset when its session is finished. Left out: groups, VFs, power states, error
recovery, dma-buf export.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from khosim.abi.vfio_pci import VFIO_PCI_LUO_FH_COMPATIBLE, VFIO_PCI_SER_BYTES, VfioPciSer
from khosim.drivers.iommufd import Hwpt, IommufdFile
from khosim.drivers.pci_core import PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY, PciCore, PciDev
from khosim.errors import KernelError
from khosim.kernel.file import File
from khosim.kernel.liveupdate.file_ops import FileHandler, LiveupdateFileOpArgs

if TYPE_CHECKING:
    from collections.abc import Callable

    from khosim.drivers.iommu_core import IommuCore
    from khosim.kernel.kernel import Kernel

__all__ = ("VfioDeviceFile", "VfioPci", "VfioPciHandler")

_MSIX_CTL, _MSIX_ENABLE = 0x52, 1 << 15
_MSI_BASE = 0xFEE0_0000
_FIRST_VECTOR, _NR_VECTORS = 0x31, 0xBB


class VfioDeviceFile(File):
    """An open ``/dev/vfio/devices/vfioX``: one function in the hands of user space.

    ``hwpt`` is the page table that it is attached to, of ``iommufd``. ``refuses_freeze`` is an
    errno with which it refuses to be frozen, for devices that misbehave (0: it does not).
    """

    __slots__ = ("dev", "hwpt", "iommufd", "irqs", "is_frozen", "refuses_freeze", "vfio")

    def __init__(self, vfio: VfioPci, dev: PciDev) -> None:
        super().__init__(vfio.kernel, f"vfio-{dev.bdf}")
        self.vfio = vfio
        self.dev = dev
        self.iommufd: IommufdFile | None = None
        self.hwpt: Hwpt | None = None
        self.irqs: dict[int, int] = {}
        """Interrupt remapping entries by MSI-X entry, or vectors where there is no remapping."""
        self.is_frozen = False
        self.refuses_freeze = 0

    def attach(self, iommufd: IommufdFile, hwpt: Hwpt) -> None:
        """``VFIO_DEVICE_ATTACH_IOMMUFD_PT``: raises -EBUSY where it is attached."""
        self.check_open()
        if self.hwpt is not None:
            raise KernelError(errno.EBUSY, "vfio_df_ioctl_attach_pt", f"{self!r} is attached")
        iommufd.core.attach(hwpt.domain, self.dev)
        iommufd.get_file()
        self.iommufd, self.hwpt = iommufd, hwpt

    def bind_retrieved(self, iommufd: IommufdFile) -> None:
        """``VFIO_DEVICE_BIND_IOMMUFD`` of a retrieved file: to the page table that it runs on.

        Raises -EINVAL where that is not in ``iommufd``.
        """
        self.check_open()
        for hwpt in iommufd.hwpts:
            if self.dev in hwpt.domain.attached:
                iommufd.get_file()
                self.iommufd, self.hwpt = iommufd, hwpt
                return
        raise KernelError(errno.EINVAL, "vfio_df_ioctl_bind_iommufd", f"{self!r} is not its own")

    def detach(self) -> None:
        """``VFIO_DEVICE_DETACH_IOMMUFD_PT``; raises -EBUSY while preserved."""
        self.check_open()
        if self.iommufd is None or self.hwpt is None:
            return
        if self.hwpt.domain.outgoing and self.dev.bdf.rid in self.iommufd.core.preserved:
            raise KernelError(errno.EBUSY, "vfio_df_ioctl_detach_pt", f"{self!r} is preserved")
        self.iommufd.core.detach(self.hwpt.domain, self.dev)
        self.iommufd.fput()
        self.iommufd = self.hwpt = None

    def set_master(self) -> None:
        """What the guest's driver does first: memory and bus master on, in the command register."""
        self._check_thawed()
        self.vfio.pci.command(self.dev, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER)

    def set_irq(self, entry: int, pi_desc: int, vector: int) -> None:
        """``VFIO_DEVICE_SET_IRQS`` with a KVM irqfd: MSI-X ``entry`` is posted to a vCPU.

        The table entry is written in remappable format, and MSI-X turned on; on a unit that posts
        nothing it goes to a vector of the host's CPU. Raises -ENOSPC.
        """
        self._check_thawed()
        if self.iommufd is None:
            raise KernelError(errno.EINVAL, "vfio_pci_set_irqs_ioctl", f"{self!r} is not attached")
        unit, dev, vfio = self.iommufd.core.unit, self.dev, self.vfio
        if not unit.posts_interrupts:
            self.irqs[entry] = vfio.host_vector(dev, entry)
            vfio.write_msix(dev, entry, _MSI_BASE, self.irqs[entry])
            return
        index = unit.post_interrupt(dev.bdf.rid, pi_desc, vector, self.irqs.get(entry))
        self.irqs[entry] = index
        address = _MSI_BASE | 1 << 4 | (index & 0x7FFF) << 5 | (index >> 15) << 2
        vfio.write_msix(dev, entry, address, 0)

    def _check_thawed(self) -> None:
        self.check_open()
        if self.is_frozen:
            raise KernelError(errno.EIO, "vfio_pci_rw", f"{self!r} is frozen")

    def release(self) -> None:
        """``vfio_pci_core_disable``: no bus master, reset, detached."""
        vfio, dev = self.vfio, self.dev
        vfio.pci.command(dev, clear_bits=PCI_COMMAND_MASTER)
        if self.iommufd is not None:
            for index in self.irqs.values():
                self.iommufd.core.unit.clear_irte(index)
        vfio.pci.reset_function(dev)
        if self.iommufd is not None and self.hwpt is not None:
            self.iommufd.core.detach(self.hwpt.domain, dev)
            self.iommufd.fput()
        dev.driver = ""
        vfio.open_files.pop(dev.bdf.rid, None)


class VfioPci:
    """vfio-pci of one kernel: ``open_files`` by requester id."""

    __slots__ = ("iommu", "kernel", "open_files", "pci")

    def __init__(self, kernel: Kernel, pci: PciCore, iommu: IommuCore) -> None:
        self.kernel = kernel
        self.pci = pci
        self.iommu = iommu
        self.open_files: dict[int, VfioDeviceFile] = {}

    def open(self, bdf: str) -> VfioDeviceFile:
        """``open("/dev/vfio/devices/...")`` and ``VFIO_DEVICE_BIND_IOMMUFD`` of a function.

        It is reset. Raises -ENODEV where there is none, -EBUSY where it is open, or was preserved
        by the predecessor: then only its session gives it out.
        """
        symbol = "vfio_device_fops_cdev_open"
        dev = next((dev for dev in self.pci.devs if str(dev.bdf) == bdf), None)
        if dev is None or dev.is_bridge:
            raise KernelError(errno.ENODEV, symbol, bdf)
        if dev.incoming or dev.bdf.rid in self.open_files:
            raise KernelError(errno.EBUSY, symbol, f"{bdf} is in somebody's hands")
        self.pci.command(dev, clear_bits=PCI_COMMAND_MASTER)
        self.pci.command(dev, PCI_COMMAND_MEMORY)
        self.pci.reset_function(dev)
        return self.file_of(dev)

    def file_of(self, dev: PciDev) -> VfioDeviceFile:
        """An open file of a function, which is left as it is."""
        file = VfioDeviceFile(self, dev)
        dev.driver = "vfio-pci"
        self.open_files[dev.bdf.rid] = file
        return file

    def msix_table(self, dev: PciDev) -> int:
        """Where the MSI-X table of a function is: in the middle of its first BAR."""
        phys, size = dev.bars[0]
        return phys + size // 2

    def read_msix(self, dev: PciDev) -> dict[int, int]:
        """MSI-X entries with a message in remappable format, and the table entry each names."""
        if not dev.bars or not self.pci.read(dev, _MSIX_CTL, 2) & _MSIX_ENABLE:
            return {}
        found = {}
        for entry in range((self.pci.read(dev, _MSIX_CTL, 2) & 0x7FF) + 1):
            address = self.pci.devices.mmio_read(self.msix_table(dev) + 16 * entry)
            if address & 1 << 4:
                found[entry] = address >> 5 & 0x7FFF | (address >> 2 & 1) << 15
        return found

    def host_vector(self, dev: PciDev, entry: int) -> int:
        """``irq_matrix_alloc``: a vector of the host for an entry of a function."""
        return _FIRST_VECTOR + (8 * self.pci.devs.index(dev) + entry) % _NR_VECTORS

    def write_msix(self, dev: PciDev, entry: int, address: int, data: int) -> None:
        """``pci_write_msg_msix``: the message of an entry, and MSI-X on."""
        devices = self.pci.devices
        table = self.msix_table(dev) + 16 * entry
        for offset, value in ((0, address), (4, 0), (8, data), (12, 0)):
            devices.mmio_write(table + offset, value)
        control = self.pci.read(dev, _MSIX_CTL, 2)
        if not control & _MSIX_ENABLE:
            self.pci.write(dev, _MSIX_CTL, control | _MSIX_ENABLE, 2)
        if self.kernel.trace is not None:
            args = {"bdf": str(dev.bdf), "entry": entry, "address": address}
            self.kernel.emit("pci_write_msg_msix", args, None)


class VfioPciHandler(FileHandler):
    """``vfio_pci_liveupdate_fh``.

    With ``resets`` it is the published first phase, under its name: ``freeze`` resets the device
    and takes its bus master away, the successor's file is one of a device at rest.
    """

    compatible = VFIO_PCI_LUO_FH_COMPATIBLE

    def __init__(self, vfio: VfioPci, *, resets: bool = False) -> None:
        super().__init__("vfio-pci-v1" if resets else "")
        self._vfio = vfio
        self.resets = resets

    def can_preserve(self, file: File) -> bool:
        """vfio-pci device files."""
        return isinstance(file, VfioDeviceFile)

    def get_id(self, file: File) -> int:
        """The function: two files of one would be one."""
        assert isinstance(file, VfioDeviceFile)
        return id(file.dev)

    def preserve(self, args: LiveupdateFileOpArgs) -> None:
        """The function's place among the buses and its translation.

        Raises -EINVAL where its page table is not preserved yet, -EBUSY, -ENOMEM.
        """
        file = args.file
        assert isinstance(file, VfioDeviceFile)
        kernel, dev = args.kernel, file.dev
        liveupdate = self._vfio.pci.liveupdate
        ser = kernel.kho_alloc_preserve(VFIO_PCI_SER_BYTES)
        undo: list[Callable[[], None]] = [lambda: kernel.kho_unpreserve_free(ser)]
        try:
            if liveupdate is not None:
                liveupdate.preserve(dev)
                undo.append(lambda: liveupdate.unpreserve(dev))
            token = 0
            iommufd, hwpt = file.iommufd, file.hwpt
            if iommufd is not None and hwpt is not None and iommufd.core.flb is not None:
                iommufd.core.preserve_device(hwpt.domain, dev)
                undo.append(lambda: iommufd.core.unpreserve_device(dev))
                token = hwpt.token or 0
        except KernelError:
            for step in reversed(undo):
                step()
            raise
        record = VfioPciSer(dev.bdf.segment, dev.bdf.rid, 1, 0, token)
        ser.write(0, record.pack(), by="vfio_pci_liveupdate_preserve")
        args.serialized_data, args.private_data = ser.phys, undo

    def unpreserve(self, args: LiveupdateFileOpArgs) -> None:
        """Undo it, last first."""
        for step in reversed(args.private_data):
            step()

    def freeze(self, args: LiveupdateFileOpArgs) -> None:
        """The device goes on, but nobody touches it any more; raises what it refuses with."""
        file = args.file
        assert isinstance(file, VfioDeviceFile)
        if file.refuses_freeze:
            name = errno.errorcode[file.refuses_freeze]
            raise KernelError(file.refuses_freeze, "vfio_pci_liveupdate_freeze", f"{name}: busy")
        if self.resets:
            pci = self._vfio.pci
            pci.reset_function(file.dev)
            pci.command(file.dev, clear_bits=PCI_COMMAND_MASTER)
        file.is_frozen = True

    def unfreeze(self, args: LiveupdateFileOpArgs) -> None:
        """User space goes on."""
        assert isinstance(args.file, VfioDeviceFile)
        args.file.is_frozen = False

    def _read(self, args: LiveupdateFileOpArgs) -> tuple[VfioPciSer, PciDev | None]:
        kernel, phys = args.kernel, args.serialized_data
        data = kernel.ram.read(kernel.virt(phys, VFIO_PCI_SER_BYTES), VFIO_PCI_SER_BYTES)
        ser = VfioPciSer.unpack(data)
        return ser, self._vfio.pci.find(ser.domain, ser.bdf)

    def retrieve(self, args: LiveupdateFileOpArgs) -> None:
        """A file of the running device; raises -ENODEV where it is not there any more."""
        vfio = self._vfio
        _, dev = self._read(args)
        if dev is None or dev.is_bridge:
            raise KernelError(errno.ENODEV, "vfio_pci_liveupdate_retrieve", "no such function")
        if dev.bdf.rid in vfio.open_files:
            raise KernelError(errno.EBUSY, "vfio_pci_liveupdate_retrieve", str(dev.bdf))
        file = vfio.file_of(dev)
        vfio.iommu.reattach(dev)
        file.irqs = vfio.read_msix(dev)
        args.kernel.kho_restore_free(args.serialized_data)
        args.file = file

    def can_finish(self, args: LiveupdateFileOpArgs) -> bool:
        """Not while a retrieved device translates through a page table that nobody holds."""
        file = args.file
        if not isinstance(file, VfioDeviceFile) or file.hwpt is not None:
            return True
        return file.dev.bdf.rid not in self._vfio.iommu.incoming

    def finish(self, args: LiveupdateFileOpArgs) -> None:
        """The PCI core is told; a device that nobody retrieved is stopped first."""
        vfio = self._vfio
        dev = args.file.dev if isinstance(args.file, VfioDeviceFile) else None
        if not args.retrieve_status:
            _, dev = self._read(args)
            args.kernel.kho_restore_free(args.serialized_data)
            if dev is not None:
                vfio.pci.command(dev, clear_bits=PCI_COMMAND_MASTER)
                vfio.pci.reset_function(dev)
        if dev is not None and dev.incoming and vfio.pci.liveupdate is not None:
            vfio.pci.liveupdate.finish(dev)
