"""Hosts of guests with devices, whose devices act between chosen events of the kernels.

A :class:`Host` is a machine with its guests up and their devices assigned. :meth:`Host.act` says
what a device or vCPU does after which event; :meth:`Host.live_update` preserves, jumps, boots the
successor, takes everything back and finishes. Events are counted from the first preserve on,
through every jump. :meth:`Host.verdict` is what the invariants say, and, where nothing was left
out, what the author of the programme knows: each write is in its guest's memory, each message is
answered, each interrupt reached its guest.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from khosim.checks.violation import Violation
from khosim.drivers.vmm import GUEST_BASE, Vmm, VmmPlan, piece_of
from khosim.errors import InputError, KernelError, KernelPanic
from khosim.explore.host_guests import Buffers, arm
from khosim.explore.host_layouts import HOSTS
from khosim.explore.oracles import is_warning
from khosim.kernel.image import KernelConfig, KernelImage
from khosim.kernel.release import find_release
from khosim.machine.devices import Amd, Bridge, Endpoint, Part, Snp, Vtd
from khosim.machine.devices.engine import fill
from khosim.simulator import Machine

if TYPE_CHECKING:
    from collections.abc import Iterable

    from khosim.explore.host_layouts import GuestLayout
    from khosim.kernel.file import File
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.release import Release
    from khosim.kernel.trace import Event

__all__ = ("HOSTS", "STRAY", "Act", "Done", "Host")

_KERNEL_BYTES, _PAGE = 4 << 20, 4096
_FIRST_BUS = 0x10
_LOW = 16 << 20
_PEER_BASE = 1 << 45
STRAY = 4 << 20
"""An I/O address that no guest has: as a physical one, early memory of every kernel."""
_GOOD = {
    "read": {"done"},
    "write": {"done"},
    "work": {"done"},
    "peer": {"peer"},
    "stray": {"fault"},
    "interrupt": {"posted", "latched", "merged"},
}


class Act(NamedTuple):
    """What ``who`` does after event number ``moment``."""

    moment: int
    who: str
    what: str


class Done(NamedTuple):
    """An act that happened: behind which event of which kernel, and what came of it."""

    act: Act
    event: Event
    outcome: str


class _Guest:
    """A guest's process while it runs, and what its devices have to find."""

    def __init__(self, layout: GuestLayout, plan: VmmPlan) -> None:
        self.layout = layout
        self.plan = plan
        self.vmm: Vmm | None = None
        self.parts: list[str] = []
        self.buffers = Buffers(plan.gpa)
        self.wrote: dict[int, bytes] = {}
        """What stands at which guest-physical address since somebody wrote it."""
        self.steps: dict[str, int] = {}
        self.is_left = False
        """Nobody preserved it, and its kernel has jumped: its devices reach nothing any more."""
        self.pending: set[int] = set()
        """Vectors raised for vCPU 0 and not taken yet."""

    def read(self, kernel: Kernel, gpa: int, len_bytes: int) -> bytes:
        """What the guest itself sees."""
        assert self.vmm is not None
        assert self.vmm.vm is not None
        guest, devices = self.vmm.vm.guest, kernel.hardware.devices
        assert devices is not None
        asid = 0 if guest is None else guest.asid
        return devices.vcpus.read_guest(self.vmm.vm.maps(), asid, gpa, len_bytes)


class Host:
    """A host of :data:`HOSTS` at work, its first kernel booted and every guest running.

    ``without`` are pieces of live update (:data:`khosim.drivers.core.PIECES`) that no kernel of it
    has. ``low`` puts the guests' memory, as they see it, where kernels have their own: what is not
    translated hits that. Raises :class:`InputError` for names that there are not.
    """

    def __init__(
        self,
        layout: str = "guest-devices",
        *,
        release: str | Release = "7.3",
        without: Iterable[str] = (),
        allocator: str = "linux",
        seed: int = 0,
        low: bool = False,
    ) -> None:
        from khosim.drivers.core import check_pieces

        if layout not in HOSTS:
            raise InputError("host", f"{layout!r} is none of {', '.join(HOSTS)}")
        self.layout = HOSTS[layout]
        self.without = tuple(without)
        check_pieces(self.without)
        if "snp" in self.without and not self.layout.has_secret:
            raise InputError("without", f"no guest of {layout} is encrypted: snp keeps nothing")
        self.names = {
            name: f"0000:{_FIRST_BUS + i:02x}:00.0"
            for i, (name, _) in enumerate(self.layout.devices)
        }
        self.machine = Machine(
            self.layout.ram, devices=self._parts(), allocator=allocator, seed=seed
        )
        devices = self.machine.hardware.devices
        assert devices is not None
        self.devices = devices
        self.done: list[Done] = []
        self.now = -1
        """Events so far, from the first preserve on; -1 before it."""
        self._acts: dict[int, list[Act]] = {}
        self._serial = 0
        self._forgets = ""
        self._problems: list[Violation] = []
        self.machine.listen(self._event)
        config = KernelConfig(release=find_release(release), without=self.without)
        image = KernelImage.build(config.release, config=config, size=_KERNEL_BYTES)
        self.kernel = self.machine.boot(image=image, cmdline="kho=on liveupdate=on")
        self.guests = [self._start(guest, low) for guest in self.layout.guests]

    def _parts(self) -> list[Part]:
        parts: list[Part] = [Amd() if self.layout.iommu == "amd" else Vtd()]
        for i, (name, kind) in enumerate(self.layout.devices):
            port = f"0000:00:{1 + i:02x}.0"
            parts += [Bridge(port, secondary=_FIRST_BUS + i), Endpoint(self.names[name], kind=kind)]
        return [*parts, Snp()] if self.layout.has_secret else parts

    def _start(self, layout: GuestLayout, low: bool) -> _Guest:
        gpa = _LOW if low else GUEST_BASE
        buffers = Buffers(gpa)
        pages = [buffers.page() for _ in range(layout.vcpus)]
        programmes = tuple(((page, _PAGE, 0x1000 + n),) for n, page in enumerate(pages))
        plan = VmmPlan(layout.name, gpa, layout.encrypted, programmes)
        guest = _Guest(layout, plan)
        guest.buffers = buffers
        memfd = self.kernel.memfd(layout.name, size=layout.memory, huge=layout.huge)
        guest.vmm = vmm = Vmm.start(self.kernel, plan, memfd)
        for name in layout.devices:
            vmm.assign(name, self.names[name])
        for _, to in layout.peers:
            vmm.map_peer(self._bar(to), vmm.devices[to])
        assert vmm.vm is not None
        for name in layout.devices:
            buffers.give(name)
            arm(self.devices, self.names[name], vmm.vm.maps(), buffers, name)
        return guest

    def _bar(self, name: str) -> int:
        return _PEER_BASE + (list(self.names).index(name) << 31)

    def close(self) -> None:
        """Free the machine at once."""
        self.machine.close()

    # -- what devices do ------------------------------------------------------------------------

    def act(self, moment: int, who: str, what: str) -> None:
        """After event number ``moment`` the device or vCPU ``who`` does ``what``.

        "read" and "write" memory of its guest, "work": a step of its rings or queues, "peer": a
        write to another device's BAR, "interrupt", "stray": a write to an address that is not
        mapped; "run": a step of a vCPU. Raises :class:`InputError` for what there is not.
        """
        if (who, what) not in self.layout.actions():
            raise InputError("act", f"{who!r} does no {what!r} on this host")
        self._acts.setdefault(moment, []).append(Act(moment, who, what))

    def _event(self, event: Event) -> None:
        if self.now < 0:
            return
        if event.symbol == "vmx_sync_pir_to_irr":
            self._took(event)
        if event.symbol == "machine_kexec":
            for guest in self.guests:
                guest.is_left |= not guest.parts
        for act in self._acts.get(self.now, ()):
            outcome = self._run(act) if act.what == "run" else self._device(act)
            self.done.append(Done(act, event, outcome))
        self.now += 1

    def _owner(self, who: str) -> _Guest:
        for guest in self.guests:
            if who in guest.layout.devices or who.split("/")[0] == guest.layout.name:
                return guest
        raise AssertionError(who)

    def _device(self, act: Act) -> str:
        guest, bdf = self._owner(act.who), self.names[act.who]
        self._serial += 1
        since = len(self.devices.events)
        place = guest.buffers.of(act.who)
        if act.what == "read":
            self.devices.dma(bdf, place.reads, _PAGE)
        elif act.what == "write":
            data = fill(self._serial, 0, 3000).tobytes()
            if self.devices.dma(bdf, place.writes + 2000, len(data), data).outcome == "done":
                guest.wrote[place.writes + 2000] = data
        elif act.what == "stray":
            self.devices.dma(bdf, STRAY + self._serial % 512 * _PAGE, 64, bytes(64))
        elif act.what == "peer":
            to = dict(guest.layout.peers)[act.who]
            data = self._serial.to_bytes(8, "little")
            self.devices.dma(bdf, self._bar(to) + place.peer_offset, 8, data)
        elif act.what == "interrupt":
            self.devices.pci.named(bdf).msix(0)
        else:
            engine = self.devices.pci.named(bdf).engine
            assert engine is not None
            engine.step()
        return self._outcome(act, guest, since)

    def _outcome(self, act: Act, guest: _Guest, since: int) -> str:
        if guest.is_left or guest.layout.name == self._forgets:
            return self._outcome_of_left(act, guest, since)
        good, told = _GOOD[act.what], []
        for event in self.devices.events[since:]:
            if event.kind == "interrupt" and event.source == self.names[act.who]:
                told.append(event.detail["outcome"])
                if told[-1] == "posted":
                    guest.pending.add(event.detail["vector"])
                elif act.what == "work" and told[-1] not in _GOOD["interrupt"]:
                    self._says(act, told[-1], "interrupt")
            elif event.kind == "dma":
                dma = event.detail["dma"]
                where = ", ".join(f"{phys:#x}" for phys, _ in dma.runs)
                told.append(f"{dma.outcome} {where}".strip())
                if dma.outcome not in good:
                    self._says(act, dma.outcome, "DMA")
        if act.what == "interrupt" and not set(told) <= good:
            self._says(act, told[-1], "interrupt")
        return "; ".join(told) or "nothing to do"

    def _outcome_of_left(self, act: Act, guest: _Guest, since: int) -> str:
        # Shut off at some moment before the jump, and for good from the jump on.
        told = [
            event.detail["dma"].outcome if event.kind == "dma" else event.detail["outcome"]
            for event in self.devices.events[since:]
            if event.kind in ("dma", "interrupt") and event.source == self.names[act.who]
        ]
        for outcome in told:
            if guest.is_left and outcome in ("done", "peer", "posted", "latched", "merged"):
                self._says(act, outcome, "a request that nobody preserved")
        return "; ".join(told) or "nothing to do"

    def _says(self, act: Act, outcome: str, kind: str) -> None:
        text = f"{kind} of {act.who} ({act.what}) ended with {outcome}"
        self._problems.append(Violation("device-answered", text, self.machine.generation))

    def _run(self, act: Act) -> str:
        if act.who not in self.devices.vcpus.running:
            return "does not run"
        guest = self._owner(act.who)
        self.devices.tick(act.who)
        if act.who not in self.devices.vcpus.running:
            why = self.devices.vcpus.exits[-1][2]
            self._says(act, why, "a step")
            return why
        step = guest.steps[act.who] = guest.steps.get(act.who, 0) + 1
        gpa, size, pattern = guest.plan.programmes[int(act.who.rpartition("/")[2])][0]
        guest.wrote[gpa] = fill(pattern, step, size).tobytes()
        return f"step {step}"

    def _took(self, event: Event) -> None:
        name, _, number = event.args["vcpu"].rpartition("/")
        for guest in self.guests:
            if guest.layout.name == name and number == "0" and self.layout.iommu == "vtd":
                if event.result != len(guest.pending):
                    text = f"{name} took {event.result} of {len(guest.pending)} interrupts"
                    self._problems.append(
                        Violation("interrupt-arrives", text, self.machine.generation)
                    )
                guest.pending.clear()

    # -- the update -----------------------------------------------------------------------------

    def live_update(
        self, *, refused_by: str = "", backwards: bool = False, forgets: str = ""
    ) -> None:
        """One live update from the first preserve to the last finish.

        ``refused_by`` names a device that refuses to be frozen at a first try; ``backwards`` takes
        the guests back in the other order; ``forgets`` is a guest that nobody preserves. Raises the
        kernel's refusals where nothing is left out, and
        :class:`~khosim.errors.KernelPanic`.
        """
        self.now = max(self.now, 0)
        self._forgets = forgets
        for guest in self.guests:
            guest.parts = []
            if guest.vmm is not None and guest.layout.name != forgets:
                self._preserve(guest)
        if refused_by:
            self._refused(refused_by)
        self.kernel = self.machine.kexec(self.kernel)
        for guest in reversed(self.guests) if backwards else self.guests:
            if guest.parts:
                self._resume(guest)
            else:
                guest.vmm = None

    def _preserve(self, guest: _Guest) -> None:
        assert guest.vmm is not None
        session = self.kernel.liveupdate.create_session(guest.layout.name)
        for part, file in guest.vmm.files().items():
            piece = piece_of(part)
            if piece in self.without and piece != "vfio":  # that one comes back, but reset
                continue
            session.preserve(file, len(guest.parts))
            guest.parts.append(part)

    def _refused(self, name: str) -> None:
        guest = self._owner(name)
        vmm = guest.vmm
        if vmm is None or name not in vmm.devices or guest.layout.name == self._forgets:
            return  # nobody asks it
        file, running = vmm.devices[name], self.devices.vcpus.running
        file.refuses_freeze = errno.EBUSY
        try:
            self.machine.kexec(self.kernel)
        except KernelError as refused:
            if refused.errno != errno.EBUSY:
                raise
        file.refuses_freeze = 0
        if sorted(self.devices.vcpus.running) != sorted(running):
            text = f"of {running} only {self.devices.vcpus.running} run after a refused freeze"
            self._problems.append(Violation("guest-goes-on", text, self.machine.generation))

    def _resume(self, guest: _Guest) -> None:
        kernel, files = self.kernel, dict[str, "File"]()
        guest.vmm = None
        parts, guest.parts = guest.parts, []
        try:
            session = kernel.liveupdate.retrieve_session(guest.layout.name)
            for token, part in enumerate(parts):
                try:
                    files[part] = session.retrieve(token)
                except KernelError as refused:
                    self._accept(refused)
            vmm = Vmm.resume(kernel, guest.plan, files)
            session.finish()
            session.close()
        except KernelError as refused:
            self._accept(refused)
            return
        guest.vmm = vmm if "memory" in files else None

    def _accept(self, refused: KernelError) -> None:
        # Where a piece is missing, refusals are what happens; else they are told.
        if not self.without:
            raise refused

    # -- what is said of it ---------------------------------------------------------------------

    def verdict(self) -> list[Violation]:
        """All that speaks: invariants, and where all is silent and whole, what was promised."""
        found = self.machine.check()
        if found or self.without:
            return found
        unkept = self._unkept()
        return [*self._problems, *unkept]

    def _unkept(self) -> list[Violation]:
        generation = self.machine.generation
        found = [
            Violation("kernel-warned", message, generation)
            for message in self.kernel.messages
            if is_warning(message)
        ]
        for guest in self.guests:
            name = guest.layout.name
            if guest.is_left:
                continue
            if guest.vmm is None or guest.vmm.vm is None:
                found.append(Violation("guest-arrives", f"{name} is gone", generation))
                continue
            for gpa, data in guest.wrote.items():
                if guest.read(self.kernel, gpa, len(data)) != data:
                    text = f"{name} does not have what was written to it at {gpa:#x}"
                    found.append(Violation("write-arrives", text, generation))
            guest.vmm.taken()
        return found

    def play(
        self,
        acts: Iterable[Act],
        *,
        updates: int = 1,
        refused_by: str = "",
        backwards: bool = False,
        forgets: str = "",
    ) -> list[Violation]:
        """Let ``acts`` happen during so many live updates; what speaks, a panic included."""
        for act in acts:
            self.act(*act)
        try:
            for _ in range(updates):
                self.live_update(
                    refused_by=refused_by, backwards=backwards, forgets=forgets
                )
        except KernelPanic as panic:
            said = self.machine.check()
            return said or [Violation("kernel-panic", panic.message, self.machine.generation)]
        except KernelError as refused:
            text = f"{refused.symbol}: -{refused.name}"
            return [*self.machine.check(), Violation("update-goes-on", text, 0)]
        return self.verdict()
