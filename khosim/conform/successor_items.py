"""A simulated successor of a real kernel, and a simulated predecessor on the real machine.

The successor boots from the captured pages (:mod:`khosim.conform.jump`) and is held against the
real one: the same blocks reserved in the same order, the same regions revived, the same messages,
scratch areas and debugfs files, and each captured folio restored with its content. The predecessor
boots cold on the same memory map and hands over; what it leaves in RAM has to pass the checkers'
decoder without complaint. Which release takes part is the capture's; where khosim has none that
speaks its format, these items are not judged.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterator
from typing import Any

from khosim.abi.kexec_metadata import KHO_METADATA_NODE_NAME
from khosim.capture.folder import Capture, CapturedGeneration
from khosim.checks.decode_luo import Luo
from khosim.checks.formats import format_of, preserve_bits_of
from khosim.checks.preserved import expand
from khosim.conform.held import Held
from khosim.conform.items import Item, in_order, unknown
from khosim.conform.jump import Jump, captured_ram, load_image
from khosim.conform.log_items import kho_lines, preserved_lines
from khosim.conform.misread import as_read, behind, blocks_read, death, dies
from khosim.conform.rebuild_fdt import first_difference
from khosim.conform.sizes import Sizes, read_sizes
from khosim.errors import InputError, KernelError, KernelPanic, KhoSimError, RamFault
from khosim.inspect.memory import Memory, inspect_memory
from khosim.inspect.source import RamReader
from khosim.kernel.boot import boot
from khosim.kernel.bootloader import load_kernel
from khosim.kernel.image import KernelImage
from khosim.kernel.kernel import Kernel
from khosim.kernel.memfd import Memfd
from khosim.kernel.release import RELEASES, Release
from khosim.kernel.trace import Event
from khosim.machine.hardware import Hardware

__all__ = ("predecessor_items", "release_of", "successor_items")

_MOST = 8
_NAME = "successor"
_BLOB = bytes(range(251))


def release_of(capture: Capture, compatible: str | None) -> Release | None:
    """khosim's model of the captured kernel: by its name, else by the format it speaks.

    None where khosim has no release of that format. It bears the captured kernel's full name.
    """
    numbers = re.match(r"\d+\.\d+", capture.release)
    known = RELEASES.get(numbers.group()) if numbers is not None else None
    if known is None or compatible not in (None, known.kho_compatible):
        fitting = [one for one in RELEASES.values() if one.kho_compatible == compatible]
        known = fitting[-1] if fitting else None
    return None if known is None else known.evolve(uname=capture.release)


def successor_items(
    capture: Capture, before: Held, after: CapturedGeneration, wanted: Release | None = None
) -> Iterator[Item]:
    """The items of the simulated kernel that takes ``before`` over, against the real ``after``.

    It is of the release ``wanted``; None is the captured one.
    """
    handover = before.handover
    if handover is None:
        yield unknown(_NAME, f"the predecessor's pages: {before.why}")
        return
    release = wanted or release_of(capture, handover.compatible)
    if release is None:
        known = ", ".join(sorted({one.kho_compatible for one in RELEASES.values()}))
        yield unknown(_NAME, f"{handover.compatible}: khosim's kernels speak {known}")
        return
    release = as_read(release, after)
    reserved: list[tuple[int, int]] = []

    def listen(event: Event) -> None:
        if event.phase == "kho_memory_init" and {"phys", "order", "nr_blocks"} <= event.args.keys():
            reserved.extend(_blocks(event.args, handover.page_size))

    jump = Jump(capture, before.generation, before, after)
    try:
        hardware = captured_ram(jump)
        load_image(hardware, jump, release)
        marks = _marks(hardware, before)
        kernel = boot(hardware, after.index, trace=listen)
    except InputError as error:
        yield Item(_NAME, None, note=str(error), needs=_NEEDS)
        return
    except KernelPanic as panic:
        if not dies(after):
            yield Item(_NAME, False, 0, 1, (f"it does not boot: {panic}",), needs=_NEEDS)
            return
        needs = ("-1/handover", "-1/scratch", "messages")
        yield _reserved(reserved, after, needs, is_known=blocks_read(before, after)[1])
        yield death(panic, after, needs)
        return
    except KhoSimError as error:
        yield Item(_NAME, False, 0, 1, (f"it does not boot: {error}",), needs=_NEEDS)
        return
    yield _reserved(reserved, after, _NEEDS, is_known=blocks_read(before, after)[1])
    yield _messages(kernel, after)
    yield _scratch(kernel, after)
    yield _regions(kernel, before, marks)
    yield _files(kernel, before, after)
    if before.luo is not None and kernel.liveupdate.enabled:
        yield _memfds(kernel, before.luo)
    if blocks_read(before, after)[0] == expand(handover.preserved):
        yield _folios(kernel, before)
    else:
        yield unknown(f"{_NAME}: folios", "the map is read otherwise than it was written")


_NEEDS = ("-1/handover", "-1/scratch", "preserved", "messages", "scratch", "replay", "cmdline")
_SHOWN_NEEDS = (*_NEEDS, f"out/{KHO_METADATA_NODE_NAME}")


def _blocks(args: dict[str, Any], page_size: int) -> list[tuple[int, int]]:
    phys, order, count = int(args["phys"]), int(args["order"]), int(args["nr_blocks"])
    size = page_size << order
    return [(start, start + size) for start in range(phys, phys + count * size, size)]


def _reserved(
    own: list[tuple[int, int]], after: CapturedGeneration, needs: tuple[str, ...], *, is_known: bool
) -> Item:
    name = f"{_NAME}: preserved"
    try:
        lines = preserved_lines(after.dmesg, str(after.path / "dmesg"))
    except InputError as error:
        return unknown(name, str(error))
    real = [(start, end) for _, start, end in lines]
    places = [f"line {line}" for line, _, _ in lines]
    item = in_order(name, real, own, places, needs=needs)
    return item if item.ok or is_known else behind(item)


def _messages(kernel: Kernel, after: CapturedGeneration) -> Item:
    name = f"{_NAME}: messages"
    if not after.has("dmesg"):
        return unknown(name, "no log")
    own = kho_lines("\n".join(kernel.messages))
    has_luo = any(line.startswith("luo: ") for line in own)
    real = [line for line in kho_lines(after.dmesg) if has_luo or not line.startswith("luo: ")]
    missing = [line for line in real if line not in own]
    extra = [line for line in own if line not in real]
    differences = [f"not simulated: {line}" for line in missing]
    differences += [f"only simulated: {line}" for line in extra]
    note = "" if has_luo else "less those of live updates"
    total = len(real) + len(extra)
    same = len(real) - len(missing)
    return Item.counted(name, same, total, differences[:_MOST], note=note, needs=_NEEDS)


def _scratch(kernel: Kernel, after: CapturedGeneration) -> Item:
    name = f"{_NAME}: scratch"
    try:
        real = list(after.scratch_areas)
    except InputError as error:
        return unknown(name, str(error))
    own = kernel.scratch_areas()
    same = sum(left == right for left, right in zip(real, own, strict=False))
    differences = [] if real == own else [f"{real}, simulated {own}"]
    return Item.counted(name, same, max(len(real), len(own)), differences, needs=_NEEDS)


def _marks(hardware: Hardware, before: Held) -> dict[int, bytes]:
    """What is at both ends of each reserve_mem region; something is put where nothing is known."""
    assert before.handover is not None
    known = set(before.reader.pfn.tolist())
    marks: dict[int, bytes] = {}
    for name, (start, size) in before.handover.reserve_mem.items():
        for phys in (start, start + size - 16):
            if size < 16 or not hardware.is_ram(phys, 16):
                continue
            if phys // hardware.page_size not in known:
                mark = name.encode()[:8].ljust(16, b"*")
                hardware.ram.write(phys, mark, (before.generation.index, "conform"))
            marks[phys] = hardware.ram.read(phys, 16)
    return marks


def _regions(kernel: Kernel, before: Held, marks: dict[int, bytes]) -> Item:
    """Revived regions and their content against the predecessor's tree, as the checkers read it."""
    name = f"{_NAME}: regions"
    assert before.handover is not None
    real = before.handover.reserve_mem
    own = {region: (start, size) for region, start, size in kernel.reserve_mem.regions}
    asked = {text.rpartition(":")[2] for text in kernel.options.reserve_mem}
    wanted = {region: tuple(place) for region, place in real.items() if region in asked}
    differences = [
        f"{region}: handed over at {place[0]:#x}, simulated {own.get(region)}"
        for region, place in wanted.items()
        if own.get(region) != place
    ]
    differences += [
        f"{region}: its content at {phys:#x} was written"
        for phys, mark in marks.items()
        for region, (start, size) in wanted.items()
        if start <= phys < start + size and kernel.ram.read(phys, 16) != mark
    ]
    total = len(wanted)
    same = max(0, total - len(differences))
    return Item.counted(name, same, total, differences, needs=_NEEDS)


def _files(kernel: Kernel, before: Held, after: CapturedGeneration) -> Item:
    """debugfs: all of ``in``, and the metadata of ``out``."""
    name = f"{_NAME}: debugfs"
    handover = before.handover
    assert handover is not None
    shown = set(kernel.debugfs.files())
    expected: dict[str, bytes] = {"in/fdt": handover.fdt}
    for subtree in handover.subtrees:
        expected[f"in/sub_fdts/{subtree}"] = before.blob(subtree) or b""
    mine = f"out/sub_fdts/{KHO_METADATA_NODE_NAME}"
    if after.has(f"kho/{mine}"):
        expected[mine] = after.bytes_of(f"kho/{mine}")
    differences = []
    for path, real in expected.items():
        if path not in shown:
            differences.append(f"{path}: not simulated")
            continue
        difference = first_difference(real, kernel.debugfs.read(path))
        if difference:
            differences.append(f"{path}: {difference.replace('rebuilt', 'simulated')}")
    total = len(expected)
    same = total - len(differences)
    return Item.counted(name, same, total, differences[:_MOST], needs=_SHOWN_NEEDS)


def _memfds(kernel: Kernel, luo: Luo) -> Item:
    """Every session's files: retrieved, with size, position, seals and content."""
    name = f"{_NAME}: files"
    differences = []
    total = 0
    for session in luo.sessions:
        try:
            incoming = kernel.liveupdate.retrieve_session(session.name)
        except (KernelError, KernelPanic) as error:
            total += len(session.files)
            differences.append(f"{session.name}: {error}")
            continue
        for file in session.files:
            memfd = file.memfd
            if memfd is None:
                continue
            total += 1
            where = f"{session.name}, token {file.token:#x}"
            try:
                own = incoming.retrieve(file.token)
                if not isinstance(own, Memfd):
                    raise KernelError(errno.EINVAL, "retrieve", "no memfd")
                facts = own.size, own.f_pos, own.seals
                digest = hashlib.sha256(own.read(0, own.size)).hexdigest()
            except (KernelError, KernelPanic, RamFault) as error:
                differences.append(f"{where}: {error}")
                continue
            if facts != (memfd.size, memfd.pos, memfd.seals):
                differences.append(f"{where}: size, position, seals {facts}")
            elif memfd.sha256 not in (None, digest):
                differences.append(f"{where}: other content")
    same = max(0, total - len(differences))
    return Item.counted(name, same, total, differences[:_MOST], note="retrieved", needs=_NEEDS)


def _folios(kernel: Kernel, before: Held) -> Item:
    """Every preserved block of which pages were captured: restored, with the captured bytes."""
    name = f"{_NAME}: folios"
    handover = before.handover
    assert handover is not None
    page = handover.page_size
    pages = before.reader
    known = set(pages.pfn.tolist())
    # What the kernel or a file has taken already is its own, to write and to free.
    taken = set(kernel.kho_in.restored)
    differences = []
    total = 0
    for phys, order in expand(handover.preserved):
        if (phys // page, order) in taken:
            total += 1
            continue
        pfns = [pfn for pfn in range(phys // page, (phys // page) + (1 << order)) if pfn in known]
        if order > kernel.arch.max_page_order or not pfns:
            continue
        total += 1
        cause = ""
        try:
            folio = kernel.kho_restore_folio(phys)
        except KernelPanic as panic:
            folio, cause = None, panic.message
        if folio is None or folio.order != order:
            differences.append(f"{phys:#x} of order {order}: {cause or 'not restored'}")
            continue
        changed = [
            pfn for pfn in pfns if kernel.ram.read(pfn * page, page) != pages.read(pfn * page, page)
        ]
        if changed:
            differences.append(f"{phys:#x} of order {order}: page {changed[0]:#x} was written")
    return Item.counted(
        name, total - len(differences), total, differences[:_MOST], note="restored", needs=_NEEDS
    )


# -- the other way round ------------------------------------------------------------------------


def predecessor_items(
    capture: Capture, generation: CapturedGeneration, wanted: Release | None = None
) -> Iterator[Item]:
    """A simulated cold boot on the captured machine's map; what it hands over, inspected."""
    name = "predecessor"
    release = wanted or release_of(capture, None) or RELEASES["7.3"]
    try:
        hardware = Hardware(capture.memory_map(), capture.page_size)
        sizes = read_sizes(generation, capture.arch) or Sizes()
        image = KernelImage.build(
            release,
            arch=capture.arch,
            page_size=capture.page_size,
            config=sizes.config(release, capture.arch),
        )
        cmdline = generation.cmdline if generation.has("cmdline") else "kho=on"
        load_kernel(hardware, image.data, initrd_bytes=sizes.initrd_bytes, cmdline=cmdline)
        kernel = boot(hardware, 0)
        if not kernel.kho_enable:
            why = [line for line in kernel.messages if line.startswith("KHO: ")]
            yield unknown(name, f"KHO is off: {why[-1] if why else 'nobody turned it on'}")
            return
        folios, has_blob = _hand_over(kernel, image, sizes.initrd_bytes, cmdline)
        memory = Memory(
            "",
            "simulated",
            RamReader(hardware.ram),
            capture.page_size,
            preserve_bits=preserve_bits_of(release, capture.page_size),
            written=format_of(release),
            compatible=release.kho_compatible.encode(),
        )
        report = inspect_memory(memory, fdt_phys=kernel.kho_out.fdt_phys)
        successor = boot(hardware, 1)
    except InputError as error:
        yield unknown(name, str(error))
        return
    except KhoSimError as error:
        yield Item(name, False, 0, 1, (f"{error}",))
        return
    found = [f"{one.path}: {one.found}" for one in report.damage]
    blocks = dict(expand(report.handover.preserved))
    found += [f"{phys:#x}: not in the map" for phys in folios if phys not in blocks]
    blob = report.handover.subtrees.get("conform")
    if has_blob and (blob is None or hardware.ram.read(*blob) != _BLOB):
        found.append("the blob is not what was written")
    total = len(folios) + has_blob
    note = f"{len(blocks)} blocks, read by the checkers"
    yield Item.counted(f"{name}: inspected", max(0, total - len(found)), total, found, note=note)
    found = [] if successor.kho_in.fdt_phys else ["its successor boots without it"]
    yield Item.counted(f"{name}: taken over", not found, 1, found)


def _hand_over(
    kernel: Kernel, image: KernelImage, initrd: int, cmdline: str
) -> tuple[list[int], bool]:
    """Folios of all orders, one blob, and the jump: the folios' addresses, and whether of a blob.

    Releases that lack ``kho_alloc_preserve`` leave subtrees to the kernel's own users.
    """
    held = []
    for order in range(kernel.arch.max_page_order):
        folio = kernel.alloc_folio(order, owner="conform")
        kernel.kho_preserve_folio(folio)
        held.append(folio.phys)
    has_blob = True
    try:
        blob = kernel.kho_alloc_preserve(len(_BLOB))
        blob.write(0, _BLOB)
        kernel.kho_add_subtree("conform", blob.phys, len(_BLOB))
    except (KernelError, KernelPanic):
        raise
    except KhoSimError:
        has_blob = False
    kernel.finalize()
    kimage = kernel.kexec_file_load(image, initrd_bytes=initrd, cmdline=cmdline)
    kernel.kernel_kexec(kimage)
    return held, has_blob
