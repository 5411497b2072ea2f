"""Giving a memfd's folios up without any memory: what 7.3 cannot do.

No kernel has this yet (``fix_memfd_leak``). ``memfd_luo_finish`` and ``memfd_luo_retrieve`` @ 7.3
map the records with ``kho_restore_vmalloc`` first, and forget the folios where that fails. The
records can be read where they lie, page by page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from khosim.abi.kho_vmalloc import KHO_VMALLOC_HDR_BYTES
from khosim.abi.memfd import MEMFD_LUO_FOLIO_SER_BYTES, MEMFD_LUO_PFN_BITS
from khosim.kernel.kho_vmalloc import KhoVmallocSlot
from khosim.kernel.page_map import INCOMING

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("discard_unmapped",)

_PFN_MASK = (1 << MEMFD_LUO_PFN_BITS) - 1


def discard_unmapped(kernel: Kernel, slot_phys: int, nr_folios: int) -> None:
    """Free the folios, the records' pages and their list, which the descriptor leads to.

    What somebody has restored already is only freed; a list that leads back, or nowhere, ends.
    """
    ram, page = kernel.ram, kernel.arch.page_size
    descriptor = KhoVmallocSlot(kernel, slot_phys).load()
    left = nr_folios
    chunk = descriptor.first
    seen: set[int] = set()
    while chunk and not chunk % page and chunk not in seen:
        seen.add(chunk)
        entries = ram.view(kernel.virt(chunk, page) + KHO_VMALLOC_HDR_BYTES, page - 8).view("<u8")
        listed = entries[: np.flatnonzero(entries == 0)[0]] if not entries.all() else entries
        for phys in listed.tolist():
            size = page << descriptor.order
            count = min(left, size // MEMFD_LUO_FOLIO_SER_BYTES)
            words = ram.view(kernel.virt(phys, size), count * MEMFD_LUO_FOLIO_SER_BYTES)
            for word in words.view("<u8")[::2].tolist():
                if word & _PFN_MASK:
                    _give_up(kernel, (word & _PFN_MASK) << kernel.arch.page_shift)
            left -= count
            for at in range(phys, phys + size, page):
                _give_up(kernel, at)
        following = ram.read_u64(chunk)
        _give_up(kernel, chunk)
        chunk = following


def _give_up(kernel: Kernel, phys: int) -> None:
    pfn = phys >> kernel.arch.page_shift
    state = kernel.pages.pages.state(pfn)
    if state is None:
        return
    if state.kind == INCOMING:
        restored = kernel.kho_in.restore_folio(phys)
        if restored is None:
            return
        kernel.pages.free_pages(*restored)
    else:
        kernel.pages.free_pages(pfn, state.order)
