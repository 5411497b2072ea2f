"""Switches for what LUO and memfds do wrong in 7.3: what the kernel does with and without each."""

from __future__ import annotations

import errno

import pytest

from khosim import KernelError, Machine
from khosim.abi import liveupdate as uapi
from khosim.explore.agent_calls import (
    ask_device,
    ask_session,
    call_off,
    create_32bit,
    finish_badly,
    is_poisoned,
    memory_failure,
    preserve_sparse,
)
from khosim.explore.tokens import Token, ledger, reload
from khosim.kernel.kernel import Kernel
from khosim.kernel.kvmalloc import KVMALLOC_MAX_BYTES

PAGE = 4096
TIB = 1 << 40


def boot(switch: str = "") -> Kernel:
    release = f"7.3+{switch}=on" if switch else "7.3"
    return Machine("64M").boot(release, cmdline="kho=on liveupdate=on")


def errno_of(call: object, *args: object) -> int:
    assert callable(call)
    with pytest.raises(KernelError) as caught:
        call(*args)
    return caught.value.errno


@pytest.mark.parametrize("number", [2, 0x3F, 0x40, 0xFF])
def test_unknown_numbers_on_the_device(number: int) -> None:
    """-EINVAL where the interface's documentation promises -ENOTTY."""
    assert errno_of(ask_device, boot(), number) == errno.EINVAL
    assert errno_of(ask_device, boot("fix_ioctl_number"), number) == errno.ENOTTY


@pytest.mark.parametrize("number", [1, 0x3F, 0x44, 0xFF])
def test_unknown_numbers_on_a_session(number: int) -> None:
    """As on the device; asking leaves the session as it was."""
    for switch, told in (("", errno.EINVAL), ("fix_ioctl_number", errno.ENOTTY)):
        session = boot(switch).liveupdate.create_session("vm")
        assert errno_of(ask_session, session, number) == told
        session.close()


def test_finishing_badly() -> None:
    """-EFAULT and finished all the same; with the switch there is no answer that can fail."""
    for switch in ("", "fix_finish_fault"):
        kernel = boot(switch)
        session = kernel.liveupdate.create_session("vm")
        file = kernel.memfd("m", size=PAGE)
        session.preserve(file, 1)
        kernel = kernel.kexec()
        session = kernel.liveupdate.retrieve_session("vm")
        if switch:
            finish_badly(session)
        else:
            with pytest.raises(AssertionError, match="finished, though the call failed"):
                finish_badly(session)
        assert session.tokens == []


def test_finishing_badly_what_is_empty() -> None:
    """Nothing is lost by it: -EFAULT."""
    kernel = boot()
    kernel.liveupdate.create_session("vm")
    kernel = kernel.kexec()
    session = kernel.liveupdate.retrieve_session("vm")
    assert errno_of(finish_badly, session) == errno.EFAULT


@pytest.mark.parametrize(
    ("pages", "switch", "told", "warns"),
    [
        (KVMALLOC_MAX_BYTES // 8 + 1, "", errno.ENOMEM, True),
        (KVMALLOC_MAX_BYTES // 8 + 1, "fix_memfd_size", errno.EFBIG, False),
        (1 << 32, "", errno.EFBIG, False),
    ],
)
def test_files_that_no_array_has_room_for(
    pages: int, switch: str, told: int, *, warns: bool
) -> None:
    """From 1 TiB on kvmalloc warns; files of 2**32 pages are refused before."""
    kernel = boot(switch)
    assert KVMALLOC_MAX_BYTES // 8 + 1 == TIB // PAGE
    assert errno_of(preserve_sparse, kernel, pages * PAGE) == told
    assert any("kvmalloc" in message for message in kernel.messages) == warns


def test_calling_off_leaves_holes_filled() -> None:
    """Nine of ten pages more; with the switch nothing but what was written."""
    kernel = boot()
    file = kernel.memfd("m", size=10 * PAGE)
    file.write(3 * PAGE, b"x")
    with pytest.raises(AssertionError, match="9 pages more"):
        call_off(kernel, file)
    assert file.inode.alloced == 10
    kernel = boot("fix_memfd_holes")
    file = kernel.memfd("m", size=10 * PAGE)
    file.write(3 * PAGE, b"x")
    call_off(kernel, file)
    assert file.inode.alloced == 1
    assert file.read(0, 10 * PAGE) == bytes(3 * PAGE) + b"x" + bytes(7 * PAGE - 1)


@pytest.mark.parametrize("huge", ["never", "always"])
def test_what_was_written_meanwhile_stays(huge: str) -> None:
    """A hole that was filled by preserve and written to afterwards is data."""
    kernel = boot("fix_memfd_holes")
    size = 1200 * PAGE
    file = kernel.memfd("m", size=size, huge=huge)
    file.fallocate(size + PAGE, PAGE, 1)
    session = kernel.liveupdate.create_session("vm")
    session.preserve(file, 1)
    file.write(700 * PAGE + 5, b"late")
    session.close()
    assert file.read(700 * PAGE + 5, 4) == b"late"
    assert sum(len(data) - data.count(0) for _, data in file.data()) == 4
    assert file.inode.alloced == (2 if huge == "never" else 1024)
    assert file.inode.i_blocks == file.inode.alloced * (PAGE // 512)
    file.close()


def test_a_memfd_larger_than_memory() -> None:
    """-ENOMEM takes all memory; with the switch all of it is free again."""
    kernel = boot()
    with pytest.raises(AssertionError, match="pages more"):
        preserve_sparse(kernel, 128 << 20)
    kernel = boot("fix_memfd_holes")
    before = sum(zone.nr_free_pages() for zone in kernel.pages.zones)
    assert errno_of(preserve_sparse, kernel, 128 << 20) == errno.ENOMEM
    assert before - sum(zone.nr_free_pages() for zone in kernel.pages.zones) < 8


def test_a_reader_stays_a_reader() -> None:
    """What may only be read is refused in each way by which it could be written to."""
    kernel = boot()
    writer = kernel.memfd("m", size=PAGE)
    reader = writer.open_read_only()
    assert errno_of(reader.write, 0, b"x") == errno.EBADF
    assert errno_of(reader.store, 0, b"x") == errno.EACCES
    assert errno_of(reader.ftruncate, 0) == errno.EINVAL
    assert errno_of(reader.fallocate, 0, PAGE) == errno.EBADF
    assert errno_of(reader.add_seals, 1) == errno.EPERM
    writer.write(0, b"y")
    assert reader.read(0, 1) == b"y"
    assert reader.d_path() == writer.d_path() == "/memfd:m (deleted)"


def test_an_inode_lives_as_long_as_one_of_its_files() -> None:
    """Closing one of two leaves the memory; closing the last one frees it."""
    kernel = boot()
    writer = kernel.memfd("m", size=PAGE)
    writer.write(0, b"y")
    reader = writer.open_read_only()
    writer.close()
    assert reader.read(0, 1) == b"y"
    assert reader.inode.alloced == 1
    reader.close()
    assert reader.inode.alloced == 0


@pytest.mark.parametrize("switch", ["", "fix_memfd_reader"])
def test_a_reader_is_preserved(switch: str) -> None:
    """It comes back writable; with the switch it is refused, and left as it was."""
    kernel = boot(switch)
    session = kernel.liveupdate.create_session("vm")
    writer = kernel.memfd("m", size=PAGE)
    reader = writer.open_read_only()
    if switch:
        assert errno_of(session.preserve, reader, 1) == errno.EOPNOTSUPP
        assert not reader.inode.frozen
        session.preserve(writer, 1)
        return
    session.preserve(reader, 1)
    assert errno_of(session.preserve, writer, 2) == errno.EBUSY
    file = kernel.kexec().liveupdate.retrieve_session("vm").retrieve(1)
    assert file.is_writable
    assert file.write(0, b"z") == 1


@pytest.mark.parametrize(
    ("switch", "path"), [("", "/ (deleted)"), ("fix_memfd_name", "/memfd: (deleted)")]
)
def test_the_name_of_a_retrieved_memfd(switch: str, path: str) -> None:
    """Its own name is gone in any case."""
    kernel = boot(switch)
    kernel.liveupdate.create_session("vm").preserve(kernel.memfd("guest", size=PAGE), 1)
    file = kernel.kexec().liveupdate.retrieve_session("vm").retrieve(1)
    assert file.d_path() == path


@pytest.mark.parametrize("switch", ["", "fix_flb_reload"])
def test_a_module_that_is_loaded_again(switch: str) -> None:
    """It is refused while the old one is used; then it must not find what was finished."""
    kernel = boot(switch)
    ledger(kernel)
    session = kernel.liveupdate.create_session("vm")
    session.preserve(Token(kernel, 7), 1)
    kernel = kernel.kexec()
    first = ledger(kernel)
    session = kernel.liveupdate.retrieve_session("vm")
    assert errno_of(reload, kernel, first) == errno.EAGAIN
    kernel.liveupdate.flb_get_incoming(first)
    session.finish()
    assert errno_of(reload, kernel, first) == errno.EAGAIN
    kernel.liveupdate.flb_put_incoming(first)
    second = reload(kernel, first)
    assert kernel.liveupdate.flb.state(second).incoming.retrieve_status == (0 if switch else -5)
    assert any("no magic" in message for message in kernel.messages) == (not switch)


def test_a_module_that_is_loaded_again_in_time() -> None:
    """Before anybody has read the sessions it finds its object, also with the switch."""
    kernel = boot("fix_flb_reload")
    ledger(kernel)
    kernel.liveupdate.create_session("vm").preserve(Token(kernel, 7), 1)
    kernel = kernel.kexec()
    second = reload(kernel, ledger(kernel))
    assert kernel.liveupdate.flb.state(second).incoming.retrieve_status == 1
    kernel.liveupdate.retrieve_session("vm").finish()
    assert kernel.liveupdate.flb.state(second).incoming.finished


def test_an_agent_of_32_bits() -> None:
    """No call of the device or of a session is there for it; with the switch all are."""
    for switch in ("", "fix_ioctl_compat"):
        kernel = boot(switch)
        agent = kernel.process("agent", is_compat=True).fork()
        session = agent.install(kernel.liveupdate.create_session("vm"))
        fd = agent.open("/dev/liveupdate")
        name, get = uapi.get_name(), uapi.LIVEUPDATE_SESSION_GET_NAME
        create = uapi.create_session(b"other")
        if switch:
            assert agent.ioctl(session, get, name) == 0
            assert agent.ioctl(fd, uapi.LIVEUPDATE_IOCTL_CREATE_SESSION, create) == 0
            assert bytes(name[8:10]) == b"vm"
            agent.close(fd)
            create_32bit(kernel, "third")
        else:
            assert errno_of(agent.ioctl, session, get, name) == errno.ENOTTY
            assert errno_of(agent.ioctl, fd, uapi.LIVEUPDATE_IOCTL_CREATE_SESSION, create) == (
                errno.ENOTTY
            )
            agent.close(fd)
            assert errno_of(create_32bit, kernel, "third") == errno.ENOTTY
        assert "third" not in kernel.liveupdate.sessions.outgoing.sessions


def test_a_poisoned_page_is_not_used() -> None:
    """Reading, writing and faults are refused; its neighbours are as they were."""
    kernel = boot()
    file = kernel.memfd("m", size=3 * PAGE)
    assert errno_of(memory_failure, file, PAGE) == errno.ENXIO
    file.write(0, b"x" * (3 * PAGE))
    memory_failure(file, PAGE + 7)
    assert is_poisoned(file, PAGE)
    assert is_poisoned(file, 2 * PAGE - 1)
    assert not is_poisoned(file, PAGE - 1)
    assert not is_poisoned(file, 2 * PAGE)
    assert errno_of(file.write, PAGE, b"y") == errno.EIO
    assert errno_of(file.store, PAGE - 1, b"yy") == errno.EFAULT
    assert file.write(2 * PAGE, b"y") == 1


def test_a_poisoned_page_is_not_free_again() -> None:
    """Of three pages two can be had when the file is closed."""
    kernel = boot()
    before = sum(zone.nr_free_pages() for zone in kernel.pages.zones)
    file = kernel.memfd("m", size=3 * PAGE)
    file.write(0, b"x" * (3 * PAGE))
    memory_failure(file, PAGE)
    file.close()
    assert before - sum(zone.nr_free_pages() for zone in kernel.pages.zones) == 1
    huge = kernel.memfd("h", size="4M", huge="always")
    huge.write(0, b"x")
    assert errno_of(memory_failure, huge, 0) == errno.EBUSY


@pytest.mark.parametrize("switch", ["", "fix_memfd_poison"])
@pytest.mark.parametrize("is_late", [False, True])
def test_a_poisoned_page_is_handed_over(switch: str, *, is_late: bool) -> None:
    """As a good one; with the switch preserving it is -EBUSY, or the kexec."""
    kernel = boot(switch)
    session = kernel.liveupdate.create_session("vm")
    file = kernel.memfd("m", size=PAGE)
    file.write(0, b"x")
    if is_late:
        session.preserve(file, 1)
    memory_failure(file, 0)
    if switch:
        assert errno_of(*((kernel.kexec,) if is_late else (session.preserve, file, 1))) == (
            errno.EBUSY
        )
        return
    if not is_late:
        session.preserve(file, 1)
    file = kernel.kexec().liveupdate.retrieve_session("vm").retrieve(1)
    assert not is_poisoned(file, 0)
