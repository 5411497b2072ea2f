"""What the IOMMU core hands over: units, domains and which device translates through which.

Layout of ``include/linux/kho/abi/iommu.h`` as proposed in "iommu: Add live update state
preservation" v2 to v5 (no release has it), packed, little-endian. :class:`IommuFlbSer` leads to
three chains of pages, one for each kind of object: a header of u64 ``next_array_phys`` and u64
``nr_objects``, then objects.

Three things are khosim's own, for no series has them yet: the interrupt remapping table of a unit
(``irta``), the compatible string that says so, and the type of AMD's units, whose root table is
what their device table base register held.
"""

from __future__ import annotations

import dataclasses
import struct

__all__ = (
    "IOMMU_AMD",
    "IOMMU_ARRAY_HDR_BYTES",
    "IOMMU_DEVICE_SER_BYTES",
    "IOMMU_DOMAIN_SER_BYTES",
    "IOMMU_FLB_SER_BYTES",
    "IOMMU_HW_SER_BYTES",
    "IOMMU_INTEL",
    "IOMMU_LUO_FLB_COMPATIBLE",
    "IOMMU_SER_FLAG_DELETED",
    "IommuDeviceSer",
    "IommuDomainSer",
    "IommuFlbSer",
    "IommuHwSer",
)

IOMMU_LUO_FLB_COMPATIBLE = "iommu-liveupdate-v1-irta"
IOMMU_INTEL, IOMMU_AMD = 1, 2
IOMMU_SER_FLAG_DELETED = 1

_FLB = struct.Struct("<QQQ")
_DOMAIN = struct.Struct("<IIQQIIQ")
_DEVICE = struct.Struct("<IIIIQQQQQ")
_HW = struct.Struct("<IIQQB7xQQ64sQ")
_ARRAY_HDR = struct.Struct("<QQ")
IOMMU_FLB_SER_BYTES = _FLB.size
IOMMU_DOMAIN_SER_BYTES = _DOMAIN.size
IOMMU_DEVICE_SER_BYTES = _DEVICE.size
IOMMU_HW_SER_BYTES = _HW.size
IOMMU_ARRAY_HDR_BYTES = _ARRAY_HDR.size


@dataclasses.dataclass(frozen=True, slots=True)
class IommuFlbSer:
    """``struct iommu_flb_ser``: physical addresses of the first page of each chain."""

    iommu_array_phys: int
    iommu_domain_array_phys: int
    device_array_phys: int

    def pack(self) -> bytes:
        """The bytes of it."""
        return _FLB.pack(
            self.iommu_array_phys, self.iommu_domain_array_phys, self.device_array_phys
        )

    @classmethod
    def unpack(cls, data: bytes) -> IommuFlbSer:
        """From its bytes."""
        return cls(*_FLB.unpack_from(data))


@dataclasses.dataclass(frozen=True, slots=True)
class IommuDomainSer:
    """``struct iommu_domain_ser``: where the page table of a domain is, and how many levels.

    ``top_level`` counts from 0 for the table of 4 KiB leaves. ``restored_domain`` is a pointer of
    the kernel that reads it, 0 on the way.
    """

    ref_count: int
    flags: int
    top_table_phys: int
    top_level: int
    vasz: int
    sign_extend: int = 0
    restored_domain: int = 0

    def pack(self) -> bytes:
        """The bytes of it."""
        return _DOMAIN.pack(*dataclasses.astuple(self))

    @classmethod
    def unpack(cls, data: bytes) -> IommuDomainSer:
        """From its bytes."""
        return cls(*_DOMAIN.unpack_from(data))


@dataclasses.dataclass(frozen=True, slots=True)
class IommuDeviceSer:
    """``struct iommu_device_ser``: a PCI function, its domain (record) and its unit (record).

    ``attachment_id`` is the domain id in the unit's context entry.
    """

    ref_count: int
    flags: int
    devid: int
    pci_domain_nr: int
    attachment_id: int
    domain_phys: int
    iommu_phys: int
    pasid_table: int = 0
    max_pasid: int = 0

    def pack(self) -> bytes:
        """The bytes of it."""
        return _DEVICE.pack(*dataclasses.astuple(self))

    @classmethod
    def unpack(cls, data: bytes) -> IommuDeviceSer:
        """From its bytes."""
        return cls(*_DEVICE.unpack_from(data))


@dataclasses.dataclass(frozen=True, slots=True)
class IommuHwSer:
    """``struct iommu_hw_ser`` of a unit; ``token`` and ``phys_addr`` are its register base.

    Bit ``bus * 2`` of ``context_tables`` says that the context table of the bus is preserved.
    """

    ref_count: int
    flags: int
    token: int
    type: int
    restored: int
    phys_addr: int
    root_table: int
    context_tables: bytes
    irta: int = 0
    """What the interrupt remapping table address register held (khosim)."""

    def pack(self) -> bytes:
        """The bytes of it."""
        return _HW.pack(*(getattr(self, name) for name in self.__slots__))

    @classmethod
    def unpack(cls, data: bytes) -> IommuHwSer:
        """From its bytes."""
        return cls(*_HW.unpack_from(data))
