"""A kernel release as data: what it can do, how it does it, which bugs are still in.

Code asks a :class:`Release` for a behaviour by its name; nothing compares version numbers. The
defaults are those of 7.3, so that a release is what differs from it; the releases themselves are in
:mod:`khosim.kernel.release`. A release travels in the bytes of its kernel image: every value is a
string, a number, a flag or a tuple of strings.

Facts from ``kernel/liveupdate/kexec_handover.c`` (``kernel/kexec_handover.c`` before 6.19),
``mm/memblock.c`` and the headers under ``include/linux/kho/abi`` @ 6.16 to 7.3.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from khosim.errors import InputError, KhoSimError
from khosim.plugins import is_plugin

__all__ = ("CHOICES", "TRACKERS", "Release")

_FUNCTIONS = (
    "kho_preserve_folio",
    "kho_unpreserve_folio",
    "kho_preserve_pages",
    "kho_unpreserve_pages",
    "kho_preserve_vmalloc",
    "kho_unpreserve_vmalloc",
    "kho_alloc_preserve",
    "kho_unpreserve_free",
    "kho_add_subtree",
    "kho_remove_subtree",
    "kho_retrieve_subtree",
    "kho_restore_folio",
    "kho_restore_pages",
    "kho_restore_vmalloc",
    "kho_restore_free",
)

TRACKERS = ("radix", "chunks")
"""The trackers that khosim has; see :attr:`Release.tracker`."""
CHOICES: dict[str, tuple[object, ...]] = {
    "finalize": ("", "notifiers", "refresh"),
    "fill_kimage": ("enabled", "finalized"),
    "kho_init_level": ("fs", "late"),
    "unpreserve_missing": ("continue", "return", "loop"),
    "nr_pages_bits": (32, 64),
    "scratch_alignment": ("max-order", "pageblock"),
    "scratch_failure_told": ("which", "that", "nothing"),
    "dname_max_bytes": (64, 255),
    "luo": ("", "luo-v1", "luo-v5"),
    "memfd": ("", "memfd-v1", "memfd-v2"),
}
"""The values of those behaviours that are more than on or off."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One kernel release, as the set of its handover behaviours.

    ``name`` is what users say (``"7.3"``), ``uname`` what the kernel calls itself
    (``init_uts_ns.name.release``) and hands on in kexec-metadata.
    """

    name: str
    uname: str

    # -- the handover's bytes ------------------------------------------------------------------

    kho_compatible: str = "kho-v4"
    """``KHO_FDT_COMPATIBLE``."""
    tracker: str = "radix"
    """The preserved-memory map: "radix", "chunks", or ``FILE.py:CLASS`` of a designer's own."""
    decoder: str = ""
    """The checkers' reader of a designer's map, ``FILE.py:FUNCTION``; "" for the built-in ones."""
    bitmap_bytes: int = 0
    """Chunks: bytes of one bitmap (``PRESERVE_BITS / 8``); 0 is one page."""
    metadata_from_slab: bool = False
    """Chunks and bitmaps are kzalloc'd, not whole pages of the buddy allocator."""
    metadata_kfreed: bool = False
    """Chunks are given to kfree, wherever they are from (b15515155af7)."""
    tree_root_from_slab: bool = False
    """The radix tree's root table is kzalloc'd."""
    tree_depth_ignores_order_bit: bool = False
    """``KHO_TREE_MAX_DEPTH`` forgets the order bit: one level too few with 16 KiB pages."""
    radix_key_width_checked: bool = True
    """Keys that no tree is deep enough for are -ERANGE; else their upper bits are lost."""
    memory_map_prop: str = "preserved-memory-map"
    subtree_phys_prop: str = "preserved-data"
    subtree_size_prop: str = "blob-size"
    """"" where blobs are device trees, which tell their size themselves."""
    kexec_metadata: bool = True
    """The kernel writes and reads the kexec-metadata subtree."""
    kexec_metadata_on_kho_boot: bool = True
    """It writes it when it has taken a handover over, too; else on cold boots only (76aa46b9e404,
    before it was merged)."""

    # -- the outgoing side ---------------------------------------------------------------------

    functions: tuple[str, ...] = _FUNCTIONS
    """The calls that KHO offers to its users."""
    finalize: str = ""
    """"notifiers": the root FDT is made when user space says so; "refresh": only the map; "":
    there is nothing to finalize."""
    busy_when_finalized: bool = False
    """Preserving is -EBUSY while finalized."""
    abort_unpreserves: bool = False
    """An abort forgets all that was ever preserved."""
    fill_kimage: str = "enabled"
    """Which images get the handover: of an "enabled" or only of a "finalized" KHO."""
    fill_crash_image: bool = False
    """Crash images get it as well."""
    kho_init_level: str = "fs"
    """The initcall: "fs" or "late"."""
    reserve_mem_in_notifier: bool = False
    """reserve_mem preserves its regions when the handover is finalized, not at late_initcall."""
    reserve_mem_unwinds: bool = True
    """What reserve_mem preserved is unpreserved when its preparation fails."""
    add_subtree_unwinds: bool = True
    """A full root FDT is -ENOMEM and keeps no half node; else libfdt's code and the node."""
    preserve_splits_at_nodes: bool = True
    """``__kho_preserve_pages_order``: a block's first and last page share a node."""
    unpreserve_splits_at_nodes: bool = True
    """``kho_unpreserve_pages`` computes the same blocks."""
    unpreserve_missing: str = "continue"
    """At a block never preserved: "continue" with the next, "return", or "loop" forever."""
    nr_pages_bits: int = 64
    """Width of the page counts in KHO's calls."""
    scratch_overlap_checked: bool = True
    """With ``CONFIG_KEXEC_HANDOVER_DEBUG`` nothing may be preserved in scratch."""
    vmalloc_chunk_bounded: bool = True
    """Loops over a vmalloc chunk end with the page, not only at an empty entry."""
    vmalloc_unpreserves_blocks: bool = True
    """Unpreserving a vmalloc area forgets whole blocks, not the first page of each."""
    vmalloc_enomem_told: bool = True
    """``kho_preserve_vmalloc`` fails where there is no page for a further chunk."""
    vmalloc_fills_pages: bool = True
    """A restored area of huge blocks maps each page, not the first of each block repeatedly."""

    # -- the incoming side ---------------------------------------------------------------------

    empty_map_accepted: bool = False
    """A root FDT without preserved-memory map still makes a KHO boot."""
    restores_root_fdt: bool = False
    """``kho_memory_init`` restores the predecessor's root FDT at once."""
    page_magic: bool = True
    """``page->private`` of preserved pages bears a magic, which restoring checks."""
    restore_clears_private: bool = True
    """A restored page cannot be restored again."""
    restore_inits_refcounts: bool = True
    """Restoring sets the reference counts of all pages and counts them as managed."""
    restore_pages_compound: bool = False
    """``kho_restore_pages`` leaves each block a compound page."""
    restore_order_cap: bool = False
    """Blocks above ``MAX_PAGE_ORDER`` cannot be restored."""
    reserve_size_is_int: bool = False
    """The size of a block is computed in 32 bits when it is reserved."""
    revival_errno_told: bool = False
    """"disabling KHO revival" comes with the error's number."""
    skip_init_told: bool = False
    """"found kexec handover data" promises to skip the initialisation of devices."""
    preserved_pages_initialised: bool = True
    """Preserved blocks get their struct pages where initialisation is deferred, which leaves them
    out (c6073743d0c7)."""
    deferred_struct_pages: bool = True
    """``CONFIG_DEFERRED_STRUCT_PAGE_INIT`` can be, and is, on."""
    kdump_guard: bool = True
    """A kdump kernel turns KHO off instead of reserving scratch."""

    # -- scratch -------------------------------------------------------------------------------

    scratch_alignment: str = "max-order"
    """Scratch areas are aligned to the largest buddy block, or to a "pageblock" (CMA)."""
    scratch_explicit_rounded: bool = True
    """Sizes given with ``kho_scratch=`` are rounded up as well."""
    scratch_rounds_first: bool = False
    """The global area is what remains after lowmem was rounded up."""
    scratch_stays_cma: bool = True
    """Pageblocks of scratch are CMA also where struct pages are initialised late (bf480c613346)."""
    efi_keeps_scratch: bool = True
    """arm64: EFI's memory map does not replace the scratch areas in memblock (d6d511639185)."""
    scratch_arg_zeros: bool = True
    """``kho_scratch=``: one or two of the sizes may be zero."""
    scratch_arg_consumed: bool = True
    """``kho_scratch=``: what follows the three sizes is an error."""
    scratch_skips_memoryless: bool = True
    """Nodes without memory get no scratch; else they turn KHO off."""
    scratch_failure_told: str = "which"
    """When scratch cannot be had: say "which" area, only "that", or "nothing"."""
    scratch_excludes_hugetlb: bool = True
    """Boot-time huge pages do not count when scratch is sized."""
    hugetlb_outside_scratch: bool = True
    """``memblock_alloc_hugetlb``: boot-time huge pages never lie in scratch."""
    scratch_extension: bool = True
    """``kho_extend_scratch``: early boot may use every 1 GiB block free of preserved memory."""

    # -- lib/test_kho.c ------------------------------------------------------------------------

    test_kho_checks_enabled: bool = True
    """The test module does nothing where KHO is off (a26ec8f3d4e5)."""
    test_kho_unwinds: bool = True
    """It unpreserves what it preserved when something fails (ce405ed51020)."""

    # -- debugfs -------------------------------------------------------------------------------

    debugfs_sizes_by_totalsize: bool = False
    """Sizes of incoming blobs are read from them, as if all were device trees (062dd306d99c)."""

    # -- around it -----------------------------------------------------------------------------

    dname_max_bytes: int = 255
    """The longest name that ``/proc/PID/fd`` tells of an anonymous file, with its NUL."""

    # -- live updates --------------------------------------------------------------------------

    luo: str = "luo-v5"
    """Format of the Live Update Orchestrator's subtree; "" without."""
    luo_flb: bool = True
    """File-lifecycle-bound data has a place in it, which the successor insists on."""
    luo_flb_insisted: bool = True
    """A predecessor without that place, under the same name, is refused (cab056f2aae7)."""
    luo_checks_names: bool = True
    """A session's name is 1 to 63 bytes; else it may be empty, and is cut."""
    luo_checks_session_type: bool = True
    """Calls for sessions of the predecessor are refused on own ones, and the other way round."""
    luo_checks_reserved: bool = True
    """``SESSION_FINISH`` wants its reserved field to be zero."""
    luo_get_name: bool = True
    """There is ``LIVEUPDATE_SESSION_GET_NAME``."""
    luo_one_owner: bool = True
    """A file can be preserved once only."""
    luo_remembers_retrieve: bool = True
    """A ``retrieve`` that failed is not tried again."""
    luo_checks_token: bool = True
    """Behind the last file a token is unknown; else the list's head is taken for a file, and the
    word behind it, the address of the files' array, for its token (b2135d1cb0e3)."""
    luo_bounds_strings: bool = True
    """Text of the predecessor's ends with its field in messages (277f4e5e398b)."""
    luo_remembers_deserialize: bool = True
    """No memory for a session of the predecessor's: the device never opens, not just once."""
    luo_retrieve_holds_list: bool = True
    """No session goes away while somebody is retrieving it (d3ae9e7fddb4)."""
    luo_pins_modules: bool = False
    """Registering a handler or an object holds its module until it is unregistered, besides what
    each file holds (76be9983df33)."""
    luo_puts_module_last: bool = True
    """A handler's module is held until nobody asks it for a file's id (291dcd37c8c8)."""
    luo_get_name_sized: bool = True
    """``LIVEUPDATE_SESSION_GET_NAME`` has room for a name; else it is checked as the structure of
    ``RETRIEVE_FD`` (4416f8a9ed5f)."""
    luo_flb_counts_incoming: bool = True
    """Who gets a predecessor's object keeps it from being finished (d8e47bd066d7)."""
    luo_flb_counts_outgoing: bool = True
    """Who gets an object for the successor keeps it from being unpreserved (36882f339239)."""
    luo_flb_remembers_retrieve: bool = True
    """An object's ``retrieve`` that failed is not tried again (5c4a03afcb21)."""
    luo_unfreeze_keeps_handle: bool = True
    """A file keeps its serialized data when a reboot fails."""
    luo_skips_preserve_context: bool = True
    """A kexec that comes back serializes nothing."""
    luo_blocks_mutations: bool = True
    """From the serialization on, nobody can change a session."""
    memfd: str = "memfd-v2"
    """Format of preserved memfds; "" without."""
    memfd_id_is_inode: bool = True
    """Two open files of one memfd are one for ``luo_one_owner``."""
    memfd_makes_data: bool = True
    """Preserved folios become up to date and dirty; else they cross as they are."""
    memfd_checks_count: bool = True
    """Files of 2**32 pages and more are -EFBIG; else only a first part of them is preserved."""
    memfd_accounts_pages: bool = True
    """A retrieved folio counts as all of its pages, not as one."""
    memfd_puts_by_address: bool = True
    """After a failed ``retrieve`` the other folios are freed; else their pfns pass as addresses."""
    memfd_frees_header: bool = True
    """A ``retrieve`` that fails frees the record of the file."""
    memfd_tells_midloop: bool = True
    """A folio that cannot be restored makes ``retrieve`` fail, also behind others that could."""

    # -- what no release does yet: hazards of 7.3, each gone with its switch ---------------------

    fix_region_in_scratch: bool = False
    """``reserve_mem``: no new region on a handover boot, where it would come from scratch."""
    fix_region_release: bool = False
    """``reserve_mem_release_by_name`` unpreserves the region and takes it out of the subtree."""
    fix_region_tail: bool = False
    """``reserve_mem``: sizes are rounded up to whole pages, which are what is preserved."""
    fix_region_unclaimed: bool = False
    """Regions of the predecessor that nobody names any more are freed."""
    fix_kho_init_failure: bool = False
    """``kho_init``: a failure on a handover boot leaves scratch alone, which is free already."""
    fix_luo_without_kho: bool = False
    """``luo_late_startup`` asks again whether KHO is on."""
    fix_kho_off: bool = False
    """``kho=off`` takes no handover over."""
    fix_mem_limit: bool = False
    """``mem=`` is ignored on a handover boot (x86-64)."""
    fix_memtest: bool = False
    """``early_memtest`` tests scratch alone on a handover boot."""
    fix_corruption_check: bool = False
    """``setup_bios_corruption_check`` sets nothing aside on a handover boot."""
    fix_debugfs_refused: bool = False
    """``kho_init`` goes on without its files where debugfs has none."""
    fix_cma_fixed: bool = False
    """``cma_fixed_reserve``: an area with a place of its own is in scratch on a handover boot."""
    fix_vmalloc_count: bool = False
    """``kho_restore_vmalloc`` counts the pages of its area (``NR_VMALLOC``)."""
    fix_crash_kernel: bool = False
    """On a handover boot memory for a crash kernel is set aside behind ``kho_mem_retrieve``."""
    fix_elfcorehdr: bool = False
    """A handover outweighs ``elfcorehdr=``: whoever was handed memory is no kdump kernel."""
    fix_scratch_failure: bool = False
    """``kho_reserve_scratch`` forgets its areas when it fails."""
    fix_huge_pages: bool = False
    """Huge pages from the buddy allocator are not movable, so that none lies in scratch."""
    fix_vmalloc_unwind: bool = False
    """``kho_preserve_vmalloc`` writes the descriptor's order before it preserves blocks."""
    fix_vmalloc_order: bool = False
    """A restored vmalloc area has the order that it had before."""
    fix_session_name: bool = False
    """``luo_session_insert`` looks at the name before it makes room."""
    fix_flb_finish: bool = False
    """A file that is finished retrieves the shared object that it counts for."""
    fix_flb_reference: bool = False
    """``liveupdate_reboot`` is -EBUSY while somebody holds a reference to a shared object."""
    fix_luo_retrieve: bool = False
    """``luo_retrieve_file`` makes sure of the place in the list of owned files first."""
    fix_memfd_behind_end: bool = False
    """``memfd_luo_preserve`` frees folios behind the end of the file, for its owner to see."""
    fix_memfd_seals: bool = False
    """``memfd_luo_freeze`` writes the seals again."""
    fix_memfd_mode: bool = False
    """``memfd_luo_retrieve``: a memfd with ``F_SEAL_EXEC`` is not executable."""
    fix_memfd_leak: bool = False
    """``memfd_luo_finish`` and ``_retrieve`` free the folios also where they lack memory."""
    fix_vmalloc_restore: bool = False
    """``kho_restore_vmalloc`` takes all memory that it needs before it restores anything."""
    fix_restore_nodes: bool = False
    """``kho_restore_pages`` splits its range at nodes, as ``kho_preserve_pages`` does."""
    fix_preserve_twice: bool = False
    """Preserving what is preserved already is -EEXIST."""
    fix_subtree_name: bool = False
    """``kho_add_subtree``: no name with an ``@``, which libfdt also finds without what follows."""
    fix_subtree_debugfs: bool = False
    """``kho_add_subtree`` does not warn where debugfs cannot have a file of that name."""
    fix_region_name: bool = False
    """``reserve_mem``: no name with an ``@``; see ``fix_subtree_name``."""
    fix_debugfs_out: bool = False
    """``out/fdt`` is there after a handover, too, and is as long as the tree is now."""
    fix_debugfs_in: bool = False
    """A file below ``in`` is gone when its blob is restored."""
    fix_luo_off: bool = False
    """With ``liveupdate=off`` the predecessor's sessions are finished at once."""
    fix_session_release: bool = False
    """A session that could not be finished when it was closed can be retrieved again."""
    fix_session_fault: bool = False
    """A session whose descriptor cannot be told to user space is not finished."""
    fix_flb_retrieve: bool = False
    """``liveupdate_flb_put_incoming`` does not warn of an object whose ``retrieve`` failed."""
    fix_flb_unknown: bool = False
    """A file that is finished leaves objects alone that the predecessor did not have."""
    fix_scratch_zero: bool = False
    """``kho_scratch=0%`` is refused, as sizes of zero are."""
    fix_scratch_scale: bool = False
    """``scratch_size_update``: ``reserve_mem`` regions do not count, as huge pages do not."""
    fix_scratch_small: bool = False
    """``kho_scratch=`` sizes below those that the scale gives are raised to them."""
    fix_preserve_overlap: bool = False
    """Preserving a page that is part of a preserved block of another order is -EEXIST."""
    fix_preserve_in_scratch: bool = False
    """``kho_preserve_folio`` of a folio in scratch is -EINVAL, not in debug kernels only."""
    fix_preserve_fault: bool = False
    """A file whose ``PRESERVE_FD`` cannot be answered is not preserved."""
    fix_subtree_empty: bool = False
    """``kho_add_subtree``: a name is not empty."""
    fix_flb_late: bool = False
    """``liveupdate_register_flb`` is -EBUSY while files of the handler are preserved."""
    fix_handler_late: bool = False
    """``/dev/liveupdate`` can be opened again where a handler was not there the first time."""
    fix_flb_handler: bool = False
    """``liveupdate_register_flb`` is -EINVAL for a handler that is not registered."""
    fix_flb_reload: bool = False
    """``luo_flb_retrieve_one``: a module that is loaded again finds no object that it had found."""
    fix_ioctl_number: bool = False
    """``luo_ioctl`` and ``luo_session_ioctl`` are -ENOTTY for a number that they do not know."""
    fix_ioctl_compat: bool = False
    """``luo_fops`` and ``luo_session_fops`` have ``compat_ioctl``, for programs of 32 bits."""
    fix_finish_fault: bool = False
    """``luo_session_finish`` has nothing to tell, and writes no answer."""
    fix_memfd_size: bool = False
    """``memfd_luo_preserve``: -EFBIG for a file whose folios no array has room for."""
    fix_memfd_reader: bool = False
    """``memfd_luo_preserve``: -EOPNOTSUPP for a file that is open for reading only."""
    fix_memfd_name: bool = False
    """``memfd_luo_retrieve``: a memfd is called one in ``/proc/PID/fd``."""
    fix_memfd_poison: bool = False
    """``memfd_luo_preserve`` and ``_freeze``: -EBUSY for a file with a poisoned page."""
    fix_memfd_holes: bool = False
    """Holes that ``memfd_luo_preserve`` filled are holes again when it fails or is called off."""

    def evolve(self, **changes: Any) -> Release:
        """This release with some behaviours changed.

        Raises :class:`InputError` for a behaviour or a value that there is not.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        for name, value in changes.items():
            place = f"release {self.name}"
            if name not in fields:
                raise InputError(place, f"there is no behaviour named {name!r}")
            kind = type(getattr(self, name))
            if type(value) is not kind:
                raise InputError(place, f"{name}={value!r}: not a {kind.__name__}")
            choices = CHOICES.get(name)
            if choices is not None and value not in choices:
                raise InputError(place, f"{name}={value}: not one of {_told(choices)}")
        evolved = dataclasses.replace(self, **changes)
        if evolved.tracker not in TRACKERS and not is_plugin(evolved.tracker):
            cause = f"tracker={evolved.tracker}: not one of {_told(TRACKERS)}, nor FILE.py:CLASS"
            raise InputError(f"release {self.name}", cause)
        if evolved.finalize and evolved.tracker != "chunks":
            cause = f"finalize={evolved.finalize}: only tracker=chunks has something to finalize"
            raise InputError(f"release {self.name}", cause)
        if evolved.bitmap_bytes & 7:
            raise InputError(f"release {self.name}", "bitmap_bytes: not whole words of 8 bytes")
        return evolved

    def require(self, function: str) -> None:
        """Raise :class:`KhoSimError` where this release's KHO has no such function."""
        if function not in self.functions:
            raise KhoSimError(f"Linux {self.name} has no {function}")

    def has(self, function: str) -> bool:
        """Whether this release's KHO offers ``function`` to its users."""
        return function in self.functions


def _told(choices: tuple[object, ...]) -> str:
    return ", ".join(str(choice) or '""' for choice in choices)
