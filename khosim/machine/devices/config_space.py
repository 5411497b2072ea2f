"""4 KiB of configuration space: what stands where at power-on, and which bits can be written.

Layouts are those of the PCI Express Base Specification, which ``include/uapi/linux/pci_regs.h @
7.3`` names. All BARs are 64-bit and prefetchable. Left out: I/O space, legacy interrupts, expansion
ROMs, MSI without X, AER, VPD, 32-bit BARs.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = (
    "ACS",
    "ACS_CTL",
    "ACS_REDIRECT",
    "BAR",
    "BRIDGE_CONTROL",
    "COMMAND",
    "DEVCTL",
    "MASTER",
    "MEMORY",
    "MSIX",
    "MSIX_CTL",
    "PMCSR",
    "SECONDARY",
    "SRIOV",
    "SRIOV_CTL",
    "VF_BAR",
    "ConfigLayout",
    "bridge_layout",
    "endpoint_layout",
    "vf_layout",
)

COMMAND, BAR, SECONDARY, BRIDGE_CONTROL = 0x04, 0x10, 0x19, 0x3E
MEMORY, MASTER = 1 << 1, 1 << 2
PMCSR, MSIX, MSIX_CTL, DEVCTL = 0x44, 0x50, 0x52, 0x68
ACS, ACS_CTL, ACS_REDIRECT = 0x100, 0x106, 1 << 2
SRIOV, SRIOV_CTL, VF_BAR, SERIAL = 0x140, 0x148, 0x164, 0x200
_ACS_BITS = 0x5F  # validation, blocking, both redirects, upstream forwarding, direct translated


class ConfigLayout(NamedTuple):
    """Bytes after a reset, which of their bits software can write, and which a 1 clears."""

    reset: bytes
    writable: bytes
    write_one_clears: bytes


class _Builder:
    def __init__(self) -> None:
        self.reset = bytearray(4096)
        self.writable = bytearray(4096)
        self.clears = bytearray(4096)

    def put(self, offset: int, form: str, value: int, writable: int = 0) -> None:
        struct.pack_into("<" + form, self.reset, offset, value)
        struct.pack_into("<" + form, self.writable, offset, writable)

    def layout(self) -> ConfigLayout:
        return ConfigLayout(bytes(self.reset), bytes(self.writable), bytes(self.clears))


def _common(vendor: int, device: int, class_code: int, header: int) -> _Builder:
    build = _Builder()
    build.put(0x00, "H", vendor)
    build.put(0x02, "H", device)
    build.put(COMMAND, "H", 0, 0x0547)
    build.put(0x06, "H", 0x0010)  # there is a list of capabilities
    struct.pack_into("<H", build.clears, 0x06, 0xF900)
    build.put(0x08, "I", class_code << 8)
    build.put(0x0C, "B", 0, 0xFF)
    build.put(0x0E, "B", header)
    build.put(0x34, "B", 0x40)
    build.put(0x3C, "B", 0, 0xFF)
    return build


def _power_and_express(build: _Builder, port_type: int, flr: bool) -> None:
    build.put(0x40, "B", 0x01)  # power management, and then MSI-X or PCI Express
    build.put(0x41, "B", 0x60)
    build.put(0x42, "H", 0x0003)
    build.put(PMCSR, "H", 0, 0x0103)
    build.put(0x60, "B", 0x10)
    build.put(0x62, "H", 2 | port_type << 4)
    build.put(0x64, "I", int(flr) << 28)
    build.put(DEVCTL, "H", 0x2810, 0x7FFF)
    struct.pack_into("<H", build.clears, 0x6A, 0x000F)


def _msix(build: _Builder, entries: int, table: int, pba: int) -> None:
    build.put(0x41, "B", MSIX)
    build.put(MSIX, "B", 0x11)
    build.put(MSIX + 1, "B", 0x60)
    build.put(MSIX_CTL, "H", entries - 1, 0xC000)
    build.put(MSIX + 4, "I", table)
    build.put(MSIX + 8, "I", pba)


def _extended(build: _Builder, offset: int, number: int, following: int) -> None:
    build.put(offset, "I", number | 1 << 16 | following << 20)


def _acs(build: _Builder, following: int) -> None:
    _extended(build, ACS, 0x000D, following)
    build.put(ACS + 4, "H", _ACS_BITS)
    build.put(ACS_CTL, "H", 0, _ACS_BITS)


def _bars(build: _Builder, offset: int, sizes: tuple[int, ...]) -> None:
    for size in sizes:
        build.put(offset, "Q", 0xC, -size & (1 << 64) - 1 & ~0xF)
        offset += 8


def _serial(build: _Builder, serial: int) -> None:
    _extended(build, SERIAL, 0x0003, 0)
    build.put(SERIAL + 4, "Q", serial)


def endpoint_layout(
    vendor: int,
    device: int,
    class_code: int,
    bars: tuple[int, ...],
    *,
    msix: int = 0,
    acs: bool = False,
    vfs: int = 0,
    vf_offset: int = 16,
    vf_bar: int = 0,
    multifunction: bool = False,
    serial: int = 0,
) -> ConfigLayout:
    """A type 0 function. The MSI-X table is in the middle of BAR 0, its PBA at three quarters."""
    build = _common(vendor, device, class_code, 0x80 if multifunction else 0)
    _bars(build, BAR, bars)
    build.put(0x2C, "I", device << 16 | vendor)
    _power_and_express(build, 0, flr=True)
    if msix:
        _msix(build, msix, bars[0] // 2, bars[0] // 4 * 3)
    if vfs:
        _extended(build, SRIOV, 0x0010, SERIAL)
        build.put(SRIOV_CTL, "H", 0, 0x0009)
        build.put(SRIOV + 0x0C, "H", vfs)
        build.put(SRIOV + 0x0E, "H", vfs)
        build.put(SRIOV + 0x10, "H", 0, 0xFFFF)
        build.put(SRIOV + 0x14, "H", vf_offset)
        build.put(SRIOV + 0x16, "H", 1)
        build.put(SRIOV + 0x1A, "H", device)
        build.put(SRIOV + 0x1C, "I", 1)
        build.put(SRIOV + 0x20, "I", 1, 1)
        _bars(build, VF_BAR, (vf_bar,) if vf_bar else ())
    first = SRIOV if vfs else SERIAL
    if acs:
        _acs(build, first)
    else:
        _extended(build, ACS, 0, first)  # a null capability: the list has to begin here
    _serial(build, serial)
    return build.layout()


def vf_layout(msix: int, bar: int) -> ConfigLayout:
    """A virtual function: ids read as ones, only bus master can be set, no BARs of its own."""
    build = _common(0xFFFF, 0xFFFF, 0x020000, 0)
    build.put(COMMAND, "H", 0, MASTER)
    _power_and_express(build, 0, flr=True)
    build.writable[PMCSR : PMCSR + 2] = bytes(2)
    if msix:
        _msix(build, msix, bar // 2, bar // 4 * 3)
    return build.layout()


def bridge_layout(
    vendor: int, device: int, serial: int, *, multifunction: bool = False
) -> ConfigLayout:
    """A type 1 function: a root port."""
    build = _common(vendor, device, 0x060400, 0x81 if multifunction else 1)
    for offset in (0x18, 0x19, 0x1A):
        build.put(offset, "B", 0, 0xFF)
    build.put(0x20, "I", 0x0000_FFF0, 0xFFF0_FFF0)
    build.put(0x24, "I", 0x0001_FFF1, 0xFFF0_FFF0)
    build.put(0x28, "I", 0, 0xFFFF_FFFF)
    build.put(0x2C, "I", 0, 0xFFFF_FFFF)
    build.put(BRIDGE_CONTROL, "H", 0, 0x0043)
    _power_and_express(build, 4, flr=False)
    _acs(build, SERIAL)
    _serial(build, serial)
    return build.layout()
