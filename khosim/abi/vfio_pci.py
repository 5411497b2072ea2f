"""What vfio-pci hands over of a device file.

Layout of ``include/linux/kho/abi/vfio_pci.h`` as proposed in "vfio/pci: Base Live Update support
for VFIO" v5 (u32 ``domain``, u16 ``bdf``), with ``reset_works`` of its v3 and the iommufd token
that "iommu: Add live update state preservation" adds. The token of the page table is khosim's own,
for who retrieves a running device has to know what it is attached to. No release has it.
"""

from __future__ import annotations

import dataclasses
import struct

__all__ = ("VFIO_PCI_LUO_FH_COMPATIBLE", "VFIO_PCI_SER_BYTES", "VfioPciSer")

VFIO_PCI_LUO_FH_COMPATIBLE = "vfio-pci-v1-running"

_SER = struct.Struct("<IHBII")
VFIO_PCI_SER_BYTES = _SER.size


@dataclasses.dataclass(frozen=True, slots=True)
class VfioPciSer:
    """``struct vfio_pci_core_device_ser``: ``domain`` is the segment, ``bdf`` the requester id.

    ``iommufd_token`` and ``hwpt_token`` name the page table that the device is attached to.
    """

    domain: int
    bdf: int
    reset_works: int
    iommufd_token: int
    hwpt_token: int

    def pack(self) -> bytes:
        """The bytes of it."""
        return _SER.pack(*dataclasses.astuple(self))

    @classmethod
    def unpack(cls, data: bytes) -> VfioPciSer:
        """From its bytes."""
        return cls(*_SER.unpack_from(data))
