"""A machine as a real kernel left it: at the jump, with its successor's image in place.

RAM holds the pages that were captured, and nothing else of the old kernel. What the boot loader of
the next one is handed (``kernel/kexec_file.c``, ``arch/x86/kernel/kexec-bzimage64.c:setup_kho``,
``arch/arm64/kernel/machine_kexec_file.c:kho_add_chosen`` @ 7.3) is made by khosim's own kexec code,
run on behalf of the real kernel: kernel, initrd, boot parameters and scratch array go where that
code puts segments of these sizes. The sizes are those of the successor's log where it was captured;
its kernel's address, too, decides how much room the image is given. Where nothing tells, khosim's
usual image is taken, and a small one where that does not fit into scratch.

Left out: all pages that no handover reaches, the old kernel's own above all.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from khosim.abi.boot_params import E820_RAM, E820_RESERVED
from khosim.capture.folder import Capture, CapturedGeneration
from khosim.conform.held import Held
from khosim.conform.sizes import Sizes, read_sizes
from khosim.errors import InputError, KernelError, KernelPanic, RamFault
from khosim.kernel.arch import find_arch
from khosim.kernel.bootloader import build_device_tree
from khosim.kernel.image import KernelConfig, KernelImage
from khosim.kernel.kernel import Kernel
from khosim.kernel.kexec import Kimage
from khosim.kernel.kexec_arm64 import load_arm64_image
from khosim.kernel.kexec_bzimage import load_bzimage
from khosim.kernel.kho import kho_fill_kimage
from khosim.kernel.release import Release
from khosim.machine.hardware import Hardware
from khosim.machine.memory_map import ACPI_DATA, ACPI_NVS, RAM, UNUSABLE

__all__ = ("Jump", "captured_ram", "load_image")

_ENTRY = struct.Struct("<QQ")
_E820_TYPES = {RAM: E820_RAM, ACPI_DATA: 3, ACPI_NVS: 4, UNUSABLE: 5}
_MIB = 1 << 20
_ALIGN = 2 * _MIB
_MOST_IMAGE = 1 << 30
_SMALL = 4 * _MIB


class Jump(NamedTuple):
    """The jump away from one captured generation."""

    capture: Capture
    generation: CapturedGeneration
    held: Held
    successor: CapturedGeneration | None

    @staticmethod
    def find(capture: Capture, which: int | str) -> Jump:
        """The jump away from generation ``which``; :class:`InputError` where it left no pages."""
        generation = capture.generation(which)
        held = Held(generation)
        if held.handover is None:
            raise InputError(str(generation.path), f"it handed nothing over: {held.why}")
        after = generation.index + 1
        successor = capture.generations[after] if after < len(capture.generations) else None
        return Jump(capture, generation, held, successor)

    @property
    def cmdline(self) -> str:
        """The successor's command line, or the predecessor's where that was not captured."""
        for one in (self.successor, self.generation):
            if one is not None and one.has("cmdline"):
                return one.cmdline
        return "kho=on"

    def sizes(self) -> Sizes:
        """The sizes of the successor's image."""
        for one in (self.successor, self.generation):
            sizes = read_sizes(one, self.capture.arch) if one is not None else None
            if sizes is not None:
                return sizes if one is self.successor else sizes._replace(kernel_phys=None)
        return Sizes()


def captured_ram(jump: Jump) -> Hardware:
    """The machine of the capture with the pages of ``jump`` in its RAM, and no kernel."""
    capture, generation = jump.capture, jump.generation
    hardware = Hardware(capture.memory_map(), capture.page_size)
    pfn, data = generation.ram_pages
    by = (generation.index, "captured")
    page = capture.page_size
    for number, row in zip(pfn.tolist(), data, strict=True):
        if not hardware.is_ram(number * page, page):
            place = str(generation.path / "ram.npz")
            raise InputError(place, f"a page at {number * page:#x}, where no RAM is")
        hardware.ram.write(number * page, row, by)
    return hardware


def load_image(
    hardware: Hardware,
    jump: Jump,
    release: Release,
    *,
    image: KernelImage | None = None,
    config: KernelConfig | None = None,
    initrd_bytes: int | None = None,
    cmdline: str | None = None,
) -> KernelImage:
    """Put an image of ``release`` into scratch and set the registers; returns the image.

    ``image`` or ``config`` and ``initrd_bytes`` take the place of what the capture tells. Raises
    :class:`InputError` where nothing fits.
    """
    cmdline = jump.cmdline if cmdline is None else cmdline
    sizes = jump.sizes()
    arch, page = hardware.arch, hardware.page_size
    initrd = sizes.initrd_bytes if initrd_bytes is None else initrd_bytes
    if image is not None or config is not None:
        image = image or KernelImage.build(release, arch=arch, page_size=page, config=config)
        return _place(hardware, jump, image, initrd, cmdline)
    full = sizes.config(release, arch)
    usual = KernelImage.build(release, arch=arch, page_size=page, config=full)
    try:
        return _at_real_place(hardware, jump, usual, initrd, cmdline, sizes)
    except InputError:
        if initrd_bytes is not None:
            raise
    small = KernelImage.build(release, arch=arch, page_size=page, size=_SMALL)
    return _place(hardware, jump, small, 0, cmdline)


def _at_real_place(
    hardware: Hardware,
    jump: Jump,
    image: KernelImage,
    initrd: int,
    cmdline: str,
    sizes: Sizes,
) -> KernelImage:
    # A bzImage says itself how much room it wants, and top down that decides where it goes.
    kimage = _load(hardware, jump, image, initrd, cmdline)
    wanted = sizes.kernel_phys
    if hardware.arch == "x86_64" and wanted is not None and kimage.entry["rip"] != wanted:
        top = min(segment.mem for segment in kimage.segments[: _before_kernel(kimage)])
        room = top - wanted
        if not wanted % _ALIGN and image.config.kernel_bytes <= room <= _MOST_IMAGE:
            config = image.config.evolve(init_size_bytes=room)
            image = KernelImage.build(
                config.release, arch=image.arch, page_size=image.page_size, config=config
            )
    return _place(hardware, jump, image, initrd, cmdline)


def _before_kernel(kimage: Kimage) -> int:
    return next(i for i, segment in enumerate(kimage.segments) if segment.name == "kernel")


def _place(
    hardware: Hardware, jump: Jump, image: KernelImage, initrd: int, cmdline: str
) -> KernelImage:
    kimage = _load(hardware, jump, image, initrd, cmdline)
    by = (jump.generation.index, "relocate_kernel")
    for segment in kimage.segments:
        hardware.ram.write(segment.mem, segment.data[: segment.memsz], by)
        filled = len(segment.data)
        hardware.ram.zero(segment.mem + filled, segment.memsz - filled, by)
    hardware.registers = dict(kimage.entry)
    return image


def _load(
    hardware: Hardware, jump: Jump, image: KernelImage, initrd: int, cmdline: str
) -> Kimage:
    """``kexec_file_load`` on behalf of the captured kernel: where each segment goes.

    The stand-in for that kernel needs its scratch array and its device tree in memory. Both are put
    into scratch for the time being, which holds nothing that is handed over.
    """
    areas = list(jump.generation.scratch_areas)
    handover = jump.held.handover
    assert handover is not None
    place = str(jump.generation.path / "kho/out/scratch_phys")
    for start, size in areas:
        if size and not hardware.is_ram(start, size):
            raise InputError(place, f"a scratch area at {start:#x}, where no RAM is")
    start, size = max(areas, key=lambda area: area[1], default=(0, 0))
    if size < _ALIGN:
        raise InputError(place, "no scratch area that could hold a kernel")
    ram = hardware.ram
    by = (jump.generation.index, "kexec_file_load")
    kernel = Kernel(
        hardware, find_arch(hardware.arch, hardware.page_size), image.config, jump.generation.index
    )
    kernel.set_mapped(list(hardware.ram_ranges))
    kernel.firmware_map = [
        (low, high - low, _E820_TYPES.get(kind, E820_RESERVED))
        for low, high, kind in hardware.memory_map.entries
    ]
    kernel.kho_enable = True
    kernel.kho_out.finalized = bool(image.config.release.finalize)
    kernel.kho_out.fdt_phys = handover.fdt_phys
    kernel.kho_scratch_phys, kernel.kho_scratch_cnt = start, len(areas)
    array = b"".join(_ENTRY.pack(*area) for area in areas)
    tree = b""
    if hardware.arch == "arm64":
        kernel.boot_fdt_phys = start + hardware.page_size
        tree = _device_tree(jump, hardware, size - hardware.page_size)
    snapshot = hardware.snapshot()
    try:
        ram.write(start, array, by)
        ram.write(start + hardware.page_size, tree, by)
        kimage = Kimage(kernel)
        kho_fill_kimage(kernel, kimage)
        load = load_bzimage if hardware.arch == "x86_64" else load_arm64_image
        load(kernel, kimage, image.data, b"", initrd, cmdline)
    except (KernelError, KernelPanic, RamFault) as refused:
        raise InputError(str(jump.generation.path), f"kexec_file_load: {refused}") from None
    finally:
        hardware.rollback(snapshot)
        hardware.discard(snapshot)
    return kimage


def _device_tree(jump: Jump, hardware: Hardware, room: int) -> bytes:
    """The device tree that the captured kernel was started with, as near as it is known."""
    for one in (jump.generation, jump.successor, *jump.capture.generations):
        if one is not None and one.has("firmware/fdt"):
            tree = one.bytes_of("firmware/fdt")
            if len(tree) <= room:
                return tree
    return build_device_tree(hardware, "", 0, 0)
