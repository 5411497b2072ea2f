"""The GDB remote protocol, spoken with a stub that is a few lines of Python."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from khosim.lab.gdb import GdbClient, GdbError

Answer = Callable[[str], "str | bytes | None"]


def _packet(data: str) -> bytes:
    return b"$%s#%02x" % (data.encode(), sum(data.encode()) % 256)


class Stub:
    """Answers packets with ``answers``; bytes are sent as they are, None is silence."""

    def __init__(self, answers: Answer) -> None:
        self.near, self.far = socket.socketpair()
        self.answers = answers
        self.asked: list[str] = []
        self.acks = 0
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        received = b""
        with self.far:
            while got := self.far.recv(4096):
                received += got
                while received:
                    if received[:1] == b"+":
                        self.acks += 1
                        received = received[1:]
                    elif received[:1] == b"\x03":
                        received = received[1:]
                        self._reply("\x03")
                    elif b"#" in received and len(received) >= received.index(b"#") + 3:
                        end = received.index(b"#")
                        request = received[1:end].decode()
                        assert int(received[end + 1 : end + 3], 16) == sum(received[1:end]) % 256
                        received = received[end + 3 :]
                        self.far.sendall(b"+")
                        self._reply(request)
                    else:
                        break

    def _reply(self, request: str) -> None:
        self.asked.append(request)
        answer = self.answers(request)
        if answer is not None:
            self.far.sendall(answer if isinstance(answer, bytes) else _packet(answer))

    def close(self) -> None:
        self.near.close()
        self.thread.join(5)


@pytest.fixture
def stub() -> Iterator[Callable[[Answer], tuple[Stub, GdbClient]]]:
    """Makes a stub and its client."""
    made: list[Stub] = []

    def make(answers: Answer) -> tuple[Stub, GdbClient]:
        made.append(Stub(answers))
        return made[-1], GdbClient(made[-1].near, timeout=0.3)

    yield make
    for one in made:
        one.close()


def _memory(request: str) -> str:
    address, length = (int(word, 16) for word in request[1:].split(","))
    return bytes((address + i) % 251 for i in range(length)).hex()


def test_memory_is_read_in_pieces(stub: Callable[[Answer], tuple[Stub, GdbClient]]) -> None:
    """A long read is several packets, put together in order."""
    server, client = stub(_memory)
    assert client.read_memory(0x1000, 2500) == bytes((0x1000 + i) % 251 for i in range(2500))
    assert server.asked == ["m1000,400", "m1400,400", "m1800,1c4"]


def test_numbers_and_registers(stub: Callable[[Answer], tuple[Stub, GdbClient]]) -> None:
    """Numbers are little-endian; rdi is the sixth register, rip the seventeenth."""
    registers = b"".join(n.to_bytes(8, "little") for n in range(100, 124)).hex()
    _, client = stub(lambda request: registers if request == "g" else "0102000000000080")
    assert client.read_u64(0) == 0x8000000000000201
    assert (client.register("rsi"), client.register("rdi"), client.register("rip")) == (
        104,
        105,
        116,
    )


def test_breakpoints(stub: Callable[[Answer], tuple[Stub, GdbClient]]) -> None:
    """They are set and removed with their address, and OK is what must come back."""
    server, client = stub(lambda request: "OK")
    client.insert_breakpoint(0xFFFFFFFF81060000)
    client.remove_breakpoint(0xFFFFFFFF81060000)
    assert server.asked == ["Z0,ffffffff81060000,1", "z0,ffffffff81060000,1"]


def test_running_and_stopping(stub: Callable[[Answer], tuple[Stub, GdbClient]]) -> None:
    """A running guest says nothing until it stops, by itself or when it is interrupted."""
    server, client = stub(lambda request: "T02thread:01;" if request == "\x03" else None)
    client.resume()
    assert client.wait_stop(0) is False
    client.interrupt()
    server.far.sendall(b"+" + _packet("T05thread:01;"))
    assert client.wait_stop(5) is True
    assert server.asked == ["c", "\x03"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("E22", r"'m10,8' refused \(E22\)"),
        ("", r"refused \(not supported\)"),
        ("00", r"'00' are not 8 bytes"),
        ("zz" * 8, r"'zz.*' are not 8 bytes"),
        (b"$0000#00", "wrong checksum"),
        (None, "no answer to 'm10,8'"),
    ],
)
def test_bad_answers(
    stub: Callable[[Answer], tuple[Stub, GdbClient]], answer: str | bytes | None, said: str
) -> None:
    """Each says what was asked and what is wrong with the answer."""
    _, client = stub(lambda request: answer)
    with pytest.raises(GdbError, match=said):
        client.read_memory(0x10, 8)


def test_a_refused_breakpoint(stub: Callable[[Answer], tuple[Stub, GdbClient]]) -> None:
    """Anything but OK is a refusal."""
    _, client = stub(lambda request: "no")
    with pytest.raises(GdbError, match=r"'Z0,10,1' answered with 'no'"):
        client.insert_breakpoint(0x10)


@pytest.mark.parametrize("packet", ["W00", "X09"])
def test_a_guest_that_ends(stub: Callable[[Answer], tuple[Stub, GdbClient]], packet: str) -> None:
    """The stub says that the guest is gone."""
    _, client = stub(lambda request: packet)
    client.resume()
    with pytest.raises(GdbError, match="the guest is gone"):
        client.wait_stop(5)


def test_a_closed_connection() -> None:
    """A stub that goes away is an error, not an endless wait."""
    near, far = socket.socketpair()
    with near:
        far.close()
        client = GdbClient(near)
        with pytest.raises(GdbError, match="gdb stub: "):
            client.ask("g")


def test_every_packet_is_acknowledged(
    stub: Callable[[Answer], tuple[Stub, GdbClient]],
) -> None:
    """Each answer gets its plus sign: an old stub waits for it."""
    server, client = stub(_memory)
    client.read_memory(0, 8)
    client.read_memory(0, 8)
    server.near.shutdown(socket.SHUT_WR)
    server.thread.join(5)
    assert server.acks == 2
