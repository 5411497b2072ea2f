"""The costs that hold where nobody gives others, and where each comes from.

"Published" is a figure that somebody measured and wrote down; it holds for that machine. "Derived"
is arithmetic on one. "Assumption" is a guess of the right size, for want of a figure.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ("BY_HANDLER", "COSTS", "HOST", "Default")


class Default(NamedTuple):
    """A value, what it is for each of, and its source."""

    value: float
    each: str
    source: str


_48G = "12,582,912 pages of 48 GiB (Yadav, 3 April 2025, KHO v5 09/16: taken to be order 0)"
_TATASHIN = "(Tatashin, 2019, arm64 MMU enabled kexec relocation: 25 MB of kernel and initramfs)"
_JORDAN = "(Jordan, 2020, padata deferred init v3 6/8: 384 GiB a node, Xeon 8167M)"
_WOODHOUSE = "(Woodhouse, 2022, parallel bringup v4: 96 threads of two Skylake sockets)"

HOST: dict[str, Default] = {
    "cpus": Default(64, "CPUs of the host", "assumption"),
    "deferred_threads_max": Default(
        11,
        "threads a node beyond which deferred struct page init gets no faster",
        f"derived: 1785.7 ms with one thread, 157.0 ms with 13, no less with more {_JORDAN}",
    ),
}

COSTS: dict[str, Default] = {
    "preserve_key_radix_ns": Default(
        37.3,
        "block marked in a radix tree (7.1 and later)",
        f"derived: published 469 ms for a table of bitmaps, an ancestor of today's, over {_48G}",
    ),
    "preserve_key_xarray_ns": Default(
        45.8,
        "block marked in xarrays of bitmaps (to 7.0)",
        f"derived: published 577 ms for marking and serialising, over {_48G}; less 0.9 ms for "
        "serialising at serialize_bitmap_ns: the message does not split the two",
    ),
    "serialize_bitmap_ns": Default(
        300, "bitmap listed by kho_finalize (to 7.0)", "assumption: an xarray step and 16 bytes"
    ),
    "preserve_memfd_folio_ns": Default(
        100, "folio of a memfd pinned and written down", "assumption: a pin and a 16-byte record"
    ),
    "create_session_us": Default(10, "session created", "assumption: one system call, one file"),
    "load_mib_us": Default(
        2000, "MiB of image loaded", "assumption: reading it, and a SHA-256 at 500 MB/s"
    ),
    "serialize_session_us": Default(5, "session serialised", "assumption: an 80-byte record"),
    "shutdown_us": Default(
        32066, "jump: devices, other CPUs", f"published: kernel shutdown 0.032 s {_TATASHIN}"
    ),
    "relocate_mib_us": Default(
        886, "MiB of image copied into place", f"derived: published 22.158 ms {_TATASHIN}"
    ),
    "decompress_mib_us": Default(
        4000, "MiB of kernel image unpacked", "assumption: zstd, 1 GB/s of output at 1 to 4"
    ),
    "unpack_initrd_mib_us": Default(
        3000, "MiB of initrd unpacked", "assumption: zstd, and files made of it"
    ),
    "kernel_start_us": Default(
        296056,
        "boot: all that is not counted otherwise",
        f"published: kernel startup 0.296 s {_TATASHIN}; holds that machine's own memory and "
        "CPUs as well, which are therefore counted twice",
    ),
    "cpu_bringup_us": Default(
        1042, "CPU started", f"derived: published 100 ms for all CPUs in parallel {_WOODHOUSE}"
    ),
    "walk_table_ns": Default(
        1000, "page of the preserved-memory map read", "assumption: 4 KiB that no cache holds"
    ),
    "scan_key_ns": Default(
        10, "block looked at to extend scratch (7.3)", "assumption: a key of a walked leaf"
    ),
    "reserve_block_ns": Default(
        60,
        "preserved block reserved at boot",
        "assumption: memblock_reserve and a mark that finds its region at once",
    ),
    "reserve_scan_ns": Default(
        2,
        "region passed to find a block's place in memblock",
        "assumption: memblock_reserve and memblock_reserved_mark_noinit each walk the array",
    ),
    "struct_page_ns": Default(
        17.7,
        "struct page initialised by the boot CPU",
        f"derived: published 1785.7 ms of deferred init with one thread a node {_JORDAN}",
    ),
    "deferred_struct_page_ns": Default(
        17.7, "struct page initialised by a thread of its node (7.2 and later)", "as struct_page_ns"
    ),
    "userspace_start_us": Default(
        500000, "boot: init, the agent, the processes of the guests", "assumption"
    ),
    "retrieve_session_us": Default(10, "session retrieved", "assumption: one system call"),
    "restore_block_ns": Default(50, "block restored", "assumption: a check, a head page, a count"),
    "restore_page_ns": Default(
        2, "page in a restored block", "assumption: a reference count in a cached struct page"
    ),
    "retrieve_memfd_folio_ns": Default(
        150, "folio put into a memfd's page cache", "assumption: a slot, a charge, an LRU list"
    ),
    "shared_object_us": Default(
        20,
        "object that files share preserved or retrieved (PCI, IOMMU, SEV-SNP)",
        "assumption: some pages of records; what they lead to is blocks",
    ),
    "scan_function_us": Default(
        100, "PCI function found at boot", "assumption: some 100 configuration reads of 1 us"
    ),
    "device_register_us": Default(
        1,
        "register of a PCI function or an IOMMU written",
        "assumption: an uncached write, and a read that orders it",
    ),
    "firmware_command_us": Default(
        500, "command to the secure processor", "assumption: a mailbox and an interrupt"
    ),
    "resume_session_us": Default(
        20000, "session whose guest resumes", "assumption: a VM made again, mapped and started"
    ),
}
"""In the order of a live update."""

_FLR = (
    "derived: drivers/pci/pci.c:pcie_flr @ 7.3 waits 100 ms, for which a device may be silent "
    "(PCIe base 6.6.2); the first phase of VFIO's series resets it here"
)
_AT_WORK = "assumption: the device goes on, and is not asked"
_TABLES = "assumption: a record; its page tables are blocks"
_VCPU = "assumption: registers, MSRs and extended state by ioctl"
_NO_DEVICE = "assumption: no device"


def _by_handler(
    each: str, default: tuple[float, str], **own: tuple[float, str]
) -> dict[str, Default]:
    # ``own`` by a short name of each handler; memfds of both versions cost the same.
    names = {
        "memfd": ("memfd-v1", "memfd-v2"),
        "iommufd": ("iommufd-v1",),
        "vfio_reset": ("vfio-pci-v1",),
        "vfio": ("vfio-pci-v1-running",),
        "vm": ("kvm_vm_luo_v1",),
        "vcpu": ("kvm_vcpu_luo_v1",),
    }
    found = {"default": Default(default[0], each, default[1])}
    for short, (value, source) in own.items():
        found |= {name: Default(value, each, source) for name in names[short]}
    return found


BY_HANDLER: dict[str, dict[str, Default]] = {
    "preserve_file_us": _by_handler(
        "file preserved",
        (20, "assumption: some state saved"),
        memfd=(5, _NO_DEVICE),
        iommufd=(5, _TABLES),
        vfio_reset=(20, "assumption: some state saved"),
        vfio=(20, "assumption: some state saved"),
        vm=(5, _NO_DEVICE),
        vcpu=(5, "assumption: room for its state"),
    ),
    "freeze_file_us": _by_handler(
        "file frozen",
        (20, "assumption: some registers read"),
        memfd=(1, _NO_DEVICE),
        iommufd=(1, _NO_DEVICE),
        vfio_reset=(100_000, _FLR),
        vfio=(1, _AT_WORK),
        vm=(1, _NO_DEVICE),
        vcpu=(50, f"{_VCPU}, once it was kicked out of the guest"),
    ),
    "probe_file_us": _by_handler(
        "file whose device is probed again at boot",
        (2000, "assumption: no reset, no firmware"),
        memfd=(0, _NO_DEVICE),
        iommufd=(0, _NO_DEVICE),
        vfio_reset=(200, "assumption: vfio-pci takes it as it is, and asks nothing of it yet"),
        vfio=(200, "assumption: vfio-pci takes it as it is, and asks nothing of it"),
        vm=(0, _NO_DEVICE),
        vcpu=(0, _NO_DEVICE),
    ),
    "retrieve_file_us": _by_handler(
        "file retrieved",
        (100, "assumption: state put back"),
        memfd=(20, _NO_DEVICE),
        iommufd=(20, _TABLES),
        vfio_reset=(100_000, f"{_FLR}, and here once more"),
        vfio=(50, _AT_WORK),
        vm=(200, "assumption: a machine made, without its memory"),
        vcpu=(150, _VCPU),
    ),
}
"""By the ``compatible`` string of the file's handler; without what single folios cost."""
