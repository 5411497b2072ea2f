"""Sessions: named sets of files that cross a kexec together.

Models ``kernel/liveupdate/luo_session.c`` @ 7.3. Refusals raise
:class:`~khosim.errors.KernelError`. Left out: locks but one: from the serialization in the reboot
system call to the jump ``luo_session_serialize_rwsem`` is held for writing, and whoever wants to
change a session sleeps for ever. Here that is a :class:`~khosim.errors.KhoSimError`.

As in the kernel: a refused second session of one name may leave an empty block behind its sessions
(where they fill their blocks exactly), and a successor dies of a block that says it is empty. A
session whose last descriptor is closed while a file cannot be finished is lost.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from khosim.abi.luo import (
    LIVEUPDATE_SESSION_NAME_LENGTH,
    LUO_SESSION_SER_BYTES,
    LuoSessionSer,
    pack_luo_session_ser,
    unpack_luo_session_ser,
)
from khosim.errors import InputError, KernelError, KernelPanic, KhoSimError
from khosim.kernel.file import File
from khosim.kernel.liveupdate.luo_file import LuoFileSet
from khosim.kernel.liveupdate.luo_ioctl import luo_session_ioctl
from khosim.kernel.slab import kmalloc

if TYPE_CHECKING:
    from collections.abc import Callable

    from khosim.abi.luo import LuoFileSetSer
    from khosim.kernel.liveupdate.file_ops import FileHandler
    from khosim.kernel.liveupdate.luo_core import Luo
    from khosim.kernel.liveupdate.luo_format import EntrySet
    from khosim.kernel.process import Process
    from khosim.kernel.uaccess import UserBuffer

__all__ = ("LuoSession", "LuoSessions", "Session", "SessionHeader")

_FILE_SET_OFFSET = LIVEUPDATE_SESSION_NAME_LENGTH
_FILE_SET_BYTES = LUO_SESSION_SER_BYTES - _FILE_SET_OFFSET


class LuoSession:
    """``struct luo_session``: a name and a set of files.

    ``retrieved`` is True for one that came from the predecessor and has a descriptor, ``freed``
    for one that must not be looked at any more.
    """

    __slots__ = ("file_set", "freed", "name", "retrieved")

    def __init__(self, luo: Luo, name: str) -> None:
        raw = name.encode("utf-8", "surrogateescape")[: LIVEUPDATE_SESSION_NAME_LENGTH - 1]
        self.name = raw.decode("utf-8", "surrogateescape")
        self.retrieved = False
        self.freed = False
        self.file_set = LuoFileSet(luo)

    def __repr__(self) -> str:
        return f"LuoSession({self.name!r}, {self.file_set.count} files)"


class SessionHeader:
    """``struct luo_session_header``: the sessions of one direction, by name, in order.

    ``active`` is True once there is a place to write them to, or where some came.
    """

    __slots__ = ("active", "block_set", "sessions")

    def __init__(self, block_set: EntrySet) -> None:
        self.sessions: dict[str, LuoSession] = {}
        self.block_set = block_set
        self.active = False

    @property
    def count(self) -> int:
        """How many sessions there are."""
        return len(self.sessions)


class Session(File):
    """A descriptor of a session: what an agent holds on to.

    ``name`` is the session's (the kernel calls the file ``[luo_session] NAME``). Closing the last
    reference calls the update of its files off in the old kernel, and finishes them in the new one.
    """

    __slots__ = ("_luo", "session")
    compat_behaviour = "fix_ioctl_compat"

    def __init__(self, luo: Luo, session: LuoSession) -> None:
        super().__init__(luo.kernel, session.name)
        self._luo = luo
        self.session = session

    def preserve(self, file: File, token: int) -> None:
        """Have ``file`` preserved under ``token``, a number of 64 bits that only you understand.

        Raises -EINVAL on a session that came from the predecessor, and what
        :meth:`~khosim.kernel.liveupdate.luo_file.LuoFileSet.preserve` raises.
        """
        self._enter(incoming=False)
        if not isinstance(file, File):
            raise InputError("file", f"{file!r} is not an open file")
        if file.kernel is not self.kernel:
            raise KhoSimError(f"{file!r} is open in another kernel")
        self.session.file_set.preserve(_u64(token), file)

    def retrieve(self, token: int) -> Any:
        """The file that was preserved under ``token``: what its handler makes, mostly a Memfd.

        Raises -EINVAL on a session of this kernel, and what
        :meth:`~khosim.kernel.liveupdate.luo_file.LuoFileSet.retrieve` raises.
        """
        self._enter(incoming=True)
        return self.session.file_set.retrieve(_u64(token))

    def finish(self) -> None:
        """All is retrieved that is wanted: LUO gives the files up, and frees the others.

        Raises -EINVAL on a session of this kernel, -EBUSY where a handler is not ready.
        """
        self._enter(incoming=True)
        self.session.file_set.finish()

    @property
    def tokens(self) -> list[int]:
        """The tokens of the files in it, in the order of their preservation."""
        return [luo_file.token for luo_file in self.session.file_set.files]

    def _enter(self, *, incoming: bool) -> None:
        self.check_open()
        self.check_direction(incoming)
        self.down_read()

    def check_direction(self, incoming: bool | None) -> None:
        """``luo_ioctl_type_valid``: raises -EINVAL for a call on the wrong kind of session."""
        if not self.kernel.release.luo_checks_session_type:
            return
        if incoming is not None and self.session.retrieved != incoming:
            why = f"the session is {'outgoing' if incoming else 'incoming'}"
            raise KernelError(errno.EINVAL, "luo_session_ioctl", why)

    def down_read(self) -> None:
        """See :meth:`LuoSessions.down_read`."""
        self._luo.sessions.down_read()

    def d_path(self) -> str:
        """``anon_inodefs_dname``: raises -ENAMETOOLONG for more than a name may have."""
        name = f"anon_inode:[luo_session] {self.name}"
        if len(name.encode("utf-8", "surrogateescape")) >= self.kernel.release.dname_max_bytes:
            raise KernelError(errno.ENAMETOOLONG, "dynamic_dname", name)
        return name

    def ioctl(self, process: Process, cmd: int, arg: UserBuffer) -> int:
        """See :func:`~khosim.kernel.liveupdate.luo_ioctl.luo_session_ioctl`."""
        self.check_open()
        return luo_session_ioctl(self, process, cmd, arg)

    def release(self) -> None:
        """``luo_session_release``."""
        self._luo.sessions.release(self.session)


def _u64(token: object) -> int:
    if not isinstance(token, int) or not 0 <= token < 1 << 64:
        raise InputError("token", f"{token!r} is not a number of 64 bits")
    return int(token)


def _c_string(name: str) -> str:
    # What the kernel sees of a name: up to its first NUL.
    try:
        name.encode("utf-8", "surrogateescape")
    except (AttributeError, UnicodeEncodeError):
        raise InputError("session name", f"{name!r} is no text that has bytes") from None
    return name.split("\0", 1)[0]


class LuoSessions:
    """``luo_session_global``: the sessions from the predecessor and those for the successor.

    ``serialized`` is True while they must not change; ``deserialized`` is None until the first
    attempt to read those of the predecessor, then 0 or its negative errno.
    """

    __slots__ = ("_luo", "deserialized", "incoming", "outgoing", "serialized")

    def __init__(self, luo: Luo) -> None:
        self._luo = luo
        self.incoming = SessionHeader(luo.format.session_set())
        self.outgoing = SessionHeader(luo.format.session_set())
        self.serialized = False
        self.deserialized: int | None = None

    def down_read(self) -> None:
        """Wait for the serialization to end: it does so only where it fails."""
        if self.serialized and self._luo.kernel.release.luo_blocks_mutations:
            raise KhoSimError("this sleeps for ever: the sessions are frozen for the jump")

    # -- creating and retrieving ----------------------------------------------------------------

    def _alloc(self, name: str) -> LuoSession:
        if not kmalloc(self._luo.kernel, "luo_session_alloc"):
            raise KernelError(errno.ENOMEM, "luo_session_alloc", name)
        return LuoSession(self._luo, name)

    def _insert(self, header: SessionHeader, session: LuoSession) -> None:
        # luo_session_insert: room first, and only then a look at the name.
        if self._luo.kernel.release.fix_session_name and session.name in header.sessions:
            raise KernelError(errno.EEXIST, "luo_session_insert", f"session {session.name!r}")
        if header is self.outgoing:
            header.block_set.grow(header.count + 1)
        if session.name in header.sessions:
            raise KernelError(errno.EEXIST, "luo_session_insert", f"session {session.name!r}")
        header.sessions[session.name] = session

    def _remove(self, header: SessionHeader, session: LuoSession) -> None:
        del header.sessions[session.name]
        if header is self.outgoing:
            header.block_set.shrink(header.count)

    def _getfile(self, session: LuoSession) -> Session:
        # luo_session_getfile
        if not kmalloc(self._luo.kernel, "anon_inode_getfile"):
            raise KernelError(errno.ENOMEM, "anon_inode_getfile", session.name)
        return Session(self._luo, session)

    def create(self, name: str) -> Session:
        """``luo_session_create``: a new session, empty.

        Raises -EINVAL for a name that is not 1 to 63 bytes, -EEXIST, -ENOSPC, -ENOMEM.
        """
        symbol = "luo_session_create"
        name = _c_string(name)
        length = len(name.encode("utf-8", "surrogateescape"))
        is_checked = self._luo.kernel.release.luo_checks_names
        if is_checked and not 0 < length < LIVEUPDATE_SESSION_NAME_LENGTH:
            raise KernelError(errno.EINVAL, symbol, f"a name of {length} bytes")
        session = self._alloc(name)
        self.down_read()
        kernel = self._luo.kernel
        error = 0
        try:
            self._insert(self.outgoing, session)
            try:
                return self._getfile(session)
            except KernelError:
                self._remove(self.outgoing, session)
                raise
        except KernelError as refused:
            error = -refused.errno
            raise
        finally:
            if kernel.trace is not None:
                kernel.emit(symbol, {"name": session.name}, error)

    def retrieve(self, name: str, *, meanwhile: Callable[[], object] | None = None) -> Session:
        """``luo_session_retrieve``: the predecessor's session of that name, once.

        Raises -ENOENT where there is none, -EINVAL where it was retrieved before, -ENOMEM.

        ``meanwhile`` is what another CPU does between the search for the session and its use, where
        the list is not locked over both; elsewhere it waits, and nobody calls it.
        """
        self.down_read()
        symbol = "luo_session_retrieve"
        session = self.incoming.sessions.get(_c_string(name))
        if session is None:
            raise KernelError(errno.ENOENT, symbol, f"session {name!r}")
        if meanwhile is not None and not self._luo.kernel.release.luo_retrieve_holds_list:
            meanwhile()
        if session.freed:
            raise KernelPanic(
                f"BUG: KASAN: slab-use-after-free in {symbol}", self._luo.kernel.generation
            )
        if session.retrieved:
            raise KernelError(errno.EINVAL, symbol, f"session {name!r} was retrieved before")
        file = self._getfile(session)
        session.retrieved = True
        kernel = self._luo.kernel
        if kernel.trace is not None:
            kernel.emit(symbol, {"name": session.name}, 0)
        return file

    def unretrieve(self, name: str) -> None:
        """No kernel has this yet: as if the session had not been retrieved."""
        self.incoming.sessions[name].retrieved = False

    def use(self, handler: FileHandler) -> bool:
        """No kernel has this yet: whether a file of ``handler`` is preserved in a session."""
        sets = [session.file_set for session in self.outgoing.sessions.values()]
        return any(file.handler is handler for files in sets for file in files.files)

    def release(self, session: LuoSession) -> None:
        """``luo_session_release``: the last descriptor is closed: finish, or call it off."""
        self.down_read()
        kernel = self._luo.kernel
        if session.retrieved:
            try:
                session.file_set.finish()
            except KernelError:
                kernel.printk(f"luo: Unable to finish session [{session.name}] on release")
                session.retrieved = not kernel.release.fix_session_release
                return
            header = self.incoming
        else:
            session.file_set.unpreserve_files()
            header = self.outgoing
        self._remove(header, session)
        session.file_set.destroy()
        session.freed = True
        if kernel.trace is not None:
            kernel.emit("luo_session_release", {"name": session.name}, 0)

    # -- from the predecessor -------------------------------------------------------------------

    def setup_incoming(self, sessions_pa: int) -> None:
        """``luo_session_setup_incoming``: adopt the blocks; raises what they are refused with."""
        if sessions_pa:
            self.incoming.block_set.restore(sessions_pa)
            self.incoming.active = True

    def deserialize(self) -> None:
        """``luo_session_deserialize``: read the predecessor's sessions, at the first call.

        Every later call ends as the first did. After a refusal the sessions that were read stay,
        and the blocks and files of the others are lost until the next kexec.
        """
        if self.deserialized is not None:
            if self.deserialized:
                symbol = "luo_session_deserialize"
                raise KernelError(-self.deserialized, symbol, "as at the first attempt")
            return
        self.deserialized = 0
        header = self.incoming
        if not header.active:
            return
        kernel = self._luo.kernel
        failed: KernelError | None = None
        try:
            it = header.block_set.iterate()
            while (entry := it.read_entry()) is not None:
                data = kernel.ram.read(entry, LUO_SESSION_SER_BYTES)
                self._deserialize_one(unpack_luo_session_ser(data))
        except KernelError as refused:
            failed = refused
            # Without memory for a session 6.19 and 7.0 returned, and did not remember what.
            is_forgotten = refused.symbol == "luo_session_alloc"
            if kernel.release.luo_remembers_deserialize or not is_forgotten:
                self.deserialized = -refused.errno
        if failed is None or self._luo.format.undoes_torn_state:
            header.block_set.destroy()
        if kernel.trace is not None:
            args = {"count": header.count}
            kernel.emit("luo_session_deserialize", args, self.deserialized)
        if failed is not None:
            raise failed

    def _deserialize_one(self, ser: LuoSessionSer) -> None:
        printk = self._luo.kernel.printk
        try:
            session = self._alloc(ser.name)
        except KernelError as refused:
            printk(
                f"luo: Failed to allocate session [{ser.name}] during deserialization "
                f"-{refused.name}"
            )
            raise
        try:
            self._insert(self.incoming, session)
        except KernelError as refused:
            printk(f"luo: Failed to insert session [{session.name}] -{refused.name}")
            raise
        try:
            session.file_set.deserialize(ser.file_set)
        except KernelError as refused:
            printk(
                f"luo: Failed to deserialize files for session [{session.name}] -{refused.name}"
            )
            raise

    # -- for the successor ----------------------------------------------------------------------

    def serialize(self) -> None:
        """``luo_session_serialize``: freeze all files and write all sessions down.

        Raises what a file's ``freeze`` raises; then all is as it was. On success nothing may
        change any more.
        """
        self.down_read()
        self.serialized = True
        error = 0
        try:
            self._serialize()
        except KernelError as refused:
            self.serialized = False
            error = -refused.errno
            raise
        finally:
            kernel = self._luo.kernel
            if kernel.trace is not None:
                kernel.emit("luo_session_serialize", {"count": self.outgoing.count}, error)

    def _serialize(self) -> None:
        luo = self._luo
        kernel = luo.kernel
        header = self.outgoing
        by = kernel.by("luo_session_serialize")
        luo.format.publish_sessions(luo, 0)
        it = header.block_set.iterate()
        frozen: list[LuoSession] = []
        try:
            for session in header.sessions.values():
                entry = it.reserve_entry()
                if entry is None:
                    symbol = "luo_session_serialize"
                    kernel.warn_once(f"WARNING: {symbol}: no room", symbol)
                    raise KernelError(errno.ENOSPC, symbol, "no room was set aside")
                try:
                    file_set_ser = session.file_set.freeze()
                except KernelError:
                    it.prev()
                    raise
                if file_set_ser is not None:
                    self._write_file_set(entry, file_set_ser)
                name = session.name.encode("utf-8", "surrogateescape")
                kernel.ram.write(entry, name + b"\0", by)
                frozen.append(session)
        except KernelError:
            for session in reversed(frozen):
                entry = it.prev()
                assert entry is not None
                if session.file_set.unfreeze():
                    unfreeze_by = kernel.by("luo_file_unfreeze")
                    kernel.ram.zero(entry + _FILE_SET_OFFSET, _FILE_SET_BYTES, unfreeze_by)
                kernel.ram.zero(entry, LIVEUPDATE_SESSION_NAME_LENGTH, by)
            raise
        if header.sessions:
            luo.format.publish_sessions(luo, header.block_set.head_pa)

    def _write_file_set(self, entry: int, ser: LuoFileSetSer) -> None:
        kernel = self._luo.kernel
        data = pack_luo_session_ser(LuoSessionSer("", ser))[_FILE_SET_OFFSET:]
        kernel.ram.write(entry + _FILE_SET_OFFSET, data, kernel.by("luo_file_freeze"))
