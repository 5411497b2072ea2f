"""The steps of a live update, as a listener sees them."""

from __future__ import annotations

import errno

from khosim import KernelError, Machine
from khosim.kernel.liveupdate.flb_ops import Flb, LiveupdateFlbOps
from khosim.kernel.trace import Event

ON = "kho=on liveupdate=on"


def shared() -> Flb:
    def nothing(args: object) -> None:
        del args

    ops = LiveupdateFlbOps(preserve=nothing, unpreserve=nothing, retrieve=nothing, finish=nothing)
    return Flb("shared-v1", ops)


def a_life(seed: int) -> list[Event]:
    """Preserve, fail to freeze, hand over, retrieve, finish; all events of it."""
    events: list[Event] = []
    machine = Machine("64M", allocator="adversarial", seed=seed)
    machine.listen(events.append)
    kernel = machine.boot(cmdline=ON)
    luo = kernel.liveupdate
    luo.register_flb(luo.handlers["memfd-v2"], shared())
    session, other = luo.create_session("a"), luo.create_session("b")
    for token in (1, 2):
        session.preserve(kernel.memfd("f", size=5000), token)
    other.preserve(kernel.memfd("g"), 1)
    luo_file = other.session.file_set.files[0]
    handle, luo_file.serialized_data = luo_file.serialized_data, 0
    for call in (lambda: luo.create_session("a"), lambda: session.preserve(kernel.memfd("h"), 1)):
        assert errno_of(call) == errno.EEXIST
    assert errno_of(lambda: machine.kexec(kernel)) == errno.EINVAL
    luo_file.serialized_data = handle
    other.close()
    kernel = machine.kexec(kernel)
    luo = kernel.liveupdate
    flb = shared()
    luo.register_flb(luo.handlers["memfd-v2"], flb)
    luo.flb_get_incoming(flb)
    luo.flb_put_incoming(flb)
    incoming = luo.retrieve_session("a")
    incoming.retrieve(1)
    incoming.close()
    return events


def errno_of(call: object) -> int:
    try:
        call()  # type: ignore[operator]
    except KernelError as refused:
        return refused.errno
    return 0


def test_every_step_is_an_event() -> None:
    """In the order of the kernel's functions, with their results."""
    steps = [
        (event.generation, event.symbol, event.result)
        for event in a_life(1)
        if "luo_" in event.symbol or "liveupdate" in event.symbol
    ]
    booted = [
        (0, "luo_late_startup", 0),
        (0, "liveupdate_register_file_handler", 0),
        (0, "liveupdate_register_flb", 0),
    ]
    preserved = [(0, "memfd_luo_preserve", 0), (0, "luo_preserve_file", 0)]
    assert steps == [
        *booted,
        (0, "luo_session_create", 0),
        (0, "luo_session_create", 0),
        (0, "luo_flb_file_preserve_one", 0),
        *preserved * 3,
        (0, "luo_session_create", -errno.EEXIST),
        (0, "luo_preserve_file", -errno.EEXIST),
        (0, "memfd_luo_freeze", 0),
        (0, "memfd_luo_freeze", 0),
        (0, "luo_file_freeze", 0),
        (0, "luo_file_unfreeze", None),
        (0, "luo_file_unfreeze", None),
        (0, "luo_session_serialize", -errno.EINVAL),
        (0, "memfd_luo_unpreserve", None),
        (0, "luo_file_unpreserve_files", None),
        (0, "luo_session_release", 0),
        (0, "memfd_luo_freeze", 0),
        (0, "memfd_luo_freeze", 0),
        (0, "luo_file_freeze", 0),
        (0, "luo_session_serialize", 0),
        (0, "luo_flb_serialize", 1),
        (1, "luo_early_startup", 1),
        *((1, symbol, result) for _, symbol, result in booted),
        (1, "luo_flb_retrieve_one", 0),
        (1, "luo_session_deserialize", 0),
        (1, "luo_session_retrieve", 0),
        (1, "memfd_luo_retrieve", 0),
        (1, "luo_retrieve_file", 0),
        (1, "memfd_luo_finish", None),
        (1, "liveupdate_flb_put_incoming", None),
        (1, "luo_file_finish", 0),
        (1, "luo_session_release", 0),
    ]


def test_equal_seeds_give_equal_traces() -> None:
    """Also where ids of files and references to them are involved."""
    assert a_life(5) == a_life(5)
    assert a_life(5) != a_life(6)
