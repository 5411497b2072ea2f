"""Memory that the kernel takes for itself: kmalloc.

Models ``mm/slub.c:kmalloc`` and ``__kmalloc_large_node_noprof`` @ 7.3. Objects of the slab caches
take no pages here, but they can fail: ``kernel.pages.fail`` is asked as for a page, under the name
of the function that allocates. Larger buffers are real blocks of the buddy allocator. What would
be in them is kept by their users. Left out: caches and their pages, reclaim, accounting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.kernel.page import Folio

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("kmalloc", "kmalloc_large", "may_fail")


def may_fail(kernel: Kernel, symbol: str) -> bool:
    """Whether somebody injects failures and wants ``symbol`` to be refused memory now."""
    fail = kernel.pages.fail
    return fail is not None and fail(0, symbol)


def kmalloc(kernel: Kernel, symbol: str) -> bool:
    """``kmalloc`` of a small object in ``symbol``: whether there was memory for it."""
    return not may_fail(kernel, symbol)


def kmalloc_large(kernel: Kernel, size_bytes: int, symbol: str) -> Folio | None:
    """``__kmalloc_large_node``: a block for ``size_bytes``, None above the largest order.

    The slab caches serve up to two pages; see :func:`kmalloc`.
    """
    order = ((size_bytes - 1) >> kernel.arch.page_shift).bit_length()
    if order > kernel.arch.max_page_order:
        return None
    pfn = kernel.pages.alloc_pages(order, symbol, compound=order > 0)
    return None if pfn is None else Folio(kernel, pfn, order)
