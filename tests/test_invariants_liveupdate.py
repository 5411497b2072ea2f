"""Each of LUO's invariants speaks when its own promise is broken, and no other does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from khosim import Machine
from khosim.checks.invariants import INVARIANTS
from khosim.checks.invariants.liveupdate import INVARIANTS as LUO_INVARIANTS
from khosim.errors import KernelError
from khosim.kernel.file import File
from khosim.kernel.kernel import Kernel
from khosim.kernel.liveupdate.file_ops import FileHandler, LiveupdateFileOpArgs
from khosim.kernel.liveupdate.flb_ops import Flb, LiveupdateFlbOpArgs
from khosim.kernel.liveupdate.luo_core import Luo
from khosim.kernel.liveupdate.luo_file import LuoFileSet
from khosim.kernel.liveupdate.luo_session import LuoSession, LuoSessions, Session
from khosim.kernel.liveupdate.memfd_luo import MemfdLuoHandler
from khosim.kernel.memfd import MFD_ALLOW_SEALING, Memfd

CMDLINE = "kho=on liveupdate=on"
F_SEAL_GROW = 0x4


def names(machine: Machine) -> set[str]:
    """Return which invariants speak."""
    return {violation.invariant for violation in machine.check()}


def started() -> tuple[Machine, Kernel]:
    """Return a machine and its first kernel, with LUO on."""
    machine = Machine("64M")
    return machine, machine.boot(cmdline=CMDLINE)


def guest(kernel: Kernel, name: str = "guest", size: str = "32K") -> Memfd:
    """Return a memfd with something in it."""
    file = kernel.memfd(name, size=size)
    file.write(0, name.encode())
    return file


def handed(machine: Machine, kernel: Kernel) -> Session:
    """Preserve one memfd under token 1, hand over, and return its session in the successor."""
    session = kernel.liveupdate.create_session("vm")
    session.preserve(guest(kernel), 1)
    return kernel.kexec().liveupdate.retrieve_session("vm")


# -- silence ------------------------------------------------------------------------------------


def test_silence_through_a_whole_life() -> None:
    """Preserve, hand over, retrieve, finish, preserve again, call off: nothing to say."""
    machine, kernel = started()
    session = handed(machine, kernel)
    assert machine.check() == []
    file = session.retrieve(1)
    assert machine.check() == []
    session.finish()
    session.close()
    assert machine.check() == []
    successor = machine.kernel
    assert successor is not None
    again = successor.liveupdate.create_session("vm")
    again.preserve(file, 2)
    assert machine.check() == []
    again.close()
    assert machine.check() == []
    successor.kexec()
    assert machine.check() == []


def test_silence_when_nothing_is_retrieved() -> None:
    """A session that is finished unread, and one that nobody ever asks for."""
    machine, kernel = started()
    for name in ("read", "unread"):
        session = kernel.liveupdate.create_session(name)
        session.preserve(guest(kernel, name), 1)
    successor = kernel.kexec()
    session = successor.liveupdate.retrieve_session("read")
    session.finish()
    session.close()
    assert machine.check() == []
    successor.kexec()
    assert machine.check() == []


def test_names_are_known() -> None:
    """The module's invariants are among those that are asked."""
    assert len(LUO_INVARIANTS) == 8
    assert set(LUO_INVARIANTS) <= set(INVARIANTS)


# -- at the jump --------------------------------------------------------------------------------


def test_a_wrong_count_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that says it has more files than its blocks hold."""
    write = LuoSessions._write_file_set

    def miscounted(self: LuoSessions, entry: int, ser: object) -> None:
        write(self, entry, dataclasses.replace(ser, count=7))  # type: ignore[type-var]

    monkeypatch.setattr(LuoSessions, "_write_file_set", miscounted)
    machine, kernel = started()
    session = kernel.liveupdate.create_session("vm")
    session.preserve(guest(kernel), 1)
    machine.load_successor(kernel)
    assert names(machine) == {"luo-wellformed"}


def test_a_record_that_is_not_preserved_is_seen() -> None:
    """Somebody takes a page of the handover out of the map."""
    machine, kernel = started()
    session = kernel.liveupdate.create_session("vm")
    session.preserve(guest(kernel), 1)
    (luo_file,) = session.session.file_set.files
    kernel.kho_out.unpreserve_pages(luo_file.serialized_data >> 12, 1)
    machine.load_successor(kernel)
    assert names(machine) == {"luo-preserved"}


def test_a_folio_that_is_not_preserved_is_seen() -> None:
    """The same for a page of the guest's memory."""
    machine, kernel = started()
    file = guest(kernel)
    kernel.liveupdate.create_session("vm").preserve(file, 1)
    run = next(iter(file.inode.mapping))
    kernel.kho_out.unpreserve_folio(run.pfn, run.order)
    machine.load_successor(kernel)
    assert names(machine) == {"luo-preserved"}


def test_one_file_in_two_sessions_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an id of its inode a memfd that is open twice can be preserved twice."""
    monkeypatch.setattr(MemfdLuoHandler, "get_id", lambda self, file: id(file))
    machine, kernel = started()
    one = guest(kernel)
    two = Memfd(kernel, one.inode, "again")
    for name, file in (("a", one), ("b", two)):
        kernel.liveupdate.create_session(name).preserve(file, 1)
    machine.load_successor(kernel)
    assert names(machine) == {"luo-one-owner"}


def _after_serialize(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[LuoSessions], None]
) -> None:
    serialize = LuoSessions.serialize

    def and_then(self: LuoSessions) -> None:
        serialize(self)
        change(self)

    monkeypatch.setattr(LuoSessions, "serialize", and_then)


def _forget_session(sessions: LuoSessions) -> None:
    sessions.outgoing.sessions.popitem()


def _other_token(sessions: LuoSessions) -> None:
    sessions.outgoing.sessions["vm"].file_set.files[0].token = 5


def _one_more(sessions: LuoSessions) -> None:
    luo = sessions._luo
    sessions.outgoing.sessions["late"] = LuoSession(luo, "late")


def _one_update_more(sessions: LuoSessions) -> None:
    sessions._luo.liveupdate_num += 1


@pytest.mark.parametrize("change", [_forget_session, _other_token, _one_more, _one_update_more])
def test_a_change_after_serialization_is_seen(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[LuoSessions], None]
) -> None:
    """The bytes tell of another state than the one that the kernel leaves behind."""
    _after_serialize(monkeypatch, change)
    machine, kernel = started()
    kernel.liveupdate.create_session("vm").preserve(guest(kernel), 1)
    machine.load_successor(kernel)
    assert "luo-serialized-live" in names(machine)
    assert names(machine) <= {"luo-serialized-live", "luo-no-leftovers", "luo-references"}


class Shared(Flb):
    """A shared object with nothing in it."""

    compatible = "shared-v1"

    def preserve(self, args: LiveupdateFlbOpArgs) -> None:
        """Give it a number."""
        args.obj, args.data = "object", 0x1000

    def unpreserve(self, args: LiveupdateFlbOpArgs) -> None:
        """Nothing to undo."""

    def retrieve(self, args: LiveupdateFlbOpArgs) -> None:
        """It comes back."""
        args.obj = "object"

    def finish(self, args: LiveupdateFlbOpArgs) -> None:
        """Nothing to free."""


class Note(File):
    """A file of a kind of its own: a number."""


class NoteHandler(FileHandler):
    """Carries notes in the u64 that LUO offers, and nothing else."""

    compatible = "note-v1"

    def can_preserve(self, file: File) -> bool:
        """Notes only."""
        return isinstance(file, Note)

    def preserve(self, args: LiveupdateFileOpArgs) -> None:
        """The number is all there is."""
        args.serialized_data = 42

    def unpreserve(self, args: LiveupdateFileOpArgs) -> None:
        """Nothing to undo."""

    def retrieve(self, args: LiveupdateFileOpArgs) -> None:
        """A note again."""
        args.file = Note(args.kernel, "note")

    def finish(self, args: LiveupdateFileOpArgs) -> None:
        """Nothing to free."""


def with_notes(kernel: Kernel) -> tuple[NoteHandler, Shared]:
    """Register the handler, with a shared object."""
    handler, shared = NoteHandler(), Shared()
    kernel.liveupdate.register_file_handler(handler)
    kernel.liveupdate.register_flb(handler, shared)
    return handler, shared


def test_a_shared_object_changed_after_serialization_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The successor is told of another number of files than need the object."""
    machine, kernel = started()
    _, shared = with_notes(kernel)
    kernel.liveupdate.create_session("vm").preserve(Note(kernel, "note"), 1)
    _after_serialize(monkeypatch, lambda sessions: None)
    serialize = kernel.liveupdate.flb.serialize

    def one_more() -> None:
        serialize()
        kernel.liveupdate.flb.get_outgoing(shared)

    monkeypatch.setattr(
        type(kernel.liveupdate.flb), "serialize", lambda self: one_more(), raising=True
    )
    machine.load_successor(kernel)
    assert names(machine) == {"luo-serialized-live"}


# -- while a kernel runs ------------------------------------------------------------------------


def test_memory_left_preserved_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session is called off, and its memfd stays preserved."""
    monkeypatch.setattr(MemfdLuoHandler, "unpreserve", lambda self, args: None)
    machine, kernel = started()
    session = kernel.liveupdate.create_session("vm")
    session.preserve(guest(kernel), 1)
    assert machine.check() == []
    session.close()
    assert names(machine) == {"luo-no-leftovers"}


def test_blocks_left_preserved_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session is called off, and the blocks for its files stay preserved."""

    def forgets(self: LuoFileSet) -> None:
        self.block_set.blocks.clear()
        self.block_set.head_pa = 0
        unpreserve(self)

    unpreserve = LuoFileSet.unpreserve_files
    machine, kernel = started()
    with_notes(kernel)
    session = kernel.liveupdate.create_session("vm")
    session.preserve(Note(kernel, "note"), 1)
    block = session.session.file_set.block_set.blocks[0]
    kernel.ram.write_u64(block, 0, kernel.by("kho_block_add"))
    monkeypatch.setattr(LuoFileSet, "unpreserve_files", forgets)
    session.close()
    assert names(machine) == {"luo-no-leftovers"}
    assert machine.check()[0].phys == block


def test_a_restored_memfd_left_preserved_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same one generation later, when the folios came from the predecessor."""
    machine, kernel = started()
    session = handed(machine, kernel)
    file = session.retrieve(1)
    session.finish()
    successor = machine.kernel
    assert successor is not None
    monkeypatch.setattr(
        "khosim.kernel.liveupdate.memfd_luo.unpreserve_folio_runs", lambda kernel, runs: None
    )
    again = successor.liveupdate.create_session("vm")
    again.preserve(file, 1)
    again.close()
    assert names(machine) == {"luo-no-leftovers"}


def test_an_owned_file_in_no_session_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session is called off, and nobody can ever preserve its file again."""
    monkeypatch.setattr(Luo, "disown", lambda self, handler, file: None)
    machine, kernel = started()
    session = kernel.liveupdate.create_session("vm")
    session.preserve(guest(kernel), 1)
    session.close()
    assert names(machine) == {"luo-references"}


def test_a_file_that_luo_does_not_know_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in a session that could be preserved a second time."""
    monkeypatch.setattr(Luo, "own", lambda self, handler, file: None)
    machine, kernel = started()
    kernel.liveupdate.create_session("vm").preserve(guest(kernel), 1)
    assert names(machine) == {"luo-references"}


def test_a_released_file_in_a_session_is_seen() -> None:
    """LUO's reference is dropped by somebody else."""
    machine, kernel = started()
    with_notes(kernel)
    note = Note(kernel, "note")
    kernel.liveupdate.create_session("vm").preserve(note, 1)
    note.close()
    assert machine.check() == []
    note.fput()
    assert names(machine) == {"luo-references"}


def test_a_shared_object_with_too_few_references_is_seen() -> None:
    """One put too many: the object would go while a file needs it."""
    machine, kernel = started()
    _, shared = with_notes(kernel)
    session = kernel.liveupdate.create_session("vm")
    for token in range(2):
        session.preserve(Note(kernel, f"note {token}"), token)
    assert machine.check() == []
    kernel.liveupdate.flb_put_outgoing(shared)
    assert names(machine) == {"luo-references"}


def test_a_count_below_zero_is_seen() -> None:
    """Files are finished of whose shared object nobody ever learnt."""
    machine, kernel = started()
    with_notes(kernel)
    kernel.liveupdate.create_session("vm").preserve(Note(kernel, "note"), 1)
    successor = kernel.kexec()
    with_notes(successor)
    session = successor.liveupdate.retrieve_session("vm")
    assert machine.check() == []
    session.finish()
    assert names(machine) == {"luo-references"}


def test_a_second_retrieve_is_seen() -> None:
    """A handler is asked again for what it gave already."""
    machine, kernel = started()
    with_notes(kernel)
    kernel.liveupdate.create_session("vm").preserve(Note(kernel, "note"), 1)
    successor = kernel.kexec()
    _, shared = with_notes(successor)
    successor.liveupdate.flb_get_incoming(shared)
    session = successor.liveupdate.retrieve_session("vm")
    session.retrieve(1)
    assert machine.check() == []
    session.session.file_set.files[0].retrieve_status = 0
    session.retrieve(1)
    assert "luo-retrieved-once" in names(machine)
    assert names(machine) <= {"luo-retrieved-once", "luo-references"}


def test_a_shared_object_retrieved_twice_is_seen() -> None:
    """Each of two users has the object made from what the predecessor left."""

    def registered(kernel: Kernel) -> Flb:
        handler, flb = MemfdHandler(), Shared()
        kernel.liveupdate.register_file_handler(handler)
        kernel.liveupdate.register_flb(handler, flb)
        return flb

    class MemfdHandler(FileHandler):
        """Takes nothing but notes."""

        compatible = "notes-v1"

        def can_preserve(self, file: File) -> bool:
            """Only notes."""
            return file.name == "note"

        def preserve(self, args: LiveupdateFileOpArgs) -> None:
            """Nothing to save."""

        unpreserve = retrieve = finish = preserve

    machine, kernel = started()
    registered(kernel)
    kernel.liveupdate.create_session("vm").preserve(File(kernel, "note"), 1)
    successor = kernel.kexec()
    flb = registered(successor)
    successor.liveupdate.retrieve_session("vm")
    for _ in range(2):
        successor.liveupdate.flb.state(flb).incoming.retrieve_status = 0
        successor.liveupdate.flb.state(flb).incoming.obj = None
        successor.liveupdate.flb_get_incoming(flb)
    assert names(machine) == {"luo-retrieved-once"}


def test_folios_moved_out_of_scratch_and_left_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was migrated before it was pinned is a memfd's as well."""
    monkeypatch.setattr(
        "khosim.kernel.liveupdate.memfd_luo.unpreserve_folio_runs", lambda kernel, runs: None
    )
    machine, kernel = started()
    file = guest(kernel)
    session = kernel.liveupdate.create_session("vm")
    session.preserve(file, 1)
    run = next(iter(file.inode.mapping))
    assert kernel.page(run.pfn).owner == "alloc_migration_target"
    session.close()
    assert names(machine) == {"luo-no-leftovers"}
    assert "8 pages" in str(machine.check()[0])  # with those that filled the file's holes


# -- when a file comes back ---------------------------------------------------------------------


def test_lost_seals_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memfd comes back without its seals."""
    machine, kernel = started()
    file = kernel.memfd("guest", size="16K", flags=MFD_ALLOW_SEALING)
    file.add_seals(F_SEAL_GROW)
    kernel.liveupdate.create_session("vm").preserve(file, 1)
    session = kernel.kexec().liveupdate.retrieve_session("vm")
    monkeypatch.setattr(Memfd, "add_seals", lambda self, seals: None)
    session.retrieve(1)
    assert names(machine) == {"luo-file-equal"}
    assert "seals" in str(machine.check()[0])


def test_a_lost_position_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memfd comes back at its beginning."""
    machine, kernel = started()
    file = guest(kernel)
    file.vfs_setpos(17)
    kernel.liveupdate.create_session("vm").preserve(file, 1)
    session = kernel.kexec().liveupdate.retrieve_session("vm")
    monkeypatch.setattr(Memfd, "vfs_setpos", lambda self, pos: None)
    session.retrieve(1)
    assert names(machine) == {"luo-file-equal"}


def test_changed_bytes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte of a memfd changes while it is retrieved."""
    machine, kernel = started()
    file = guest(kernel)
    session = kernel.liveupdate.create_session("vm")
    session.preserve(file, 1)
    phys = next(iter(file.inode.mapping)).pfn << 12  # only now: pinning moved it out of scratch
    successor = kernel.kexec()
    session = successor.liveupdate.retrieve_session("vm")
    setpos = Memfd.vfs_setpos

    def wild(self: Memfd, pos: int) -> None:
        successor.ram.write(phys, b"!", (1, "wild_retrieve"))
        setpos(self, pos)

    monkeypatch.setattr(Memfd, "vfs_setpos", wild)
    session.retrieve(1)
    assert names(machine) == {"luo-file-equal"}
    assert "wild_retrieve in generation 1" in str(machine.check()[0])


def test_a_folio_that_reads_as_zeros_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folio that is not up to date any more will be zeroed by its next reader."""
    machine, kernel = started()
    session = handed(machine, kernel)
    (luo_file,) = session.session.file_set.files
    from khosim.kernel.liveupdate import memfd_luo

    retrieve = memfd_luo.retrieve_folios

    def stale(file: Memfd, *rest: object) -> None:
        retrieve(file, *rest)  # type: ignore[arg-type]
        for run in file.inode.mapping:
            run.uptodate = False

    monkeypatch.setattr(memfd_luo, "retrieve_folios", stale)
    session.retrieve(luo_file.token)
    assert names(machine) == {"luo-file-equal"}
    assert "read as zeros" in str(machine.check()[0])


def test_a_failed_retrieve_is_no_broken_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal is remembered and asked for no more; nothing is claimed to have come back."""
    machine, kernel = started()
    session = handed(machine, kernel)

    def refuse(self: Memfd, seals: int) -> None:
        raise KernelError(1, "memfd_add_seals")

    monkeypatch.setattr(Memfd, "add_seals", refuse)
    for _ in range(2):
        with pytest.raises(KernelError):
            session.retrieve(1)
    assert machine.check() == []
