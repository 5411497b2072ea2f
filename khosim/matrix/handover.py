"""One handover from release to release: preserve, jump, take over, and compare every byte.

The first kernel preserves folios of several orders, a range of pages, a vmalloc area, a
``reserve_mem`` region and two sessions with a memfd each, as far as its release has them. Its
successor reads where they are from a subtree, as drivers do when they start, then uses its free
memory, and then restores what it was told of. What it says is not taken for granted:

* what was preserved is decoded from RAM at the jump, by the checkers' own decoder;
* what the successor reserved is heard call by call, also of one that dies in the midst of it;
* content is compared with what was written, byte for byte;
* the invariants look at all of memory.

Left out: devices, a successor with another command line or page size, several users at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from khosim import KernelError, KernelPanic, Machine
from khosim.abi import fdt
from khosim.abi.kho_vmalloc import pack_kho_vmalloc
from khosim.checks.decode import decode_handover
from khosim.checks.formats import format_of, preserve_bits_of
from khosim.checks.preserved import expand
from khosim.kernel.kernel import Kernel
from khosim.kernel.kho_vmalloc import KhoVmallocSlot, kho_preserve_vmalloc, kho_restore_vmalloc
from khosim.kernel.release import Release, find_release
from khosim.kernel.trace import Event
from khosim.kernel.vmalloc import vmalloc
from khosim.scenario.kho_user import preserve_range, publish, restore_range

FOLIOS = {"pages": (0, 40), "tables": (2, 12), "buffers": (5, 4), "arena": (9, 1)}
"""Name of each group of folios: their order, and how many."""
RANGE_PAGES = 75
VMALLOC_PAGES = 30
SESSIONS = ("vm-a", "vm-b")
MEMFD_PAGES = 20
REGION = "oops"
SPREAD_BYTES = 16 << 20
BATCH_PAGES = 2048
INTACT = "intact"
RESERVING = ("deserialize_bitmap", "kho_preserved_memory_reserve")
TELLING = ("KHO: ", "luo", "WARNING: kho", "Revived", "reserve_mem", "memblock: ")
"""How lines of the kernel log begin that tell of the handover."""
HARMLESS = ("KHO: found", "Revived", "KHO: exec from", "luo: Retrieved")
SEVERITY = ("right", "refused", "misread", "panic")
"""What a handover can come to, from best to worst."""


@dataclass
class Leg:
    """One handover. Blocks are what the map has keys for; ``fates`` are told by name."""

    old: str
    new: str
    outcome: str = ""
    cause: str = ""
    """What the two releases understand differently under one name."""
    panic: str = ""
    where: str = ""
    """What a kernel that died was about."""
    preserved: int = 0
    """Blocks in the predecessor's map."""
    lost: int = 0
    """Blocks that were preserved and not reserved."""
    phantom: int = 0
    """Blocks that were reserved and not preserved."""
    fates: dict[str, str] = field(default_factory=dict)
    unclaimed: list[str] = field(default_factory=list)
    """What was preserved and is beyond the successor: it has no calls for it."""
    log: list[str] = field(default_factory=list)
    """The successor's words about the handover."""
    violations: dict[str, list[str]] = field(default_factory=dict)

    @property
    def contradiction(self) -> str:
        """Where the ways to judge disagree: damage that no invariant speaks of; else empty."""
        if self.outcome == "misread" and not self.violations:
            return "there is damage, and no invariant speaks"
        if self.outcome == "misread" and (self.lost or self.phantom):
            return "" if "map-agrees" in self.violations else "map-agrees does not speak"
        if self.outcome == "refused" and INTACT in self.fates.values():
            return "it was refused, and something came through"
        return ""

    @property
    def damage(self) -> dict[str, str]:
        """The fates that are none to wish for."""
        return {name: fate for name, fate in self.fates.items() if fate != INTACT}

    @property
    def why(self) -> str:
        """The outcome in a sentence."""
        if self.outcome == "panic":
            told = [line for line in self.log if not line.startswith(HARMLESS)]
            before = "; ".join([self._misread() or "accepted", *told])
            return f"{before}; then, {self.where}: {self.panic}"
        if self.outcome == "refused":
            said = " / ".join(self.log) or "nothing was handed over, and nothing is said about it"
            return f"{said}; lost: {', '.join(self.damage) or 'nothing'}"
        if self.outcome == "misread":
            return self._misread()
        alone = f"; {self.new} has no calls for: {', '.join(self.unclaimed)}"
        text = f"all {self.preserved} blocks reserved, all content intact"
        return text + (alone if self.unclaimed else "")

    def _misread(self) -> str:
        parts = [self.cause] if self.cause and (self.lost or self.phantom) else []
        if self.lost:
            parts.append(f"{self.lost} of {self.preserved} blocks not reserved")
        if self.phantom:
            parts.append(f"{self.phantom} phantom reservations")
        parts += [f"{name}: {fate}" for name, fate in self.damage.items()]
        if not parts:
            parts = [f"{name} is broken" for name in self.violations]
        return "; ".join(parts)

    def __str__(self) -> str:
        lines = [f"{self.old} -> {self.new}: {self.outcome}", f"  {self.why}"]
        lines += [f"  log: {line}" for line in self.log]
        for name, messages in self.violations.items():
            lines.append(f"  {name}, {len(messages)}: {messages[0]}")
        return "\n".join(lines)


def hand_over(
    releases: Sequence[str], *, page_size: int = 4096, finalize: bool = True
) -> list[Leg]:
    """Boot the first release, hand over to the next, and so on while one is alive.

    Pages of 4096 bytes make it an x86-64 machine, others arm64. Without ``finalize`` user space
    does not finalize, and live update, which would do it in the kernel, is off.
    """
    arch, ram = ("x86_64", "256M") if page_size == 4096 else ("arm64", "1G")
    machine = Machine(ram, arch=arch, page_size=page_size)
    reserved: list[tuple[int, int, int]] = []

    said: list[str] = []

    def listen(event: Event) -> None:
        if event.symbol == "printk":
            said.append(event.args["message"])
        elif event.symbol in RESERVING:
            args = event.args
            reserved.append((args["phys"], args["order"], args["nr_blocks"]))

    machine.listen(listen)
    cmdline = f"kho=on reserve_mem=2M:{page_size}:{REGION}"
    if finalize:
        cmdline += " liveupdate=on"
    kernel = machine.boot(find_release(releases[0]), cmdline=cmdline)
    held = acquire(kernel)
    legs: list[Leg] = []
    for name in releases[1:]:
        leg = Leg(kernel.release.name, find_release(name).name)
        leg.cause = difference(kernel.release, find_release(name), page_size)
        legs.append(leg)
        known = {str(violation) for violation in machine.check()}
        names = [*held, REGION]
        try:
            preserve(kernel, held)
            machine.load_successor(kernel, find_release(name), finalize=finalize)
        except KernelError as refused:
            leg.log = [str(refused)]
            leg.fates = dict.fromkeys(names, "gone")
            leg.outcome = "refused"
            break
        written = preserved_blocks(machine, kernel)
        leg.preserved = len(written)
        reserved.clear()
        said.clear()
        held = {}
        try:
            leg.where = "in boot"
            kernel = machine.resume()
            leg.where = "restoring"
            held = take_over(kernel, names, written, leg)
        except KernelPanic as panic:
            leg.panic = str(panic)
        read = {
            (phys + (n << order) * page_size, order)
            for phys, order, nr_blocks in reserved
            for n in range(nr_blocks)
        }
        leg.log = [line for line in said if line.startswith(TELLING)]
        if leg.panic or kernel.is_kho_boot:
            leg.lost = 0 if leg.panic else len(written - read)
            leg.phantom = len(read - written)
        for violation in machine.check():
            if str(violation) not in known:
                leg.violations.setdefault(violation.invariant, []).append(str(violation))
        leg.outcome = judge(leg, is_accepted=bool(leg.panic) or kernel.is_kho_boot)
        if leg.panic:
            break
    return legs


def difference(old: Release, new: Release, page_size: int) -> str:
    """What is read otherwise than it was written, where both call the format by one name."""
    if old.kho_compatible != new.kho_compatible or old.tracker != new.tracker:
        return ""
    wrote, reads = (release.bitmap_bytes or page_size for release in (old, new))
    return f"bitmaps of {wrote} bytes are read as {reads}" if wrote != reads else ""


def judge(leg: Leg, *, is_accepted: bool) -> str:
    """The outcome of a handover, by all that was seen."""
    if leg.panic:
        return "panic"
    if not is_accepted:
        return "refused"
    is_right = not (leg.lost or leg.phantom or leg.damage or leg.violations)
    return "right" if is_right else "misread"


def preserved_blocks(machine: Machine, kernel: Kernel) -> set[tuple[int, int]]:
    """``(address, order)`` of all that the loaded image hands over, as the checkers read it."""
    image = kernel.kexec_image
    if image is None or not image.kho_fdt:
        return set()
    page_size = kernel.arch.page_size
    handover = decode_handover(
        machine.hardware.ram,
        image.kho_fdt,
        page_size,
        preserve_bits=preserve_bits_of(kernel.release, page_size),
        written=format_of(kernel.release),
    )
    return set(expand(handover.preserved))


# -- the old kernel's side ----------------------------------------------------------------------


def content(name: str, len_bytes: int) -> bytes:
    """What is written into the thing called ``name``: its name, over and over."""
    word = f"[{name}] ".encode()
    return (word * (len_bytes // len(word) + 1))[:len_bytes]


def acquire(kernel: Kernel) -> dict[str, Any]:
    """Allocate and fill what shall survive; a region is filled where it lies."""
    page_size = kernel.arch.page_size
    held: dict[str, Any] = {}
    between: list[tuple[int, int]] = []
    for name, (order, count) in FOLIOS.items():
        held[name] = []
        for index in range(count):
            if index * 2 in (0, count):  # memory of others lies between, so that all is spread
                between += kernel.alloc_folios(SPREAD_BYTES // page_size, owner="others")
            folio = kernel.alloc_folio(order, owner=name)
            folio.write(0, content(f"{name} {index}", folio.len_bytes), by=name)
            held[name].append(folio)
    held["range"] = kernel.alloc_pages_exact(RANGE_PAGES, owner="range")
    phys = held["range"] * page_size
    kernel.ram.write(phys, content("range", RANGE_PAGES * page_size), kernel.by("range"))
    if kernel.release.has("kho_preserve_vmalloc"):
        held["vmalloc"] = vmalloc(kernel, VMALLOC_PAGES * page_size)
        held["vmalloc"].write(0, content("vmalloc", VMALLOC_PAGES * page_size), by="vmalloc")
    if kernel.liveupdate.enabled:
        for name in SESSIONS:
            held[name] = kernel.memfd(name, size=MEMFD_PAGES * page_size)
            held[name].write(0, content(name, MEMFD_PAGES * page_size))
    start, size = kernel.reserve_mem.find_by_name(REGION) or (0, 0)
    kernel.ram.write(start, content(REGION, size), kernel.by(REGION))
    for pfn, nr_pages in between:
        kernel.pages.free_range(pfn, pfn + nr_pages)
    return held


def preserve(kernel: Kernel, held: dict[str, Any]) -> None:
    """Preserve everything, and tell the successor where it is."""
    told: dict[str, Any] = {}
    for name in FOLIOS:
        for folio in held.get(name, ()):
            kernel.kho_preserve_folio(folio)
        told[name] = [folio.phys for folio in held.get(name, ())]
    if "range" in held:
        preserve_range(kernel, held["range"], RANGE_PAGES)
        told["range"] = held["range"] * kernel.arch.page_size
    if "vmalloc" in held:
        slot = KhoVmallocSlot(kernel)
        kho_preserve_vmalloc(kernel, held["vmalloc"], slot)
        told["vmalloc"] = pack_kho_vmalloc(slot.load()).hex()
    for name in SESSIONS:
        if name in held:
            kernel.liveupdate.create_session(name).preserve(held[name], 1)
    publish(kernel, "belongings", json.dumps(told).encode(), "belongings")


# -- the successor's side -----------------------------------------------------------------------


def take_over(
    kernel: Kernel, names: Sequence[str], blocks: set[tuple[int, int]], leg: Leg
) -> dict[str, Any]:
    """Restore what is there of ``names`` and write its fates into ``leg``; what is held now."""
    told = read_told(kernel)
    use_memory(kernel, blocks)
    held: dict[str, Any] = {}
    for name in names:
        thing, fate = _take(kernel, name, told)
        if fate:
            leg.fates[name] = fate
        else:
            leg.unclaimed.append(name)
        if fate == INTACT and thing is not None:
            held[name] = thing
    return held


def read_told(kernel: Kernel) -> dict[str, Any]:
    """What the predecessor told in its subtree; nothing where that cannot be read."""
    try:
        phys, size = kernel.kho_retrieve_subtree("belongings")
        data: bytes | memoryview | None = kernel.ram.read(phys, size)
        if kernel.release.subtree_size_prop == "":
            data, _ = fdt.fdt_getprop(memoryview(bytearray(data or b"")), 0, "data")
        told: dict[str, Any] = json.loads(bytes(data or b"{}"))
    except (KernelError, ValueError):
        return {}
    return told


def use_memory(kernel: Kernel, blocks: set[tuple[int, int]]) -> None:
    """Allocate nearly all free memory, as a kernel does that runs for a while, and write to it.

    Only where ``blocks`` are: elsewhere nobody could see the difference.
    """
    page_size = kernel.arch.page_size
    batches = []
    while True:
        try:
            batches.append(kernel.alloc_folios(BATCH_PAGES, owner="successor"))
        except KernelError:
            break
    for phys, order in sorted(blocks):
        for pfn in range(phys // page_size, phys // page_size + (1 << order)):
            if kernel.page(pfn).owner == "successor":
                kernel.ram.write(pfn * page_size, b"\xee" * page_size, kernel.by("successor"))
    for batch in batches[-2:]:
        for pfn, count in batch:
            kernel.pages.free_range(pfn, pfn + count)


def _take(kernel: Kernel, name: str, told: dict[str, Any]) -> tuple[Any, str]:
    # (what is held now, its fate); no fate where the release has no calls for it.
    if name in FOLIOS:
        return take_folios(kernel, name, told)
    if name == REGION:
        return None, region_fate(kernel)
    if name in SESSIONS:
        return take_session(kernel, name)
    if name not in told and kernel.is_kho_boot:
        return None, "not told of"
    return (take_range if name == "range" else take_vmalloc)(kernel, told)


def region_fate(kernel: Kernel) -> str:
    """What became of the ``reserve_mem`` region, by its bytes and by the kernel's word."""
    start, size = kernel.reserve_mem.find_by_name(REGION) or (0, 0)
    is_same = bool(size) and kernel.ram.read(start, size) == content(REGION, size)
    if any(line.startswith(f"Revived memory reservation '{REGION}'") for line in kernel.messages):
        return INTACT if is_same else "revived, and overwritten"
    return "reserved anew, where it happens to have been" if is_same else "reserved anew elsewhere"


def take_folios(kernel: Kernel, name: str, told: dict[str, Any]) -> tuple[Any, str]:
    """Restore a group of folios: each is intact, or something else."""
    order, count = FOLIOS[name]
    folios, seen = [], Counter[str]()
    for index, phys in enumerate(told.get(name, ())):
        kind = kernel.page(phys // kernel.arch.page_size).kind
        folio = kernel.kho_restore_folio(phys)
        if folio is None:
            seen["refused"] += 1
        elif folio.order != order:
            seen[f"come back with order {folio.order}"] += 1
        elif folio.read(0, folio.len_bytes) != content(f"{name} {index}", folio.len_bytes):
            seen["overwritten and still restored"] += 1
        elif kind != "incoming":
            seen[f"restored though {kind}"] += 1
        else:
            seen[INTACT] += 1
            folios.append(folio)
    if seen[INTACT] == count:
        return folios, INTACT
    if not seen:
        return None, "gone"
    return None, ", ".join(f"{number} of {count} {word}" for word, number in seen.items())


def take_range(kernel: Kernel, told: dict[str, Any]) -> tuple[Any, str]:
    """Restore the range of pages."""
    page_size = kernel.arch.page_size
    pfn = told.get("range", 0) // page_size
    if not pfn:
        return None, "gone"
    kinds = {kernel.page(each).kind for each in range(pfn, pfn + RANGE_PAGES)}
    if not restore_range(kernel, pfn, RANGE_PAGES, "range"):
        return None, "refused"
    len_bytes = RANGE_PAGES * page_size
    if kernel.ram.read(pfn * page_size, len_bytes) != content("range", len_bytes):
        return None, "overwritten and still restored"
    others = sorted(kinds - {"incoming"})
    return pfn, f"restored though {', '.join(others)}" if others else INTACT


def take_vmalloc(kernel: Kernel, told: dict[str, Any]) -> tuple[Any, str]:
    """Restore the vmalloc area."""
    if not kernel.is_kho_boot:
        return None, "gone"
    if not kernel.release.has("kho_restore_vmalloc"):
        return None, ""
    slot = KhoVmallocSlot(kernel, stack=bytes.fromhex(told["vmalloc"]))
    area = kho_restore_vmalloc(kernel, slot)
    if area is None:
        return None, "refused"
    is_same = area.read(0, area.len_bytes) == content("vmalloc", area.len_bytes)
    return area, INTACT if is_same else "overwritten and still restored"


def take_session(kernel: Kernel, name: str) -> tuple[Any, str]:
    """Retrieve a session's memfd and finish the session."""
    if not kernel.release.luo and kernel.is_kho_boot:
        return None, ""
    try:
        session = kernel.liveupdate.retrieve_session(name)
        memfd = session.retrieve(1)
        session.finish()
        session.close()
    except KernelError as refused:
        return None, refused.name
    is_same = memfd.read(0, memfd.size) == content(name, MEMFD_PAGES * kernel.arch.page_size)
    return memfd, INTACT if is_same else "overwritten"
