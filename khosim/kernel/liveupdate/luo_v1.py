"""``luo-v1``: LUO's state as a device tree with arrays of pages, in 6.19 to 7.1.

Models ``luo_fdt_setup`` and ``luo_early_startup`` (``kernel/liveupdate/luo_core.c``), the setup of
``luo_session.c``, ``luo_alloc_files_mem`` of ``luo_file.c`` and, from 7.0 on, the setup of
``luo_flb.c``, all @ 7.0. One array of 16 pages holds all sessions, one of two pages the files of a
session: 819 and 128 with 4 KiB pages, and there are no more.

The successor keeps the predecessor's tree reserved for ever, and undoes nothing where a session or
a file cannot be read. A tree without the node of FLBs was fine for 6.19 and is deadly from 7.0 on,
under the same name (cab056f2aae7).
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from khosim.abi import fdt
from khosim.abi.luo import (
    LUO_FDT_COMPATIBLE,
    LUO_FDT_FLB_COMPATIBLE,
    LUO_FDT_FLB_HEADER,
    LUO_FDT_FLB_NODE_NAME,
    LUO_FDT_LIVEUPDATE_NUM,
    LUO_FDT_SESSION_COMPATIBLE,
    LUO_FDT_SESSION_HEADER,
    LUO_FDT_SESSION_NODE_NAME,
    LUO_FILE_SER_BYTES,
    LUO_KHO_ENTRY_NAME,
    LUO_SESSION_SER_BYTES,
)
from khosim.errors import KernelError
from khosim.kernel.kho_in import FDT_MAX_BYTES
from khosim.kernel.liveupdate.luo_root import LuoRoot
from khosim.kernel.page import Folio

if TYPE_CHECKING:
    from khosim.abi.luo import LuoFileSetSer
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.kho_block import KhoBlockSet
    from khosim.kernel.liveupdate.luo_core import Luo

__all__ = ("LuoArraySet", "LuoArraySetIt", "LuoV1")

_SESSION_PGCNT = 16
_FILE_PGCNT = 2
_HEADER_BYTES = 8
_U64_LE = struct.Struct("<Q")


class LuoArraySet:
    """Entries in one block of pages: what a :class:`~khosim.kernel.kho_block.KhoBlockSet` became.

    ``header_bytes`` are at its beginning: the number of entries, where there is a header.
    """

    __slots__ = ("_kernel", "_pages", "count", "entry_size", "head_pa", "header_bytes", "incoming")

    def __init__(self, kernel: Kernel, entry_size: int, pages: int, header_bytes: int) -> None:
        self._kernel = kernel
        self._pages = pages
        self.entry_size = entry_size
        self.header_bytes = header_bytes
        self.head_pa = 0
        self.count = 0
        """Entries that the predecessor wrote."""
        self.incoming = False

    @property
    def capacity(self) -> int:
        """``LUO_SESSION_MAX`` or ``LUO_FILE_MAX``."""
        size = self._pages << self._kernel.arch.page_shift
        return (size - self.header_bytes) // self.entry_size

    @property
    def nblocks(self) -> int:
        """1 while there is memory, else 0."""
        return int(bool(self.head_pa))

    @property
    def blocks(self) -> list[int]:
        """The addresses of the pages."""
        page_size = self._kernel.arch.page_size
        return [self.head_pa + n * page_size for n in range(self._pages)] if self.head_pa else []

    def alloc(self) -> None:
        """Allocate and preserve the pages; raises the errors of ``kho_alloc_preserve``."""
        size = self._pages << self._kernel.arch.page_shift
        self.head_pa = self._kernel.kho_alloc_preserve(size).phys

    def grow(self, count: int) -> None:
        """Room for ``count`` entries: raises -ENOMEM for sessions and -ENOSPC for files beyond.

        The files' pages are allocated when the first one is preserved.
        """
        if count > self.capacity:
            number = errno.ENOMEM if self.header_bytes else errno.ENOSPC
            raise KernelError(number, "luo_session_insert", f"{self.capacity} are the most")
        if not self.head_pa and not self.header_bytes:
            self.alloc()

    def shrink(self, count: int) -> None:
        """``luo_free_files_mem``: without entries no memory, except for sessions."""
        if not count and not self.incoming and not self.header_bytes:
            self.destroy()

    def clear(self) -> None:
        """Zero all of it, as ``__luo_file_unfreeze`` does."""
        if self.head_pa:
            size = self._pages << self._kernel.arch.page_shift
            self._kernel.ram.zero(self.head_pa, size, self._kernel.by("luo_file_unfreeze"))

    def restore(self, head_pa: int) -> None:
        """Adopt the predecessor's array of sessions, whose header tells how many there are."""
        kernel = self._kernel
        self.incoming = True
        self.head_pa = kernel.virt(head_pa, _HEADER_BYTES)
        count = kernel.ram.read_u64(head_pa) & 0xFFFFFFFF
        self.count = count if count < 1 << 31 else 0  # the kernel's loop counts in an int

    def adopt(self, head_pa: int, count: int) -> None:
        """Adopt the predecessor's array of ``count`` files."""
        self.incoming = True
        self.head_pa, self.count = head_pa, count

    def destroy(self) -> None:
        """Free the pages."""
        kernel, phys = self._kernel, self.head_pa
        self.head_pa = 0
        if not phys:
            return
        if self.incoming:
            kernel.kho_restore_free(phys)
        else:
            order = (self._pages - 1).bit_length()
            kernel.kho_unpreserve_free(Folio(kernel, phys >> kernel.arch.page_shift, order))

    def iterate(self) -> LuoArraySetIt:
        """An iterator at the first entry."""
        return LuoArraySetIt(self, self._kernel)


class LuoArraySetIt:
    """A place in a :class:`LuoArraySet`; entries are physical addresses."""

    __slots__ = ("_kernel", "_set", "i")

    def __init__(self, array: LuoArraySet, kernel: Kernel) -> None:
        self._set = array
        self._kernel = kernel
        self.i = 0

    def _entry(self, i: int) -> int:
        return self._set.head_pa + self._set.header_bytes + i * self._set.entry_size

    def reserve_entry(self) -> int | None:
        """The next slot to write, None at the end."""
        if not self._set.head_pa or self.i == self._set.capacity:
            return None
        self.i += 1
        return self._entry(self.i - 1)

    def read_entry(self) -> int | None:
        """The next written entry, None behind the last; what the count says is believed."""
        if self.i == self._set.count:
            return None
        self.i += 1
        return self._kernel.virt(self._entry(self.i - 1), self._set.entry_size)

    def prev(self) -> int | None:
        """One entry back, None at the very beginning."""
        if not self.i:
            return None
        self.i -= 1
        return self._entry(self.i)


class LuoV1:
    """``luo-v1``, with FLBs or without as the kernel's release has them."""

    __slots__ = ("kernel",)

    compatible = LUO_FDT_COMPATIBLE
    undoes_torn_state = False

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    # -- from the predecessor -------------------------------------------------------------------

    def retrieve(self, phys: int, size_bytes: int) -> LuoRoot:
        """The state in the subtree's device tree; raises -EINVAL, or -ENOENT without FLBs."""
        kernel = self.kernel
        tree = kernel.fdt_at(phys)[:FDT_MAX_BYTES]
        error = fdt.fdt_node_check_compatible(tree, 0, LUO_FDT_COMPATIBLE)
        if error:
            kernel.printk(
                f"luo: FDT '{LUO_KHO_ENTRY_NAME}' is incompatible with "
                f"'{LUO_FDT_COMPATIBLE}' [{error}]"
            )
            raise KernelError(errno.EINVAL, "luo_early_startup", "not luo-v1")
        number, length = self._u64(tree, 0, LUO_FDT_LIVEUPDATE_NUM)
        if number is None:
            kernel.printk(
                f"luo: Unable to get live update number '{LUO_FDT_LIVEUPDATE_NUM}' [{length}]"
            )
            raise KernelError(errno.EINVAL, "luo_early_startup", "no live update number")
        sessions_pa = self._node(
            tree,
            LUO_FDT_SESSION_NODE_NAME,
            LUO_FDT_SESSION_COMPATIBLE,
            LUO_FDT_SESSION_HEADER,
            "session",
            errno.EINVAL,
        )
        flbs_pa = 0
        is_there = fdt.fdt_subnode_offset(tree, 0, LUO_FDT_FLB_NODE_NAME) >= 0
        if kernel.release.luo_flb and (is_there or kernel.release.luo_flb_insisted):
            flbs_pa = self._node(
                tree,
                LUO_FDT_FLB_NODE_NAME,
                LUO_FDT_FLB_COMPATIBLE,
                LUO_FDT_FLB_HEADER,
                "FLB",
                errno.ENOENT,
            )
        return LuoRoot(number, sessions_pa, flbs_pa)

    def _u64(self, tree: memoryview, node: int, name: str) -> tuple[int | None, int]:
        value, length = fdt.fdt_getprop(tree, node, name)
        if value is None or length != 8:
            return None, length
        return int(_U64_LE.unpack(value)[0]), length

    def _node(
        self, tree: memoryview, name: str, compatible: str, prop: str, what: str, missing: int
    ) -> int:
        # luo_session_setup_incoming and luo_flb_setup_incoming: where the node's array is.
        printk = self.kernel.printk
        symbol = f"luo_{what.lower()}_setup_incoming"
        node = fdt.fdt_subnode_offset(tree, 0, name)
        if node < 0:
            word = what if what == "FLB" else "session"
            colon = "" if what == "FLB" else ":"
            printk(f"luo: Unable to get {word} node{colon} [{name}]")
            raise KernelError(missing, symbol, f"no node {name!r}")
        error = fdt.fdt_node_check_compatible(tree, node, compatible)
        if error:
            text = f"FLB node is incompatible with '{compatible}' [{error}]"
            printk(f"luo: {text if what == 'FLB' else f'Session node incompatible [{compatible}]'}")
            raise KernelError(errno.EINVAL, symbol, f"node {name!r}")
        phys, length = self._u64(tree, node, prop)
        if phys is None:
            word = "property " if what == "FLB" else ""
            printk(f"luo: Unable to get {what} header {word}'{prop}' [{length}]")
            raise KernelError(errno.EINVAL, symbol, f"node {name!r} has no {prop!r}")
        return phys

    def release(self, phys: int) -> None:
        """Nobody ever gives the predecessor's tree back."""

    # -- for the successor ----------------------------------------------------------------------

    def state_setup(self, luo: Luo) -> int:
        """``luo_fdt_setup``: the tree, with the arrays it leads to; its physical address.

        Raises the errors of ``kho_alloc_preserve`` and ``kho_add_subtree``; the arrays then stay
        behind, preserved.
        """
        kernel = self.kernel
        page_size = kernel.arch.page_size
        try:
            folio = kernel.kho_alloc_preserve(page_size)
        except KernelError:
            kernel.printk("luo: failed to allocate/preserve FDT memory")
            raise
        number = luo.liveupdate_num + 1 & (1 << 64) - 1
        try:
            sessions = luo.sessions.outgoing.block_set
            assert isinstance(sessions, LuoArraySet)
            buf = kernel.ram.writable_mv(folio.phys, page_size, kernel.by("luo_fdt_setup"))
            error = fdt.fdt_create(buf, page_size)
            error |= fdt.fdt_finish_reservemap(buf)
            error |= fdt.fdt_begin_node(buf, "")
            error |= fdt.fdt_property_string(buf, "compatible", LUO_FDT_COMPATIBLE)
            error |= fdt.fdt_property(buf, LUO_FDT_LIVEUPDATE_NUM, _U64_LE.pack(number))
            sessions.alloc()
            error |= _write_node(
                buf,
                LUO_FDT_SESSION_NODE_NAME,
                LUO_FDT_SESSION_COMPATIBLE,
                LUO_FDT_SESSION_HEADER,
                sessions.head_pa,
            )
            luo.sessions.outgoing.active = True
            if kernel.release.luo_flb:
                error |= _write_node(
                    buf,
                    LUO_FDT_FLB_NODE_NAME,
                    LUO_FDT_FLB_COMPATIBLE,
                    LUO_FDT_FLB_HEADER,
                    luo.flb.setup_outgoing(),
                )
            error |= fdt.fdt_end_node(buf)
            error |= fdt.fdt_finish(buf)
            if error:
                raise KernelError(-error, "luo_fdt_setup", "the device tree")
            kernel.kho_add_subtree(LUO_KHO_ENTRY_NAME, folio.phys, fdt.fdt_totalsize(buf))
        except KernelError as refused:
            kernel.kho_unpreserve_free(folio)
            kernel.printk(f"luo: failed to prepare LUO FDT: {-refused.errno}")
            raise
        return folio.phys

    def publish_sessions(self, luo: Luo, sessions_pa: int) -> None:
        """Write how many sessions there are into the array's header."""
        header = luo.sessions.outgoing
        if sessions_pa or not header.count:
            kernel = self.kernel
            by = kernel.by("luo_session_serialize")
            kernel.ram.write_u64(header.block_set.head_pa, header.count, by)

    def session_set(self) -> LuoArraySet:
        """An array for ``struct luo_session_ser``."""
        return LuoArraySet(self.kernel, LUO_SESSION_SER_BYTES, _SESSION_PGCNT, _HEADER_BYTES)

    def file_set(self) -> LuoArraySet:
        """An array for ``struct luo_file_ser``."""
        return LuoArraySet(self.kernel, LUO_FILE_SER_BYTES, _FILE_PGCNT, 0)

    def restore_files(self, files: KhoBlockSet | LuoArraySet, ser: LuoFileSetSer) -> None:
        """Adopt the predecessor's files of a session."""
        assert isinstance(files, LuoArraySet)
        files.adopt(ser.files, ser.count)


def _write_node(buf: memoryview, name: str, compatible: str, prop: str, phys: int) -> int:
    error = fdt.fdt_begin_node(buf, name)
    error |= fdt.fdt_property_string(buf, "compatible", compatible)
    error |= fdt.fdt_property(buf, prop, _U64_LE.pack(phys))
    return error | fdt.fdt_end_node(buf)
