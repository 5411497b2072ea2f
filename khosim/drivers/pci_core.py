"""The PCI core: finding functions, giving out bus numbers, silencing devices at a kexec.

Models ``drivers/pci/probe.c`` (``pci_scan_child_bus_extend``, ``pci_scan_bridge_extend``,
``pci_setup_device``, ``pci_read_bases``) and ``drivers/pci/pci-driver.c:pci_device_shutdown`` @
7.3. What a live update changes about them is asked of :attr:`PciCore.liveupdate`
(:mod:`khosim.drivers.pci_liveupdate`); without it these are the functions of 7.3.

Left out: CardBus, I/O windows, bridge windows, hotplug, SR-IOV, runtime power management. Resources
are taken as firmware or the last kernel left them (``pcibios_resource_survey`` of x86).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from khosim.machine.devices import Bdf

if TYPE_CHECKING:
    from khosim.drivers.pci_liveupdate import PciLiveupdate
    from khosim.kernel.kernel import Kernel
    from khosim.machine.devices import Devices

__all__ = ("PCI_COMMAND_MASTER", "PCI_COMMAND_MEMORY", "PciCore", "PciDev")

_VENDOR, _COMMAND, _HEADER, _BAR0 = 0x00, 0x04, 0x0E, 0x10
_PRIMARY, _SUBORDINATE = 0x18, 0x1A
_EXP_DEVCTL, _DEVCTL_FLR, _PM_CTRL = 0x68, 1 << 15, 0x44
PCI_COMMAND_MEMORY, PCI_COMMAND_MASTER = 1 << 1, 1 << 2
_SEC_LATENCY_MASK = 0xFF00_0000
_NR_BARS = 6


class PciDev:
    """``struct pci_dev``: a function that the scan found.

    ``bars`` are ``(physical address, bytes)``; ``self_bus`` is the number behind a bridge (-1: it
    is none, or has none). ``outgoing`` and ``incoming`` are its records for the successor and from
    the predecessor, as physical addresses (0: none); ``was_incoming`` stays when that is finished.
    """

    __slots__ = (
        "bars",
        "bdf",
        "bridge",
        "driver",
        "incoming",
        "is_bridge",
        "outgoing",
        "self_bus",
        "was_incoming",
    )

    def __init__(self, bdf: Bdf, bridge: PciDev | None, is_bridge: bool) -> None:
        self.bdf = bdf
        self.bridge = bridge
        self.is_bridge = is_bridge
        self.self_bus = -1
        self.bars: list[tuple[int, int]] = []
        self.driver = ""
        self.outgoing = 0
        self.incoming = 0
        self.was_incoming = False

    def __repr__(self) -> str:
        return f"PciDev({self.bdf})"

    def path(self) -> Iterator[PciDev]:
        """The function itself, and every bridge above it, upwards."""
        dev: PciDev | None = self
        while dev is not None:
            yield dev
            dev = dev.bridge


class PciCore:
    """The PCI core of one kernel: ``devs`` are all functions, parents before children."""

    __slots__ = ("_assign_all", "devices", "devs", "kernel", "liveupdate")

    def __init__(self, kernel: Kernel, devices: Devices, liveupdate: PciLiveupdate | None) -> None:
        self.kernel = kernel
        self.devices = devices
        self.liveupdate = liveupdate
        self.devs: list[PciDev] = []
        self._assign_all = _has_option(kernel.cmdline, "assign-busses")

    def find(self, segment: int, rid: int) -> PciDev | None:
        """``pci_get_domain_bus_and_slot``."""
        for dev in self.devs:
            if dev.bdf.segment == segment and dev.bdf.rid == rid:
                return dev
        return None

    # -- configuration space --------------------------------------------------------------------

    def read(self, dev: PciDev, offset: int, size: int = 4) -> int:
        """``pci_read_config_*``."""
        return self.devices.read_config(dev.bdf, offset, size)

    def write(self, dev: PciDev, offset: int, value: int, size: int = 4) -> None:
        """``pci_write_config_*``; each is an event, after which devices may act."""
        self.devices.write_config(dev.bdf, offset, value, size)
        if self.kernel.trace is not None:
            args = {"bdf": str(dev.bdf), "offset": offset, "size": size}
            self.kernel.emit("pci_write_config", args, value)

    def command(self, dev: PciDev, set_bits: int = 0, clear_bits: int = 0) -> None:
        """Change bits of the command register, where they are not so yet."""
        old = self.read(dev, _COMMAND, 2)
        new = (old | set_bits) & ~clear_bits
        if new != old:
            self.write(dev, _COMMAND, new, 2)

    # -- finding --------------------------------------------------------------------------------

    def scan(self) -> None:
        """``pci_scan_root_bus``: everything behind bus 0 of segment 0, anew."""
        self.devs = []
        self._scan_child_bus(0, None)
        if self.kernel.trace is not None:
            self.kernel.emit("pci_scan_root_bus", {}, len(self.devs))

    def _keeps_numbers(self) -> bool:
        # pcibios_assign_all_busses, unless a predecessor's devices are at work.
        if self.liveupdate is not None and self.liveupdate.preserve_bus_numbers():
            return True
        return not self._assign_all

    def _scan_child_bus(self, bus: int, parent: PciDev | None) -> int:
        # pci_scan_child_bus_extend: slots, then bridges in two passes. Returns the highest number.
        found = list(self._scan_slots(bus, parent))
        bridges = [dev for dev in found if dev.is_bridge]
        highest = bus
        for is_second in (False, True):
            for dev in bridges:
                highest = self._scan_bridge(bus, dev, highest, is_second, bridges)
        return highest

    def _scan_slots(self, bus: int, parent: PciDev | None) -> Iterator[PciDev]:
        # pci_scan_slot; only_one_child: below a port there is device 0 and no other.
        for device in range(1 if parent is not None else 32):
            for function in range(8):
                bdf = Bdf(0, bus, device, function)
                if self.devices.read_config(bdf, _VENDOR, 4) in (0xFFFF_FFFF, 0):
                    if not function:
                        break
                    continue
                header = self.devices.read_config(bdf, _HEADER, 1)
                dev = PciDev(bdf, parent, bool(header & 0x7F))
                self.devs.append(dev)
                self._setup(dev)
                yield dev
                if not function and not header & 0x80:
                    break

    def _setup(self, dev: PciDev) -> None:
        # pci_setup_device
        if self.liveupdate is not None:
            self.liveupdate.setup_device(dev)
        if not dev.is_bridge:
            self._read_bases(dev)

    def _read_bases(self, dev: PciDev) -> None:
        # pci_read_bases: decoding is off while the BARs hold ones. A device that was preserved
        # keeps decoding: its sizes came with it.
        known = self.liveupdate.bar_sizes(dev) if self.liveupdate is not None else None
        if known is not None:
            dev.bars = [(self._bar(dev, i), size) for i, size in enumerate(known) if size]
            return
        command = self.read(dev, _COMMAND, 2)
        if command & PCI_COMMAND_MEMORY:
            self.write(dev, _COMMAND, command & ~PCI_COMMAND_MEMORY, 2)
        dev.bars = []
        for i in range(0, _NR_BARS, 2):
            at = self._bar(dev, i)
            for half in (0, 4):
                self.write(dev, _BAR0 + 4 * i + half, 0xFFFF_FFFF)
            mask = self._bar(dev, i)
            for half in (0, 4):
                self.write(dev, _BAR0 + 4 * i + half, at >> 8 * half & 0xFFFF_FFFF)
            if mask:
                dev.bars.append((at, -mask & (1 << 64) - 1))
        if command & PCI_COMMAND_MEMORY:
            self.write(dev, _COMMAND, command, 2)

    def _bar(self, dev: PciDev, index: int) -> int:
        low, high = (self.read(dev, _BAR0 + 4 * (index + half)) for half in (0, 1))
        return (high << 32 | low) & ~0xF

    def _scan_bridge(
        self, bus: int, dev: PciDev, highest: int, is_second: bool, bridges: list[PciDev]
    ) -> int:
        # pci_scan_bridge_extend
        buses = self.read(dev, _PRIMARY)
        primary, secondary, subordinate = (buses >> shift & 0xFF for shift in (0, 8, 16))
        keeps = self._keeps_numbers()
        broken = not is_second and (
            primary != bus or secondary <= bus or secondary > subordinate
        )
        if (secondary or subordinate) and keeps and not broken:
            if is_second:
                return highest
            dev.self_bus = secondary
            self._scan_child_bus(secondary, dev)
            return max(highest, subordinate)
        if not is_second:
            if not keeps or broken:
                self.write(dev, _PRIMARY, buses & _SEC_LATENCY_MASK)
            return highest
        if self.liveupdate is not None and self.liveupdate.refuses_numbers(dev, bridges):
            return highest
        number = highest + 1
        dev.self_bus = number
        latency = buses & _SEC_LATENCY_MASK
        self.write(dev, _PRIMARY, latency | bus | number << 8 | 0xFF << 16)
        last = self._scan_child_bus(number, dev)
        self.write(dev, _SUBORDINATE, last, 1)
        return last

    # -- resets ---------------------------------------------------------------------------------

    def reset_function(self, dev: PciDev) -> None:
        """``pci_reset_function``: function level reset, around it the state saved and restored."""
        saved = [self.read(dev, _BAR0 + 4 * i) for i in range(_NR_BARS)]
        command = self.read(dev, _COMMAND, 2)
        control = self.read(dev, _EXP_DEVCTL, 2)
        self.write(dev, _EXP_DEVCTL, control | _DEVCTL_FLR, 2)
        for i, value in enumerate(saved):
            self.write(dev, _BAR0 + 4 * i, value)
        self.write(dev, _COMMAND, command, 2)

    # -- the end --------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """``device_shutdown``: ``pci_device_shutdown`` of each function, the last found first.

        At a kexec every function stops being a bus master, but for those that are preserved.
        """
        for dev in reversed(self.devs):
            if not dev.outgoing:
                self.command(dev, clear_bits=PCI_COMMAND_MASTER)
        if self.kernel.trace is not None:
            self.kernel.emit("device_shutdown", {}, len(self.devs))


def _has_option(cmdline: str, option: str) -> bool:
    for word in cmdline.split():
        if word.startswith("pci=") and option in word.removeprefix("pci=").split(","):
            return True
    return False
