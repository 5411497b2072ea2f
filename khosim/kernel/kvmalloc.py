"""Buffers of any size: kvmalloc.

Models ``mm/slub.c:__kvmalloc_node_noprof`` @ 7.3: a block of the buddy allocator where there is
one, else vmalloc with huge pages, and never more than ``INT_MAX`` bytes. What is in a buffer its
user keeps; the buffer takes the pages. Left out: GFP flags.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.kernel.page import Folio
from khosim.kernel.slab import kmalloc, kmalloc_large
from khosim.kernel.vmalloc import VmStruct, vfree, vmalloc

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("KVMALLOC_MAX_BYTES", "Buffer", "kvfree", "kvmalloc")

KVMALLOC_MAX_BYTES = (1 << 31) - 1
"""``INT_MAX``: whoever asks for more gets NULL and a warning.

A release with a behaviour ``kvmalloc_max_bytes`` has that limit instead.
"""


class Buffer:
    """What :func:`kvmalloc` returned: slab memory, a block of pages, or an area."""

    __slots__ = ("memory",)

    def __init__(self, memory: Folio | VmStruct | None = None) -> None:
        self.memory = memory


def kvmalloc(kernel: Kernel, size_bytes: int, symbol: str) -> Buffer | None:
    """``kvmalloc`` for the function ``symbol``; None without memory or above 2 GiB - 1."""
    if size_bytes <= 2 * kernel.arch.page_size:
        # KMALLOC_MAX_CACHE_SIZE: the slab caches have it; 0 bytes is ZERO_SIZE_PTR.
        if not size_bytes or kmalloc(kernel, symbol):
            return Buffer()
    else:
        block = kmalloc_large(kernel, size_bytes, symbol)
        if block is not None:
            return Buffer(block)
    if size_bytes <= kernel.arch.page_size:
        return None
    if size_bytes > getattr(kernel.release, "kvmalloc_max_bytes", KVMALLOC_MAX_BYTES):
        kernel.warn_once(f"WARNING: kvmalloc of {size_bytes} bytes for {symbol}", "kvmalloc")
        return None
    area = vmalloc(kernel, size_bytes, huge=True, owner=symbol)
    return None if area is None else Buffer(area)


def kvfree(kernel: Kernel, buffer: Buffer | None) -> None:
    """``kvfree``: give the memory back; NULL is ignored."""
    if buffer is None:
        return
    memory, buffer.memory = buffer.memory, None
    if isinstance(memory, Folio):
        memory.put()
    elif memory is not None:
        vfree(kernel, memory)
