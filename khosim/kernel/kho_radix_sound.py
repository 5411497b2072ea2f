"""A small sound radix tree, read level by level: what a walk finds, in a few array operations.

Serves :mod:`khosim.kernel.kho_radix`, where the kernel goes from page to page
(``kernel/liveupdate/kexec_handover.c:kho_radix_walk_tree`` @ 7.3). The two agree only while nobody
writes to the tree's pages meanwhile. Of a large tree, and of one that no kernel built (a page that
is reached twice, an entry that is no page's address), nothing is said. Nothing here writes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from khosim.kernel.kho_radix_bits import runs_of_leaves, sparse_runs, used_words

__all__ = ("read_sound_tree",)

_FEW_PAGES = 32  # of one level: their copy stays in the second-level cache
_FEW_WORDS = 64


def read_sound_tree(
    words: npt.NDArray[np.uint64], root: int, shifts: list[int], page_size: int
) -> tuple[list[int], list[tuple[int, int]]] | None:
    """``(pages, runs)`` of the tree at ``root``, or None where only a walk can tell.

    ``words`` is all of RAM in whole pages and ``shifts`` the tree's, from the root's down. The
    pages are physical addresses in bytes, level by level. The runs are ``(nr_keys, first_key)``,
    ascending, as a walk tells them.
    """
    row_words = page_size >> 3
    row_shift, end = row_words.bit_length() - 1, len(words) << 3
    if root >= end:
        return None
    nodes, keys, pages = [root], [0], [root]
    for shift in shifts:
        level = _read_level(words, nodes, page_size)
        if level is None:
            return None
        used, nodes = level
        if len(keys) == 1:
            first = keys[0]
            keys = [first | index << shift for index in used]
        else:
            keys = [keys[at >> row_shift] | (at & (row_words - 1)) << shift for at in used]
        if not nodes:
            return pages, []
        pages += nodes
        if max(nodes) >= end:
            return None
    if len(set(pages)) < len(pages):
        return None
    level = _read_level(words, nodes, page_size)
    if level is None:
        return None
    used, bits = level
    if len(used) <= _FEW_WORDS:
        return pages, sparse_runs(used, bits, keys, row_shift + 6)
    leaves = words.reshape(-1, row_words).take(np.array(nodes) // page_size, axis=0)
    counts, firsts, _ = runs_of_leaves(leaves, np.array(keys, dtype=np.int64))
    return pages, list(zip(counts.tolist(), firsts.tolist(), strict=True))


def _read_level(
    words: npt.NDArray[np.uint64], nodes: list[int], page_size: int
) -> tuple[list[int], list[int]] | None:
    # used_words() of all nodes' pages in a row.
    if len(nodes) == 1 and not nodes[0] & (page_size - 1):
        start = nodes[0] >> 3
        return used_words(words[start : start + (page_size >> 3)])
    if len(nodes) > _FEW_PAGES:
        return None
    gathered = 0
    for node in nodes:
        gathered |= node
    if gathered & (page_size - 1):
        return None
    shift = page_size.bit_length() - 1
    rows = [node >> shift for node in nodes]
    return used_words(words.reshape(-1, page_size >> 3).take(rows, axis=0).ravel())
