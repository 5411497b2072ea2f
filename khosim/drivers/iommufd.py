"""iommufd: I/O address spaces of user space, backed by memfds.

Models ``drivers/iommu/iommufd`` @ 7.3 as far as a VMM uses it for assigned devices: one I/O address
space and its page tables (``IOMMU_HWPT_ALLOC``, ``IOMMU_IOAS_MAP_FILE``), and the file handler
proposed in "iommu: Add live update state preservation" (Samiullah Khawaja and YiFei Zhu; no release
has it): user space marks page tables with tokens, those are preserved, and their mappings are
immutable from then on. What comes back has no address space behind it: page tables only, which go
when the file is closed or finished with nobody attached.

Beyond the proposal: a mapping of another device's BAR (peer-to-peer) may be preserved, too. The
proposal allows file-backed mappings only. Left out: nesting, dirty tracking, access objects.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from khosim.abi.iommufd import (
    IOMMUFD_LUO_COMPATIBLE,
    IommufdHwptLu,
    iommufd_lu_bytes,
    pack_iommufd_lu,
    unpack_iommufd_lu,
)
from khosim.drivers.iommu_core import IommuCore, IommuDomain
from khosim.errors import KernelError
from khosim.kernel.file import File
from khosim.kernel.gup import memfd_pin_folios, unpin_folios
from khosim.kernel.liveupdate.file_ops import FileHandler, LiveupdateFileOpArgs
from khosim.kernel.memfd import Memfd

if TYPE_CHECKING:
    from khosim.kernel.page_cache import CacheRun

__all__ = ("Hwpt", "IommufdFile", "IommufdHandler")

_UINT_MAX = (1 << 32) - 1


class Mapping(NamedTuple):
    """Bytes [iova, iova + len_bytes) of an address space; ``memfd`` is None for a BAR."""

    iova: int
    len_bytes: int
    memfd: Memfd | None
    pinned: tuple[CacheRun, ...]


class Hwpt:
    """``struct iommufd_hwpt_paging``: a domain under the user's ``token`` (None: not marked)."""

    __slots__ = ("domain", "token")

    def __init__(self, domain: IommuDomain, token: int | None = None) -> None:
        self.domain = domain
        self.token = token


class IommufdFile(File):
    """An open ``/dev/iommu``: page tables that all map the same address space."""

    __slots__ = ("core", "hwpts", "mappings")

    def __init__(self, core: IommuCore, name: str = "iommufd") -> None:
        super().__init__(core.kernel, name)
        self.core = core
        self.hwpts: list[Hwpt] = []
        self.mappings: list[Mapping] = []

    @property
    def is_immutable(self) -> bool:
        """Whether a page table of it is preserved, or came from the predecessor."""
        return any(hwpt.domain.outgoing or hwpt.domain.incoming for hwpt in self.hwpts)

    def alloc_hwpt(self) -> Hwpt:
        """``IOMMU_HWPT_ALLOC``: raises -ENOMEM."""
        self.check_open()
        hwpt = Hwpt(self.core.alloc_domain())
        self.hwpts.append(hwpt)
        return hwpt

    def hwpt_of(self, token: int) -> Hwpt | None:
        """The page table that was marked with ``token``."""
        return next((hwpt for hwpt in self.hwpts if hwpt.token == token), None)

    def map_file(self, iova: int, memfd: Memfd, offset: int, len_bytes: int) -> None:
        """``IOMMU_IOAS_MAP_FILE``: pin bytes of a memfd and map them.

        Raises -EBUSY while immutable, what pinning and mapping refuse; -EINVAL outside of the file.
        """
        self._check_mutable()
        pinned = tuple(memfd_pin_folios(memfd, offset, offset + len_bytes - 1, _UINT_MAX))
        shift = memfd.kernel.arch.page_shift
        runs: list[tuple[int, int, int]] = []
        for run in pinned:
            low, high = max(offset, run.index << shift), min(offset + len_bytes, run.end << shift)
            phys = low + (run.pfn - run.index << shift)
            if runs and runs[-1][1] + runs[-1][2] == phys:
                runs[-1] = runs[-1][0], runs[-1][1], runs[-1][2] + high - low
            else:
                runs.append((iova + low - offset, phys, high - low))
        try:
            for hwpt in self.hwpts:
                for at, phys, size in runs:
                    hwpt.domain.table.map(at, phys, size)
        except KernelError:
            self._unmap_tables(iova, len_bytes)
            unpin_folios(memfd.inode, pinned)
            raise
        memfd.get_file()
        self.mappings.append(Mapping(iova, len_bytes, memfd, pinned))

    def map_bar(self, iova: int, phys: int, len_bytes: int) -> None:
        """``IOMMU_IOAS_MAP_FILE`` of a dma-buf: another device's BAR; raises as map_file does."""
        self._check_mutable()
        for hwpt in self.hwpts:
            hwpt.domain.table.map(iova, phys, len_bytes)
        self.mappings.append(Mapping(iova, len_bytes, None, ()))

    def unmap(self, iova: int, len_bytes: int) -> None:
        """``IOMMU_IOAS_UNMAP``: raises -ENOENT where there is no such mapping, -EBUSY."""
        self._check_mutable()
        found = [it for it in self.mappings if (it.iova, it.len_bytes) == (iova, len_bytes)]
        if not found:
            raise KernelError(errno.ENOENT, "iopt_unmap_iova", f"{iova:#x}")
        self._unmap_tables(iova, len_bytes)
        self._let_go(found[0])
        self.mappings.remove(found[0])

    def _check_mutable(self) -> None:
        self.check_open()
        if self.is_immutable:
            raise KernelError(errno.EBUSY, "iopt_map_pages", "preserved for a live update")

    def _unmap_tables(self, iova: int, len_bytes: int) -> None:
        for hwpt in self.hwpts:
            hwpt.domain.table.unmap(iova, len_bytes)
            self.core.unit.flush(hwpt.domain.domain_id)

    def _let_go(self, mapping: Mapping) -> None:
        if mapping.memfd is not None:
            unpin_folios(mapping.memfd.inode, mapping.pinned)
            mapping.memfd.fput()

    def mark_preserve(self, hwpt: Hwpt, token: int) -> None:
        """``IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE``: raises -EADDRINUSE for a token in use."""
        self.check_open()
        other = self.hwpt_of(token)
        if other is not None and other is not hwpt:
            raise KernelError(errno.EADDRINUSE, "iommufd_hwpt_lu_mark_preserve", f"{token}")
        hwpt.token = token

    def release(self) -> None:
        """``iommufd_fops_release``: page tables that nobody is attached to go, and mappings."""
        for hwpt in self.hwpts:
            for dev in list(hwpt.domain.attached):
                self.core.detach(hwpt.domain, dev)
            self.core.free_domain(hwpt.domain)
        for mapping in self.mappings:
            self._let_go(mapping)
        self.hwpts, self.mappings = [], []


class IommufdHandler(FileHandler):
    """``iommufd_lu_handler``: preserves what is marked."""

    compatible = IOMMUFD_LUO_COMPATIBLE

    def __init__(self, core: IommuCore) -> None:
        super().__init__()
        self._core = core

    def can_preserve(self, file: File) -> bool:
        """iommufd only."""
        return isinstance(file, IommufdFile)

    def preserve(self, args: LiveupdateFileOpArgs) -> None:
        """Preserve each marked page table; raises -ENOMEM, and -EINVAL where none is marked."""
        file = args.file
        assert isinstance(file, IommufdFile)
        kernel, core = args.kernel, self._core
        marked = [hwpt for hwpt in file.hwpts if hwpt.token is not None]
        if not marked:
            raise KernelError(errno.EINVAL, "iommufd_preserve", "no page table is marked")
        ser = kernel.kho_alloc_preserve(iommufd_lu_bytes(len(marked)))
        done: list[Hwpt] = []
        try:
            for hwpt in marked:
                core.preserve_domain(hwpt.domain)
                done.append(hwpt)
        except KernelError:
            for hwpt in reversed(done):
                core.unpreserve_domain(hwpt.domain)
            kernel.kho_unpreserve_free(ser)
            raise
        records = [IommufdHwptLu(hwpt.token or 0, hwpt.domain.outgoing) for hwpt in marked]
        ser.write(0, pack_iommufd_lu(records), by="iommufd_preserve")
        args.serialized_data, args.private_data = ser.phys, (ser, marked)

    def unpreserve(self, args: LiveupdateFileOpArgs) -> None:
        """Undo it: mappings can be changed again."""
        ser, marked = args.private_data
        for hwpt in reversed(marked):
            self._core.unpreserve_domain(hwpt.domain)
        args.kernel.kho_unpreserve_free(ser)

    def _records(self, args: LiveupdateFileOpArgs) -> list[IommufdHwptLu]:
        phys = args.serialized_data
        return unpack_iommufd_lu(args.kernel.ram.read(args.kernel.virt(phys, 4096), 4096))

    def _domain_of(self, record: IommufdHwptLu) -> IommuDomain | None:
        for domain in self._core.incoming.values():
            if domain.incoming == record.domain_data:
                return domain
        return None

    def retrieve(self, args: LiveupdateFileOpArgs) -> None:
        """A file with the page tables that came and are in use.

        A page table that no preserved function uses is not restored at boot: -ENODEV.
        """
        found = [(record, self._domain_of(record)) for record in self._records(args)]
        if any(domain is None for _, domain in found):
            raise KernelError(errno.ENODEV, "iommufd_retrieve", "a page table is nobody's")
        file = IommufdFile(self._core)
        file.hwpts = [Hwpt(domain, rec.token) for rec, domain in found if domain is not None]
        args.kernel.kho_restore_free(args.serialized_data)
        args.file = file

    def can_finish(self, args: LiveupdateFileOpArgs) -> bool:
        """Not while a function that is not retrieved yet translates through it."""
        file = args.file
        if not isinstance(file, IommufdFile):
            return True
        waiting = self._core.incoming
        return not any(
            domain is hwpt.domain and rid not in {dev.bdf.rid for dev in domain.attached}
            for hwpt in file.hwpts
            for rid, domain in waiting.items()
        )

    def finish(self, args: LiveupdateFileOpArgs) -> None:
        """The page tables are the new kernel's own; those that nobody retrieved go."""
        core = self._core
        if isinstance(args.file, IommufdFile):
            for hwpt in args.file.hwpts:
                hwpt.domain.incoming = 0
                core.forget(hwpt.domain)
            return
        if args.retrieve_status:
            return
        for record in self._records(args):
            domain = self._domain_of(record)
            if domain is None:
                continue
            for rid in core.forget(domain):
                core.unit.clear_context(rid)
            core.free_domain(domain)
        args.kernel.kho_restore_free(args.serialized_data)
