"""State that is shared by files: references in both directions, and what is counted wrong."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

import pytest

from khosim import InputError, KernelError, KernelPanic, Machine
from khosim.kernel.file import File
from khosim.kernel.kernel import Kernel
from khosim.kernel.liveupdate.file_ops import FileHandler, LiveupdateFileOpArgs
from khosim.kernel.liveupdate.flb_ops import Flb, LiveupdateFlbOpArgs, LiveupdateFlbOps
from khosim.kernel.liveupdate.luo_session import Session
from khosim.kernel.module import Module
from khosim.kernel.refcount import REFCOUNT_SATURATED, Refcount

ON = "kho=on liveupdate=on"


class Thing(File):
    """A file of the handler below."""

    __slots__ = ()


class ThingHandler(FileHandler):
    """A handler with nothing to do."""

    compatible = "thing-v1"
    refuse = 0

    def can_preserve(self, file: File) -> bool:
        return isinstance(file, Thing)

    def preserve(self, args: LiveupdateFileOpArgs) -> None:
        if self.refuse:
            raise KernelError(self.refuse, "thing_preserve")

    def unpreserve(self, args: LiveupdateFileOpArgs) -> None:
        pass

    def retrieve(self, args: LiveupdateFileOpArgs) -> None:
        args.file = Thing(args.kernel)

    def finish(self, args: LiveupdateFileOpArgs) -> None:
        pass


class Shared(Flb):
    """An object whose state is a page; ``log`` tells of the calls, ``refuse`` makes errors."""

    compatible = "shared-v1"

    def __init__(self, compatible: str = "", log: list[str] | None = None) -> None:
        super().__init__(compatible)
        self.log = [] if log is None else log
        self.refuse: dict[str, int] = {}

    def _call(self, what: str) -> None:
        self.log.append(f"{what} {self.compatible}")
        if what in self.refuse:
            raise KernelError(self.refuse[what], f"shared_{what}")

    def preserve(self, args: LiveupdateFlbOpArgs) -> None:
        assert (args.flb, args.data, args.obj) == (self, 0, None)
        self._call("preserve")
        args.obj = args.kernel.kho_alloc_preserve(8)
        args.obj.write(0, self.compatible.encode()[:8])
        args.data = args.obj.phys

    def unpreserve(self, args: LiveupdateFlbOpArgs) -> None:
        assert args.data == args.obj.phys
        self._call("unpreserve")
        args.kernel.kho_unpreserve_free(args.obj)

    def retrieve(self, args: LiveupdateFlbOpArgs) -> None:
        self._call("retrieve")
        args.obj = args.kernel.ram.read(args.data, 8)
        args.kernel.kho_restore_free(args.data)

    def finish(self, args: LiveupdateFlbOpArgs) -> None:
        assert args.data == 0
        assert args.obj == self.compatible.encode()[:8]
        self._call("finish")


def refused(error: int, call: Callable[..., object], *args: object) -> KernelError:
    with pytest.raises(KernelError) as caught:
        call(*args)
    assert caught.value.errno == error
    return caught.value


def prepare(kernel: Kernel, *names: str) -> tuple[ThingHandler, list[Shared], list[str]]:
    """The handler with as many objects as names, and one log for all."""
    log: list[str] = []
    handler = ThingHandler()
    kernel.liveupdate.register_file_handler(handler)
    flbs = [Shared(name, log) for name in names or ("shared-v1",)]
    for flb in flbs:
        kernel.liveupdate.register_flb(handler, flb)
    return handler, flbs, log


def boot(*names: str) -> tuple[Machine, Kernel, Session, list[Shared], list[str]]:
    machine = Machine("64M")
    kernel = machine.boot(cmdline=ON)
    _, flbs, log = prepare(kernel, *names)
    return machine, kernel, kernel.liveupdate.create_session("s"), flbs, log


def counts(kernel: Kernel, flb: Flb) -> tuple[int, int]:
    """References in and out."""
    state = kernel.liveupdate.flb.state(flb)
    return state.incoming.count.value, state.outgoing.count.value


# -- the old kernel -------------------------------------------------------------------------------


def test_the_first_and_the_last_file() -> None:
    """Preserved with the first, unpreserved with the last, across sessions."""
    machine, kernel, session, (flb,), log = boot()
    other = kernel.liveupdate.create_session("t")
    refused(errno.ENOENT, kernel.liveupdate.flb_get_outgoing, flb)
    session.preserve(Thing(kernel), 1)
    session.preserve(Thing(kernel), 2)
    other.preserve(Thing(kernel), 1)
    assert counts(kernel, flb) == (0, 3)
    session.close()
    assert counts(kernel, flb) == (0, 1)
    assert log == ["preserve shared-v1"]
    other.close()
    assert counts(kernel, flb) == (0, 0)
    assert log == ["preserve shared-v1", "unpreserve shared-v1"]
    refused(errno.ENOENT, kernel.liveupdate.flb_get_outgoing, flb)
    again = kernel.liveupdate.create_session("s")
    again.preserve(Thing(kernel), 1)
    assert log[2:] == ["preserve shared-v1"]
    assert not machine.check()


def test_in_order_and_back() -> None:
    """Several objects of one handler: in the order of registration, undone in reverse."""
    machine, kernel, session, _, log = boot("a", "b", "c")
    session.preserve(Thing(kernel), 1)
    session.close()
    assert log == [f"preserve {x}" for x in "abc"] + [f"unpreserve {x}" for x in "cba"]
    assert not machine.check()


def test_an_object_that_refuses() -> None:
    """All or none: those before it are unpreserved, and the file is not preserved."""
    machine, kernel, session, flbs, log = boot("a", "b", "c")
    flbs[2].refuse["preserve"] = errno.EIO
    assert refused(errno.EIO, session.preserve, Thing(kernel), 1).symbol == "shared_preserve"
    assert log == ["preserve a", "preserve b", "preserve c", "unpreserve b", "unpreserve a"]
    assert [counts(kernel, flb) for flb in flbs] == [(0, 0)] * 3
    assert kernel.liveupdate.preserved_files == {}
    del flbs[2].refuse["preserve"]
    session.preserve(Thing(kernel), 1)
    assert not machine.check()


def test_a_handler_that_refuses() -> None:
    """The file's reference to the object is given back."""
    machine, kernel, session, (flb,), log = boot()
    handler = kernel.liveupdate.handlers["thing-v1"]
    assert isinstance(handler, ThingHandler)
    handler.refuse = errno.EIO
    refused(errno.EIO, session.preserve, Thing(kernel), 1)
    assert log == ["preserve shared-v1", "unpreserve shared-v1"]
    assert counts(kernel, flb) == (0, 0)
    assert not machine.check()


def test_outgoing_references() -> None:
    """Who gets the object keeps it preserved, also when all files are gone."""
    machine, kernel, session, (flb,), log = boot()
    session.preserve(Thing(kernel), 1)
    obj = kernel.liveupdate.flb_get_outgoing(flb)
    assert obj.phys == kernel.liveupdate.flb.state(flb).outgoing.data
    session.close()
    assert (counts(kernel, flb), log) == ((0, 1), ["preserve shared-v1"])
    kernel.liveupdate.flb_put_outgoing(flb)
    assert log[1:] == ["unpreserve shared-v1"]
    assert not machine.check()


def test_what_is_written_down() -> None:
    """Objects that nobody refers to are left out."""
    _, kernel, session, flbs, _ = boot("a", "b")
    luo = kernel.liveupdate
    other = ThingHandler("thing-v2")
    luo.register_file_handler(other)
    luo.register_flb(other, Shared("unused"))
    luo.register_flb(other, flbs[0])
    for token in range(2):
        session.preserve(Thing(kernel), token)
    luo.reboot()
    page = kernel.ram.read(luo.flb.outgoing_pa, 4096)
    data = [luo.flb.state(flb).outgoing.data for flb in flbs]
    expected = struct.pack("<QQ", 1, 2)
    expected += struct.pack("<48sQQ", b"a", data[0], 2) + struct.pack("<48sQQ", b"b", data[1], 2)
    assert page == expected.ljust(4096, b"\0")


# -- the successor --------------------------------------------------------------------------------


def handed_over(*names: str) -> tuple[Machine, Kernel, Session, list[Shared], list[str]]:
    """A successor with two files of the handler; one of the predecessor's references is held."""
    machine, kernel, session, _, _ = boot(*names)
    session.preserve(Thing(kernel), 1)
    session.preserve(Thing(kernel), 2)
    kernel = machine.kexec(kernel)
    _, flbs, log = prepare(kernel, *names)
    return machine, kernel, kernel.liveupdate.retrieve_session("s"), flbs, log


def test_retrieved_once_finished_with_the_last_file() -> None:
    """The same object for everybody; -ENODATA when it is finished."""
    machine, kernel, session, (flb,), log = handed_over()
    luo = kernel.liveupdate
    assert luo.flb_get_incoming(flb) == luo.flb_get_incoming(flb) == b"shared-v"
    assert counts(kernel, flb) == (4, 0)
    luo.flb_put_incoming(flb)
    session.finish()
    assert (counts(kernel, flb), log) == ((1, 0), ["retrieve shared-v1"])
    luo.flb_put_incoming(flb)
    assert log == ["retrieve shared-v1", "finish shared-v1"]
    assert counts(kernel, flb) == (0, 0)
    refused(errno.ENODATA, luo.flb_get_incoming, flb)
    assert not machine.check()


def test_finished_in_reverse() -> None:
    """Several objects: the last one first."""
    machine, kernel, session, flbs, log = handed_over("a" * 8, "b" * 8)
    for flb in flbs:
        kernel.liveupdate.flb_get_incoming(flb)
        kernel.liveupdate.flb_put_incoming(flb)
    session.close()
    assert log[2:] == ["finish bbbbbbbb", "finish aaaaaaaa"]
    assert not machine.check()


def test_an_object_that_nobody_retrieves_is_lost() -> None:
    """The kernel counts down from 0: a warning, and neither retrieve nor finish is ever called."""
    machine, kernel, session, (flb,), log = handed_over()
    session.finish()
    assert "WARNING: refcount_t: underflow; use-after-free." in kernel.messages
    assert (counts(kernel, flb), log) == ((REFCOUNT_SATURATED, 0), [])
    # Asking later sets the count to what was handed over; no file is left to give it back.
    assert kernel.liveupdate.flb_get_incoming(flb) == b"shared-v"
    assert counts(kernel, flb) == (3, 0)
    assert not machine.check()


def test_a_reference_held_at_the_jump_is_never_given_back() -> None:
    """It is counted like a file, so the successor's files do not reach 0."""
    machine, kernel, session, (flb,), _ = boot()
    session.preserve(Thing(kernel), 1)
    kernel.liveupdate.flb_get_outgoing(flb)
    kernel = machine.kexec(kernel)
    _, (flb,), log = prepare(kernel)
    incoming = kernel.liveupdate.retrieve_session("s")
    kernel.liveupdate.flb_get_incoming(flb)
    kernel.liveupdate.flb_put_incoming(flb)
    incoming.finish()
    assert (counts(kernel, flb), log) == ((1, 0), ["retrieve shared-v1"])


def test_a_failed_retrieve_is_remembered() -> None:
    """The same errno for ever, and no finish: a warning with the last file."""
    _, kernel, session, (flb,), log = handed_over()
    flb.refuse["retrieve"] = errno.EIO
    assert refused(errno.EIO, kernel.liveupdate.flb_get_incoming, flb).symbol == "shared_retrieve"
    flb.refuse.clear()
    said = refused(errno.EIO, kernel.liveupdate.flb_get_incoming, flb)
    assert said.symbol == "luo_flb_retrieve_one"
    session.finish()
    assert log == ["retrieve shared-v1"]
    assert any(m.startswith("WARNING: liveupdate_flb_put_incoming") for m in kernel.messages)
    assert counts(kernel, flb) == (0, 0)


def test_what_did_not_come() -> None:
    """-ENODATA on a cold boot, -ENOENT for an object that is not among those handed over."""
    machine, kernel, session, (flb,), _ = boot()
    refused(errno.ENODATA, kernel.liveupdate.flb_get_incoming, flb)
    session.preserve(Thing(kernel), 1)
    kernel = machine.kexec(kernel)
    refused(errno.ENOENT, kernel.liveupdate.flb_get_incoming, Shared("other-v1"))
    assert kernel.liveupdate.flb_get_incoming(Shared()) == b"shared-v"


def test_a_page_of_objects_that_is_not_there() -> None:
    """A page fault, but only when somebody looks for an object."""
    machine, kernel, _, (flb,), _ = boot()
    machine.load_successor(kernel)
    root = kernel.liveupdate.luo_ser_out
    machine.hardware.ram.write(root + 24, struct.pack("<Q", 1 << 40), (9, "test"))
    kernel = machine.resume()
    with pytest.raises(KernelPanic, match="page fault"):
        kernel.liveupdate.flb_get_incoming(flb)


def test_a_count_of_objects_beyond_memory() -> None:
    """The kernel reads on until it faults."""
    machine, kernel, _, (flb,), _ = boot()
    machine.load_successor(kernel)
    page = kernel.liveupdate.flb.outgoing_pa
    machine.hardware.ram.write(page + 8, b"\xff" * 8, (9, "test"))
    kernel = machine.resume()
    with pytest.raises(KernelPanic, match="page fault"):
        kernel.liveupdate.flb_get_incoming(flb)


# -- registering ----------------------------------------------------------------------------------


def test_registering() -> None:
    """-EEXIST twice over, -EINVAL for missing callbacks, -ENOMEM."""
    _, kernel, _, (flb,), _ = boot()
    luo = kernel.liveupdate
    handler = luo.handlers["thing-v1"]
    register = luo.register_flb
    refused(errno.EEXIST, register, handler, flb)
    refused(errno.EEXIST, register, handler, Shared())
    refused(errno.EINVAL, register, handler, Flb("bare-v1"))
    refused(errno.EINVAL, register, handler, Flb("half", LiveupdateFlbOps(preserve=print)))
    kernel.pages.fail = lambda order, owner: owner == "liveupdate_register_flb"
    refused(errno.ENOMEM, register, handler, Shared("new"))
    kernel.pages.fail = None
    register(luo.handlers["memfd-v2"], flb)
    assert [private.users for private in luo.flb.registered] == [2]
    assert Flb("bare-v1").ops.missing() == ["preserve", "unpreserve", "retrieve", "finish"]


def test_the_limit() -> None:
    """63 objects fill the page; -ENOSPC for one more, but not for another handler of an old one."""
    _, kernel, _, (flb,), _ = boot()
    luo = kernel.liveupdate
    handler = luo.handlers["thing-v1"]
    for number in range(62):
        luo.register_flb(handler, Shared(f"flb {number}"))
    refused(errno.ENOSPC, luo.register_flb, handler, Shared("one more"))
    luo.register_flb(luo.handlers["memfd-v2"], flb)


def test_unregistering() -> None:
    """From one handler, or with the handler itself; what is not there is a line in the log."""
    _, kernel, session, (flb,), log = boot()
    luo = kernel.liveupdate
    handler, memfd = luo.handlers["thing-v1"], luo.handlers["memfd-v2"]
    luo.register_flb(memfd, flb)
    luo.unregister_flb(handler, flb)
    session.preserve(Thing(kernel), 1)
    assert log == []
    assert len(luo.flb.registered) == 1
    luo.unregister_flb(handler, flb)
    assert kernel.messages[-1] == (
        "luo: Failed to unregister FLB 'shared-v1': not found in file handler 'thing-v1'"
    )
    luo.unregister_file_handler(memfd)
    assert luo.flb.registered == []
    luo.register_flb(handler, Shared())


def test_a_handler_that_is_not_registered() -> None:
    """One that never was kills the kernel, one that was is taken; with the switch both -EINVAL."""
    _, kernel, _, _, _ = boot()
    luo = kernel.liveupdate
    memfd = luo.handlers["memfd-v2"]
    luo.unregister_file_handler(memfd)
    luo.register_flb(memfd, Shared("new"))
    assert len(luo.flb.registered) == 2
    with pytest.raises(KernelPanic, match="NULL pointer dereference in liveupdate_register_flb"):
        luo.register_flb(ThingHandler(), Shared("newer"))
    kernel = Machine("64M").boot("7.3+fix_flb_handler=on", cmdline="kho=on liveupdate=on")
    luo = kernel.liveupdate
    memfd = luo.handlers["memfd-v2"]
    luo.unregister_file_handler(memfd)
    for handler in (memfd, ThingHandler()):
        refused(errno.EINVAL, luo.register_flb, handler, Shared("new"))
    assert luo.flb.registered == []


def test_without_luo() -> None:
    """-EOPNOTSUPP, and unregistering does nothing."""
    luo = Machine("64M", checks=False).boot(cmdline="kho=on").liveupdate
    handler, flb = ThingHandler(), Shared()
    refused(errno.EOPNOTSUPP, luo.register_flb, handler, flb)
    refused(errno.EOPNOTSUPP, luo.flb_get_incoming, flb)
    refused(errno.EOPNOTSUPP, luo.flb_get_outgoing, flb)
    luo.unregister_flb(handler, flb)


def test_modules() -> None:
    """An object in use holds its module; -ENODEV in both directions while that goes away."""
    machine, kernel, session, (flb,), log = boot()
    module = flb.ops.owner = Module("shared")
    module.live = False
    refused(errno.ENODEV, session.preserve, Thing(kernel), 1)
    module.live = True
    flb.refuse["preserve"] = errno.EIO
    refused(errno.EIO, session.preserve, Thing(kernel), 1)
    assert module.refcnt == 0
    flb.refuse.clear()
    session.preserve(Thing(kernel), 1)
    session.preserve(Thing(kernel), 2)
    assert module.refcnt == 1
    session.close()
    assert module.refcnt == 0
    session = kernel.liveupdate.create_session("s")
    session.preserve(Thing(kernel), 1)
    kernel = machine.kexec(kernel)
    _, (flb,), log = prepare(kernel)
    module = flb.ops.owner = Module("shared")
    module.live = False
    refused(errno.ENODEV, kernel.liveupdate.flb_get_incoming, flb)
    module.live = True
    flb.refuse["retrieve"] = errno.EIO
    assert log == []
    kernel.liveupdate.flb.state(flb).incoming.retrieve_status = 0
    refused(errno.EIO, kernel.liveupdate.flb_get_incoming, flb)
    assert module.refcnt == 0
    flb.refuse.clear()
    kernel.liveupdate.flb.state(flb).incoming.retrieve_status = 0
    kernel.liveupdate.flb_get_incoming(flb)
    kernel.liveupdate.flb_put_incoming(flb)
    assert module.refcnt == 1
    kernel.liveupdate.retrieve_session("s").close()
    assert (module.refcnt, log[-1]) == (0, "finish shared-v1")


@pytest.mark.parametrize("name", ["", "x" * 48, "nul\0inside"])
def test_names_that_do_not_fit(name: str) -> None:
    """47 bytes and a NUL are all there is room for."""
    with pytest.raises(InputError, match="is not 1 to 47 bytes"):
        Flb(name)
    assert repr(Flb("x")) == "Flb('x')"


# -- reference counts -----------------------------------------------------------------------------


def test_reference_counts() -> None:
    """Up and down; from 0 and beyond the end they stick, with a warning of each kind."""
    kernel = Machine("64M", checks=False).boot()
    count = Refcount(kernel)
    count.set(2)
    count.inc()
    assert [count.dec_and_test() for _ in range(3)] == [False, False, True]
    assert (count.value, repr(count)) == (0, "Refcount(0)")
    before = len(kernel.messages)
    for _ in range(2):
        count.set(0)
        count.inc()
        assert count.value == REFCOUNT_SATURATED
        count.set((1 << 31) - 1)
        count.inc()
        assert count.value == REFCOUNT_SATURATED
        count.set(0)
        assert not count.dec_and_test()
        assert count.value == REFCOUNT_SATURATED
    assert not count.dec_and_test()
    assert [line.split(": ")[2] for line in kernel.messages[before:]] == [
        "addition on 0; use-after-free.",
        "saturated; leaking memory.",
        "underflow; use-after-free.",
    ]
    count.set((1 << 32) + 5)
    assert count.value == 5
    count.set(1 << 31)
    assert count.value == -(1 << 31)
