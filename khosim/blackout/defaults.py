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
    "resume_session_us": Default(
        20000, "session whose guest resumes", "assumption: a VM made again, mapped and started"
    ),
}
"""In the order of a live update."""

_MEMFD = ("memfd-v1", "memfd-v2")


def _by_handler(value: float, each: str, source: str, memfd: float) -> dict[str, Default]:
    memory = {name: Default(memfd, each, "assumption: no device") for name in _MEMFD}
    return {"default": Default(value, each, source), **memory}


BY_HANDLER: dict[str, dict[str, Default]] = {
    "preserve_file_us": _by_handler(20, "file preserved", "assumption: some state saved", 5),
    "freeze_file_us": _by_handler(20, "file frozen", "assumption: some registers read", 1),
    "probe_file_us": _by_handler(
        2000, "file whose device is probed again at boot", "assumption: no reset, no firmware", 0
    ),
    "retrieve_file_us": _by_handler(100, "file retrieved", "assumption: state put back", 20),
}
"""By the ``compatible`` string of the file's handler; without what single folios cost."""
