"""The agent of a host: the process that has ``/dev/liveupdate`` open, and its sessions.

It opens the device when a step first needs it, and dies with its kernel. Guests and devices belong
to processes of their own: the agent gets a descriptor when a session is to preserve one, and passes
on what a session gives back, as over a socket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.kernel.liveupdate.luo_dev import LiveupdateDevice
from khosim.kernel.liveupdate.luo_session import Session
from khosim.scenario.files import Carried

if TYPE_CHECKING:
    from khosim.kernel.file import File
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.process import Process

__all__ = ("Agent", "SessionNote")

_RLIMIT_NOFILE = 1 << 20


class SessionNote:
    """What is known of one session: ``files`` by token, ``fd`` of the agent (-1: not open)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.files: dict[int, Carried] = {}
        self.fd = -1

    @property
    def is_open(self) -> bool:
        """Whether the agent has it open."""
        return self.fd >= 0

    def end(self) -> None:
        """The session is gone: its files are in no session any more."""
        for carried in self.files.values():
            if carried.session == self.name:
                carried.session = ""
        self.fd = -1


class Agent:
    """The agent's process and what is known of the sessions, by name.

    ``outgoing`` are those made in this kernel, ``incoming`` those from the predecessor.
    """

    def __init__(self) -> None:
        self.process: Process | None = None
        self._device_fd = -1
        self.outgoing: dict[str, SessionNote] = {}
        self.incoming: dict[str, SessionNote] = {}

    def _device(self, kernel: Kernel) -> tuple[Process, LiveupdateDevice]:
        # Raises what opening /dev/liveupdate is refused with.
        if self.process is None:
            process = kernel.process("agent", rlimit_nofile=_RLIMIT_NOFILE)
            self._device_fd = process.open("/dev/liveupdate")
            self.process = process
        device = self.process.file(self._device_fd)
        assert isinstance(device, LiveupdateDevice)
        return self.process, device

    def create(self, kernel: Kernel, name: str) -> SessionNote:
        """A new session; raises the kernel's refusal."""
        process, device = self._device(kernel)
        file = device.create_session(name)
        note = self.outgoing[name] = SessionNote(name)
        note.fd = process.install(file)
        return note

    def retrieve(self, kernel: Kernel, name: str) -> SessionNote:
        """A session of the predecessor; raises the kernel's refusal."""
        process, device = self._device(kernel)
        file = device.retrieve_session(name)
        note = self.incoming.setdefault(name, SessionNote(name))
        note.fd = process.install(file)
        return note

    def session(self, note: SessionNote) -> Session:
        """The open session."""
        assert self.process is not None
        session = self.process.file(note.fd)
        assert isinstance(session, Session)
        return session

    def preserve(self, note: SessionNote, carried: Carried, token: int) -> None:
        """Preserve a file under a token; raises the kernel's refusal."""
        process, file = self.process, carried.file
        assert process is not None
        assert file is not None
        file.get_file()
        fd = process.install(file)
        try:
            self.session(note).preserve(file, token)
        finally:
            process.close(fd)
        note.files[token] = carried
        carried.session, carried.token = note.name, token

    def retrieve_file(self, note: SessionNote, token: int) -> File:
        """The file under a token, with a reference for the caller; raises the refusal."""
        file: File = self.session(note).retrieve(token)
        return file

    def close(self, note: SessionNote) -> None:
        """Close the session: called off where it is outgoing, finished where it is incoming."""
        assert self.process is not None
        self.process.close(note.fd)
        self._gone(note)

    def _gone(self, note: SessionNote) -> None:
        note.end()
        for notes in (self.outgoing, self.incoming):
            if notes.get(note.name) is note:
                del notes[note.name]

    def open_notes(self) -> list[SessionNote]:
        """The sessions that the agent has open, those from the predecessor first."""
        notes = [*self.incoming.values(), *self.outgoing.values()]
        return [note for note in notes if note.is_open]

    def kill(self) -> list[SessionNote]:
        """SIGKILL: everything it has open is closed. Returns the sessions that went with it."""
        gone = self.open_notes()
        if self.process is not None:
            self.process.kill()
        self.process = None
        for note in gone:
            self._gone(note)
        return gone

    def jump(self, *, accepted: bool) -> None:
        """The kernel is gone, and the agent with it; sessions come in where they were taken over.

        Sessions of the predecessor that nobody retrieved are lost.
        """
        self.process = None
        self.incoming = self.outgoing if accepted else {}
        self.outgoing = {}
        for note in self.incoming.values():
            note.fd = -1
