"""Reading and writing shmem files: what user space does with a memfd.

Models the file operations of ``mm/shmem.c`` (``shmem_file_read_iter``, ``shmem_write_begin``,
``shmem_write_end``, ``shmem_file_llseek``), ``mm/filemap.c:generic_perform_write``, and stores
through a mapping (``shmem_fault``) @ 7.3. Calls raise :class:`~khosim.errors.KernelError` where the
system call fails. Left out: ``O_APPEND``, ``splice``, asynchronous I/O, page tables.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from khosim.abi.memfd import F_SEAL_FUTURE_WRITE, F_SEAL_GROW, F_SEAL_WRITE
from khosim.errors import KernelError
from khosim.kernel.file import File
from khosim.kernel.memory_failure import check_poison
from khosim.kernel.shmem import (
    MAX_LFS_FILESIZE,
    SGP_CACHE,
    SGP_WRITE,
    ShmemInode,
    max_pagecache_order,
)
from khosim.kernel.shmem_truncate import shmem_evict_inode, shmem_fallocate, shmem_setattr_size
from khosim.units import parse_size

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("ShmemFile",)

Data = bytes | bytearray | memoryview


class ShmemFile(File):
    """An open shmem file; the inode lives as long as one. Offsets and sizes are bytes.

    ``is_writable`` is ``FMODE_WRITE``; all are open for reading.
    """

    __slots__ = ("inode", "is_writable")

    def __init__(self, kernel: Kernel, inode: ShmemInode, name: str = "") -> None:
        super().__init__(kernel, name)
        self.inode = inode
        self.is_writable = True
        inode.i_count += 1

    def release(self) -> None:
        """The last reference is gone: if to the inode as well, all memory of it is freed."""
        self.inode.i_count -= 1
        if not self.inode.i_count:
            shmem_evict_inode(self.inode)

    def check_writable(self, error: int = errno.EBADF) -> None:
        """Raise -``error`` for a file that is open for reading only, or is not open any more."""
        self.check_open()
        if not self.is_writable:
            raise KernelError(error, "file_start_write", f"{self!r} is open for reading only")

    @property
    def size(self) -> int:
        """``i_size``: the size of the file."""
        return self.inode.i_size

    # -- system calls ---------------------------------------------------------------------------

    def write(self, offset: int, data: Data) -> int:
        """``pwrite``: returns the bytes written, fewer than asked for where it got stuck.

        Raises -EPERM for a sealed file or one that must not grow, -ENOMEM, -ENOSPC, -EFBIG, but
        only when nothing at all was written; -EBADF for a file that is open for reading only.
        """
        self.check_writable()
        if offset < 0:
            raise KernelError(errno.EINVAL, "pwrite", f"offset {offset}")
        view = memoryview(data).cast("B")
        if view.nbytes and offset >= MAX_LFS_FILESIZE:
            raise KernelError(errno.EFBIG, "generic_write_checks", f"offset {offset}")
        view = view[: MAX_LFS_FILESIZE - offset]
        chunk = self.kernel.arch.page_size << max_pagecache_order(self.kernel.arch.page_shift)
        written, error = 0, 0
        while written < view.nbytes and not error:
            at = offset + written
            step = min(chunk - (at & (chunk - 1)), view.nbytes - written)
            error, got = self._write_chunk(at, view[written : written + step])
            written += got
        if self.kernel.trace is not None:
            args = {"offset": offset, "len": view.nbytes}
            self.kernel.emit("shmem_file_write_iter", args, written or error)
        if error and not written:
            raise KernelError(-error, "shmem_write_begin", f"at {offset:#x} of {self!r}")
        return written

    def _write_chunk(self, at: int, data: memoryview) -> tuple[int, int]:
        # generic_perform_write as far as one folio of the largest size reaches: (error, written).
        inode = self.inode
        end = at + data.nbytes
        if inode.seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
            return -errno.EPERM, 0
        if end > inode.i_size and (inode.seals & F_SEAL_GROW or inode.frozen):
            return -errno.EPERM, 0
        if inode.poisoned:
            check_poison(inode, at, end, errno.EIO, "shmem_write_begin")
        shift = self.kernel.arch.page_shift
        first = at >> shift
        error, reached = inode.get_folios(first, -(-end >> shift), SGP_WRITE, write_end=end)
        if error:
            end = min(end, reached << shift)
            if end <= at:
                return error, 0
        self._store(at, data[: end - at], "shmem_file_write_iter")
        inode.i_size = max(inode.i_size, end)
        return error, end - at

    def _store(self, at: int, data: memoryview, symbol: str) -> None:
        # shmem_write_end: zero around the data in folios that are not up to date.
        kernel = self.kernel
        mapping = self.inode.mapping
        shift = kernel.arch.page_shift
        end = at + data.nbytes
        first, last = at >> shift, -(-end >> shift)
        by = kernel.by(symbol)
        zero = kernel.ram.zero
        for run in mapping.overlapping(first, last):
            base = (run.pfn - run.index) << shift
            start, stop = max(at, run.index << shift), min(end, run.end << shift)
            if not run.uptodate:
                low, high = run.clip(first, last)
                zero(base + (low << shift), start - (low << shift), by)
                zero(base + stop, (high << shift) - stop, by)
            kernel.ram.write(base + start, data[start - at : stop - at], by)
        mapping.mark(first, last, dirty=True, uptodate=True)

    def read(self, offset: int, len_bytes: int) -> bytes:
        """``pread``: up to ``len_bytes``, short at the end of the file; holes read as zeros."""
        self.check_open()
        if offset < 0 or len_bytes < 0:
            raise KernelError(errno.EINVAL, "pread", f"[{offset}, +{len_bytes})")
        end = min(self.inode.i_size, offset + len_bytes)
        if self.inode.poisoned:
            check_poison(self.inode, offset, end, errno.EIO, "shmem_file_read_iter")
        pieces = []
        at = offset
        for start, phys, size in self.extents(offset, end):
            if start > at:
                pieces.append(bytes(start - at))
            pieces.append(self.kernel.ram.read(phys, size))
            at = start + size
        if at < end:
            pieces.append(bytes(end - at))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def store(self, offset: int, data: Data) -> None:
        """A store to shared memory: what a process or a guest does through a mapping.

        Raises -EPERM for a write-sealed file (there are no writable mappings of it then),
        -EFAULT behind the last page of the file and without memory: the process gets SIGBUS.
        -EACCES for a file that is open for reading only.
        """
        self.check_writable(errno.EACCES)
        view = memoryview(data).cast("B")
        inode = self.inode
        shift = self.kernel.arch.page_shift
        if inode.seals & F_SEAL_WRITE:
            raise KernelError(errno.EPERM, "mmap", "F_SEAL_WRITE")
        if not view.nbytes:
            return
        last = -(-(offset + view.nbytes) >> shift)
        if inode.poisoned:
            check_poison(inode, offset, last << shift, errno.EFAULT, "shmem_fault")
        error, reached = (-errno.EINVAL, 0)
        if offset >= 0:
            error, reached = inode.get_folios(offset >> shift, last, SGP_CACHE)
        if error:
            raise KernelError(errno.EFAULT, "shmem_fault", f"SIGBUS at page {reached:#x}")
        self._store(offset, view, "user")

    def lseek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """``lseek``: the new position; also ``os.SEEK_DATA`` and ``os.SEEK_HOLE``.

        Raises -EINVAL for a position below 0 or above the largest, -ENXIO without such data.
        """
        self.check_open()
        inode = self.inode
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            if offset < 0 or offset >= inode.i_size:
                raise KernelError(errno.ENXIO, "shmem_file_llseek", f"offset {offset}")
            offset = self._seek_hole_data(offset, whence == os.SEEK_DATA)
        elif whence == os.SEEK_CUR:
            offset += self.f_pos
        elif whence == os.SEEK_END:
            offset += inode.i_size
        elif whence != os.SEEK_SET:
            raise KernelError(errno.EINVAL, "shmem_file_llseek", f"whence {whence}")
        if not self.vfs_setpos(offset):
            raise KernelError(errno.EINVAL, "shmem_file_llseek", f"offset {offset}")
        return offset

    def vfs_setpos(self, offset: int) -> bool:
        """``vfs_setpos``: move there, or stay and say False for a place that no file has."""
        if not 0 <= offset <= MAX_LFS_FILESIZE:
            return False
        self.f_pos = offset
        return True

    def _seek_hole_data(self, offset: int, data: bool) -> int:
        # mapping_seek_hole_data: folios that are up to date are data.
        inode = self.inode
        shift = self.kernel.arch.page_shift
        at = offset >> shift
        for run in inode.mapping.overlapping(at, -(-inode.i_size >> shift)):
            if run.index > at and not data:
                break
            if run.uptodate and data:
                at = max(at, run.index)
                return max(offset, at << shift)
            if not run.uptodate and not data:
                break
            at = run.end
        if data:
            raise KernelError(errno.ENXIO, "shmem_file_llseek", f"no data behind {offset}")
        return min(max(offset, at << shift), inode.i_size)

    def ftruncate(self, size: int | str) -> None:
        """``ftruncate``; see :func:`~khosim.kernel.shmem_truncate.shmem_setattr_size`; -EINVAL."""
        self.check_writable(errno.EINVAL)
        new_size = size if isinstance(size, int) else parse_size(size)
        shmem_setattr_size(self.inode, new_size)

    def fallocate(self, offset: int, len_bytes: int, mode: int = 0) -> None:
        """``fallocate``; see :func:`~khosim.kernel.shmem_truncate.shmem_fallocate`; -EBADF."""
        self.check_writable()
        shmem_fallocate(self.inode, mode, offset, len_bytes)

    def reclaim(self) -> int:
        """``shrink_folio_list`` comes by: clean folios go, returns how many pages.

        Dirty ones would be written to swap, which is left out: they stay, and so do pinned ones.
        """
        self.check_open()
        inode = self.inode
        clean = [run for run in inode.mapping if not run.dirty and not run.pins]
        for run in clean:
            inode.drop(inode.mapping.take(run.index, run.end))
        inode.recalc(0)
        return sum(run.nr_pages for run in clean)

    # -- looking at it --------------------------------------------------------------------------

    def extents(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Where the data of bytes [start, end) lies: ``(offset, phys, len_bytes)``, ascending.

        Holes are left out, and so are folios that read as zeros because nobody used them yet.
        """
        if start >= end:
            return
        shift = self.kernel.arch.page_shift
        for run in self.inode.mapping.overlapping(start >> shift, -(-end >> shift)):
            if run.uptodate:
                low, high = max(start, run.index << shift), min(end, run.end << shift)
                yield low, low + ((run.pfn - run.index) << shift), high - low

    def data(self) -> Iterator[tuple[int, bytes]]:
        """What is not zero for sure, as ``(offset, bytes)``: costs what was ever written."""
        ram = self.kernel.ram
        for offset, phys, size in self.extents(0, self.inode.i_size):
            for low, high in ram.touched_ranges(phys, phys + size):
                low, high = max(low, phys), min(high, phys + size)
                yield offset + low - phys, ram.read(low, high - low)
