"""A file that takes its place only when it is whole."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from khosim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("whole_file",)


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Within, a file to write ``path``'s bytes to; after an error nothing is left behind.

    Raises :class:`InputError` that names ``path`` where it cannot be written.
    """
    target = Path(path)
    name = ""
    try:
        handle, name = tempfile.mkstemp(suffix=target.suffix, dir=target.absolute().parent)
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(name, 0o644)
        os.replace(name, target)
        name = ""
    except OSError as error:
        raise InputError(str(path), error.strerror or str(error)) from None
    finally:
        if name:
            Path(name).unlink(missing_ok=True)
