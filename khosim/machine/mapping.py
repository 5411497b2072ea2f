"""The host memory under a machine's RAM, and one piece of it that is used again.

The host clears each page when it is first touched, which costs several times what writing it does.
So the mapping of the last machine that died is kept, as an allocator keeps freed memory: cleared,
for the next one of the same size. Nothing of a machine goes into another. All that was written is
overwritten with zeros, all other pages are given back to the host, whoever wrote to them behind the
shadow's back, and a mapping that somebody still looks at is not used again.
"""

from __future__ import annotations

import gc
import mmap

import numpy as np

from khosim.errors import InputError

__all__ = ("map_memory", "recycle")

_MAP_NORESERVE = 0x4000
_MAX_KEPT_BYTES = 8 << 20
_HEAP_BYTES = 1 << 20
_kept: list[mmap.mmap] = []  # one at most


def map_memory(len_bytes: int) -> mmap.mmap:
    """Zeroed, lazily committed memory; :class:`InputError` where the host has no room for it.

    Machines that nobody uses any more but that wait for the garbage collector make room first: a
    handful of 16 TiB fills an address space of 47 bits.
    """
    try:
        return _map(len_bytes)
    except OSError:
        gc.collect()
    try:
        return _map(len_bytes)
    except OSError as error:
        cause = f"the host does not map {len_bytes} bytes: {error.strerror}"
        raise InputError("RAM: size", cause) from None


def _map(len_bytes: int) -> mmap.mmap:
    if _kept:
        mapping = _kept.pop()
        if len(mapping) == len_bytes:
            return mapping
        mapping.close()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    mapping = mmap.mmap(-1, len_bytes, flags=flags)
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    # glibc gives the top of its heap back above 128 KiB, less than what a machine needs beside its
    # RAM, so that each would fault it in anew. A large block that is freed teaches it to keep more.
    np.empty(_HEAP_BYTES, dtype=np.uint8)
    return mapping


def recycle(mapping: mmap.mmap, touched: list[tuple[int, int]]) -> None:
    """Keep a mapping that nobody needs any more, if little of it was touched.

    ``touched`` are the ordered, disjoint (start, end) in bytes that may not be zero.
    """
    size, page = len(mapping), mmap.PAGESIZE
    if sum(end - start for start, end in touched) > _MAX_KEPT_BYTES:
        return
    if any((start | end) % page for start, end in touched):
        return
    try:
        mapping.resize(size)  # refuses while anybody has a view of it
    except BufferError:
        return
    at = 0
    data = np.frombuffer(mapping, dtype=np.uint8)
    for start, end in touched:
        if at < start:
            mapping.madvise(mmap.MADV_DONTNEED, at, start - at)
        data[start:end] = 0
        at = end
    del data
    if at < size:
        mapping.madvise(mmap.MADV_DONTNEED, at, size - at)
    _kept[:] = [mapping]
