"""The formats of lesson 11: a row of bytes, one for each page of the machine.

The row begins with the number of pages (8 bytes). A byte is 0 where nothing is preserved, else 1
plus the order of the block that begins there. ``RELEASE`` is what the lesson arrives at::

    khosim run small --release examples/lessons/own_format.py
"""

from __future__ import annotations

import errno

from khosim.kernel.kho_tracker import BlockTracker
from khosim.kernel.release import find_release

_HEAD_BYTES = 8


class Row(BlockTracker):
    """The row; ``root`` is its address."""

    def init_tree(self, root=0):
        """Adopt the predecessor's row, or make an empty one."""
        kernel = self.kernel
        if not root:
            nr_pages = kernel.ram.size_bytes >> kernel.arch.page_shift
            pages = -(-(_HEAD_BYTES + nr_pages) // kernel.arch.page_size)
            self.order = (pages - 1).bit_length()
            pfn = kernel.pages.alloc_pages(self.order, "row")
            if pfn is None:
                return -errno.ENOMEM
            root = pfn << kernel.arch.page_shift
            kernel.ram.zero(root, kernel.arch.page_size << self.order, kernel.by("row_init"))
            kernel.ram.write_u64(root, nr_pages, kernel.by("row_init"))
        self.root = root
        return 0

    def _write(self, pfn, byte):
        at = self.root + _HEAD_BYTES + pfn
        self.kernel.ram.write(at, bytes([byte]), self.kernel.by("row_write"))

    def add_block(self, pfn, order):
        """Mark a block."""
        self._write(pfn, 1 + order)
        return 0

    def del_block(self, pfn, order):
        """Unmark it."""
        self._write(pfn, 0)
        return True

    def blocks(self):
        """What the successor reads."""
        ram, shift = self.kernel.ram, self.kernel.arch.page_shift
        row = ram.read(self.root + _HEAD_BYTES, ram.read_u64(self.root))
        for pfn, byte in enumerate(row):
            if byte:
                yield pfn << shift, byte - 1, 1

    def table_pages(self):
        """The row's own pages."""
        page_size = self.kernel.arch.page_size
        return [self.root + n * page_size for n in range(1 << self.order)]

    def destroy(self):
        """Free them."""
        self.kernel.pages.free_pages(self.root >> self.kernel.arch.page_shift, self.order)
        self.root = 0


class Flags(Row):
    """The first idea: each preserved page has a 1."""

    def add_block(self, pfn, order):
        """Mark every page of a block."""
        for page in range(pfn, pfn + (1 << order)):
            self._write(page, 1)
        return 0

    def del_block(self, pfn, order):
        """Unmark them."""
        for page in range(pfn, pfn + (1 << order)):
            self._write(page, 0)
        return True


def decode(reader, map_phys, page_size):
    """The invariants' own reader: blocks as (pfn, order, how many), and the row's pages."""
    nr_pages = int.from_bytes(reader.read(map_phys, _HEAD_BYTES), "little")
    row = reader.read(map_phys + _HEAD_BYTES, nr_pages)
    blocks = [(pfn, byte - 1, 1) for pfn, byte in enumerate(row) if byte]
    pages = range(map_phys, map_phys + _HEAD_BYTES + nr_pages, page_size)
    return blocks, list(pages)


def release(name, tracker, compatible):
    """Linux 7.3 with another format, and the name that its notes bear."""
    return find_release("7.3").evolve(
        name=f"7.3-{name}",
        uname=f"7.3.0-{name}",
        kho_compatible=compatible,
        tracker=f"{__file__}:{tracker}",
        decoder=f"{__file__}:decode",
        scratch_extension=False,  # it walks the radix tree
    )


FLAGS = release("flags", "Flags", "kho-flags-v1")
NAMELESS = release("nameless", "Row", "kho-v4")
RELEASE = release("row", "Row", "kho-row-v1")
