"""What a machine is put together from: plain descriptions, made real by ``Devices``."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ("KINDS", "Amd", "Bridge", "Endpoint", "Part", "Snp", "Vtd")

KINDS = ("nic", "nvme", "plain")


@dataclass(frozen=True, slots=True)
class Vtd:
    """A DMA remapping unit for one segment; registers at ``base`` (physical, one page).

    ``caches=False`` takes context cache and IOTLB away: each use reads the tables in RAM.
    """

    segment: int = 0
    base: int = 0xFED9_0000
    caches: bool = True


@dataclass(frozen=True, slots=True)
class Amd:
    """An AMD IOMMU for one segment, as :class:`Vtd`; 16 KiB of registers at ``base``."""

    segment: int = 0
    base: int = 0xFEB8_0000
    caches: bool = True


@dataclass(frozen=True, slots=True)
class Bridge:
    """A PCI Express port at ``bdf``, with the bus numbers that firmware gave it."""

    bdf: str
    secondary: int
    subordinate: int | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A PCI function at ``bdf``, as firmware numbered it.

    ``kind`` is its engine: "nic", "nvme", or "plain" for one without registers of its own. ``bars``
    are sizes in bytes of up to three 64-bit BARs; None: what the kind has. ``vfs`` is TotalVFs.
    Without ``acs`` it cannot be told to send peer-to-peer requests upstream.
    """

    bdf: str
    kind: str = "plain"
    bars: tuple[int, ...] | None = None
    vfs: int = 0
    msix: int = 4
    acs: bool = True
    vendor: int = 0x1AF4
    device: int | None = None


@dataclass(frozen=True, slots=True)
class Snp:
    """An AMD secure processor with an RMP. ``asids`` guests at most; ``seed`` makes their keys."""

    asids: int = 64
    seed: int = 0


Part = Vtd | Amd | Bridge | Endpoint | Snp
