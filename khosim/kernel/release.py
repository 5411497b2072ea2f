"""Kernel releases as data: what each one can do and how it does it.

Code asks a :class:`Release` for a capability by name; nothing compares version numbers. A designer
adds a release of their own with :meth:`Release.evolve`.

Facts from ``kernel/liveupdate/kexec_handover.c``, ``mm/memblock.c`` and the headers under
``include/linux/kho/abi`` @ 7.3.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from khosim.errors import InputError

__all__ = ("RELEASES", "Release", "find_release")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One kernel release, as the set of its handover behaviours.

    ``name`` is what users say (``"7.3"``), ``uname`` what the kernel calls itself
    (``init_uts_ns.name.release``) and hands on in kexec-metadata.
    """

    name: str
    uname: str
    kho_compatible: str
    """``KHO_FDT_COMPATIBLE``."""
    tracker: str
    """The preserved-memory map: ``"radix"``."""
    memory_map_prop: str = "preserved-memory-map"
    subtree_phys_prop: str = "preserved-data"
    subtree_size_prop: str = "blob-size"
    kexec_metadata: bool = True
    """The kernel writes and reads the kexec-metadata subtree."""
    scratch_extension: bool = True
    """``kho_extend_scratch``: early boot may use every 1 GiB block free of preserved memory."""
    scratch_excludes_hugetlb: bool = True
    """Boot-time huge pages do not count when scratch is sized."""
    scratch_alignment: str = "max-order"
    """Scratch areas are aligned to the largest buddy block, or to a "pageblock" (up to 7.1)."""
    scratch_rounds_first: bool = False
    """The global area is what remains after lowmem was rounded up (up to 7.1)."""
    scratch_explicit_rounded: bool = True
    """Lowmem and global sizes of ``kho_scratch=`` are rounded up as well (not before 7.2)."""
    hugetlb_outside_scratch: bool = True
    """``memblock_alloc_hugetlb``: boot-time huge pages never lie in scratch."""
    kdump_guard: bool = True
    """A kdump kernel turns KHO off instead of reserving scratch."""
    preserve_splits_at_nodes: bool = True
    """``__kho_preserve_pages_order``: a block's first and last page share a node."""

    luo: str = "luo-v5"
    """The format of the Live Update Orchestrator's state; empty where there is no LUO."""

    def evolve(self, **changes: Any) -> Release:
        """This release with some behaviours changed; unknown names raise :class:`InputError`."""
        fields = {field.name for field in dataclasses.fields(self)}
        for name in changes:
            if name not in fields:
                raise InputError(f"release {self.name}", f"there is no behaviour named {name!r}")
        return dataclasses.replace(self, **changes)


RELEASES: dict[str, Release] = {
    "7.3": Release(name="7.3", uname="7.3.4", kho_compatible="kho-v4", tracker="radix"),
}


def find_release(release: str | Release) -> Release:
    """The release called ``release`` (a :class:`Release` passes through)."""
    if isinstance(release, Release):
        return release
    found = RELEASES.get(release)
    if found is None:
        raise InputError("release", f"{release!r} is not one of {', '.join(sorted(RELEASES))}")
    return found
