"""KFENCE: a pool of guarded pages from which kmalloc takes an object now and then.

Models ``mm/kfence/core.c`` @ 6.16: ``kfence_alloc_pool_and_metadata``, ``__kfence_alloc`` and
``kfence_guarded_free``, as far as it matters where an object lies. The pool comes from memblock,
and so from scratch in a kernel that took a handover over. The gate opens once per sample
interval; no time passes here, so it opens for the first object and for every
:data:`GATE`-th after it.

Left out: guard pages' faults, canaries, objects at the end of their page, quarantine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("GATE", "Kfence", "kfence_alloc_pool")

GATE = 64
"""One in so many objects comes from the pool."""


def kfence_alloc_pool(kernel: Kernel) -> None:
    """``kfence_alloc_pool_and_metadata``: ``kernel.kfence``, where the configuration has it."""
    nr_objects = kernel.config.kfence_objects
    if not nr_objects:
        return
    page_size = kernel.arch.page_size
    size = (nr_objects + 1) * 2 * page_size
    pool = kernel.memblock.memblock_alloc(size, page_size)
    if not pool:
        kernel.printk("kfence: failed to allocate pool")
        return
    kernel.kfence = Kfence(kernel, pool, nr_objects)


class Kfence:
    """The pool at ``phys``: pairs of pages, of which the first is a guard and the second an object.

    The very first pair holds no object.
    """

    __slots__ = ("_asked", "_free", "_kernel", "phys")

    def __init__(self, kernel: Kernel, phys: int, nr_objects: int) -> None:
        self._kernel = kernel
        self.phys = phys
        self._asked = 0
        pair = 2 * kernel.arch.page_size
        self._free = [phys + pair * n for n in range(nr_objects, 0, -1)]

    def alloc(self, size_bytes: int) -> int:
        """``kfence_alloc``: the address of an object, or 0 where kmalloc is to serve it."""
        is_open = not self._asked % GATE
        self._asked += 1
        if not is_open or not self._free or size_bytes > self._kernel.arch.page_size:
            return 0
        return self._free.pop()

    def holds(self, phys: int) -> bool:
        """``is_kfence_address``."""
        pair = 2 * self._kernel.arch.page_size
        nr_pairs = self._kernel.config.kfence_objects + 1
        return self.phys <= phys < self.phys + nr_pairs * pair

    def free(self, phys: int) -> None:
        """``kfence_free``."""
        self._free.append(phys)
