"""PCI buses: who is where, who forwards what, and what firmware programs before the first kernel.

Firmware gives every BAR an address and every bridge its numbers and window, and enables the
bridges; functions come up with memory and bus master off, as drivers expect. Bus numbers are what
the bridges' registers say at each moment. Left out: root complexes with more than one host bridge
window, non-prefetchable windows (they stay shut), I/O space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from khosim.errors import InputError
from khosim.machine.devices.bdf import Bdf
from khosim.machine.devices.config_space import (
    BAR,
    COMMAND,
    MASTER,
    MEMORY,
    SECONDARY,
    VF_BAR,
    bridge_layout,
    endpoint_layout,
    vf_layout,
)
from khosim.machine.devices.events import EventLog
from khosim.machine.devices.function import Function
from khosim.machine.devices.parts import KINDS, Bridge, Endpoint

if TYPE_CHECKING:
    from khosim.machine.devices.interrupts import Interrupts

__all__ = ("Pci",)

_MIB = 1 << 20
_VF_OFFSET, _VF_BAR_BYTES = 16, 1 << 14
_DEFAULTS: dict[str, tuple[int, int, tuple[int, ...]]] = {  # device id, class code, BARs
    "nic": (0x10D3, 0x020000, (1 << 17,)),
    "nvme": (0x5845, 0x010802, (1 << 14,)),
    "plain": (0x10F0, 0x088000, (1 << 16,)),
}


class Pci:
    """All functions of one machine. ``all_functions`` also has the hidden virtual ones."""

    __slots__ = (
        "_by_rid",
        "_windows",
        "all_functions",
        "interrupts",
        "log",
        "roots",
    )

    def __init__(
        self,
        parts: Sequence[Bridge | Endpoint],
        mmio_base: int,
        log: EventLog,
        interrupts: Interrupts,
    ) -> None:
        self.log = log
        self.interrupts = interrupts
        self.all_functions: list[Function] = []
        self.roots: list[Function] = []
        self._by_rid: dict[tuple[int, int], Function] | None = None
        self._windows: list[tuple[int, int, Function, int]] | None = None
        self._build(parts)
        at = mmio_base
        for function in self.roots:
            at = self._assign(function, at)

    # -- who is there -----------------------------------------------------------------------------

    @property
    def functions(self) -> list[Function]:
        """Every function that can be seen now, bridges included, in the order of their names."""
        return [function for function in self.all_functions if function.present]

    @property
    def bridges(self) -> list[Function]:
        """The bridges."""
        return [function for function in self.all_functions if function.is_bridge]

    def named(self, name: str) -> Function:
        """The function that had this address at power-on."""
        for function in self.all_functions:
            if function.name == name:
                return function
        raise InputError("PCI function", f"there is no {name}")

    def find(self, bdf: Bdf | str) -> Function | None:
        """Who answers to configuration accesses at this address now."""
        if isinstance(bdf, str):
            bdf = Bdf.parse(bdf)
        if self._by_rid is None:
            self._by_rid = {}
            for root in self.roots:
                self._enter(root, root.root_bus, (0, 255))
        return self._by_rid.get((bdf.segment, bdf.rid))

    def _enter(self, function: Function, bus: int, buses: tuple[int, int]) -> None:
        assert self._by_rid is not None
        self._by_rid.setdefault((function.segment, bus << 8 | function.devfn), function)
        for vf in function.vfs:
            if vf.present:
                self._by_rid.setdefault((vf.segment, bus << 8 | vf.devfn), vf)
        if function.is_bridge:
            low, high = function.config[SECONDARY], function.config[SECONDARY + 1]
            if buses[0] <= low <= high <= buses[1] and low != bus:
                for child in function.children:
                    self._enter(child, low, (low + 1, high) if child.is_bridge else (low, high))

    def changed(self) -> None:
        """Some register that routes was written."""
        self._by_rid = None
        self._windows = None

    # -- memory -----------------------------------------------------------------------------------

    def claim(self, phys: int) -> tuple[int, int, Function, int] | None:
        """The enabled BAR at a physical address: (start, end, function, BAR)."""
        if self._windows is None:
            self._windows = []
            for root in self.roots:
                self._collect(root, (0, 1 << 64))
        for found in self._windows:
            if found[0] <= phys < found[1]:
                return found
        return None

    def _collect(self, function: Function, window: tuple[int, int]) -> None:
        assert self._windows is not None
        for one in (function, *function.vfs):
            if one.memory_enabled:
                for bar, (start, size) in enumerate(one.bars):
                    if window[0] <= start and start + size <= window[1]:
                        self._windows.append((start, start + size, one, bar))
        if function.is_bridge:
            start, end = function.window
            inner = max(start, window[0]), min(end, window[1])
            if inner[0] < inner[1]:
                for child in function.children:
                    self._collect(child, inner)

    def goes_direct(self, requester: Function, target: Function) -> bool:
        """Whether a request reaches a peer without passing the root complex.

        That is so below a common bridge, unless ACS of the port on the requester's side redirects
        it (``include/uapi/linux/pci_regs.h:PCI_ACS_RR @ 7.3``).
        """
        above, at = set(), target.parent
        while at is not None:
            above.add(at.name)
            at = at.parent
        port = requester
        while port.parent is not None:
            if port.parent.name in above:
                return not port.redirects
            port = port.parent
        return False

    # -- what happens to them ---------------------------------------------------------------------

    def renumber(self, bridge: Function, old_bus: int) -> None:
        """A bridge has a new secondary bus number: so have the functions right behind it."""
        for child in bridge.children:
            for function in (child, *child.vfs):
                if function.present:
                    function.renumbered += 1
                    new = function.bdf
                    old = new._replace(bus=old_bus)
                    self.log.add("renumbered", function.name, old=str(old), new=str(new))

    def hot_reset(self, bridge: Function) -> None:
        """A reset of the bus behind a bridge, and of all buses behind that one."""
        for child in bridge.children:
            if child.is_bridge:
                self.hot_reset(child)
            child.reset("bus")

    # -- how they came to be ----------------------------------------------------------------------

    def _build(self, parts: Sequence[Bridge | Endpoint]) -> None:
        behind: dict[tuple[int, int], Bridge] = {}
        taken: set[Bdf] = set()
        for part in parts:
            bdf = Bdf.parse(part.bdf)
            if bdf in taken:
                raise InputError("devices", f"two of them at {bdf}")
            taken.add(bdf)
            if isinstance(part, Bridge):
                if not bdf.bus < part.secondary <= (part.subordinate or part.secondary) < 256:
                    raise InputError("devices", f"bus numbers of the bridge at {bdf}")
                if behind.setdefault((bdf.segment, part.secondary), part) is not part:
                    raise InputError("devices", f"two bridges to bus {part.secondary:#04x}")
        made: dict[Bdf, Function] = {}
        crowded = {(bdf.segment, bdf.bus, bdf.device) for bdf in taken if bdf.function}
        for part in sorted(parts, key=lambda part: Bdf.parse(part.bdf)):
            bdf = Bdf.parse(part.bdf)
            over = behind.get((bdf.segment, bdf.bus))
            parent = None if over is None else made[Bdf.parse(over.bdf)]
            number = len(self.all_functions) + 1
            is_crowded = (bdf.segment, bdf.bus, bdf.device) in crowded
            if isinstance(part, Bridge):
                layout = bridge_layout(0x8086, 0x3420, number, multifunction=is_crowded)
                function = Function(self, bdf, layout, parent, kind="bridge")
                config = function.config
                config[0x18], config[0x19] = bdf.bus, part.secondary
                config[0x1A] = part.subordinate or part.secondary
                config[COMMAND] = MEMORY | MASTER
                self.all_functions.append(function)
            else:
                function = self._endpoint(part, bdf, parent, number, is_crowded)
                for vf in function.vfs:
                    if vf.bdf in taken:
                        raise InputError("devices", f"{bdf} has a virtual function at {vf.bdf}")
                    taken.add(vf.bdf)
            made[bdf] = function
            (self.roots if parent is None else parent.children).append(function)

    def _endpoint(
        self, part: Endpoint, bdf: Bdf, parent: Function | None, serial: int, is_crowded: bool
    ) -> Function:
        if part.kind not in KINDS:
            raise InputError(f"device {bdf}", f"kind {part.kind!r} is none of {', '.join(KINDS)}")
        device, class_code, bars = _DEFAULTS[part.kind]
        if part.bars is not None:
            bars = part.bars
        if len(bars) > 3 or any(size < 1 << 14 or size & size - 1 for size in bars):
            raise InputError(f"device {bdf}", "at most 3 BARs, powers of two from 16 KiB on")
        msix = part.msix if bars else 0
        if not 0 <= msix <= 64 or not 0 <= part.vfs <= 255 - _VF_OFFSET - bdf.devfn:
            raise InputError(f"device {bdf}", "too many MSI-X entries or virtual functions")
        layout = endpoint_layout(
            part.vendor,
            part.device if part.device is not None else device,
            class_code,
            bars,
            msix=msix,
            acs=part.acs,
            vfs=part.vfs,
            vf_offset=_VF_OFFSET,
            vf_bar=_VF_BAR_BYTES,
            multifunction=is_crowded,
            serial=serial,
        )
        function = Function(self, bdf, layout, parent, kind=part.kind, bar_sizes=bars, msix=msix)
        self.all_functions.append(function)
        for index in range(part.vfs):
            vf = Function(
                self,
                Bdf.of_rid(bdf.segment, bdf.rid + _VF_OFFSET + index),
                vf_layout(1, _VF_BAR_BYTES),
                parent,
                kind="plain",
                bar_sizes=(_VF_BAR_BYTES,),
                msix=1,
                vf_of=function,
                vf_index=index,
            )
            function.vfs.append(vf)
            self.all_functions.append(vf)
        return function

    def _assign(self, function: Function, at: int) -> int:
        """Firmware's BARs and windows, from an address on; returns the next free one."""
        config = function.config
        for index, size in enumerate(function.bar_sizes):
            at = -(-at // size) * size
            value = at | config[BAR + 8 * index] & 0xF
            config[BAR + 8 * index : BAR + 8 * index + 8] = value.to_bytes(8, "little")
            at += size
        if function.vfs:
            at = -(-at // _VF_BAR_BYTES) * _VF_BAR_BYTES
            config[VF_BAR : VF_BAR + 8] = (at | 0xC).to_bytes(8, "little")
            at += _VF_BAR_BYTES * len(function.vfs)
        if function.is_bridge:
            start = at = -(-at // _MIB) * _MIB
            for child in function.children:
                at = self._assign(child, at)
            at = max(start + _MIB, -(-at // _MIB) * _MIB)
            last = at - _MIB
            config[0x24:0x26] = (start >> 16 & 0xFFF0 | 1).to_bytes(2, "little")
            config[0x26:0x28] = (last >> 16 & 0xFFF0 | 1).to_bytes(2, "little")
            config[0x28:0x2C] = (start >> 32).to_bytes(4, "little")
            config[0x2C:0x30] = (last >> 32).to_bytes(4, "little")
        return at

    def state(self) -> list[Any]:
        """All of it as plain data."""
        return [function.state() for function in self.all_functions]

    def restore(self, state: list[Any]) -> None:
        """Become what :meth:`state` described."""
        for function, saved in zip(self.all_functions, state, strict=True):
            function.restore(saved)
        self.changed()
