"""What the SEV driver hands over: that the firmware is at work, and for which guests.

khosim's own, for nobody has proposed one. :class:`SnpSer` leads to KHO blocks
(:mod:`khosim.abi.kho_block`) of :class:`SnpGuestSer`. The reverse map table itself is in memory
that the firmware reserves, and the keys are in the security processor: both stay where they are,
and what has to cross is that the next kernel leaves them alone.
"""

from __future__ import annotations

import dataclasses
import struct

__all__ = (
    "SNP_GUEST_SER_BYTES",
    "SNP_LUO_FLB_COMPATIBLE",
    "SNP_LUO_FLB_VERSION",
    "SNP_SER_BYTES",
    "SnpGuestSer",
    "SnpSer",
)

SNP_LUO_FLB_COMPATIBLE = "sev-snp-v1"
SNP_LUO_FLB_VERSION = 1

_SER = struct.Struct("<IIQ")
_GUEST = struct.Struct("<QII")
SNP_SER_BYTES = _SER.size
SNP_GUEST_SER_BYTES = _GUEST.size


@dataclasses.dataclass(frozen=True, slots=True)
class SnpSer:
    """The root: ``guests`` is the physical address of the first KHO block, or 0."""

    version: int
    nr_guests: int
    guests: int

    def pack(self) -> bytes:
        """The bytes of it."""
        return _SER.pack(self.version, self.nr_guests, self.guests)

    @classmethod
    def unpack(cls, data: bytes) -> SnpSer:
        """From its bytes."""
        return cls(*_SER.unpack_from(data))


@dataclasses.dataclass(frozen=True, slots=True)
class SnpGuestSer:
    """One guest: its context page, its ASID; ``in_use`` is 0 for an entry that was given back."""

    gctx_phys: int
    asid: int
    in_use: int

    def pack(self) -> bytes:
        """The bytes of it."""
        return _GUEST.pack(self.gctx_phys, self.asid, self.in_use)

    @classmethod
    def unpack(cls, data: bytes) -> SnpGuestSer:
        """From its bytes."""
        return cls(*_GUEST.unpack_from(data))
