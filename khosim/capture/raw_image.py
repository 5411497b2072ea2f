"""A raw RAM image: the byte at offset N of the file is the memory at address N.

What QEMU's ``pmemsave``, its file-backed memory and ``dd`` of a memory device leave behind. Sparse
files cost what they hold. Memory that does not begin at address 0 (arm64's ``virt`` machine has it
at 0x40000000) needs ``base_phys``.

Some files are often taken for raw images; :func:`refuse_packed` knows them by their first bytes.
"""

from __future__ import annotations

import os

from khosim.capture.mapped import MappedFile, MappedMemory, Segment
from khosim.errors import InputError

__all__ = ("open_raw_image", "raw_memory", "refuse_packed")

_PHYS_MAX = 1 << 52

_PACKED = (
    (b"KDUMP   ", "a kdump-compressed dump: unpack it with makedumpfile -E DUMP VMCORE"),
    (b"DISKDUMP", "a diskdump: unpack it with makedumpfile -E DUMP VMCORE"),
    (
        b"makedumpfile\0",
        "a flattened dump: put it together with makedumpfile -R VMCORE < DUMP",
    ),
    (b"EMiL", "a LiME dump: record it in its raw or padded format"),
    (b"QEVM", "a saved QEMU machine: dump its memory with dump-guest-memory"),
    (b"LibvirtQemudSave", "a saved libvirt domain: use virsh dump --memory-only"),
    (b"QFI\xfb", "a qcow2 disk image"),
    (b"\x1f\x8b", "gzip data: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd data: unpack it first"),
    (b"\xfd7zXZ\0", "xz data: unpack it first"),
)


def refuse_packed(head: bytes, place: str) -> None:
    """Raise :class:`InputError` where ``head``, a file's first bytes, are of a packed format."""
    for magic, cause in _PACKED:
        if head.startswith(magic):
            raise InputError(place, cause)


def open_raw_image(path: str | os.PathLike[str], *, base_phys: int = 0) -> MappedMemory:
    """The memory in a raw image whose first byte is at ``base_phys``; :class:`InputError`."""
    return raw_memory(MappedFile(path), base_phys)


def raw_memory(file: MappedFile, base_phys: int = 0) -> MappedMemory:
    """The same for a file that is mapped already."""
    refuse_packed(file.data[:64].tobytes(), file.path)
    if base_phys % 4096 or not 0 <= base_phys <= _PHYS_MAX - file.size_bytes:
        raise InputError(file.path, f"memory from {base_phys:#x} on: not a page of any machine")
    return MappedMemory(file, [Segment(base_phys, base_phys + file.size_bytes, 0)])
