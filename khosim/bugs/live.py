"""What the exhibits about live updates have in common: a guest, a device, an agent that waits."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from khosim.errors import KernelError, KhoSimError
from khosim.kernel.file import File
from khosim.kernel.liveupdate.file_ops import FileHandler, LiveupdateFileOpArgs
from khosim.kernel.liveupdate.flb_ops import Flb, LiveupdateFlbOpArgs

if TYPE_CHECKING:
    from khosim.bugs.stage import Stage
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.memfd import Memfd

__all__ = (
    "LIVE",
    "Device",
    "DeviceHandler",
    "SharedTable",
    "boot",
    "fail_once",
    "guest",
    "sleeps",
)

LIVE = "kho=on liveupdate=on"
"""The command line of a kernel with live updates."""


def boot(stage: Stage, ram: str = "64M", **options: Any) -> Kernel:
    """A machine and its first kernel, with live updates on."""
    return stage.boot(ram, cmdline=LIVE, **options)


def guest(kernel: Kernel, text: bytes = b"guest memory", *, pages: int = 4) -> Memfd:
    """A memfd of a guest, ``text`` at the beginning of each page."""
    file = kernel.memfd("guest", size=pages << kernel.arch.page_shift)
    for page in range(pages):
        file.write(page << kernel.arch.page_shift, text)
    return file


def fail_once(kernel: Kernel, symbol: str, *, after: int = 0) -> None:
    """One allocation for ``symbol`` fails, the one behind the first ``after``."""
    left = [after + 1]

    def fail(_order: int, owner: str) -> bool:
        if owner != symbol:
            return False
        left[0] -= 1
        return left[0] == 0

    kernel.pages.fail = fail


def sleeps(stage: Stage, what: str, call: Callable[[], object]) -> bool:
    """Make a call that may have to wait for the jump; whether it does."""
    try:
        call()
    except KhoSimError as waits:
        if isinstance(waits, KernelError) or "sleeps for ever" not in str(waits):
            raise
        stage.tell(f"{what}: waits, and the jump comes first")
        return True
    stage.tell(f"{what}: done")
    return False


class Device(File):
    """An open device; ``is_busy`` makes it refuse the jump, ``is_frozen`` says that it stands."""

    __slots__ = ("is_busy", "is_frozen")

    def __init__(self, kernel: Kernel, name: str = "device", *, is_busy: bool = False) -> None:
        super().__init__(kernel, name)
        self.is_busy = is_busy
        self.is_frozen = False


class DeviceHandler(FileHandler):
    """Hands a :class:`Device` over: a preserved page for each."""

    compatible = "device-v1"

    def can_preserve(self, file: File) -> bool:
        """Only devices."""
        return isinstance(file, Device)

    def preserve(self, args: LiveupdateFileOpArgs) -> None:
        """A page for what the device knows."""
        page = args.kernel.kho_alloc_preserve(8)
        page.write(0, b"device", by="device_preserve")
        args.serialized_data, args.private_data = page.phys, page

    def unpreserve(self, args: LiveupdateFileOpArgs) -> None:
        """Give the page back."""
        args.kernel.kho_unpreserve_free(args.private_data)

    def freeze(self, args: LiveupdateFileOpArgs) -> None:
        """-EBUSY from a busy device."""
        assert isinstance(args.file, Device)
        if args.file.is_busy:
            raise KernelError(errno.EBUSY, "device_freeze", "requests are in flight")
        args.file.is_frozen = True

    def unfreeze(self, args: LiveupdateFileOpArgs) -> None:
        """The device goes on."""
        assert isinstance(args.file, Device)
        args.file.is_frozen = False

    def retrieve(self, args: LiveupdateFileOpArgs) -> None:
        """The device again."""
        args.kernel.kho_restore_free(args.serialized_data)
        args.file = Device(args.kernel)

    def finish(self, args: LiveupdateFileOpArgs) -> None:
        """Free the page where nobody wanted the device."""
        if not args.retrieve_status:
            args.kernel.kho_restore_free(args.serialized_data)


class SharedTable(Flb):
    """A table that devices share, in one preserved page."""

    compatible = "table-v1"

    def preserve(self, args: LiveupdateFlbOpArgs) -> None:
        """A page for it."""
        args.obj = args.kernel.kho_alloc_preserve(4096)
        args.obj.write(0, b"table", by="table_preserve")
        args.data = args.obj.phys

    def unpreserve(self, args: LiveupdateFlbOpArgs) -> None:
        """Give the page back."""
        args.kernel.kho_unpreserve_free(args.obj)

    def retrieve(self, args: LiveupdateFlbOpArgs) -> None:
        """The page again."""
        args.obj = args.kernel.kho_restore_folio(args.data)

    def finish(self, args: LiveupdateFlbOpArgs) -> None:
        """Nobody needs it any more."""
        args.obj.put()
