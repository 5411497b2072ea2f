"""What iommufd hands over of a file: its page tables, by the user's tokens.

Layout of ``include/linux/kho/abi/iommufd.h`` as proposed in "iommu: Add live update state
preservation" v1 (no release has it): u32 ``nr_hwpts``, then packed records of u32 ``token``, u64
``domain_data`` (physical address of a :class:`~khosim.abi.iommu.IommuDomainSer`) and a bool.
"""

from __future__ import annotations

import dataclasses
import struct

__all__ = (
    "IOMMUFD_LUO_COMPATIBLE",
    "IommufdHwptLu",
    "iommufd_lu_bytes",
    "pack_iommufd_lu",
    "unpack_iommufd_lu",
)

IOMMUFD_LUO_COMPATIBLE = "iommufd-v1"

_HEAD = struct.Struct("<I")
_HWPT = struct.Struct("<IQB")


@dataclasses.dataclass(frozen=True, slots=True)
class IommufdHwptLu:
    """``struct iommufd_hwpt_lu``."""

    token: int
    domain_data: int
    reclaimed: int = 0


def iommufd_lu_bytes(nr_hwpts: int) -> int:
    """Bytes of a record of so many page tables."""
    return _HEAD.size + nr_hwpts * _HWPT.size


def pack_iommufd_lu(hwpts: list[IommufdHwptLu]) -> bytes:
    """``struct iommufd_lu``."""
    return _HEAD.pack(len(hwpts)) + b"".join(
        _HWPT.pack(hwpt.token, hwpt.domain_data, hwpt.reclaimed) for hwpt in hwpts
    )


def unpack_iommufd_lu(data: bytes) -> list[IommufdHwptLu]:
    """The page tables in ``data``; one that is cut short has fewer than it says."""
    (count,) = _HEAD.unpack_from(data)
    room = (len(data) - _HEAD.size) // _HWPT.size
    return [
        IommufdHwptLu(*_HWPT.unpack_from(data, _HEAD.size + i * _HWPT.size))
        for i in range(min(count, room))
    ]
