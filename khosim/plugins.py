"""Code of a designer's own, from a file: a release, a tracker, a decoder.

``FILE.py:NAME`` names an object of a Python file. Nothing but that text travels in a kernel image;
whoever needs the object loads the file anew or finds it loaded.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from khosim.errors import InputError

__all__ = ("blame_plugin", "is_plugin", "load_plugin", "loaded_plugin", "plugin_file")


def is_plugin(spec: str) -> bool:
    """Whether ``spec`` names something in a file: ``FILE.py``, or ``FILE.py:NAME``."""
    path, colon, name = spec.rpartition(":")
    return path.endswith(".py") if colon and "/" not in name else spec.endswith(".py")


def load_plugin(spec: str, default: str = "") -> Any:
    """The object that ``FILE.py:NAME`` names; ``default`` is its name where only a file is given.

    Raises :class:`InputError` where there is no such file or object, or the file cannot be run.
    """
    path, name = _parts(spec, default)
    return _member(path, _load_module(path), name)


def loaded_plugin(spec: str) -> Any:
    """:func:`load_plugin` for a file that this process has loaded before; runs no code.

    What a kernel image names comes from memory, which anybody may have written.
    """
    path, name = _parts(spec, "")
    module = sys.modules.get(_module_name(path))
    if module is None:
        raise InputError(path, "not loaded: name the file of the release first")
    return _member(path, module, name)


def plugin_file(spec: str) -> Path:
    """The file of ``FILE.py`` or ``FILE.py:NAME``."""
    return Path(_parts(spec, "")[0])


def _parts(spec: str, default: str) -> tuple[str, str]:
    path, colon, name = spec.rpartition(":")
    return (path, name) if colon and path.endswith(".py") else (spec, default)


def _member(path: str, module: Any, name: str) -> Any:
    found = getattr(module, name, None)
    if found is None:
        raise InputError(path, f"the file defines no {name!r}")
    return found


def _module_name(path: str) -> str:
    return f"khosim_plugin:{Path(path).resolve()}"


def _load_module(path: str) -> Any:
    file = Path(path).resolve()
    name = _module_name(path)
    known = sys.modules.get(name)
    if known is not None:
        return known
    if not file.is_file():
        raise InputError(path, "there is no such file")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputError(path, "not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except InputError as error:
        del sys.modules[name]
        line = _line_in(error, file)
        raise InputError(f"{path}: line {line}" if line else path, str(error)) from error
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        line = _line_in(error, file)
        at = f"{path}: line {line}" if line else path
        raise InputError(at, f"{type(error).__name__}: {error}") from error
    return module


def blame_plugin(error: BaseException) -> InputError | None:
    """The one line about ``error`` where a loaded file raised it; None where khosim did.

    The last line of such a file that was being carried out is the one to blame.
    """
    found = None
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if _module_name(file) in sys.modules:
            at = f"{file}: line {trace.tb_lineno}"
            found = InputError(at, f"{type(error).__name__}: {error}")
        trace = trace.tb_next
    return found


def _line_in(error: BaseException, file: Path) -> int:
    if isinstance(error, SyntaxError):
        return error.lineno or 0
    line = 0
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
