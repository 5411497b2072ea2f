"""Shared state that lives as long as files need it (FLB): the interface of its owners.

Models ``include/linux/liveupdate.h``: ``struct liveupdate_flb_op_args``, ``struct
liveupdate_flb_ops`` and ``struct liveupdate_flb`` @ 7.3. The state that the kernel keeps inside of
``struct liveupdate_flb`` is kept by each kernel's orchestrator instead
(:mod:`khosim.kernel.liveupdate.luo_flb`), so one object serves one kernel after another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from khosim.abi.luo import LIVEUPDATE_FLB_COMPAT_LENGTH
from khosim.errors import InputError

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.module import Module

__all__ = ("Flb", "LiveupdateFlbOpArgs", "LiveupdateFlbOps")


class LiveupdateFlbOpArgs:
    """``struct liveupdate_flb_op_args``: what a callback is handed, and what it hands back.

    ==========  ========  ==========  ========  ======
    field       preserve  unpreserve  retrieve  finish
    ==========  ========  ==========  ========  ======
    ``flb``     in        in          in        in
    ``data``    out       in          in        0
    ``obj``     out       in          out       in
    ==========  ========  ==========  ========  ======

    ``data`` is a u64 that reaches the successor; ``obj`` is anything, and stays in this kernel.
    """

    __slots__ = ("data", "flb", "kernel", "obj")

    def __init__(self, kernel: Kernel, flb: Flb, *, data: int = 0, obj: Any = None) -> None:
        self.kernel = kernel
        self.flb = flb
        self.data = data
        self.obj = obj


Op = Callable[[LiveupdateFlbOpArgs], None]


class LiveupdateFlbOps:
    """``struct liveupdate_flb_ops``: the callbacks, all of them required.

    ``preserve`` and ``retrieve`` refuse by raising :class:`~khosim.errors.KernelError`.

    * ``preserve(args)``: the first file that needs the object is preserved.
    * ``unpreserve(args)``: the last such file was unpreserved; the update was called off.
    * ``retrieve(args)``: in the successor, when somebody asks for the object, or at the latest when
      it is finished. Called at most once, whatever comes of it.
    * ``finish(args)``: the last file that needed the object is finished.
    """

    __slots__ = ("finish", "owner", "preserve", "retrieve", "unpreserve")

    def __init__(
        self,
        *,
        preserve: Op | None = None,
        unpreserve: Op | None = None,
        retrieve: Op | None = None,
        finish: Op | None = None,
        owner: Module | None = None,
    ) -> None:
        self.preserve = preserve
        self.unpreserve = unpreserve
        self.retrieve = retrieve
        self.finish = finish
        self.owner = owner

    def missing(self) -> list[str]:
        """The callbacks that are not there: reason to refuse the object (-EINVAL)."""
        required = ("preserve", "unpreserve", "retrieve", "finish")
        return [name for name in required if getattr(self, name) is None]


class Flb:
    """``struct liveupdate_flb``: a shared object, known to both kernels by one name.

    Derive from it, set ``compatible`` and write the four methods, or build one of plain functions:
    ``Flb("pci-v1", ops)``. ``owner`` is the module that it belongs to, if any.

    Raises :class:`InputError` for a name that does not fit into 48 bytes with its NUL.
    """

    compatible: str = ""
    owner: Module | None = None

    def __init__(self, compatible: str = "", ops: LiveupdateFlbOps | None = None) -> None:
        if compatible:
            self.compatible = compatible
        name = self.compatible.encode()
        if not 0 < len(name) < LIVEUPDATE_FLB_COMPAT_LENGTH or b"\0" in name:
            raise InputError(
                f"FLB {type(self).__name__}: compatible",
                f"{self.compatible!r} is not 1 to {LIVEUPDATE_FLB_COMPAT_LENGTH - 1} bytes",
            )
        if ops is None:
            names = ("preserve", "unpreserve", "retrieve", "finish")
            found = {name: getattr(self, name, None) for name in names}
            ops = LiveupdateFlbOps(**found, owner=self.owner)
        self.ops = ops

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.compatible!r})"
