"""ioctls and file descriptors: what an agent in C would see."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

import pytest

from khosim import KernelError, KhoSimError, Machine
from khosim.abi import liveupdate as uapi
from khosim.kernel.kernel import Kernel
from khosim.kernel.memfd import MFD_HUGETLB
from khosim.kernel.process import Process
from khosim.kernel.uaccess import copy_struct_from_user, copy_to_user, get_user_u32

ON = "kho=on liveupdate=on"
CREATE, RETRIEVE = uapi.LIVEUPDATE_IOCTL_CREATE_SESSION, uapi.LIVEUPDATE_IOCTL_RETRIEVE_SESSION
SESSION_COMMANDS = {
    "preserve": (uapi.LIVEUPDATE_SESSION_PRESERVE_FD, uapi.preserve_fd(3, 1)),
    "retrieve": (uapi.LIVEUPDATE_SESSION_RETRIEVE_FD, uapi.retrieve_fd(1)),
    "finish": (uapi.LIVEUPDATE_SESSION_FINISH, uapi.finish()),
    "name": (uapi.LIVEUPDATE_SESSION_GET_NAME, uapi.get_name()),
}


def refused(error: int, call: Callable[..., object], *args: object) -> KernelError:
    with pytest.raises(KernelError) as caught:
        call(*args)
    assert caught.value.errno == error
    return caught.value


def fd_of(arg: bytearray) -> int:
    return int(struct.unpack_from("<i", arg, 4)[0])


class Agent(Process):
    """A process that has the device open as descriptor 3."""

    __slots__ = ()

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel, "agent")
        assert self.open("/dev/liveupdate") == 3

    def create(self, name: bytes) -> int:
        arg = uapi.create_session(name)
        assert self.ioctl(3, CREATE, arg) == 0
        return fd_of(arg)

    def retrieve(self, name: bytes) -> int:
        arg = uapi.retrieve_session(name)
        assert self.ioctl(3, RETRIEVE, arg) == 0
        return fd_of(arg)


@pytest.fixture
def agent() -> Agent:
    return Agent(Machine("64M", checks=False).boot(cmdline=ON))


def incoming_agent(machine: Machine) -> tuple[Agent, int]:
    """In a successor, with a retrieved session that holds one file under token 1."""
    old = Agent(machine.boot(cmdline=ON))
    session, guest = old.create(b"s"), old.memfd_create("guest")
    old.file(guest).write(0, b"content")  # type: ignore[attr-defined]
    old.ioctl(session, uapi.LIVEUPDATE_SESSION_PRESERVE_FD, uapi.preserve_fd(guest, 1))
    agent = Agent(machine.kexec(old.kernel))
    return agent, agent.retrieve(b"s")


# -- numbers and sizes ----------------------------------------------------------------------------


def test_numbers_and_sizes() -> None:
    """As a C compiler makes them of the header."""
    assert (CREATE, RETRIEVE) == (0xBA00, 0xBA01)
    assert [command for command, _ in SESSION_COMMANDS.values()] == [
        0xBA40,
        0xBA41,
        0xBA42,
        0xBA43,
    ]
    assert [len(arg) for _, arg in SESSION_COMMANDS.values()] == [16, 16, 8, 72]
    assert len(uapi.create_session(b"x")) == len(uapi.retrieve_session(b"x")) == 72
    assert bytes(uapi.preserve_fd(-1, 0x1122334455667788)) == bytes.fromhex(
        "10000000 ffffffff 8877665544332211"
    )
    assert bytes(uapi.create_session(b"ab")) == b"\x48\0\0\0\0\0\0\0ab".ljust(72, b"\0")


# -- the device -----------------------------------------------------------------------------------


def test_open_and_close(agent: Agent) -> None:
    """-EBUSY for a second agent until the first one closes its last descriptor."""
    other = Process(agent.kernel)
    assert refused(errno.EBUSY, other.open, "/dev/liveupdate").symbol == "luo_open"
    copy = agent.dup(3)
    agent.close(3)
    refused(errno.EBUSY, other.open, "/dev/liveupdate")
    agent.close(copy)
    assert other.open("/dev/liveupdate") == 3
    refused(errno.EBADF, agent.close, 3)


def test_create_and_retrieve_answer_with_descriptors() -> None:
    """The lowest free one, which the structure tells."""
    machine = Machine("64M", checks=False)
    agent, session = incoming_agent(machine)
    assert session == 4
    assert agent.create(b"new") == 5
    agent.close(4)
    assert agent.create(b"newer") == 4
    assert repr(agent) == "Process('agent', 3 descriptors)"


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (0xBA02, errno.EINVAL),
        (0xBA40, errno.EINVAL),
        (0xBB00, errno.ENOTTY),
        (0x4004BA00, errno.ENOTTY),
        (0x1BA00, errno.ENOTTY),
    ],
)
def test_unknown_commands_of_the_device(agent: Agent, command: int, error: int) -> None:
    """The number within the type decides first; then everything has to fit."""
    refused(error, agent.ioctl, 3, command, uapi.create_session(b"x"))


def test_user_memory_of_the_device(agent: Agent) -> None:
    """Null, too short, too small, too large, read-only."""
    whole = uapi.create_session(b"x")
    refused(errno.EFAULT, agent.ioctl, 3, CREATE, None)
    refused(errno.EFAULT, agent.ioctl, 3, CREATE, whole[:3])
    refused(errno.EFAULT, agent.ioctl, 3, CREATE, whole[:71])
    for size in (0, 4, 71):
        whole[:4] = size.to_bytes(4, "little")
        refused(errno.EINVAL, agent.ioctl, 3, CREATE, whole)
    longer = uapi.create_session(b"x") + bytearray(8)
    longer[:4] = (80).to_bytes(4, "little")
    longer[79] = 1
    refused(errno.E2BIG, agent.ioctl, 3, CREATE, longer)
    refused(errno.E2BIG, agent.ioctl, 3, CREATE, longer[:80] + b"")
    longer[79] = 0
    refused(errno.EFAULT, agent.ioctl, 3, CREATE, longer[:79])
    assert agent.ioctl(3, CREATE, longer) == 0
    assert fd_of(longer) == 4
    assert len(longer) == 80


def test_an_answer_that_cannot_be_written(agent: Agent) -> None:
    """-EFAULT, and the session is gone again, with its descriptor."""
    refused(errno.EFAULT, agent.ioctl, 3, CREATE, bytes(uapi.create_session(b"x")))
    assert agent.kernel.liveupdate.sessions.outgoing.count == 0
    assert agent.create(b"x") == 4


def test_a_retrieval_whose_answer_cannot_be_written() -> None:
    """-EFAULT; the session is finished by that, as its last descriptor is closed."""
    machine = Machine("64M")
    old = Agent(machine.boot(cmdline=ON))
    old.create(b"s")
    agent = Agent(machine.kexec(old.kernel))
    refused(errno.EFAULT, agent.ioctl, 3, RETRIEVE, bytes(uapi.retrieve_session(b"s")))
    refused(errno.ENOENT, agent.ioctl, 3, RETRIEVE, uapi.retrieve_session(b"s"))
    assert not machine.check()


def test_descriptors_run_out(agent: Agent) -> None:
    """-EMFILE before anything is done."""
    agent.rlimit_nofile = 5
    agent.create(b"a")
    refused(errno.EMFILE, agent.ioctl, 3, CREATE, uapi.create_session(b"b"))
    refused(errno.EMFILE, agent.memfd_create, "f")
    refused(errno.EMFILE, agent.open, "/dev/null")
    refused(errno.EMFILE, agent.dup, 4)
    assert agent.kernel.liveupdate.sessions.outgoing.count == 1


def test_errors_of_the_calls_reach_the_agent(agent: Agent) -> None:
    """Names: too long, empty, in use, unknown. No descriptor is lost by that."""
    agent.create(b"a")
    refused(errno.EINVAL, agent.ioctl, 3, CREATE, uapi.create_session(b"X" * 64))
    refused(errno.EINVAL, agent.ioctl, 3, CREATE, uapi.create_session(b""))
    refused(errno.EEXIST, agent.ioctl, 3, CREATE, uapi.create_session(b"a\0b"))
    refused(errno.ENOENT, agent.ioctl, 3, RETRIEVE, uapi.retrieve_session(b"a"))
    assert sorted(agent.files) == [3, 4]


# -- sessions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (0xBA3F, errno.EINVAL),
        (0xBA44, errno.EINVAL),
        (0xBA00, errno.EINVAL),
        (0xBB43, errno.ENOTTY),
        (0xC048BA43, errno.ENOTTY),
    ],
)
def test_unknown_commands_of_sessions(agent: Agent, command: int, error: int) -> None:
    """As on the device."""
    refused(error, agent.ioctl, agent.create(b"s"), command, uapi.get_name())


@pytest.mark.parametrize("what", list(SESSION_COMMANDS))
def test_user_memory_of_sessions(what: str) -> None:
    """Null, short, small, too large, for each command on the kind of session it is for."""
    machine = Machine("64M", checks=False)
    agent, session = incoming_agent(machine)
    if what == "preserve":
        session = agent.create(b"out")
    command, arg = SESSION_COMMANDS[what]
    refused(errno.EFAULT, agent.ioctl, session, command, None)
    refused(errno.EFAULT, agent.ioctl, session, command, arg[:2])
    refused(errno.EFAULT, agent.ioctl, session, command, arg[:-1])
    small = bytearray(arg)
    small[:4] = (len(arg) - 1).to_bytes(4, "little")
    refused(errno.EINVAL, agent.ioctl, session, command, small)
    large = arg + b"\0\0\0\1"
    large[:4] = len(large).to_bytes(4, "little")
    refused(errno.E2BIG, agent.ioctl, session, command, large)


def test_the_wrong_kind_of_session() -> None:
    """-EINVAL, before the structure is even looked at."""
    machine = Machine("64M", checks=False)
    agent, incoming = incoming_agent(machine)
    outgoing = agent.create(b"out")
    for fd, what in ((incoming, "preserve"), (outgoing, "retrieve"), (outgoing, "finish")):
        command, _ = SESSION_COMMANDS[what]
        large = bytearray(b"\xff\0\0\0" + b"\xff" * 251)
        refused(errno.EINVAL, agent.ioctl, fd, command, large)
    command, arg = SESSION_COMMANDS["name"]
    for fd in (incoming, outgoing):
        assert agent.ioctl(fd, command, bytearray(arg)) == 0


def test_a_life_in_ioctls() -> None:
    """Preserve, jump, retrieve, finish; the content is there, and nothing is left."""
    machine = Machine("64M")
    agent, session = incoming_agent(machine)
    arg = uapi.retrieve_fd(1)
    assert agent.ioctl(session, uapi.LIVEUPDATE_SESSION_RETRIEVE_FD, arg) == 0
    assert fd_of(arg) == 5
    again = uapi.retrieve_fd(1)
    agent.ioctl(session, uapi.LIVEUPDATE_SESSION_RETRIEVE_FD, again)
    assert agent.file(5) is agent.file(fd_of(again))
    assert agent.file(5).read(0, 7) == b"content"  # type: ignore[attr-defined]
    assert agent.ioctl(session, uapi.LIVEUPDATE_SESSION_FINISH, uapi.finish()) == 0
    agent.exit()
    assert agent.kernel.liveupdate.preserved_files == {}
    assert not machine.check()


def test_preserve_by_descriptor(agent: Agent) -> None:
    """-EBADF for one that is not open, -ENOENT for a file without a handler, -EEXIST, -EBUSY."""
    session = agent.create(b"s")
    guest = agent.memfd_create("guest")

    def preserve(fd: int, token: int) -> int:
        arg = uapi.preserve_fd(fd, token)
        return agent.ioctl(session, uapi.LIVEUPDATE_SESSION_PRESERVE_FD, arg)

    refused(errno.EBADF, preserve, 77, 1)
    refused(errno.EBADF, preserve, -1, 1)
    refused(errno.ENOENT, preserve, session, 1)
    refused(errno.ENOENT, preserve, agent.memfd_create("huge", MFD_HUGETLB), 1)
    assert preserve(guest, 1) == 0
    refused(errno.EEXIST, preserve, guest, 1)
    refused(errno.EBUSY, preserve, guest, 2)


def test_preserved_though_the_answer_was_lost(agent: Agent) -> None:
    """-EFAULT, and a warning that it did succeed."""
    session = agent.create(b"s")
    arg = bytes(uapi.preserve_fd(agent.memfd_create("guest"), 1))
    refused(errno.EFAULT, agent.ioctl, session, uapi.LIVEUPDATE_SESSION_PRESERVE_FD, arg)
    said = "luo: The file was successfully preserved, but response to user failed"
    assert agent.kernel.messages[-1] == said
    assert len(agent.kernel.liveupdate.preserved_files) == 1


def test_retrieved_though_the_answer_was_lost() -> None:
    """-EFAULT; LUO keeps the file, and hands it out at the next attempt."""
    machine = Machine("64M", checks=False)
    agent, session = incoming_agent(machine)
    command = uapi.LIVEUPDATE_SESSION_RETRIEVE_FD
    refused(errno.ENOENT, agent.ioctl, session, command, uapi.retrieve_fd(2))
    refused(errno.EFAULT, agent.ioctl, session, command, bytes(uapi.retrieve_fd(1)))
    (file,) = agent.kernel.liveupdate.preserved_files.values()
    assert (file.f_count, sorted(agent.files)) == (1, [3, 4])
    agent.rlimit_nofile = 5
    refused(errno.EMFILE, agent.ioctl, session, command, uapi.retrieve_fd(1))
    agent.rlimit_nofile = 6
    assert agent.ioctl(session, command, uapi.retrieve_fd(1)) == 0
    assert file.f_count == 2


def test_reserved_fields_are_zero() -> None:
    """-EINVAL otherwise."""
    machine = Machine("64M", checks=False)
    agent, session = incoming_agent(machine)
    for what in ("finish", "name"):
        command, arg = SESSION_COMMANDS[what]
        arg = bytearray(arg)
        arg[4] = 1
        refused(errno.EINVAL, agent.ioctl, session, command, arg)


def test_finish_whose_answer_is_lost() -> None:
    """-EFAULT, but finished."""
    machine = Machine("64M", checks=False)
    agent, session = incoming_agent(machine)
    command = uapi.LIVEUPDATE_SESSION_FINISH
    refused(errno.EFAULT, agent.ioctl, session, command, bytes(uapi.finish()))
    command = uapi.LIVEUPDATE_SESSION_RETRIEVE_FD
    refused(errno.ENOENT, agent.ioctl, session, command, uapi.retrieve_fd(1))


def test_the_name_is_copied_in_words(agent: Agent) -> None:
    """What user space had behind the name's last word is still there."""
    arg = uapi.get_name()
    arg[8:] = b"?" * 64
    agent.ioctl(agent.create(b"nine char"), uapi.LIVEUPDATE_SESSION_GET_NAME, arg)
    assert bytes(arg[8:]) == b"nine char" + bytes(7) + b"?" * 48
    refused(
        errno.EFAULT,
        agent.ioctl,
        agent.create(b"x"),
        uapi.LIVEUPDATE_SESSION_GET_NAME,
        bytes(uapi.get_name()),
    )


def test_the_longest_name(agent: Agent) -> None:
    """63 bytes and their NUL."""
    arg = uapi.get_name()
    agent.ioctl(agent.create(b"A" * 63), uapi.LIVEUPDATE_SESSION_GET_NAME, arg)
    assert bytes(arg[8:]) == b"A" * 63 + b"\0"


def test_frozen_sessions_keep_their_callers(agent: Agent) -> None:
    """After the serialization an ioctl that passes its checks never returns."""
    session = agent.create(b"s")
    agent.kernel.liveupdate.reboot()
    refused(errno.EINVAL, agent.ioctl, session, uapi.LIVEUPDATE_SESSION_FINISH, uapi.finish())
    with pytest.raises(KhoSimError, match="for ever"):
        agent.ioctl(session, uapi.LIVEUPDATE_SESSION_GET_NAME, uapi.get_name())


# -- processes ------------------------------------------------------------------------------------


def test_calls_without_a_file(agent: Agent) -> None:
    """-EBADF for a closed descriptor, -ENOTTY for a file without ioctls, -ENOENT for a path."""
    refused(errno.EBADF, agent.ioctl, 9, CREATE, None)
    refused(errno.ENOTTY, agent.ioctl, agent.open("/dev/null"), CREATE, None)
    refused(errno.ENOENT, agent.open, "/dev/kvm")
    refused(errno.EINVAL, agent.memfd_create, "f", 1 << 20)
    assert sorted(agent.files) == [3, 4]
    off = Machine("64M", checks=False).boot(cmdline="kho=on").process()
    refused(errno.ENOENT, off.open, "/dev/liveupdate")


def test_a_child_shares_its_parents_files(agent: Agent) -> None:
    """Sessions live as long as one of the two."""
    session = agent.create(b"s")
    child = agent.fork("child")
    agent.exit()
    with pytest.raises(KhoSimError, match="has exited"):
        agent.create(b"t")
    assert list(agent.kernel.liveupdate.sessions.outgoing.sessions) == ["s"]
    child.close(3)
    assert child.ioctl(session, uapi.LIVEUPDATE_SESSION_GET_NAME, uapi.get_name()) == 0
    child.kill()
    assert agent.kernel.liveupdate.sessions.outgoing.count == 0


def test_the_agent_is_killed() -> None:
    """Its files go back to front; everything that it had preserved is given up."""
    machine = Machine("64M")
    agent = Agent(machine.boot(cmdline=ON))
    order: list[str] = []
    machine.listen(lambda event: None)
    for name in (b"a", b"b", b"c"):
        guest = agent.memfd_create("guest")
        command = uapi.LIVEUPDATE_SESSION_PRESERVE_FD
        agent.ioctl(agent.create(name), command, uapi.preserve_fd(guest, 1))
    agent.kernel.trace = lambda event: (
        order.append(event.args["name"]) if event.symbol == "luo_session_release" else None
    )
    agent.kill()
    assert order == ["c", "b", "a"]
    luo = agent.kernel.liveupdate
    assert (luo.preserved_files, luo.in_use) == ({}, False)
    assert not machine.check()


def test_files_made_in_python_get_descriptors(agent: Agent) -> None:
    """And come back as files."""
    guest = agent.kernel.memfd("guest")
    fd = agent.install(guest)
    assert agent.file(fd) is guest
    agent.close(fd)
    assert guest.f_count == 0


def test_the_reboot_system_call() -> None:
    """With nothing loaded -EINVAL; a loaded image is jumped to."""
    machine = Machine("64M", checks=False)
    agent = Agent(machine.boot(cmdline=ON))
    refused(errno.EINVAL, agent.reboot)
    session = agent.create(b"s")
    from khosim.kernel.image import KernelImage

    agent.kernel.kexec_file_load(KernelImage.build("7.3", size=4 << 20), cmdline=ON)
    agent.reboot()
    assert not agent.kernel.alive
    successor = Agent(machine.resume())
    assert successor.retrieve(b"s") == session == 4


# -- user memory ----------------------------------------------------------------------------------


def test_structures_from_user_space() -> None:
    """Shorter ones are filled up, longer ones cut; what is cut has to be there, and zero."""
    assert copy_struct_from_user(8, b"\4\0\0\0", 4) == b"\4\0\0\0\0\0\0\0"
    assert copy_struct_from_user(4, b"\1\2\3\4\0\0", 6) == b"\1\2\3\4"
    refused(errno.E2BIG, copy_struct_from_user, 4, b"\1\2\3\4\0\1", 6)
    refused(errno.E2BIG, copy_struct_from_user, 4, b"\1\2\3\4\1", 6)
    refused(errno.EFAULT, copy_struct_from_user, 4, b"\1\2\3\4\0", 6)
    refused(errno.EFAULT, copy_struct_from_user, 4, None, 4)
    assert get_user_u32(memoryview(b"\1\0\0\0\0")) == 1
    target = bytearray(4)
    copy_to_user(target, b"ab")
    assert target == b"ab\0\0"
    refused(errno.EFAULT, copy_to_user, bytearray(1), b"ab")


def test_what_proc_shows_of_a_descriptor() -> None:
    """``readlink`` of /proc/self/fd: the kind of file and its name, up to what a name may have."""
    kernel = Machine("64M").boot(cmdline="kho=on liveupdate=on")
    agent = kernel.process("agent")
    device = agent.open("/dev/liveupdate")
    assert agent.readlink(device) == "/liveupdate"
    assert agent.readlink(agent.memfd_create("guest")) == "/memfd:guest (deleted)"
    call = uapi.create_session(b"x" * 63)
    agent.ioctl(device, uapi.LIVEUPDATE_IOCTL_CREATE_SESSION, call)
    fd = uapi.CREATE_SESSION.unpack(call)[1]
    assert agent.readlink(fd) == "anon_inode:[luo_session] " + "x" * 63
