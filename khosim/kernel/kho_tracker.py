"""What any tracker of preserved memory can do, whatever its bytes look like.

KHO marks blocks of ``1 << order`` pages and later tells the successor of them by one number, the
address of a map. :class:`BlockTracker` is that in four methods: mark a block, unmark it, say where
the map is, read a map. The rest (keys, runs and arrays of blocks, which the calls of
``kernel/liveupdate/kexec_handover.c`` work with) is made of those. A designer's own tracker derives
from it; :mod:`~khosim.kernel.kho_chunks` is one, the radix tree of 7.1 and later has its own keys.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from khosim.errors import InputError, KernelPanic
from khosim.kernel.kho_radix import KhoRadixTree, Pfns
from khosim.kernel.kho_radix_key import kho_decode_radix_key, kho_encode_radix_key
from khosim.kernel.kmalloc_cache import KmallocCache
from khosim.plugins import loaded_plugin

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("BlockTracker", "Tracker", "make_tracker", "radix_depth")


class BlockTracker(ABC):
    """One map of preserved blocks; ``root`` is its address in bytes, 0 where there is none.

    The outgoing side makes one with ``root`` 0, the incoming side with what it was told.
    """

    __slots__ = ("kernel", "root")

    def __init__(self, kernel: Kernel, root: int = 0) -> None:
        self.kernel = kernel
        self.root = root

    # -- what a tracker is ----------------------------------------------------------------------

    @abstractmethod
    def add_block(self, pfn: int, order: int) -> int:
        """Mark the block at ``pfn``: 0, or a negative errno and nothing changed."""

    @abstractmethod
    def del_block(self, pfn: int, order: int) -> bool:
        """Unmark it; False where the range it is part of shall not be gone through any further."""

    @abstractmethod
    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Read the map at ``root``: ``(phys, order, blocks)`` of neighbours, in the map's order.

        Addresses are in bytes. Whatever memory holds ends in blocks or in a
        :class:`~khosim.errors.KernelPanic`.
        """

    def init_tree(self, root: int = 0) -> int:
        """Begin a map, or adopt the one at ``root``: 0, or a negative errno."""
        self.root = root
        return 0

    def destroy(self) -> None:
        """Give all memory of an outgoing map back."""
        self.root = 0

    def table_pages(self) -> list[int]:
        """Addresses of the outgoing map's own pages, for statistics."""
        return []

    def marked(self) -> Iterator[tuple[int, int, int]]:
        """The marked blocks now, as :meth:`blocks` gives them; they may not be written down yet."""
        return self.blocks()

    # -- keys, as the calls of KHO use them -----------------------------------------------------

    def _decode(self, key: int) -> tuple[int, int]:
        shift = self.kernel.arch.page_shift
        phys, order = kho_decode_radix_key(key, shift)
        return phys >> shift, order

    def add_key(self, key: int) -> int:
        """Mark the block of a key."""
        return self.add_block(*self._decode(key))

    def del_key(self, key: int) -> bool:
        """Unmark it."""
        return self.del_block(*self._decode(key))

    def add_run(self, first_key: int, nr_keys: int) -> tuple[int, int]:
        """Mark ``nr_keys`` neighbours: ``(error, blocks marked)``."""
        if not nr_keys:
            return 0, 0
        pfn, order = self._decode(first_key)
        for done in range(nr_keys):
            error = self.add_block(pfn + (done << order), order)
            if error:
                return error, done
        return 0, nr_keys

    def add_many(self, keys: Pfns) -> tuple[int, int]:
        """Mark the blocks of an array of keys, in order: ``(error, blocks marked)``."""
        for done, key in enumerate(keys.tolist()):
            error = self.add_key(key)
            if error:
                return error, done
        return 0, len(keys)

    def del_run(self, first_key: int, nr_keys: int) -> None:
        """Unmark ``nr_keys`` neighbours."""
        pfn, order = self._decode(first_key)
        for done in range(nr_keys):
            self.del_block(pfn + (done << order), order)

    def walk(self) -> Iterator[tuple[int, int]]:
        """``(0, page)`` for each page of the map, ``(nr_keys, first key)`` for each run marked."""
        for page in self.table_pages():
            yield 0, page
        shift = self.kernel.arch.page_shift
        for phys, order, nr_blocks in self.marked():
            yield nr_blocks, kho_encode_radix_key(phys, order, shift)


Tracker: TypeAlias = KhoRadixTree | BlockTracker
"""What the outgoing side marks blocks in."""


def radix_depth(kernel: Kernel) -> int:
    """``KHO_TREE_MAX_DEPTH``: levels of the radix tree, leaf included."""
    arch, release = kernel.arch, kernel.release
    if not release.tree_depth_ignores_order_bit:
        return arch.tree_depth
    # Fixed by d64b0372760e ("kho: fix KHO_TREE_MAX_DEPTH for non-4KB page sizes"), 7.1-rc6.
    key_bits, leaf_bits = 64 - arch.page_shift, arch.page_shift + 3
    return -(-(key_bits - leaf_bits) // (arch.page_shift - 3)) + 1


def _kzalloc_page(kernel: Kernel) -> int:
    """``kzalloc(PAGE_SIZE)`` of ``kho_init``: an object's address, or 0."""
    if kernel.page_cache is None:
        kernel.page_cache = KmallocCache(kernel, kernel.arch.page_size)
    return kernel.page_cache.kzalloc("kho_init")


def make_tracker(kernel: Kernel) -> Tracker:
    """An empty tracker of the kind that the kernel's release has."""
    name = kernel.release.tracker
    if name == "radix":
        return KhoRadixTree(
            kernel,
            depth=radix_depth(kernel),
            check_width=kernel.release.radix_key_width_checked,
            root_from=partial(_kzalloc_page, kernel)
            if kernel.release.tree_root_from_slab
            else None,
        )
    if name == "chunks":
        from khosim.kernel.kho_chunks import KhoChunks

        return KhoChunks(kernel)
    try:
        found = loaded_plugin(name)
    except InputError as error:
        raise KernelPanic(f"no such tracker: {error}", kernel.generation) from None
    tracker = found(kernel)
    if not isinstance(tracker, BlockTracker):
        raise InputError(name, "not a BlockTracker")
    return tracker


def no_memory() -> int:
    """-ENOMEM, as trackers return it."""
    return -errno.ENOMEM
