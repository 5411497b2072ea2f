"""What LUO and memfd handover do differently in older releases, one behaviour after the other."""

from __future__ import annotations

import pytest

from khosim import KernelError, KernelPanic, Machine
from khosim.bugs.entries.d20_file_uaf import Driver, DriversHandler
from khosim.bugs.live import Device
from khosim.inspect.blob import inspect_blob
from khosim.kernel.kexec import kernel_kexec
from khosim.kernel.liveupdate.file_ops import FileHandler
from khosim.kernel.liveupdate.flb_ops import Flb
from khosim.kernel.module import Module
from khosim.kernel.release import find_release

CMDLINE = "kho=on liveupdate=on"
PAGE = 4096


def boot(release, *, ram="256M", **changes):
    """A machine and its first kernel with live update on."""
    machine = Machine(ram)
    return machine, machine.boot(find_release(release).evolve(**changes), cmdline=CMDLINE)


def errno_of(call, *args):
    """The name of the errno that a call is refused with, or None."""
    try:
        call(*args)
    except KernelError as refused:
        return refused.name
    return None


@pytest.mark.parametrize(("release", "answer"), [("7.1", None), ("7.2", "EINVAL")])
def test_names(release, answer):
    """e947433cd0d2: empty and overlong names; an overlong one is cut to 63 bytes before."""
    _, kernel = boot(release)
    create = kernel.liveupdate.create_session
    assert errno_of(create, "") == answer
    assert errno_of(create, "x" * 70) == answer
    if answer is None:
        assert "x" * 63 in kernel.liveupdate.sessions.outgoing.sessions


@pytest.mark.parametrize(("release", "answer"), [("7.1", None), ("7.2", "EINVAL")])
def test_types_of_sessions(release, answer):
    """507e3b479f9c: preserving into a session of the predecessor's."""
    _, kernel = boot(release)
    kernel.liveupdate.create_session("vm")
    successor = kernel.kexec()
    session = successor.liveupdate.retrieve_session("vm")
    assert errno_of(session.preserve, successor.memfd("mine", size="4K"), 1) == answer


@pytest.mark.parametrize(("release", "answer"), [("6.19", None), ("7.0", None), ("7.1", "EBUSY")])
def test_one_owner(release, answer):
    """00d0b372374f and bc3a5763f466: one file in two sessions."""
    machine, kernel = boot(release)
    guest = kernel.memfd("guest", size="16K")
    for name in ("a", "b"):
        session = kernel.liveupdate.create_session(name)
        told = errno_of(session.preserve, guest, 1)
    assert told == answer
    successor = kernel.kexec()
    if answer is None:
        sessions = [successor.liveupdate.retrieve_session(name) for name in ("a", "b")]
        assert errno_of(sessions[0].retrieve, 1) is None
        assert errno_of(sessions[1].retrieve, 1) == "EIO"
    else:
        assert machine.check() == []


@pytest.mark.parametrize(("release", "tries"), [("6.19", 2), ("7.0", 1), ("7.3", 1)])
def test_a_retrieve_that_failed(release, tries):
    """f85b1c6af5bc: tried again in 6.19, remembered since."""
    asked = []

    class Stubborn(FileHandler):
        compatible = "stubborn-v1"

        def can_preserve(self, file):
            return True

        def preserve(self, args):
            args.serialized_data = 7

        def unpreserve(self, args):
            pass

        def retrieve(self, args):
            asked.append(args.serialized_data)
            raise KernelError(5, "retrieve", "no")

        def finish(self, args):
            pass

    _, kernel = boot(release)
    handler = Stubborn()
    kernel.liveupdate.handlers.clear()
    kernel.liveupdate.register_file_handler(handler)
    kernel.liveupdate.create_session("s").preserve(kernel.memfd("f", size="4K"), 1)
    successor = kernel.kexec()
    successor.liveupdate.register_file_handler(handler)
    session = successor.liveupdate.retrieve_session("s")
    for _ in range(2):
        assert errno_of(session.retrieve, 1) == "EIO"
    assert len(asked) == tries


@pytest.mark.parametrize(("release", "frozen"), [("7.1", True), ("7.2", False)])
def test_a_kexec_that_comes_back(release, frozen):
    """5eff62b051fb: a context-preserving kexec serializes the sessions although nobody needs it."""
    machine, kernel = boot(release)
    kernel.liveupdate.create_session("vm")
    image = kernel.kexec_file_load(machine._last_boot[0], initrd_bytes=1 << 20, cmdline=CMDLINE)
    image.preserve_context = True
    kernel_kexec(kernel, image)
    assert kernel.liveupdate.sessions.serialized is frozen


@pytest.mark.parametrize(("release", "kept"), [("6.19", False), ("7.0", True), ("7.3", True)])
def test_a_folio_that_is_not_up_to_date(release, kept):
    """50d7b4332f27: fallocated, preserved, and then written to: 6.19 zeroes it in the successor."""
    _, kernel = boot(release)
    guest = kernel.memfd("guest")
    guest.fallocate(0, PAGE)
    kernel.liveupdate.create_session("vm").preserve(guest, 1)
    (run,) = guest.inode.mapping.overlapping(0, 1)
    assert run.uptodate is kept
    # What a mapping of the file writes goes past the page cache's flags.
    kernel.ram.write(run.pfn * PAGE, b"written late", (0, "guest"))
    got = kernel.kexec().liveupdate.retrieve_session("vm").retrieve(1)
    assert (got.read(0, 12) == b"written late") is kept


@pytest.mark.parametrize(("release", "pages"), [("7.0", 1), ("7.1", 512)])
def test_blocks_of_a_huge_folio(release, pages):
    """A retrieved folio of 2 MiB counts as one page until 7.1."""
    _, kernel = boot(release)
    guest = kernel.memfd("guest", size="2M", huge="always")
    guest.write(0, b"x")
    kernel.liveupdate.create_session("vm").preserve(guest, 1)
    got = kernel.kexec().liveupdate.retrieve_session("vm").retrieve(1)
    assert got.inode.i_blocks == pages * 8


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(("release", "pages"), [("7.0", 1), ("7.1", 512)])
def test_what_a_truncated_guest_gives_back(release, pages, one_by_one):
    """What was accounted for two folios of 2 MiB is what goes when the file is emptied.

    Whether the folios were added at once or, because something might fail, one by one.
    """
    _, kernel = boot(release)
    guest = kernel.memfd("guest", size="4M", huge="always")
    guest.write(0, b"x")
    guest.write(2 << 20, b"y")
    kernel.liveupdate.create_session("vm").preserve(guest, 1)
    successor = kernel.kexec()
    if one_by_one:
        successor.pages.fail = lambda order, owner: False
    file = successor.liveupdate.retrieve_session("vm").retrieve(1)
    inode = file.inode
    assert (inode.mapping.nrpages, inode.alloced) == (1024, 2 * pages)
    assert inode.i_blocks == 2 * pages * 8
    file.ftruncate(0)
    assert (inode.mapping.nrpages, inode.alloced, inode.i_blocks) == (0, 0, 0)


def test_a_guest_of_single_pages_is_accounted_right_everywhere():
    """Where each folio is a page, counting folios is counting pages."""
    for release in ("6.19", "7.0", "7.1"):
        _, kernel = boot(release)
        guest = kernel.memfd("guest", size="40K")
        guest.write(0, b"0" * 10 * PAGE)
        kernel.liveupdate.create_session("vm").preserve(guest, 1)
        inode = kernel.kexec().liveupdate.retrieve_session("vm").retrieve(1).inode
        assert (inode.mapping.nrpages, inode.alloced, inode.i_blocks) == (10, 10, 80)


@pytest.mark.parametrize("after", [0, 1])
def test_a_huge_folio_that_cannot_be_accounted(after):
    """What the books say of the folios before it goes with the file, to the last block."""
    _, kernel = boot("7.3")
    guest = kernel.memfd("guest", size="4M", huge="always")
    guest.write(0, b"x")
    guest.write(2 << 20, b"y")
    kernel.liveupdate.create_session("vm").preserve(guest, 1)
    successor = kernel.kexec()
    answers = iter([False] * after + [True])
    successor.pages.fail = lambda order, owner: (
        owner == "shmem_inode_acct_blocks" and next(answers)
    )
    session = successor.liveupdate.retrieve_session("vm")
    assert errno_of(session.retrieve, 1) == "ENOSPC"
    told = f"memfd_luo: shmem: failed to account folio index {after}(512 pages): -28"
    assert told in successor.messages
    assert not any("i_blocks" in line for line in successor.messages)


@pytest.mark.parametrize(("release", "told"), [("7.0", None), ("7.1", "EIO")])
def test_a_folio_that_is_lost_midway(release, told):
    """0fb1daf0b78d: reported as success; and the folios behind it are lost, too."""
    _, kernel = boot(release)
    guest = kernel.memfd("guest", size="16K")
    guest.write(0, b"0" * 4 * PAGE)
    pfns = [guest.inode.mapping.overlapping(i, i + 1)[0].pfn_of(i) for i in range(4)]
    kernel.liveupdate.create_session("vm").preserve(guest, 1)
    successor = kernel.kexec()
    assert successor.kho_restore_folio(pfns[2] * PAGE) is not None
    session = successor.liveupdate.retrieve_session("vm")
    assert errno_of(session.retrieve, 1) == told
    assert (successor.page(pfns[3]).kind == "incoming") is (told is None)


def test_a_handle_that_unfreezing_forgets():
    """011d4e52a76c as a switch: after a failed reboot the file cannot be frozen again."""
    _, kernel = boot("6.19", luo_unfreeze_keeps_handle=False)
    session = kernel.liveupdate.create_session("vm")
    session.preserve(kernel.memfd("guest", size="4K"), 1)
    assert session.session.file_set.freeze() is not None
    session.session.file_set.unfreeze()
    assert errno_of(session.session.file_set.freeze) == "EINVAL"


@pytest.mark.parametrize("release", ["6.19", "7.0", "7.1", "7.2", "7.3"])
def test_a_root_fdt_alone_is_sound(release):
    """Read without memory, too: 7.1 is the only one to tell the size of a LUO that is a tree."""
    kernel = Machine("256M").boot(release, cmdline="kho=on liveupdate=on")
    kernel.finalize()
    fdt = kernel.kexec().debugfs.read("in/fdt")
    assert inspect_blob(fdt, "in", name="fdt").damage == []


@pytest.mark.parametrize(("release", "held"), [("7.0", 1), ("7.1", 0)])
def test_who_is_registered_holds_a_module(release, held):
    """76be9983df33: up to 7.0 registering takes a reference, and unregistering gives it back."""

    class Handler(FileHandler):
        compatible = "thing-v1"
        owner = Module("driver")

        def nothing(self, args):
            """Do nothing."""

        can_preserve = preserve = unpreserve = retrieve = finish = nothing

    class Shared(Flb):
        compatible = "shared-v1"
        owner = Module("shared")
        preserve = unpreserve = retrieve = finish = Handler.nothing

    _, kernel = boot(release)
    handler, flb = Handler(), Shared()
    for _ in range(2):
        kernel.liveupdate.register_file_handler(handler)
        kernel.liveupdate.register_flb(handler, flb)
        assert (Handler.owner.refcnt, Shared.owner.refcnt) == (held, held)
        kernel.liveupdate.unregister_flb(handler, flb)
        assert (Handler.owner.refcnt, Shared.owner.refcnt) == (held, 0)
        kernel.liveupdate.unregister_file_handler(handler)
        assert Handler.owner.refcnt == 0


@pytest.mark.parametrize(("release", "survives"), [("7.1", False), ("7.2", True)])
def test_finishing_asks_a_driver_before_it_lets_go(release, survives):
    """291dcd37c8c8: a file's identity is asked of a handler whose module may be gone by then."""
    _, kernel = boot(release)
    kernel.liveupdate.register_file_handler(DriversHandler(kernel, Driver()))
    kernel.liveupdate.create_session("vm").preserve(Device(kernel), 1)
    successor = kernel.kexec()
    successor.liveupdate.register_file_handler(DriversHandler(successor, Driver()))
    session = successor.liveupdate.retrieve_session("vm")
    session.retrieve(1)
    if survives:
        session.finish()
    else:
        with pytest.raises(KernelPanic):
            session.finish()
