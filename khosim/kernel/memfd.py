"""memfd: anonymous files in memory, and the seals on them.

Models ``mm/memfd.c`` @ 7.3: ``memfd_create``, ``memfd_alloc_file``, ``memfd_add_seals`` and
``memfd_get_seals``. Reading and writing is in :mod:`khosim.kernel.shmem_file`. A hugetlb memfd
exists so that others can refuse it: it has a size and seals, and no contents. Left out: writable
mappings, which would keep ``F_SEAL_WRITE`` away; ``vm.memfd_noexec``.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from khosim.abi.memfd import (
    F_SEAL_EXEC,
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
)
from khosim.errors import KernelError
from khosim.kernel.file import File
from khosim.kernel.shmem import ShmemInode
from khosim.kernel.shmem_file import ShmemFile
from khosim.kernel.slab import kmalloc
from khosim.units import parse_size

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = (
    "F_ALL_SEALS",
    "MFD_ALLOW_SEALING",
    "MFD_CLOEXEC",
    "MFD_EXEC",
    "MFD_HUGETLB",
    "MFD_NOEXEC_SEAL",
    "HugetlbFile",
    "Memfd",
    "memfd",
    "memfd_alloc_file",
    "memfd_create",
)

MFD_CLOEXEC = 0x0001
MFD_ALLOW_SEALING = 0x0002
MFD_HUGETLB = 0x0004
MFD_NOEXEC_SEAL = 0x0008
MFD_EXEC = 0x0010
_MFD_HUGE_SHIFT, _MFD_HUGE_MASK = 26, 0x3F
_MFD_ALL_FLAGS = MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB | MFD_NOEXEC_SEAL | MFD_EXEC
_MFD_NAME_PREFIX = "memfd:"
_MFD_NAME_MAX_BYTES = 255 - len(_MFD_NAME_PREFIX)

_IMPLIED_BY_EXEC = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_FUTURE_WRITE
F_ALL_SEALS = F_SEAL_SEAL | F_SEAL_EXEC | _IMPLIED_BY_EXEC


class Memfd(ShmemFile):
    """A memfd of shmem pages. ``dname`` is its name in ``/proc/PID/fd``."""

    __slots__ = ("dname",)

    def __init__(self, kernel: Kernel, inode: ShmemInode, name: str = "") -> None:
        super().__init__(kernel, inode, name)
        self.dname = f"{_MFD_NAME_PREFIX}{name}"

    def d_path(self) -> str:
        """``simple_dname``."""
        return f"/{self.dname} (deleted)"

    def open_read_only(self) -> Memfd:
        """``open("/proc/self/fd/FD", O_RDONLY)``: another open file of the same inode."""
        self.check_open()
        file = Memfd(self.kernel, self.inode, self.name)
        file.dname, file.is_writable = self.dname, False
        return file

    @property
    def seals(self) -> int:
        """``memfd_get_seals``: the ``F_SEAL_`` bits."""
        return self.inode.seals

    def add_seals(self, seals: int) -> None:
        """``memfd_add_seals``: raises -EINVAL, -EPERM after ``F_SEAL_SEAL``, -EBUSY.

        ``F_SEAL_WRITE`` cannot be set while folios are pinned. ``F_SEAL_EXEC`` brings all seals
        against writing with it where the file's mode allows execution. -EPERM as well for a file
        that is open for reading only.
        """
        self.check_writable(errno.EPERM)
        symbol = "memfd_add_seals"
        inode = self.inode
        if seals & ~F_ALL_SEALS:
            raise KernelError(errno.EINVAL, symbol, f"seals {seals:#x}")
        if inode.seals & F_SEAL_SEAL:
            raise KernelError(errno.EPERM, symbol, "F_SEAL_SEAL")
        if seals & F_SEAL_EXEC and inode.i_mode & 0o111:
            seals |= _IMPLIED_BY_EXEC
        if seals & F_SEAL_WRITE and not inode.seals & F_SEAL_WRITE and self._has_pins():
            raise KernelError(errno.EBUSY, symbol, "memfd_wait_for_pins")
        inode.seals |= seals
        if self.kernel.trace is not None:
            self.kernel.emit(symbol, {"seals": seals}, 0)

    def _has_pins(self) -> bool:
        # memfd_wait_for_pins: somebody else refers to a folio, and does not let go in time.
        mapping = self.inode.mapping
        if any(run.pins for run in mapping):
            return True
        held = [pfn for pfn, count in self.kernel.pages.pages.refs.items() if count > 1]
        return any(run.pfn <= pfn < run.pfn_of(run.end) for run in mapping for pfn in held)


class HugetlbFile(File):
    """A memfd with ``MFD_HUGETLB``: a size and seals."""

    __slots__ = ("seals", "size")

    def __init__(self, kernel: Kernel, name: str) -> None:
        super().__init__(kernel, name)
        self.size = 0
        self.seals = F_SEAL_SEAL

    def ftruncate(self, size: int | str) -> None:
        """``ftruncate``; raises -EPERM for a seal that forbids it."""
        self.check_open()
        new_size = size if isinstance(size, int) else parse_size(size)
        seal = F_SEAL_SHRINK if new_size < self.size else F_SEAL_GROW
        if new_size != self.size and self.seals & seal:
            raise KernelError(errno.EPERM, "hugetlbfs_setattr", "sealed")
        self.size = new_size


def memfd_alloc_file(
    kernel: Kernel, name: str, flags: int, *, huge: str = "never", nid: int | None = None
) -> Memfd:
    """``memfd_alloc_file`` of an empty shmem file; raises -ENOMEM."""
    symbol = "memfd_alloc_file"
    if not kmalloc(kernel, "shmem_alloc_inode"):
        raise KernelError(errno.ENOSPC, symbol, "new_inode")
    inode = ShmemInode(kernel, huge=huge, nid=nid)
    if not kmalloc(kernel, "alloc_file_pseudo"):
        raise KernelError(errno.ENOMEM, symbol, "alloc_file_pseudo")
    if flags & MFD_NOEXEC_SEAL:
        inode.i_mode &= ~0o111
        inode.seals = inode.seals & ~F_SEAL_SEAL | F_SEAL_EXEC
    elif flags & MFD_ALLOW_SEALING:
        inode.seals &= ~F_SEAL_SEAL
    return Memfd(kernel, inode, name)


def memfd_create(kernel: Kernel, name: str, flags: int = 0) -> Memfd | HugetlbFile:
    """``memfd_create``: a new, empty file.

    Raises -EINVAL for unknown or contradicting flags and for a name of more than 249 bytes,
    -ENOSPC or -ENOMEM without memory.
    """
    kernel.check_alive()
    symbol = "memfd_create"
    known = _MFD_ALL_FLAGS
    if flags & MFD_HUGETLB:
        known |= _MFD_HUGE_MASK << _MFD_HUGE_SHIFT
    if flags & ~known or (flags & MFD_EXEC and flags & MFD_NOEXEC_SEAL):
        raise KernelError(errno.EINVAL, symbol, f"flags {flags:#x}")
    if len(name.encode()) > _MFD_NAME_MAX_BYTES:
        raise KernelError(errno.EINVAL, symbol, "the name is too long")
    if flags & MFD_HUGETLB:
        hugetlb = HugetlbFile(kernel, name)
        if flags & MFD_NOEXEC_SEAL:
            hugetlb.seals = F_SEAL_EXEC
        elif flags & MFD_ALLOW_SEALING:
            hugetlb.seals = 0
        return hugetlb
    return memfd_alloc_file(kernel, name, flags)


def memfd(
    kernel: Kernel,
    name: str,
    *,
    size: int | str = 0,
    flags: int = MFD_ALLOW_SEALING,
    huge: str = "never",
    nid: int | None = None,
) -> Memfd:
    """A shmem memfd of ``size``, made as by ``memfd_create`` and ``ftruncate``.

    ``huge`` is how the system hands out large folios (``transparent_hugepage_shmem=``), ``nid``
    the node that its memory comes from first.
    """
    kernel.check_alive()
    file = memfd_alloc_file(kernel, name, flags & ~MFD_HUGETLB, huge=huge, nid=nid)
    if size:
        file.ftruncate(size)
    return file
