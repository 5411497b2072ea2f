"""One kernel generation: its state and the calls that its users make.

A :class:`Kernel` is what :func:`khosim.kernel.boot.boot` makes from a machine; it dies when it
jumps. All that it hands on it has written into RAM. Functions bear the kernel's names and live in
the modules named after its files; the methods here are the ones that users and tests call.
"""

from __future__ import annotations

import errno
from typing import Any

from khosim.errors import InputError, KernelError, KhoSimError
from khosim.kernel.arch import Arch
from khosim.kernel.boot_hugetlb import Hstate
from khosim.kernel.cmdline import BootOptions
from khosim.kernel.direct_map import DirectMap
from khosim.kernel.image import KernelConfig, KernelImage
from khosim.kernel.kexec import Kimage, kernel_kexec, kexec_file_load
from khosim.kernel.kfence import Kfence
from khosim.kernel.kho import kho_scratch_overlap, scratch_areas
from khosim.kernel.kho_calls import KhoCalls
from khosim.kernel.kho_debugfs import KhoDebugfs
from khosim.kernel.kho_in import KhoIn
from khosim.kernel.kho_out import KhoOut
from khosim.kernel.kho_scratch import ScratchSizes
from khosim.kernel.kmalloc_cache import KmallocCache
from khosim.kernel.liveupdate.luo_core import Luo
from khosim.kernel.memblock import Memblock
from khosim.kernel.memfd import MFD_ALLOW_SEALING, Memfd, memfd
from khosim.kernel.page import Folio, Page
from khosim.kernel.page_alloc import PageAllocator
from khosim.kernel.page_map import PageMap
from khosim.kernel.page_policy import Policy
from khosim.kernel.process import Process
from khosim.kernel.reserve_mem import ReserveMem
from khosim.kernel.trace import DriverSet, Event, Host, Trace
from khosim.machine.hardware import Hardware
from khosim.machine.ram import Writer

__all__ = ("Folio", "Kernel", "Page")


class Kernel(DirectMap, KhoCalls):
    """One generation, from its first instruction to its jump.

    ``generation`` counts from 0 on this machine. ``messages`` is the kernel log. ``trace`` is
    called with every :class:`~khosim.kernel.trace.Event` when it is set.
    """

    __slots__ = (
        "__weakref__",
        "_by",
        "_warned",
        "alive",
        "arch",
        "boot_fdt_phys",
        "cmdline",
        "config",
        "crash_image",
        "crashk_low_res",
        "crashk_res",
        "debugfs",
        "drivers",
        "elfcorehdr_bytes",
        "firmware_map",
        "generation",
        "gigantic_pages",
        "hardware",
        "host",
        "huge_pages",
        "hugetlb",
        "initrd",
        "kernel_range",
        "kexec_image",
        "kfence",
        "kho_enable",
        "kho_in",
        "kho_out",
        "kho_scratch_cnt",
        "kho_scratch_phys",
        "liveupdate",
        "log_buf_phys",
        "memblock",
        "messages",
        "nr_kernel_pages",
        "options",
        "page_cache",
        "pages",
        "phase",
        "present_sections",
        "ram",
        "release",
        "reserve_mem",
        "scratch_sizes",
        "slab_available",
        "stale_scratch",
        "system_ram",
        "trace",
    )

    def __init__(
        self,
        hardware: Hardware,
        arch: Arch,
        config: KernelConfig,
        generation: int,
        *,
        policy: Policy | None = None,
        trace: Trace | None = None,
        host: Host | None = None,
    ) -> None:
        super().__init__()
        self.hardware = hardware
        self.host = host
        self.ram = hardware.ram
        self.arch = arch
        self.config = config
        self.release = config.release
        self.generation = generation
        self.trace = trace
        self.phase = "start_kernel"
        self.alive = True
        self.messages: list[str] = []
        self.cmdline = ""
        self.options = BootOptions(
            arch,
            kho_default=config.enable_default,
            log_buf_bytes=1 << config.log_buf_shift,
        )
        self.scratch_sizes = ScratchSizes()
        self.memblock = Memblock(
            page_size=arch.page_size, generation=generation, on_message=self.printk
        )
        self.pages = PageAllocator(arch, PageMap(), policy)
        self.pages.bad_page = self.printk
        self.firmware_map: list[tuple[int, int, int]] = []
        """``e820_table_kexec``: the map that the next kernel gets (x86-64)."""
        self.system_ram: list[tuple[int, int]] = []
        """System RAM in ``/proc/iomem``, as (start, end) (x86-64)."""
        self.boot_fdt_phys = 0
        self.kernel_range = (0, 0)
        self.initrd = (0, 0)
        self.elfcorehdr_bytes = 0
        self.crashk_res: list[tuple[int, int]] = []
        self.crashk_low_res: list[tuple[int, int]] = []
        self.kexec_image: Kimage | None = None
        """The loaded image; after the jump, the one this kernel left for."""
        self.crash_image: Kimage | None = None
        self.hugetlb: list[Hstate] = []
        self.gigantic_pages: list[tuple[int, int]] = []
        """(first pfn, pages) of huge pages that came from memblock."""
        self.huge_pages: dict[int, int] = {}
        """Pages in the pool of each huge page size (bytes)."""
        self.log_buf_phys = 0
        """Where the log lies once it has left the kernel image."""
        self.nr_kernel_pages = 0
        """Free pages when the zones were laid out: what hash tables are sized by."""
        self.slab_available = False
        self.page_cache: KmallocCache | None = None
        self.kfence: Kfence | None = None
        self.present_sections: list[tuple[int, int]] = []
        self._by: dict[str, Writer] = {}
        self._warned: set[str] = set()
        self.kho_enable = config.enable_default
        self.kho_scratch_phys = 0
        self.kho_scratch_cnt = 0
        self.stale_scratch: tuple[int, int] | None = None
        """Freed ``kho_scratch`` array and its count, where scratch could not be reserved."""
        self.kho_in = KhoIn(self)
        self.kho_out = KhoOut(self)
        self.reserve_mem = ReserveMem(self)
        self.debugfs = KhoDebugfs(self)
        self.liveupdate = Luo(self)
        self.drivers: DriverSet | None = None
        """What drives the devices of this machine, where it has any."""
        if trace is not None:
            self.memblock.trace = self._trace_memblock

    def __repr__(self) -> str:
        state = "alive" if self.alive else "dead"
        return f"Kernel(generation={self.generation}, release={self.release.name!r}, {state})"

    # -- what every part of a kernel uses -------------------------------------------------------

    def by(self, symbol: str) -> Writer:
        """The writer tag of ``symbol`` in this generation, for :class:`~khosim.machine.ram.Ram`."""
        tag = self._by.get(symbol)
        if tag is None:
            tag = self._by[symbol] = Writer(self.generation, symbol)
        return tag

    def emit(self, symbol: str, args: dict[str, Any], result: Any) -> None:
        """Send one event to the trace; callers test ``trace is not None`` first."""
        if self.trace is not None:
            self.trace(Event(self.generation, self.phase, symbol, args, result))

    def _trace_memblock(self, symbol: str, args: tuple[Any, ...], result: Any) -> None:
        self.emit(symbol, {"args": args}, result)

    def printk(self, message: str) -> None:
        """A line of the kernel log."""
        self.messages.append(message)
        if self.trace is not None:
            self.emit("printk", {"message": message}, None)

    def _check_request(self, order: int, nid: int | None) -> None:
        if not self.alive:
            self.check_alive()
        if order < 0:
            raise InputError("order", f"{order} is negative")
        if nid is not None and nid not in self.hardware.memory_map.online_nodes:
            raise InputError("nid", f"this machine has no node {nid}")

    def warn(self, message: str) -> None:
        """``WARN``: a line of the kernel log that begins with WARNING."""
        self.printk(message)

    def warn_once(self, message: str, where: str) -> None:
        """``WARN_ON_ONCE``: only the first time at this place."""
        if where not in self._warned:
            self._warned.add(where)
            self.printk(message)

    # -- memory ---------------------------------------------------------------------------------

    def kho_radix_alloc_node(self) -> int:
        """A zeroed page for a radix tree: from the buddy, or from memblock early in boot."""
        page_size = self.arch.page_size
        if self.slab_available:
            pfn = self.pages.alloc_pages(0, "kho_radix_alloc_node")
            if pfn is None:
                return 0
            phys = pfn << self.arch.page_shift
        else:
            phys = self.memblock.memblock_alloc(page_size, page_size)
            if not phys:
                return 0
        self.ram.zero(phys, page_size, self.by("kho_radix_alloc_node"))
        if self.trace is not None:
            self.emit("kho_radix_alloc_node", {}, phys)
        return phys

    def kho_radix_alloc_nodes(self, nr_nodes: int) -> list[int]:
        """``nr_nodes`` zeroed pages as single calls would give them; fewer when memory ends."""
        if not self.slab_available or not self.pages.bulk_is_exact:
            nodes: list[int] = []
            while len(nodes) < nr_nodes and (phys := self.kho_radix_alloc_node()):
                nodes.append(phys)
            return nodes
        shift, page_size = self.arch.page_shift, self.arch.page_size
        symbol = "kho_radix_alloc_node"
        by = self.by(symbol)
        nodes = []
        for pfn, count in self.pages.alloc_pages_bulk(0, nr_nodes, symbol):
            self.ram.zero(pfn << shift, count << shift, by)
            nodes.extend(range(pfn << shift, (pfn + count) << shift, page_size))
        if self.trace is not None:
            for phys in nodes:
                self.emit(symbol, {}, phys)
        return nodes

    def kho_radix_free_node(self, phys: int) -> None:
        """Give a tree's page back to where it came from."""
        if self.page_cache is not None and self.page_cache.holds(phys):
            self.page_cache.kfree(phys)
        elif self.slab_available:
            self.pages.free_pages(phys >> self.arch.page_shift, 0)
        else:
            self.memblock.memblock_phys_free(phys, self.arch.page_size)

    def alloc_folio(
        self,
        order: int = 0,
        *,
        owner: str = "user",
        movable: bool = False,
        nid: int | None = None,
        zero: bool = False,
    ) -> Folio:
        """``folio_alloc``: a folio of ``1 << order`` pages; raises -ENOMEM.

        ``movable`` folios may come from scratch; ``nid`` is the preferred node; ``zero`` clears.
        """
        if order < 0 or nid is not None or not self.alive:
            self._check_request(order, nid)
        pfn = self.pages.alloc_pages(
            order, owner, movable=movable, compound=order > 0, nid=nid
        )
        if self.trace is not None:
            self.emit("alloc_pages", {"order": order, "owner": owner, "movable": movable}, pfn)
        if pfn is None:
            raise KernelError(errno.ENOMEM, "folio_alloc", f"order {order} for {owner}")
        folio = Folio(self, pfn, order)
        if zero:
            self.ram.zero(folio.phys, folio.len_bytes, self.by(owner))
        return folio

    def alloc_folios(
        self,
        nr_folios: int,
        order: int = 0,
        *,
        owner: str = "user",
        movable: bool = False,
        nid: int | None = None,
    ) -> list[tuple[int, int]]:
        """``nr_folios`` folios at once, as ``(first pfn, folios)`` runs; raises -ENOMEM."""
        self._check_request(order, nid)
        runs = self.pages.alloc_pages_bulk(
            order, nr_folios, owner, movable=movable, compound=order > 0, nid=nid
        )
        if self.trace is not None:
            self.emit("alloc_pages_bulk", {"order": order, "owner": owner}, len(runs))
        if sum(count for _, count in runs) < nr_folios:
            for pfn, count in runs:
                self.pages.free_range(pfn, pfn + (count << order))
            raise KernelError(errno.ENOMEM, "folio_alloc", f"{nr_folios} of order {order}")
        return runs

    def alloc_pages_exact(self, nr_pages: int, *, owner: str = "user") -> int:
        """``alloc_pages_exact``: the first pfn of ``nr_pages`` order-0 pages in a row.

        Raises -ENOMEM, also above the largest order and for no page (``get_order(0)`` is 52).
        """
        self.check_alive()
        order = (nr_pages - 1).bit_length()
        pfn = None
        if nr_pages > 0 and order <= self.arch.max_page_order:
            pfn = self.pages.alloc_pages(order, owner)
        if pfn is None:
            raise KernelError(errno.ENOMEM, "alloc_pages_exact", f"{nr_pages} pages")
        self.pages.split_page(pfn, order, owner)
        self.pages.free_range(pfn + nr_pages, pfn + (1 << order))
        if self.trace is not None:
            self.emit("alloc_pages_exact", {"nr_pages": nr_pages, "owner": owner}, pfn)
        return pfn

    def memfd(
        self,
        name: str,
        *,
        size: int | str = 0,
        flags: int = MFD_ALLOW_SEALING,
        huge: str = "never",
        nid: int | None = None,
    ) -> Memfd:
        """A memfd of ``size``; see :func:`khosim.kernel.memfd.memfd`."""
        return memfd(self, name, size=size, flags=flags, huge=huge, nid=nid)

    def process(
        self, name: str = "", *, rlimit_nofile: int = 1024, is_compat: bool = False
    ) -> Process:
        """A new process, for those who think in file descriptors and ioctls."""
        return Process(self, name, rlimit_nofile=rlimit_nofile, is_compat=is_compat)

    def page(self, pfn: int) -> Page:
        """The ``struct page`` of ``pfn`` now, for people and tests."""
        zone = self.pages.page_zone(pfn)
        state = self.pages.pages.state(pfn)
        if state is not None:
            kind, order, compound, owner = state
        elif zone is None:
            kind, order, compound, owner = "absent", 0, False, ""
        else:
            deferred = any(start <= pfn < end for start, end, _ in self.pages.deferred)
            kind, order, compound, owner = ("deferred" if deferred else "free"), 0, False, ""
        return Page(
            pfn,
            kind,
            zone.nid if zone else -1,
            zone.name if zone else "",
            self.pages.migratetype_of(pfn),
            self.pages.pages.page_count(pfn),
            order,
            compound,
            pfn & -(1 << order),
            self.pages.pages.page_private(pfn, self.kho_page_magic),
            owner,
        )

    def free_reserved_area(self, start: int, end: int, what: str | None, poison: int = -1) -> int:
        """``free_reserved_area``: whole pages of [start, end) go to the buddy; returns how many.

        ``what`` is the kernel's word for it in the log, None for silence; ``poison`` is a byte to
        fill the pages with first.
        """
        shift = self.arch.page_shift
        if self.arch.name == "arm64" and start < end:
            self.memblock.memblock_phys_free(start, end - start)
        first, last = -(-start >> shift), end >> shift
        if first >= last:
            return 0
        if 0 <= poison <= 0xFF:
            by = self.by("free_reserved_area")
            if poison:
                self.ram.write(first << shift, bytes([poison]) * ((last - first) << shift), by)
            else:
                self.ram.zero(first << shift, (last - first) << shift, by)
        self.pages.free_reserved(first, last)
        if what is not None:
            self.printk(f"Freeing {what} memory: {(last - first) << shift >> 10}K")
        return last - first

    def total_ram_pages(self) -> int:
        """``totalram_pages``: pages that the zones manage."""
        return sum(zone.managed_pages for zone in self.pages.zones)

    # -- KHO, what takes more than its own state -----------------------------------------------

    def scratch_areas(self) -> list[tuple[int, int]]:
        """``kho_scratch[]`` as (address, size) in bytes."""
        return scratch_areas(self)

    def kho_scratch_overlap(self, phys: int, size_bytes: int) -> bool:
        """``kho_scratch_overlap``."""
        return kho_scratch_overlap(self, phys, size_bytes)

    # -- kexec ----------------------------------------------------------------------------------

    def kexec_file_load(
        self,
        image: KernelImage | bytes,
        *,
        initrd: bytes = b"",
        initrd_bytes: int = 0,
        cmdline: str = "",
        on_crash: bool = False,
    ) -> Kimage:
        """``kexec_file_load``; see :func:`khosim.kernel.kexec.kexec_file_load`."""
        self.check_alive()
        data = image.data if isinstance(image, KernelImage) else image
        return kexec_file_load(
            self, data, initrd, cmdline, initrd_bytes=initrd_bytes, on_crash=on_crash
        )

    def kexec(self, **options: Any) -> Kernel:
        """Load, freeze, jump and boot the successor; options of :meth:`khosim.Machine.kexec`."""
        self.check_alive()
        if self.host is None:
            raise KhoSimError("this kernel was booted without a Machine: use kexec_file_load")
        return self.host.kexec(self, **options)

    def kernel_kexec(self, image: Kimage | None = None) -> None:
        """``kernel_kexec``: leave for the loaded image; this kernel is dead afterwards.

        Where it raises, it lives on; see :func:`khosim.kernel.kexec.kernel_kexec`.
        """
        self.check_alive()
        kernel_kexec(self, image)
