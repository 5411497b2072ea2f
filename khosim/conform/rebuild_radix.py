"""The tree of preserved memory built once more by khosim's kernel, and its pages compared.

``kernel/liveupdate/kexec_handover.c:kho_radix_add_key`` @ 7.3 is run for every block that the
checkers' decoder found. Leaves have to come out byte for byte; tables hold addresses of pages that
are the kernel's own, so there the same entries have to be in use. Pages that a kernel keeps after
it has forgotten all blocks in them are empty, and have no counterpart.
"""

from __future__ import annotations

import numpy as np

from khosim.checks.preserved import Preserved, expand
from khosim.checks.reader import Reader
from khosim.conform.rebuild_fdt import first_difference
from khosim.errors import RamFault
from khosim.kernel.arch import Arch
from khosim.kernel.kho_radix import KhoRadixTree
from khosim.kernel.kho_radix_key import kho_encode_radix_key
from khosim.machine.ram import Ram

__all__ = ("compare_tree",)

_BY = (0, "conform")
_MOST_PAGES = 1 << 16


class _Nodes:
    """Pages for a tree in a RAM of its own, one after the other."""

    def __init__(self, arch: Arch, nr_pages: int) -> None:
        self.arch = arch
        self.ram = Ram((nr_pages + 2) * arch.page_size, page_size=arch.page_size)
        self._next = arch.page_size

    def kho_radix_alloc_node(self) -> int:
        """The next page, or 0 when there is none left."""
        phys = self._next
        if phys + self.arch.page_size > self.ram.size_bytes:
            return 0
        self._next += self.arch.page_size
        return phys

    def kho_radix_alloc_nodes(self, nr_nodes: int) -> list[int]:
        """As many single ones."""
        return [phys for phys in (self.kho_radix_alloc_node() for _ in range(nr_nodes)) if phys]

    def kho_radix_free_node(self, phys: int) -> None:
        """Nothing is freed here."""

    def virt(self, phys: int, len_bytes: int) -> int:
        """All of it is mapped."""
        return phys

    def warn(self, message: str) -> None:
        """Nobody listens."""

    def warn_once(self, message: str, where: str) -> None:
        """Nobody listens."""

    def by(self, symbol: str) -> tuple[int, str]:
        """One writer for all."""
        return _BY


def compare_tree(
    reader: Reader, preserved: Preserved, root: int, arch: Arch
) -> tuple[int, int, list[str]]:
    """Pages that came out the same, pages of the real tree, and differences in words."""
    nodes = _Nodes(arch, min(len(preserved.table_pages), _MOST_PAGES))
    tree = KhoRadixTree(nodes)
    tree.init_tree()
    shift = arch.page_shift
    keys = [kho_encode_radix_key(phys, order, shift) for phys, order in expand(preserved)]
    total = len(preserved.table_pages)
    error, done = tree.add_many(np.array(keys, dtype=np.int64))
    if error:
        return 0, total, [f"block {done} of {len(keys)} needs more pages than the real tree has"]
    differences: list[str] = []
    same = 0
    stack = [(root, tree.root, arch.tree_depth - 1)]
    while stack:
        real_phys, own_phys, level = stack.pop()
        try:
            real = reader.read(real_phys, arch.page_size)
        except RamFault as fault:
            differences.append(f"table page at {real_phys:#x}: {fault.cause}")
            continue
        if not own_phys:
            # A branch without any block: what is below must be empty, too.
            if level and any(real):
                children = np.frombuffer(real, "<u8")
                stack += [(int(child), 0, level - 1) for child in children[children > 0]]
                same += 1
            elif any(real):
                differences.append(f"leaf at {real_phys:#x}: bits that are no blocks")
            else:
                same += 1
            continue
        own = nodes.ram.read(own_phys, arch.page_size)
        if not level:
            difference = first_difference(real, own)
            if difference:
                differences.append(f"leaf at {real_phys:#x}: {difference}")
            same += not difference
            continue
        theirs, ours = np.frombuffer(real, "<u8"), np.frombuffer(own, "<u8")
        lost = np.flatnonzero((theirs == 0) & (ours != 0)).tolist()
        if lost:
            differences.append(f"table at {real_phys:#x}: entry {lost[0]} is empty")
        same += not lost
        used = np.flatnonzero(theirs).tolist()
        stack += [(int(theirs[i]), int(ours[i]), level - 1) for i in used]
    return same, total, differences
