"""Finding scenarios: those that come with khosim, files, standard input."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from typing import BinaryIO

from khosim.errors import InputError
from khosim.scenario.fields import did_you_mean
from khosim.scenario.model import KernelSpec, Scenario
from khosim.scenario.parse import Overrides, parse_scenario, read_document

__all__ = ("DEFAULT", "builtin_scenarios", "builtin_text", "load_scenario")

DEFAULT = "cloud-host"
_WITHOUT_LUO = "kho-host"
_MEMFD_V1 = "cloud-host-4k"
_MAX_FILE_BYTES = 1 << 20
_SUFFIX = ".toml"


def _folder_names() -> list[str]:
    folder = files("khosim.scenario") / "scenarios"
    names = (entry.name for entry in folder.iterdir())
    return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))


def builtin_text(name: str) -> str:
    """The TOML text of a built-in scenario; :class:`InputError` for an unknown name."""
    names = _folder_names()
    if name not in names:
        raise InputError(name, f"no built-in scenario{did_you_mean(name, names)}")
    entry = files("khosim.scenario") / "scenarios" / f"{name}{_SUFFIX}"
    return entry.read_text(encoding="utf-8")


def builtin_scenarios() -> dict[str, str]:
    """Name and description of each built-in scenario; the default one comes first."""
    names = sorted(_folder_names(), key=lambda name: (name != DEFAULT, name))
    return {name: str(read_document(builtin_text(name), name).get("about", "")) for name in names}


def _read_stdin(stream: BinaryIO | None) -> bytes:
    if stream is None:
        if sys.stdin is None:
            raise InputError("<stdin>", "it is closed")
        stream = sys.stdin.buffer
    try:
        return stream.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError("<stdin>", error.strerror or str(error)) from None


def _fitting(kernel: KernelSpec) -> str:
    # The default scenario, or the one like it that such a kernel can carry out.
    if not kernel.release.luo or "liveupdate" not in kernel.cmdline:
        return _WITHOUT_LUO
    return _MEMFD_V1 if kernel.release.memfd == "memfd-v1" else DEFAULT


def load_scenario(
    source: str, *, overrides: Overrides | None = None, stdin: BinaryIO | None = None
) -> Scenario:
    """The built-in scenario, or the file, that ``source`` names; ``-`` reads ``stdin``.

    A name without a slash and without ``.toml`` is looked for among the built-in ones first. The
    default one gives way to one like it where the kernel that ``overrides`` ask for has no Live
    Update Orchestrator, or one that does not carry its guests whole.
    """
    if source == "-":
        return parse_scenario(_read_stdin(stdin), "<stdin>", overrides=overrides)
    if source in _folder_names():
        scenario = parse_scenario(builtin_text(source), source, overrides=overrides)
        fitting = _fitting(scenario.kernel) if source == DEFAULT else source
        return scenario if fitting == source else load_scenario(fitting, overrides=overrides)
    path = Path(source)
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        if "/" in source or source.endswith(_SUFFIX):
            raise InputError(source, "no such file") from None
        names = _folder_names()
        cause = f"neither a file nor a built-in scenario{did_you_mean(source, names)}"
        raise InputError(source, cause) from None
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise InputError(source, cause) from None
    return parse_scenario(text, source, folder=path.parent, overrides=overrides)
