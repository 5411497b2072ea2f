"""What ``/sys/kernel/debug/kho`` shows: the root FDT and the blobs of both sides.

``in`` is what the running kernel was handed, ``out`` what it will hand over
(``kernel/liveupdate/kexec_handover_debugfs.c @ 7.3``). Two quirks: the kernel cuts ``out/fdt`` to
the size that the FDT had at boot, and one that was itself handed over has no ``out/fdt``.

Nothing is interpreted here. The files need root on a live machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from khosim.errors import InputError

__all__ = ("SIDES", "DebugfsSide", "find_debugfs", "read_debugfs")

SIDES = ("in", "out")
_MAX_BYTES = 16 << 20


class DebugfsSide(NamedTuple):
    """``in`` or ``out``. ``fdt`` is None where there is no such file.

    ``scratch`` holds ``(phys, len_bytes)`` of each area, or is None.
    """

    path: Path
    fdt: bytes | None
    blobs: dict[str, bytes]
    scratch: tuple[tuple[int, int], ...] | None


def find_debugfs(path: Path) -> dict[str, Path]:
    """The folders of the sides under ``path``: debugfs's own, ``kho``, or one of the two."""
    for folder in (path, path / "kho"):
        found = {name: folder / name for name in SIDES if _is_side(folder / name)}
        if found:
            return found
    return {path.name if path.name in SIDES else "in": path} if _is_side(path) else {}


def read_debugfs(path: str | Path, *, scratch: bool = True) -> dict[str, DebugfsSide]:
    """Read the sides under ``path``; :class:`InputError` where there are none, or for a file.

    Without ``scratch`` the lists of scratch areas are left alone, damaged or not.
    """
    try:
        sides = find_debugfs(Path(path))
        if not sides:
            raise InputError(str(path), "no debugfs folder: neither in/ nor out/ with fdt or blobs")
        return {name: _read_side(folder, scratch) for name, folder in sides.items()}
    except OSError as error:
        place = str(path) if error.filename is None else str(error.filename)
        raise InputError(place, error.strerror or str(error)) from None


def _is_side(folder: Path) -> bool:
    return (folder / "fdt").is_file() or (folder / "sub_fdts").is_dir()


def _read_side(folder: Path, scratch: bool) -> DebugfsSide:
    blobs = {}
    names = folder / "sub_fdts"
    if names.is_dir():
        for file in sorted(names.iterdir()):
            blobs[file.name] = _read(file)
    fdt = folder / "fdt"
    root = _read(fdt) if fdt.exists() else None
    return DebugfsSide(folder, root, blobs, _scratch(folder) if scratch else None)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(str(path), "not a regular file")
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise InputError(str(path), f"larger than {_MAX_BYTES} bytes, which no blob is")
    return data


def _scratch(folder: Path) -> tuple[tuple[int, int], ...] | None:
    columns: list[list[int]] = []
    for name in ("scratch_phys", "scratch_len"):
        path = folder / name
        if not path.exists():
            return None
        try:
            columns.append([int(word, 0) for word in _read(path).split()])
        except ValueError:
            raise InputError(str(path), "not a list of numbers") from None
    if len(columns[0]) != len(columns[1]):
        cause = f"{len(columns[0])} addresses but {len(columns[1])} lengths in scratch_len"
        raise InputError(str(folder / "scratch_phys"), cause)
    return tuple(zip(*columns, strict=True))
