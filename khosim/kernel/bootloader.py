"""The boot loader of a cold boot: firmware and QEMU-like loading of the first kernel.

Puts a kernel image, an initrd and what the boot protocol asks for into RAM and sets the registers,
as QEMU's ``-kernel`` does (``hw/i386/x86-common.c``, ``hw/arm/boot.c``): x86-64 gets boot
parameters with an E820 map, arm64 a device tree. Documented in ``Documentation/arch/x86/boot.rst``
and ``Documentation/arch/arm64/booting.rst`` @ 7.3. Left out: ACPI tables; nodes on x86-64 are read
from the machine where Linux reads the SRAT.
"""

from __future__ import annotations

import struct

from khosim.abi import fdt
from khosim.abi.arm64_image import parse_arm64_image
from khosim.abi.boot_params import (
    E820_RAM,
    E820_RESERVED,
    pack_boot_params,
    parse_bzimage,
    setup_header,
)
from khosim.errors import InputError
from khosim.machine.hardware import Hardware
from khosim.machine.memory_map import ACPI_DATA, ACPI_NVS, RAM, UNUSABLE

__all__ = ("build_device_tree", "load_kernel")

_BY = (-1, "boot loader")
_BOOT_PARAMS_PHYS = 0x10000
_CMDLINE_PHYS = 0x20000
_QEMU_LOADER = 0xB0
_E820_TYPES = {RAM: E820_RAM, ACPI_DATA: 3, ACPI_NVS: 4, UNUSABLE: 5}
_MIB = 1 << 20


def load_kernel(
    hardware: Hardware, image: bytes, *, initrd: bytes = b"", initrd_bytes: int = 0, cmdline: str
) -> None:
    """Load ``image`` and set the registers; the next boot starts it.

    ``initrd`` is padded with zeros to ``initrd_bytes``. Raises :class:`InputError` where the image
    is of another architecture or does not fit.
    """
    initrd_bytes = max(initrd_bytes, len(initrd))
    if not cmdline.isascii() or len(cmdline) > 2000 or min(cmdline, default=" ") < " ":
        raise InputError("cmdline", "it must be at most 2000 printable ASCII characters")
    if hardware.arch == "x86_64":
        _load_x86(hardware, image, initrd, initrd_bytes, cmdline)
    else:
        _load_arm64(hardware, image, initrd, initrd_bytes, cmdline)


def _fits(hardware: Hardware, what: str, phys: int, len_bytes: int) -> None:
    if not hardware.is_ram(phys, len_bytes):
        raise InputError(
            what, f"{len_bytes >> 10} KiB at {phys:#x} do not fit into the machine's RAM"
        )


def _load_x86(
    hardware: Hardware, image: bytes, initrd: bytes, initrd_bytes: int, cmdline: str
) -> None:
    header = parse_bzimage(image)
    if header is None or len(image) < header.setup_bytes:
        raise InputError("kernel image", "it is not a 64-bit bzImage")
    ram = hardware.ram
    code = image[header.setup_bytes :]
    _fits(hardware, "kernel image", header.pref_address, header.init_size)
    ram.write(header.pref_address, code, _BY)
    initrd_phys = 0
    if initrd_bytes:
        kernel_end = header.pref_address + header.init_size
        for start, end in reversed(hardware.ram_ranges):
            initrd_phys = (min(end, 1 << 32) - initrd_bytes) & -4096
            if initrd_phys >= max(start, kernel_end):
                break
        else:
            raise InputError("initrd", f"{initrd_bytes >> 10} KiB do not fit above the kernel")
        ram.write(initrd_phys, initrd, _BY)
    ram.write(_CMDLINE_PHYS, cmdline.encode() + b"\0", _BY)
    page = pack_boot_params(
        e820=[
            (start, end - start, _E820_TYPES.get(kind, E820_RESERVED))
            for start, end, kind in hardware.memory_map.entries
        ],
        setup_data=0,
        ramdisk_image=initrd_phys,
        ramdisk_size=initrd_bytes,
        cmd_line_ptr=_CMDLINE_PHYS,
        header=setup_header(image),
        type_of_loader=_QEMU_LOADER,
    )
    ram.write(_BOOT_PARAMS_PHYS, page, _BY)
    hardware.registers = {"rip": header.pref_address, "rsi": _BOOT_PARAMS_PHYS}


def _load_arm64(
    hardware: Hardware, image: bytes, initrd: bytes, initrd_bytes: int, cmdline: str
) -> None:
    header = parse_arm64_image(image)
    if header is None:
        raise InputError("kernel image", "it is not an arm64 Image")
    if header.page_size and header.page_size != hardware.page_size:
        raise InputError(
            "kernel image", f"its pages have {header.page_size} bytes, not {hardware.page_size}"
        )
    ram = hardware.ram
    # The first bank with room for all; where there is none, the first one says what does not fit.
    banks = [*hardware.ram_ranges, hardware.ram_ranges[0]]
    for base, end in banks:
        entry = (base + 4 * _MIB - 1) & -(2 * _MIB)
        initrd_phys = (base + min((end - base) // 2, 128 * _MIB)) & -hardware.page_size
        if max(initrd_phys + initrd_bytes, entry + header.image_size) + 4 * _MIB <= end:
            break
    _fits(hardware, "kernel image", entry, header.image_size)
    ram.write(entry, image, _BY)
    if initrd_bytes:
        if initrd_phys < entry + header.image_size:
            raise InputError("initrd", f"{initrd_bytes >> 10} KiB do not fit above the kernel")
        _fits(hardware, "initrd", initrd_phys, initrd_bytes)
        ram.write(initrd_phys, initrd, _BY)
    dtb = build_device_tree(hardware, cmdline, initrd_phys, initrd_bytes)
    dtb_phys = (initrd_phys + initrd_bytes + 2 * _MIB - 1) & -(2 * _MIB)
    _fits(hardware, "device tree", dtb_phys, len(dtb))
    ram.write(dtb_phys, dtb, _BY)
    hardware.registers = {"pc": entry, "x0": dtb_phys}


def build_device_tree(
    hardware: Hardware, cmdline: str, initrd_phys: int, initrd_bytes: int
) -> bytes:
    """A machine's device tree, as QEMU's ``virt`` would describe memory, nodes and ``/chosen``.

    Raises :class:`InputError` for a memory map of more pieces than fit into 64 KiB.
    """
    size = 64 << 10
    tree = memoryview(bytearray(size))
    error = fdt.fdt_create(tree, size)
    error |= fdt.fdt_finish_reservemap(tree)
    error |= fdt.fdt_begin_node(tree, "")
    error |= fdt.fdt_property(tree, "#address-cells", struct.pack(">I", 2))
    error |= fdt.fdt_property(tree, "#size-cells", struct.pack(">I", 2))
    error |= fdt.fdt_property_string(tree, "compatible", "linux,dummy-virt")
    for start, end, nid in _memory_by_node(hardware):
        error |= fdt.fdt_begin_node(tree, f"memory@{start:x}")
        error |= fdt.fdt_property_string(tree, "device_type", "memory")
        error |= fdt.fdt_property(tree, "reg", struct.pack(">QQ", start, end - start))
        error |= fdt.fdt_property(tree, "numa-node-id", struct.pack(">I", nid))
        error |= fdt.fdt_end_node(tree)
    error |= fdt.fdt_begin_node(tree, "chosen")
    if initrd_bytes:  # in this order, as QEMU leaves them
        initrd_end = struct.pack(">Q", initrd_phys + initrd_bytes)
        error |= fdt.fdt_property(tree, "linux,initrd-end", initrd_end)
        error |= fdt.fdt_property(tree, "linux,initrd-start", struct.pack(">Q", initrd_phys))
    error |= fdt.fdt_property_string(tree, "bootargs", cmdline)
    error |= fdt.fdt_end_node(tree)
    error |= fdt.fdt_end_node(tree)
    error |= fdt.fdt_finish(tree)
    if error:
        raise InputError("memory map", "it has too many pieces for a device tree of 64 KiB")
    return bytes(tree[: fdt.fdt_totalsize(tree)])


def _memory_by_node(hardware: Hardware) -> list[tuple[int, int, int]]:
    pieces = []
    for start, end in hardware.ram_ranges:
        for node_start, node_end, nid in hardware.memory_map.node_ranges:
            low, high = max(start, node_start), min(end, node_end)
            if low < high:
                pieces.append((low, high, nid))
    return pieces
