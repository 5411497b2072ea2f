"""A running QEMU and the three sockets that it is talked to through."""

from __future__ import annotations

import contextlib
import selectors
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from khosim.errors import InputError
from khosim.lab.channel import Event, PortReader
from khosim.lab.console import Console
from khosim.lab.gdb import GdbClient
from khosim.lab.guest_ram import GuestRam
from khosim.lab.machine import GuestMachine

__all__ = ("Qemu",)

_START_SECONDS = 30
_SOCKETS = ("console", "port", "gdb")


class Qemu:
    """Starts on entry, is gone on exit, with all of its files.

    ``cmdline`` is that of the first kernel. ``ram`` is the guest's memory, ``console`` what it
    said, ``gdb`` the stub. The guest is stopped at its very first instruction until
    :meth:`GdbClient.resume`.
    """

    def __init__(
        self, command: str, machine: GuestMachine, kernel: Path, initrd: bytes, cmdline: str
    ) -> None:
        self._command = command
        self._machine = machine
        self._kernel = kernel
        self._initrd = initrd
        self._stack = contextlib.ExitStack()
        self.console = Console()
        self._reader = PortReader()
        self._cmdline = cmdline

    def __enter__(self) -> Qemu:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _start(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="khosim-lab-")))
        sizes = self._machine.node_bytes
        ram = [folder / f"ram{number}" for number in range(len(sizes))]
        for path, size in zip(ram, sizes, strict=True):
            with open(path, "wb") as file:
                file.truncate(size)
        (folder / "initrd").write_bytes(self._initrd)
        listeners = {name: self._listen(folder / name) for name in _SOCKETS}
        command = self._machine.qemu_arguments(
            self._command,
            kernel=self._kernel.resolve(),
            initrd=folder / "initrd",
            ram=ram,
            console=folder / "console",
            port=folder / "port",
            gdb=folder / "gdb",
            cmdline=self._cmdline,
        )
        with open(folder / "errors", "wb") as errors:
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors
                )
            except OSError as error:
                raise InputError(self._command, error.strerror or str(error)) from None
        self._stack.callback(self._stop)
        connections = {name: self._accept(listeners[name], folder) for name in _SOCKETS}
        self._console_socket, self._port_socket = connections["console"], connections["port"]
        self.gdb = GdbClient(connections["gdb"])
        self._selector = self._stack.enter_context(selectors.DefaultSelector())
        for name in ("console", "port"):
            self._selector.register(connections[name], selectors.EVENT_READ, name)
        self.ram = GuestRam(ram, sizes)

    def _listen(self, path: Path) -> socket.socket:
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(0.2)
        return listener

    def _accept(self, listener: socket.socket, folder: Path) -> socket.socket:
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(TimeoutError):
                return self._stack.enter_context(listener.accept()[0])
        said = (folder / "errors").read_text(errors="replace").strip().splitlines()
        raise InputError(self._command, f"did not start: {said[-1] if said else 'no word'}")

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def is_gone(self) -> bool:
        """Whether QEMU has ended, as it does when the guest resets or switches itself off."""
        return self._process.poll() is not None

    def answer(self) -> None:
        """Let the guest's program go on from where it waits."""
        self._port_socket.sendall(b"g")

    def pump(self, timeout: float) -> Iterator[Event]:
        """Wait up to ``timeout`` seconds for any word, and yield what came through the port."""
        for key, _ in self._selector.select(timeout):
            try:
                got = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
            except OSError:
                got = b""
            if not got:
                self._selector.unregister(key.fileobj)
            elif key.data == "console":
                self.console.feed(got)
            else:
                yield from self._reader.feed(got)
