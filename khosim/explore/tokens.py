"""A kind of file that LUO can preserve, and what its files share: for programs of the search.

:class:`Token` is a file of 8 bytes, :class:`Ledger` the shared state that tokens may need; both
keep to the rules of ``include/linux/liveupdate.h`` @ 7.3.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING

from khosim.errors import KernelError
from khosim.kernel.file import File
from khosim.kernel.liveupdate.file_ops import FileHandler, LiveupdateFileOpArgs
from khosim.kernel.liveupdate.flb_ops import Flb, LiveupdateFlbOpArgs
from khosim.kernel.module import Module

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = (
    "Ledger",
    "Token",
    "TokenHandler",
    "late_ledger",
    "ledger",
    "reload",
    "second_ledger",
    "tokens",
)

_BUSY = 1 << 63
"""In a token's page: its handler says once that it cannot be finished yet."""
_LOST = 1 << 62
"""In a token's page: it cannot be made again."""


class Token(File):
    """A file of 8 bytes. ``refuses`` names the callback that says -EBUSY, if any."""

    __slots__ = ("refuses", "value")

    def __init__(self, kernel: Kernel, value: int = 0, refuses: str = "") -> None:
        super().__init__(kernel, "token")
        self.value = value
        self.refuses = refuses


class TokenHandler(FileHandler):
    """Preserves tokens: a page each."""

    compatible = "token-v1"

    def can_preserve(self, file: File) -> bool:
        """Tokens only."""
        return isinstance(file, Token)

    def __init__(self, module: Module | None = None) -> None:
        self.owner = module
        super().__init__()
        self.was_busy = False

    def preserve(self, args: LiveupdateFileOpArgs) -> None:
        """Take a page and write the value."""
        file = args.file
        assert isinstance(file, Token)
        if file.refuses == "preserve":
            raise KernelError(errno.EBUSY, "token_preserve")
        page = args.kernel.kho_alloc_preserve(8)
        flag = {"finish": _BUSY, "retrieve": _LOST}.get(file.refuses, 0)
        page.write(0, (file.value | flag).to_bytes(8, "little"))
        args.serialized_data = page.phys
        args.private_data = page

    def freeze(self, args: LiveupdateFileOpArgs) -> None:
        """Refuse, if so told."""
        if isinstance(args.file, Token) and args.file.refuses == "freeze":
            raise KernelError(errno.EBUSY, "token_freeze")

    def unpreserve(self, args: LiveupdateFileOpArgs) -> None:
        """Give the page back."""
        args.kernel.kho_unpreserve_free(args.private_data)

    def retrieve(self, args: LiveupdateFileOpArgs) -> None:
        """Make the token again, or free its page and say -EIO."""
        value = args.kernel.ram.read_u64(args.serialized_data)
        args.kernel.kho_restore_free(args.serialized_data)
        if value & _LOST:
            raise KernelError(errno.EIO, "token_retrieve")
        args.file = Token(args.kernel, value & ~_BUSY, "finish" if value & _BUSY else "")

    def can_finish(self, args: LiveupdateFileOpArgs) -> bool:
        """Not yet, at the first time that a token is asked which is busy."""
        if self.was_busy:
            return True
        if args.retrieve_status > 0:
            assert isinstance(args.file, Token)
            self.was_busy = args.file.refuses == "finish"
        elif not args.retrieve_status:
            self.was_busy = bool(args.kernel.ram.read_u64(args.serialized_data) & _BUSY)
        return not self.was_busy

    def finish(self, args: LiveupdateFileOpArgs) -> None:
        """Free the page of a token that nobody wanted."""
        if not args.retrieve_status:
            args.kernel.kho_restore_free(args.serialized_data)


class Ledger(Flb):
    """What all tokens share: a page. ``is_open`` while this kernel holds it.

    ``refuses`` is "retrieve" for one that finds its page wanting, and frees it.
    """

    compatible = "ledger-v1"

    def __init__(self, refuses: str = "", handler: TokenHandler | None = None) -> None:
        self.owner = handler.owner if handler else None
        super().__init__()
        self.handler = handler
        self.is_open = False
        self.refuses = refuses

    def preserve(self, args: LiveupdateFlbOpArgs) -> None:
        """Take the page."""
        args.obj = args.kernel.kho_alloc_preserve(8)
        args.data = args.obj.phys

    def unpreserve(self, args: LiveupdateFlbOpArgs) -> None:
        """Give it back."""
        args.kernel.kho_unpreserve_free(args.obj)

    def retrieve(self, args: LiveupdateFlbOpArgs) -> None:
        """Take it over, or free it and say -EIO."""
        page = args.kernel.kho_restore_folio(args.data)
        if page is None:
            raise KernelError(errno.EIO, "ledger_retrieve", "there is no such page")
        if self.refuses == "retrieve":
            page.put()
            raise KernelError(errno.EIO, "ledger_retrieve")
        args.obj = page
        self.is_open = True

    def finish(self, args: LiveupdateFlbOpArgs) -> None:
        """Free the predecessor's, unless a task died while it looked for it."""
        if args.obj is not None:
            args.obj.put()
        self.is_open = False


def tokens(kernel: Kernel) -> TokenHandler:
    """Register tokens without a ledger, as a module does; returns their handler."""
    handler = TokenHandler(Module("tokens"))
    kernel.liveupdate.register_file_handler(handler)
    return handler


def late_ledger(kernel: Kernel, handler: TokenHandler) -> Ledger:
    """Register a ledger for tokens that had none; returns it. Raises what is raised then."""
    flb = Ledger("", handler)
    kernel.liveupdate.register_flb(handler, flb)
    return flb


def ledger(kernel: Kernel, refuses: str = "") -> Ledger:
    """Register tokens and their ledger with a kernel's orchestrator; returns the ledger."""
    handler = tokens(kernel)
    flb = Ledger(refuses, handler)
    kernel.liveupdate.register_flb(handler, flb)
    return flb


def reload(kernel: Kernel, flb: Ledger) -> Ledger:
    """``rmmod`` and ``modprobe`` of the module with tokens and ledger; returns the new ledger.

    As the kernel's own test does, the module looks for its ledger as soon as it is there. Raises
    -EAGAIN (``EWOULDBLOCK``) while somebody uses the old one.
    """
    handler = flb.handler
    assert handler is not None
    assert handler.owner is not None
    if handler.owner.refcnt:
        raise KernelError(errno.EAGAIN, "delete_module", f"{handler.owner!r} is in use")
    handler.owner.live = False
    kernel.liveupdate.unregister_file_handler(handler)
    new = ledger(kernel, flb.refuses)
    with suppress(KernelError):  # -ENODATA, -ENOENT: there is none, or not any more
        kernel.liveupdate.flb_get_incoming(new)
        kernel.liveupdate.flb_put_incoming(new)
    return new


def second_ledger(kernel: Kernel) -> None:
    """Another driver for tokens: its handler is refused, and it registers its ledger all the same.

    Raises -EINVAL: "arguments are NULL or not initialized".
    """
    handler = TokenHandler(Module("others"))
    with suppress(KernelError):  # -EEXIST
        kernel.liveupdate.register_file_handler(handler)
    kernel.liveupdate.register_flb(handler, Ledger("", handler))
