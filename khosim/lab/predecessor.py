"""khosim's own kernel in the place of the first real one.

The real first kernel boots, loads its successor and jumps. At ``machine_kexec`` a simulated kernel
boots on the same machine, in the windows that the real one was told to keep away from
(:mod:`khosim.lab.windows`), preserves, and jumps too. What it handed over is then copied into the
guest: every preserved block, and the root FDT in the page that the real ``kho_out.fdt`` points to,
whose address the loaded image carries already. What the simulated kernel did not preserve, its
scratch and its image among it, stays behind.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from khosim.abi import fdt
from khosim.capture.dmesg import parse_dmesg
from khosim.checks.preserved import expand
from khosim.errors import InputError, KhoSimError
from khosim.inspect.memory import Memory, inspect_memory
from khosim.inspect.source import RamReader
from khosim.kernel.boot import boot
from khosim.kernel.bootloader import load_kernel
from khosim.kernel.image import KernelConfig, KernelImage
from khosim.kernel.kernel import Kernel
from khosim.kernel.kho_radix_key import kho_decode_radix_key
from khosim.kernel.release import RELEASES, Release
from khosim.lab.belongings import Belongings, fill_kernel
from khosim.lab.guest_ram import GuestRam
from khosim.lab.windows import WindowPolicy, carve, memmap_options, windows_of
from khosim.machine.hardware import Hardware
from khosim.machine.ram import Ram

__all__ = ("DEFAULT_REGION", "Handed", "Predecessor")

DEFAULT_REGION = "reserve_mem=2M:4096:khosim"
_IMAGE_BYTES = 2 << 20
_IMAGE_PHYS = 16 << 20
_LOW_MEMORY = (0, 0xA0000)
_SCRATCH = "kho_scratch=16M,16M,4M"
_SEED = 7
_VERSION = re.compile(r"(\d+\.\d+)")


@dataclass(frozen=True, slots=True)
class Handed:
    """What was put into the guest: ``blocks`` as (phys, order) in the order of khosim's tree."""

    uname: str
    fdt_phys: int
    blocks: list[tuple[int, int]]
    belongings: Belongings


class Predecessor:
    """For a guest with nodes of ``node_bytes`` whose kernels get ``cmdline``."""

    def __init__(self, node_bytes: tuple[int, ...], cmdline: str) -> None:
        self.windows = windows_of(node_bytes)
        regions = [word for word in cmdline.split() if word.startswith("reserve_mem=")]
        self.cmdline = cmdline if regions else f"{cmdline} {DEFAULT_REGION}"
        self._own_cmdline = " ".join(
            ["kho=on", "liveupdate=on", _SCRATCH, *(regions or [DEFAULT_REGION])]
        )

    @property
    def first_cmdline(self) -> str:
        """The command line of the real first kernel, which keeps away from the windows."""
        return f"{self.cmdline} {memmap_options(self.windows)}"

    def hand_over(self, guest: GuestRam, dmesg: str, release: str, fdt_phys: int) -> Handed:
        """Boot khosim's kernel, let it jump, and put its handover into the stopped guest.

        ``dmesg`` and ``release`` are the real first kernel's, ``fdt_phys`` is its root FDT's page.
        """
        page = fdt_phys, fdt_phys + 4096
        image = (_IMAGE_PHYS, _IMAGE_PHYS + (_IMAGE_BYTES * 5 // 4))
        memory_map = carve(
            parse_dmesg(dmesg, place="gen0/dmesg").memory_map,
            [_LOW_MEMORY, image, page, *self.windows],
        )
        hardware = Hardware(memory_map)
        policy = WindowPolicy(self.windows)
        kernel_image = _image(_release(release))
        load_kernel(hardware, kernel_image.data, cmdline=self._own_cmdline)
        kernel = boot(hardware, 0, policy=policy)
        if not kernel.kho_enable:
            raise KhoSimError(f"khosim's kernel has no KHO: {'; '.join(kernel.messages[-3:])}")
        _move_root_fdt(kernel, policy, fdt_phys)
        belongings = fill_kernel(kernel, _SEED)
        loaded = kernel.kexec_file_load(kernel_image, cmdline=self._own_cmdline)
        kernel.kernel_kexec(loaded)
        blocks = _tree(kernel)
        self._copy(hardware.ram, guest, fdt_phys, blocks)
        return Handed(kernel.release.uname, fdt_phys, blocks, belongings)

    def _copy(self, ram: Ram, guest: GuestRam, phys: int, blocks: list[tuple[int, int]]) -> None:
        """Copy khosim's blocks and map, once the checkers' decoder agrees that these are it."""
        memory = Memory("khosim's kernel", "simulated RAM", RamReader(ram), ram.page_size)
        report = inspect_memory(memory, fdt_phys=phys)
        if report.damage or expand(report.handover.preserved) != blocks:
            raise KhoSimError("khosim's own handover does not decode: nothing was written")
        # The pages of the map itself are nobody's: all has been read when memory is freed.
        pieces = [(start, ram.page_size << order) for start, order in blocks]
        pieces += [(start, ram.page_size) for start in report.handover.metadata_pages]
        for start, size in pieces:
            inside = any(low <= start and start + size <= high for low, high in self.windows)
            if not inside and start != phys:
                raise KhoSimError(f"khosim's kernel used {start:#x}, outside of its windows")
            guest.write(start, ram.read(start, size))


def _release(release: str) -> Release:
    """khosim's release that is like the real one, by a name that tells them apart."""
    match = _VERSION.match(release)
    known = RELEASES.get(match[1]) if match else None
    if known is None:
        cause = f"khosim has no release like {release!r}; it has {', '.join(RELEASES)}"
        raise InputError("--predecessor", cause)
    return known.evolve(uname=f"{known.name}-khosim")


def _image(release: Release) -> KernelImage:
    return KernelImage.build(config=KernelConfig(release=release), size=_IMAGE_BYTES)


def _move_root_fdt(kernel: Kernel, policy: WindowPolicy, fdt_phys: int) -> None:
    """Move the root FDT to ``fdt_phys``, a page that the kernel allocates and preserves."""
    out, page_size = kernel.kho_out, kernel.arch.page_size
    old = out.fdt_phys
    policy.next_pfn = fdt_phys >> kernel.arch.page_shift
    page = kernel.kho_alloc_preserve(page_size)
    if page.phys != fdt_phys:
        raise KhoSimError(f"khosim's kernel could not get the page at {fdt_phys:#x}")
    tree = kernel.ram.read(old, page_size)
    kernel.ram.write(fdt_phys, tree, kernel.by("kho_out_fdt_setup"))
    out.fdt_phys = fdt_phys
    out.unpreserve_pages(old >> kernel.arch.page_shift, 1)
    kernel.pages.free_pages(old >> kernel.arch.page_shift, 0)
    if fdt.fdt_check_header(kernel.ram.writable_mv(fdt_phys, page_size, kernel.by("kho_init"))):
        raise KhoSimError("the moved root FDT is damaged")


def _tree(kernel: Kernel) -> list[tuple[int, int]]:
    shift = kernel.arch.page_shift
    return [
        kho_decode_radix_key(key, shift)
        for nr_keys, first in kernel.kho_out.tree.walk()
        for key in range(first, first + nr_keys)
    ]
