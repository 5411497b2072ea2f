"""Which format to read a handover in, where the kernel that wrote it is known.

A root FDT names its format, but kho-v1 has bitmaps of two sizes under one name, and a release of a
designer's own may have a map that only the designer can read. What is known of the writing kernel's
release settles both; of a handover found in memory it does not help.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from khosim.checks.decode_chunks import decode_chunks
from khosim.checks.decode_radix import decode_preserved
from khosim.checks.decode_root import FORMATS, Format, Tracker
from khosim.checks.preserved import Preserved
from khosim.errors import InputError
from khosim.plugins import loaded_plugin

if TYPE_CHECKING:
    from khosim.checks.kernel_view import ReleaseView
    from khosim.checks.reader import Reader

__all__ = ("format_of", "preserve_bits_of")


def preserve_bits_of(release: ReleaseView, page_size: int) -> int | None:
    """Bits of a bitmap that a release writes; None where its map has none."""
    return (release.bitmap_bytes or page_size) * 8 if release.tracker == "chunks" else None


def format_of(release: ReleaseView) -> Format | None:
    """The format of a release whose name for it is not one of Linux; None where it is."""
    compatible = release.kho_compatible.encode()
    if not release.decoder and compatible in FORMATS:
        return None
    size_prop = release.subtree_size_prop.encode() or None
    return Format(
        release.memory_map_prop.encode(),
        release.subtree_phys_prop.encode(),
        size_prop,
        _decoder(release),
    )


def _decoder(release: ReleaseView) -> Tracker:
    if release.decoder:
        return _Own(release.decoder)
    return decode_chunks if release.tracker == "chunks" else _radix


def _radix(reader: Reader, map_phys: int, page_size: int, _bits: int | None, /) -> Preserved:
    return decode_preserved(reader, map_phys, page_size)


class _Own:
    """A designer's decoder: ``decode(reader, map_phys, page_size)``.

    It returns two lists: ``(first pfn, order, blocks)`` runs in the map's order, and the addresses
    of the map's own pages. ``reader.read(phys, len_bytes)`` gives bytes.
    """

    __slots__ = ("_spec",)

    def __init__(self, spec: str) -> None:
        self._spec = spec

    def __call__(
        self, reader: Reader, map_phys: int, page_size: int, _bits: int | None, /
    ) -> Preserved:
        found = loaded_plugin(self._spec)(reader, map_phys, page_size)
        try:
            runs, pages = found
            columns = np.array(runs, dtype=np.int64).reshape(-1, 3)
            pages = tuple(int(page) for page in pages)
        except (TypeError, ValueError, OverflowError):
            cause = "it returns no (pfn, order, blocks) runs and addresses of pages"
            raise InputError(self._spec, cause) from None
        starts, orders, counts = columns[:, 0], columns[:, 1], columns[:, 2]
        return Preserved(page_size, orders, starts, counts, pages, ())
