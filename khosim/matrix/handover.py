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
from khosim.matrix.leg import INTACT, Leg
from khosim.scenario.kho_user import preserve_range, publish, restore_range

FOLIOS = {"pages": (0, 40), "tables": (2, 12), "buffers": (5, 4), "arena": (9, 1)}
"""Name of each group of folios: their order, and how many."""
RANGE_PAGES = 75
VMALLOC_PAGES = 30
SESSIONS = ("vm-a", "vm-b")
MEMFD_PAGES = 20
REGION = "oops"
THINGS = (*FOLIOS, "range", "vmalloc", *SESSIONS, REGION)
"""All that can be in play."""
SPREAD_BYTES = 16 << 20
BATCH_PAGES = 1024
SPARE_BYTES = 32 << 20
RESERVING = ("deserialize_bitmap", "kho_preserved_memory_reserve")
TELLING = ("KHO: ", "luo", "WARNING: kho", "Revived", "reserve_mem", "memblock: ")
"""How lines of the kernel log begin that tell of the handover."""


def hand_over(
    releases: Sequence[str],
    *,
    page_size: int = 4096,
    finalize: bool = True,
    only: Sequence[str] = THINGS,
) -> list[Leg]:
    """Boot the first release, hand over to the next, and so on while one is alive.

    ``only`` are the names of what is in play, each one of :data:`THINGS`; all of them by default.
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
    cmdline = "kho=on"
    if REGION in only:
        cmdline += f" reserve_mem=2M:{page_size}:{REGION}"
    if finalize:
        cmdline += " liveupdate=on"
    kernel = machine.boot(find_release(releases[0]), cmdline=cmdline)
    held = acquire(kernel, only)
    legs: list[Leg] = []
    for name in releases[1:]:
        leg = Leg(kernel.release.name, find_release(name).name)
        leg.cause = difference(kernel.release, find_release(name), page_size)
        legs.append(leg)
        known = {str(violation) for violation in machine.check()}
        names = leg.names = [*held, *(name for name in only if name == REGION)]
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


def acquire(kernel: Kernel, only: Sequence[str]) -> dict[str, Any]:
    """Allocate and fill what shall survive; a region is filled where it lies."""
    page_size = kernel.arch.page_size
    held: dict[str, Any] = {}
    between: list[tuple[int, int]] = []
    for name, (order, count) in FOLIOS.items():
        if name not in only:
            continue
        held[name] = []
        for index in range(count):
            if index * 2 in (0, count):  # memory of others lies between, so that all is spread
                between += kernel.alloc_folios(SPREAD_BYTES // page_size, owner="others")
            folio = kernel.alloc_folio(order, owner=name)
            folio.write(0, content(f"{name} {index}", folio.len_bytes), by=name)
            held[name].append(folio)
    if "range" in only:
        held["range"] = kernel.alloc_pages_exact(RANGE_PAGES, owner="range")
        phys = held["range"] * page_size
        kernel.ram.write(phys, content("range", RANGE_PAGES * page_size), kernel.by("range"))
    if "vmalloc" in only and kernel.release.has("kho_preserve_vmalloc"):
        held["vmalloc"] = vmalloc(kernel, VMALLOC_PAGES * page_size)
        held["vmalloc"].write(0, content("vmalloc", VMALLOC_PAGES * page_size), by="vmalloc")
    if kernel.liveupdate.enabled:
        for name in [name for name in SESSIONS if name in only]:
            held[name] = kernel.memfd(name, size=MEMFD_PAGES * page_size)
            held[name].write(0, content(name, MEMFD_PAGES * page_size))
    start, size = kernel.reserve_mem.find_by_name(REGION) or (0, 0)
    if size:
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
    use_memory(kernel, blocks | told_blocks(kernel, told))
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


def told_blocks(kernel: Kernel, told: dict[str, Any]) -> set[tuple[int, int]]:
    """``(address, order)`` of what the predecessor told of, whether or not its map has it."""
    page_size = kernel.arch.page_size
    start, size = kernel.reserve_mem.find_by_name(REGION) or (0, 0)
    blocks = {(phys, 0) for phys in range(start, start + size, page_size)}
    blocks |= {(phys, order) for name, (order, _) in FOLIOS.items() for phys in told.get(name, ())}
    if "range" in told:
        blocks |= {(told["range"] + n * page_size, 0) for n in range(RANGE_PAGES)}
    return blocks


def use_memory(kernel: Kernel, blocks: set[tuple[int, int]]) -> None:
    """Allocate nearly all free memory, as a kernel does that runs for a while, and write to it.

    Only where ``blocks`` are: elsewhere nobody could see the difference.
    """
    page_size = kernel.arch.page_size
    taken: list[list[tuple[int, int]]] = []
    for order in (kernel.arch.max_page_order, 0):
        while True:
            try:
                runs = kernel.alloc_folios(max(1, BATCH_PAGES >> order), order, owner="successor")
            except KernelError:
                break
            taken.append([(pfn, count << order) for pfn, count in runs])
    for phys, order in sorted(blocks):
        for pfn in range(phys // page_size, phys // page_size + (1 << order)):
            if kernel.page(pfn).owner == "successor":
                kernel.ram.write(pfn * page_size, b"\xee" * page_size, kernel.by("successor"))
    left = SPARE_BYTES // page_size
    for pfn, nr_pages in (run for runs in reversed(taken) for run in runs):
        if left > 0:
            kernel.pages.free_range(pfn, pfn + nr_pages)
            left -= nr_pages


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
