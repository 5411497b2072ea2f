"""One PCI function: its configuration space, BARs, MSI-X table, resets and power state.

What survives a kexec is what the bits say: nothing here asks who wrote them. Left out: the time a
reset takes, link training, hot plug, D1 and D2 as other than D0 without memory and DMA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from khosim.machine.devices.bdf import Bdf
from khosim.machine.devices.config_space import (
    ACS,
    ACS_CTL,
    ACS_REDIRECT,
    BAR,
    BRIDGE_CONTROL,
    COMMAND,
    DEVCTL,
    MASTER,
    MEMORY,
    MSIX_CTL,
    PMCSR,
    SECONDARY,
    SRIOV,
    SRIOV_CTL,
    VF_BAR,
    ConfigLayout,
)

if TYPE_CHECKING:
    from khosim.machine.devices.engine import Engine
    from khosim.machine.devices.pci import Pci

__all__ = ("BarMemory", "Function")

_PAGE = 4096
_MSIX_ENTRY_BYTES = 16


class BarMemory:
    """The memory behind one BAR: zero where never written."""

    __slots__ = ("pages",)

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}

    def read(self, offset: int, len_bytes: int) -> bytes:
        """A copy of some bytes."""
        found = bytearray()
        while len_bytes:
            page, at = divmod(offset, _PAGE)
            length = min(len_bytes, _PAGE - at)
            held = self.pages.get(page)
            found += bytes(length) if held is None else held[at : at + length]
            offset, len_bytes = offset + length, len_bytes - length
        return bytes(found)

    def write(self, offset: int, data: bytes) -> None:
        """Store some bytes."""
        at = 0
        while at < len(data):
            page, inside = divmod(offset + at, _PAGE)
            length = min(len(data) - at, _PAGE - inside)
            held = self.pages.setdefault(page, bytearray(_PAGE))
            held[inside : inside + length] = data[at : at + length]
            at += length


class Function:
    """A function as it stands in the machine.

    ``name`` is its address at power-on, which never changes; :attr:`bdf` the address now.
    ``resets`` counts resets of any kind, ``renumbered`` changes of its bus number.
    """

    __slots__ = (
        "bar_memory",
        "bar_sizes",
        "children",
        "config",
        "devfn",
        "engine",
        "is_bridge",
        "kind",
        "layout",
        "msix_pending",
        "msix_table",
        "name",
        "parent",
        "pci",
        "renumbered",
        "resets",
        "root_bus",
        "segment",
        "vf_index",
        "vf_of",
        "vfs",
        "writer",
    )

    def __init__(
        self,
        pci: Pci,
        bdf: Bdf,
        layout: ConfigLayout,
        parent: Function | None,
        *,
        kind: str,
        bar_sizes: tuple[int, ...] = (),
        msix: int = 0,
        vf_of: Function | None = None,
        vf_index: int = 0,
    ) -> None:
        self.pci = pci
        self.name = str(bdf)
        self.segment, self.root_bus, self.devfn = bdf.segment, bdf.bus, bdf.devfn
        self.layout = layout
        self.config = bytearray(layout.reset)
        self.parent = parent
        self.children: list[Function] = []
        self.kind = kind
        self.is_bridge = kind == "bridge"
        self.bar_sizes = bar_sizes
        self.bar_memory = [BarMemory() for _ in bar_sizes]
        self.msix_table = bytearray(_MSIX_ENTRY_BYTES * msix)
        self.msix_pending = 0
        self.vf_of, self.vf_index = vf_of, vf_index
        self.vfs: list[Function] = []
        self.engine: Engine | None = None
        self.resets = 0
        self.renumbered = 0
        self.writer = (-1, f"device {self.name}")
        self._mask_msix()

    def __repr__(self) -> str:
        return f"Function({self.bdf}, {self.kind})"

    # -- what the bits say ------------------------------------------------------------------------

    def _u16(self, offset: int) -> int:
        return self.config[offset] | self.config[offset + 1] << 8

    @property
    def bdf(self) -> Bdf:
        """Its address now: the bus is what the bridge above says."""
        bus = self.root_bus if self.parent is None else self.parent.config[SECONDARY]
        return Bdf(self.segment, bus, self.devfn >> 3, self.devfn & 7)

    @property
    def present(self) -> bool:
        """False for a virtual function that its physical one does not show now."""
        pf = self.vf_of
        if pf is None:
            return True
        return bool(pf._u16(SRIOV_CTL) & 1) and self.vf_index < pf._u16(SRIOV + 0x10)

    @property
    def power_state(self) -> int:
        """0 for D0 to 3 for D3hot."""
        return self.config[PMCSR] & 3

    @property
    def _path(self) -> list[Function]:
        """The bridges from here to the root complex, nearest first."""
        found, at = [], self.parent
        while at is not None:
            found.append(at)
            at = at.parent
        return found

    @property
    def memory_enabled(self) -> bool:
        """Whether it answers at its BARs (the windows of bridges aside)."""
        if self.power_state or not self.present:
            return False
        if self.vf_of is not None:
            return bool(self.vf_of._u16(SRIOV_CTL) & 8) and not self.vf_of.power_state
        return bool(self.config[COMMAND] & MEMORY)

    @property
    def bus_master(self) -> bool:
        """Whether its requests reach the root complex: the bit here and in each bridge above."""
        return bool(self.config[COMMAND] & MASTER) and all(
            bridge.config[COMMAND] & MASTER for bridge in self._path
        )

    @property
    def redirects(self) -> bool:
        """Whether ACS makes its peer-to-peer requests go upstream."""
        where = self if self.vf_of is None else self.vf_of
        return bool(where._u16(ACS) == 0x000D and where._u16(ACS_CTL) & ACS_REDIRECT)

    @property
    def bars(self) -> list[tuple[int, int]]:
        """(physical address, bytes) of each BAR, enabled or not."""
        if self.vf_of is not None:
            first = int.from_bytes(self.vf_of.config[VF_BAR : VF_BAR + 8], "little") & ~0xF
            return [(first + size * self.vf_index, size) for size in self.bar_sizes]
        found = []
        for index, size in enumerate(self.bar_sizes):
            at = BAR + 8 * index
            found.append((int.from_bytes(self.config[at : at + 8], "little") & ~0xF, size))
        return found

    @property
    def window(self) -> tuple[int, int]:
        """[start, end) of what a bridge forwards to its other side; empty when disabled."""
        config = self.config
        base = (self._u16(0x24) & 0xFFF0) << 16 | int.from_bytes(config[0x28:0x2C], "little") << 32
        limit = (self._u16(0x26) & 0xFFF0) << 16 | int.from_bytes(config[0x2C:0x30], "little") << 32
        end = limit + (1 << 20)
        if not config[COMMAND] & MEMORY or self.power_state or base >= end:
            return 0, 0
        return base, end

    # -- configuration accesses -------------------------------------------------------------------

    def read_config(self, offset: int, size: int) -> int:
        """A little-endian number of ``size`` bytes."""
        return int.from_bytes(self.config[offset : offset + size], "little")

    def write_config(self, offset: int, value: int, size: int) -> None:
        """Write what can be written, and do what these bits ask for."""
        end = offset + size
        old = int.from_bytes(self.config[offset:end], "little")
        mask = int.from_bytes(self.layout.writable[offset:end], "little")
        clears = int.from_bytes(self.layout.write_one_clears[offset:end], "little")
        new = (old & ~mask | value & mask) & ~(value & clears)
        asks = offset <= DEVCTL + 1 < end and value >> (DEVCTL + 1 - offset) * 8 & 0x80
        if asks and self.config[DEVCTL - 1] & 0x10:  # it can do a function level reset
            self.reset("flr")
            return
        if new == old:
            return
        was_power, was_bus = self.power_state, self.config[SECONDARY]
        was_held = self.config[BRIDGE_CONTROL] & 0x40
        was_masked = self._msix_masked
        self.config[offset:end] = new.to_bytes(size, "little")
        self.pci.changed()
        if self.is_bridge:
            if self.config[SECONDARY] != was_bus:
                self.pci.renumber(self, was_bus)
            if self.config[BRIDGE_CONTROL] & 0x40 and not was_held:
                self.pci.hot_reset(self)
        if self.power_state != was_power:
            self.pci.log.add("power", self.name, old=was_power, new=self.power_state)
            if was_power == 3 and not self.power_state:
                self.reset("d3hot")
        elif was_masked and not self._msix_masked:
            self.send_pending()

    # -- resets -----------------------------------------------------------------------------------

    def reset(self, how: str) -> None:
        """Back to the state after power-on, unprogrammed: "flr", "bus", "d3hot"."""
        self.config[:] = self.layout.reset
        self._mask_msix()
        self.msix_pending = 0
        for memory in self.bar_memory:
            memory.pages.clear()
        if self.engine is not None:
            self.engine.reset()
        self.resets += 1
        self.pci.changed()
        self.pci.log.add("reset", self.name, how=how)
        for vf in self.vfs:
            if vf.engine is not None:
                vf.engine.reset()
            vf.config[:] = vf.layout.reset
            vf._mask_msix()

    # -- BARs -------------------------------------------------------------------------------------

    def bar_read(self, bar: int, offset: int, len_bytes: int) -> bytes:
        """What a read of a BAR gives."""
        if bar == 0 and self.msix_table:
            at = offset - self.bar_sizes[0] // 2
            if 0 <= at <= len(self.msix_table) - len_bytes:
                return bytes(self.msix_table[at : at + len_bytes])
            at = offset - self.bar_sizes[0] // 4 * 3
            if 0 <= at <= 8 - len_bytes:
                return self.msix_pending.to_bytes(8, "little")[at : at + len_bytes]
        if bar == 0 and self.engine is not None and self.engine.has_registers:
            value = self.engine.read_register(offset, len_bytes)
            return (value & (1 << 8 * len_bytes) - 1).to_bytes(len_bytes, "little")
        return self.bar_memory[bar].read(offset, len_bytes)

    def bar_write(self, bar: int, offset: int, data: bytes) -> None:
        """A write to a BAR."""
        at = offset - self.bar_sizes[0] // 2
        if bar == 0 and 0 <= at <= len(self.msix_table) - len(data):
            self.msix_table[at : at + len(data)] = data
            self.send_pending()
        elif bar == 0 and self.engine is not None and self.engine.has_registers:
            self.engine.write_register(offset, int.from_bytes(data, "little"), len(data))
        else:
            self.bar_memory[bar].write(offset, data)

    # -- MSI-X ------------------------------------------------------------------------------------

    def _mask_msix(self) -> None:
        self.msix_table[:] = bytes(len(self.msix_table))
        for at in range(12, len(self.msix_table), _MSIX_ENTRY_BYTES):
            self.msix_table[at] = 1

    @property
    def _msix_masked(self) -> bool:
        return bool(self.config[MSIX_CTL + 1] & 0x40)

    def msix(self, entry: int) -> str:
        """Raise one interrupt: what became of it, as :class:`Interrupts` names it."""
        interrupts = self.pci.interrupts
        if not self.msix_table or not self.config[MSIX_CTL + 1] & 0x80:
            return interrupts.disabled(self, entry)
        at = _MSIX_ENTRY_BYTES * entry
        if self._msix_masked or self.msix_table[at + 12] & 1:
            self.msix_pending |= 1 << entry
            return interrupts.masked(self, entry)
        address = int.from_bytes(self.msix_table[at : at + 8], "little")
        data = int.from_bytes(self.msix_table[at + 8 : at + 12], "little")
        return interrupts.message(self, entry, address, data)

    def send_pending(self) -> None:
        """Send what was held back and is not masked any more."""
        pending, self.msix_pending = self.msix_pending, 0
        entry = 0
        while pending:
            if pending & 1:
                self.pci.interrupts.unmasked(self, entry)
                self.msix(entry)
            pending >>= 1
            entry += 1

    # -- state ------------------------------------------------------------------------------------

    def state(self) -> list[Any]:
        """All of it as plain data."""
        memory = [
            [bar, page, bytes(held)]
            for bar, behind in enumerate(self.bar_memory)
            for page, held in sorted(behind.pages.items())
        ]
        engine = None if self.engine is None else self.engine.state()
        counts = [self.msix_pending, self.resets, self.renumbered]
        return [bytes(self.config), bytes(self.msix_table), counts, memory, engine]

    def restore(self, state: list[Any]) -> None:
        """Become what :meth:`state` described."""
        config, table, counts, memory, engine = state
        self.config[:] = config
        self.msix_table[:] = table
        self.msix_pending, self.resets, self.renumbered = counts
        for behind in self.bar_memory:
            behind.pages.clear()
        for bar, page, held in memory:
            self.bar_memory[bar].pages[page] = bytearray(held)
        if self.engine is not None:
            self.engine.restore(engine)
