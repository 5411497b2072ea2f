"""What the guest's program says over its second serial port (``init.c`` beside this module).

A line ``:KEY words`` is a message. A line ``@NAME LENGTH`` is followed by LENGTH bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple, TypeAlias

from khosim.errors import KhoSimError

__all__ = ("ChannelError", "Event", "GuestFile", "Message", "PortReader")

_MAX_LINE = 4096
_MAX_FILE = 64 << 20


class ChannelError(KhoSimError):
    """The guest said something that its program does not say."""


class Message(NamedTuple):
    """A message: its key in capitals, and the rest of the line."""

    key: str
    text: str


class GuestFile(NamedTuple):
    """A file of the capture, named relative to its generation."""

    name: str
    data: bytes


Event: TypeAlias = Message | GuestFile


class PortReader:
    """Takes bytes as they come and yields what they amount to."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._name: str | None = None
        self._length = 0

    def feed(self, data: bytes) -> Iterator[Event]:
        """Yield the events that ``data`` completes; :class:`ChannelError` for noise."""
        self._received += data
        while (event := self._next()) is not None:
            if isinstance(event, Message) and not event.key:
                continue
            yield event

    def pending(self) -> tuple[int, int]:
        """Bytes received and bytes expected of the file that is under way; (0, 0) for none."""
        return (len(self._received), self._length) if self._name is not None else (0, 0)

    def _next(self) -> Event | None:
        if self._name is not None:
            if len(self._received) < self._length:
                return None
            event = GuestFile(self._name, bytes(self._received[: self._length]))
            del self._received[: self._length]
            self._name, self._length = None, 0
            return event
        end = self._received.find(b"\n")
        if end < 0:
            if len(self._received) > _MAX_LINE:
                raise ChannelError(f"guest: no end to the line {bytes(self._received[:40])!r}")
            return None
        line = bytes(self._received[:end]).decode("utf-8", "replace").strip("\r\0")
        del self._received[: end + 1]
        if line.startswith("@"):
            self._open(line)
            return Message("", "")
        if line.startswith(":"):
            key, _, text = line[1:].partition(" ")
            return Message(key, text)
        raise ChannelError(f"guest: {line[:60]!r} is neither a message nor a file")

    def _open(self, line: str) -> None:
        name, _, length = line[1:].rpartition(" ")
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts:
            raise ChannelError(f"guest: {line[:60]!r} names no file of a capture")
        if not length.isdecimal() or int(length) > _MAX_FILE:
            raise ChannelError(f"guest: {line[:60]!r} has no sane length")
        self._name, self._length = name, int(length)
