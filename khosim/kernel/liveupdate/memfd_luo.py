"""The memfd file handler: guest memory across a live update.

Models ``mm/memfd_luo.c`` @ 7.3 (``memfd-v2``; ``memfd-v1`` is the same without seals) in the
kernel's order of operations. Contents are not touched: every folio is preserved where it lies, and
a record of 16 bytes for each one (:mod:`khosim.abi.memfd`) goes into a vmalloc area that is
preserved, too. Records are written and read by whole runs.

What the kernel loses or leaves behind here:

* Holes are filled by ``preserve``, and stay filled when it fails or is undone.
* The array of folio pointers is one kvmalloc of 8 bytes for each page of the file's size. From
  1 TiB on (4 KiB pages) it is refused, so the answer is -ENOMEM; -EFBIG comes from 16 TiB on.
* Seals that are added after ``preserve`` are lost, and so are folios behind the end of the file.
* ``F_SEAL_EXEC`` comes back with all seals against writing: the new file's mode allows execution.
* A file that was open for reading only comes back writable, and without ``memfd:`` in its name.
* A page whose memory is broken is handed over like any other.
* A ``retrieve`` that refuses the seals or cannot restore the records gives up the folios: they stay
  reserved until the next kexec.

Left out: locks, the LRU, memory cgroups (their refusals can be injected).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from khosim.abi.memfd import (
    F_SEAL_EXEC,
    LAYOUTS,
    MEMFD_LUO_ALL_SEALS,
    MEMFD_LUO_FOLIO_DIRTY,
    MEMFD_LUO_FOLIO_SER_BYTES,
    MEMFD_LUO_FOLIO_UPTODATE,
    MEMFD_LUO_SER_POS_OFFSET,
    MEMFD_LUO_SER_SIZE_OFFSET,
    MemfdLayout,
    MemfdLuoSer,
    unpack_memfd_luo_ser,
)
from khosim.errors import KernelError
from khosim.kernel.folio_range import FolioRun, preserve_folio_runs, unpreserve_folio_runs
from khosim.kernel.gup import memfd_pin_folios, unpin_folios
from khosim.kernel.kho_vmalloc import (
    KhoVmallocSlot,
    kho_preserve_vmalloc,
    kho_restore_vmalloc,
    kho_unpreserve_vmalloc,
)
from khosim.kernel.kvmalloc import KVMALLOC_MAX_BYTES, kvfree, kvmalloc
from khosim.kernel.liveupdate.file_ops import FileHandler, LiveupdateFileOpArgs
from khosim.kernel.liveupdate.memfd_discard import discard_unmapped
from khosim.kernel.liveupdate.memfd_holes import Hole, empty_holes, holes_of
from khosim.kernel.liveupdate.memfd_records import discard_folios, folio_runs, write_records
from khosim.kernel.liveupdate.memfd_retrieve import retrieve_folios
from khosim.kernel.memfd import MFD_ALLOW_SEALING, Memfd, memfd_alloc_file
from khosim.kernel.page import Folio
from khosim.kernel.page_cache import CacheRun
from khosim.kernel.shmem import ShmemInode
from khosim.kernel.shmem_truncate import shmem_truncate_range
from khosim.kernel.vmalloc import VmStruct, vfree, vmalloc

if TYPE_CHECKING:
    from khosim.kernel.file import File
    from khosim.kernel.kernel import Kernel

__all__ = ("MemfdLuoHandler",)

_UINT_MAX = (1 << 32) - 1
_FLAGS = MEMFD_LUO_FOLIO_DIRTY | MEMFD_LUO_FOLIO_UPTODATE


class MemfdLuoHandler(FileHandler):
    """``memfd_luo_handler``: takes every shmem file that has no name in a file system."""

    def __init__(self, layout: MemfdLayout = LAYOUTS["memfd-v2"]) -> None:
        super().__init__(layout.compatible)
        self.layout = layout
        self._filled: dict[int, list[Hole]] = {}  # by handle, with fix_memfd_holes

    def can_preserve(self, file: File) -> bool:
        """``memfd_luo_can_preserve``: not for hugetlb memfds."""
        return isinstance(file, Memfd) and not file.inode.i_nlink

    def get_id(self, file: File) -> int:
        """``memfd_luo_get_id``: the inode, so that two open files of one memfd are one."""
        assert isinstance(file, Memfd)
        return id(file.inode)

    # -- in the old kernel ----------------------------------------------------------------------

    def preserve(self, args: LiveupdateFileOpArgs) -> None:
        """``memfd_luo_preserve``: freeze size and holes, pin and preserve all folios.

        Raises -EOPNOTSUPP for seals that memfd-v2 does not know, -EFBIG from 2**32 pages on, and
        -ENOMEM, also for the array of one pointer for each page.
        """
        file = args.file
        assert isinstance(file, Memfd)
        kernel, inode = args.kernel, file.inode
        symbol = "memfd_luo_preserve"
        if kernel.release.fix_memfd_reader and not file.is_writable:
            raise KernelError(errno.EOPNOTSUPP, symbol, "it is open for reading only")
        if kernel.release.fix_memfd_poison and inode.poisoned:
            raise KernelError(errno.EBUSY, symbol, "a page of it is poisoned")
        inode.shmem_freeze(True)
        holes = holes_of(inode) if kernel.release.fix_memfd_holes else []
        ser: Folio | None = None
        try:
            ser = kernel.kho_alloc_preserve(self.layout.ser_bytes)
            if self.layout.seals_offset and inode.seals & ~MEMFD_LUO_ALL_SEALS:
                raise KernelError(errno.EOPNOTSUPP, symbol, f"seals {inode.seals:#x}")
            by = kernel.by(symbol)
            ram = kernel.ram
            ram.write_u64(ser.phys + MEMFD_LUO_SER_POS_OFFSET, file.f_pos, by)
            nr_pages = -(-inode.i_size >> kernel.arch.page_shift)
            if nr_pages > _UINT_MAX and kernel.release.memfd_checks_count:
                raise KernelError(errno.EFBIG, symbol, f"{nr_pages} pages")
            ram.write_u64(ser.phys + MEMFD_LUO_SER_SIZE_OFFSET, inode.i_size, by)
            if self.layout.seals_offset:
                ram.write_u32(ser.phys + self.layout.seals_offset, inode.seals, by)
            slot = KhoVmallocSlot(kernel, ser.phys + self.layout.folios_offset)
            records, nr_folios = _preserve_folios(file, slot)
            ram.write_u64(ser.phys + self.layout.nr_folios_offset, nr_folios, by)
        except KernelError as refused:
            if ser is not None:
                kernel.kho_unpreserve_free(ser)
            empty_holes(inode, holes)
            inode.shmem_freeze(False)
            if kernel.trace is not None:
                kernel.emit(symbol, {"file": file.name}, -refused.errno)
            raise
        args.private_data = records
        args.serialized_data = ser.phys
        if holes:
            self._filled[ser.phys] = holes
        if kernel.trace is not None:
            kernel.emit(symbol, {"file": file.name, "nr_folios": nr_folios}, 0)

    def freeze(self, args: LiveupdateFileOpArgs) -> None:
        """``memfd_luo_freeze``: the position may have changed. Raises -EINVAL without a handle."""
        kernel = args.kernel
        symbol = "memfd_luo_freeze"
        if not args.serialized_data:
            kernel.warn_once(f"WARNING: {symbol}: nothing was preserved", symbol)
            raise KernelError(errno.EINVAL, symbol, "nothing was preserved")
        assert isinstance(args.file, Memfd)
        if kernel.release.fix_memfd_poison and args.file.inode.poisoned:
            raise KernelError(errno.EBUSY, symbol, "a page of it is poisoned")
        ser = kernel.virt(args.serialized_data, self.layout.ser_bytes)
        kernel.ram.write_u64(ser + MEMFD_LUO_SER_POS_OFFSET, args.file.f_pos, kernel.by(symbol))
        if kernel.release.fix_memfd_seals and self.layout.seals_offset:
            seals = args.file.inode.seals
            kernel.ram.write_u32(ser + self.layout.seals_offset, seals, kernel.by(symbol))
        if kernel.trace is not None:
            kernel.emit(symbol, {"file": args.file.name}, 0)

    def unpreserve(self, args: LiveupdateFileOpArgs) -> None:
        """``memfd_luo_unpreserve``: let go of everything; holes stay filled."""
        kernel = args.kernel
        symbol = "memfd_luo_unpreserve"
        if not args.serialized_data:
            kernel.warn_once(f"WARNING: {symbol}: nothing was preserved", symbol)
            return
        file = args.file
        assert isinstance(file, Memfd)
        file.inode.shmem_freeze(False)
        ser = self._load(kernel, args.serialized_data)
        if ser.nr_folios:
            slot = KhoVmallocSlot(kernel, args.serialized_data + self.layout.folios_offset)
            kho_unpreserve_vmalloc(kernel, slot)
            records: VmStruct = args.private_data
            runs = list(folio_runs(kernel, records, ser.nr_folios))
            unpreserve_folio_runs(
                kernel, (FolioRun(run.pfn, run.order, run.nr_folios) for run in runs)
            )
            unpin_folios(
                file.inode,
                (CacheRun(run.pgoff, run.pfn, run.order, run.nr_folios) for run in runs),
            )
            vfree(kernel, records)
            empty_holes(file.inode, self._filled.pop(args.serialized_data, []))
        kernel.kho_unpreserve_free(Folio(kernel, args.serialized_data >> kernel.arch.page_shift, 0))
        if kernel.trace is not None:
            kernel.emit(symbol, {"file": file.name}, None)

    # -- in the new kernel ----------------------------------------------------------------------

    def retrieve(self, args: LiveupdateFileOpArgs) -> None:
        """``memfd_luo_retrieve``: a new memfd with the size, position, seals and folios.

        Raises -EOPNOTSUPP for unknown seals, -EINVAL where the records cannot be restored, and the
        errors of ``memfd_luo_retrieve_folios``.
        """
        kernel = args.kernel
        symbol = "memfd_luo_retrieve"
        phys = args.serialized_data
        ser = self._load(kernel, phys)
        file: Memfd | None = None
        is_left = bool(ser.nr_folios) and kernel.release.fix_memfd_leak
        try:
            if ser.seals & ~MEMFD_LUO_ALL_SEALS:
                raise KernelError(errno.EOPNOTSUPP, symbol, f"seals {ser.seals:#x}")
            file = self._alloc_file(kernel)
            if self.layout.seals_offset:
                if kernel.release.fix_memfd_mode and ser.seals & F_SEAL_EXEC:
                    file.inode.i_mode &= ~0o111
                file.add_seals(ser.seals)  # which no such file refuses
            file.vfs_setpos(ser.pos)
            file.inode.i_size = ser.size
            if ser.nr_folios:
                slot = KhoVmallocSlot(kernel, phys + self.layout.folios_offset)
                records = kho_restore_vmalloc(kernel, slot)
                if records is None:
                    raise KernelError(errno.EINVAL, symbol, "the records cannot be restored")
                is_left = False
                try:
                    retrieve_folios(file, records, ser.nr_folios)
                finally:
                    vfree(kernel, records)
        except KernelError as refused:
            if file is not None:
                file.fput()
            if is_left:
                discard_unmapped(kernel, phys + self.layout.folios_offset, ser.nr_folios)
            if kernel.release.memfd_frees_header:
                kernel.kho_restore_free(phys)
            if kernel.trace is not None:
                kernel.emit(symbol, {"phys": phys}, -refused.errno)
            raise
        args.file = file
        kernel.kho_restore_free(phys)
        if kernel.trace is not None:
            kernel.emit(symbol, {"phys": phys, "nr_folios": ser.nr_folios}, 0)

    def finish(self, args: LiveupdateFileOpArgs) -> None:
        """``memfd_luo_finish``: free what nobody tried to retrieve; else there is nothing left."""
        if args.retrieve_status:
            return
        kernel = args.kernel
        phys = args.serialized_data
        ser = self._load(kernel, phys)
        if ser.nr_folios:
            slot = KhoVmallocSlot(kernel, phys + self.layout.folios_offset)
            records = kho_restore_vmalloc(kernel, slot)
            if records is not None:
                discard_folios(kernel, folio_runs(kernel, records, ser.nr_folios), warn=True)
                vfree(kernel, records)
            elif kernel.release.fix_memfd_leak:
                discard_unmapped(kernel, slot.phys, ser.nr_folios)
        kernel.kho_restore_free(phys)
        if kernel.trace is not None:
            kernel.emit("memfd_luo_finish", {"phys": phys, "nr_folios": ser.nr_folios}, None)

    def _alloc_file(self, kernel: Kernel) -> Memfd:
        flags = MFD_ALLOW_SEALING if self.layout.seals_offset else 0
        try:
            file = memfd_alloc_file(kernel, "", flags)
        except KernelError as refused:
            kernel.printk(f"memfd_luo: failed to setup file: -{refused.name}")
            raise
        if not kernel.release.fix_memfd_name:
            file.dname = ""
        return file

    def _load(self, kernel: Kernel, phys: int) -> MemfdLuoSer:
        size = self.layout.ser_bytes
        return unpack_memfd_luo_ser(kernel.ram.read(kernel.virt(phys, size), size), 0, self.layout)


def _preserve_folios(file: Memfd, slot: KhoVmallocSlot) -> tuple[VmStruct | None, int]:
    # memfd_luo_preserve_folios: the records' area and how many there are. Undoes itself.
    kernel, inode = file.kernel, file.inode
    symbol = "memfd_luo_preserve_folios"
    if kernel.release.fix_memfd_behind_end:
        page_size = kernel.arch.page_size
        shmem_truncate_range(inode, -(-inode.i_size // page_size) * page_size)
    if not inode.i_size:
        return None, 0
    max_folios = -(-inode.i_size >> kernel.arch.page_shift) & _UINT_MAX
    if kernel.release.fix_memfd_size and max_folios * 8 > KVMALLOC_MAX_BYTES:
        raise KernelError(errno.EFBIG, symbol, f"an array of {max_folios} pointers")
    array = kvmalloc(kernel, max_folios * 8, symbol)
    if array is None:
        raise KernelError(errno.ENOMEM, symbol, f"an array of {max_folios} pointers")
    try:
        try:
            runs = memfd_pin_folios(file, 0, inode.i_size - 1, max_folios)
        except KernelError as refused:
            kernel.printk(f"memfd_luo: failed to pin folios: {-refused.errno}")
            raise
        try:
            return _preserve_pinned(kernel, inode, runs, slot)
        except KernelError:
            unpin_folios(inode, runs)
            raise
    finally:
        kvfree(kernel, array)


def _preserve_pinned(
    kernel: Kernel, inode: ShmemInode, runs: list[CacheRun], slot: KhoVmallocSlot
) -> tuple[VmStruct, int]:
    symbol = "memfd_luo_preserve_folios"
    nr_folios = sum(run.nr_folios for run in runs)
    records = vmalloc(kernel, nr_folios * MEMFD_LUO_FOLIO_SER_BYTES, zero=True, owner=symbol)
    if records is None:
        raise KernelError(errno.ENOMEM, symbol, f"{nr_folios} records")
    folios = [FolioRun(run.pfn, run.order, run.nr_folios) for run in runs]
    error, done = preserve_folio_runs(kernel, folios)
    is_data = kernel.release.memfd_makes_data
    if is_data:
        _make_data(inode, runs, done)
    try:
        if error:
            raise KernelError(-error, symbol, f"kho_preserve_folio after {done} folios")
        write_records(kernel, records, runs, _FLAGS if is_data else None)
        kho_preserve_vmalloc(kernel, records, slot)
    except KernelError:
        unpreserve_folio_runs(kernel, _first(folios, done))
        vfree(kernel, records)
        raise
    return records, nr_folios


def _make_data(inode: ShmemInode, runs: list[CacheRun], nr_folios: int) -> None:
    # The folios that were preserved become dirty, and zeroed where they were not up to date.
    end = 0
    for run in runs:
        end = run.index + (min(nr_folios, run.nr_folios) << run.order)
        nr_folios -= run.nr_folios
        if nr_folios <= 0:
            break
    inode.make_uptodate(0, end)
    inode.mapping.mark(0, end, dirty=True)


def _first(runs: list[FolioRun], nr_folios: int) -> list[FolioRun]:
    # The first folios of all, last run first: the kernel undoes in reverse.
    first = []
    for run in runs:
        if nr_folios <= 0:
            break
        first.append(run._replace(nr_folios=min(nr_folios, run.nr_folios)))
        nr_folios -= run.nr_folios
    return first[::-1]
