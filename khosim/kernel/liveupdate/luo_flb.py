"""File-lifecycle-bound state: shared objects that come with the first file and go with the last.

Models ``kernel/liveupdate/luo_flb.c`` @ 7.3. Each file handler has a list of the objects that its
files need. Left out: locks.

As in the kernel: the successor learns how many files need an object only when somebody retrieves
it. A handler's files that are finished before that count down from 0: a warning, a saturated count,
and no ``finish`` for the object. The kernel's own test retrieves all objects when its handler is
registered. That an object was retrieved or finished is kept with it, not with the predecessor's
record: a module that is loaded again finds it once more. A reference of
:meth:`LuoFlbs.get_outgoing` that is held at the jump is counted like a
file, and nobody will give it back in the successor.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from khosim.abi.luo import (
    LUO_FLB_HEADER_SER_BYTES,
    LUO_FLB_SER_BYTES,
    LuoFlbHeaderSer,
    LuoFlbSer,
    pack_luo_flb_header_ser,
    pack_luo_flb_ser,
    unpack_luo_flb_header_ser,
    unpack_luo_flb_ser,
)
from khosim.errors import KernelError, KernelPanic
from khosim.kernel.liveupdate.flb_ops import Flb, LiveupdateFlbOpArgs
from khosim.kernel.module import module_put, try_module_get
from khosim.kernel.refcount import Refcount
from khosim.kernel.slab import kmalloc

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.liveupdate.file_ops import FileHandler

__all__ = ("FlbState", "LuoFlb", "LuoFlbs")

_LUO_FLB_PGCNT = 1
_BATCH = 1 << 14
"""Entries of a page of objects that are looked at in one go."""


class FlbState:
    """``struct luo_flb_private_state``: one direction of one object.

    ``retrieve_status`` is 0 before the attempt, 1 after a success, else the negative errno.
    """

    __slots__ = ("count", "data", "finished", "obj", "references", "retrieve_status")

    def __init__(self, kernel: Kernel) -> None:
        self.count = Refcount(kernel)
        self.references = 0
        """Of ``count``, those that are no files."""
        self.data = 0
        self.obj: Any = None
        self.finished = False
        self.retrieve_status = 0


class LuoFlb:
    """``struct luo_flb_private``: an object in both directions; ``users`` are its handlers."""

    __slots__ = ("flb", "incoming", "outgoing", "users")

    def __init__(self, kernel: Kernel, flb: Flb) -> None:
        self.flb = flb
        self.outgoing = FlbState(kernel)
        self.incoming = FlbState(kernel)
        self.users = 0


class LuoFlbs:
    """``luo_flb_global``: the shared objects of one kernel.

    ``registered`` holds them in order, ``links`` the objects of each handler, ``incoming_pa`` and
    ``outgoing_pa`` the physical address of the predecessor's and the own page of them (or 0).
    """

    __slots__ = (
        "_kernel",
        "_private",
        "asked",
        "incoming_pa",
        "links",
        "outgoing_pa",
        "registered",
        "retrieved",
    )

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._private: dict[Flb, LuoFlb] = {}
        self.registered: list[LuoFlb] = []
        self.retrieved: list[LuoFlb] = []
        """One entry for each call of an object's ``retrieve``; for checkers, no kernel has it."""
        self.asked: set[str] = set()
        """No kernel has this yet: what was retrieved, or tried to, whoever registered it."""
        self.links: dict[FileHandler, list[LuoFlb]] = {}
        self.incoming_pa = 0
        self.outgoing_pa = 0

    @property
    def max_flbs(self) -> int:
        """``LUO_FLB_MAX``: how many objects the page holds."""
        size = (_LUO_FLB_PGCNT << self._kernel.arch.page_shift) - LUO_FLB_HEADER_SER_BYTES
        return size // LUO_FLB_SER_BYTES

    def state(self, flb: Flb) -> LuoFlb:
        """``luo_flb_get_private``: what this kernel knows of an object."""
        private = self._private.get(flb)
        if private is None:
            private = self._private[flb] = LuoFlb(self._kernel, flb)
        return private

    # -- registering ----------------------------------------------------------------------------

    def register(self, handler: FileHandler, flb: Flb, *, handler_is_known: bool) -> None:
        """``liveupdate_register_flb``: files of ``handler`` need ``flb`` from now on.

        Raises -EINVAL without all callbacks, -ENOMEM, -EEXIST for an object that the handler has or
        a name that another object has, -ENOSPC when the page of all objects would overflow.

        A handler that is not registered is told by ``list_empty``, which is no list's answer that
        was never initialised, nor of one that was taken out: the kernel follows a null pointer, or
        has one object more that no file needs.
        """
        kernel = self._kernel
        symbol = "liveupdate_register_flb"
        private = self.state(flb)
        missing = flb.ops.missing()
        if missing:
            kernel.warn(f"WARNING: {symbol}: no {missing[0]}")
            raise KernelError(errno.EINVAL, symbol, f"no {missing[0]}")
        if kernel.release.fix_flb_handler and not handler_is_known:
            raise KernelError(errno.EINVAL, symbol, f"{handler!r} is not registered")
        if not kmalloc(kernel, symbol):
            raise KernelError(errno.ENOMEM, symbol)
        links = self.links.get(handler)
        if links is None:
            text = f"BUG: kernel NULL pointer dereference in {symbol}"
            raise KernelPanic(text, kernel.generation)
        if kernel.release.fix_flb_late and kernel.liveupdate.sessions.use(handler):
            raise KernelError(errno.EBUSY, symbol, f"files of {handler!r} are preserved")
        if private in links:
            raise KernelError(errno.EEXIST, symbol, f"{handler!r} has {flb!r}")
        if not private.users:
            if len(self.registered) == self.max_flbs:
                raise KernelError(errno.ENOSPC, symbol, f"{self.max_flbs} objects")
            if any(other.flb.compatible == flb.compatible for other in self.registered):
                raise KernelError(errno.EEXIST, symbol, f"another {flb.compatible!r}")
            if kernel.release.luo_pins_modules and not try_module_get(flb.ops.owner):
                raise KernelError(errno.EAGAIN, symbol, "the module goes away")
            self.registered.append(private)
        private.users += 1
        links.append(private)
        if kernel.trace is not None:
            args = {"handler": handler.compatible, "flb": flb.compatible}
            kernel.emit(symbol, args, 0)

    def unregister(self, handler: FileHandler, flb: Flb) -> None:
        """``luo_flb_unregister_one``: files of ``handler`` do not need ``flb`` any more."""
        private = self.state(flb)
        links = self.links.get(handler, [])
        if private not in links:
            self._kernel.printk(
                f"luo: Failed to unregister FLB '{flb.compatible}': not found in file handler "
                f"'{handler.compatible}'"
            )
            return
        links.remove(private)
        private.users -= 1
        if not private.users:
            self.registered.remove(private)
            if self._kernel.release.luo_pins_modules:
                module_put(flb.ops.owner)

    def unregister_all(self, handler: FileHandler) -> None:
        """``luo_flb_unregister_all``."""
        for private in list(self.links.get(handler, ())):
            self.unregister(handler, private.flb)

    # -- outgoing -------------------------------------------------------------------------------

    def file_preserve(self, handler: FileHandler) -> None:
        """``luo_flb_file_preserve``: one more file of ``handler``; all objects or none.

        Raises what an object's ``preserve`` raises, and -ENODEV while its module goes away.
        """
        links = self.links[handler]
        for done, private in enumerate(links):
            try:
                self._preserve_one(private)
            except KernelError:
                for before in reversed(links[:done]):
                    self.put_outgoing(before.flb)
                raise

    def _preserve_one(self, private: LuoFlb) -> None:
        # luo_flb_file_preserve_one
        out, flb = private.outgoing, private.flb
        if out.count.value:
            out.count.inc()
            return
        symbol = "luo_flb_file_preserve_one"
        if not try_module_get(flb.ops.owner):
            raise KernelError(errno.ENODEV, symbol, f"the module of {flb!r} goes away")
        args = LiveupdateFlbOpArgs(self._kernel, flb)
        assert flb.ops.preserve is not None
        error = 0
        try:
            flb.ops.preserve(args)
        except KernelError as refused:
            error = -refused.errno
            module_put(flb.ops.owner)
            raise
        finally:
            if self._kernel.trace is not None:
                self._kernel.emit(symbol, {"flb": flb.compatible}, error)
        out.data, out.obj = args.data, args.obj
        out.count.set(1)

    def file_unpreserve(self, handler: FileHandler) -> None:
        """``luo_flb_file_unpreserve``: one file less, last object first."""
        for private in reversed(self.links[handler]):
            self.put_outgoing(private.flb)

    def get_outgoing(self, flb: Flb) -> Any:
        """``liveupdate_flb_get_outgoing``: the object, with a reference; raises -ENOENT."""
        out = self.state(flb).outgoing
        if out.obj is None:
            symbol = "liveupdate_flb_get_outgoing"
            raise KernelError(errno.ENOENT, symbol, f"no file needs {flb!r}")
        if self._kernel.release.luo_flb_counts_outgoing:
            out.references += 1
            out.count.inc()
        return out.obj

    def put_outgoing(self, flb: Flb) -> None:
        """``liveupdate_flb_put_outgoing``: the last reference unpreserves the object."""
        out = self.state(flb).outgoing
        if not out.count.dec_and_test():
            return
        args = LiveupdateFlbOpArgs(self._kernel, flb, data=out.data, obj=out.obj)
        if flb.ops.unpreserve is not None:
            flb.ops.unpreserve(args)
        out.data, out.obj = 0, None
        module_put(flb.ops.owner)
        if self._kernel.trace is not None:
            self._kernel.emit("liveupdate_flb_put_outgoing", {"flb": flb.compatible}, None)

    def setup_outgoing(self) -> int:
        """``luo_flb_setup_outgoing``: the page for the successor; its physical address."""
        kernel = self._kernel
        size = _LUO_FLB_PGCNT << kernel.arch.page_shift
        phys = kernel.kho_alloc_preserve(size).phys
        header = pack_luo_flb_header_ser(LuoFlbHeaderSer(_LUO_FLB_PGCNT, 0))
        kernel.ram.write(phys, header, kernel.by("luo_flb_setup_outgoing"))
        self.outgoing_pa = phys
        return phys

    def serialize(self) -> None:
        """``luo_flb_serialize``: enter every object that somebody refers to."""
        kernel = self._kernel
        by = kernel.by("luo_flb_serialize")
        at = self.outgoing_pa + LUO_FLB_HEADER_SER_BYTES
        nr_flbs = 0
        for private in self.registered:
            count = private.outgoing.count.value
            if count > 0:
                ser = LuoFlbSer(private.flb.compatible, private.outgoing.data, count)
                kernel.ram.write(at + nr_flbs * LUO_FLB_SER_BYTES, pack_luo_flb_ser(ser), by)
                nr_flbs += 1
        header = pack_luo_flb_header_ser(LuoFlbHeaderSer(_LUO_FLB_PGCNT, nr_flbs))
        kernel.ram.write(self.outgoing_pa, header, by)
        if kernel.trace is not None:
            kernel.emit("luo_flb_serialize", {}, nr_flbs)

    # -- incoming -------------------------------------------------------------------------------

    def get_incoming(self, flb: Flb) -> Any:
        """``liveupdate_flb_get_incoming``: the object, with a reference.

        The first call retrieves it. Raises -ENODATA where nothing came or it is finished, -ENOENT
        where it did not come, -ENODEV while its module goes away, and for ever after what
        ``retrieve`` raised.
        """
        incoming = self.state(flb).incoming
        if incoming.obj is None:
            self._retrieve_one(flb)
        if self._kernel.release.luo_flb_counts_incoming:
            incoming.count.inc()
        return incoming.obj

    def put_incoming(self, flb: Flb) -> None:
        """``liveupdate_flb_put_incoming``: the last reference finishes the object."""
        incoming = self.state(flb).incoming
        if not incoming.count.dec_and_test():
            return
        kernel = self._kernel
        symbol = "liveupdate_flb_put_incoming"
        if incoming.retrieve_status <= 0:
            try:
                self._retrieve_one(flb)
            except KernelError as refused:
                if kernel.release.fix_flb_retrieve:
                    return
                kernel.warn(f"WARNING: {symbol}: {refused}")
                return
        assert flb.ops.finish is not None
        flb.ops.finish(LiveupdateFlbOpArgs(kernel, flb, obj=incoming.obj))
        incoming.data, incoming.obj = 0, None
        incoming.finished = True
        module_put(flb.ops.owner)
        if kernel.trace is not None:
            kernel.emit(symbol, {"flb": flb.compatible}, None)

    def file_finish(self, handler: FileHandler) -> None:
        """``luo_flb_file_finish``: one file of ``handler`` is finished, last object first."""
        for private in reversed(self.links[handler]):
            if self._kernel.release.fix_flb_unknown and self._is_unknown(private):
                continue
            if self._kernel.release.fix_flb_finish and not private.incoming.retrieve_status:
                with suppress(KernelError):
                    self._retrieve_one(private.flb)
            self.put_incoming(private.flb)

    def _is_unknown(self, private: LuoFlb) -> bool:
        is_there = self.incoming_pa and self._find(private.flb.compatible) is not None
        return not is_there or self._was_asked(private)

    def _was_asked(self, private: LuoFlb) -> bool:
        # Of a module that is not there any more.
        is_kept = self._kernel.release.fix_flb_reload and not private.incoming.retrieve_status
        return is_kept and private.flb.compatible in self.asked

    def _retrieve_one(self, flb: Flb) -> None:
        # luo_flb_retrieve_one
        kernel = self._kernel
        incoming = self.state(flb).incoming
        symbol = "luo_flb_retrieve_one"
        if incoming.finished:
            raise KernelError(errno.ENODATA, symbol, f"{flb!r} is finished")
        if incoming.retrieve_status < 0:
            raise KernelError(-incoming.retrieve_status, symbol, f"{flb!r}, remembered")
        if incoming.retrieve_status > 0:
            return
        if not self.incoming_pa:
            raise KernelError(errno.ENODATA, symbol, "nothing was handed over")
        ser = self._find(flb.compatible)
        if ser is None:
            raise KernelError(errno.ENOENT, symbol, f"{flb!r} was not handed over")
        if self._was_asked(self.state(flb)):
            raise KernelError(errno.ENODATA, symbol, f"{flb!r} was retrieved before")
        incoming.data = ser.data
        incoming.count.set(ser.count)
        if not try_module_get(flb.ops.owner):
            raise KernelError(errno.ENODEV, symbol, f"the module of {flb!r} goes away")
        args = LiveupdateFlbOpArgs(kernel, flb, data=ser.data)
        assert flb.ops.retrieve is not None
        self.retrieved.append(self.state(flb))
        self.asked.add(flb.compatible)
        status = 1
        try:
            flb.ops.retrieve(args)
        except KernelError as refused:
            status = -refused.errno
            module_put(flb.ops.owner)
            raise
        finally:
            if status > 0 or kernel.release.luo_flb_remembers_retrieve:
                incoming.retrieve_status = status
            if kernel.trace is not None:
                kernel.emit(symbol, {"flb": flb.compatible}, min(status, 0))
        incoming.obj = args.obj

    def _find(self, name: str) -> LuoFlbSer | None:
        # The count is the predecessor's word: the kernel reads on until it finds the name, or to
        # the end of memory.
        kernel = self._kernel
        needle = name.encode() + b"\0"
        at = kernel.virt(self.incoming_pa, LUO_FLB_HEADER_SER_BYTES)
        header = unpack_luo_flb_header_ser(kernel.ram.read(at, LUO_FLB_HEADER_SER_BYTES))
        at += LUO_FLB_HEADER_SER_BYTES
        left = header.count
        while left:
            size = min(left, _BATCH) * LUO_FLB_SER_BYTES
            while size > LUO_FLB_SER_BYTES and not kernel.is_mapped(at, at + size):
                size = size // 2 // LUO_FLB_SER_BYTES * LUO_FLB_SER_BYTES
            data = kernel.ram.read(kernel.virt(at, size), size)
            found = data.find(needle)
            while found >= 0:
                if found % LUO_FLB_SER_BYTES == 0:
                    return unpack_luo_flb_ser(data, found)
                found = data.find(needle, found + 1)
            at += size
            left -= size // LUO_FLB_SER_BYTES
        return None
