"""How a kind of file takes part in a live update: the interface of file handlers.

Models ``include/linux/liveupdate.h``: ``struct liveupdate_file_op_args``, ``struct
liveupdate_file_ops`` and ``struct liveupdate_file_handler`` @ 7.3. The orchestrator calls these;
what they may rely on is written at :class:`LiveupdateFileOps`. Left out: the lists that a handler
is linked into, for each kernel's orchestrator keeps its own.

A handler of your own is a class with a name and five methods; the others it may have::

    class CounterHandler(FileHandler):
        compatible = "counter-v1"

        def can_preserve(self, file):
            return isinstance(file, CounterFile)

        def preserve(self, args):
            page = args.kernel.kho_alloc_preserve(8)
            page.write(0, args.file.value.to_bytes(8, "little"))
            args.serialized_data = page.phys
            args.private_data = page

        def unpreserve(self, args):
            args.kernel.kho_unpreserve_free(args.private_data)

        def retrieve(self, args):
            value = args.kernel.ram.read_u64(args.serialized_data)
            args.file = CounterFile(args.kernel, value)
            args.kernel.kho_restore_free(args.serialized_data)

        def finish(self, args):
            if not args.retrieve_status:
                args.kernel.kho_restore_free(args.serialized_data)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from khosim.abi.luo import LIVEUPDATE_HNDL_COMPAT_LENGTH
from khosim.errors import InputError, KernelError

if TYPE_CHECKING:
    from khosim.kernel.file import File
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.module import Module

__all__ = ("FileHandler", "LiveupdateFileOpArgs", "LiveupdateFileOps", "call_op")


class LiveupdateFileOpArgs:
    """``struct liveupdate_file_op_args``: what a callback is handed, and what it hands back.

    The orchestrator makes a new one for every call; what a callback stores here is kept only where
    the table says "out".

    ====================  ========  ==========  ======  ========  ========  ==========  ======
    field                 preserve  unpreserve  freeze  unfreeze  retrieve  can_finish  finish
    ====================  ========  ==========  ======  ========  ========  ==========  ======
    ``handler``           in        in          in      in        in        in          in
    ``file``              in        in          in      in        out       in [1]_     in [1]_
    ``serialized_data``   out       in          in out  in        in        in          in
    ``private_data``      out       in          in      in        None      None        None
    ``retrieve_status``   0         0           0       0         0         in          in
    ====================  ========  ==========  ======  ========  ========  ==========  ======

    .. [1] None unless the file was retrieved.

    ``serialized_data`` is a u64 that reaches the successor, most often a physical address.
    ``private_data`` is anything, and stays in this kernel. ``retrieve_status`` is 0 when nobody
    tried to retrieve the file, positive when it worked, else the negative errno of the attempt.
    """

    __slots__ = (
        "file",
        "handler",
        "kernel",
        "private_data",
        "retrieve_status",
        "serialized_data",
    )

    def __init__(
        self,
        kernel: Kernel,
        handler: FileHandler,
        *,
        file: File | None = None,
        serialized_data: int = 0,
        private_data: Any = None,
        retrieve_status: int = 0,
    ) -> None:
        self.kernel = kernel
        """The kernel that calls: a handler's way to memory and to KHO."""
        self.handler = handler
        self.file = file
        self.serialized_data = serialized_data
        self.private_data = private_data
        self.retrieve_status = retrieve_status


Op = Callable[[LiveupdateFileOpArgs], None]


class LiveupdateFileOps:
    """``struct liveupdate_file_ops``: a handler's callbacks, None for those it does not have.

    A callback refuses by raising :class:`~khosim.errors.KernelError`, where the kernel's would
    return a negative errno, and has undone what it did by then. ``unpreserve``, ``unfreeze`` and
    ``finish`` cannot refuse. In the order of a file's life:

    * ``can_preserve(file)``, required: whether this is a file for this handler. Quick, no effects;
      the first registered handler that says yes gets the file.
    * ``get_id(file)``, optional: a number that is equal for two open files that must not be
      preserved both (the default is the open file itself). Asked before ``preserve`` and again at
      the end, and in the successor after ``retrieve``: it must not change in between.
    * ``preserve(args)``, required: save what there is to save into preserved memory. The file
      stays in use, perhaps for long; what may still change can be brought up to date in
      ``freeze``.
    * ``unpreserve(args)``, required: undo ``preserve``; the update was called off.
    * ``freeze(args)``, optional: user space has stopped, the jump is next: the last change to what
      was saved, and to ``serialized_data``.
    * ``unfreeze(args)``, optional: undo ``freeze``; another file refused, user space goes on. Not
      called for the file whose own ``freeze`` refused.
    * ``retrieve(args)``, required: in the successor, make a file from ``serialized_data`` and store
      it in ``args.file`` with one reference. Called at most once, whatever comes of it: on a
      refusal it must have cleaned up all that it can, for ``finish`` gets no second chance.
    * ``can_finish(args)``, optional: False while the file still needs what was handed over. Asked
      for all files of a session before any of them is finished.
    * ``finish(args)``, required: the session is done with the file. After a ``retrieve`` there is
      most often nothing left to do; without one (``retrieve_status`` 0) all that was handed over
      has to be given back here.
    """

    __slots__ = (
        "can_finish",
        "can_preserve",
        "finish",
        "freeze",
        "get_id",
        "owner",
        "preserve",
        "retrieve",
        "unfreeze",
        "unpreserve",
    )

    def __init__(
        self,
        *,
        can_preserve: Callable[[File], bool] | None = None,
        preserve: Op | None = None,
        unpreserve: Op | None = None,
        freeze: Op | None = None,
        unfreeze: Op | None = None,
        retrieve: Op | None = None,
        can_finish: Callable[[LiveupdateFileOpArgs], bool] | None = None,
        finish: Op | None = None,
        get_id: Callable[[File], int] | None = None,
        owner: Module | None = None,
    ) -> None:
        self.can_preserve = can_preserve
        self.preserve = preserve
        self.unpreserve = unpreserve
        self.freeze = freeze
        self.unfreeze = unfreeze
        self.retrieve = retrieve
        self.can_finish = can_finish
        self.finish = finish
        self.get_id = get_id
        self.owner = owner

    def missing(self) -> list[str]:
        """The required callbacks that are not there: reason to refuse the handler (-EINVAL)."""
        required = ("preserve", "unpreserve", "retrieve", "finish", "can_preserve")
        return [name for name in required if getattr(self, name) is None]


_METHODS = (
    "can_finish",
    "can_preserve",
    "finish",
    "freeze",
    "get_id",
    "preserve",
    "retrieve",
    "unfreeze",
    "unpreserve",
)


class FileHandler:
    """``struct liveupdate_file_handler``: a kind of file, known to both kernels by one name.

    Derive from it, set ``compatible`` and write the methods: ``ops`` is made of those that the
    class has. A handler serves one kernel after another as well as several at once, so it keeps
    nothing of a kernel in itself. Or build one of plain functions:
    ``FileHandler("counter-v1", ops)``.

    Raises :class:`InputError` for a name that does not fit into 48 bytes with its NUL.
    """

    compatible: str = ""
    """Up to 47 bytes, such as ``"memfd-v2"``. Count it up when the handed-over layout changes."""
    owner: Module | None = None
    """The module that the handler belongs to; None for what is built in."""

    def __init__(self, compatible: str = "", ops: LiveupdateFileOps | None = None) -> None:
        if compatible:
            self.compatible = compatible
        name = self.compatible.encode()
        if not 0 < len(name) < LIVEUPDATE_HNDL_COMPAT_LENGTH or b"\0" in name:
            raise InputError(
                f"file handler {type(self).__name__}: compatible",
                f"{self.compatible!r} is not 1 to {LIVEUPDATE_HNDL_COMPAT_LENGTH - 1} bytes",
            )
        if ops is None:
            found = {name: getattr(self, name, None) for name in _METHODS}
            ops = LiveupdateFileOps(**found, owner=self.owner)
        self.ops = ops

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.compatible!r})"


def call_op(op: Op, args: LiveupdateFileOpArgs) -> int:
    """Call a callback that may refuse: 0, or the negative errno it raised."""
    try:
        op(args)
    except KernelError as refused:
        return -refused.errno
    return 0
