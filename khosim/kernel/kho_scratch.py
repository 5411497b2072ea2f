"""Scratch: the areas that a successor may use before it knows what was preserved.

Models ``kernel/liveupdate/kexec_handover.c``: ``kho_parse_scratch_size``, ``scratch_size_update``,
``scratch_size_node``, ``kho_reserve_scratch``, ``kho_scratch_overlap`` and ``kho_extend_scratch``
@ 7.3, and the sizing of earlier releases (``kernel/kexec_handover.c`` @ 6.16). The scratch array
itself is bytes in RAM: pairs of u64 address and size.
"""

from __future__ import annotations

import errno
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator

from khosim.kernel.arch import Arch
from khosim.kernel.kho_radix import KhoRadixTree
from khosim.kernel.kho_radix_key import kho_decode_radix_key
from khosim.kernel.kho_radix_memory import NodeMemory
from khosim.kernel.memblock import Memblock
from khosim.kernel.memblock_regions import MEMBLOCK_KHO_SCRATCH
from khosim.kernel.release import Release
from khosim.machine.ram import Ram
from khosim.units import memparse

__all__ = (
    "ScratchSizes",
    "blocks_of_run",
    "kho_extend_scratch",
    "kho_reserve_scratch",
    "read_scratch_array",
    "scratch_align_bytes",
)

_ENTRY = struct.Struct("<QQ")
_U32_MAX = (1 << 32) - 1
_U64 = (1 << 64) - 1
_MAX_PHYS = 64 << 40
_EXT_SHIFT = 30  # KHO_SCRATCH_EXT_BLKSHIFT: blocks of 1 GiB
_FEW_BLOCKS = 1 << 10
_ANYWHERE = _U64
_SCALE = 200


class ScratchSizes:
    """``kho_scratch=``: a percentage of what boot reserved (200 by default), or three sizes.

    ``regions`` are ``(address, size, node)`` of what does not count (``fix_scratch_scale``);
    ``raised`` says that sizes which were given are raised (``fix_scratch_small``).
    """

    __slots__ = (
        "global_bytes",
        "lowmem_bytes",
        "pernode_bytes",
        "raised",
        "regions",
        "scale_percent",
    )

    def __init__(self) -> None:
        self.scale_percent = _SCALE
        self.regions: list[tuple[int, int, int]] = []
        self.raised = False
        self.lowmem_bytes = 0
        self.global_bytes = 0
        self.pernode_bytes = 0

    def parse(
        self, text: str | None, notice: Callable[[str], None], release: Release | None = None
    ) -> int:
        """``kho_parse_scratch_size``: 0, or the -EINVAL or -ERANGE of a malformed value.

        Without a ``release`` as 6.18 and later do it.
        """
        zeros = release is None or release.scratch_arg_zeros
        consumed = release is None or release.scratch_arg_consumed
        if not text:
            return -errno.EINVAL
        if text[-1] == "%":
            return self._parse_scale(text[:-1], notice, release)
        sizes = []
        at = 0
        for i in range(3):
            if i:
                if text[at : at + 1] != ",":
                    return -errno.EINVAL
                at += 1
            size, end = memparse(text, at)
            if end == at or not (size or zeros):
                return -errno.EINVAL
            sizes.append(size)
            at = end
        if not sum(sizes) & _U64 or (consumed and at != len(text)):
            return -errno.EINVAL
        self.lowmem_bytes, self.global_bytes, self.pernode_bytes = sizes
        self.scale_percent = 0
        self.raised = release is not None and release.fix_scratch_small
        mib = [size >> 20 for size in sizes]
        notice(f"KHO: scratch areas: lowmem: {mib[0]}MiB global: {mib[1]}MiB pernode: {mib[2]}MiB")
        return 0

    def _parse_scale(
        self, digits: str, notice: Callable[[str], None], release: Release | None
    ) -> int:
        # len > ARRAY_SIZE(s_scale) with the '%' counted: ten digits are the most.
        if len(digits) + 1 > 11:
            return -errno.EINVAL
        # kstrtouint takes a sign in front and a newline at the end.
        number = digits[1:] if digits[:1] == "+" else digits
        number = number.removesuffix("\n")
        if not number.isascii() or not number.isdigit():
            return -errno.EINVAL
        if int(number) > _U32_MAX:
            return -errno.ERANGE
        if not int(number) and release is not None and release.fix_scratch_zero:
            return -errno.EINVAL
        self.scale_percent = int(number)
        signed = self.scale_percent - (self.scale_percent >> 31 << 32)  # printed with %d
        notice(f"KHO: scratch scale is {signed}%")
        return 0

    def update(self, memblock: Memblock, arch: Arch, release: Release) -> None:
        """``scratch_size_update``: lowmem and global sizes, rounded to the scratch alignment."""
        align = scratch_align_bytes(arch, release)
        if self.scale_percent or self.raised:
            least = self.lowmem_bytes, self.global_bytes
            percent = self.scale_percent or _SCALE
            low = self._boot_bytes(memblock, arch.low_address_limit, -1, release)
            self.lowmem_bytes = ((low * percent) & _U64) // 100
            if release.scratch_rounds_first:
                self.lowmem_bytes = _round_up(self.lowmem_bytes, align)
            everything = self._boot_bytes(memblock, _ANYWHERE, -1, release)
            scaled = ((everything * percent) & _U64) // 100
            self.global_bytes = (scaled - self.lowmem_bytes) & _U64
            if not self.scale_percent:
                self.lowmem_bytes = max(self.lowmem_bytes, least[0])
                self.global_bytes = max(self.global_bytes, least[1])
        elif not release.scratch_explicit_rounded:
            return
        self.lowmem_bytes = _round_up(self.lowmem_bytes, align)
        self.global_bytes = _round_up(self.global_bytes, align)

    def node_bytes(self, memblock: Memblock, nid: int, arch: Arch, release: Release) -> int:
        """``scratch_size_node``: the size of node ``nid``'s own area."""
        size = self.pernode_bytes
        if self.scale_percent or self.raised:
            boot = self._boot_bytes(memblock, _ANYWHERE, nid, release)
            scaled = ((boot * (self.scale_percent or _SCALE)) & _U64) // 100
            size = scaled if self.scale_percent else max(size, scaled)
        return _round_up(size, scratch_align_bytes(arch, release))

    def _boot_bytes(self, memblock: Memblock, limit: int, nid: int, release: Release) -> int:
        size = memblock.memblock_reserved_kern_size(limit, nid)
        if release.scratch_excludes_hugetlb:
            size -= memblock.memblock_reserved_hugetlb_size(limit, nid)
        for start, size_bytes, node in self.regions:
            if nid in (-1, node) and start < limit:
                size -= min(start + size_bytes, limit) - start
        return max(size, 0) if self.regions else size


def scratch_align_bytes(arch: Arch, release: Release) -> int:
    """``SCRATCH_ALIGNMENT_BYTES``; before 7.2 ``CMA_MIN_ALIGNMENT_BYTES`` took its place."""
    if release.scratch_alignment == "pageblock":
        return arch.pageblock_bytes
    return arch.scratch_align_bytes


def _round_up(size: int, align: int) -> int:
    return (size + align - 1) & -align & _U64


def kho_reserve_scratch(
    memblock: Memblock,
    ram: Ram,
    arch: Arch,
    release: Release,
    sizes: ScratchSizes,
    memory_nodes: list[int],
    by: tuple[int, str],
    printk: Callable[[str], None],
) -> tuple[int, int, bool]:
    """``kho_reserve_scratch``: ``(array address, areas, success)``.

    One area in low memory, one anywhere, one on each node that has memory. What was reserved is
    given back when one of them does not fit: then KHO must go off, and the first two say what the
    kernel's pointer and counter are left at.
    """
    told = release.scratch_failure_told

    def tell_which(what: str) -> None:
        if told == "which":
            printk(f"KHO: Failed to reserve {what}")

    def tell_that() -> None:
        if told != "nothing":
            printk("KHO: Failed to reserve scratch area, disabling kexec handover")

    sizes.update(memblock, arch, release)
    count = len(memory_nodes) + 2
    array = memblock.memblock_alloc(count * _ENTRY.size, arch.page_size)
    if not array:
        tell_which("scratch array")
        tell_that()
        return 0, count, False
    ram.zero(array, count * _ENTRY.size, by)
    areas: list[tuple[int, int]] = []
    failed = ""
    align = scratch_align_bytes(arch, release)
    for name, size, addr in _reserve_areas(memblock, arch, release, sizes, memory_nodes, align):
        if not addr:
            failed = name
            break
        ram.write(array + len(areas) * _ENTRY.size, _ENTRY.pack(addr, size), by)
        areas.append((addr, size))
    if not failed:
        return array, count, True
    tell_which(f"{failed} scratch buffer")
    for addr, size in reversed(areas):
        memblock.memblock_phys_free(addr, size)
    memblock.memblock_phys_free(array, count * _ENTRY.size)
    tell_that()
    return array, count, False


def _reserve_areas(
    memblock: Memblock,
    arch: Arch,
    release: Release,
    sizes: ScratchSizes,
    memory_nodes: list[int],
    align: int,
) -> Iterator[tuple[str, int, int]]:
    size = sizes.lowmem_bytes
    limit = arch.low_address_limit
    yield "lowmem", size, memblock.memblock_phys_alloc_range(size, align, 0, limit)
    size = sizes.global_bytes
    yield "global", size, memblock.memblock_phys_alloc_range(size, align, 0, 0)
    for nid in memory_nodes:
        size = sizes.node_bytes(memblock, nid, arch, release)
        addr = memblock.memblock_alloc_range_nid(size, align, 0, 0, nid, True)
        yield f"nid {nid}", size, addr


def read_scratch_array(data: bytes) -> list[tuple[int, int]]:
    """The ``(address, size)`` entries of a scratch array's bytes; a partial one is ignored."""
    whole = len(data) - len(data) % _ENTRY.size
    return list(_ENTRY.iter_unpack(data[:whole]))


def kho_extend_scratch(
    memblock: Memblock,
    memory: NodeMemory,
    tree: KhoRadixTree,
    printk: Callable[[str], None],
) -> None:
    """``kho_extend_scratch``: let early boot use every 1 GiB block free of preserved memory.

    Digests the predecessor's tree (blocks and table pages) into a second tree of busy blocks, then
    marks what lies between its keys as scratch. A failure is reported and boot goes on with what
    was marked.
    """
    busy = KhoRadixTree(memory)
    error = busy.init_tree()
    if not error:
        end = min(memblock.memblock_end_of_DRAM(), _MAX_PHYS)
        error = _find_busy_blocks(
            tree, busy, memblock, memory.arch.page_shift, end >> _EXT_SHIFT
        )
        if not error:
            error = _mark_free_blocks(memblock, busy)
        busy.destroy()
    if error:
        printk(f"KHO: Failed to extend scratch: -{errno.errorcode[-error]}")


def _find_busy_blocks(
    tree: KhoRadixTree, busy: KhoRadixTree, memblock: Memblock, page_shift: int, last_block: int
) -> int:
    # Blocks beyond the end of memory change nothing of what is marked; a hostile tree has billions.
    few = _busy_blocks_at_once(tree, memblock, last_block)
    if few is not None:
        for first in few:
            error, _ = busy.add_run(first, 1)
            if error:
                return error
        return 0
    known: set[int] = set()
    for nr_keys, value in tree.walk():
        if nr_keys == 0:
            if value >> _EXT_SHIFT in known:
                continue
            spans = [(value, value + 1)]
        else:
            borders = _first_and_last(value, nr_keys)
            if borders is not None:
                # The common case, without a detour: a run of one order in a block that is known.
                block, last = borders
                if block > last_block or (block in known and last == block):
                    continue
            spans = list(blocks_of_run(value, nr_keys, page_shift))
        for start, end in spans:
            # A block smaller than 1 GiB lies in one busy block, a larger one starts at its first.
            first, last = start >> _EXT_SHIFT, min((end - 1) >> _EXT_SHIFT, last_block)
            if start >= end or first > last or (first == last and first in known):
                continue
            error, _ = busy.add_run(first, last - first + 1)
            if error:
                return error
            if first == last:
                known.add(first)
    return 0


def _busy_blocks_at_once(
    tree: KhoRadixTree, memblock: Memblock, last_block: int
) -> set[int] | None:
    # Of a sound tree with few blocks, all of whose bits come into one leaf of the other: then the
    # order in which they are found makes no difference. None where it may.
    found = tree.read_at_once()
    if found is None:
        return None
    pages, runs = found
    blocks = {page >> _EXT_SHIFT for page in pages}
    for nr_keys, key in runs:
        borders = _first_and_last(key, nr_keys)
        if borders is None or borders[1] - borders[0] > _FEW_BLOCKS:
            return None
        blocks.update(range(borders[0], borders[1] + 1))
    if max(blocks) > min(last_block, _FEW_BLOCKS):
        return None
    # The other tree's pages come from scratch, where they may overwrite this one's.
    pages.sort()
    memory = memblock.memory
    for start, end, flags in zip(memory.base, memory.end, memory.flags, strict=True):
        if flags & MEMBLOCK_KHO_SCRATCH and bisect_left(pages, start) < bisect_left(pages, end):
            return None
    return blocks


def _first_and_last(key: int, nr_keys: int) -> tuple[int, int] | None:
    # The 1 GiB blocks that a run begins and ends in; None where it crosses an order border.
    bits = key.bit_length()
    if (key + nr_keys - 1).bit_length() != bits:
        return None
    shift = (65 - bits) & 63
    phys = (key << shift) & _U64
    return phys >> _EXT_SHIFT, (phys + (nr_keys << shift) - 1) >> _EXT_SHIFT


def blocks_of_run(key: int, nr_keys: int, page_shift: int) -> Iterator[tuple[int, int]]:
    """``[start, end)`` in bytes of what ``nr_keys`` keys from ``key`` on preserve, in pieces."""
    # Consecutive keys are neighbouring blocks unless they cross an order border. The end of the
    # last block of the address space wraps to 0, so that the kernel's loop leaves it out.
    while nr_keys:
        phys, order = kho_decode_radix_key(key, page_shift)
        shift = (page_shift + order) & 63
        count = min(nr_keys, (1 << key.bit_length()) - key) if key else 1
        yield phys, min(phys + (count << shift), (1 << 64) - (1 << shift))
        key += count
        nr_keys -= count


def _mark_free_blocks(memblock: Memblock, busy: KhoRadixTree) -> int:
    free_from = 0
    for nr_keys, key in busy.runs():
        start = key << _EXT_SHIFT
        if start > free_from:
            error = memblock.memblock_mark_kho_scratch(free_from, start - free_from)
            if error:
                return error
        free_from = start + (nr_keys << _EXT_SHIFT)
    end = memblock.memblock_end_of_DRAM()
    if free_from < end:
        return memblock.memblock_mark_kho_scratch(free_from, end - free_from)
    return 0
