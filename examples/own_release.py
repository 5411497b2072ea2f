"""A release of one's own: preserved blocks in a plain list, instead of a radix tree.

Run it, or name it as a release of any command::

    khosim run small --release examples/own_release.py

A page of the list begins with the address of the next page and the number of its entries. An entry
is a block's address with its order in the low bits, which are free: blocks are whole pages.
"""

from __future__ import annotations

import errno
import struct

from khosim import Machine
from khosim.kernel.kho_tracker import BlockTracker
from khosim.kernel.release import find_release

_HEAD = struct.Struct("<QQ")  # next page, entries


class BlockList(BlockTracker):
    """The tracker: ``root`` is the first page of the list."""

    def init_tree(self, root=0):
        """Adopt the predecessor's list, or begin an empty one."""
        self.root = root or self._new_page()
        # Only RAM crosses; these spare this kernel a walk through the list for every block.
        self._where = {entry: at for at, entry in self._entries()}
        self._counts = {page: count for page, _, count in self._pages()}
        return 0 if self.root else -errno.ENOMEM

    def _new_page(self):
        # kho_radix_alloc_node gives a zeroed page, whatever it is called.
        return self.kernel.kho_radix_alloc_node()

    def _pages(self):
        page = self.root
        while page:
            at = self.kernel.virt(page, self.kernel.arch.page_size)
            following, count = _HEAD.unpack(self.kernel.ram.read(at, _HEAD.size))
            yield page, following, count
            page = following

    def _entries(self):
        for page, _, count in self._pages():
            for i in range(count):
                at = page + _HEAD.size + 8 * i
                yield at, self.kernel.ram.read_u64(at)

    def _entry(self, pfn, order):
        return pfn << self.kernel.arch.page_shift | order

    def add_block(self, pfn, order):
        """Append the block, unless it is there already."""
        entry = self._entry(pfn, order)
        if entry in self._where:
            return 0
        ram, by = self.kernel.ram, self.kernel.by("block_list_add")
        room = (self.kernel.arch.page_size - _HEAD.size) // 8
        last = next(reversed(self._counts))
        if self._counts[last] == room:
            fresh = self._new_page()
            if not fresh:
                return -errno.ENOMEM
            ram.write_u64(last, fresh, by)
            last, self._counts[fresh] = fresh, 0
        self._where[entry] = at = last + _HEAD.size + 8 * self._counts[last]
        ram.write_u64(at, entry, by)
        self._counts[last] += 1
        ram.write_u64(last + 8, self._counts[last], by)
        return 0

    def del_block(self, pfn, order):
        """Put the last entry into the place of the one that goes; pages are kept."""
        at = self._where.pop(self._entry(pfn, order), 0)
        if at:
            ram, by = self.kernel.ram, self.kernel.by("block_list_del")
            page = next(page for page in reversed(self._counts) if self._counts[page])
            self._counts[page] -= 1
            last = ram.read_u64(page + _HEAD.size + 8 * self._counts[page])
            ram.write_u64(at, last, by)
            if last in self._where:
                self._where[last] = at
            ram.write_u64(page + 8, self._counts[page], by)
        else:
            self.kernel.warn(f"WARNING: block_list_del: pfn {pfn:#x} was never preserved")
        return True

    def blocks(self):
        """What the successor reads: one block after the other."""
        mask = self.kernel.arch.page_size - 1
        for _, entry in self._entries():
            yield entry & ~mask, entry & mask, 1

    def table_pages(self):
        """The list's own pages."""
        return [page for page, _, _ in self._pages()]

    def destroy(self):
        """Free them."""
        for page in self.table_pages():
            self.kernel.kho_radix_free_node(page)
        self.root = 0


def decode(reader, map_phys, page_size):
    """The checkers' own reader of the list: written anew, so that it can disagree."""
    runs, pages = [], []
    while map_phys:
        pages.append(map_phys)
        data = reader.read(map_phys, page_size)
        following, count = _HEAD.unpack_from(data)
        for (entry,) in struct.iter_unpack("<Q", data[_HEAD.size : _HEAD.size + 8 * count]):
            runs.append((entry // page_size, entry % page_size, 1))
        map_phys = following
    return runs, pages


RELEASE = find_release("7.3").evolve(
    name="7.3-list",
    uname="7.3.0-list",
    kho_compatible="kho-list-v1",
    tracker=f"{__file__}:BlockList",
    decoder=f"{__file__}:decode",
    scratch_extension=False,  # it walks the radix tree
)


if __name__ == "__main__":
    machine = Machine("256M")
    kernel = machine.boot(RELEASE, cmdline="kho=on reserve_mem=1M:64K:log")
    kept = kernel.alloc_folio(order=2)
    kept.write(0, b"in a list")
    kernel.kho_preserve_folio(kept)

    successor = kernel.kexec()
    print("took over:", successor.is_kho_boot)
    print("restored:", successor.kho_restore_folio(kept.phys).read(0, 9))

    older = successor.kexec(release="7.3")
    print("7.3 says:", *(line for line in older.messages if "incompatible" in line))
    print("violations:", machine.check())
