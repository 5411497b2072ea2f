"""KHO's place in the life of a kernel: memory init, the initcall, the hooks of kexec.

Models ``kernel/liveupdate/kexec_handover.c`` @ 7.3: ``kho_memory_init``, ``kho_init``,
``kho_kexec_metadata_init``, ``kho_scratch_overlap``, ``kho_fill_kimage`` and
``kho_locate_mem_hole``. The two sides are in :mod:`~khosim.kernel.kho_out` and
:mod:`~khosim.kernel.kho_in`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from khosim.errors import KernelError, KernelPanic
from khosim.kernel.kho_scratch import kho_reserve_scratch, read_scratch_array

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.kexec import KexecBuf, Kimage

__all__ = (
    "kho_fill_kimage",
    "kho_init",
    "kho_locate_mem_hole",
    "kho_memory_init",
    "kho_scratch_overlap",
    "scratch_areas",
)

_U64 = (1 << 64) - 1


def scratch_areas(kernel: Kernel) -> list[tuple[int, int]]:
    """The kernel's ``kho_scratch[]`` as (address, size) in bytes, read from RAM now."""
    if not kernel.kho_scratch_cnt:
        return []
    if not kernel.kho_scratch_phys:
        # Left behind by a handover that was lost on the way: kho_scratch is NULL.
        raise KernelPanic(
            "BUG: kernel NULL pointer dereference: kho_scratch is gone", kernel.generation
        )
    size = kernel.kho_scratch_cnt * 16
    data = kernel.ram.read(kernel.virt(kernel.kho_scratch_phys, size), size)
    return read_scratch_array(data)


def kho_scratch_overlap(kernel: Kernel, phys: int, size_bytes: int) -> bool:
    """``kho_scratch_overlap``: whether a range touches one of the scratch areas.

    Ends wrap at 64 bits as the kernel's do, so an area that a hostile array lets run past the end
    of the address space overlaps next to nothing.
    """
    end = (phys + size_bytes) & _U64
    return any(
        phys < (addr + size) & _U64 and end > addr for addr, size in scratch_areas(kernel)
    )


def kho_memory_init(kernel: Kernel) -> None:
    """``kho_memory_init``: take over what was preserved, or reserve scratch on a cold boot."""
    kernel.phase = "kho_memory_init"
    release = kernel.release
    is_kdump = kernel.options.is_kdump and not (release.fix_elfcorehdr and kernel.is_kho_boot)
    if release.kdump_guard and is_kdump:
        kernel.kho_enable = False
        kernel.printk("KHO: disabled in the kdump kernel")
    elif kernel.kho_in.scratch_phys:
        kernel.kho_in.mem_retrieve()
    elif kernel.kho_enable:
        if release.fix_scratch_scale:
            kernel.scratch_sizes.regions = _regions(kernel)
        array, count, reserved = kho_reserve_scratch(
            kernel.memblock,
            kernel.ram,
            kernel.arch,
            kernel.release,
            kernel.scratch_sizes,
            _scratch_nodes(kernel),
            kernel.by("kho_reserve_scratch"),
            kernel.printk,
        )
        kernel.kho_enable = reserved
        if reserved:
            kernel.kho_scratch_phys, kernel.kho_scratch_cnt = array, count
        elif not release.fix_scratch_failure:
            kernel.stale_scratch = (array, count)
    if kernel.trace is not None:
        kernel.emit("kho_memory_init", {"scratch": scratch_areas(kernel)}, kernel.kho_enable)


def _regions(kernel: Kernel) -> list[tuple[int, int, int]]:
    # (address, size, node) of the reserve_mem regions.
    nid_of, shift = kernel.memblock.memblock_search_pfn_nid, kernel.arch.page_shift
    known = kernel.reserve_mem.regions
    return [(start, size, nid_of(start >> shift)[0]) for _, start, size in known]


def _scratch_nodes(kernel: Kernel) -> list[int]:
    nodes = kernel.memory_nodes()
    if kernel.release.scratch_skips_memoryless:
        return nodes
    # for_each_online_node, until 427b2535f513 ("kho: skip memoryless NUMA nodes ...") in 6.19.
    return sorted({*nodes, *kernel.hardware.memory_map.online_nodes})


def kho_init(kernel: Kernel) -> int:
    """``kho_init``: set up the outgoing side; on failure KHO goes off and scratch is freed."""
    kernel.phase = "kho_init"
    if not kernel.kho_enable:
        return 0
    error = _kho_init(kernel)
    if kernel.trace is not None:
        kernel.emit("kho_init", {}, error)
    return error


def _kho_init(kernel: Kernel) -> int:
    out = kernel.kho_out
    incoming = kernel.kho_in.fdt()
    if kernel.release.finalize == "notifiers":
        return _kho_init_late(kernel, incoming)
    error = out.tree.init_tree()
    if error:
        return _kho_init_failed(kernel, error)
    try:
        fdt_folio = out.alloc_preserve(kernel.arch.page_size)
    except KernelError as refused:
        out.tree.destroy()
        return _kho_init_failed(kernel, -refused.errno)
    out.fdt_phys = fdt_folio.phys
    error = _debugfs_init(kernel) or out.fdt_setup()
    if not error and kernel.release.kexec_metadata:
        # kho_kexec_metadata_init
        if incoming is not None:
            kernel.kho_in.kexec_metadata()
        if incoming is None or kernel.release.kexec_metadata_on_kho_boot:
            error = out.kexec_metadata(kernel.kho_in.kexec_count + 1)
        if error:
            kernel.printk(f"KHO: failed to initialize kexec-metadata subtree: {error}")
    if error:
        out.unpreserve_free(fdt_folio)
        out.tree.destroy()
        return _kho_init_failed(kernel, error)
    if incoming is not None:
        kernel.debugfs.in_init(incoming)
        if not kernel.release.fix_debugfs_out:
            return 0
    else:
        _free_scratch(kernel)
    size = kernel.fdt_totalsize(out.fdt_phys)
    kernel.debugfs.blob_add("out", "fdt", out.fdt_phys, size, root=True)
    return 0


def _kho_init_late(kernel: Kernel, incoming: memoryview | None) -> int:
    # kho_init @ 6.16 to 6.18: the root FDT's page is there, and not even cleared.
    pfn = kernel.pages.alloc_pages(0, "kho_init")
    if pfn is None:
        return _kho_init_failed(kernel, -errno.ENOMEM)
    kernel.kho_out.fdt_phys = pfn << kernel.arch.page_shift
    error = _debugfs_init(kernel)
    if error:
        kernel.pages.free_pages(pfn, 0)
        return _kho_init_failed(kernel, error)
    if incoming is not None:
        kernel.debugfs.in_init(incoming)
    else:
        _free_scratch(kernel)
    return 0


def _debugfs_init(kernel: Kernel) -> int:
    error = kernel.debugfs.open()
    return 0 if kernel.release.fix_debugfs_refused else error


def _free_scratch(kernel: Kernel) -> None:
    # init_cma_reserved_pageblock for all of each area, and for what lies behind its end up to the
    # end of a pageblock.
    shift = kernel.arch.page_shift
    block = 1 << kernel.arch.pageblock_order
    for addr, size in scratch_areas(kernel):
        nr_pages = -(-(size >> shift) // block) * block
        kernel.pages.init_cma_reserved(addr >> shift, (addr >> shift) + nr_pages)


def _kho_init_failed(kernel: Kernel, error: int) -> int:
    kernel.kho_out.fdt_phys = 0
    is_free = kernel.release.fix_kho_init_failure and kernel.is_kho_boot
    for addr, size in [] if is_free else scratch_areas(kernel):
        # Reserved or not, each page is forced into the buddy.
        kernel.free_reserved_area(addr, addr + size, "")
    kernel.kho_enable = False
    return error


def kho_fill_kimage(kernel: Kernel, image: Kimage) -> None:
    """``kho_fill_kimage``: give a (not crash) image the FDT's address and the scratch array."""
    release = kernel.release
    if not kernel.kho_enable or (image.is_crash and not release.fill_crash_image):
        return
    if release.fill_kimage == "finalized" and not kernel.kho_out.finalized:
        return
    image.kho_fdt = kernel.kho_out.fdt_phys
    size = kernel.kho_scratch_cnt * 16
    data = kernel.ram.read(kernel.kho_scratch_phys, size)
    image.kho_scratch = image.add_buffer(
        data, name="KHO scratch array", memsz=size, align=64 << 10, top_down=True
    )


def kho_locate_mem_hole(
    kernel: Kernel, image: Kimage, kbuf: KexecBuf, fits: Callable[[int, int, KexecBuf], bool]
) -> bool:
    """``kho_locate_mem_hole``: place ``kbuf`` in scratch; False to use the generic code.

    Raises -EADDRNOTAVAIL when it fits into none of the areas.
    """
    if not kernel.kho_enable or image.is_crash:
        return False
    for addr, size in scratch_areas(kernel):
        if fits(addr, addr + size, kbuf):
            return True
    raise KernelError(
        errno.EADDRNOTAVAIL, "kho_locate_mem_hole", f"{kbuf.name} fits into no scratch area"
    )
