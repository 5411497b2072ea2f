"""Sessions: names, both directions, release, and what a failed freeze leaves."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import Any

import pytest

from khosim import InputError, KernelError, KernelPanic, KhoSimError, Machine
from khosim.kernel.kernel import Kernel
from khosim.kernel.liveupdate.luo_session import Session

ON = "kho=on liveupdate=on"
PAGE = 4096
PER_BLOCK = (PAGE - 16) // 80


def boot(ram: str = "64M", *, checks: bool = False) -> tuple[Machine, Kernel]:
    machine = Machine(ram, checks=checks)
    return machine, machine.boot(cmdline=ON)


def refused(error: int, call: Callable[..., object], *args: object) -> KernelError:
    with pytest.raises(KernelError) as caught:
        call(*args)
    assert caught.value.errno == error
    return caught.value


def free_pages(kernel: Kernel) -> int:
    """Free pages, and those that the tree of preserved memory took on the way."""
    tree_pages = sum(1 for nr_keys, _ in kernel.kho_out.tree.walk() if not nr_keys)
    return kernel.pages.nr_free_pages() + tree_pages


def nr_preserved(kernel: Kernel) -> int:
    return sum(nr_keys for nr_keys, _ in kernel.kho_out.tree.walk())


def session_entries(kernel: Kernel) -> list[tuple[str, int, int]]:
    """Name, address of the files' block and their number of each session as in RAM."""
    phys = kernel.ram.read_u64(kernel.liveupdate.luo_ser_out + 16)
    found = []
    while phys:
        following, count = struct.unpack("<QQ", kernel.ram.read(phys, 16))
        for i in range(count):
            raw = kernel.ram.read(phys + 16 + 80 * i, 80)
            name, files, nr_files = struct.unpack("<64sQQ", raw)
            found.append((name.rstrip(b"\0").decode(), files, nr_files))
        phys = following
    return found


# -- creating -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "x" * 64, "x" * 100, "\0hidden", "é" * 32])
def test_names_that_are_refused(name: str) -> None:
    """Nothing, and more than 63 bytes."""
    _, kernel = boot()
    refused(errno.EINVAL, kernel.liveupdate.create_session, name)
    assert kernel.liveupdate.sessions.outgoing.block_set.nblocks == 0


@pytest.mark.parametrize("name", ["x", "x" * 63, "é" * 31, "a b/c", "\udcff\udcfe"])
def test_names_come_across(name: str) -> None:
    """1 to 63 bytes of any kind, byte for byte."""
    machine, kernel = boot()
    session = kernel.liveupdate.create_session(name)
    assert session.name == name
    again = machine.kexec(kernel).liveupdate.retrieve_session(name)
    assert again.name == name


def test_a_name_ends_at_its_nul() -> None:
    """As for the kernel, which does not see what is behind."""
    machine, kernel = boot()
    assert kernel.liveupdate.create_session("a\0b").name == "a"
    refused(errno.EEXIST, kernel.liveupdate.create_session, "a")
    successor = machine.kexec(kernel)
    assert successor.liveupdate.retrieve_session("a\0c").name == "a"


def test_names_are_unique_until_closed() -> None:
    """-EEXIST for a second session; a closed one's name is free again."""
    _, kernel = boot()
    session = kernel.liveupdate.create_session("a")
    refused(errno.EEXIST, kernel.liveupdate.create_session, "a")
    session.close()
    again = kernel.liveupdate.create_session("a")
    assert list(kernel.liveupdate.sessions.outgoing.sessions) == ["a"]
    assert again.session is not session.session


def test_blocks_come_and_go_with_sessions() -> None:
    """One block for 51 sessions, freed as soon as it is not needed."""
    _, kernel = boot()
    luo = kernel.liveupdate
    blocks = luo.sessions.outgoing.block_set
    before = free_pages(kernel), nr_preserved(kernel)
    held = [luo.create_session(f"s{i}") for i in range(PER_BLOCK)]
    assert (blocks.nblocks, nr_preserved(kernel)) == (1, before[1] + 1)
    held.append(luo.create_session("one more"))
    assert blocks.nblocks == 2
    held[0].close()
    assert blocks.nblocks == 1
    for session in held[1:]:
        session.close()
    assert (free_pages(kernel), nr_preserved(kernel)) == before
    assert blocks.head_pa == 0


@pytest.mark.parametrize("owner", ["luo_session_alloc", "kho_alloc_preserve", "anon_inode_getfile"])
def test_create_without_memory(owner: str) -> None:
    """-ENOMEM at each step, and nothing is left."""
    _, kernel = boot()
    device = kernel.liveupdate.open()
    before = free_pages(kernel), nr_preserved(kernel)
    kernel.pages.fail = lambda order, asked: asked == owner
    refused(errno.ENOMEM, device.create_session, "a")
    kernel.pages.fail = None
    assert (free_pages(kernel), nr_preserved(kernel)) == before
    assert kernel.liveupdate.sessions.outgoing.count == 0
    device.create_session("a")


def test_a_refused_duplicate_can_kill_the_successor() -> None:
    """The kernel grows the blocks before it looks at the name, and does not shrink them again.

    With exactly 51 sessions an empty block stays behind, which no kernel accepts.
    """
    machine, kernel = boot()
    luo = kernel.liveupdate
    held = [luo.create_session(f"s{i}") for i in range(PER_BLOCK)]
    refused(errno.EEXIST, luo.create_session, "s0")
    assert luo.sessions.outgoing.block_set.nblocks == 2
    with pytest.raises(KernelPanic, match="failed to initialize properly"):
        machine.kexec(kernel)
    assert len(held) == PER_BLOCK


def test_a_refused_duplicate_is_harmless_otherwise() -> None:
    """One session more, or one less, and the block is used or freed."""
    for change in ("create", "close"):
        machine, kernel = boot()
        luo = kernel.liveupdate
        held = [luo.create_session(f"s{i}") for i in range(PER_BLOCK)]
        refused(errno.EEXIST, luo.create_session, "s0")
        if change == "create":
            held.append(luo.create_session("new"))
        else:
            held.pop().close()
        successor = machine.kexec(kernel)
        successor.liveupdate.open().close()
        assert successor.liveupdate.sessions.incoming.count == len(held)


# -- retrieving -----------------------------------------------------------------------------------


def test_retrieved_once() -> None:
    """-ENOENT for an unknown name, -EINVAL at the second time, also after closing: it is gone."""
    machine, kernel = boot()
    held = [kernel.liveupdate.create_session(name) for name in ("a", "b")]
    luo = machine.kexec(kernel).liveupdate
    refused(errno.ENOENT, luo.retrieve_session, "c")
    session = luo.retrieve_session("a")
    refused(errno.EINVAL, luo.retrieve_session, "a")
    session.close()
    refused(errno.ENOENT, luo.retrieve_session, "a")
    assert luo.retrieve_session("b").name == "b"
    assert len(held) == 2


def test_retrieve_without_memory() -> None:
    """-ENOMEM for the file; the session is still there."""
    machine, kernel = boot()
    held = kernel.liveupdate.create_session("a")
    successor = machine.kexec(kernel)
    device = successor.liveupdate.open()
    successor.pages.fail = lambda order, owner: owner == "anon_inode_getfile"
    refused(errno.ENOMEM, device.retrieve_session, "a")
    successor.pages.fail = None
    assert device.retrieve_session("a").session.retrieved
    assert held.name == "a"


def test_each_direction_has_its_calls() -> None:
    """Preserving is for new sessions, retrieving and finishing for old ones: -EINVAL."""
    machine, kernel = boot()
    session = kernel.liveupdate.create_session("a")
    refused(errno.EINVAL, session.retrieve, 1)
    refused(errno.EINVAL, session.finish)
    successor = machine.kexec(kernel)
    session = successor.liveupdate.retrieve_session("a")
    refused(errno.EINVAL, session.preserve, successor.memfd("f"), 1)
    session.finish()
    session.finish()


def test_sessions_are_not_handed_on() -> None:
    """What nobody retrieved is gone after the next kexec, and so is what was retrieved."""
    machine, kernel = boot("128M", checks=True)
    session = kernel.liveupdate.create_session("a")
    session.preserve(kernel.memfd("f", size="1M"), 1)
    kernel = machine.kexec(kernel)
    assert kernel.pages.nr_pages("incoming") > 256
    kernel = machine.kexec(kernel)
    refused(errno.ENOENT, kernel.liveupdate.retrieve_session, "a")
    assert kernel.pages.nr_pages("incoming") < 64
    assert not machine.check()


def test_both_directions_at_once() -> None:
    """A name may be in use in both; they do not meet."""
    machine, kernel = boot()
    held = kernel.liveupdate.create_session("a")
    kernel = machine.kexec(kernel)
    incoming = kernel.liveupdate.retrieve_session("a")
    outgoing = kernel.liveupdate.create_session("a")
    assert (incoming.session.retrieved, outgoing.session.retrieved) == (True, False)
    assert held.name == "a"
    kernel = machine.kexec(kernel)
    assert kernel.liveupdate.retrieve_session("a").name == "a"


def test_many_sessions_come_across_in_order() -> None:
    """Three blocks of them."""
    machine, kernel = boot()
    names = [f"session {i}" for i in range(2 * PER_BLOCK + 1)]
    held = [kernel.liveupdate.create_session(name) for name in names]
    kernel = machine.kexec(kernel)
    kernel.liveupdate.open().close()
    incoming = kernel.liveupdate.sessions.incoming
    assert list(incoming.sessions) == names
    assert incoming.block_set.nblocks == 0
    assert len(held) == len(names)


def test_tokens_are_numbers_of_64_bits() -> None:
    """Others cannot be said in an ioctl."""
    _, kernel = boot()
    session = kernel.liveupdate.create_session("a")
    for token in (-1, 1 << 64):
        with pytest.raises(InputError, match="64 bits"):
            session.preserve(kernel.memfd("f"), token)
    session.preserve(kernel.memfd("f"), (1 << 64) - 1)
    assert session.tokens == [(1 << 64) - 1]
    assert isinstance(session, Session)
    assert repr(session.session) == "LuoSession('a', 1 files)"


# -- deserialization ------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, 1 << 64, 1.5, "1", None])
def test_tokens_that_are_none(token: Any) -> None:
    """Nothing but a number of 64 bits is one, and the session is as before."""
    _, kernel = boot()
    session = kernel.liveupdate.create_session("s")
    with pytest.raises(InputError, match="is not a number of 64 bits"):
        session.preserve(kernel.memfd("f"), token)
    assert session.tokens == []


@pytest.mark.parametrize("name", [5, None, b"vm", "\ud800"])
def test_names_that_are_no_text(name: Any) -> None:
    """One line each, for both calls that take a name."""
    _, kernel = boot()
    for call in (kernel.liveupdate.create_session, kernel.liveupdate.retrieve_session):
        with pytest.raises(InputError, match="is no text that has bytes"):
            call(name)


def test_files_of_elsewhere_are_not_preserved() -> None:
    """Nothing passes from one kernel to another but in RAM, not even a mistake."""
    _, kernel = boot()
    _, other = boot()
    session = kernel.liveupdate.create_session("s")
    with pytest.raises(KhoSimError, match="is open in another kernel"):
        session.preserve(other.memfd("f", size=4096), 1)
    with pytest.raises(KhoSimError, match="is open in another kernel"):
        kernel.process("agent").install(other.memfd("f", size=4096))
    for wrong in ("f", 3, None):
        with pytest.raises(InputError, match="is not an open file"):
            session.preserve(wrong, 1)  # type: ignore[arg-type]
    assert session.tokens == []


def test_a_failed_deserialization_is_remembered() -> None:
    """-EIO at every open, whatever the reason was; what was read until then stays."""
    machine, kernel = boot()
    held = [kernel.liveupdate.create_session(name) for name in ("a", "b", "c")]
    kernel = machine.kexec(kernel)
    kernel.pages.fail = lambda order, owner: owner == "luo_session_alloc"
    refused(errno.EIO, kernel.liveupdate.open)
    kernel.pages.fail = None
    for _ in range(2):
        refused(errno.EIO, kernel.liveupdate.open)
    sessions = kernel.liveupdate.sessions
    assert (sessions.deserialized, sessions.incoming.count) == (-errno.ENOMEM, 0)
    assert not kernel.liveupdate.in_use
    assert any("Failed to allocate session [a]" in line for line in kernel.messages)
    assert len(held) == 3


def patched(machine: Machine, kernel: Kernel, offset: int, data: bytes) -> Kernel:
    """The successor, with bytes of the first session block changed on the way."""
    machine.load_successor(kernel)
    block = kernel.ram.read_u64(kernel.liveupdate.luo_ser_out + 16)
    machine.hardware.ram.write(block + offset, data, (9, "test"))
    return machine.resume()


def test_two_sessions_of_one_name() -> None:
    """-EEXIST inside, -EIO outside; the first one is known all the same."""
    machine, kernel = boot()
    held = [kernel.liveupdate.create_session(name) for name in ("a", "b")]
    kernel = patched(machine, kernel, 16 + 80, b"a")
    refused(errno.EIO, kernel.liveupdate.open)
    sessions = kernel.liveupdate.sessions
    assert (sessions.deserialized, list(sessions.incoming.sessions)) == (-errno.EEXIST, ["a"])
    assert "luo: Failed to insert session [a] -EEXIST" in kernel.messages
    assert len(held) == 2


def test_a_name_without_an_end() -> None:
    """64 bytes without a NUL are cut to 63."""
    machine, kernel = boot()
    held = kernel.liveupdate.create_session("a")
    kernel = patched(machine, kernel, 16, b"n" * 64)
    assert kernel.liveupdate.retrieve_session("n" * 63).name == "n" * 63
    assert held.name == "a"


def test_files_that_lie_nowhere() -> None:
    """A count without blocks is a warning, and a session without files."""
    machine, kernel = boot()
    held = kernel.liveupdate.create_session("a")
    kernel = patched(machine, kernel, 16 + 72, struct.pack("<Q", 3))
    assert kernel.liveupdate.retrieve_session("a").tokens == []
    assert "WARNING: luo_file_deserialize: 3 files nowhere" in kernel.messages
    assert held.name == "a"


# -- serialization --------------------------------------------------------------------------------


def test_what_is_written_down() -> None:
    """Names, first blocks of files and counts; nothing for a session without files."""
    _, kernel = boot()
    luo = kernel.liveupdate
    empty, full = luo.create_session("empty"), luo.create_session("full")
    for token in (7, 8):
        full.preserve(kernel.memfd("f"), token)
    luo.reboot()
    head = full.session.file_set.block_set.head_pa
    assert session_entries(kernel) == [("empty", 0, 0), ("full", head, 2)]
    assert empty.tokens == []


def test_without_sessions_nothing_is_published() -> None:
    """The root's pointer stays 0."""
    _, kernel = boot()
    kernel.liveupdate.create_session("a").close()
    kernel.liveupdate.reboot()
    assert session_entries(kernel) == []
    assert kernel.ram.read_u64(kernel.liveupdate.luo_ser_out + 16) == 0


def test_a_failed_freeze_wipes_what_was_written() -> None:
    """In the last of many sessions: names, file blocks and pointers of all others are zeros."""
    _, kernel = boot("128M")
    luo = kernel.liveupdate
    held = []
    for i in range(PER_BLOCK + 3):
        session = luo.create_session(f"s{i}")
        session.preserve(kernel.memfd("f"), i)
        held.append(session)
    broken = held[-1].session.file_set.files[0]
    handle, broken.serialized_data = broken.serialized_data, 0
    refused(errno.EINVAL, luo.reboot)
    first, second = luo.sessions.outgoing.block_set.blocks
    assert kernel.ram.read(first + 16, PAGE - 16) == bytes(PAGE - 16)
    assert kernel.ram.read(second + 16, PAGE - 16) == bytes(PAGE - 16)
    for session in held:
        (block,) = session.session.file_set.block_set.blocks
        assert kernel.ram.read(block, PAGE) == bytes(PAGE)
    assert not luo.sessions.serialized
    broken.serialized_data = handle
    luo.reboot()
    assert [name for name, _, _ in session_entries(kernel)] == [s.name for s in held]
    assert {count for _, _, count in session_entries(kernel)} == {1}


def test_without_room_to_write_sessions_down() -> None:
    """-ENOSPC and a warning, should blocks ever be missing; everything is unfrozen again."""
    _, kernel = boot()
    luo = kernel.liveupdate
    held = [luo.create_session(f"s{i}") for i in range(PER_BLOCK + 1)]
    held[0].preserve(kernel.memfd("f"), 1)
    blocks = luo.sessions.outgoing.block_set
    first, second = blocks.blocks
    blocks.blocks = [first]
    assert refused(errno.ENOSPC, luo.reboot).symbol == "luo_session_serialize"
    assert "WARNING: luo_session_serialize: no room" in kernel.messages
    assert kernel.ram.read(first + 16, PAGE - 16) == bytes(PAGE - 16)
    assert not luo.sessions.serialized
    blocks.blocks = [first, second]
    luo.reboot()
    assert [name for name, _, _ in session_entries(kernel)] == [s.name for s in held]


def test_without_room_to_write_files_down() -> None:
    """-ENOSPC and a warning; the session's name was not written."""
    _, kernel = boot()
    luo = kernel.liveupdate
    session = luo.create_session("a")
    session.preserve(kernel.memfd("f"), 1)
    blocks = session.session.file_set.block_set
    there, blocks.blocks = blocks.blocks, []
    assert refused(errno.ENOSPC, luo.reboot).symbol == "luo_file_freeze"
    assert "WARNING: luo_file_freeze: no room" in kernel.messages
    blocks.blocks = there
    luo.reboot()
    assert session_entries(kernel) == [("a", blocks.head_pa, 1)]


def test_closing_calls_the_update_off() -> None:
    """Close: files are unpreserved and all memory of the session is free again."""
    machine, kernel = boot("128M", checks=True)
    guest = kernel.memfd("guest", size="1M")
    guest.write(0, b"x" * (1 << 20))
    before = free_pages(kernel), nr_preserved(kernel)
    session = kernel.liveupdate.create_session("a")
    session.preserve(guest, 1)
    assert guest.f_count == 2
    session.close()
    assert (free_pages(kernel), nr_preserved(kernel)) == before
    assert (guest.f_count, kernel.liveupdate.preserved_files) == (1, {})
    assert guest.read(0, 3) == b"xxx"
    assert not machine.check()


def test_the_session_outlives_its_files_descriptor() -> None:
    """LUO is a co-owner: the guest may close its file, and it comes across."""
    machine, kernel = boot("128M", checks=True)
    session = kernel.liveupdate.create_session("a")
    guest = kernel.memfd("guest", size="64K")
    guest.write(0, b"mine")
    session.preserve(guest, 1)
    guest.close()
    kernel = machine.kexec(kernel)
    incoming = kernel.liveupdate.retrieve_session("a")
    again = incoming.retrieve(1)
    assert (again.read(0, 4), again.f_count) == (b"mine", 2)
    incoming.finish()
    assert again.f_count == 1
    incoming.close()
    again.close()
    assert kernel.liveupdate.sessions.incoming.count == 0
    assert not machine.check()
