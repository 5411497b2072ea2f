"""What the PCI core hands over: which functions the next kernel must not disturb.

Layout of ``include/linux/kho/abi/pci.h`` as proposed in "PCI: liveupdate: PCI core support for Live
Update" v9 (no release has it), packed, little-endian: :class:`PciSer`, and KHO blocks
(:mod:`khosim.abi.kho_block`) of :class:`PciDevSer`. The sizes of BARs are khosim's own (the
proposal leaves peer-to-peer for later), and so is the compatible string that says so (there:
``"pci"``).
"""

from __future__ import annotations

import dataclasses
import struct

__all__ = (
    "PCI_DEV_SER_BYTES",
    "PCI_LUO_FLB_COMPATIBLE",
    "PCI_LUO_FLB_VERSION",
    "PCI_SER_BYTES",
    "PciDevSer",
    "PciSer",
)

PCI_LUO_FLB_COMPATIBLE = "pci-bars"
PCI_LUO_FLB_VERSION = 1

_SER = struct.Struct("<IIQ")
_DEV = struct.Struct("<IHH6s2x")
PCI_SER_BYTES = _SER.size
PCI_DEV_SER_BYTES = _DEV.size


@dataclasses.dataclass(frozen=True, slots=True)
class PciSer:
    """``struct pci_ser``: ``devices`` is the physical address of the first KHO block, or 0."""

    version: int
    nr_devices: int
    devices: int

    def pack(self) -> bytes:
        """The bytes of it."""
        return _SER.pack(self.version, self.nr_devices, self.devices)

    @classmethod
    def unpack(cls, data: bytes) -> PciSer:
        """From its bytes."""
        return cls(*_SER.unpack_from(data))


@dataclasses.dataclass(frozen=True, slots=True)
class PciDevSer:
    """``struct pci_dev_ser``: ``domain`` is the segment, ``bdf`` the requester id.

    ``refcount``: how many preserved functions are behind a bridge; 1 for a function itself, 0 for
    an entry that is not in use. ``bar_bits`` are the binary logarithms of the sizes of six BARs, 0
    where there is none.
    """

    domain: int
    bdf: int
    refcount: int
    bar_bits: bytes = bytes(6)

    def pack(self) -> bytes:
        """The bytes of it."""
        return _DEV.pack(self.domain, self.bdf, self.refcount, self.bar_bits)

    @classmethod
    def unpack(cls, data: bytes) -> PciDevSer:
        """From its bytes."""
        return cls(*_DEV.unpack_from(data))
