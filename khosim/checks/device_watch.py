"""What is remembered of devices and guests from one jump to the next.

Taken when a kernel is about to be frozen, for everything that a session of its carries: where each
device is among the buses, which memory of whose guest its I/O addresses stand for (by the files,
not by the tables), the tables themselves, what waits in posted-interrupt descriptors, who owns
which page by the reverse map table. A device stays watched until its session is finished in a later
kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from khosim.checks.iommu_tables import frames_of, look_up, tables_of, top_of
from khosim.checks.keepsake import Keepsake
from khosim.checks.live_files import outgoing_files
from khosim.checks.ranges import merged

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from khosim.checks.iommu_tables import Tables
    from khosim.checks.kernel_view import KernelView
    from khosim.checks.ranges import Ranges
    from khosim.machine.hardware import Hardware

__all__ = (
    "DeviceWatch",
    "KeptDevice",
    "KeptGuest",
    "KeptVcpu",
    "assigned_to",
    "memory_of",
    "pages_of",
    "target_of",
)

_PIR_BYTES = 32
_COMMAND, _USES_BUS = 0x04, 0x06


class KeptDevice(NamedTuple):
    """A function that a session carries.

    ``memory`` are ``(iova, phys, len_bytes)`` of its guest's memory and of peers' BARs, ``pages``
    the frames of the former. ``top`` is the root of its page table, ``context`` its entry.
    """

    name: str
    session: str
    rid: int
    bars: list[tuple[int, int]]
    resets: int
    command: int
    memory: tuple[tuple[int, int, int], ...]
    pages: Ranges
    context: bytes
    top: int

    def target(self, iova: int, len_bytes: int) -> list[tuple[int, int]] | None:
        """See :func:`target_of`."""
        return target_of(self.memory, iova, len_bytes)


class KeptVcpu(NamedTuple):
    """A vCPU of a guest that a session carries, and what was posted to it."""

    name: str
    session: str
    pi_desc: int
    posted: int


class KeptGuest(NamedTuple):
    """A guest: the frames of its memory; ``gctx_phys`` 0 for one that is not encrypted.

    ``assigned`` are the ``(start, end, kind, asid)`` of the reverse map table that are its own.
    ``has_memory``: a session carries that, too.
    """

    name: str
    session: str
    pages: Ranges
    gctx_phys: int
    asid: int
    assigned: list[tuple[int, int, str, int]]
    has_memory: bool


def pages_of(runs: Iterable[Any]) -> Ranges:
    """Page frames of runs of folios in a file."""
    pairs = [(run.pfn, run.pfn + run.end - run.index) for run in runs]
    columns = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return merged((columns[:, 0], columns[:, 1]))


def target_of(
    memory: Iterable[tuple[int, int, int]], iova: int, len_bytes: int
) -> list[tuple[int, int]] | None:
    """Where a request has to go, as (phys, bytes) joined; None where something is not mapped.

    ``memory`` as :class:`KeptDevice` has it.
    """
    found: list[tuple[int, int]] = []
    at, end = iova, iova + len_bytes
    while at < end:
        piece = next((m for m in memory if m[0] <= at < m[0] + m[2]), None)
        if piece is None:
            return None
        start, phys, size = piece
        step = min(end, start + size) - at
        where = phys + at - start
        if found and sum(found[-1]) == where:
            found[-1] = found[-1][0], found[-1][1] + step
        else:
            found.append((where, step))
        at += step
    return found


def memory_of(iommufd: Any, bars: dict[int, int], shift: int) -> Iterator[tuple[int, int, int]]:
    """``(iova, phys, len_bytes)`` of what an iommufd's addresses stand for, by its files.

    ``bars`` are the physical addresses of mapped BARs by I/O address; others are left out.
    """
    for mapping in iommufd.mappings:
        if mapping.memfd is None:
            if mapping.iova in bars:
                yield mapping.iova, bars[mapping.iova], mapping.len_bytes
            continue
        first = mapping.pinned[0].index << shift if mapping.pinned else 0
        for run in mapping.pinned:
            low = max(first, run.index << shift)
            size = (run.end << shift) - low
            phys = run.pfn + (low >> shift) - run.index << shift
            yield mapping.iova + low - first, phys, size


class DeviceWatch:
    """The record of one jump; ``seen`` is how many events of devices were judged."""

    __slots__ = ("devices", "guests", "root", "seen", "tables", "vcpus")

    def __init__(self, hardware: Hardware, kernel: KernelView, before: DeviceWatch | None) -> None:
        machine = hardware.devices
        assert machine is not None
        self.seen = len(machine.events)
        self.devices: dict[str, KeptDevice] = {}
        self.vcpus: list[KeptVcpu] = []
        self.guests: list[KeptGuest] = []
        self.tables: dict[int, Keepsake] = {}
        self.root = getattr(machine.iommu, "root_phys", 0)
        drivers = kernel.drivers
        if drivers is None or not kernel.liveupdate.enabled:
            return
        sessions = {id(file.file): name for name, file in outgoing_files(kernel)}
        for rid, file in getattr(drivers.vfio, "open_files", {}).items():
            if id(file) in sessions:
                self._take_device(hardware, rid, file, sessions[id(file)], before)
        for vm in drivers.kvm.vms:
            names = [sessions.get(id(vm))]
            is_carried = names[0] is not None
            of_memory = [sessions.get(id(slot.memfd)) for slot in vm.slots]
            names += of_memory
            session = next((name for name in names if name is not None), None)
            if session is not None:
                self._take_guest(hardware, vm, session, is_carried, None not in of_memory)

    # -- taking ---------------------------------------------------------------------------------

    def _take_device(
        self, hardware: Hardware, rid: int, file: Any, session: str, before: DeviceWatch | None
    ) -> None:
        machine = hardware.devices
        assert machine is not None
        function = machine.pci.find(str(file.dev.bdf))
        if function is None or file.iommufd is None:
            return
        ram, shift = hardware.ram, hardware.page_shift
        form = tables_of(machine.iommu)
        entry = form.entry(hardware, self.root, rid)
        top = top_of(entry)
        if top and top not in self.tables:
            tables = merged(_frames(frames_of(form, ram, top), shift))
            self.tables[top] = Keepsake(ram, tables, hardware.page_size)
        known = before.devices.get(function.name) if before is not None else None
        if file.iommufd.mappings or known is None:
            targets = self._bars(form, ram, top, file.iommufd)
            memory = tuple(memory_of(file.iommufd, targets, shift))
            runs = [run for it in file.iommufd.mappings for run in it.pinned]
            pages = pages_of(runs)
        else:  # came from a predecessor: a page table without an address space
            memory, pages = known.memory, known.pages
        self.devices[function.name] = KeptDevice(
            function.name,
            session,
            rid,
            list(function.bars),
            function.resets,
            function.config[_COMMAND] & _USES_BUS,
            memory,
            pages,
            entry,
            top,
        )

    @staticmethod
    def _bars(form: Tables, ram: Any, top: int, iommufd: Any) -> dict[int, int]:
        # A mapping of a BAR has no file: what the table says of its first page, at the jump.
        found = {}
        for mapping in iommufd.mappings:
            if mapping.memfd is None:
                phys = look_up(form, ram, top, mapping.iova)
                if phys is not None:
                    found[mapping.iova] = phys
        return found

    def _take_guest(
        self, hardware: Hardware, vm: Any, session: str, is_carried: bool, has_memory: bool
    ) -> None:
        # An encrypted guest that nobody carries is over: only its memory is asked for.
        machine = hardware.devices
        assert machine is not None
        ram = hardware.ram
        pages = merged(*(pages_of(slot.memfd.inode.mapping) for slot in vm.slots))
        gctx_phys, asid, assigned = 0, 0, []
        if vm.guest is not None and machine.snp is not None and is_carried:
            gctx_phys, asid = vm.guest.gctx_phys, vm.guest.asid
            assigned = assigned_to(machine, asid)
        kept = KeptGuest(vm.name, session, pages, gctx_phys, asid, assigned, has_memory)
        self.guests.append(kept)
        for vcpu in vm.vcpus:
            posted = int.from_bytes(ram.read(vcpu.pi_desc, _PIR_BYTES), "little")
            self.vcpus.append(KeptVcpu(vcpu.name, session, vcpu.pi_desc, posted))

    # -- asking ---------------------------------------------------------------------------------

    def is_carried(self, kernel: KernelView | None, session: str) -> bool:
        """Whether a session that was handed over is not finished yet."""
        if kernel is None or not kernel.liveupdate.enabled:
            return True
        sessions = kernel.liveupdate.sessions
        if sessions.deserialized is None or sessions.deserialized < 0:
            return True
        found = sessions.incoming.sessions.get(session)
        return found is not None and bool(found.file_set.files)

    def context_now(self, hardware: Hardware, device: KeptDevice) -> bytes:
        """The context entry of a device's old requester id, through the root table in use."""
        machine = hardware.devices
        assert machine is not None
        root = getattr(machine.iommu, "root_phys", 0)
        return tables_of(machine.iommu).entry(hardware, root, device.rid)


def assigned_to(machine: Any, asid: int) -> list[tuple[int, int, str, int]]:
    """What the reverse map table gives to a guest, in the order of addresses."""
    return [
        (start, end, entry.kind, entry.asid)
        for start, end, entry in machine.snp.rmp.runs()
        if entry.asid == asid
    ]


def _frames(tables: Iterable[int], shift: int) -> Ranges:
    pages = np.array(sorted(phys >> shift for phys in tables), dtype=np.int64)
    return pages, pages + 1
