"""A client of the GDB remote serial protocol, as far as the lab needs it.

QEMU's stub answers it (``gdbstub/`` there; the protocol is an appendix of GDB's manual): packets
``$data#checksum``, each acknowledged with ``+``. Numbers are hexadecimal, bytes come as pairs of
digits. Left out: run-length encoding, escapes in what is sent, everything that QEMU does not offer.
"""

from __future__ import annotations

import socket
import time

from khosim.errors import KhoSimError

__all__ = ("GdbClient", "GdbError")

_MAX_READ = 1024
_REGISTERS = {"rsi": 4, "rdi": 5, "rip": 16}


class GdbError(KhoSimError):
    """The stub refused, went away, or answered with something else than was asked."""


class GdbClient:
    """Speaks with a stub over a connected socket; the caller closes it.

    ``timeout`` is how many seconds an answer may take.
    """

    def __init__(self, connection: socket.socket, timeout: float = 10.0) -> None:
        self._socket = connection
        self._timeout = timeout
        self._received = bytearray()

    def fileno(self) -> int:
        """For ``select``: readable when a running guest has stopped."""
        return self._socket.fileno()

    # -- calls, all of them while the guest is stopped --------------------------------------------

    def read_memory(self, address: int, len_bytes: int) -> bytes:
        """Bytes at a virtual address of the stopped CPU."""
        parts = []
        while len_bytes:
            step = min(len_bytes, _MAX_READ)
            parts.append(self._bytes(self.ask(f"m{address:x},{step:x}"), step))
            address, len_bytes = address + step, len_bytes - step
        return b"".join(parts)

    def read_u64(self, address: int) -> int:
        """A little-endian number at a virtual address."""
        return int.from_bytes(self.read_memory(address, 8), "little")

    def register(self, name: str) -> int:
        """A register of the stopped CPU: rdi, rsi or rip of x86-64."""
        first = 16 * _REGISTERS[name]
        digits = self.ask("g")[first : first + 16]
        return int.from_bytes(self._bytes(digits, 8), "little")

    def insert_breakpoint(self, address: int) -> None:
        """Stop every CPU when one gets to this address."""
        self._ok(f"Z0,{address:x},1")

    def remove_breakpoint(self, address: int) -> None:
        """Undo :meth:`insert_breakpoint`."""
        self._ok(f"z0,{address:x},1")

    def ask(self, request: str) -> str:
        """Send a packet and return the answer; raises :class:`GdbError` for errors."""
        self._send(request)
        answer = self._packet(self._timeout)
        if answer is None:
            raise GdbError(f"gdb stub: no answer to {request[:20]!r}")
        if not answer or (answer[0] == "E" and len(answer) == 3):
            raise GdbError(f"gdb stub: {request[:20]!r} refused ({answer or 'not supported'})")
        return answer

    # -- running ----------------------------------------------------------------------------------

    def resume(self) -> None:
        """Let all CPUs run; :meth:`wait_stop` tells when they have stopped."""
        self._send("c")

    def interrupt(self) -> None:
        """Stop a running guest and wait until it has."""
        self._socket.sendall(b"\x03")
        if not self.wait_stop(self._timeout):
            raise GdbError("gdb stub: the guest does not stop")

    def wait_stop(self, timeout: float) -> bool:
        """Whether a running guest has stopped within ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while (packet := self._packet(max(0.0, end - time.monotonic()))) is not None:
            if packet[:1] in ("T", "S"):
                return True
            if packet[:1] in ("W", "X"):
                raise GdbError("gdb stub: the guest is gone")
        return False

    # -- packets ----------------------------------------------------------------------------------

    def _send(self, data: str) -> None:
        raw = data.encode("ascii")
        try:
            self._socket.sendall(b"$" + raw + b"#%02x" % (sum(raw) & 0xFF))
        except OSError as error:
            raise GdbError(f"gdb stub: {error.strerror or error}") from None

    def _packet(self, timeout: float) -> str | None:
        """The next packet, acknowledged; None where none comes in time."""
        end = time.monotonic() + timeout
        while True:
            start = self._received.find(b"$")
            stop = self._received.find(b"#", start + 1) if start >= 0 else -1
            if stop >= 0 and len(self._received) >= stop + 3:
                data = bytes(self._received[start + 1 : stop])
                checksum = bytes(self._received[stop + 1 : stop + 3])
                del self._received[: stop + 3]
                if checksum.lower() != b"%02x" % (sum(data) & 0xFF):
                    raise GdbError(f"gdb stub: a packet with a wrong checksum: {data[:20]!r}")
                self._socket.sendall(b"+")
                return data.decode("latin-1")
            if not self._receive(max(0.0, end - time.monotonic())):
                return None

    def _receive(self, timeout: float) -> bool:
        self._socket.settimeout(max(timeout, 0.001))
        try:
            got = self._socket.recv(65536)
        except TimeoutError:
            return False
        except OSError as error:
            raise GdbError(f"gdb stub: {error.strerror or error}") from None
        if not got:
            raise GdbError("gdb stub: the connection is closed")
        self._received += got
        return True

    def _ok(self, request: str) -> None:
        answer = self.ask(request)
        if answer != "OK":
            raise GdbError(f"gdb stub: {request!r} answered with {answer[:20]!r}")

    def _bytes(self, answer: str, len_bytes: int) -> bytes:
        try:
            data = bytes.fromhex(answer)
        except ValueError:
            data = b""
        if len(data) != len_bytes:
            raise GdbError(f"gdb stub: {answer[:20]!r} are not {len_bytes} bytes")
        return data
