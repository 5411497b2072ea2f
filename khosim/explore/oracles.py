"""What a user may expect beyond the checkers' invariants, judged from RAM and page maps.

* ``preserved-is-held``: no preserved page is on a free list.
* ``region-preserved``: a reserve_mem region is preserved with every byte of it.
* ``kernel-warned``: the kernel's own checks stay silent.
* ``all-given-back``: who has given everything back has left nothing behind, preserved or held.
* ``no-scratch-without-kho``: a kernel without KHO sets no memory aside for it.
* ``off-means-off``: a kernel with ``kho=off`` takes nothing over.
* ``huge-pages-outside-scratch``: huge pages, which nobody can move, are not in scratch.
* ``scratch-is-there``: a kernel with KHO has scratch to load the next one into.
* ``regions-apart``: no two reserve_mem regions share a byte.
* ``kho-is-on``: regions of a seventh of memory, or gigantic pages of two, do not turn KHO off; nor
  does anything else once scratch is reserved.
* ``crash-kernel-is-there``: what a crash kernel wants of memory it has after a handover, too.
* ``no-kho-in-kdump``: a capture kernel has no scratch of its own.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from khosim.checks.decode import decode_handover
from khosim.checks.formats import format_of
from khosim.checks.held import held_pages, outgoing_pages, preserved_and_free
from khosim.checks.ranges import both, merged, minus, page_ranges, pairs
from khosim.checks.violation import Violation
from khosim.explore.expectations import is_expected_leak, is_expected_message
from khosim.kernel.pageblock import CMA

if TYPE_CHECKING:
    from khosim.checks.kernel_view import KernelView
    from khosim.checks.ranges import Ranges
    from khosim.kernel.kernel import Kernel
    from khosim.machine.hardware import Hardware

__all__ = ("Baseline", "is_warning", "oracles")

_WARNINGS = ("WARNING:", "BUG:", "refcount_t:", "kernel BUG", "list_del", "Bad page")
_REPORTED_MAX = 4
_SET_ASIDE = 7
_CRASH_PART = 15
_GIGANTIC = 1 << 30


def is_warning(message: str) -> bool:
    """Whether a line of the kernel log is one of the kernel's own alarms."""
    return message.startswith(_WARNINGS) or "refcount_t" in message


def _by_owner(kernel: KernelView) -> dict[str, int]:
    starts, ends, states = kernel.pages.pages.columns()
    found: dict[str, int] = {}
    for start, end, state in zip(starts, ends, states, strict=True):
        if state.kind == "allocated":
            found[state.owner] = found.get(state.owner, 0) + end - start
    return found


class Baseline(NamedTuple):
    """A kernel as it came up: pages it preserves by then, and pages by owner."""

    generation: int
    preserved: Ranges
    by_owner: dict[str, int]

    @classmethod
    def of(cls, hardware: Hardware, kernel: Kernel) -> Baseline:
        """Of a kernel that has just booted."""
        return cls(kernel.generation, _preserved(hardware, kernel), _by_owner(kernel))


def _preserved(hardware: Hardware, kernel: Kernel) -> Ranges:
    outgoing = outgoing_pages(hardware, kernel)
    return merged() if outgoing is None else outgoing


def oracles(
    hardware: Hardware, kernel: Kernel, baseline: Baseline | None, *, drained: bool
) -> list[Violation]:
    """All of the above, now."""
    preserved = _preserved(hardware, kernel)
    found = _warned(kernel)
    found += _off_is_off(kernel)
    found += _no_scratch(kernel)
    found += _is_held(hardware, kernel, preserved)
    found += _regions(hardware, kernel, preserved)
    found += _huge_pages(hardware, kernel)
    found += _scratch_is_there(kernel)
    found += _regions_apart(kernel)
    found += _kho_is_on(hardware, kernel)
    found += _no_kho_in_kdump(kernel)
    found += _crash_kernel(hardware, kernel)
    if drained and baseline is not None and baseline.generation == kernel.generation:
        found += _given_back(hardware, kernel, preserved, baseline)
    return found


def _warned(kernel: Kernel) -> list[Violation]:
    return [
        Violation("kernel-warned", message, kernel.generation)
        for message in kernel.messages
        if is_warning(message) and not is_expected_message(message)
    ][:_REPORTED_MAX]


def _off_is_off(kernel: Kernel) -> list[Violation]:
    if kernel.options.kho or not kernel.is_kho_boot:
        return []
    text = "a kernel with kho=off has taken a handover over"
    return [Violation("off-means-off", text, kernel.generation)]


def _no_scratch(kernel: Kernel) -> list[Violation]:
    # Scratch that was handed to the buddy allocator for good (kho_init failed) is no CMA's fault.
    if kernel.kho_enable or kernel.is_kho_boot or kernel.stale_scratch is None:
        return []
    nr_pages = sum(zone.nr_free[CMA] for zone in kernel.pages.zones)
    if not nr_pages:
        return []
    text = f"{nr_pages} free pages are set aside as scratch in a kernel that has none"
    return [Violation("no-scratch-without-kho", text, kernel.generation)]


def _is_held(hardware: Hardware, kernel: Kernel, preserved: Ranges) -> list[Violation]:
    shift = hardware.page_shift
    free = preserved_and_free(kernel, preserved)
    return [
        Violation(
            "preserved-is-held",
            f"page {start << shift:#x} (pfn {start:#x}, {end - start} pages) is preserved and free",
            kernel.generation,
            start << shift,
        )
        for start, end in pairs(free, _REPORTED_MAX)
    ]


def _regions(hardware: Hardware, kernel: Kernel, preserved: Ranges) -> list[Violation]:
    if not kernel.kho_enable or any("failed to prepare memblock" in m for m in kernel.messages):
        return []
    found = []
    shift = hardware.page_shift
    for name, start, size in kernel.reserve_mem.regions:
        if not size:
            continue
        missing = minus(merged(page_ranges([(start, start + size)], shift)), preserved)
        for first, end in pairs(missing, 1):
            text = (
                f"reserve_mem region {name!r} of {size} bytes: {end - first} of its pages are not "
                f"preserved, from page {first << shift:#x}"
            )
            owner = f"reserve_mem {name}"
            found.append(
                Violation("region-preserved", text, kernel.generation, first << shift, owner)
            )
    return found


def _huge_pages(hardware: Hardware, kernel: Kernel) -> list[Violation]:
    areas = kernel.scratch_areas() if kernel.kho_scratch_phys else []
    if not areas or not kernel.huge_pages:
        return []
    shift = hardware.page_shift
    starts, ends, states = kernel.pages.pages.columns()
    huge = [
        (start, end)
        for start, end, state in zip(starts, ends, states, strict=True)
        if state.owner.startswith("hugetlb")
    ]
    if not huge:
        return []
    scratch = merged(page_ranges([(addr, addr + size) for addr, size in areas], shift))
    shared = both(merged(page_ranges(huge, 0)), scratch)
    return [
        Violation(
            "huge-pages-outside-scratch",
            f"page {start << shift:#x} (pfn {start:#x}, {end - start} pages) is a huge page in "
            "scratch",
            kernel.generation,
            start << shift,
            "hugetlb",
        )
        for start, end in pairs(shared, 1)
    ]


def _scratch_is_there(kernel: Kernel) -> list[Violation]:
    if not kernel.kho_enable or any(size for _, size in kernel.scratch_areas()):
        return []
    return [Violation("scratch-is-there", "KHO is on and has no scratch", kernel.generation)]


def _regions_apart(kernel: Kernel) -> list[Violation]:
    known = kernel.reserve_mem.regions
    regions = sorted((start, size, name) for name, start, size in known if size)
    return [
        Violation(
            "regions-apart",
            f"reserve_mem regions {one!r} and {other!r} share page {at:#x}",
            kernel.generation,
            at,
        )
        for (start, size, one), (at, _, other) in pairwise(regions)
        if at < start + size
    ]


def _no_kho_in_kdump(kernel: Kernel) -> list[Violation]:
    # Only the first kernel is surely of the release that is looked at, and was handed nothing.
    if not kernel.options.is_kdump or kernel.generation or not kernel.kho_enable:
        return []
    return [Violation("no-kho-in-kdump", "a capture kernel reserves scratch", kernel.generation)]


def _crash_kernel(hardware: Hardware, kernel: Kernel) -> list[Violation]:
    # Of a plain size that is a small part of memory; a place that was asked for may be taken.
    words = kernel.options
    asked = words.crashkernel
    if asked is None or not asked.isdecimal() or kernel.crashk_res or not kernel.is_kho_boot:
        return []
    is_much = int(asked) * _CRASH_PART > hardware.memory_map.ram_bytes
    if is_much or words.mem_limit_bytes is not None or words.is_kdump or not words.kho:
        return []
    text = f"there is no memory for a crash kernel: of {asked} bytes none is set aside"
    return [Violation("crash-kernel-is-there", text, kernel.generation)]


def _kho_is_on(hardware: Hardware, kernel: Kernel) -> list[Violation]:
    # Sizes that were given may be too large, and where mem= leaves little there may be no room, nor
    # beside an initrd that somebody's kexec brought.
    words = kernel.options
    aside = sum(size for _, _, size in kernel.reserve_mem.regions)
    gigantic = [size * count for size, count in kernel.huge_pages.items() if size >= _GIGANTIC]
    aside += sum(gigantic) // 2
    is_asked = words.kho and not words.is_kdump and words.mem_limit_bytes is None
    is_by_scale = all(name != "kho_scratch" for name, _ in words.words)
    is_first = kernel.generation == 0
    is_plain = is_asked and is_first and kernel.kho_scratch_phys
    if is_plain and not kernel.kho_enable:
        text = "KHO is off, though scratch was reserved for it"
        return [Violation("kho-is-on", text, kernel.generation)]
    if kernel.kho_enable or not (is_asked and is_by_scale and aside and is_first):
        return []
    most = hardware.memory_map.ram_bytes // _SET_ASIDE
    if aside > most or kernel.arch.scratch_align_bytes > most:
        return []
    if not any("Failed to reserve scratch area" in message for message in kernel.messages):
        return []
    text = "KHO is off, for scratch was to be larger than memory is"
    return [Violation("kho-is-on", text, kernel.generation)]


def _given_back(
    hardware: Hardware, kernel: Kernel, preserved: Ranges, baseline: Baseline
) -> list[Violation]:
    shift, generation = hardware.page_shift, kernel.generation
    found = []
    for start, end in pairs(minus(preserved, baseline.preserved), _REPORTED_MAX):
        text = (
            f"page {start << shift:#x} (pfn {start:#x}, {end - start} pages) is preserved still, "
            "though all was given back"
        )
        found.append(_written(hardware, text, generation, start << shift))
    for owner, nr_pages in sorted(_by_owner(kernel).items()):
        more = nr_pages - baseline.by_owner.get(owner, 0)
        if more > 0 and not is_expected_leak(owner):
            text = f"{more} pages of {owner} are left, though all was given back"
            found.append(Violation("all-given-back", text, generation, -1, owner))
    for start, end in pairs(_unreachable(hardware, kernel), _REPORTED_MAX):
        text = (
            f"page {start << shift:#x} (pfn {start:#x}, {end - start} pages) waits to be restored, "
            "and nobody is left to do it"
        )
        found.append(_written(hardware, text, generation, start << shift))
    return found


def _written(hardware: Hardware, text: str, generation: int, phys: int) -> Violation:
    # Nobody owns the page; who wrote it tells what it was for. A torn tree has pages beyond RAM.
    ram = hardware.ram
    by = (ram.last_writer(phys) if phys < ram.size_bytes else None) or (-1, "")
    return Violation("all-given-back", text, generation, phys, "", by[1], by[0])


def _unreachable(hardware: Hardware, kernel: Kernel) -> Ranges:
    # Incoming pages but for those that stay on purpose, each by the name of its expectation.
    incoming = held_pages(kernel, "incoming")
    if not len(incoming[0]):
        return incoming
    pieces: list[tuple[str, int, int]] = []
    page = hardware.page_size
    if kernel.kho_in.fdt_phys:
        fdt_phys = kernel.kho_in.fdt_phys
        handover = decode_handover(
            hardware.ram, fdt_phys, page, written=format_of(kernel.release)
        )
        pieces.append(("root FDT", fdt_phys, page))
        pieces += [(f"subtree {name}", *where) for name, where in handover.subtrees.items()]
    if kernel.release.luo and kernel.liveupdate.flb.incoming_pa:
        pieces.append(("page of shared objects", kernel.liveupdate.flb.incoming_pa, page))
    pieces += [(f"reserve_mem {name}", at, size) for name, at, size in kernel.reserve_mem.regions]
    stays = [(start, start + size) for name, start, size in pieces if is_expected_leak(name)]
    return minus(incoming, merged(page_ranges(stays, hardware.page_shift)))
