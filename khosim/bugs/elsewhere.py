"""Bugs of the catalogue that a simulator of memory and protocol cannot show, and why not."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ("ELSEWHERE", "Elsewhere")


class Elsewhere(NamedTuple):
    """A bug without an exhibit: ``why`` is the sentence that readers get."""

    id: str
    name: str
    subject: str
    commit: str
    why: str


ELSEWHERE: tuple[Elsewhere, ...] = (
    Elsewhere(
        "A2",
        "order-xarray-uninit",
        "kho: init new_physxa->phys_bits to fix lockdep",
        "",
        "only the lock checker noticed that a lock had no class; memory and protocol were right",
    ),
    Elsewhere(
        "A19",
        "kmemleak-scratch",
        "KHO: fix boot failure due to kmemleak access to non-PRESENT pages",
        "40cd0e8dd283",
        "it takes kmemleak scanning memory that debug_pagealloc has unmapped; khosim has no page "
        "tables for the kernel itself",
    ),
    Elsewhere(
        "A20",
        "alloc-tags",
        "kho: init alloc tags when restoring pages from reserved memory",
        "",
        "allocation tags are a profiler's notes about pages, which khosim does not keep",
    ),
    Elsewhere(
        "A22",
        "nr-pages-32bit",
        "kho: use unsigned long for nr_pages",
        "840fe43d371f",
        "the shortest range that it cuts off has 16 TiB, and khosim's machines end there; on "
        "a real one such a range also holds a block of order 31, for which the loop over "
        "blocks computes 1 << 31 in an int and does not get on",
    ),
    Elsewhere(
        "A23",
        "populate-missing-unmap",
        "kho: fix missing early_memunmap() call in kho_populate()",
        "34df6c4734db",
        "an early mapping was leaked on an error path: no byte of memory and no later step differs",
    ),
    Elsewhere(
        "A24",
        "populate-warn",
        "kho: remove unnecessary WARN_ON(err) in kho_populate()",
        "f7a553b813f8",
        "a message too many, and nothing else",
    ),
    Elsewhere(
        "A31",
        "kasan-restored-vmalloc",
        "kho: fix KASAN support for restored vmalloc regions",
        "019fc3687237",
        "KASAN's shadow of restored areas was not set up; khosim has no KASAN",
    ),
    Elsewhere(
        "B5",
        "scratch-max-order-align",
        "kho: align kho_scratch to MAX_ORDER_NR_PAGES pages",
        "797fe91e50d6",
        "merging free blocks looked at struct pages that were not set up yet; whether that "
        "does harm depends on what their memory held, and khosim's hold zeros, which do none",
    ),
    Elsewhere(
        "B12",
        "late-memblock-free",
        "memblock: don't touch memblock arrays when memblock_free() is called late",
        "",
        "it edits memblock's own arrays after their memory was freed; khosim keeps them as "
        "lists outside of RAM, and no link to KHO is known",
    ),
    Elsewhere(
        "D2",
        "ioctl-bound",
        "liveupdate: luo_core: fix redundant bound check in luo_ioctl()",
        "bf2c7bf5c483",
        "a check that could never fail was taken out; behaviour is the same",
    ),
    Elsewhere(
        "D3",
        "shmem-dependency",
        "liveupdate: add missing CONFIG_SHMEM dependency for memfd_luo",
        "601cc399a010",
        "a kernel without shmem did not build",
    ),
    Elsewhere(
        "D9",
        "flb-lazy-init-race",
        "liveupdate: initialise incoming FLB state before it is used",
        "38fb71ace230",
        "it takes two CPUs in the same function; khosim's kernels have one thread",
    ),
    Elsewhere(
        "D10",
        "handler-list-race",
        "liveupdate: protect file handler list with rwsem",
        "9e1e18584548",
        "it takes two CPUs in the same list; khosim's kernels have one thread",
    ),
    Elsewhere(
        "D11",
        "flb-list-race",
        "liveupdate: protect FLB lists with rwsem",
        "6b2b22f7c8cf",
        "it takes two CPUs in the same list; khosim's kernels have one thread",
    ),
    Elsewhere(
        "D26",
        "count-type",
        "liveupdate: change file_set->count type to u64",
        "81fbb909ec07",
        "a long became a u64: on 64-bit machines, the only ones with KHO, both hold every count "
        "there can be, and compare alike",
    ),
    Elsewhere(
        "E4",
        "isize-write",
        "mm/memfd_luo: use i_size_write()",
        "",
        "it takes a reader on another CPU that sees half of a 64-bit store",
    ),
    Elsewhere(
        "E6",
        "cache-entry-left",
        "mm/memfd_luo: remove folio from page cache when accounting fails",
        "",
        "the page cache has a reference of its own, and the file that the folio was left in is "
        "closed at once and frees it: nothing differs afterwards",
    ),
    Elsewhere(
        "E10",
        "seal-write-mappings",
        "memfd: deny writeable mappings when implying SEAL_WRITE",
        "73f496662a98",
        "it is about memory mappings of a process, which khosim does not have",
    ),
    Elsewhere(
        "E11",
        "recalc-memset-cleanups",
        "mm/memfd_luo: clean-ups of the same series",
        "",
        "no user could notice",
    ),
)
