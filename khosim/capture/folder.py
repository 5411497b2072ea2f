"""A capture: what one real machine left behind over several generations, in a folder.

``capture.json`` names release, architecture, page size and the generations. Each generation has a
folder of its own with the kernel's texts (``dmesg``, ``iomem``, ``cmdline``, ...), its debugfs
files under ``kho/`` (``kernel/liveupdate/kexec_handover_debugfs.c @ 7.3``), and, unless it is the
last, what it handed over: ``handover.json`` (decoded by an independent program) and ``ram.npz``
(the pages themselves: ``pfn`` and ``data``).

Everything but ``capture.json`` is read when asked for. What is missing or damaged raises
:class:`InputError` with the file's path and the cause. Nothing is interpreted here.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from khosim.capture.dmesg import BootLog, parse_dmesg
from khosim.capture.iomem import Iomem, parse_iomem
from khosim.capture.ram_npz import U8Rows, U64Row, read_ram_npz
from khosim.errors import InputError
from khosim.machine.memory_map import ARCHES, MemoryMap

__all__ = ("Capture", "CapturedGeneration")

_PAGE_SIZES = (4096, 16384, 65536)


class CapturedGeneration:
    """One generation of a capture; ``index`` counts from 0, the cold boot.

    ``preserve_bits`` is the size of a bitmap of kho-v1, None where the capture does not tell.
    """

    def __init__(
        self, path: Path, index: int, page_size: int, preserve_bits: int | None = None
    ) -> None:
        self.path = path
        self.name = path.name
        self.index = index
        self.page_size = page_size
        self.preserve_bits = preserve_bits

    def __repr__(self) -> str:
        return f"CapturedGeneration({str(self.path)!r})"

    def bytes_of(self, name: str) -> bytes:
        """A file of this generation, such as ``"kho/out/fdt"``."""
        path = self.path / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise InputError(str(path), error.strerror or str(error)) from None

    def text_of(self, name: str) -> str:
        """A file of this generation as text; bytes that are no UTF-8 are replaced."""
        return self.bytes_of(name).decode("utf-8", "replace")

    def has(self, name: str) -> bool:
        """Whether this generation has such a file or folder."""
        return (self.path / name).exists()

    @cached_property
    def cmdline(self) -> str:
        """The kernel command line."""
        return self.text_of("cmdline").strip()

    @cached_property
    def dmesg(self) -> str:
        """The kernel log."""
        return self.text_of("dmesg")

    @cached_property
    def boot_log(self) -> BootLog:
        """The kernel log, read: memory map, release, command line."""
        return parse_dmesg(self.dmesg, place=str(self.path / "dmesg"))

    @cached_property
    def iomem(self) -> Iomem:
        """``/proc/iomem``, read."""
        return parse_iomem(self.text_of("iomem"), place=str(self.path / "iomem"))

    @cached_property
    def handover(self) -> dict[str, Any]:
        """``handover.json``: this generation's handover, decoded. The last one has none."""
        return _read_json(self.path / "handover.json")

    @cached_property
    def ram_pages(self) -> tuple[U64Row, U8Rows]:
        """``ram.npz``: page frame numbers in order, and their bytes, one row a page."""
        return read_ram_npz(self.path / "ram.npz", self.page_size)

    @cached_property
    def scratch_areas(self) -> tuple[tuple[int, int], ...]:
        """The scratch areas as (phys, len_bytes), in the kernel's order; lengths may be 0."""
        columns = []
        for name in ("kho/out/scratch_phys", "kho/out/scratch_len"):
            try:
                columns.append([int(word, 0) for word in self.text_of(name).split()])
            except ValueError as error:
                raise InputError(str(self.path / name), str(error)) from None
        if len(columns[0]) != len(columns[1]):
            cause = f"{len(columns[0])} addresses but {len(columns[1])} lengths"
            raise InputError(str(self.path / "kho/out/scratch_phys"), cause)
        return tuple(zip(*columns, strict=True))


class Capture:
    """A capture folder. Raises :class:`InputError` where ``path`` is none."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        place = self.path / "capture.json"
        if not self.path.is_dir():
            cause = "no such folder"
            if self.path.exists():
                cause = "not a folder, as captures are; khosim inspect decodes single files"
            raise InputError(str(path), cause)
        facts = _read_json(place)
        release, arch = facts.get("release"), facts.get("arch", "x86_64")
        page_size = facts.get("page_size", 4096)
        names = facts.get("generations")
        if not isinstance(release, str):
            raise InputError(f"{place}: release", f"{release!r} is not text")
        if arch not in ARCHES:
            raise InputError(f"{place}: arch", f"{arch!r} is none of {', '.join(ARCHES)}")
        if isinstance(page_size, bool) or page_size not in _PAGE_SIZES:
            raise InputError(f"{place}: page_size", f"{page_size!r} is none of {_PAGE_SIZES}")
        if not isinstance(names, list) or not names:
            raise InputError(f"{place}: generations", "not a list of folder names")
        bits = facts.get("preserve_bits")
        if not (isinstance(bits, list) and len(bits) == len(names)):
            bits = [None] * len(names)
        if any(entry not in (None, 4096, 8 * page_size) for entry in bits):
            raise InputError(f"{place}: preserve_bits", f"{bits!r} are not sizes of bitmaps")
        generations = []
        for index, name in enumerate(names):
            if not isinstance(name, str) or Path(name).name != name:
                raise InputError(f"{place}: generations", f"{name!r} is not a folder name")
            if not (self.path / name).is_dir():
                raise InputError(str(self.path / name), "no such folder")
            generations.append(CapturedGeneration(self.path / name, index, page_size, bits[index]))
        self.name = self.path.resolve().name
        self.release: str = release
        self.arch: str = arch
        self.page_size: int = page_size
        self.generations: tuple[CapturedGeneration, ...] = tuple(generations)

    def __repr__(self) -> str:
        return f"Capture({str(self.path)!r})"

    def generation(self, which: int | str) -> CapturedGeneration:
        """A generation by index or by name."""
        for generation in self.generations:
            if which in (generation.index, generation.name):
                return generation
        known = ", ".join(generation.name for generation in self.generations)
        raise InputError(str(self.path), f"no generation {which!r}; there are {known}")

    def memory_map(self) -> MemoryMap:
        """The machine's memory map, from the log of the first generation."""
        log = self.generations[0].boot_log
        if log.memory_map.arch != self.arch:
            cause = f"the log is of an {log.memory_map.arch} kernel, capture.json says {self.arch}"
            raise InputError(str(self.generations[0].path / "dmesg"), cause)
        return log.memory_map


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(str(path), error.strerror or str(error)) from None
    except (ValueError, RecursionError) as error:
        raise InputError(str(path), f"not JSON: {error}") from None
    if not isinstance(facts, dict):
        raise InputError(str(path), "not a JSON object")
    return facts
