"""``ram.npz``: pages of memory, as numpy saves arrays.

``pfn`` (uint64[n]) holds page frame numbers in ascending order, ``data`` (uint8[n, page size]) the
bytes of these pages.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from khosim.errors import InputError

__all__ = ("U8Rows", "U64Row", "read_ram_npz")

U8Rows = np.ndarray[tuple[int, int], np.dtype[np.uint8]]
U64Row = np.ndarray[tuple[int], np.dtype[np.uint64]]

_PAGE_SIZES = (4096, 16384, 65536)


def read_ram_npz(
    path: str | os.PathLike[str], page_size: int | None = None
) -> tuple[U64Row, U8Rows]:
    """Page frame numbers and their bytes, one row a page of ``page_size`` bytes (None: of any).

    Raises :class:`InputError` where the file is missing, damaged or of another shape.
    """
    place = os.fspath(path)
    pfn: Any
    data: Any
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(place, "not an npz archive")
            pfn, data = archive["pfn"], archive["data"]
    except InputError:
        raise
    except KeyError as error:
        raise InputError(place, f"no array {error.args[0]!r}") from None
    except OSError as error:
        raise InputError(place, error.strerror or "not an npz archive") from None
    except Exception as error:  # zipfile, zlib and numpy's parser of headers raise many kinds
        raise InputError(place, f"damaged: {str(error) or type(error).__name__}") from None
    if not isinstance(pfn, np.ndarray) or not isinstance(data, np.ndarray):
        raise InputError(place, "damaged: an array without its header")
    if pfn.dtype != np.uint64 or pfn.ndim != 1:
        raise InputError(place, f"pfn is {pfn.dtype} {pfn.shape}, not a row of uint64")
    if page_size is None and data.ndim == 2 and data.shape[1] in _PAGE_SIZES:
        page_size = data.shape[1]
    if data.dtype != np.uint8 or data.shape != (len(pfn), page_size):
        wanted = "4096, 16384 or 65536 bytes" if page_size is None else f"{page_size}"
        raise InputError(
            place, f"data is {data.dtype} {data.shape}, not {len(pfn)} pages of {wanted}"
        )
    if (pfn[1:] <= pfn[:-1]).any():
        raise InputError(place, "pfn is not in ascending order")
    return pfn, data
