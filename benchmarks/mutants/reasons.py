"""Why a flipped behaviour that nobody notices is none that anybody should, by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.mutants.switches import Flip

__all__ = ("REASONS", "flip_reason")

REASONS: dict[str, str] = {
    "bitmap_bytes": "the radix tree of 7.3 has no such bitmaps.",
    "tree_root_from_slab": "a zeroed, aligned page either way; only its allocator differs.",
    "radix_key_width_checked": "keys too wide need orders or addresses that no machine here has.",
    "kexec_metadata": "who ran before, and how often, is told to people; nobody relies on it.",
    "busy_when_finalized": "7.3 has nothing to finalize.",
    "kho_init_level": "a later initcall; nobody preserves between the two.",
    "unpreserve_missing=return": "lawful authors unpreserve only what they preserved.",
    "nr_pages_bits": "it takes 2**32 pages in one call, 16 TiB.",
    "restores_root_fdt": "the root FDT's page stays in use for good either way.",
    "revival_errno_told": "words of a line of the log.",
    "skip_init_told": "words of a line of the log.",
    "scratch_failure_told=that": "words of a line of the log.",
    "deferred_struct_pages": "a kernel built without it is as lawful.",
    "scratch_alignment": "a pageblock is enough for CMA.",
    "scratch_rounds_first": "scratch of another lawful size.",
    "luo_flb_insisted": "it takes a release candidate as predecessor (museum D27).",
    "luo_get_name": "a call less, as older releases have it.",
}
"""By the name of the behaviour, or ``NAME=VALUE`` for one value of it."""


def flip_reason(flip: Flip) -> str | None:
    """Why nobody should notice ``flip``; None where somebody should."""
    return REASONS.get(str(flip), REASONS.get(flip.name))
