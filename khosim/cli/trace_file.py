"""The event trace as a file of JSON lines, put in place only when it is whole.

Events go to a temporary file in the same folder, which takes the wanted name at the end; after an
error or an interrupt nothing is left behind. A pipe, a device or a link (``/dev/stdout``) is
written to directly: a file must not take its place.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from khosim.errors import InputError

if TYPE_CHECKING:
    from types import TracebackType

    from khosim.kernel.trace import Event

__all__ = ("TraceFile",)


class TraceFile:
    """Write events to ``path``: a context manager that is called with each of them.

    Raises :class:`InputError` where the file cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._temporary = ""
        self._file: IO[str] | None = None

    def __enter__(self) -> TraceFile:
        path = self._path
        try:
            if path.is_dir():
                raise InputError(str(path), "a folder: --trace names a file")
            if path.is_symlink() or (path.exists() and not path.is_file()):
                self._file = path.open("w", encoding="utf-8")
            else:
                handle, self._temporary = tempfile.mkstemp(
                    prefix=f".{path.name[:100]}.", dir=path.parent
                )
                os.fchmod(handle, 0o666 & ~_umask())
                self._file = os.fdopen(handle, "w", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(str(path), getattr(error, "strerror", None) or str(error)) from None
        return self

    def __call__(self, event: Event) -> None:
        """Write one event."""
        assert self._file is not None
        line = {
            "generation": event.generation,
            "phase": event.phase,
            "symbol": event.symbol,
            "args": event.args,
            "result": event.result,
        }
        self._file.write(json.dumps(line, separators=(",", ":"), default=_plain) + "\n")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._file is not None
        try:
            self._file.close()
            if self._temporary and kind is None:
                os.replace(self._temporary, self._path)
                self._temporary = ""
        except OSError as trouble:
            raise InputError(str(self._path), trouble.strerror or str(trouble)) from None
        finally:
            if self._temporary:
                with contextlib.suppress(OSError):
                    os.unlink(self._temporary)


def _plain(value: Any) -> Any:
    # numpy numbers have item(); bytes are shown in hexadecimal.
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).hex()
    item = getattr(value, "item", None)
    return item() if item is not None else str(value)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
