"""How LUO's state is laid out for the successor: one class for each format.

:class:`~khosim.kernel.liveupdate.luo_v1.LuoV1` is ``luo-v1`` of 6.19 to 7.1. :class:`LuoV5` is
``luo-v5`` of 7.2 and 7.3 (``include/linux/kho/abi/luo.h``): one ``struct
luo_ser``, and sessions and files in KHO blocks. The orchestrator asks its release for the name of
the format and leaves to it what depends on it:

* ``retrieve`` reads and judges the predecessor's root, ``release`` gives its memory back;
* ``state_setup`` makes the root for the successor, ``publish_sessions`` enters the sessions;
* ``session_set`` and ``file_set`` make the sets that the entries of sessions and files are written
  to and read from: objects with the methods of :class:`~khosim.kernel.kho_block.KhoBlockSet`.

What an entry looks like (``struct luo_session_ser``, ``struct luo_file_ser``, FLBs) is the same in
all releases and stands in :mod:`khosim.abi.luo`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, TypeAlias

from khosim.abi.luo import (
    LUO_ABI_COMPATIBLE,
    LUO_FILE_SER_BYTES,
    LUO_KHO_ENTRY_NAME,
    LUO_SER_BYTES,
    LUO_SESSION_SER_BYTES,
    LuoSer,
    pack_luo_ser,
    unpack_luo_ser,
)
from khosim.errors import KernelError
from khosim.kernel.kho_block import KhoBlockSet
from khosim.kernel.liveupdate.luo_root import LuoRoot
from khosim.kernel.liveupdate.luo_v1 import LuoArraySet, LuoV1

if TYPE_CHECKING:
    from khosim.abi.luo import LuoFileSetSer
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.liveupdate.luo_core import Luo

__all__ = ("FORMATS", "EntrySet", "LuoFormat", "LuoV5")

_SESSIONS_PA_OFFSET = 16
EntrySet: TypeAlias = KhoBlockSet | LuoArraySet
"""Where sessions or files are written to and read from."""


class LuoV5:
    """``luo-v5``."""

    __slots__ = ("kernel",)

    compatible = LUO_ABI_COMPATIBLE
    undoes_torn_state = True
    """Sessions and files that cannot be read are given up with their blocks."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def retrieve(self, phys: int, size_bytes: int) -> LuoRoot:
        """The root in the subtree's blob; raises -EINVAL for one that is too small or not v5."""
        kernel = self.kernel
        symbol = "luo_early_startup"
        if size_bytes < LUO_SER_BYTES:
            kernel.printk(f"luo: LUO state is too small ({size_bytes} < {LUO_SER_BYTES})")
            raise KernelError(errno.EINVAL, symbol, f"{size_bytes} bytes")
        ser = unpack_luo_ser(kernel.ram.read(kernel.virt(phys, LUO_SER_BYTES), LUO_SER_BYTES))
        if ser.compatible != self.compatible:
            kernel.printk(f"luo: LUO state is incompatible with '{self.compatible}'")
            raise KernelError(errno.EINVAL, symbol, f"compatible {ser.compatible!r}")
        return LuoRoot(ser.liveupdate_num, ser.sessions_pa, ser.flbs_pa)

    def release(self, phys: int) -> None:
        """The predecessor's root is read: its page goes to the allocator."""
        self.kernel.kho_restore_free(phys)

    def state_setup(self, luo: Luo) -> int:
        """``luo_state_setup``: the root for the successor, in KHO's tree; its physical address.

        Raises the errors of ``kho_alloc_preserve`` and ``kho_add_subtree``. In the latter case the
        page of FLBs stays behind, preserved.
        """
        kernel = self.kernel
        try:
            folio = kernel.kho_alloc_preserve(LUO_SER_BYTES)
        except KernelError:
            kernel.printk("luo: failed to allocate/preserve LUO state memory")
            raise
        by = kernel.by("luo_state_setup")
        number = luo.liveupdate_num + 1 & (1 << 64) - 1
        try:
            kernel.ram.write(folio.phys, pack_luo_ser(LuoSer(self.compatible, number, 0, 0)), by)
            luo.sessions.outgoing.active = True
            flbs_pa = luo.flb.setup_outgoing()
            ser = LuoSer(self.compatible, number, 0, flbs_pa)
            kernel.ram.write(folio.phys, pack_luo_ser(ser), by)
            kernel.kho_add_subtree(LUO_KHO_ENTRY_NAME, folio.phys, LUO_SER_BYTES)
        except KernelError as refused:
            kernel.kho_unpreserve_free(folio)
            kernel.printk(f"luo: failed to prepare LUO state: {-refused.errno}")
            raise
        return folio.phys

    def publish_sessions(self, luo: Luo, sessions_pa: int) -> None:
        """Enter the sessions' first block into the root, 0 for none."""
        kernel = self.kernel
        by = kernel.by("luo_session_serialize")
        kernel.ram.write_u64(luo.luo_ser_out + _SESSIONS_PA_OFFSET, sessions_pa, by)

    def session_set(self) -> KhoBlockSet:
        """An empty set for ``struct luo_session_ser``."""
        return KhoBlockSet(self.kernel, LUO_SESSION_SER_BYTES)

    def file_set(self) -> KhoBlockSet:
        """An empty set for ``struct luo_file_ser``."""
        return KhoBlockSet(self.kernel, LUO_FILE_SER_BYTES)

    def restore_files(self, files: KhoBlockSet | LuoArraySet, ser: LuoFileSetSer) -> None:
        """Adopt the predecessor's files of a session; raises what their blocks are refused with."""
        files.restore(ser.files)


FORMATS: dict[str, type[LuoV5] | type[LuoV1]] = {
    LuoV5.compatible: LuoV5,
    LuoV1.compatible: LuoV1,
}
"""By the name that :attr:`khosim.kernel.release.Release.luo` gives."""
LuoFormat: TypeAlias = LuoV5 | LuoV1
