"""Guests that run: virtual CPUs that go on writing their memory while nobody stops them.

A host maps guest-physical ranges to physical ones (its nested page tables, taken here as a list of
ranges at the moment of VMRUN) and runs a vCPU under an ASID. Writes of a guest are checked against
the reverse map table and encrypted with its key. Without a kernel nobody runs VMRUN: at a jump
every vCPU stops. Left out: instructions, registers, nested page tables in memory, shared pages of
an encrypted guest (all its memory is private).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from khosim.errors import InputError
from khosim.machine.devices.cipher import scramble
from khosim.machine.devices.engine import fill
from khosim.machine.devices.events import EventLog
from khosim.machine.devices.snp import SecureProcessor
from khosim.machine.ram import Ram

__all__ = ("GuestWrite", "Vcpus")

GuestMap = tuple[tuple[int, int, int], ...]
"""(guest-physical address, physical address, bytes) of each range."""


class GuestWrite(NamedTuple):
    """One step of a guest's program."""

    gpa: int
    len_bytes: int
    pattern: int = 0


class _Vcpu:
    __slots__ = ("asid", "maps", "program", "steps")

    def __init__(
        self, maps: GuestMap, asid: int, program: tuple[GuestWrite, ...], steps: int
    ) -> None:
        self.maps, self.asid, self.program, self.steps = maps, asid, program, steps


class GuestFault(Exception):
    """Why a guest cannot go on: a nested page fault. Never leaves this module's callers."""


class Vcpus:
    """All virtual CPUs that run now. ``exits`` are the (time, name, why) of those that stopped."""

    __slots__ = ("_running", "exits", "is_ram", "log", "ram", "snp", "stopped_by_jump")

    def __init__(self, ram: Ram, is_ram: Any, snp: SecureProcessor | None, log: EventLog) -> None:
        self.ram, self.is_ram, self.snp, self.log = ram, is_ram, snp, log
        self._running: dict[str, _Vcpu] = {}
        self.exits: list[tuple[int, str, str]] = []
        self.stopped_by_jump = 0

    @property
    def running(self) -> list[str]:
        """The names of those that run."""
        return list(self._running)

    def enter(
        self,
        name: str,
        maps: Iterable[tuple[int, int, int]],
        *,
        asid: int = 0,
        program: Iterable[GuestWrite] = (),
        steps: int = 0,
    ) -> None:
        """Run a vCPU: at each tick its program's next write. ``steps``: how many it did before."""
        whole = tuple((int(gpa), int(phys), int(size)) for gpa, phys, size in maps)
        writes = tuple(GuestWrite(*write) for write in program)
        self._running[name] = _Vcpu(whole, asid, writes, steps)
        self.log.add("vcpu", name, how="enter", asid=asid)

    def stop(self, name: str, why: str = "stopped") -> int:
        """Stop it and return how many steps it did; :class:`InputError` if it does not run."""
        if name not in self._running:
            raise InputError("vCPU", f"{name} does not run")
        steps = self._running.pop(name).steps
        self.exits.append((self.log.now, name, why))
        self.log.add("vcpu", name, how=why)
        return steps

    def stop_all(self) -> None:
        """The jump: nobody runs them any more."""
        for name in self.running:
            self.stop(name, "jump")
            self.stopped_by_jump += 1

    def step(self, name: str) -> None:
        """One write; a nested page fault stops the vCPU."""
        vcpu = self._running[name]
        if not vcpu.program:
            return
        write = vcpu.program[vcpu.steps % len(vcpu.program)]
        vcpu.steps += 1
        data = fill(write.pattern, vcpu.steps, write.len_bytes).tobytes()
        try:
            self._write(vcpu.maps, vcpu.asid, write.gpa, data, (-1, f"vcpu {name}"))
        except GuestFault as fault:
            self.stop(name, str(fault))

    # -- memory as a guest sees it ----------------------------------------------------------------

    def write_guest(
        self, maps: Iterable[tuple[int, int, int]], asid: int, gpa: int, data: bytes
    ) -> str:
        """A guest's write: "" or why it faults (what lies before the fault is written)."""
        try:
            self._write(tuple(maps), asid, gpa, data, (-1, "guest"))
        except GuestFault as fault:
            return str(fault)
        return ""

    def read_guest(
        self, maps: Iterable[tuple[int, int, int]], asid: int, gpa: int, len_bytes: int
    ) -> bytes:
        """What a guest reads; :class:`InputError` where it would fault."""
        found = bytearray()
        try:
            for phys, length in self._resolve(tuple(maps), asid, gpa, len_bytes):
                piece = self.ram.read(phys, length)
                key = self._key(asid)
                found += piece if key is None else scramble(key, phys, piece)
        except GuestFault as fault:
            raise InputError("guest memory", str(fault)) from None
        return bytes(found)

    def _key(self, asid: int) -> int | None:
        if not asid:
            return None
        key = None if self.snp is None else self.snp.key_of(asid)
        if key is None:
            raise GuestFault(f"no key for ASID {asid}")
        return key

    def _resolve(
        self, maps: GuestMap, asid: int, gpa: int, len_bytes: int
    ) -> list[tuple[int, int]]:
        pieces: list[tuple[int, int]] = []
        at, end = gpa, gpa + len_bytes
        while at < end:
            for start, phys, size in maps:
                if start <= at < start + size:
                    length, where = min(end, start + size) - at, phys + at - start
                    break
            else:
                raise GuestFault(f"nested page fault at {at:#x}")
            if not self.is_ram(where, length):
                raise GuestFault(f"no memory behind {at:#x}")
            if self.snp is not None and self.snp.enabled:
                why = self._rmp(asid, at, where, length)
                if why:
                    raise GuestFault(f"RMP fault at {at:#x}: {why}")
            pieces.append((where, length))
            at += length
        return pieces

    def _rmp(self, asid: int, gpa: int, phys: int, length: int) -> str:
        assert self.snp is not None
        if asid:
            return self.snp.rmp.guest_may(asid, gpa, phys, length)
        where = self.snp.rmp.first_assigned(phys, length)
        return "" if where == phys + length else f"page {where & ~0xFFF:#x} is assigned"

    def _write(self, maps: GuestMap, asid: int, gpa: int, data: bytes, by: tuple[int, str]) -> None:
        at = 0
        for phys, length in self._resolve(maps, asid, gpa, len(data)):
            piece = data[at : at + length]
            key = self._key(asid)
            Ram.write(self.ram, phys, piece if key is None else scramble(key, phys, piece), by)
            at += length

    # -- state ------------------------------------------------------------------------------------

    def state(self) -> list[Any]:
        """All of it as plain data."""
        running = [
            [name, [*map(list, vcpu.maps)], vcpu.asid, [*map(list, vcpu.program)], vcpu.steps]
            for name, vcpu in self._running.items()
        ]
        return [running, self.stopped_by_jump, len(self.exits)]

    def restore(self, state: list[Any]) -> None:
        """Become what :meth:`state` described."""
        running, self.stopped_by_jump, nr_exits = state
        self._running = {
            name: _Vcpu(
                tuple((gpa, phys, size) for gpa, phys, size in maps),
                asid,
                tuple(GuestWrite(*write) for write in program),
                steps,
            )
            for name, maps, asid, program, steps in running
        }
        del self.exits[nr_exits:]
