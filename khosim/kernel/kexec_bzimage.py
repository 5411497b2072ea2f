"""Loading a bzImage: where x86-64 puts kernel, initrd and boot parameters.

Models ``arch/x86/kernel/kexec-bzimage64.c`` (``bzImage64_probe``, ``bzImage64_load``,
``setup_boot_parameters``, ``setup_kho``, ``setup_cmdline``) and, for a crash image,
``arch/x86/kernel/crash.c:crash_load_segments`` and ``crash_setup_memmap_entries`` @ 7.3 of a kernel
without EFI and IMA. Purgatory and ELF core headers are segments of the size they have in real
kernels, without content. Left out: EDD, the random seed (kernels whose generator is not ready pass
none either), 5-level paging.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from khosim.abi.boot_params import (
    BOOT_PARAMS_BYTES,
    E820_RAM,
    KHO_DATA_BYTES,
    RNG_SEED_BYTES,
    SETUP_DATA_BYTES,
    SETUP_KEXEC_KHO,
    BzImageHeader,
    pack_boot_params,
    pack_kho_data,
    pack_setup_data,
    parse_bzimage,
    setup_header,
)
from khosim.errors import KernelError

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.kexec import Kimage

__all__ = ("load_bzimage", "probe_bzimage")

_MAX_ELFCOREHDR_STR_LEN = 30
_EFI_SETUP_DATA_BYTES = 96
_PURGATORY_BYTES = 5 << 12
_MIN_PURGATORY_ADDR = 0x3000
_MIN_BOOTPARAM_ADDR = 0x3000
_MIN_KERNEL_LOAD_ADDR = 0x100000
_MIN_INITRD_LOAD_ADDR = 0x1000000
_ELF_EHDR_BYTES, _ELF_PHDR_BYTES = 64, 56
_MIB = 1 << 20


def probe_bzimage(image: bytes) -> BzImageHeader:
    """``bzImage64_probe``: raises -ENOEXEC for another kind of file."""
    header = parse_bzimage(image)
    if header is None:
        raise KernelError(errno.ENOEXEC, "bzImage64_probe", "not a 64-bit bzImage")
    return header


def load_bzimage(
    kernel: Kernel, kimage: Kimage, image: bytes, initrd: bytes, initrd_bytes: int, cmdline: str
) -> None:
    """``bzImage64_load``: add the segments and set the entry registers."""
    header = probe_bzimage(image)
    symbol = "bzImage64_load"
    if len(image) < header.setup_bytes:
        raise KernelError(errno.ENOEXEC, symbol, "bzImage truncated")
    command = cmdline.encode("utf-8", "surrogateescape") + b"\0" if cmdline else b""
    if len(command) > header.cmdline_size:
        raise KernelError(errno.EINVAL, symbol, "kernel command line too long")
    if len(command) + _MAX_ELFCOREHDR_STR_LEN > header.cmdline_size:
        raise KernelError(
            errno.EINVAL,
            symbol,
            "appending elfcorehdr=<addr> to command line exceeds maximum allowed length",
        )
    if kimage.is_crash:
        _crash_load_segments(kernel, kimage)
    page = kernel.arch.page_size
    kimage.add_buffer(
        b"",
        name="purgatory",
        memsz=_PURGATORY_BYTES,
        align=page,
        buf_min=_MIN_PURGATORY_ADDR,
        top_down=True,
    )
    setup_data_at = BOOT_PARAMS_BYTES + len(command) + _MAX_ELFCOREHDR_STR_LEN + 15 & -16
    params_bytes = (
        setup_data_at
        + SETUP_DATA_BYTES
        + _EFI_SETUP_DATA_BYTES
        + SETUP_DATA_BYTES
        + RNG_SEED_BYTES
        + SETUP_DATA_BYTES
        + KHO_DATA_BYTES
    )
    params = kimage.add_buffer(
        b"",
        name="boot parameters",
        memsz=params_bytes,
        align=16,
        buf_min=_MIN_BOOTPARAM_ADDR,
        top_down=True,
    )
    loaded = kimage.add_buffer(
        image[header.setup_bytes :],
        name="kernel",
        memsz=header.init_size,
        align=header.kernel_alignment,
        buf_min=max(header.pref_address, _MIN_KERNEL_LOAD_ADDR),
        top_down=True,
    )
    ramdisk = 0
    if initrd_bytes:
        ramdisk = kimage.add_buffer(
            initrd,
            name="initrd",
            memsz=initrd_bytes,
            align=page,
            buf_min=_MIN_INITRD_LOAD_ADDR,
            top_down=True,
        ).mem
    if kimage.is_crash:
        command = (f"elfcorehdr=0x{kimage.elf_load_addr:x} ".encode() + command)[:-1] + b"\0"
    # setup_kho: linked only when both parts are in place.
    payload = bytes(KHO_DATA_BYTES)
    setup_data = 0
    if kimage.kho_fdt and kimage.kho_scratch is not None:
        scratch = kimage.kho_scratch
        payload = pack_kho_data(kimage.kho_fdt, page, scratch.mem, len(scratch.data))
        setup_data = params.mem + setup_data_at
    block = pack_boot_params(
        e820=_crash_memmap(kernel, kimage) if kimage.is_crash else kernel.firmware_map,
        setup_data=setup_data,
        ramdisk_image=ramdisk,
        ramdisk_size=initrd_bytes,
        cmd_line_ptr=params.mem + BOOT_PARAMS_BYTES,
        header=setup_header(image),
    )
    block = (block + command).ljust(setup_data_at, b"\0")
    block += pack_setup_data(0, SETUP_KEXEC_KHO, payload)
    kimage.replace(params, block.ljust(params_bytes, b"\0"))
    kimage.entry = {"rip": loaded.mem, "rsi": params.mem}


def elf_headers_bytes(kernel: Kernel, nr_ranges: int) -> int:
    """``crash_prepare_elf64_headers``: their size in bytes, whole pages of 4 KiB."""
    nr_phdr = kernel.config.nr_cpus + 1 + nr_ranges + 1
    return _ELF_EHDR_BYTES + nr_phdr * _ELF_PHDR_BYTES + 4095 & -4096


def _crash_load_segments(kernel: Kernel, kimage: Kimage) -> None:
    # System RAM less the first MiB and the crash region.
    nr_ranges = sum(end > _MIB for _, end in kernel.system_ram) + len(kernel.crashk_res)
    size = elf_headers_bytes(kernel, nr_ranges)
    segment = kimage.add_buffer(b"", name="elfcorehdr", memsz=size, align=4096, top_down=False)
    kimage.elf_load_addr, kimage.elf_headers_bytes = segment.mem, size


def _crash_memmap(kernel: Kernel, kimage: Kimage) -> list[tuple[int, int, int]]:
    # crash_setup_memmap_entries: the first MiB, what is not RAM, and the crash region without
    # the ELF core headers.
    low = [
        (start, min(end, _MIB) - start, E820_RAM)
        for start, end in kernel.system_ram
        if start < _MIB
    ]
    other = [entry for entry in kernel.firmware_map if entry[2] != E820_RAM]
    start, end = kernel.crashk_res[0]
    hole_start = kimage.elf_load_addr
    hole_end = hole_start + kimage.elf_headers_bytes
    crash = [
        (low_end, high_end - low_end, E820_RAM)
        for low_end, high_end in ((start, hole_start), (hole_end, end))
        if high_end - low_end >= kernel.arch.page_size
    ]
    return [*low, *other, *crash]
