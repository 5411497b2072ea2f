"""Writes a capture folder: all of it, or nothing.

The shape is that of :mod:`khosim.capture.folder`: ``capture.json`` beside one folder per
generation.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from khosim.errors import InputError
from khosim.inspect.memory import MemoryReport
from khosim.lab.guest_ram import RecordingReader

__all__ = ("GenerationFiles", "plain_log", "ram_npz", "write_capture")

_PAGE = 4096
_LEVEL = re.compile(rb"^<\d+>", re.MULTILINE)


@dataclass(slots=True)
class GenerationFiles:
    """What one generation left: ``files`` by their names in its folder."""

    name: str
    files: dict[str, bytes] = field(default_factory=dict)

    def add_handover(self, report: MemoryReport, reader: RecordingReader) -> None:
        """Put ``handover.json`` and ``ram.npz`` beside the rest."""
        self.files["handover.json"] = json.dumps(report.to_json()).encode()
        self.files["ram.npz"] = ram_npz(reader)


def ram_npz(reader: RecordingReader) -> bytes:
    """The pages that were read through ``reader``, as numpy saves arrays."""
    pfns = sorted(reader.pfns)
    data = np.empty((len(pfns), _PAGE), dtype=np.uint8)
    for row, pfn in enumerate(pfns):
        data[row] = reader.view(pfn * _PAGE, _PAGE)
    file = io.BytesIO()
    np.savez_compressed(file, pfn=np.array(pfns, dtype=np.uint64), data=data)
    return file.getvalue()


def plain_log(raw: bytes) -> bytes:
    """A kernel log as ``dmesg`` prints it, from what syslog(2) returns."""
    return _LEVEL.sub(b"", raw)


def check_target(path: Path) -> None:
    """Raise :class:`InputError` where ``path`` is there already, or its parent is not."""
    if path.exists() or path.is_symlink():
        raise InputError(str(path), "is there already; name a folder that is not")
    if not path.parent.is_dir():
        raise InputError(str(path.parent), "no such folder")


def write_capture(
    path: Path,
    facts: Mapping[str, Any],
    generations: Iterable[GenerationFiles],
    extra: Mapping[str, bytes],
) -> None:
    """Write the capture ``path``: ``facts`` as capture.json, and ``extra`` files beside it.

    It appears when it is whole. Raises :class:`InputError` where the host cannot write it.
    """
    check_target(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    generations = list(generations)
    whole = {**facts, "generations": [generation.name for generation in generations]}
    try:
        part.mkdir()
        (part / "capture.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        for name, data in extra.items():
            (part / name).write_bytes(data)
        for generation in generations:
            for name, data in generation.files.items():
                target = part / generation.name / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
        part.rename(path)
    except OSError as error:
        raise InputError(str(path), error.strerror or str(error)) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
