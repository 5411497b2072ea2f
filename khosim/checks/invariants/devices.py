"""Devices and guests that go on while kernels come and go.

What is asked is whether each is left alone from the jump until its session is finished in a later
kernel (:mod:`khosim.checks.device_watch`). One cause has one speaker: a device that was reset, or
that is another requester now, is not asked about its translation, its DMA and its interrupts; a DMA
that was not translated as before is not asked whose memory it hit, nor one to an address of nobody
where the translation is not what it was; and who could not reach the bus before the jump either has
lost no interrupt by it.

Of the rest of a device's life only its DMA is judged, each at its moment, from boot on
(:mod:`khosim.checks.dma_watch`): resets, mappings and writes to guest memory are then user space's
to ask for, and nobody but it knows which of them are right.

From jump to finish a DMA is judged by who owned its page at the next look, so memory that changed
hands and came back between two looks is not noticed.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from khosim.checks.device_watch import assigned_to, pages_of
from khosim.checks.invariants.base import DEVICES, REPORTED_MAX, Invariant
from khosim.checks.look import AT_ANY_TIME, BOOTED, IN_BETWEEN, JUMP, RETRIEVED, TAKEOVER
from khosim.checks.ranges import holds, merged, minus, page_ranges

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from khosim.checks.device_watch import DeviceWatch, KeptDevice
    from khosim.checks.look import Look
    from khosim.checks.ranges import Ranges
    from khosim.checks.violation import Violation

__all__ = ("INVARIANTS",)

_LOST = ("blocked", "disabled", "unclaimed", "discarded")
_PIR_BYTES = 32
_USES_BUS, _MASTER = 0x06, 0x04


def _watched(look: Look) -> Iterator[tuple[DeviceWatch, KeptDevice, Any]]:
    # Devices whose session is not finished, with what each of them is now.
    watch, machine = look.history.devices, look.hardware.devices
    if watch is None or machine is None:
        return
    for device in watch.devices.values():
        if watch.is_carried(look.kernel, device.session):
            yield watch, device, machine.pci.named(device.name)


def _is_itself(device: KeptDevice, function: Any) -> bool:
    # Neither reset nor moved nor shut off: what happens to its requests is not its own doing.
    now = function.resets, function.bdf.rid, function.config[4] & _USES_BUS
    return bool(now == (device.resets, device.rid, device.command))


def _events(look: Look, kind: str) -> list[Any]:
    watch, machine = look.history.devices, look.hardware.devices
    if watch is None or machine is None:
        return []
    return [event for event in machine.events[watch.seen :] if event.kind == kind]


def _dmas(look: Look) -> dict[str, list[Any]]:
    # Every DMA since the last look, by the device's name.
    found: dict[str, list[Any]] = {}
    for event in _events(look, "dma"):
        found.setdefault(event.source, []).append(event.detail["dma"])
    return found


# -- memory ---------------------------------------------------------------------------------------


def _belonging(look: Look) -> Ranges | None:
    # The pages that guests still have, whoever keeps them for them; None where nobody can tell.
    handed, kernel = look.handed, look.kernel
    if kernel is None or look.stage == TAKEOVER:
        return None if handed is None else handed.covered
    files = [it.file for it in kernel.liveupdate.retrieved if hasattr(it.file, "inode")]
    starts, ends, _ = look.incoming
    held = [pages_of(file.inode.mapping) for file in files]
    drivers = kernel.drivers
    if drivers is not None:
        held += [pages_of(slot.memfd.inode.mapping) for vm in drivers.kvm.vms for slot in vm.slots]
    return merged((starts, ends), *held)


def _dma_in_owner(look: Look) -> Sequence[Violation]:
    name = "dma-in-owner"
    dmas = _dmas(look)
    shift = look.page_shift
    found: dict[str, Violation] = {
        stray.message: look.says(name, stray.message, stray.phys, look.owner(stray.phys >> shift))
        for stray in look.history.strays
    }
    if not dmas:
        return list(found.values())
    belonging = _belonging(look)
    for watch, device, function in _watched(look):
        if not _is_itself(device, function):
            continue
        pages: set[int] = set()
        for dma in dmas.get(device.name, ()):
            if dma.outcome != "done":
                continue
            wanted = device.target(dma.iova, dma.len_bytes)
            if wanted is None:
                if device.top and _not_as_it_was(look, watch, device):
                    continue
                text = f"{device.name} reached {dma.runs[0][0]:#x}, which nobody mapped for it"
                found[text] = look.says(name, text, dma.runs[0][0])
            elif list(dma.runs) == wanted:
                for phys, size in dma.runs:
                    pages.update(range(phys >> shift, (phys + size - 1 >> shift) + 1))
        ordered = sorted(pages)
        inside = holds(belonging, ordered) if belonging is not None and ordered else ()
        for pfn, is_inside in zip(ordered, inside or [False] * len(ordered), strict=True):
            if not is_inside:
                text = (
                    f"DMA of {device.name} at page {pfn << shift:#x}, which its guest does not "
                    "have any more"
                )
                found[text] = look.says(name, text, pfn << shift, look.owner(pfn))
    return list(found.values())[:REPORTED_MAX]


def _guest_bytes(look: Look) -> Sequence[Violation]:
    watch = look.history.devices
    changed = look.changed() if watch is not None else []
    if watch is None or not changed:
        return ()
    shift = look.page_shift
    found = []
    descriptors = {vcpu.pi_desc >> shift for vcpu in watch.vcpus}
    for pfn, by in zip(changed, look.hardware.ram.last_writers(changed), strict=True):
        if by is None or by[0] >= 0:
            continue
        what, _, who = by[1].partition(" ")
        if what == "device" and who in watch.devices:
            own: Any = watch.devices[who].pages
        elif what == "vcpu":
            guests = [guest for guest in watch.guests if guest.name == who.rpartition("/")[0]]
            own = merged(*(guest.pages for guest in guests)) if guests else None
        elif what == "iommu" and pfn in descriptors:
            continue
        else:
            own = None
        if own is None or not holds(own, [pfn])[0]:
            text = f"page {pfn << shift:#x} was written by {by[1]}, whose it is not"
            found.append(look.says("guest-bytes", text, pfn << shift, look.owner(pfn)))
    return found[:REPORTED_MAX]


# -- translation ----------------------------------------------------------------------------------


def _not_as_it_was(look: Look, watch: DeviceWatch, device: KeptDevice) -> str:
    # What is different about unit, entry or tables; "" where nothing is.
    unit = getattr(look.hardware.devices, "iommu", None)
    if unit is None or not unit.translates:
        return f"{device.name} is not translated any more: the unit is off"
    if watch.context_now(look.hardware, device) != device.context:
        return f"the context entry of {device.name} is not what it was"
    kept = watch.tables[device.top]
    pages = kept.changed(kept.ranges)
    if pages:
        at = pages[0] << look.page_shift
        return f"the page table of {device.name} changed at {at:#x}"
    return ""


def _translation_kept(look: Look) -> Sequence[Violation]:
    name = "translation-kept"
    found: dict[str, Violation] = {}
    dmas = _dmas(look)
    for watch, device, function in _watched(look):
        if not _is_itself(device, function) or not device.top:
            continue
        text = _not_as_it_was(look, watch, device)
        for dma in dmas.get(device.name, ()):
            if text or dma.outcome in ("master-abort", "no-power"):
                continue
            wanted = device.target(dma.iova, dma.len_bytes)
            if wanted is not None and list(dma.runs) != wanted:
                where = ", ".join(f"{phys:#x}" for phys, _ in dma.runs) or "nowhere"
                text = (
                    f"a request of {device.name} for {dma.iova:#x} went {where} "
                    f"({dma.outcome}), and not to {wanted[0][0]:#x}"
                )
        if text:
            found[text] = look.says(name, text, device.top)
    return list(found.values())[:REPORTED_MAX]


# -- the device itself ----------------------------------------------------------------------------


def _device_not_reset(look: Look) -> Sequence[Violation]:
    return [
        look.says(
            "device-not-reset",
            f"{device.name} was reset {function.resets - device.resets} times",
            -1,
        )
        for _, device, function in _watched(look)
        if function.resets != device.resets
    ][:REPORTED_MAX]


def _device_identity(look: Look) -> Sequence[Violation]:
    found: dict[str, Violation] = {}
    moved = {event.source: event.detail for event in _events(look, "renumbered")}
    silent = {
        name
        for name, dmas in _dmas(look).items()
        if any(dma.outcome == "master-abort" for dma in dmas)
    }
    for _, device, function in _watched(look):
        if function.resets != device.resets:
            continue
        text = ""
        if device.name in moved or function.bdf.rid != device.rid:
            text = f"{device.name} was moved to {function.bdf}"
        elif list(function.bars) != device.bars:
            text = f"a BAR of {device.name} was moved"
        elif function.config[4] & _USES_BUS != device.command or device.name in silent:
            text = f"{device.name} was shut off from the bus"
        if text:
            found[text] = look.says("device-identity", text, -1)
    return list(found.values())[:REPORTED_MAX]


# -- interrupts and owners ------------------------------------------------------------------------


def _interrupt_kept(look: Look) -> Sequence[Violation]:
    name = "interrupt-kept"
    watch, machine = look.history.devices, look.hardware.devices
    if watch is None or machine is None:
        return ()
    found = []
    back = () if look.kernel is None else look.kernel.liveupdate.retrieved
    retrieved = {getattr(it.file, "pi_desc", 0) for it in back}
    belonging = _descriptors(look)
    for vcpu in watch.vcpus:
        if vcpu.pi_desc in retrieved or not watch.is_carried(look.kernel, vcpu.session):
            continue
        pfn = vcpu.pi_desc >> look.page_shift
        now = int.from_bytes(look.hardware.ram.read(vcpu.pi_desc, _PIR_BYTES), "little")
        if belonging is not None and not holds(belonging, [pfn])[0]:
            text = f"the descriptor of {vcpu.name} at {vcpu.pi_desc:#x} is nobody's any more"
            found.append(look.says(name, text, vcpu.pi_desc, look.owner(pfn)))
        elif vcpu.posted & ~now:
            text = f"interrupts that were posted to {vcpu.name} are gone"
            found.append(look.says(name, text, vcpu.pi_desc))
    unit = machine.iommu
    interrupts = _events(look, "interrupt")
    watched = list(_watched(look))
    table = getattr(unit, "irq_table_phys", 0)
    if watched and table and getattr(unit, "remaps_irqs", False) and _is_free(look, table):
        text = f"the interrupt remapping table at {table:#x} is nobody's any more"
        found.append(look.says(name, text, table))
    for _, device, function in watched:
        if not _is_itself(device, function) or not getattr(unit, "translates", True):
            continue
        if not device.command & _MASTER:
            continue
        lost = [
            event.detail["outcome"]
            for event in interrupts
            if event.source == device.name and event.detail["outcome"] in _LOST
        ]
        if lost and watch.context_now(look.hardware, device) == device.context:
            text = f"interrupts of {device.name} were {lost[0]}"
            found.append(look.says(name, text, -1))
    return found[:REPORTED_MAX]


def _is_free(look: Look, phys: int) -> bool:
    # Whether anybody may get a page that was handed over: it was not, or the kernel has it free.
    pfn = phys >> look.page_shift
    handed, kernel = look.handed, look.kernel
    if kernel is None or look.stage == TAKEOVER:
        return handed is not None and not holds(handed.covered, [pfn])[0]
    starts, ends, _ = kernel.pages.pages.columns()
    at = bisect_right(starts, pfn) - 1
    return at < 0 or pfn >= ends[at]


def _descriptors(look: Look) -> Ranges | None:
    handed = look.handed
    if look.kernel is None or look.stage == TAKEOVER:
        return None if handed is None else handed.covered
    starts, ends, _ = look.incoming
    return merged((starts, ends))


def _free_and_assigned(look: Look, machine: Any) -> list[Violation]:
    # Pages that the running kernel may hand to anybody, who would get a #PF(RMP) for writing there.
    kernel = look.kernel
    runs = machine.snp.rmp.runs() if machine.snp.rmp.enabled else []
    if kernel is None or look.stage not in (BOOTED, JUMP, AT_ANY_TIME) or not runs:
        return []
    shift = look.page_shift
    starts, ends, _ = kernel.pages.pages.columns()
    taken = page_ranges(zip(starts, ends, strict=True), 0)
    assigned = page_ranges([run[:2] for run in runs], shift)
    left, _ = minus(assigned, merged(taken))
    return [
        look.says(
            "rmp-owner",
            f"page {pfn << shift:#x} is free, and {machine.snp.rmp.entry(pfn).kind} by the table",
            pfn << shift,
        )
        for pfn in left.tolist()
    ]


def _rmp_owner(look: Look) -> Sequence[Violation]:
    name = "rmp-owner"
    watch, machine = look.history.devices, look.hardware.devices
    if machine is None or machine.snp is None:
        return ()
    found = _free_and_assigned(look, machine)
    if watch is None:
        return found[:REPORTED_MAX]
    for guest in watch.guests:
        if not guest.gctx_phys or not watch.is_carried(look.kernel, guest.session):
            continue
        if guest.gctx_phys not in machine.snp.guests:
            text = f"the firmware does not know {guest.name} any more: its key is gone"
            found.append(look.says(name, text, guest.gctx_phys))
        elif guest.has_memory and assigned_to(machine, guest.asid) != guest.assigned:
            text = f"pages of {guest.name} are not its own any more"
            found.append(look.says(name, text, guest.gctx_phys))
    return found[:REPORTED_MAX]


_ALWAYS = frozenset((IN_BETWEEN, TAKEOVER, BOOTED, RETRIEVED, JUMP, AT_ANY_TIME))

INVARIANTS = (
    Invariant(
        "dma-in-owner",
        "Every DMA lands in memory that still belongs to the device's guest.",
        _ALWAYS,
        _dma_in_owner,
        DEVICES,
    ),
    Invariant(
        "guest-bytes",
        "No byte of a guest changes but by its own devices and vCPUs.",
        _ALWAYS - {RETRIEVED},
        _guest_bytes,
        DEVICES,
    ),
    Invariant(
        "translation-kept",
        "The translation of a running device never changes.",
        _ALWAYS,
        _translation_kept,
        DEVICES,
    ),
    Invariant(
        "device-not-reset",
        "No device that goes on is reset.",
        _ALWAYS,
        _device_not_reset,
        DEVICES,
    ),
    Invariant(
        "device-identity",
        "A device that goes on keeps its bus number, its BARs and the bus.",
        _ALWAYS,
        _device_identity,
        DEVICES,
    ),
    Invariant(
        "interrupt-kept",
        "No interrupt of a device that goes on is lost for good.",
        _ALWAYS,
        _interrupt_kept,
        DEVICES,
    ),
    Invariant(
        "rmp-owner",
        "An encrypted guest keeps its key and its pages, and no page of a guest is free.",
        _ALWAYS,
        _rmp_owner,
        DEVICES,
    ),
)
