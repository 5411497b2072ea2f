"""Finds out what a path is, and inspects it.

A folder is a capture, one of its generations, or debugfs. A file is told by its first bytes:
``ram.npz``, khosim's own machine image, an ELF dump, an FDT; anything else is a raw RAM image,
except for the packed formats that :mod:`khosim.capture.raw_image` knows to refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from khosim.capture.debugfs import find_debugfs, read_debugfs
from khosim.capture.folder import Capture, CapturedGeneration
from khosim.capture.mapped import MappedFile, pages_with
from khosim.capture.page_rows import PageRows
from khosim.capture.ram_npz import read_ram_npz
from khosim.capture.raw_image import raw_memory
from khosim.capture.vmcore import ELF_MAGIC, read_vmcore
from khosim.checks.formats import format_of, preserve_bits_of
from khosim.checks.kernel_view import ReleaseView
from khosim.checks.reader import Problem, page_shift
from khosim.errors import InputError
from khosim.inspect.blob import BlobReport, inspect_blob
from khosim.inspect.damage import Damage, damage_json, explain
from khosim.inspect.debugfs import DebugfsReport, inspect_debugfs
from khosim.inspect.memory import Memory, MemoryReport, inspect_memory
from khosim.machine.image import load_image
from khosim.machine.ram import Ram

__all__ = ("GapReport", "Options", "RamReader", "Report", "inspect_path")

_FDT_MAGIC = b"\xd0\x0d\xfe\xed"
_IMAGE_MAGIC = b"KHOSIMGE"
_ZIP_MAGIC = b"PK\x03\x04"
_MAX_FDT_BYTES = 2 << 20


class Options(NamedTuple):
    """What the user says beyond the path; None for what is to be found out."""

    fdt_phys: int | None = None
    base_phys: int = 0
    page_size: int | None = None
    content: bool = True
    release: ReleaseView | None = None


class GapReport(NamedTuple):
    """A generation without memory; ``damage`` where a file is missing, ``is_last`` for the last."""

    name: str
    place: str
    damage: list[Damage]
    is_last: bool

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"damage": damage_json(self.damage)}


Report: TypeAlias = MemoryReport | BlobReport | DebugfsReport | GapReport


def inspect_path(path: str, options: Options) -> tuple[list[Report], bool]:
    """Inspect what is at ``path``: the reports, and whether they are told apart by name.

    Raises :class:`InputError` where it is nothing that can be inspected.
    """
    if options.page_size is not None:
        page_shift(options.page_size)
    folder = Path(path)
    try:
        is_folder = folder.is_dir()
    except OSError as error:
        raise InputError(path, error.strerror or str(error)) from None
    if is_folder:
        return _folder(folder, options)
    return [_file(path, options)], False


def _folder(path: Path, options: Options) -> tuple[list[Report], bool]:
    if (path / "capture.json").exists():
        _refuse(options, "a capture", base=True, fdt=True, page_size=True)
        return _capture(Capture(path), options), True
    if (path / "ram.npz").exists():
        _refuse(options, "a capture's generation", base=True)
        return [_generation(_as_generation(path, options), options)], False
    if find_debugfs(path):
        _refuse(options, "debugfs", base=True, fdt=True, page_size=True, release=True)
        return _debugfs(path)
    cause = "neither a capture (capture.json), nor a generation (ram.npz), nor debugfs (in/, out/)"
    raise InputError(str(path), cause)


def _refuse(
    options: Options,
    what: str,
    *,
    base: bool = False,
    fdt: bool = False,
    page_size: bool = False,
    release: bool = False,
) -> None:
    """Raise :class:`InputError` for options that mean nothing here."""
    for name, given, refused in (
        ("--base", options.base_phys != 0, base),
        ("--fdt", options.fdt_phys is not None, fdt),
        ("--page-size", options.page_size is not None, page_size),
        ("--release", options.release is not None, release),
    ):
        if given and refused:
            raise InputError(name, f"means nothing for {what}")


def _capture(capture: Capture, options: Options) -> list[Report]:
    reports: list[Report] = []
    last = capture.generations[-1]
    for generation in capture.generations:
        if generation.has("ram.npz"):
            reports.append(_generation(generation, options))
            continue
        place = str(generation.path)
        damage = []
        if generation is not last and generation.has("handover.json"):
            expected = f"the memory that it handed over to {last.name}"
            problem = Problem("capture-file", 0, "no such file", "/", expected)
            damage = explain([problem], place=f"{generation.name}/ram.npz")
        reports.append(GapReport(generation.name, place, damage, generation is last))
    return reports


def _as_generation(path: Path, options: Options) -> CapturedGeneration:
    """A generation by its own folder; its capture tells the page size."""
    page_size = options.page_size
    if (path.resolve().parent / "capture.json").exists():
        for generation in Capture(path.resolve().parent).generations:
            if generation.name == path.resolve().name:
                return generation
    if page_size is None:
        page_size = int(read_ram_npz(path / "ram.npz")[1].shape[1])
    return CapturedGeneration(path, 0, page_size)


def _generation(generation: CapturedGeneration, options: Options) -> MemoryReport:
    pfn, data = generation.ram_pages
    hint = None
    if generation.has("handover.json"):
        hint = generation.handover.get("fdt_phys")
    memory = Memory(
        str(generation.path),
        f"{len(pfn)} pages of a capture",
        PageRows(pfn, data),
        generation.page_size,
        preserve_bits=generation.preserve_bits,
        fdt_hint=hint if isinstance(hint, int) and 0 <= hint < 1 << 52 else None,
    )
    return inspect_memory(
        _as_written(memory, options),
        name=generation.name,
        fdt_phys=options.fdt_phys,
        content=options.content,
    )


def _as_written(memory: Memory, options: Options) -> Memory:
    """The memory, with what is known of the kernel that wrote it."""
    release = options.release
    if release is None:
        return memory
    return memory._replace(
        preserve_bits=preserve_bits_of(release, memory.page_size or 4096),
        written=format_of(release),
        compatible=release.kho_compatible.encode(),
    )


def _debugfs(path: Path) -> tuple[list[Report], bool]:
    sides = read_debugfs(path)
    reports: list[Report] = [inspect_debugfs(name, side) for name, side in sides.items()]
    return reports, True


def _file(path: str, options: Options) -> Report:
    file = MappedFile(path)
    head = file.data[:16].tobytes()
    is_blob = head.startswith(_FDT_MAGIC) and file.size_bytes <= _MAX_FDT_BYTES
    if is_blob and options.fdt_phys is None and options.base_phys == 0:
        _refuse(options, "a device tree", release=True)
        return inspect_blob(file.data.tobytes(), path)
    memory = _as_written(_memory(file, head, options), options)
    return inspect_memory(memory, fdt_phys=options.fdt_phys, content=options.content)


def _memory(file: MappedFile, head: bytes, options: Options) -> Memory:
    """The memory in a file that is no lone FDT."""
    path = file.path
    if head.startswith(_ZIP_MAGIC):
        _refuse(options, "an npz archive", base=True)
        pfn, data = read_ram_npz(path, options.page_size)
        page_size = int(data.shape[1])
        kind = f"{len(pfn)} pages of a capture"
        return Memory(path, kind, PageRows(pfn, data), page_size)
    if head.startswith(_IMAGE_MAGIC):
        _refuse(options, "a machine image", base=True)
        image = load_image(path)
        return Memory(path, "machine image", RamReader(image.ram), image.ram.page_size)
    if head.startswith(ELF_MAGIC):
        _refuse(options, "an ELF dump", base=True)
        core = read_vmcore(file)
        problems: tuple[Problem, ...] = ()
        if core.cut:
            found = f"{core.cut} bytes missing at the end of the file"
            expected = "all bytes of all segments"
            problems = (Problem("vmcore-cut", core.cut_phys, found, "/", expected),)
        kind = f"ELF dump, {core.arch}" + (f", Linux {core.release}" if core.release else "")
        page_size_ = options.page_size or core.page_size
        return Memory(path, kind, core.memory, page_size_, problems=problems)
    memory = raw_memory(file, options.base_phys)
    return Memory(path, "raw RAM image", memory, options.page_size)


class RamReader:
    """The RAM of a loaded machine, searchable."""

    __slots__ = ("ram",)

    def __init__(self, ram: Ram) -> None:
        self.ram = ram

    def read(self, phys: int, len_bytes: int, /) -> bytes:
        """Copy of the bytes at ``[phys, phys + len_bytes)``; raises ``RamFault``."""
        return self.ram.read(phys, len_bytes)

    def view(self, phys: int, len_bytes: int, /) -> NDArray[np.uint8]:
        """Read-only array over these bytes."""
        return self.ram.view(phys, len_bytes)

    def pages_with(self, magic: bytes) -> Iterator[int]:
        """Addresses of 4 KiB pages that begin with ``magic``."""
        for start, end in self.ram.touched_ranges():
            yield from pages_with(self.ram.data, start, end, magic)
