"""Files of a session: the order of the calls, one owner, and every way to be refused."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import Any

import pytest

from khosim import KernelError, Machine
from khosim.kernel.file import File
from khosim.kernel.kernel import Kernel
from khosim.kernel.liveupdate.file_ops import FileHandler, LiveupdateFileOpArgs, LiveupdateFileOps
from khosim.kernel.liveupdate.luo_session import Session
from khosim.kernel.module import Module

ON = "kho=on liveupdate=on"
PAGE = 4096
PER_BLOCK = (PAGE - 16) // 64


class Gadget(File):
    """A device file with a number."""

    __slots__ = ("number",)

    def __init__(self, kernel: Kernel, number: int) -> None:
        super().__init__(kernel, f"gadget {number}")
        self.number = number


class GadgetHandler(FileHandler):
    """Hands the number over as the handle; ``log`` tells of the calls, ``refuse`` makes errors."""

    compatible = "gadget-v1"

    def __init__(self, compatible: str = "", *, log: list[str] | None = None) -> None:
        super().__init__(compatible)
        self.log = [] if log is None else log
        self.refuse: dict[tuple[str, int], int] = {}
        self.ready = True

    def _call(self, what: str, number: int) -> None:
        self.log.append(f"{what} {number}")
        error = self.refuse.get((what, number))
        if error:
            raise KernelError(error, f"gadget_{what}", f"gadget {number}")

    def can_preserve(self, file: File) -> bool:
        return isinstance(file, Gadget)

    def preserve(self, args: LiveupdateFileOpArgs) -> None:
        assert isinstance(args.file, Gadget)
        assert args.kernel is args.file.kernel
        assert args.handler is self
        self._call("preserve", args.file.number)
        args.serialized_data = args.file.number
        args.private_data = {"of": args.file.number}

    def _outgoing(self, what: str, args: LiveupdateFileOpArgs) -> None:
        assert isinstance(args.file, Gadget)
        assert args.private_data == {"of": args.file.number}
        assert args.serialized_data & 0xFF == args.file.number
        self._call(what, args.file.number)

    def unpreserve(self, args: LiveupdateFileOpArgs) -> None:
        self._outgoing("unpreserve", args)

    def freeze(self, args: LiveupdateFileOpArgs) -> None:
        self._outgoing("freeze", args)
        args.serialized_data += 0x100

    def unfreeze(self, args: LiveupdateFileOpArgs) -> None:
        self._outgoing("unfreeze", args)

    def _incoming(self, what: str, args: LiveupdateFileOpArgs) -> int:
        assert args.private_data is None
        number = args.serialized_data & 0xFF
        self._call(what, number)
        return number

    def retrieve(self, args: LiveupdateFileOpArgs) -> None:
        assert args.file is None
        args.file = Gadget(args.kernel, self._incoming("retrieve", args))

    def can_finish(self, args: LiveupdateFileOpArgs) -> bool:
        self._incoming("can_finish", args)
        assert (args.file is not None) == (args.retrieve_status > 0)
        return self.ready

    def finish(self, args: LiveupdateFileOpArgs) -> None:
        self._incoming(f"finish({args.retrieve_status})", args)


def boot(*, checks: bool = True) -> tuple[Machine, Kernel, GadgetHandler, Session]:
    """A kernel with the handler and a session."""
    machine = Machine("64M", checks=checks)
    kernel = machine.boot(cmdline=ON)
    handler = GadgetHandler()
    kernel.liveupdate.register_file_handler(handler)
    return machine, kernel, handler, kernel.liveupdate.create_session("s")


def successor_of(machine: Machine, kernel: Kernel) -> tuple[Kernel, GadgetHandler, Session]:
    successor = machine.kexec(kernel)
    handler = GadgetHandler()
    successor.liveupdate.register_file_handler(handler)
    return successor, handler, successor.liveupdate.retrieve_session("s")


def refused(error: int, call: Callable[..., object], *args: object) -> KernelError:
    with pytest.raises(KernelError) as caught:
        call(*args)
    assert caught.value.errno == error
    return caught.value


def state(kernel: Kernel) -> tuple[int, int, dict[int, File]]:
    """Free pages (and the tree's), preserved keys, owned files."""
    tree_pages = sum(1 for nr_keys, _ in kernel.kho_out.tree.walk() if not nr_keys)
    keys = sum(nr_keys for nr_keys, _ in kernel.kho_out.tree.walk())
    return (
        kernel.pages.nr_free_pages() + tree_pages,
        keys,
        dict(kernel.liveupdate.preserved_files),
    )


def file_entries(kernel: Kernel, session: Session) -> list[tuple[str, int, int]]:
    """Compatible, data and token of each file as in RAM."""
    found = []
    phys = session.session.file_set.block_set.head_pa
    while phys:
        following, count = struct.unpack("<QQ", kernel.ram.read(phys, 16))
        for i in range(count):
            raw = kernel.ram.read(phys + 16 + 64 * i, 64)
            name, data, token = struct.unpack("<48sQQ", raw)
            found.append((name.rstrip(b"\0").decode(), data, token))
        phys = following
    return found


# -- the order of the calls -----------------------------------------------------------------------


def test_a_life_without_trouble() -> None:
    """Preserve, freeze, retrieve in any order, can_finish for all, then finish back to front."""
    machine, kernel, handler, session = boot()
    for number in (1, 2, 3):
        session.preserve(Gadget(kernel, number), token=number * 10)
    assert handler.log == ["preserve 1", "preserve 2", "preserve 3"]
    assert session.tokens == [10, 20, 30]
    kernel, after, incoming = successor_of(machine, kernel)
    assert handler.log[3:] == ["freeze 1", "freeze 2", "freeze 3"]
    assert incoming.tokens == [10, 20, 30]
    assert incoming.retrieve(30).number == 3
    assert incoming.retrieve(10).number == 1
    incoming.finish()
    assert after.log == [
        "retrieve 3",
        "retrieve 1",
        "can_finish 1",
        "can_finish 2",
        "can_finish 3",
        "finish(1) 3",
        "finish(0) 2",
        "finish(1) 1",
    ]
    assert incoming.tokens == []
    assert kernel.liveupdate.preserved_files == {}
    assert not machine.check()


def test_an_update_that_is_called_off() -> None:
    """Unpreserved back to front."""
    machine, kernel, handler, session = boot()
    for number in (1, 2, 3):
        session.preserve(Gadget(kernel, number), token=number)
    session.close()
    assert handler.log[3:] == ["unpreserve 3", "unpreserve 2", "unpreserve 1"]
    assert not machine.check()


def test_a_freeze_that_is_refused() -> None:
    """Unfrozen are the session's own files front to back, then those of sessions before it."""
    _, kernel, handler, session = boot()
    second, other, last = (kernel.liveupdate.create_session(name) for name in "tuv")
    for number in (1, 2):
        session.preserve(Gadget(kernel, number), token=number)
    for number in (3, 4, 5):
        other.preserve(Gadget(kernel, number), token=number)
    last.preserve(Gadget(kernel, 6), token=6)
    for number in (7, 8):
        second.preserve(Gadget(kernel, number), token=number)
    handler.log.clear()
    handler.refuse["freeze", 5] = errno.EAGAIN
    assert refused(errno.EAGAIN, kernel.liveupdate.reboot).symbol == "gadget_freeze"
    assert handler.log == [
        *(f"freeze {i}" for i in (1, 2, 7, 8, 3, 4, 5)),
        *(f"unfreeze {i}" for i in (3, 4, 7, 8, 1, 2)),
    ]
    said = "luo: Freeze failed for token[0x5] handler[gadget-v1] err[-EAGAIN]"
    assert said in kernel.messages
    assert file_entries(kernel, session) == file_entries(kernel, other) == []
    # A handle that freeze changed stays changed: here it counts the attempts.
    handler.refuse.clear()
    kernel.liveupdate.reboot()
    assert file_entries(kernel, session) == [("gadget-v1", 0x201, 1), ("gadget-v1", 0x202, 2)]
    assert file_entries(kernel, other)[2] == ("gadget-v1", 0x105, 5)
    assert last.tokens == [6]


def test_what_is_written_down() -> None:
    """Name, handle after freezing, token; in the order of preservation, over two blocks."""
    _, kernel, _, session = boot(checks=False)
    tokens = [1 << 63 | i for i in range(PER_BLOCK + 1)]
    for token in tokens:
        session.preserve(Gadget(kernel, token & 0xFF), token)
    kernel.liveupdate.reboot()
    expected = [("gadget-v1", 0x100 | token & 0xFF, token) for token in tokens]
    assert file_entries(kernel, session) == expected


def test_optional_callbacks() -> None:
    """A handler of the five required functions is enough."""
    machine = Machine("64M")
    handlers = []
    kernel = machine.boot(cmdline=ON)

    def make() -> FileHandler:
        gadget = GadgetHandler()
        handlers.append(gadget)
        return FileHandler(
            "bare-v1",
            LiveupdateFileOps(
                can_preserve=gadget.can_preserve,
                preserve=lambda args: setattr(args, "serialized_data", args.file.number),
                unpreserve=lambda args: None,
                retrieve=lambda args: setattr(
                    args, "file", Gadget(args.kernel, args.serialized_data)
                ),
                finish=lambda args: None,
            ),
        )

    kernel.liveupdate.register_file_handler(make())
    session = kernel.liveupdate.create_session("s")
    session.preserve(Gadget(kernel, 5), 1)
    other = kernel.liveupdate.create_session("t")
    other.preserve(Gadget(kernel, 6), 1)
    other.session.file_set.files[0].handler.ops.freeze = _busy
    refused(errno.EBUSY, kernel.liveupdate.reboot)
    other.session.file_set.files[0].handler.ops.freeze = None
    kernel = machine.kexec(kernel)
    kernel.liveupdate.register_file_handler(make())
    incoming = kernel.liveupdate.retrieve_session("s")
    assert incoming.retrieve(1).number == 5
    incoming.finish()
    assert not machine.check()


def _busy(args: LiveupdateFileOpArgs) -> None:
    assert isinstance(args.file, Gadget)
    if args.file.number == 6:
        raise KernelError(errno.EBUSY, "freeze")


# -- refusals of preserve -------------------------------------------------------------------------


def test_preserve_refuses_and_leaves_nothing() -> None:
    """-EEXIST, -ENOENT, -EBUSY, and the handler's own errno."""
    machine, kernel, handler, session = boot()
    gadget = Gadget(kernel, 1)
    session.preserve(gadget, 1)
    other = kernel.liveupdate.create_session("t")
    before = state(kernel)
    refused(errno.EEXIST, session.preserve, Gadget(kernel, 2), 1)
    refused(errno.ENOENT, session.preserve, File(kernel), 2)
    refused(errno.EBUSY, session.preserve, gadget, 2)
    refused(errno.EBUSY, other.preserve, gadget, 2)
    refused(errno.EBADF, session.session.file_set.preserve, 2, None)
    handler.refuse["preserve", 3] = errno.EIO
    unwilling = Gadget(kernel, 3)
    assert refused(errno.EIO, session.preserve, unwilling, 2).symbol == "gadget_preserve"
    assert (gadget.f_count, unwilling.f_count) == (2, 1)
    assert state(kernel) == before
    assert (session.tokens, other.tokens) == ([1], [])
    assert handler.log == ["preserve 1", "preserve 3"]
    assert not machine.check()


def test_a_token_counts_within_its_session() -> None:
    """Two sessions may use the same one."""
    _, kernel, _, session = boot(checks=False)
    other = kernel.liveupdate.create_session("t")
    session.preserve(Gadget(kernel, 1), 0)
    other.preserve(Gadget(kernel, 2), 0)
    assert session.tokens == other.tokens == [0]


@pytest.mark.parametrize("owner", ["kho_alloc_preserve", "xa_insert", "luo_preserve_file"])
def test_preserve_without_memory(owner: str) -> None:
    """-ENOMEM for the block, the entry of the owner and the file; nothing is left."""
    machine, kernel, _, session = boot()
    gadget = Gadget(kernel, 1)
    before = state(kernel)
    kernel.pages.fail = lambda order, asked: asked == owner
    refused(errno.ENOMEM, session.preserve, gadget, 1)
    kernel.pages.fail = None
    assert state(kernel) == before
    assert gadget.f_count == 1
    session.preserve(gadget, 1)
    assert not machine.check()


def test_a_block_for_a_file_that_was_refused_is_freed() -> None:
    """The 64th file needs a second block, and gives it back."""
    _, kernel, handler, session = boot(checks=False)
    for token in range(PER_BLOCK):
        session.preserve(Gadget(kernel, token), token)
    handler.refuse["preserve", 99] = errno.EIO
    blocks = session.session.file_set.block_set
    refused(errno.EIO, session.preserve, Gadget(kernel, 99), 99)
    assert blocks.nblocks == 1
    session.preserve(Gadget(kernel, 98), 98)
    assert blocks.nblocks == 2


def test_the_limit_of_blocks() -> None:
    """-ENOSPC when 10000 blocks are full."""
    _, kernel, _, session = boot(checks=False)
    file_set = session.session.file_set
    file_set.block_set.blocks = [0] * 10000
    file_set.files = [file_set] * (10000 * PER_BLOCK)  # type: ignore[list-item]
    before = state(kernel)
    refused(errno.ENOSPC, session.preserve, Gadget(kernel, 1), 1)
    assert state(kernel) == before


def test_ids_decide_who_is_who() -> None:
    """A handler's get_id tells that two open files are one object."""
    _, kernel, _, session = boot(checks=False)
    guest = kernel.memfd("guest", size=PAGE)
    again = type(guest)(kernel, guest.inode, "again")
    session.preserve(guest, 1)
    refused(errno.EBUSY, session.preserve, again, 2)
    session.close()
    session = kernel.liveupdate.create_session("s")
    session.preserve(again, 2)


def test_the_first_handler_that_wants_a_file_gets_it() -> None:
    """In the order of registration."""
    _, kernel, first, session = boot(checks=False)
    second = GadgetHandler("gadget-v2")
    kernel.liveupdate.register_file_handler(second)
    session.preserve(Gadget(kernel, 1), 1)
    kernel.liveupdate.unregister_file_handler(first)
    session.preserve(Gadget(kernel, 2), 2)
    assert (first.log, second.log) == (["preserve 1"], ["preserve 2"])


# -- registering handlers -------------------------------------------------------------------------


def test_registering() -> None:
    """-EEXIST for a name in use, -EINVAL without a required callback, -EOPNOTSUPP without LUO."""
    _, kernel, handler, _ = boot(checks=False)
    luo = kernel.liveupdate
    assert list(luo.handlers) == ["memfd-v2", "gadget-v1"]
    refused(errno.EEXIST, luo.register_file_handler, GadgetHandler())
    refused(errno.EINVAL, luo.register_file_handler, FileHandler("bare-v1"))
    luo.unregister_file_handler(handler)
    luo.register_file_handler(GadgetHandler())
    off = Machine("64M", checks=False).boot(cmdline="kho=on").liveupdate
    refused(errno.EOPNOTSUPP, off.register_file_handler, GadgetHandler())
    off.unregister_file_handler(handler)


def test_a_handler_without_memory_or_name() -> None:
    """memfd's own handler says so in the log where it cannot be registered."""
    _, kernel, _, _ = boot(checks=False)
    kernel.liveupdate.memfd_init()
    assert kernel.messages[-1] == "Could not register luo filesystem handler: -EEXIST"


def test_modules_are_held() -> None:
    """Each preserved file holds its handler's module; one that goes away preserves nothing."""
    machine, kernel, _, session = boot(checks=False)
    handler = GadgetHandler("gadget-v2")
    kernel.liveupdate.unregister_file_handler(kernel.liveupdate.handlers["gadget-v1"])
    module = handler.ops.owner = Module("gadget")
    kernel.liveupdate.register_file_handler(handler)
    session.preserve(Gadget(kernel, 1), 1)
    handler.refuse["preserve", 2] = errno.EIO
    refused(errno.EIO, session.preserve, Gadget(kernel, 2), 2)
    assert repr(module) == "Module('gadget', refcnt=1)"
    module.live = False
    refused(errno.ENOENT, session.preserve, Gadget(kernel, 3), 3)
    module.live = True
    session.close()
    assert module.refcnt == 0
    held = kernel.liveupdate.create_session("s")
    held.preserve(Gadget(kernel, 1), 1)
    kernel = machine.kexec(kernel)
    after = GadgetHandler("gadget-v2")
    module = after.ops.owner = Module("gadget")
    kernel.liveupdate.register_file_handler(after)
    incoming = kernel.liveupdate.retrieve_session("s")
    assert module.refcnt == 1
    incoming.close()
    assert module.refcnt == 0


# -- the successor --------------------------------------------------------------------------------


def test_retrieve_twice_is_one_file() -> None:
    """The second time it is the same one, with one more reference."""
    machine, kernel, _, session = boot()
    session.preserve(Gadget(kernel, 1), 1)
    _, after, incoming = successor_of(machine, kernel)
    file = incoming.retrieve(1)
    assert incoming.retrieve(1) is file
    assert (file.f_count, after.log) == (3, ["retrieve 1"])
    incoming.finish()
    assert file.f_count == 2
    refused(errno.ENOENT, incoming.retrieve, 1)


def test_a_failed_retrieve_is_remembered() -> None:
    """The same errno again, without asking the handler; finish is told."""
    machine, kernel, _, session = boot()
    session.preserve(Gadget(kernel, 1), 1)
    _, after, incoming = successor_of(machine, kernel)
    after.refuse["retrieve", 1] = errno.EIO
    refused(errno.EIO, incoming.retrieve, 1)
    after.refuse.clear()
    assert refused(errno.EIO, incoming.retrieve, 1).symbol == "luo_retrieve_file"
    refused(errno.ENOENT, incoming.retrieve, 2)
    incoming.finish()
    assert after.log == ["retrieve 1", "can_finish 1", "finish(-5) 1"]


def test_a_retrieved_file_is_owned() -> None:
    """It cannot be preserved again until its session is finished."""
    machine, kernel, _, session = boot()
    session.preserve(Gadget(kernel, 1), 1)
    kernel, _, incoming = successor_of(machine, kernel)
    file = incoming.retrieve(1)
    outgoing = kernel.liveupdate.create_session("next")
    refused(errno.EBUSY, outgoing.preserve, file, 1)
    incoming.finish()
    outgoing.preserve(file, 1)
    assert list(kernel.liveupdate.preserved_files.values()) == [file]


def test_a_retrieved_file_that_cannot_be_owned() -> None:
    """A warning, and the file is handed out all the same."""
    machine, kernel, _, session = boot()
    session.preserve(Gadget(kernel, 1), 1)
    kernel, _, incoming = successor_of(machine, kernel)
    kernel.pages.fail = lambda order, owner: owner == "xa_insert"
    file = incoming.retrieve(1)
    kernel.pages.fail = None
    assert kernel.messages[-1].startswith("WARNING: luo_retrieve_file: xa_insert: -ENOMEM")
    assert kernel.liveupdate.preserved_files == {}
    incoming.finish()
    assert file.f_count == 1


def test_finish_waits_for_everybody() -> None:
    """-EBUSY and nothing done while one file is not ready; on release the session is lost."""
    machine, kernel, _, session = boot()
    for number in (1, 2):
        session.preserve(Gadget(kernel, number), number)
    kernel, after, incoming = successor_of(machine, kernel)
    file = incoming.retrieve(2)
    after.log.clear()
    after.ready = False
    refused(errno.EBUSY, incoming.finish)
    assert after.log == ["can_finish 1"]
    assert incoming.tokens == [1, 2]
    incoming.close()
    assert kernel.messages[-1] == "luo: Unable to finish session [s] on release"
    refused(errno.EINVAL, kernel.liveupdate.retrieve_session, "s")
    assert kernel.liveupdate.sessions.incoming.count == 1
    assert file.f_count == 2


def test_an_unknown_handler_costs_the_session() -> None:
    """-EIO at the device for ever; the handler comes too late."""
    machine, kernel, _, session = boot()
    session.preserve(Gadget(kernel, 1), 1)
    kernel = machine.kexec(kernel)
    refused(errno.EIO, kernel.liveupdate.open)
    assert kernel.liveupdate.sessions.deserialized == -errno.ENOENT
    kernel.liveupdate.register_file_handler(GadgetHandler())
    refused(errno.EIO, kernel.liveupdate.open)
    said = "luo: No registered handler for compatible 'gadget-v1'"
    assert said in kernel.messages
    assert not machine.check()


def patched(machine: Machine, kernel: Kernel, session: Session, at: int, data: bytes) -> Kernel:
    """The successor, with bytes of the first file block changed on the way."""
    machine.load_successor(kernel)
    block = session.session.file_set.block_set.head_pa
    machine.hardware.ram.write(block + at, data, (9, "test"))
    kernel = machine.resume()
    kernel.liveupdate.register_file_handler(GadgetHandler())
    return kernel


@pytest.mark.parametrize("count", [1, 3])
def test_a_count_that_does_not_fit(count: int) -> None:
    """-EINVAL where the blocks hold more or fewer files than announced."""
    machine, kernel, _, session = boot(checks=False)
    for number in (1, 2):
        session.preserve(Gadget(kernel, number), number)
    kernel = patched(machine, kernel, session, 8, struct.pack("<Q", count))
    module = kernel.liveupdate.handlers["gadget-v1"].ops.owner = Module("gadget")
    if count == 3:  # the third entry is all zeros
        raw = b"gadget-v1".ljust(48, b"\0") + struct.pack("<QQ", 3, 3)
        block = session.session.file_set.block_set.head_pa
        machine.hardware.ram.write(block + 16 + 128, raw, (9, "test"))
    refused(errno.EIO, kernel.liveupdate.open)
    assert kernel.liveupdate.sessions.deserialized == -errno.EINVAL
    assert f"luo: File count mismatch: expected 2, found {count}" in kernel.messages
    assert module.refcnt == 0
    incoming = kernel.liveupdate.sessions.incoming.sessions["s"].file_set
    assert (incoming.count, incoming.block_set.nblocks) == (0, 0)


def test_a_chain_of_files_that_loops() -> None:
    """-EINVAL from the block set."""
    machine, kernel, _, session = boot(checks=False)
    session.preserve(Gadget(kernel, 1), 1)
    head = session.session.file_set.block_set.head_pa
    kernel = patched(machine, kernel, session, 0, struct.pack("<Q", head))
    refused(errno.EIO, kernel.liveupdate.open)
    assert kernel.liveupdate.sessions.deserialized == -errno.EINVAL


def test_two_files_of_one_token() -> None:
    """Nobody looks for that: the first one is retrieved, both are finished."""
    machine, kernel, _, session = boot(checks=False)
    for number in (1, 2):
        session.preserve(Gadget(kernel, number), number)
    kernel = patched(machine, kernel, session, 16 + 64 + 56, struct.pack("<Q", 1))
    incoming = kernel.liveupdate.retrieve_session("s")
    assert incoming.tokens == [1, 1]
    assert incoming.retrieve(1).number == 1
    incoming.finish()
    handler: Any = kernel.liveupdate.handlers["gadget-v1"]
    assert handler.log[-2:] == ["finish(0) 2", "finish(1) 1"]


def test_deserialization_without_memory() -> None:
    """-ENOMEM for a file, and the session is lost."""
    machine, kernel, _, session = boot()
    session.preserve(Gadget(kernel, 1), 1)
    kernel = machine.kexec(kernel)
    handler = GadgetHandler()
    module = handler.ops.owner = Module("gadget")
    kernel.liveupdate.register_file_handler(handler)
    kernel.pages.fail = lambda order, owner: owner == "luo_file_deserialize_one"
    refused(errno.EIO, kernel.liveupdate.open)
    kernel.pages.fail = None
    assert module.refcnt == 0
    assert kernel.liveupdate.sessions.deserialized == -errno.ENOMEM
    assert not machine.check()


def test_finish_shrinks_the_predecessors_blocks() -> None:
    """All of them are the allocator's again."""
    machine, kernel, _, session = boot(checks=False)
    for token in range(PER_BLOCK * 2 + 1):
        session.preserve(Gadget(kernel, token & 0x7F), token)
    blocks = list(session.session.file_set.block_set.blocks)
    kernel, _, incoming = successor_of(machine, kernel)
    assert {kernel.page(phys >> 12).kind for phys in blocks} == {"incoming"}
    incoming.finish()
    assert "incoming" not in {kernel.page(phys >> 12).kind for phys in blocks}
    assert incoming.session.file_set.block_set.is_empty
