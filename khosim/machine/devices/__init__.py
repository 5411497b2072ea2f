"""Devices: PCI, DMA engines, the IOMMU, interrupts, the secure processor. They know no Linux."""

from __future__ import annotations

from khosim.machine.devices.bdf import Bdf
from khosim.machine.devices.clock import Schedule, at, every, never, seeded
from khosim.machine.devices.devices import Devices
from khosim.machine.devices.engine import Transfer
from khosim.machine.devices.events import DmaEvent, HardwareEvent
from khosim.machine.devices.parts import Amd, Bridge, Endpoint, Part, Snp, Vtd
from khosim.machine.devices.snp import SnpStatus
from khosim.machine.devices.vcpus import GuestWrite

__all__ = (
    "Amd",
    "Bdf",
    "Bridge",
    "Devices",
    "DmaEvent",
    "Endpoint",
    "GuestWrite",
    "HardwareEvent",
    "Part",
    "Schedule",
    "Snp",
    "SnpStatus",
    "Transfer",
    "Vtd",
    "at",
    "every",
    "never",
    "seeded",
)
