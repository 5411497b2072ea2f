"""The x86 boot protocol: what a boot loader or kexec leaves in RAM for a kernel.

Layouts of ``arch/x86/include/uapi/asm/{bootparam,setup_data}.h`` and
``Documentation/arch/x86/boot.rst`` @ 7.3 (unchanged since 6.16): ``struct boot_params``, the
``setup_data`` list, ``struct kho_data`` and the header of a bzImage. Fields that neither a handover
nor the boot protocol needs (video, disks, EFI) stay zero.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

__all__ = (
    "BOOT_PARAMS_BYTES",
    "E820_RAM",
    "E820_RESERVED",
    "KHO_DATA_BYTES",
    "RNG_SEED_BYTES",
    "SETUP_DATA_BYTES",
    "SETUP_KEXEC_KHO",
    "BootParams",
    "BzImageHeader",
    "SetupData",
    "build_bzimage",
    "pack_boot_params",
    "pack_kho_data",
    "pack_setup_data",
    "parse_boot_params",
    "parse_bzimage",
    "parse_kho_data",
    "parse_setup_data",
    "setup_header",
    "with_e820",
)

BOOT_PARAMS_BYTES = 4096
SETUP_DATA_BYTES = 16
KHO_DATA_BYTES = 32
RNG_SEED_BYTES = 32
SETUP_KEXEC_KHO = 10
E820_RAM = 1
E820_RESERVED = 2

_E820_MAX = 128
_E820_AT = 0x2D0
_E820 = struct.Struct("<QQI")
_SETUP_DATA = struct.Struct("<QII")
_KHO_DATA = struct.Struct("<QQQQ")
_HDRS = 0x53726448
_HDR_AT = 0x1F1
_SETUP_SECTS = 4
_MIB = 1 << 20


class BootParams(NamedTuple):
    """The fields of ``struct boot_params`` that matter; addresses and sizes in bytes."""

    e820: list[tuple[int, int, int]]
    """``(address, size, type)`` entries."""
    setup_data: int
    ramdisk_image: int
    ramdisk_size: int
    cmd_line_ptr: int
    type_of_loader: int
    alt_mem_bytes: int
    """RAM above 1 MiB by the old ways of asking, for a kernel without an E820 table."""


class SetupData(NamedTuple):
    """Header of one ``struct setup_data``; ``len_bytes`` counts the payload only."""

    next: int
    type: int
    len_bytes: int


class BzImageHeader(NamedTuple):
    """What ``bzImage64_load`` reads of a bzImage."""

    setup_bytes: int
    kernel_alignment: int
    pref_address: int
    init_size: int
    cmdline_size: int


def pack_boot_params(
    *,
    e820: Sequence[tuple[int, int, int]],
    setup_data: int,
    ramdisk_image: int,
    ramdisk_size: int,
    cmd_line_ptr: int,
    header: bytes = b"",
    type_of_loader: int = 0xD0,
) -> bytes:
    """One page of ``struct boot_params``; entries beyond 128 are dropped, as kexec does.

    ``header`` is :func:`setup_header` of the kernel to start; ``type_of_loader`` says who starts
    it (0xd0: kexec).
    """
    page = bytearray(BOOT_PARAMS_BYTES)
    page[_HDR_AT : _HDR_AT + len(header)] = header
    entries = e820[:_E820_MAX]
    page[0x1E8] = len(entries)
    for i, (addr, size, type_) in enumerate(entries):
        _E820.pack_into(page, _E820_AT + i * _E820.size, addr, size, type_)
        if type_ == E820_RAM and addr <= _MIB < addr + size - 1:
            mem_k = (addr + size - 1 >> 10) - (_MIB >> 10)
            struct.pack_into("<H", page, 0x002, min(mem_k, 0xFC00))
            struct.pack_into("<I", page, 0x1E0, min(mem_k, 0xFFFFFFFF))
    high_halves = ramdisk_image >> 32, ramdisk_size >> 32, cmd_line_ptr >> 32
    struct.pack_into("<III", page, 0xC0, *high_halves)
    struct.pack_into("<BB", page, 0x210, type_of_loader, 0)
    struct.pack_into("<II", page, 0x218, ramdisk_image & 0xFFFFFFFF, ramdisk_size & 0xFFFFFFFF)
    struct.pack_into("<I", page, 0x228, cmd_line_ptr & 0xFFFFFFFF)
    struct.pack_into("<Q", page, 0x250, setup_data)
    return bytes(page)


def with_e820(page: bytes, e820: Sequence[tuple[int, int, int]]) -> bytes:
    """A page of ``struct boot_params`` with another E820 table, sorted."""
    changed = bytearray(page)
    entries = sorted(e820)[:_E820_MAX]
    changed[0x1E8] = len(entries)
    for i, entry in enumerate(entries):
        _E820.pack_into(changed, _E820_AT + i * _E820.size, *entry)
    return bytes(changed)


def parse_boot_params(page: bytes) -> BootParams:
    """Decode one page of ``struct boot_params``; any bytes give some answer."""
    count = min(page[0x1E8], _E820_MAX)
    e820 = list(_E820.iter_unpack(page[_E820_AT : _E820_AT + count * _E820.size]))
    image_high, size_high, cmdline_high = struct.unpack_from("<III", page, 0xC0)
    image, size = struct.unpack_from("<II", page, 0x218)
    (cmdline,) = struct.unpack_from("<I", page, 0x228)
    (setup_data,) = struct.unpack_from("<Q", page, 0x250)
    (ext_mem_k,) = struct.unpack_from("<H", page, 0x002)
    (alt_mem_k,) = struct.unpack_from("<I", page, 0x1E0)
    return BootParams(
        e820,
        setup_data,
        image_high << 32 | image,
        size_high << 32 | size,
        cmdline_high << 32 | cmdline,
        page[0x210],
        max(ext_mem_k, alt_mem_k) << 10,
    )


def setup_header(image: bytes) -> bytes:
    """``struct setup_header`` of a bzImage: what a boot loader copies into the boot parameters."""
    return image[_HDR_AT : 0x202 + image[0x201]]


def pack_setup_data(next_phys: int, type_: int, payload: bytes) -> bytes:
    """One ``struct setup_data`` with its payload."""
    return _SETUP_DATA.pack(next_phys, type_, len(payload)) + payload


def parse_setup_data(data: bytes) -> SetupData:
    """The 16-byte header of a ``struct setup_data``."""
    return SetupData(*_SETUP_DATA.unpack(data))


def pack_kho_data(fdt_addr: int, fdt_size: int, scratch_addr: int, scratch_size: int) -> bytes:
    """``struct kho_data``."""
    return _KHO_DATA.pack(fdt_addr, fdt_size, scratch_addr, scratch_size)


def parse_kho_data(data: bytes) -> tuple[int, int, int, int]:
    """``(fdt_addr, fdt_size, scratch_addr, scratch_size)`` of 32 bytes."""
    fdt_addr, fdt_size, scratch_addr, scratch_size = _KHO_DATA.unpack(data)
    return fdt_addr, fdt_size, scratch_addr, scratch_size


def build_bzimage(
    payload: bytes, *, kernel_alignment: int, pref_address: int, init_size: int, cmdline_size: int
) -> bytes:
    """A bzImage with ``payload`` as its protected-mode kernel, 64-bit and relocatable."""
    setup = bytearray((_SETUP_SECTS + 1) * 512)
    setup[0x1F1] = _SETUP_SECTS
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    struct.pack_into("<BB", setup, 0x200, 0xEB, 0x6A)
    struct.pack_into("<IH", setup, 0x202, _HDRS, 0x20F)
    setup[0x211] = 1  # LOADED_HIGH
    struct.pack_into("<IBBHI", setup, 0x230, kernel_alignment, 1, 21, 3, cmdline_size)
    struct.pack_into("<QI", setup, 0x258, pref_address, init_size)
    return bytes(setup) + payload


def parse_bzimage(image: bytes) -> BzImageHeader | None:
    """What ``bzImage64_load`` needs, or None where ``bzImage64_probe`` refuses the file."""
    if len(image) < 1024 or image[0x202:0x206] != b"HdrS" or image[0x1FE:0x200] != b"\x55\xaa":
        return None
    (version,) = struct.unpack_from("<H", image, 0x206)
    alignment, _, _, xloadflags, cmdline_size = struct.unpack_from("<IBBHI", image, 0x230)
    pref_address, init_size = struct.unpack_from("<QI", image, 0x258)
    if version < 0x20C or not image[0x211] & 1 or xloadflags & 3 != 3:
        return None
    setup_bytes = ((image[0x1F1] or 4) + 1) * 512
    return BzImageHeader(setup_bytes, alignment, pref_address, init_size, cmdline_size)
