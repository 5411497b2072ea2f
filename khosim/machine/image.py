"""A machine in a file: the memory map, the bytes that are not zero, what a boot loader hands over.

The file stands for the machine at the moment of the jump: a kernel booted from it finds what it
would have found in memory. All numbers are little-endian.

======  ========================================================================================
offset  content
======  ========================================================================================
0       header, 64 bytes: magic ``KHOSIMGE``, u32 version (1), u32 page size, u64 bytes of facts,
        u64 number of extents, u64 number of pages, u32 CRC-32 of facts and extents, u32 CRC-32 of
        the pages, 8 bytes of zero, u32 zero, u32 CRC-32 of the 60 bytes before
64      facts: a JSON object with ``ram_bytes``, ``memory_map`` and ``firmware`` (base64)
..      extents: u64 first page frame, u64 number of pages; in order, disjoint
..      the pages of the extents, end to end; all others are zero
======  ========================================================================================

The file appears whole or not at all. Left out: the writer shadow (loaded pages are written by
``load_image`` in generation -1), snapshots, devices.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from khosim.errors import InputError
from khosim.machine.memory_map import MemoryMap
from khosim.machine.ram import MAX_PHYS, Ram, Writer

__all__ = ("MachineImage", "load_image", "save_image")

_MAGIC = b"KHOSIMGE"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQQII8xI")  # and a u32 CRC-32 of these 60 bytes
_HEADER_BYTES = 64
_MAX_FACTS = 256 << 20
_CHUNK = 8 << 20
_LOADER = Writer(-1, "load_image")


class MachineImage(NamedTuple):
    """What an image holds. ``firmware`` maps names to what a boot loader hands over."""

    ram: Ram
    memory_map: MemoryMap
    firmware: dict[str, bytes]


def save_image(
    ram: Ram,
    memory_map: MemoryMap,
    path: str | Path,
    *,
    firmware: Mapping[str, bytes] | None = None,
) -> None:
    """Write the machine to ``path``, replacing what is there only when all is written.

    Costs what the machine touched. Raises :class:`InputError` where the host cannot write, and for
    a device or a pipe, which a file must not replace.
    """
    blobs = {name: base64.b64encode(blob).decode() for name, blob in (firmware or {}).items()}
    facts = json.dumps(
        {"ram_bytes": ram.size_bytes, "memory_map": memory_map.to_dict(), "firmware": blobs}
    ).encode()
    if Path(path).is_fifo() or Path(path).is_char_device() or Path(path).is_block_device():
        raise InputError(str(path), "a device or a pipe: an image is a regular file")
    path = Path(os.path.realpath(path))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            _write(file, ram, facts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise InputError(str(path), error.strerror or str(error)) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def load_image(path: str | Path) -> MachineImage:
    """The machine in the file ``path``.

    Raises :class:`InputError` where it cannot be read, is no image, or was cut or changed since it
    was written.
    """
    place = str(path)
    try:
        with open(path, "rb") as file:
            return _read(file, place)
    except OSError as error:
        raise InputError(place, error.strerror or str(error)) from None


def _extents(ram: Ram) -> list[tuple[int, int]]:
    """The pages that are not zero, as ordered (first frame, number of pages)."""
    found: list[tuple[int, int]] = []
    shift = ram.page_shift
    for start, end in ram.touched_ranges():
        for low in range(start, end, _CHUNK):
            words = ram.data[low : min(end, low + _CHUNK)].view(np.uint64)
            holds = words.reshape(-1, ram.page_size // 8).max(axis=1) != 0
            edge = np.flatnonzero(np.diff(holds, prepend=False, append=False)) + (low >> shift)
            for first, stop in edge.reshape(-1, 2).tolist():
                if found and sum(found[-1]) == first:
                    found[-1] = (found[-1][0], stop - found[-1][0])
                else:
                    found.append((first, stop - first))
    return found


def _pieces(ram: Ram, extents: list[tuple[int, int]]) -> Iterator[memoryview]:
    for first, count in extents:
        start, end = first << ram.page_shift, (first + count) << ram.page_shift
        for low in range(start, end, _CHUNK):
            yield ram.data[low : min(end, low + _CHUNK)].data


def _write(file: BinaryIO, ram: Ram, facts: bytes) -> None:
    extents = _extents(ram)
    table = np.array(extents, dtype="<u8").tobytes()
    file.write(bytes(_HEADER_BYTES))
    file.write(facts)
    file.write(table)
    crc = 0
    for piece in _pieces(ram, extents):
        crc = zlib.crc32(piece, crc)
        file.write(piece)
    pages = sum(count for _, count in extents)
    about = zlib.crc32(table, zlib.crc32(facts))
    header = _HEADER.pack(
        _MAGIC, _VERSION, ram.page_size, len(facts), len(extents), pages, about, crc, 0
    )
    file.seek(0)
    file.write(header + struct.pack("<I", zlib.crc32(header)))


def _read(file: BufferedReader, place: str) -> MachineImage:
    header = file.read(_HEADER_BYTES)
    if not header.startswith(_MAGIC):
        raise InputError(place, "not a machine image")
    if len(header) < _HEADER_BYTES:
        raise InputError(place, f"cut off after {len(header)} bytes")
    fields = _HEADER.unpack_from(header)
    _, version, page_size, facts_bytes, nr_extents, nr_pages, about, pages_crc, _ = fields
    if version != _VERSION:
        raise InputError(place, f"an image of version {version}; this is version {_VERSION}")
    if zlib.crc32(header[:-4]) != int.from_bytes(header[-4:], "little"):
        raise InputError(place, "damaged: the header's checksum is wrong")
    wanted = _HEADER_BYTES + facts_bytes + 16 * nr_extents + nr_pages * page_size
    size = os.fstat(file.fileno()).st_size
    if size != wanted:
        raise InputError(
            place,
            f"{'cut off' if size < wanted else 'has a tail'}: {size} bytes, "
            f"its header says {wanted}",
        )
    if facts_bytes > _MAX_FACTS or nr_extents > nr_pages:
        raise InputError(place, "damaged: the header makes no sense")
    facts = file.read(facts_bytes)
    table = file.read(16 * nr_extents)
    if zlib.crc32(table, zlib.crc32(facts)) != about:
        raise InputError(place, "damaged: the checksum of facts and extents is wrong")
    ram_bytes, memory_map, firmware = _parse_facts(facts, place)
    extents = np.frombuffer(table, dtype="<u8").reshape(-1, 2)
    _check_extents(extents, ram_bytes, page_size, nr_pages, place)
    ram = Ram(ram_bytes, page_size=page_size)
    crc = 0
    pairs = [(int(first), int(count)) for first, count in extents]
    for first, count in pairs:
        ram.note_writes(np.arange(first, first + count), _LOADER)
    for piece in _pieces(ram, pairs):
        if file.readinto(piece) != len(piece):
            raise InputError(place, "cut off while it was read")
        crc = zlib.crc32(piece, crc)
    if crc != pages_crc:
        raise InputError(place, "damaged: the checksum of the pages is wrong")
    return MachineImage(ram, memory_map, firmware)


def _parse_facts(facts: bytes, place: str) -> tuple[int, MemoryMap, dict[str, bytes]]:
    try:
        parsed = json.loads(facts)
        ram_bytes = int(parsed["ram_bytes"])
        firmware = {
            str(name): base64.b64decode(blob, validate=True)
            for name, blob in parsed["firmware"].items()
        }
        memory_map = MemoryMap.from_dict(parsed["memory_map"])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(place, f"its facts are not those of a machine: {error!r}") from None
    except RecursionError:
        raise InputError(place, "its facts are nested too deeply") from None
    except InputError as error:
        raise InputError(place, f"{error.place}: {error.cause}") from None
    if not memory_map.end_phys <= ram_bytes <= MAX_PHYS:
        raise InputError(place, f"{ram_bytes} bytes of RAM do not fit its memory map")
    return ram_bytes, memory_map, firmware


def _check_extents(
    extents: np.ndarray[tuple[int, int], np.dtype[np.uint64]],
    ram_bytes: int,
    page_size: int,
    nr_pages: int,
    place: str,
) -> None:
    """Extents are in order, disjoint, inside RAM, and as many pages as the header says."""
    if page_size not in (4096, 16384, 65536):
        raise InputError(place, f"a page size of {page_size}")
    frames = -(-ram_bytes // page_size)
    sane = not len(extents) or int(extents.max()) <= frames
    if sane:
        first, count = extents[:, 0].astype(np.int64), extents[:, 1].astype(np.int64)
        end = first + count
        sane = bool((count > 0).all() and (end <= frames).all() and (first[1:] >= end[:-1]).all())
        sane = sane and int(count.sum()) == nr_pages
    if not sane:
        raise InputError(place, "its extents are out of order or outside RAM")
