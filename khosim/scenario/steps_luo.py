"""Steps of the agent: sessions of the Live Update Orchestrator, from ``/dev/liveupdate``.

Each goes the kernel's way (``kernel/liveupdate/luo_session.c``, ``luo_file.c`` @ 7.3) and may be
told to expect the errno with which that refuses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Self

from khosim.errors import InputError
from khosim.scenario.agent import SessionNote
from khosim.scenario.facts import orders_of
from khosim.scenario.fields import Table, count_text, did_you_mean
from khosim.scenario.files import Carried, Guest, folio_rows
from khosim.scenario.model import Limits, StepFact
from khosim.scenario.steps_base import ALL, StepBase, Unexpected
from khosim.scenario.steps_guest import file_name

if TYPE_CHECKING:
    from khosim.kernel.release import Release
    from khosim.scenario.play import Player

__all__ = ("Close", "Finish", "Kill", "PreserveFd", "Reboot", "RetrieveSession", "SessionStep")

_MAX_FILES = 1000
_MAX_TOKEN = (1 << 64) - 1
_MAX_NAME_CHARS = 200


def _session_name(table: Table, limits: Limits) -> str:
    name = table.text("session", max_chars=_MAX_NAME_CHARS)
    if name != ALL and name not in limits.sessions and not table.has("expect"):
        close = did_you_mean(name, limits.sessions)
        raise table.error(f"session: no step before this makes {name!r}{close}")
    return name


def _tokens(table: Table) -> tuple[int, ...]:
    return tuple(
        table.each("tokens", _MAX_FILES, lambda what, it: table.whole(what, it, 0, _MAX_TOKEN))
    )


def _fact(player: Player, files: Iterable[Carried], note: str = "") -> StepFact:
    # Files, their bytes, and the folios of the guests among them.
    chosen = list(files)
    size = 0
    rows: list[tuple[int, int, int, int]] = []
    for carried in chosen:
        file = carried.file
        if file is not None:
            size += carried.bytes_of(file)
        memfd = carried.memfd if isinstance(carried, Guest) else None
        if memfd is not None:
            rows += folio_rows(memfd)
    return StepFact(len(chosen), size, note, "file", orders_of(rows))


def _open_notes(player: Player, name: str, place: str) -> list[SessionNote]:
    found = [note for note in player.agent.open_notes() if name in (ALL, note.name)]
    if not found:
        what = "a session" if name == ALL else f"a session {name!r}"
        raise InputError(place, f"the agent does not have {what} open")
    return found if name == ALL else found[:1]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _AgentStep(StepBase):
    """A step that needs ``/dev/liveupdate``."""

    def lacks(self, release: Release) -> str:
        """The orchestrator came with 6.19."""
        return "" if release.luo else "live update"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SessionStep(_AgentStep):
    """Make a session, and preserve guests and devices in it."""

    do: ClassVar[str] = "session"
    files: tuple[str, ...]
    tokens: tuple[int, ...]

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> SessionStep:
        """Read the step; names that the kernel refuses are for the kernel to refuse."""
        name = table.text("name", max_chars=_MAX_NAME_CHARS)
        files = table.items("files", _MAX_FILES)
        for i, file in enumerate(files, 1):
            if not isinstance(file, str) or file not in limits.files:
                close = did_you_mean(str(file), limits.files)
                raise table.error(f"files, entry {i}: no step before this starts {file!r}{close}")
        tokens = _tokens(table)
        if tokens and len(tokens) != len(files):
            raise table.error(f"tokens: {len(tokens)} for {count_text(len(files), 'file')}")
        limits.sessions.add(name)
        return cls(
            **cls.common(table, limits, name=name),
            files=tuple(files),
            tokens=tokens or tuple(range(1, len(files) + 1)),
        )

    def run(self, player: Player) -> StepFact:
        """``LIVEUPDATE_IOCTL_CREATE_SESSION``, ``..._PRESERVE_FD``; raises their refusals."""
        note = player.agent.create(player.kernel, self.name)
        for name, token in zip(self.files, self.tokens, strict=True):
            (carried,) = player.carried(name, self.place)
            player.agent.preserve(note, carried, token)
        return _fact(player, note.files.values(), ", ".join(self.files))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PreserveFd(_AgentStep):
    """Preserve one more file in an open session."""

    do: ClassVar[str] = "preserve_fd"
    file: str
    token: int

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> PreserveFd:
        """Read the step."""
        name = _session_name(table, limits)
        return cls(
            **cls.common(table, limits, name=name),
            file=file_name(table, "file", limits),
            token=table.integer("token", None, 0, _MAX_TOKEN),
        )

    def run(self, player: Player) -> StepFact:
        """``LIVEUPDATE_SESSION_PRESERVE_FD``; raises its refusals."""
        (note,) = _open_notes(player, self.name, self.place)
        (carried,) = player.carried(self.file, self.place)
        player.agent.preserve(note, carried, self.token)
        return _fact(player, [carried], f"{self.file} under token {self.token:#x}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RetrieveSession(_AgentStep):
    """Get sessions of the predecessor, and files out of them, and hold them against the notes."""

    do: ClassVar[str] = "retrieve"
    WORDS: ClassVar[tuple[str, ...]] = ("damaged",)
    tokens: tuple[int, ...]

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> RetrieveSession:
        """Read the step; with ``tokens`` the session may be open already."""
        name = _session_name(table, limits)
        tokens = _tokens(table)
        if tokens and name == ALL:
            raise table.error("tokens: for one session only, not for every one")
        return cls(**cls.common(table, limits, name=name), tokens=tokens)

    def run(self, player: Player) -> StepFact:
        """``..._RETRIEVE_SESSION``, ``..._RETRIEVE_FD``; ``damaged`` where a file is another."""
        agent, kernel = player.agent, player.kernel
        names = [self.name]
        if self.name == ALL:
            names = [name for name, note in agent.incoming.items() if not note.is_open]
            if not names:
                raise InputError(self.place, "no session came from the predecessor")
        got: list[Carried] = []
        for name in names:
            note = agent.incoming.get(name)
            if not self.tokens or note is None or not note.is_open:
                note = agent.retrieve(kernel, name)
            got += [self._file(player, note, token) for token in self.tokens or tuple(note.files)]
        fact = _fact(player, got, "as they were: folios, content, attributes")
        return dataclasses.replace(fact, note=fact.note if got else "no files")

    def _file(self, player: Player, note: SessionNote, token: int) -> Carried:
        file = player.agent.retrieve_file(note, token)
        carried = note.files.get(token)
        if carried is None:
            raise Unexpected("damaged", f"session {note.name!r} has a file {token:#x} of nobody")
        if carried.process is None:
            carried.hold(player.kernel, file)
        else:
            file.fput()
        fault = carried.fault(file)
        if fault:
            raise Unexpected("damaged", f"{carried.name}: {fault}")
        return carried


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _EndStep(_AgentStep):
    """A step that ends the life of files in sessions."""

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Self:
        """Read the step."""
        return cls(**cls.common(table, limits, name=_session_name(table, limits)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finish(_EndStep):
    """Finish sessions of the predecessor: what was not retrieved by now is freed."""

    do: ClassVar[str] = "finish"

    def run(self, player: Player) -> StepFact:
        """``LIVEUPDATE_SESSION_FINISH``; raises its refusals."""
        files = 0
        for note in _open_notes(player, self.name, self.place):
            player.agent.session(note).finish()
            files += len(note.files)
            player.let_go(note.files.values())
            note.files = {}
        return StepFact(files, 0, "", "file")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Close(_EndStep):
    """Close sessions: this kernel's are called off, the predecessor's are finished."""

    do: ClassVar[str] = "close"

    def run(self, player: Player) -> StepFact:
        """``close``."""
        notes = _open_notes(player, self.name, self.place)
        for note in notes:
            player.agent.close(note)
            player.let_go(note.files.values())
        return StepFact(len(notes), 0, "", "session")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kill(StepBase):
    """Kill the agent: all its sessions are closed. The next step that needs one starts another."""

    do: ClassVar[str] = "kill"

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Kill:
        """Read the step."""
        return cls(**cls.common(table, limits, name="agent"))

    def run(self, player: Player) -> StepFact:
        """``SIGKILL``."""
        notes = player.agent.kill()
        for note in notes:
            player.let_go(note.files.values())
        return StepFact(len(notes), 0, "", "session")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reboot(StepBase):
    """Try to jump, and be refused: everything goes on as before."""

    do: ClassVar[str] = "reboot"

    @classmethod
    def parse(cls, table: Table, limits: Limits) -> Reboot:
        """Read the step; ``expect`` must be there."""
        step = cls(**cls.common(table, limits, name=""))
        if not step.expect:
            raise table.error("expect: the errno with which something refuses is missing")
        return step

    def run(self, player: Player) -> StepFact:
        """``kexec_file_load`` and the reboot system call; raises what refuses it."""
        player.try_jump()
        raise Unexpected("not refused", f"the machine jumped, but {self.expect} was expected")
