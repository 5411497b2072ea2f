"""Memory of which somebody kept some pages: the rows of ``ram.npz``.

All other pages are unknown, which is not the same as being no RAM.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from khosim.errors import RamFault

__all__ = ("PageRows",)


class PageRows:
    """Pages by number: row ``i`` of ``data`` is the page ``pfn[i]``; ``pfn`` is in order."""

    __slots__ = ("_rows", "data", "page_size", "pfn")

    def __init__(self, pfn: NDArray[np.uint64], data: NDArray[np.uint8]) -> None:
        self.pfn = pfn
        self.data = data
        self.page_size = int(data.shape[1])
        self._rows = dict(zip(pfn.tolist(), range(len(pfn)), strict=True))

    def read(self, phys: int, len_bytes: int, /) -> bytes:
        """Copy of the bytes at ``[phys, phys + len_bytes)``; raises :class:`RamFault`."""
        return self.view(phys, len_bytes).tobytes()

    def view(self, phys: int, len_bytes: int, /) -> NDArray[np.uint8]:
        """Read-only array over these bytes."""
        size = self.page_size
        first, offset = divmod(phys, size)
        nr_pages = max(1, -(-(offset + len_bytes) // size))
        row = self._rows.get(first)
        if row is None or len_bytes < 0:
            raise RamFault(phys, len_bytes, f"the page at {first * size:#x} is not in this image")
        if nr_pages > len(self.pfn) or self._rows.get(first + nr_pages - 1) != row + nr_pages - 1:
            for pfn in range(first, first + nr_pages):
                if pfn not in self._rows:
                    cause = f"the page at {pfn * size:#x} is not in this image"
                    raise RamFault(phys, len_bytes, cause)
        flat: NDArray[np.uint8] = self.data[row : row + nr_pages].reshape(-1)
        return flat[offset : offset + len_bytes]

    def pages_with(self, magic: bytes) -> Iterator[int]:
        """Addresses of 4 KiB pages that begin with ``magic``."""
        for part in range(0, self.page_size, 4096):
            firsts = self.data[:, part : part + len(magic)]
            wanted = np.frombuffer(magic, dtype=np.uint8)
            for row in np.flatnonzero((firsts == wanted).all(axis=1)).tolist():
                yield int(self.pfn[row]) * self.page_size + part
