"""What is remembered of a handover, from the jump until its last page is restored.

Taken when the old kernel is frozen: what its bytes in RAM say (decoded independently), what the
preserved memory holds, who owned it, where scratch is, which ``reserve_mem`` regions there are.
The kernel that takes over is held against this record, never against its own word.

The record keeps the old kernel's page map, which nobody changes any more, to name owners; it keeps
no kernel.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from khosim.checks.keepsake import Keepsake
from khosim.checks.live_files import live_memfds
from khosim.checks.preserved import covered_ranges
from khosim.checks.ranges import holds, merged, minus, page_ranges
from khosim.errors import RamFault

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.checks.decode import Handover
    from khosim.checks.device_watch import DeviceWatch
    from khosim.checks.dma_watch import Stray
    from khosim.checks.kernel_view import KernelView, PageMapView
    from khosim.checks.ranges import I64, Ranges
    from khosim.machine.hardware import Hardware
    from khosim.machine.ram import Ram

__all__ = (
    "PFN_BITS",
    "Handed",
    "History",
    "KeptRegion",
    "block_ids",
    "block_runs",
    "owner_of",
    "scratch_areas",
)

_SCRATCH_ENTRY_BYTES = 16
_SCRATCH_ENTRIES_MAX = 1 << 16
PFN_BITS = 52
"""More than any page frame number has."""
_NOWHERE = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


def scratch_areas(ram: Ram, array_phys: int, nr_areas: int) -> list[tuple[int, int]]:
    """The scratch array's ``(address, size)`` entries as RAM holds them; empty where unreadable."""
    if not array_phys or not 0 < nr_areas <= _SCRATCH_ENTRIES_MAX:
        return []
    try:
        raw = ram.read(array_phys, nr_areas * _SCRATCH_ENTRY_BYTES)
    except RamFault:
        return []
    words = memoryview(raw).cast("Q").tolist()
    return list(zip(words[::2], words[1::2], strict=True))


def owner_of(page_map: PageMapView | None, pfn: int) -> str:
    """Who holds a page, by a kernel's page map; "" where nobody does."""
    if page_map is None:
        return ""
    starts, ends, states = page_map.columns()
    at = bisect_right(starts, pfn) - 1
    return states[at].owner if at >= 0 and pfn < ends[at] else ""


def block_ids(order: I64, pfn: I64) -> I64:
    """One number for each block, ascending as keys do: large blocks first, then by address."""
    return ((63 - order) << PFN_BITS) | pfn


def block_runs(blocks: Sequence[tuple[int, int]]) -> tuple[I64, I64, I64]:
    """``(pfn, order)`` blocks as arrays of first pfn, end pfn and order.

    A log that keeps its blocks as ``runs`` of ``(pfn, order, nr_blocks)`` is read as those.
    """
    runs = getattr(blocks, "runs", None)
    if runs is None:
        flat = np.fromiter(chain.from_iterable(blocks), dtype=np.int64, count=2 * len(blocks))
        pfns, orders, counts = flat[::2], flat[1::2], np.ones(len(blocks), dtype=np.int64)
    else:
        flat = np.fromiter(chain.from_iterable(runs), dtype=np.int64, count=3 * len(runs))
        pfns, orders, counts = flat[::3], flat[1::3], flat[2::3]
    return pfns, pfns + (counts << np.minimum(orders, 52)), orders


class KeptRegion(NamedTuple):
    """A ``reserve_mem`` region and its bytes outside of whole pages: before and behind them."""

    name: str
    start: int
    size: int
    head: bytes
    tail: bytes

    def edges(self, page_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The two ``(start_phys, end_phys)`` ranges that ``head`` and ``tail`` are from."""
        end = self.start + self.size
        low, high = -(-self.start // page_size) * page_size, end // page_size * page_size
        if low >= high:
            return (self.start, end), (end, end)
        return (self.start, low), (high, end)


def _read(ram: Ram, start: int, end: int) -> bytes:
    try:
        return ram.read(start, end - start)
    except RamFault:
        return b""


def _keep_region(ram: Ram, name: str, start: int, size: int) -> KeptRegion:
    (a, b), (c, d) = KeptRegion(name, start, size, b"", b"").edges(ram.page_size)
    return KeptRegion(name, start, size, _read(ram, a, b), _read(ram, c, d))


def _touched_pages(regions: Sequence[KeptRegion], page_shift: int) -> Ranges:
    pieces = [(region.start, region.start + region.size) for region in regions]
    return merged(page_ranges(pieces, page_shift))


def _whole_pages(regions: Sequence[KeptRegion], page_shift: int) -> Ranges:
    if not regions:
        return _NOWHERE
    page_size = 1 << page_shift
    inner = [(region.edges(page_size)[0][1], region.edges(page_size)[1][0]) for region in regions]
    return merged(page_ranges([piece for piece in inner if piece[0] < piece[1]], page_shift))


class Handed:
    """One handover. ``generation`` is the kernel that handed over.

    ``writer`` is None where no jump was seen, only the kernel that found the handover (a machine
    loaded from an image): owners, regions and what happened before are unknown then.
    """

    __slots__ = (
        "_base",
        "_blocks",
        "_gone",
        "_incoming",
        "_kept",
        "_owners",
        "_ram",
        "_released",
        "covered",
        "failed_reserve_mem",
        "generation",
        "handover",
        "held",
        "is_sound",
        "memfds",
        "metadata",
        "page_shift",
        "reader",
        "regions",
        "restored_seen",
        "revived",
        "scratch",
        "watched",
    )

    def __init__(
        self,
        hardware: Hardware,
        handover: Handover,
        covered: Ranges | None,
        is_sound: bool,
        scratch: list[tuple[int, int]],
        generation: int,
        writer: KernelView | None,
    ) -> None:
        ram = hardware.ram
        self._ram = ram
        self._owners = None if writer is None else writer.pages.pages
        self.restored_seen = 0
        """How many entries of the reader's ``kho_in.restored`` were taken into account."""
        self.page_shift = hardware.page_shift
        self.generation = generation
        self.handover = handover
        self.covered = covered_ranges(handover.preserved) if covered is None else covered
        self.is_sound = is_sound
        """All of it could be decoded."""
        self.scratch = scratch
        self.failed_reserve_mem = writer is not None and any(
            "failed to prepare memblock FDT" in message for message in writer.messages
        )
        self.memfds = {} if writer is None else live_memfds(hardware, writer)
        """The files that LUO carries, by the address of their record."""
        self.reader: int | None = None
        """The generation that took the handover over."""
        if writer is not None:
            regions = writer.reserve_mem.regions
        else:  # nobody watched the jump: what the handover itself says
            regions = [
                (name, start, size)
                for name, (start, size) in handover.reserve_mem.items()
                if hardware.is_ram(start, size)
            ]
        self.regions = [_keep_region(ram, *region) for region in regions if region[2]]
        self.revived: list[KeptRegion] = []
        """Regions that live on in the kernel that took over."""
        self.metadata = frozenset(phys >> self.page_shift for phys in handover.metadata_pages)
        """Pages of root FDT, map and blobs, until they were read."""
        pages = np.array(sorted(self.metadata), dtype=np.int64)
        inner = _whole_pages(self.regions, self.page_shift)
        self._incoming = self._base = self.held = self.covered
        """What the successor has to keep: preserved and not yet restored or released."""
        self.watched = merged(self.covered, (pages, pages + 1), inner)
        """Where no byte may change."""
        self._gone = self._released = _NOWHERE
        self._blocks: Ranges | None = None
        self._kept = Keepsake(ram, self.watched, hardware.page_size)

    @property
    def blocks(self) -> Ranges:
        """The preserved blocks as ranges of :func:`block_ids`; those side by side are joined."""
        if self._blocks is None:
            preserved = self.handover.preserved
            self._blocks = merged(
                (
                    block_ids(preserved.order, preserved.start_pfn),
                    block_ids(preserved.order, preserved.end_pfn),
                )
            )
        return self._blocks

    def owner(self, pfn: int) -> str:
        """Who held a page when it was handed over."""
        for region in self.regions:
            if region.start <= pfn << self.page_shift < region.start + region.size:
                return f"reserve_mem {region.name}"
        return owner_of(self._owners, pfn)

    def changed(self) -> list[int]:
        """Watched pages whose bytes are not what they were; they are forgiven for the next time."""
        found = self._kept.changed(self.watched)
        if found:
            self._kept = Keepsake(self._ram, self.watched, 1 << self.page_shift)
        return found

    def in_revived(self, pfns: list[int], *, wholly: bool) -> list[bool]:
        """For each page, whether it lies in a region that lives on, wholly or at least in part."""
        if not self.revived:
            return [False] * len(pfns)
        pages = _whole_pages if wholly else _touched_pages
        return holds(pages(self.revived, self.page_shift), pfns)

    def changed_edges(self) -> list[tuple[KeptRegion, int]]:
        """Revived regions with other bytes outside of whole pages, and the first changed byte."""
        found = []
        for i, region in enumerate(self.revived):
            edges = region.edges(1 << self.page_shift)
            now = [_read(self._ram, start, end) for start, end in edges]
            if now == [region.head, region.tail]:
                continue
            for (start, _), old, new in zip(edges, (region.head, region.tail), now, strict=True):
                pairs = enumerate(zip(old, new, strict=False))
                at = next((j for j, (was, is_now) in pairs if was != is_now), None)
                if at is not None:
                    found.append((region, start + at))
            self.revived[i] = region._replace(head=now[0], tail=now[1])
        return found

    def meet(self, kernel: KernelView) -> None:
        """``kernel`` has parsed its command line: which regions live on?"""
        now = set(kernel.reserve_mem.regions)
        self.revived = [region for region in self.regions if region[:3] in now]

    def taken_over(self, generation: int, incoming: Ranges) -> None:
        """The successor has read it all; ``incoming`` is what it reserved."""
        self.reader = generation
        self.metadata = frozenset()
        self._incoming = self._base = incoming
        if self.revived:
            self._base = merged(incoming, _whole_pages(self.revived, self.page_shift))
        self._subtract()

    def given_back(self) -> None:
        """The successor runs: regions are their owners' to write."""
        if self.revived:
            self._base = minus(self._base, _touched_pages(self.revived, self.page_shift))
            self._subtract()

    def settle(self, kernel: KernelView) -> None:
        """Stop watching what ``kernel`` has restored, and what it released."""
        gone = {name for name, _, size in kernel.reserve_mem.regions if not size}
        released = [region for region in self.revived if region.name in gone]
        restored = kernel.kho_in.restored
        if released:
            self.revived = [region for region in self.revived if region.name not in gone]
            self._released = merged(self._released, _touched_pages(released, self.page_shift))
        elif len(restored) == self.restored_seen:
            return
        self.restored_seen = len(restored)
        pfns, ends, _ = block_runs(restored)
        self._gone = merged(self._released, (pfns, ends))
        self._subtract()

    def _subtract(self) -> None:
        self.held = minus(self._incoming, self._gone)
        is_same = self._base is self._incoming
        self.watched = self.held if is_same else minus(self._base, self._gone)


class History:
    """What the auditor knows of a machine's past: the latest handover, and scratch as it was."""

    __slots__ = ("devices", "handed", "scratch", "strays")

    def __init__(self) -> None:
        self.handed: Handed | None = None
        self.devices: DeviceWatch | None = None
        """Devices and guests as they were at the last jump, on a machine that has any."""
        self.strays: list[Stray] = []
        """DMAs of a running kernel's devices that went wrong and were not told of yet."""
        self.scratch: list[tuple[int, int]] | None = None
        """The scratch areas of this chain of kernels, once one was seen."""
