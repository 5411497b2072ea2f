"""What a captured predecessor handed over, as its successor's boot uses it.

Puts the pages of ``ram.npz`` into a RAM of their own and lets the kernel's radix tree walk them:
``kernel/liveupdate/kexec_handover.c:kho_extend_scratch`` and ``kho_mem_retrieve`` @ 7.3. Formats
older than kho-v4 keep their map differently and have no tree here.
"""

from __future__ import annotations

import numpy as np

from khosim.abi import fdt
from khosim.capture.folder import CapturedGeneration
from khosim.errors import InputError, KernelPanic
from khosim.kernel.arch import Arch, find_arch
from khosim.kernel.kho_radix import KhoRadixTree
from khosim.kernel.kho_radix_key import kho_decode_radix_key
from khosim.kernel.kho_scratch import kho_extend_scratch
from khosim.kernel.memblock import Memblock
from khosim.machine.ram import MAX_PHYS, Ram

__all__ = ("Predecessor", "PreservedBlock")

PreservedBlock = tuple[int, int]
"""``(phys, len_bytes)`` of one preserved block."""

_BY = (0, "replay")
_COMPATIBLE = "kho-v4"
_MAP_PROP = "preserved-memory-map"
_FDT_HEADER_BYTES = 40


class Predecessor:
    """One captured generation, seen from its ``successor``.

    Files are read when they are needed; what is missing or damaged raises :class:`InputError`.
    ``root_fdt`` and ``areas`` (scratch) take the place of what debugfs shows of them.
    """

    def __init__(
        self,
        generation: CapturedGeneration,
        successor: CapturedGeneration,
        arch: str,
        *,
        root_fdt: bytes | None = None,
        areas: list[tuple[int, int]] | None = None,
    ) -> None:
        self.generation = generation
        self.successor = successor
        self._root_fdt = root_fdt
        self._areas = areas
        self.arch: Arch = find_arch(arch, generation.page_size)
        self._ram: Ram | None = None
        self.known_pfns: frozenset[int] = frozenset()
        self._root: int | None = None

    def scratch_areas(self) -> list[tuple[int, int]] | None:
        """Its scratch areas as (address, length), in its order; None where it had no debugfs."""
        if self._areas is None and self.generation.has("kho"):
            self._areas = list(self.generation.scratch_areas)
        return self._areas

    def found_areas(self, areas: list[tuple[int, int]]) -> None:
        """Say what its scratch areas were, where it does not tell."""
        if self.scratch_areas() is None:
            self._areas = areas

    def preserved(self) -> list[PreservedBlock] | None:
        """Every preserved block in the order of the kernel's walk; None without a tree."""
        if not self._map_root():
            return None
        shift = self.arch.page_shift
        blocks: list[PreservedBlock] = []
        tree = KhoRadixTree(_Nodes(self, None), self._map_root())
        try:
            for nr_keys, first in tree.walk():
                for key in range(first, first + nr_keys):
                    phys, order = kho_decode_radix_key(key, shift)
                    blocks.append((phys, 1 << (shift + order & 63)))
        except KernelPanic as panic:
            raise InputError(self.npz, panic.message) from None
        return blocks

    def extend_scratch(self, memblock: Memblock) -> bool:
        """Run ``kho_extend_scratch`` on ``memblock``; whether there was a tree to run it with."""
        root = self._map_root()
        if not root:
            return False
        memory = _Nodes(self, memblock)
        try:
            kho_extend_scratch(memblock, memory, KhoRadixTree(memory, root), lambda line: None)
        except KernelPanic as panic:
            raise InputError(self.npz, panic.message) from None
        return True

    @property
    def npz(self) -> str:
        """The file with its pages, for messages."""
        return str(self.generation.path / "ram.npz")

    def _map_root(self) -> int:
        if self._root is None:
            self._root = self._read_root()
        return self._root

    def _read_root(self) -> int:
        # From the root FDT as the successor found it.
        place = str(self.successor.path / "kho/in/fdt")
        data = self._root_fdt
        tree = memoryview(self.successor.bytes_of("kho/in/fdt") if data is None else data)
        if len(tree) < _FDT_HEADER_BYTES or fdt.fdt_check_header(tree):
            raise InputError(place, "no device tree")
        if fdt.fdt_node_check_compatible(tree, 0, _COMPATIBLE):
            return 0
        value, length = fdt.fdt_getprop(tree, 0, _MAP_PROP)
        if value is None or length != 8:
            raise InputError(place, f"no property {_MAP_PROP!r}")
        return int.from_bytes(bytes(value), "little")

    def ram(self) -> Ram:
        """RAM with the captured pages in it."""
        if self._ram is None:
            pfn, data = self.generation.ram_pages
            page = self.arch.page_size
            end = (int(pfn[-1]) + 1) * page if len(pfn) else page
            end = max([end, *(start + size for start, size in self.scratch_areas() or [])])
            if end > MAX_PHYS:
                raise InputError(self.npz, f"a page beyond {MAX_PHYS:#x}")
            ram = Ram(end, page_size=page)
            ram.data.reshape(-1, page)[pfn.astype(np.int64)] = data
            self.known_pfns = frozenset(pfn.tolist())
            self._ram = ram
        return self._ram


class _Nodes:
    """A :class:`~khosim.kernel.kho_radix_memory.NodeMemory`: memblock, and the captured pages."""

    def __init__(self, predecessor: Predecessor, memblock: Memblock | None) -> None:
        self.arch = predecessor.arch
        self.ram = predecessor.ram()
        self._npz = predecessor.npz
        self._known = set(predecessor.known_pfns)
        self._memblock = memblock

    def kho_radix_alloc_node(self) -> int:
        """``memblock_alloc`` of a page."""
        assert self._memblock is not None
        page = self.arch.page_size
        phys = self._memblock.memblock_alloc(page, page)
        if phys and phys + page <= self.ram.size_bytes:
            self.ram.zero(phys, page, _BY)
            self._known.add(phys >> self.arch.page_shift)
        return phys

    def kho_radix_alloc_nodes(self, nr_nodes: int) -> list[int]:
        """As many single ones; fewer when memory ends."""
        return [phys for phys in (self.kho_radix_alloc_node() for _ in range(nr_nodes)) if phys]

    def kho_radix_free_node(self, phys: int) -> None:
        """``memblock_free`` of a page."""
        assert self._memblock is not None
        self._memblock.memblock_phys_free(phys, self.arch.page_size)

    def virt(self, phys: int, len_bytes: int) -> int:
        """``phys`` again; :class:`InputError` for a page that was not captured."""
        if phys >> self.arch.page_shift not in self._known:
            raise InputError(self._npz, f"the tree leads to {phys:#x}, which is not there")
        return phys

    def warn(self, message: str) -> None:
        """Nobody listens."""

    def warn_once(self, message: str, where: str) -> None:
        """Nobody listens."""

    def by(self, symbol: str) -> tuple[int, str]:
        """One writer for all."""
        return _BY
