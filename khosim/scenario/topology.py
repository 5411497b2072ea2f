"""Devices of a scenario's machine: names for people, and a root port for each of them.

Stands beside the kernel: what firmware and board makers decide. Function n is alone behind the port
that is function n // 31 of device 1 + n % 31 on bus 0, on bus 0x10 + n.
"""

from __future__ import annotations

import dataclasses

from khosim.machine.devices import Amd, Bridge, Endpoint, Part, Snp, Vtd
from khosim.machine.devices.parts import KINDS
from khosim.scenario.fields import Table

__all__ = ("MAX_DEVICES", "Topology", "read_topology")

MAX_DEVICES = 200
_FIRST_BUS = 0x10


@dataclasses.dataclass(frozen=True, slots=True)
class Topology:
    """``parts`` of the machine, and the PCI address of each device by its name."""

    parts: tuple[Part, ...] = ()
    names: dict[str, str] = dataclasses.field(default_factory=dict)


def read_topology(table: Table, arch: str) -> Topology:
    """``devices``, ``iommu`` and ``snp`` of a ``[machine]`` table."""
    names: dict[str, str] = {}
    ports: list[Part] = []
    for number, value in enumerate(table.items("devices", MAX_DEVICES), 1):
        device = Table(value, f"{table.place}: devices, entry {number}")
        name = device.name("name")
        kind = device.choice("kind", KINDS, "plain")
        count = device.integer("count", 1, 1, MAX_DEVICES)
        bar = device.size("bar", low=1 << 14, high=1 << 30)
        device.done()
        if bar is not None and bar & bar - 1:
            raise device.error("bar: not a power of two")
        for i in range(count):
            each = name if count == 1 else f"{name}{i}"
            if each in names or len(names) == MAX_DEVICES:
                many = f"more than {MAX_DEVICES} devices"
                raise device.error(f"name: two of {each!r}" if each in names else many)
            bus = _FIRST_BUS + len(names)
            port = f"0000:00:{1 + len(names) % 31:02x}.{len(names) // 31}"
            names[each] = f"0000:{bus:02x}:00.0"
            ports.append(Bridge(port, secondary=bus))
            ports.append(Endpoint(names[each], kind=kind, bars=None if bar is None else (bar,)))
    unit = table.choice_or_flag("iommu", ("vtd", "amd"), bool(names) and arch == "x86_64")
    units: dict[str, list[Part]] = {"": [], "vtd": [Vtd()], "amd": [Amd()]}
    has_snp = table.flag("snp")
    for key, found in (("iommu", unit), ("snp", has_snp)):
        if found and arch != "x86_64":
            raise table.error(f"{key}: none stands in a machine of {arch} here")
    parts = units[unit] + ports + ([Snp()] if has_snp else [])
    return Topology(tuple(parts), names)
