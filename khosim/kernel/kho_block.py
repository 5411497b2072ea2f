"""KHO blocks: sets of equal entries in preserved pages, written here and read in the successor.

Models ``kernel/liveupdate/kho_block.c`` @ 7.3. The entries lie in RAM and are named by physical
address; only the list of blocks is kept beside it, as in the kernel. Refusals raise
:class:`~khosim.errors.KernelError`. Left out: locks, which are the callers' there too.

Mind that a block set adopts what it is told to restore: the pages stay in the predecessor's hands
(restored one by one as they are freed), and links are written to them as to blocks of its own.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from khosim.abi.kho_block import KHO_BLOCK_HEADER_BYTES, kho_block_capacity
from khosim.errors import KernelError
from khosim.kernel.page import Folio
from khosim.kernel.slab import kmalloc

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("KHO_MAX_BLOCKS", "KhoBlockSet", "KhoBlockSetIt")

KHO_MAX_BLOCKS = 10000
_NEXT, _COUNT = 0, 8  # offsets in the header
_U64 = (1 << 64) - 1


class KhoBlockSet:
    """``struct kho_block_set``: blocks of ``entry_size`` bytes per entry.

    ``blocks`` are the physical addresses of the block headers, in order.
    """

    __slots__ = ("blocks", "count_per_block", "entry_size", "head_pa", "incoming", "kernel")

    def __init__(self, kernel: Kernel, entry_size: int) -> None:
        self.kernel = kernel
        self.blocks: list[int] = []
        self.head_pa = 0
        self.entry_size = entry_size
        self.count_per_block = kho_block_capacity(kernel.arch.page_size, entry_size)
        self.incoming = False
        """Whether the set came from the predecessor."""
        if not self.count_per_block:
            kernel.warn_once("WARNING: kho_block_set_init: no entry fits", "kho_block_set_init")

    @property
    def nblocks(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    @property
    def is_empty(self) -> bool:
        """``kho_block_set_is_empty``: whether the set has no blocks."""
        return not self.blocks

    def iterate(self) -> KhoBlockSetIt:
        """``kho_block_set_it_init``: an iterator at the first entry."""
        return KhoBlockSetIt(self)

    # -- outgoing -------------------------------------------------------------------------------

    def grow(self, count: int) -> None:
        """``kho_block_set_grow``: make room for ``count`` entries; all or nothing.

        Raises -EINVAL on an incoming set, -ENOSPC beyond 10000 blocks (after allocating the one
        too many) and the errors of ``kho_alloc_preserve``.
        """
        if self.incoming:
            where = "kho_block_set_grow"
            self.kernel.warn_once("WARNING: kho_block_set_grow: the set is incoming", where)
            raise KernelError(errno.EINVAL, where, "the set is incoming")
        orig_nblocks = len(self.blocks)
        while count > len(self.blocks) * self.count_per_block & _U64:
            try:
                self._grow_one()
            except KernelError:
                while len(self.blocks) > orig_nblocks:
                    self._shrink_one()
                raise
        if self.kernel.trace is not None:
            args = {"count": count, "nblocks": len(self.blocks)}
            self.kernel.emit("kho_block_set_grow", args, 0)

    def _grow_one(self) -> None:
        kernel = self.kernel
        if self.incoming:
            kernel.warn_once("WARNING: kho_block_alloc_ser: the set is incoming", "block_alloc")
        ser = kernel.kho_alloc_preserve(kernel.arch.page_size).phys
        try:
            self._add(ser)
        except KernelError:
            self._free_ser(ser)
            raise

    def _add(self, ser: int) -> None:
        # kho_block_add
        kernel = self.kernel
        if len(self.blocks) >= KHO_MAX_BLOCKS:
            raise KernelError(errno.ENOSPC, "kho_block_add", f"{KHO_MAX_BLOCKS} blocks")
        if not kmalloc(kernel, "kho_block_add"):
            raise KernelError(errno.ENOMEM, "kho_block_add")
        if self.blocks:
            kernel.ram.write_u64(self.blocks[-1] + _NEXT, ser, kernel.by("kho_block_add"))
        else:
            self.head_pa = ser
        self.blocks.append(ser)

    def shrink(self, count: int) -> None:
        """``kho_block_set_shrink``: drop the blocks at the end that ``count`` entries do without.

        Also on an incoming set, whose blocks are then restored and freed.
        """
        while self.blocks and count <= (len(self.blocks) - 1) * self.count_per_block & _U64:
            self._shrink_one()

    def _shrink_one(self) -> None:
        if not self.blocks:
            return
        self._free_ser(self.blocks.pop())
        if self.blocks:
            kernel = self.kernel
            by = kernel.by("kho_block_set_shrink_one")
            kernel.ram.write_u64(self.blocks[-1] + _NEXT, 0, by)
        else:
            self.head_pa = 0

    def clear(self) -> None:
        """``kho_block_set_clear``: zero all counts and entries; blocks and links stay."""
        kernel = self.kernel
        by = kernel.by("kho_block_set_clear")
        for ser in self.blocks:
            kernel.ram.zero(ser + _COUNT, kernel.arch.page_size - _COUNT, by)

    # -- incoming -------------------------------------------------------------------------------

    def restore(self, head_pa: int) -> None:
        """``kho_block_set_restore``: adopt the predecessor's chain that starts at ``head_pa``.

        0 is an empty set. Raises -EINVAL for a cycle, for too long a chain and for a block whose
        count is 0 or too large; -ENOSPC beyond 10000 blocks; -ENOMEM. All blocks of the chain are
        restored and freed on a refusal, except where it is cyclic: then they stay as they are.
        """
        kernel = self.kernel
        symbol = "kho_block_set_restore"
        self.incoming = True
        if not head_pa:
            return
        self.head_pa = head_pa
        if self._is_cyclic():
            self.head_pa = 0
            raise KernelError(errno.EINVAL, symbol, "the chain is cyclic or too long")
        next_pa = head_pa
        while next_pa:
            ser = kernel.virt(next_pa, KHO_BLOCK_HEADER_BYTES)
            count = kernel.ram.read_u64(ser + _COUNT)
            try:
                if not count or count > self.count_per_block:
                    kernel.printk(f"luo: Block contains invalid entry count: {count}")
                    raise KernelError(errno.EINVAL, symbol, f"a block with {count} entries")
                self._add(ser)
            except KernelError:
                self.destroy()
                self._free_rest(next_pa)
                raise
            next_pa = kernel.ram.read_u64(ser + _NEXT)
        if kernel.trace is not None:
            args = {"head_pa": head_pa, "nblocks": len(self.blocks)}
            kernel.emit(symbol, args, 0)

    def _free_rest(self, next_pa: int) -> None:
        kernel = self.kernel
        while next_pa:
            ser = kernel.virt(next_pa, KHO_BLOCK_HEADER_BYTES)
            next_pa = kernel.ram.read_u64(ser + _NEXT)
            self._free_ser(ser)

    def _is_cyclic(self) -> bool:
        # kho_block_set_is_cyclic: Floyd's two pointers, the fast one two links at a time.
        kernel = self.kernel
        read_u64 = kernel.ram.read_u64
        virt = kernel.virt
        fast = slow = virt(self.head_pa, KHO_BLOCK_HEADER_BYTES)
        for _ in range(KHO_MAX_BLOCKS):
            following = read_u64(fast + _NEXT)
            if not following:
                return False
            fast = virt(following, KHO_BLOCK_HEADER_BYTES)
            following = read_u64(fast + _NEXT)
            if not following:
                return False
            fast = virt(following, KHO_BLOCK_HEADER_BYTES)
            slow = read_u64(slow + _NEXT)
            if slow == fast:
                kernel.printk("luo: Block set is corrupted")
                return True
        kernel.printk("luo: Block set is corrupted")
        return True

    # -- both -----------------------------------------------------------------------------------

    def destroy(self) -> None:
        """``kho_block_set_destroy``: free all blocks."""
        blocks, self.blocks = self.blocks, []
        for ser in blocks:
            self._free_ser(ser)
        self.head_pa = 0

    def _free_ser(self, ser: int) -> None:
        # kho_block_free_ser
        kernel = self.kernel
        if self.incoming:
            kernel.kho_restore_free(ser)
        else:
            kernel.kho_unpreserve_free(Folio(kernel, ser >> kernel.arch.page_shift, 0))


class KhoBlockSetIt:
    """``struct kho_block_set_it``: a place in a block set; entries are physical addresses.

    ``block`` is the index of the current block, ``i`` that of the next entry in it.
    """

    __slots__ = ("block", "bs", "i")

    def __init__(self, bs: KhoBlockSet) -> None:
        self.bs = bs
        self.block = 0
        self.i = 0

    def _entry(self, index: int) -> int:
        bs = self.bs
        return bs.blocks[self.block] + KHO_BLOCK_HEADER_BYTES + index * bs.entry_size

    def reserve_entry(self) -> int | None:
        """``kho_block_set_it_reserve_entry``: the next slot to write, None when all are full.

        The count in the block's header becomes the number of slots handed out so far, whatever it
        was. Blocks that are never reached keep the count they have.
        """
        bs = self.bs
        if not bs.blocks:
            return None
        if self.i == bs.count_per_block:
            if self.block == len(bs.blocks) - 1:
                return None
            self.block += 1
            self.i = 0
        entry = self._entry(self.i)
        self.i += 1
        kernel = bs.kernel
        by = kernel.by("kho_block_set_it_reserve_entry")
        kernel.ram.write_u64(bs.blocks[self.block] + _COUNT, self.i, by)
        return entry

    def read_entry(self) -> int | None:
        """``kho_block_set_it_read_entry``: the next written entry, None at the end."""
        bs = self.bs
        if not bs.blocks:
            return None
        if self.i == bs.kernel.ram.read_u64(bs.blocks[self.block] + _COUNT):
            if self.block == len(bs.blocks) - 1:
                return None
            self.block += 1
            self.i = 0
        entry = self._entry(self.i)
        self.i += 1
        return entry

    def prev(self) -> int | None:
        """``kho_block_set_it_prev``: one entry back, None at the very beginning."""
        bs = self.bs
        if not bs.blocks:
            return None
        if not self.i:
            if not self.block:
                return None
            self.block -= 1
            self.i = bs.count_per_block
        self.i -= 1
        return self._entry(self.i)
