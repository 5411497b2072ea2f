"""Files of a session: preserved by the old kernel, retrieved and finished by the new one.

Models ``kernel/liveupdate/luo_file.c`` @ 7.3 in the kernel's order of operations. Refusals raise
:class:`~khosim.errors.KernelError`; what a handler raises is passed on. Left out: locks.

Worth knowing: a file that was retrieved is an owned file again (nobody can preserve it before its
session is finished); a ``retrieve`` is never tried twice; a count that does not fit or an unknown
handler costs the whole session, and its folios stay reserved until the next kexec.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from khosim.abi.luo import (
    LUO_FILE_SER_BYTES,
    LuoFileSer,
    LuoFileSetSer,
    pack_luo_file_ser,
    unpack_luo_file_ser,
)
from khosim.errors import KernelError, KernelPanic
from khosim.kernel.liveupdate.file_ops import LiveupdateFileOpArgs
from khosim.kernel.module import module_put, try_module_get
from khosim.kernel.slab import kmalloc

if TYPE_CHECKING:
    from khosim.kernel.file import File
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.liveupdate.file_ops import FileHandler
    from khosim.kernel.liveupdate.luo_core import Luo

__all__ = ("LuoFile", "LuoFileSet")

_PAGE_OFFSET = 0xFFFF888000000000
"""Where x86-64 maps physical address 0, without KASLR."""
_STRING_CHUNK = 64


def _c_string(kernel: Kernel, phys: int) -> str:
    # What printk's %s reads: up to a NUL, wherever that is.
    found = bytearray()
    while b"\0" not in found:
        at = kernel.virt(phys + len(found), _STRING_CHUNK)
        found += kernel.ram.read(at, _STRING_CHUNK)
    return found.split(b"\0", 1)[0].decode("latin-1")


class LuoFile:
    """``struct luo_file``: one file in a session.

    ``file`` is None in the successor until it is retrieved; ``retrieve_status`` is 0 before the
    attempt, 1 after a success, else the negative errno.
    """

    __slots__ = ("file", "handler", "private_data", "retrieve_status", "serialized_data", "token")

    def __init__(self, handler: FileHandler, token: int, *, file: File | None = None) -> None:
        self.handler = handler
        self.token = token
        self.file = file
        self.serialized_data = 0
        self.private_data: Any = None
        self.retrieve_status = 0

    def __repr__(self) -> str:
        return f"LuoFile({self.handler.compatible!r}, token={self.token:#x})"


class LuoFileSet:
    """``struct luo_file_set``: the files of one session in the order of their preservation.

    ``block_set`` is where they are written to for the successor, or were read from.
    """

    __slots__ = ("_by_token", "_luo", "block_set", "files")

    def __init__(self, luo: Luo) -> None:
        self._luo = luo
        self.files: list[LuoFile] = []
        self._by_token: dict[int, LuoFile] = {}
        self.block_set = luo.format.file_set()

    @property
    def count(self) -> int:
        """How many files there are."""
        return len(self.files)

    def _append(self, luo_file: LuoFile) -> None:
        self.files.append(luo_file)
        self._by_token.setdefault(luo_file.token, luo_file)

    def _pop(self) -> None:
        luo_file = self.files.pop()
        if self._by_token.get(luo_file.token) is luo_file:
            del self._by_token[luo_file.token]

    def _args(self, luo_file: LuoFile) -> LiveupdateFileOpArgs:
        return LiveupdateFileOpArgs(
            self._luo.kernel,
            luo_file.handler,
            file=luo_file.file,
            serialized_data=luo_file.serialized_data,
            private_data=luo_file.private_data,
        )

    # -- in the old kernel ----------------------------------------------------------------------

    def preserve(self, token: int, file: File | None) -> None:
        """``luo_preserve_file``: ``file`` (None for a descriptor that is not open) becomes ours.

        Raises -EEXIST for a token in use, -ENOSPC or -ENOMEM without room to write it down,
        -EBADF, -ENOENT where no handler wants the file, -EBUSY where it is owned, -ENOMEM, and what
        ``preserve`` of FLBs and handler raise. A refusal leaves nothing.
        """
        kernel = self._luo.kernel
        error = 0
        try:
            self._preserve(token, file)
        except KernelError as refused:
            error = -refused.errno
            raise
        finally:
            if kernel.trace is not None:
                args: dict[str, Any] = {"token": token}
                if self.files and not error:
                    args["compatible"] = self.files[-1].handler.compatible
                kernel.emit("luo_preserve_file", args, error)

    def _preserve(self, token: int, file: File | None) -> None:
        symbol = "luo_preserve_file"
        if token in self._by_token:
            raise KernelError(errno.EEXIST, symbol, f"token {token:#x} is used")
        self.block_set.grow(self.count + 1)
        try:
            if file is None:
                raise KernelError(errno.EBADF, symbol, "no such file descriptor")
            file.get_file()
            try:
                self._preserve_file(token, file)
            except KernelError:
                file.fput()
                raise
        except KernelError:
            self.block_set.shrink(self.count)
            raise

    def _preserve_file(self, token: int, file: File) -> None:
        luo = self._luo
        symbol = "luo_preserve_file"
        handler = luo.handler_of(file)
        if handler is None:
            raise KernelError(errno.ENOENT, symbol, f"no handler wants {file!r}")
        try:
            luo.own(handler, file)
            try:
                luo.flb.file_preserve(handler)
                try:
                    if not kmalloc(luo.kernel, symbol):
                        raise KernelError(errno.ENOMEM, symbol, "luo_file")
                    luo_file = LuoFile(handler, token, file=file)
                    args = LiveupdateFileOpArgs(luo.kernel, handler, file=file)
                    assert handler.ops.preserve is not None
                    handler.ops.preserve(args)
                except KernelError:
                    luo.flb.file_unpreserve(handler)
                    raise
            except KernelError:
                luo.disown(handler, file)
                raise
        except KernelError:
            module_put(handler.ops.owner)
            raise
        luo_file.serialized_data = args.serialized_data
        luo_file.private_data = args.private_data
        self._append(luo_file)

    def unpreserve_files(self) -> None:
        """``luo_file_unpreserve_files``: let go of all files, the last one first."""
        luo = self._luo
        count = self.count
        while self.files:
            self.unpreserve_last()
        self.block_set.destroy()
        if luo.kernel.trace is not None:
            luo.kernel.emit("luo_file_unpreserve_files", {"count": count}, None)

    def unpreserve_last(self) -> None:
        """A round of that loop: let go of the last file."""
        luo_file = self.files[-1]
        handler, file = luo_file.handler, luo_file.file
        assert handler.ops.unpreserve is not None
        assert file is not None
        handler.ops.unpreserve(self._args(luo_file))
        self._luo.flb.file_unpreserve(handler)
        self._disown(handler, file)
        self._pop()
        self.block_set.shrink(self.count)
        file.fput()

    def _disown(self, handler: FileHandler, file: File) -> None:
        if self._luo.kernel.release.luo_puts_module_last:
            self._luo.disown(handler, file)
            module_put(handler.ops.owner)
        else:
            module_put(handler.ops.owner)
            self._luo.disown(handler, file)

    def freeze(self) -> LuoFileSetSer | None:
        """``luo_file_freeze``: freeze all files and write them down; None where there are none.

        Raises what a handler's ``freeze`` raises, with all files before it unfrozen again. Each
        file's handle may have changed by then.
        """
        if not self.files:
            return None
        kernel = self._luo.kernel
        by = kernel.by("luo_file_freeze")
        it = self.block_set.iterate()
        for done, luo_file in enumerate(self.files):
            handler = luo_file.handler
            try:
                entry = it.reserve_entry()
                if entry is None:
                    kernel.warn_once("WARNING: luo_file_freeze: no room", "luo_file_freeze")
                    raise KernelError(errno.ENOSPC, "luo_file_freeze", "no room was set aside")
                if handler.ops.freeze is not None:
                    args = self._args(luo_file)
                    try:
                        handler.ops.freeze(args)
                    except KernelError as refused:
                        kernel.printk(
                            f"luo: Freeze failed for token[{luo_file.token:#x}] "
                            f"handler[{handler.compatible}] err[-{refused.name}]"
                        )
                        raise
                    luo_file.serialized_data = args.serialized_data
            except KernelError:
                self._unfreeze(self.files[:done])
                raise
            ser = LuoFileSer(handler.compatible, luo_file.serialized_data, luo_file.token)
            kernel.ram.write(entry, pack_luo_file_ser(ser), by)
        if kernel.trace is not None:
            compatible = [luo_file.handler.compatible for luo_file in self.files]
            kernel.emit("luo_file_freeze", {"count": self.count, "compatible": compatible}, 0)
        return LuoFileSetSer(self.block_set.head_pa, self.count)

    def unfreeze(self) -> bool:
        """``luo_file_unfreeze``: undo :meth:`freeze`; False where there was nothing to undo."""
        if not self.files:
            return False
        self._unfreeze(self.files)
        return True

    def _unfreeze(self, files: list[LuoFile]) -> None:
        # __luo_file_unfreeze: in the order of preservation, not back to front.
        for luo_file in files:
            if luo_file.handler.ops.unfreeze is not None:
                luo_file.handler.ops.unfreeze(self._args(luo_file))
            if not self._luo.kernel.release.luo_unfreeze_keeps_handle:
                luo_file.serialized_data = 0
        self.block_set.clear()
        kernel = self._luo.kernel
        if kernel.trace is not None:
            kernel.emit("luo_file_unfreeze", {"count": len(files)}, None)

    # -- in the new kernel ----------------------------------------------------------------------

    def deserialize(self, ser: LuoFileSetSer) -> None:
        """``luo_file_deserialize``: make the files of the predecessor's session known.

        Raises the errors of ``kho_block_set_restore``, -ENOENT for a handler that is not
        registered, -ENOMEM, and -EINVAL where it is not the number of files that was announced.
        """
        kernel = self._luo.kernel
        symbol = "luo_file_deserialize"
        if not ser.files:
            if ser.count:
                kernel.warn(f"WARNING: {symbol}: {ser.count} files nowhere")
            return
        luo_format = self._luo.format
        luo_format.restore_files(self.block_set, ser)
        try:
            it = self.block_set.iterate()
            while (entry := it.read_entry()) is not None:
                self._deserialize_one(entry)
            if self.count != ser.count:
                kernel.printk(
                    f"luo: File count mismatch: expected {ser.count}, found {self.count}"
                )
                raise KernelError(errno.EINVAL, symbol, f"{self.count} files, not {ser.count}")
        except KernelError:
            if not luo_format.undoes_torn_state:
                raise
            for luo_file in self.files:
                module_put(luo_file.handler.ops.owner)
            self.files.clear()
            self._by_token.clear()
            self.block_set.destroy()
            raise

    def _deserialize_one(self, entry: int) -> None:
        luo = self._luo
        kernel = luo.kernel
        symbol = "luo_file_deserialize_one"
        ser = unpack_luo_file_ser(kernel.ram.read(entry, LUO_FILE_SER_BYTES))
        handler = luo.handlers.get(ser.compatible)
        if handler is None or not try_module_get(handler.ops.owner):
            name = ser.compatible
            if not kernel.release.luo_bounds_strings:
                name = _c_string(kernel, entry)
            kernel.printk(f"luo: No registered handler for compatible '{name}'")
            raise KernelError(errno.ENOENT, symbol, f"handler {ser.compatible!r}")
        if not kmalloc(kernel, symbol):
            module_put(handler.ops.owner)
            raise KernelError(errno.ENOMEM, symbol)
        luo_file = LuoFile(handler, ser.token)
        luo_file.serialized_data = ser.data
        self._append(luo_file)

    def retrieve(self, token: int) -> File:
        """``luo_retrieve_file``: the file with this token, with one more reference.

        Raises -ENOENT for an unknown token, and what the handler's ``retrieve`` raises, again and
        again.
        """
        luo = self._luo
        symbol = "luo_retrieve_file"
        luo_file = self._by_token.get(token)
        if luo_file is None:
            self._check_behind_last(token)
            raise KernelError(errno.ENOENT, symbol, f"token {token:#x}")
        if luo_file.retrieve_status < 0:
            raise KernelError(-luo_file.retrieve_status, symbol, "as at the first attempt")
        if luo_file.retrieve_status > 0:
            assert luo_file.file is not None
            luo_file.file.get_file()
            return luo_file.file
        handler = luo_file.handler
        has_room = luo.kernel.release.fix_luo_retrieve
        if has_room and not kmalloc(luo.kernel, "xa_reserve"):
            raise KernelError(errno.ENOMEM, "xa_reserve")
        args = LiveupdateFileOpArgs(
            luo.kernel, handler, serialized_data=luo_file.serialized_data
        )
        assert handler.ops.retrieve is not None
        luo.retrieved.append(luo_file)
        try:
            handler.ops.retrieve(args)
        except KernelError as refused:
            if luo.kernel.release.luo_remembers_retrieve:
                luo_file.retrieve_status = -refused.errno
            if luo.kernel.trace is not None:
                luo.kernel.emit(symbol, {"token": token}, -refused.errno)
            raise
        file = args.file
        assert file is not None, f"{handler!r} retrieved no file"
        luo_file.file = file
        file.get_file()
        try:
            luo.own(handler, file, has_room=has_room)
        except KernelError as refused:
            luo.kernel.warn(f"WARNING: {symbol}: {refused}")
        luo_file.retrieve_status = 1
        if luo.kernel.trace is not None:
            luo.kernel.emit(symbol, {"token": token, "compatible": handler.compatible}, 0)
        if luo.kernel.host is not None:
            luo.kernel.host.checkpoint(luo.kernel, "retrieved")
        return file

    def _check_behind_last(self, token: int) -> None:
        # 6.19-rc compared the token with that of the "file" where the loop had ended: what follows
        # the list's head in struct luo_file_set, the address of the files' array (x86-64).
        kernel = self._luo.kernel
        if kernel.release.luo_checks_token or not self.files:
            return
        if token == _PAGE_OFFSET + self.block_set.head_pa:
            raise KernelPanic(
                "BUG: unable to handle page fault: luo_retrieve_file takes the head of its list "
                "for a file",
                kernel.generation,
            )

    def finish(self) -> None:
        """``luo_file_finish``: give all files up, the last one first.

        Raises -EBUSY, before anything happens, where one of them still needs what it has.
        """
        if not self.files:
            return
        luo = self._luo
        for luo_file in self.files:
            can_finish = luo_file.handler.ops.can_finish
            if can_finish is not None and not can_finish(self._finish_args(luo_file)):
                raise KernelError(errno.EBUSY, "luo_file_can_finish_one", repr(luo_file))
        count = self.count
        while self.files:
            luo_file = self.files[-1]
            handler, file = luo_file.handler, luo_file.file
            assert handler.ops.finish is not None
            handler.ops.finish(self._finish_args(luo_file))
            luo.flb.file_finish(handler)
            if luo.kernel.release.luo_puts_module_last:
                if file is not None:
                    luo.disown(handler, file)
                    file.fput()
                module_put(handler.ops.owner)
            else:
                module_put(handler.ops.owner)
                if file is not None:
                    luo.disown(handler, file)
                    file.fput()
            self._pop()
            self.block_set.shrink(self.count)
        self.block_set.destroy()
        if luo.kernel.trace is not None:
            luo.kernel.emit("luo_file_finish", {"count": count}, 0)

    def _finish_args(self, luo_file: LuoFile) -> LiveupdateFileOpArgs:
        return LiveupdateFileOpArgs(
            self._luo.kernel,
            luo_file.handler,
            file=luo_file.file,
            serialized_data=luo_file.serialized_data,
            retrieve_status=luo_file.retrieve_status,
        )

    def destroy(self) -> None:
        """``luo_file_set_destroy``: warns where files or blocks are left."""
        for left in (self.count, self.count, self.block_set.nblocks):
            if left:
                self._luo.kernel.warn(f"WARNING: luo_file_set_destroy: {left} left")
