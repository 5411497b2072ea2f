"""Files that sessions carry: the memory of guests, and devices that may refuse the jump.

The outside observer's notes on each: whose it is, what has to be in it, where its folios lay when
the machine jumped. A kernel learns none of it; what a successor gives back is held against them.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from khosim.abi.memfd import F_SEAL_SEAL, LAYOUTS
from khosim.errors import KernelError
from khosim.kernel.file import File
from khosim.kernel.liveupdate.file_ops import FileHandler, LiveupdateFileOpArgs
from khosim.kernel.memfd import Memfd
from khosim.scenario.contents import I64, U64, page_contents

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.process import Process

__all__ = ("Carried", "Device", "DeviceFile", "DeviceHandler", "Guest")

_COMPATIBLE = "khosim-device-v1"


class Carried:
    """What is known of one file; ``process`` holds it open, None while no kernel gave it back.

    ``session`` and ``token`` say where it was preserved, ``""`` while it is in no session.
    """

    kind: ClassVar[str] = ""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process: Process | None = None
        self.fd = -1
        self.session = ""
        self.token = 0

    @property
    def file(self) -> File | None:
        """The file in the running kernel, or None."""
        return None if self.process is None else self.process.file(self.fd)

    def hold(self, kernel: Kernel, file: File) -> None:
        """A process of its own opens ``file``, whose reference it takes over."""
        self.process = kernel.process(self.name)
        self.fd = self.process.install(file)

    def remember(self) -> None:
        """The process will be gone: keep what has to come back."""

    def fault(self, file: File) -> str:
        """What is wrong with the file that came back, in words; empty where nothing is."""
        raise NotImplementedError

    def bytes_of(self, file: File) -> int:
        """Bytes of memory that the file stands for."""
        raise NotImplementedError


class Guest(Carried):
    """A guest's memory: a memfd with content in some pages and zeros everywhere else.

    ``pages`` are the pages of the file that hold the content of ``keys``, ascending; ``folios`` is
    where the file's folios lay at the jump: rows of page, pfn, order and number.
    """

    kind = "memfd"

    def __init__(self, name: str, size: int, pages: I64, keys: U64, position: int) -> None:
        super().__init__(name)
        self.size = size
        self.pages = pages
        self.keys = keys
        self.position = position
        self.seals = 0
        self.busy: set[int] = set()
        """Pages that vCPUs and devices write to: what is in them is not compared."""
        self.folios: list[tuple[int, int, int, int]] = []

    @property
    def memfd(self) -> Memfd | None:
        """The file, of a running guest."""
        file = self.file
        return file if isinstance(file, Memfd) else None

    def store(self, memfd: Memfd, pages: I64, contents: U64) -> None:
        """The guest writes whole pages of its memory."""
        shift = memfd.kernel.arch.page_shift
        for page, content in zip(pages.tolist(), contents, strict=True):
            memfd.store(page << shift, content.tobytes())

    def write(self, memfd: Memfd) -> int:
        """Have the guest write the content of :attr:`keys`; returns the bytes."""
        contents = page_contents(memfd.kernel.arch.page_size, self.keys)
        self.store(memfd, self.pages, contents)
        return contents.nbytes

    def remember(self) -> None:
        """Folios and seals; memfd-v1 carries no seals, the file comes back sealed."""
        memfd = self.memfd
        if memfd is not None:
            self.folios = folio_rows(memfd)
            layout = LAYOUTS.get(memfd.kernel.release.memfd)
            if layout is not None and not layout.seals_offset:
                self.seals = F_SEAL_SEAL

    def fault(self, file: File) -> str:
        """Size, position, seals, folios and every byte."""
        if not isinstance(file, Memfd):
            return f"a {type(file).__name__} came back, not a memfd"
        for what, found, wanted in (
            ("size", file.size, self.size),
            ("position", file.f_pos, self.position),
            ("seals", file.seals, self.seals),
        ):
            if found != wanted:
                return f"{what} {found:#x}, not {wanted:#x}"
        if folio_rows(file) != self.folios:
            return "its folios are not those that were handed over"
        return self.content_fault(file)

    def content_fault(self, memfd: Memfd) -> str:
        """The first page that does not hold what it has to, in words; empty where all do."""
        page_size = memfd.kernel.arch.page_size
        shift = memfd.kernel.arch.page_shift
        contents = page_contents(page_size, self.keys)
        for page, content in zip(self.pages.tolist(), contents, strict=True):
            if memfd.read(page << shift, page_size) != content.tobytes():
                return f"page {page:#x} is damaged"
        touched = _touched_pages(memfd)
        for page in np.setdiff1d(touched, self.pages).tolist():
            if page not in self.busy and any(memfd.read(page << shift, page_size)):
                return f"page {page:#x} is not empty any more"
        return ""

    def bytes_of(self, file: File) -> int:
        """Its size."""
        return self.size


def _touched_pages(memfd: Memfd) -> I64:
    # The pages of the file that anybody wrote to: what is elsewhere reads as zeros.
    kernel = memfd.kernel
    shift = kernel.arch.page_shift
    extents = np.array(list(memfd.extents(0, memfd.size)), dtype=np.int64).reshape(-1, 3)
    extents = extents[np.argsort(extents[:, 1])] >> shift
    ranges = np.array(kernel.ram.touched_ranges(), dtype=np.int64).reshape(-1, 2) >> shift
    counts = ranges[:, 1] - ranges[:, 0]
    frames = np.repeat(ranges[:, 0] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    at = np.searchsorted(extents[:, 1], frames, side="right") - 1
    frames, at = frames[at >= 0], at[at >= 0]
    index = frames - extents[at, 1]
    pages: I64 = (extents[at, 0] + index)[index < extents[at, 2]]
    return pages


def folio_rows(memfd: Memfd) -> list[tuple[int, int, int, int]]:
    """The folios of a file: (page of the file, pfn, order, how many in a row)."""
    rows: list[tuple[int, int, int, int]] = []
    for run in memfd.inode.mapping:
        if rows:
            index, pfn, order, count = rows[-1]
            done = count << order
            if (index + done, pfn + done, order) == (run.index, run.pfn, run.order):
                rows[-1] = (index, pfn, order, count + run.nr_folios)
                continue
        rows.append((run.index, run.pfn, run.order, run.nr_folios))
    return rows


class DeviceFile(File):
    """An open device: a value, and an errno with which it refuses to be frozen (0: none)."""

    __slots__ = ("refusal", "value")

    def __init__(self, kernel: Kernel, name: str, value: int, refusal: int = 0) -> None:
        super().__init__(kernel, name)
        self.value = value
        self.refusal = refusal


class DeviceHandler(FileHandler):
    """Hands a device's value over in a preserved page; written down when it is frozen."""

    compatible = _COMPATIBLE

    def can_preserve(self, file: File) -> bool:
        """Devices only."""
        return isinstance(file, DeviceFile)

    def preserve(self, args: LiveupdateFileOpArgs) -> None:
        """A page for the value."""
        page = args.kernel.kho_alloc_preserve(8)
        args.serialized_data = page.phys
        args.private_data = page

    def freeze(self, args: LiveupdateFileOpArgs) -> None:
        """The value as it is now; refused while the device refuses."""
        file = args.file
        assert isinstance(file, DeviceFile)
        if file.refusal:
            name = errno.errorcode[file.refusal]
            raise KernelError(file.refusal, "device_freeze", f"{file.name} answers {name}")
        args.private_data.write(0, file.value.to_bytes(8, "little"), by=file.name)

    def unpreserve(self, args: LiveupdateFileOpArgs) -> None:
        """Give the page back."""
        args.kernel.kho_unpreserve_free(args.private_data)

    def retrieve(self, args: LiveupdateFileOpArgs) -> None:
        """A device with the value that was written down."""
        value = args.kernel.ram.read_u64(args.serialized_data)
        args.kernel.kho_restore_free(args.serialized_data)
        args.file = DeviceFile(args.kernel, "device", value)

    def finish(self, args: LiveupdateFileOpArgs) -> None:
        """Give the page back where nobody asked for the device."""
        if not args.retrieve_status:
            args.kernel.kho_restore_free(args.serialized_data)


class Device(Carried):
    """A device with a value of 64 bits."""

    kind = "device"

    def __init__(self, name: str, value: int) -> None:
        super().__init__(name)
        self.value = value

    def fault(self, file: File) -> str:
        """The value."""
        if not isinstance(file, DeviceFile):
            return f"a {type(file).__name__} came back, not a device"
        if file.value != self.value:
            return f"its value is {file.value:#x}, not {self.value:#x}"
        return ""

    def bytes_of(self, file: File) -> int:
        """A page."""
        return file.kernel.arch.page_size
