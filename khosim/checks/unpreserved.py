"""Whether a handover preserves what it is made of.

All that a successor is to find must be in the preserved-memory map, or the successor uses the pages
for something else: the root FDT, blobs, reserve_mem regions and LUO's pages are preserved by
``kernel/liveupdate/kexec_handover.c:kho_alloc_preserve`` and ``kho_preserve_pages`` @ 7.3. The
map's own pages are not: they are read before anything is allocated.

Left out: folios of files (``khosim.checks.decode_memfd``), whose order counts as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from khosim.checks.preserved import covered_ranges
from khosim.checks.reader import ProblemLog

if TYPE_CHECKING:
    from khosim.checks.decode import Handover
    from khosim.checks.decode_luo import Luo
    from khosim.checks.reader import Problem

__all__ = ("unpreserved",)


def unpreserved(handover: Handover, luo: Luo | None) -> tuple[Problem, ...]:
    """A problem for each piece of the handover that no preserved block covers.

    None where the map itself has problems: it may well have told of them.
    """
    log = ProblemLog()
    preserved = handover.preserved
    if preserved.problems or not handover.map_phys:
        return ()
    starts, ends = (array * handover.page_size for array in covered_ranges(preserved))
    pieces = [(handover.fdt_phys, handover.page_size, "/", "the root FDT")]
    for name, blob in handover.subtrees.items():
        pieces.append((blob.start, blob.size, f"/{name}", "the blob"))
    for name, region in handover.reserve_mem.items():
        size = region.size & -handover.page_size
        pieces.append((region.start, size, f"/memblock/{name}", "the region"))
    if luo is not None:
        pieces += [(phys, handover.page_size, path, "the page") for phys, path in luo.pages.items()]
    for start, size, path, what in pieces:
        if size == 0 or start + size >= 1 << 63:
            continue
        at = int(np.searchsorted(starts, start, side="right")) - 1
        past = int(ends[at]) if at >= 0 else 0
        if past < start + size:
            gap = max(start, past)
            expected = f"{what} at [{start:#x}-{start + size:#x}) in a preserved block"
            log.add("not-preserved", gap, f"no block at {gap:#x}", path, expected)
    return log.done()
