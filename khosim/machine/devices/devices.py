"""All devices of one machine, and how kernels reach them.

They know no Linux and hold plain data only. What crosses a kexec is what stands here and in RAM;
what a snapshot, an image file and a power cycle have to know is :meth:`Devices.state`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from khosim.errors import InputError
from khosim.machine.devices.amd import AmdUnit, Unit
from khosim.machine.devices.bdf import Bdf
from khosim.machine.devices.clock import Schedule, never
from khosim.machine.devices.dma import Dma
from khosim.machine.devices.engine import Engine
from khosim.machine.devices.events import DmaEvent, EventLog, HardwareEvent
from khosim.machine.devices.function import Function
from khosim.machine.devices.guarded_ram import guard
from khosim.machine.devices.interrupts import Interrupts
from khosim.machine.devices.nic import NicEngine
from khosim.machine.devices.nvme import NvmeEngine
from khosim.machine.devices.parts import Amd, Bridge, Endpoint, Part, Snp, Vtd
from khosim.machine.devices.pci import Pci
from khosim.machine.devices.snp import SecureProcessor
from khosim.machine.devices.vcpus import Vcpus
from khosim.machine.devices.vtd_registers import VtdUnit

if TYPE_CHECKING:
    from khosim.machine.ram import Ram

__all__ = ("Clock", "Devices")

_MMIO_BASE = 1 << 44
_ENGINES: dict[str, type[Engine]] = {"nic": NicEngine, "nvme": NvmeEngine, "plain": Engine}


class Clock:
    """The devices' time: ``now`` events of kernels so far, and the schedule of their steps."""

    __slots__ = ("_devices", "schedule")

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self.schedule: Schedule = never()

    @property
    def now(self) -> int:
        """How many events kernels emitted on this machine."""
        return self._devices.log.now

    def event(self) -> None:
        """A kernel emitted an event: count it, and let those act whose turn it is."""
        log = self._devices.log
        time = log.now
        log.now = time + 1
        for name in self.schedule.acting(time):
            self._devices.tick(name or None)


class Devices:
    """Put together from ``parts``; raises :class:`InputError` where they do not fit together."""

    __slots__ = (
        "_power_on",
        "_saved",
        "clock",
        "dma_fabric",
        "interrupts",
        "iommu",
        "log",
        "parts",
        "pci",
        "snp",
        "vcpus",
    )

    def __init__(
        self,
        parts: Sequence[Part],
        ram: Ram,
        is_ram: Callable[[int, int], bool],
        ram_ranges: tuple[tuple[int, int], ...],
    ) -> None:
        self.parts = tuple(parts)
        units = [part for part in parts if isinstance(part, Vtd | Amd)]
        processors = [part for part in parts if isinstance(part, Snp)]
        functions = [part for part in parts if isinstance(part, (Bridge, Endpoint))]
        if len(units) > 1 or len(processors) > 1:
            raise InputError("devices", "at most one remapping unit and one secure processor")
        if len(units) + len(processors) + len(functions) != len(parts):
            raise InputError("devices", "each is a Vtd, Amd, Bridge, Endpoint or Snp")
        self.log = EventLog()
        self.interrupts = Interrupts(ram, is_ram, self.log)
        end_phys = ram_ranges[-1][1]
        base = max(_MMIO_BASE, -(-end_phys // (1 << 40)) << 40)
        self.pci = Pci(functions, base, self.log, self.interrupts)
        self.iommu: Unit | None = None
        for unit in units:
            base = unit.base
            if base % 4096 or is_ram(base, 1):
                raise InputError("devices", f"a remapping unit at {base:#x}, which is RAM")
            common = ram, is_ram, unit.segment, self.log, unit.caches
            if isinstance(unit, Amd):
                self.iommu = AmdUnit(*common, base=base)
            else:
                self.iommu = VtdUnit(*common, base=base, send=self.interrupts.from_unit)
            self.interrupts.unit = self.iommu
        self.snp: SecureProcessor | None = None
        for processor in processors:
            self.snp = SecureProcessor(ram, end_phys, processor.asids, processor.seed, self.log)
            guard(ram, self.snp.rmp)
        self.dma_fabric = Dma(
            ram, is_ram, ram_ranges, self.pci, self.interrupts, self.iommu, self.snp, self.log
        )
        for function in self.pci.all_functions:
            if not function.is_bridge:
                function.engine = _ENGINES[function.kind](function, self.dma_fabric)
        self.vcpus = Vcpus(ram, is_ram, self.snp, self.log)
        self.clock = Clock(self)
        self._saved: dict[int, tuple[list[Any], int]] = {}
        self._power_on = self.state()

    # -- what a driver can do ---------------------------------------------------------------------

    def read_config(self, bdf: Bdf | str, offset: int, size: int = 4) -> int:
        """Read 1, 2 or 4 bytes of configuration space; all ones where nobody answers."""
        function = self.pci.find(bdf)
        _check_access("configuration space", offset, size, 4096)
        return (1 << 8 * size) - 1 if function is None else function.read_config(offset, size)

    def write_config(self, bdf: Bdf | str, offset: int, value: int, size: int = 4) -> None:
        """Write 1, 2 or 4 bytes of configuration space; nothing happens where nobody answers."""
        function = self.pci.find(bdf)
        _check_access("configuration space", offset, size, 4096)
        if function is not None:
            function.write_config(offset, value & (1 << 8 * size) - 1, size)

    def mmio_read(self, phys: int, size: int = 4) -> int:
        """Read a BAR or a register of the remapping unit; all ones where nobody answers."""
        unit = self.iommu
        if unit is not None and unit.base <= phys < unit.base + unit.size:
            return unit.read(phys - unit.base, size)
        claim = self.pci.claim(phys)
        if claim is None or phys + size > claim[1]:
            return (1 << 8 * size) - 1
        start, _, function, bar = claim
        return int.from_bytes(function.bar_read(bar, phys - start, size), "little")

    def mmio_write(self, phys: int, value: int, size: int = 4) -> None:
        """Write a BAR or a register of the remapping unit; lost where nobody answers."""
        unit = self.iommu
        if unit is not None and unit.base <= phys < unit.base + unit.size:
            unit.write(phys - unit.base, value, size)
            return
        claim = self.pci.claim(phys)
        if claim is not None and phys + size <= claim[1]:
            start, _, function, bar = claim
            data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            function.bar_write(bar, phys - start, data)

    # -- what devices do --------------------------------------------------------------------------

    def dma(
        self,
        function: Function | str,
        iova: int,
        len_bytes: int,
        data: bytes | np.ndarray[tuple[int], np.dtype[np.uint8]] | None = None,
    ) -> DmaEvent:
        """One transaction of a device by hand: a read, or a write of ``data``."""
        if isinstance(function, str):
            function = self.pci.named(function)
        if isinstance(data, bytes):
            data = np.frombuffer(data, dtype=np.uint8)
        if data is not None and len(data) != len_bytes:
            raise InputError("DMA", f"{len(data)} bytes of data for {len_bytes}")
        return self.dma_fabric.transact(function, iova, len_bytes, data)[0]

    def tick(self, name: str | None = None) -> None:
        """One step of every busy engine and running vCPU, or of the one with this name."""
        for function in self.pci.all_functions:
            engine = function.engine
            if engine is not None and engine.busy and (name is None or function.name == name):
                engine.step()
        for vcpu in self.vcpus.running:
            if name is None or vcpu == name:
                self.vcpus.step(vcpu)

    @property
    def events(self) -> list[HardwareEvent]:
        """All that happened so far."""
        return self.log.events

    def listen(self, listener: Callable[[HardwareEvent], None]) -> None:
        """Call ``listener`` with each event from now on, at its moment."""
        self.log.listeners.append(listener)

    def at_jump(self) -> None:
        """A kernel has jumped: vCPUs stop. Devices do not notice."""
        self.vcpus.stop_all()

    def power_on(self) -> None:
        """All devices as they came; the time, the schedule and the record go on."""
        now, schedule = self.log.now, self.clock.schedule
        self._restore(self._power_on)
        self.log.now, self.clock.schedule = now, schedule
        self.log.add("power", "machine", how="on")

    # -- state ------------------------------------------------------------------------------------

    def state(self) -> list[Any]:
        """All of it as plain data: numbers, strings, bytes and lists of them."""
        return [
            [self.log.now, self.clock.schedule.state()],
            self.pci.state(),
            self.interrupts.state(),
            None if self.iommu is None else self.iommu.state(),
            None if self.snp is None else self.snp.state(),
            self.vcpus.state(),
        ]

    def _restore(self, state: list[Any]) -> None:
        (self.log.now, schedule), pci, interrupts, iommu, snp, vcpus = state
        self.clock.schedule = Schedule.of_state(schedule)
        self.pci.restore(pci)
        self.interrupts.restore(interrupts)
        if self.iommu is not None:
            self.iommu.restore(iommu)
        if self.snp is not None:
            self.snp.restore(snp)
        self.vcpus.restore(vcpus)

    def snapshot(self, token: int) -> None:
        """Remember all of it under the token of the RAM's snapshot."""
        self._saved[token] = self.state(), len(self.log.events)

    def rollback(self, token: int) -> None:
        """Back to what it was then; the record too. Later snapshots are gone."""
        state, nr_events = self._saved[token]
        for later in [other for other in self._saved if other > token]:
            del self._saved[later]
        self._restore(state)
        del self.log.events[nr_events:]

    def discard(self, token: int) -> None:
        """Forget a snapshot."""
        self._saved.pop(token, None)

    def to_blob(self) -> bytes:
        """Parts and state for an image file."""
        parts = [
            [type(part).__name__, {name: getattr(part, name) for name in part.__slots__}]
            for part in self.parts
        ]
        return json.dumps([parts, self.state()], default=_encode).encode()

    @classmethod
    def from_blob(
        cls,
        blob: bytes,
        ram: Ram,
        is_ram: Callable[[int, int], bool],
        ram_ranges: tuple[tuple[int, int], ...],
    ) -> Devices:
        """The devices that :meth:`to_blob` wrote; raises :class:`InputError` for nonsense."""
        try:
            parts, state = json.loads(blob, object_hook=_decode)
            devices = cls([_part(*part) for part in parts], ram, is_ram, ram_ranges)
            devices._restore(state)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputError("devices", f"their state is damaged: {error!r}") from None
        return devices


def _check_access(place: str, offset: int, size: int, end: int) -> None:
    if size not in (1, 2, 4) or offset % size or not 0 <= offset < end:
        raise InputError(place, f"{size} bytes at {offset:#x}")


def _encode(value: object) -> object:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value.rstrip(b"\0")).decode(), "length": len(value)}
    raise TypeError(f"{type(value).__name__} is no plain data")


def _decode(value: dict[str, Any]) -> Any:
    if value.keys() == {"bytes", "length"}:
        return base64.b64decode(value["bytes"], validate=True).ljust(value["length"], b"\0")
    return value


def _part(name: str, fields: dict[str, Any]) -> Part:
    kinds: dict[str, type[Part]] = {
        "Amd": Amd,
        "Vtd": Vtd,
        "Bridge": Bridge,
        "Endpoint": Endpoint,
        "Snp": Snp,
    }
    if isinstance(fields.get("bars"), list):
        fields["bars"] = tuple(fields["bars"])
    return kinds[name](**fields)
