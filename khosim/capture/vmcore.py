"""An ELF memory dump: ``/proc/vmcore``, ``virsh dump --memory-only``, ``makedumpfile -E``.

An ELF64 core file whose PT_LOAD segments say by ``p_paddr`` which physical memory they hold
(``fs/proc/vmcore.c @ 7.3``), with more than 65534 of them as well (PN_XNUM). The VMCOREINFO note
(``kernel/vmcore_info.c``) tells page size and release. Memory beyond a segment's ``p_filesz`` was
left out when the dump was made, and counts as no RAM.

Left out: ELF32 and big-endian dumps, the registers in the notes.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import NamedTuple

from khosim.capture.mapped import MappedFile, MappedMemory, Segment
from khosim.capture.raw_image import refuse_packed
from khosim.errors import InputError

__all__ = ("ELF_MAGIC", "Vmcore", "open_vmcore", "read_vmcore")

ELF_MAGIC = b"\x7fELF"

_EHDR = Struct("<16sHHIQQQIHHHHHH")
_PHDR = Struct("<IIQQQQQQ")
_NOTE = Struct("<III")
_SH_INFO_AT = 44
_PN_XNUM = 0xFFFF
_ET_CORE = 4
_PT_LOAD, _PT_NOTE = 1, 4
_MAX_NOTE_BYTES = 16 << 20
_MACHINES = {62: "x86_64", 183: "arm64"}
_PAGE_SIZES = (4096, 16384, 65536)
_PHYS_MAX = 1 << 52


class Vmcore(NamedTuple):
    """A dump. ``page_size`` and ``release`` are None where it does not tell.

    ``cut`` counts bytes that segments claim beyond the end of the file, ``cut_phys`` is the first
    address concerned.
    """

    memory: MappedMemory
    arch: str
    page_size: int | None
    release: str | None
    cut: int
    cut_phys: int


def open_vmcore(path: str | os.PathLike[str]) -> Vmcore:
    """Read the headers of a dump; :class:`InputError` where they are none or make no sense."""
    return read_vmcore(MappedFile(path))


def read_vmcore(file: MappedFile) -> Vmcore:
    """The same for a file that is mapped already."""
    place = file.path
    head = file.data[: _EHDR.size].tobytes()
    refuse_packed(head, place)
    if not head.startswith(ELF_MAGIC):
        raise InputError(place, "not an ELF file")
    if len(head) < _EHDR.size:
        raise InputError(place, f"cut off inside of the ELF header, after {len(head)} bytes")
    ident, kind, machine, _, _, phoff, shoff, _, _, phentsize, phnum, _, _, _ = _EHDR.unpack(head)
    if ident[4] != 2 or ident[5] != 1:
        raise InputError(place, "an ELF file, but not of a 64-bit little-endian machine")
    if kind != _ET_CORE:
        raise InputError(place, f"an ELF file, but no core dump (e_type {kind}, not {_ET_CORE})")
    arch = _MACHINES.get(machine)
    if arch is None:
        raise InputError(place, f"a core dump of ELF machine {machine}; KHO has x86-64 and arm64")
    if phentsize != _PHDR.size:
        raise InputError(place, f"program headers of {phentsize} bytes, not {_PHDR.size}")
    if phnum == _PN_XNUM:
        phnum = _from_section(file, shoff)
    size = file.size_bytes
    if phoff > size or phnum * phentsize > size - phoff:
        cause = f"{phnum} program headers at {phoff:#x} do not fit in {size} bytes: cut off?"
        raise InputError(place, cause)
    table = file.data[phoff : phoff + phnum * phentsize].tobytes()
    segments: list[Segment] = []
    notes: list[tuple[int, int]] = []
    cut = cut_phys = 0
    for kind, _, offset, _, paddr, filesz, _, _ in _PHDR.iter_unpack(table):
        if kind == _PT_NOTE:
            notes.append((offset, filesz))
        if kind != _PT_LOAD or filesz == 0:
            continue
        if paddr + filesz > _PHYS_MAX:
            raise InputError(place, f"a segment at physical address {paddr:#x}: no dump of memory")
        have = max(0, min(filesz, size - offset))
        if have < filesz:
            cut_phys = min(cut_phys, paddr + have) if cut else paddr + have
            cut += filesz - have
        if have:
            segments.append(Segment(paddr, paddr + have, offset))
    if not segments:
        raise InputError(place, "the dump holds no memory: no PT_LOAD segment has any bytes")
    if len(segments) > 1 and all(segment.start == 0 for segment in segments):
        raise InputError(place, "a core dump of a process, not of a machine")
    facts = _vmcoreinfo(file, notes)
    page_size = int(facts.get("PAGESIZE", 0)) if facts.get("PAGESIZE", "").isdecimal() else 0
    return Vmcore(
        MappedMemory(file, segments),
        arch,
        page_size if page_size in _PAGE_SIZES else 4096 if arch == "x86_64" else None,
        facts.get("OSRELEASE"),
        cut,
        cut_phys,
    )


def _from_section(file: MappedFile, shoff: int) -> int:
    """The number of program headers where it does not fit: ``sh_info`` of the first section."""
    if shoff == 0 or shoff + 64 > file.size_bytes:
        raise InputError(file.path, "the section that counts its program headers is cut off")
    at = shoff + _SH_INFO_AT
    return int.from_bytes(file.data[at : at + 4].tobytes(), "little")


def _vmcoreinfo(file: MappedFile, notes: list[tuple[int, int]]) -> dict[str, str]:
    """The ``KEY=VALUE`` lines of the VMCOREINFO note; empty where there is none."""
    for offset, len_bytes in notes:
        raw = file.data[offset : offset + min(len_bytes, _MAX_NOTE_BYTES)].tobytes()
        at = 0
        while at + _NOTE.size <= len(raw):
            name_bytes, desc_bytes, _ = _NOTE.unpack_from(raw, at)
            name_at = at + _NOTE.size
            desc_at = name_at + (name_bytes + 3 & ~3)
            if raw[name_at : name_at + name_bytes].rstrip(b"\0") == b"VMCOREINFO":
                text = raw[desc_at : desc_at + desc_bytes].decode("ascii", "replace")
                return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
            at = desc_at + (desc_bytes + 3 & ~3)
    return {}
