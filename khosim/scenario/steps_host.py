"""Steps of a host of guests with devices: start them, assign devices, carry them across.

Each goes through the drivers' calls (:mod:`khosim.drivers`) as a VMM would. What devices do is the
machine's (:mod:`khosim.machine.devices`): they have programmes of transfers, and act when the clock
says so.
"""

from __future__ import annotations

import dataclasses
import errno
from typing import TYPE_CHECKING, ClassVar

from khosim.drivers.vmm import GUEST_BASE, Vmm, VmmPlan
from khosim.machine.devices import Transfer, at, every, never, seeded
from khosim.scenario.contents import first_keys
from khosim.scenario.fields import Table, did_you_mean
from khosim.scenario.files import Guest
from khosim.scenario.hosts import VmNote
from khosim.scenario.model import Limits, StepFact
from khosim.scenario.steps_base import StepBase
from khosim.scenario.steps_guest import file_name

if TYPE_CHECKING:
    from khosim.drivers.vfio_pci import VfioDeviceFile
    from khosim.kernel.release import Release
    from khosim.machine.devices import Devices, Schedule
    from khosim.scenario.play import Player

__all__ = ("Assign", "Clock", "Misbehave", "Peer", "PreserveVm", "ResumeVm", "Tick", "VmStep")

_PAGE = 4096
_MAX_BUFFERS = 64
_MAX_VCPUS = 64
_MAX_TICKS = 100_000
_MAX_EVENT = 1 << 32
_ELSEWHERE = 1 << 46
_PEER_BASE = 1 << 45


def _vm_name(table: Table, key: str, limits: Limits) -> str:
    name = table.text(key)
    if name not in limits.vms:
        close = did_you_mean(name, limits.vms)
        raise table.error(f"{key}: no step before this starts a machine {name!r}{close}")
    return name


def _device_name(table: Table, key: str, limits: Limits) -> str:
    name = table.text(key)
    if name not in limits.devices:
        raise table.error(f"{key}: the machine has no {name!r}{did_you_mean(name, limits.devices)}")
    return name


def _devices(player: Player, place: str) -> Devices:
    devices = player.machine.hardware.devices
    if devices is None:
        raise player.error(place, "this machine has no devices")
    return devices


def _running(player: Player, name: str, place: str) -> tuple[VmNote, Vmm]:
    note = player.vms.get(name)
    if note is None or note.vmm is None:
        raise player.error(place, f"the machine {name!r} does not run here")
    return note, note.vmm


def _device_file(player: Player, name: str, place: str) -> tuple[VmNote, VfioDeviceFile]:
    for note in player.vms.values():
        if note.vmm is not None and name in note.vmm.devices:
            return note, note.vmm.devices[name]
    raise player.error(place, f"{name!r} is nobody's here")


def _free_page(player: Player, note: VmNote, place: str) -> int:
    gpa = note.free_gpa(_PAGE)
    if gpa is None:
        raise player.error(place, f"{note.memory.name!r} has no page left that nobody writes to")
    return gpa


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VmStep(StepBase):
    """Start a virtual machine around the memory of a guest: its vCPUs run from now on."""

    do: ClassVar[str] = "vm"
    memory: str
    vcpus: int
    encrypted: bool
    gpa: int

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> VmStep:
        """Read the step."""
        name = table.name("name")
        if name in limits.vms or name in limits.files:
            raise table.error(f"name: {name!r} names something else; choose another")
        limits.vms.add(name)
        gpa = table.size("gpa", high=1 << 47)
        return cls(
            **cls.common(table, limits, name=name),
            memory=file_name(table, "memory", limits),
            vcpus=table.integer("vcpus", 1, 1, _MAX_VCPUS),
            encrypted=table.flag("encrypted"),
            gpa=GUEST_BASE if gpa is None else gpa,
        )

    def run(self, player: Player) -> StepFact:
        """``KVM_CREATE_VM``, memory, vCPUs; raises the kernel's refusals."""
        (guest,) = player.carried(self.memory, self.place)
        memfd = guest.memfd if isinstance(guest, Guest) else None
        if not isinstance(guest, Guest) or memfd is None:
            raise player.error(self.place, f"{self.memory!r} is no guest's memory")
        plan = VmmPlan(self.name, self.gpa, self.encrypted, ())
        note = VmNote(plan, guest)
        keys = first_keys(player.seed, f"{self.name}:{player.serial()}", self.vcpus)
        pages = [_free_page(player, note, self.place) for _ in keys]
        programmes = tuple(
            ((page, _PAGE, int(key)),) for page, key in zip(pages, keys, strict=True)
        )
        note.plan = plan._replace(programmes=programmes)
        note.vmm = Vmm.start(player.kernel, note.plan, memfd)
        player.vms[self.name] = note
        kind = "encrypted, " if self.encrypted else ""
        return StepFact(self.vcpus, guest.size, f"{kind}around {self.memory}", "vCPU")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Assign(StepBase):
    """Give a machine a device, which goes on reading and writing its memory from now on."""

    do: ClassVar[str] = "assign"
    device: str
    buffers: int

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Assign:
        """Read the step."""
        return cls(
            **cls.common(table, limits, name=_vm_name(table, "vm", limits)),
            device=_device_name(table, "device", limits),
            buffers=table.integer("buffers", 4, 1, _MAX_BUFFERS),
        )

    def run(self, player: Player) -> StepFact:
        """Open, attach, interrupts, bus master; then its programme. Raises the refusals."""
        note, vmm = _running(player, self.name, self.place)
        devices = _devices(player, self.place)
        bdf = player.scenario.devices[self.device]
        vmm.assign(self.device, bdf)
        keys = first_keys(player.seed, f"{self.device}:{player.serial()}", self.buffers)
        transfers = [
            Transfer(_free_page(player, note, self.place), _PAGE, i % 4 != 3, int(key))
            for i, key in enumerate(keys)
        ]
        engine = devices.pci.named(bdf).engine
        assert engine is not None
        engine.program(transfers)
        text = f"{self.device} at {bdf} to {self.name}"
        return StepFact(self.buffers, self.buffers * _PAGE, text, "buffer")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peer(StepBase):
    """Let a device write to the first BAR of another one of the same machine."""

    do: ClassVar[str] = "peer"
    to: str

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Peer:
        """Read the step."""
        return cls(
            **cls.common(table, limits, name=_device_name(table, "device", limits)),
            to=_device_name(table, "to", limits),
        )

    def run(self, player: Player) -> StepFact:
        """Map the BAR, and add a transfer to the device's programme."""
        note, _ = _device_file(player, self.name, self.place)
        _, peer = _device_file(player, self.to, self.place)
        assert note.vmm is not None
        if peer.name not in {file.name for file in note.vmm.devices.values()}:
            raise player.error(self.place, f"{self.to!r} belongs to another machine")
        iova = _PEER_BASE + (list(player.scenario.devices).index(self.to) << 31)
        note.vmm.map_peer(iova, peer)
        engine = _devices(player, self.place).pci.named(player.scenario.devices[self.name]).engine
        assert engine is not None
        engine.program([*engine.transfers, Transfer(iova, 64, True, 0x5A)])
        return StepFact(1, 64, f"{self.name} to {self.to}", "transfer")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Misbehave(StepBase):
    """A device does what nobody told it: it writes to an address that is not mapped.

    With ``refuses`` it behaves, but answers ``freeze`` with that errno; ``""`` takes that back.
    """

    do: ClassVar[str] = "misbehave"
    iova: int | None
    refuses: int | None

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Misbehave:
        """Read the step."""
        refuses = None
        if table.has("refuses"):
            word = table.text("refuses")
            refuses = getattr(errno, word, 0) if word.startswith("E") else 0
            if word and not refuses:
                raise table.error(f"refuses: {word!r} is not the name of an errno")
        iova = table.size("iova", high=1 << 47)
        if iova is None and refuses is None:
            iova = _ELSEWHERE
        return cls(
            **cls.common(table, limits, name=_device_name(table, "device", limits)),
            iova=iova,
            refuses=refuses,
        )

    def run(self, player: Player) -> StepFact:
        """Add the transfer to its programme, or note the answer."""
        if self.refuses is not None:
            _, file = _device_file(player, self.name, self.place)
            file.refuses_freeze = self.refuses
            name = errno.errorcode.get(self.refuses, "")
            return StepFact(0, 0, f"{self.name} refuses with {name}" if name else "ready")
        assert self.iova is not None
        engine = _devices(player, self.place).pci.named(player.scenario.devices[self.name]).engine
        assert engine is not None
        engine.program([*engine.transfers, Transfer(self.iova, 64, True, 0xBAD)])
        return StepFact(1, 64, f"to {self.iova:#x}", "transfer")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Clock(StepBase):
    """When devices act by themselves: every so many events of kernels, by chance, or at some."""

    do: ClassVar[str] = "clock"
    schedule: Schedule

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Clock:
        """Read the step: one of ``every``, ``chance`` and ``at``; none of them stops the clock."""
        given = [key for key in ("every", "chance", "at") if table.has(key)]
        if len(given) > 1:
            raise table.error(f"{given[1]!r} does not go together with {given[0]!r}")
        schedule = never()
        if given == ["every"]:
            schedule = every(table.integer("every", None, 1, _MAX_EVENT))
        elif given == ["chance"]:
            schedule = seeded(limits.seed, table.fraction("chance", 0.5))
        elif given == ["at"]:
            read = [table.whole("at", value, 0, _MAX_EVENT) for value in table.items("at", 10_000)]
            schedule = at(read)
        return cls(**cls.common(table, limits, name="devices"), schedule=schedule)

    def run(self, player: Player) -> StepFact:
        """Set the clock. Moments count from this step on."""
        clock = _devices(player, self.place).clock
        schedule = self.schedule
        if schedule.kind == "at":
            schedule = at([(moment + clock.now, who) for moment, who in schedule.moments])
        clock.schedule = schedule
        return StepFact(0, 0, schedule.kind)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tick(StepBase):
    """Let all devices and vCPUs do some steps now."""

    do: ClassVar[str] = "tick"
    count: int
    interrupts: str

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Tick:
        """Read the step; ``interrupt`` names a device that raises one in each."""
        device = _device_name(table, "interrupt", limits) if table.has("interrupt") else ""
        return cls(
            **cls.common(table, limits, name="devices"),
            count=table.integer("count", 1, 1, _MAX_TICKS),
            interrupts=device,
        )

    def run(self, player: Player) -> StepFact:
        """Tick."""
        devices = _devices(player, self.place)
        before = len(devices.events)
        outcome = ""
        for _ in range(self.count):
            devices.tick()
            if self.interrupts:
                function = devices.pci.named(player.scenario.devices[self.interrupts])
                outcome = f"{self.interrupts} interrupts: {function.msix(0)}"
        return StepFact(len(devices.events) - before, 0, outcome, "event")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _CrossingStep(StepBase):
    """A step of a machine that crosses a kexec together with its devices."""

    def lacks(self, release: Release) -> str:
        """Data bound to files' lifecycles, as what devices share is, came with 7.0."""
        return "" if release.luo_flb else "live update with file-lifecycle-bound data"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PreserveVm(_CrossingStep):
    """Preserve a machine with memory, devices and vCPUs in a session of its own."""

    do: ClassVar[str] = "preserve_vm"
    session: str

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> PreserveVm:
        """Read the step; the session has the machine's name unless it gets another one."""
        name = _vm_name(table, "vm", limits)
        session = table.text("session", name)
        limits.sessions.add(session)
        return cls(**cls.common(table, limits, name=name), session=session)

    def run(self, player: Player) -> StepFact:
        """``LIVEUPDATE_SESSION_PRESERVE_FD`` of each file, in the order that they need."""
        note = player.vms.get(self.name)
        if note is not None and note.vmm is None and player.without:
            return StepFact(0, 0, f"{self.name} does not run any more", "file")
        note, _ = _running(player, self.name, self.place)
        left_out = note.preserve(player, self.session)
        text = ", ".join(note.parts.values())
        if left_out:
            text += f"; left out: {', '.join(left_out)}"
        return StepFact(len(note.parts), note.memory.size, text, "file")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResumeVm(_CrossingStep):
    """Get a machine back from its session, finish that, and let it run on."""

    do: ClassVar[str] = "resume_vm"

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> ResumeVm:
        """Read the step."""
        return cls(**cls.common(table, limits, name=_vm_name(table, "vm", limits)))

    def run(self, player: Player) -> StepFact:
        """``LIVEUPDATE_SESSION_RETRIEVE_FD`` of each file, the VMM's work, ``..._FINISH``."""
        note = player.vms.get(self.name)
        if note is not None and not note.session and player.without:
            return StepFact(0, 0, f"{self.name} was not preserved", "file")
        if note is None or not note.session:
            raise player.error(self.place, f"{self.name!r} is in no session")
        missing = note.resume(player)
        files = 0 if note.vmm is None else len(note.vmm.files())
        text = "all as it was" if not missing else f"not as it was: {'; '.join(missing)}"
        return StepFact(files, 0 if note.vmm is None else note.memory.size, text, "file")
