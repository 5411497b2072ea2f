"""The kernel's selftests of ``/dev/liveupdate`` on a single boot, played again.

``tools/testing/selftests/liveupdate/liveupdate.c`` @ 7.3: each test bears the name of its scenario
and expects what that expects, in its order of calls.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from khosim import KernelError, Machine
from khosim.abi import liveupdate as uapi
from khosim.kernel.memfd import Memfd
from khosim.kernel.process import Process

DEVICE = "/dev/liveupdate"


class Test(Process):
    """The process that runs a scenario; calls return a negative errno as the library's do."""

    __test__ = False
    __slots__ = ()

    def luo_create_session(self, luo_fd: int, name: str) -> int:
        arg = uapi.create_session(name.encode()[:63])
        return self.answer(luo_fd, uapi.LIVEUPDATE_IOCTL_CREATE_SESSION, arg)

    def answer(self, fd: int, command: int, arg: bytearray) -> int:
        error = negative(lambda: self.ioctl(fd, command, arg))
        return error or int.from_bytes(arg[4:8], "little", signed=True)

    def luo_session_preserve_fd(self, session_fd: int, fd: int, token: int) -> int:
        arg = uapi.preserve_fd(fd, token)
        command = uapi.LIVEUPDATE_SESSION_PRESERVE_FD
        return negative(lambda: self.ioctl(session_fd, command, arg))

    def luo_get_session_name(self, session_fd: int) -> bytes:
        arg = uapi.get_name()
        assert self.ioctl(session_fd, uapi.LIVEUPDATE_SESSION_GET_NAME, arg) == 0
        return bytes(arg[8:]).split(b"\0")[0]

    def memfd_of(self, fd: int) -> Memfd:
        file = self.file(fd)
        assert isinstance(file, Memfd)
        return file

    def write(self, fd: int, data: bytes) -> int:
        return self.memfd_of(fd).write(0, data)

    def read(self, fd: int, length: int = 64) -> bytes:
        return self.memfd_of(fd).read(0, length)


def negative(call: Callable[[], int]) -> int:
    try:
        return call()
    except KernelError as refused:
        return -refused.errno


@pytest.fixture
def test() -> Test:
    return Test(Machine("128M", checks=False).boot(cmdline="kho=on liveupdate=on"))


def test_basic_open_close(test: Test) -> None:
    """Open and close the device."""
    fd1 = test.open(DEVICE)
    assert fd1 >= 0
    test.close(fd1)


def test_exclusive_open(test: Test) -> None:
    """A second open fails with EBUSY."""
    assert test.open(DEVICE) >= 0
    assert negative(lambda: test.open(DEVICE)) == -errno.EBUSY


def test_create_duplicate_session(test: Test) -> None:
    """A second session of one name fails with EEXIST."""
    fd1 = test.open(DEVICE)
    session_fd1 = test.luo_create_session(fd1, "duplicate-session-test")
    assert session_fd1 >= 0
    assert test.luo_create_session(fd1, "duplicate-session-test") == -errno.EEXIST
    test.close(session_fd1)


def test_create_distinct_sessions(test: Test) -> None:
    """Two sessions of two names."""
    fd1 = test.open(DEVICE)
    session_fds = [test.luo_create_session(fd1, f"distinct-session-{n}") for n in (1, 2)]
    assert all(fd >= 0 for fd in session_fds)
    for fd in session_fds:
        test.close(fd)


def test_preserve_memfd(test: Test) -> None:
    """A preserved memfd's content is intact after the session is closed."""
    fd1 = test.open(DEVICE)
    session_fd = test.luo_create_session(fd1, "preserve-memfd-test")
    mem_fd = test.memfd_create("test-memfd", 0)
    assert test.write(mem_fd, b"hello liveupdate") == 16
    assert test.luo_session_preserve_fd(session_fd, mem_fd, 0x1234) == 0
    test.close(session_fd)
    assert test.read(mem_fd) == b"hello liveupdate"
    test.close(mem_fd)


def test_preserve_multiple_memfds(test: Test) -> None:
    """Several memfds in one session keep their own content."""
    fd1 = test.open(DEVICE)
    session_fd = test.luo_create_session(fd1, "preserve-multi-memfd-test")
    mem_fd1 = test.memfd_create("test-memfd-1", 0)
    mem_fd2 = test.memfd_create("test-memfd-2", 0)
    texts = b"data for memfd one", b"data for memfd two"
    assert test.write(mem_fd1, texts[0]) == 18
    assert test.write(mem_fd2, texts[1]) == 18
    assert test.luo_session_preserve_fd(session_fd, mem_fd1, 0xAAAA) == 0
    assert test.luo_session_preserve_fd(session_fd, mem_fd2, 0xBBBB) == 0
    assert (test.read(mem_fd1), test.read(mem_fd2)) == texts
    for fd in (mem_fd1, mem_fd2, session_fd):
        test.close(fd)


def test_preserve_complex_scenario(test: Test) -> None:
    """Two sessions, each with a file that has content and one that is empty."""
    fd1 = test.open(DEVICE)
    session_fd1 = test.luo_create_session(fd1, "complex-session-1")
    session_fd2 = test.luo_create_session(fd1, "complex-session-2")
    data1, data2 = b"data for session 1", b"data for session 2"
    mem_fd_data1 = test.memfd_create("data1", 0)
    assert test.write(mem_fd_data1, data1) == len(data1)
    mem_fd_empty1 = test.memfd_create("empty1", 0)
    mem_fd_data2 = test.memfd_create("data2", 0)
    assert test.write(mem_fd_data2, data2) == len(data2)
    mem_fd_empty2 = test.memfd_create("empty2", 0)
    assert test.luo_session_preserve_fd(session_fd1, mem_fd_data1, 0x1111) == 0
    assert test.luo_session_preserve_fd(session_fd1, mem_fd_empty1, 0x2222) == 0
    assert test.luo_session_preserve_fd(session_fd2, mem_fd_data2, 0x3333) == 0
    assert test.luo_session_preserve_fd(session_fd2, mem_fd_empty2, 0x4444) == 0
    assert test.read(mem_fd_data1) == data1
    assert test.read(mem_fd_data2) == data2
    assert test.read(mem_fd_empty1) == test.read(mem_fd_empty2) == b""
    fds = mem_fd_data1, mem_fd_empty1, mem_fd_data2, mem_fd_empty2, session_fd1, session_fd2
    for fd in fds:
        test.close(fd)


def test_preserve_unsupported_fd(test: Test) -> None:
    """A file without a handler fails with ENOENT."""
    fd1 = test.open(DEVICE)
    session_fd = test.luo_create_session(fd1, "unsupported-fd-test")
    unsupported_fd = test.open("/dev/null")
    assert test.luo_session_preserve_fd(session_fd, unsupported_fd, 0xDEAD) == -errno.ENOENT
    test.close(unsupported_fd)
    test.close(session_fd)


def test_prevent_double_preservation(test: Test) -> None:
    """A preserved file fails with EBUSY, in another session and in the same one."""
    fd1 = test.open(DEVICE)
    session_fd1 = test.luo_create_session(fd1, "double-preserve-session-1")
    session_fd2 = test.luo_create_session(fd1, "double-preserve-session-2")
    mem_fd = test.memfd_create("test-memfd", 0)
    assert test.luo_session_preserve_fd(session_fd1, mem_fd, 0x1111) == 0
    assert test.luo_session_preserve_fd(session_fd2, mem_fd, 0x2222) == -errno.EBUSY
    assert test.luo_session_preserve_fd(session_fd1, mem_fd, 0x3333) == -errno.EBUSY
    for fd in (mem_fd, session_fd1, session_fd2):
        test.close(fd)


def test_create_session_no_null_termination(test: Test) -> None:
    """A name of 64 bytes without a NUL fails with EINVAL."""
    fd1 = test.open(DEVICE)
    arg = uapi.create_session(b"X" * 64)
    assert test.answer(fd1, uapi.LIVEUPDATE_IOCTL_CREATE_SESSION, arg) == -errno.EINVAL


def test_create_session_empty_name(test: Test) -> None:
    """An empty name fails with EINVAL."""
    assert test.luo_create_session(test.open(DEVICE), "") == -errno.EINVAL


def test_get_session_name(test: Test) -> None:
    """A session tells its name."""
    session_fd = test.luo_create_session(test.open(DEVICE), "get-name-test-session")
    assert test.luo_get_session_name(session_fd) == b"get-name-test-session"
    test.close(session_fd)


def test_get_session_name_max_length(test: Test) -> None:
    """Also one of 63 bytes."""
    session_fd = test.luo_create_session(test.open(DEVICE), "A" * 63)
    assert test.luo_get_session_name(session_fd) == b"A" * 63
    test.close(session_fd)


def test_preserve_many_sessions(test: Test) -> None:
    """2000 sessions, and closed again."""
    free = test.kernel.pages.nr_free_pages()
    fd1 = test.open(DEVICE)
    test.rlimit_nofile = 2000 + 32
    session_fds = [test.luo_create_session(fd1, f"many-session-{i}") for i in range(2000)]
    assert all(fd >= 0 for fd in session_fds)
    assert test.kernel.liveupdate.sessions.outgoing.block_set.nblocks == 40
    for fd in session_fds:
        test.close(fd)
    assert test.kernel.pages.nr_free_pages() >= free - 8  # but for nodes of the tree


def test_preserve_many_files(test: Test) -> None:
    """500 empty files in one session, closed before it."""
    session_fd = test.luo_create_session(test.open(DEVICE), "many-files-test")
    test.rlimit_nofile = 500 + 10 + 32
    mem_fds = []
    for i in range(500):
        mem_fds.append(test.memfd_create("test-memfd", 0))
        assert test.luo_session_preserve_fd(session_fd, mem_fds[-1], i) == 0
    for fd in mem_fds:
        test.close(fd)
    assert len(test.kernel.liveupdate.preserved_files) == 500
    test.close(session_fd)
    assert test.kernel.liveupdate.preserved_files == {}
