"""The releases that had KHO, each as what differs from the next newer one.

Read from the newest to the oldest; ``docs/releases.md`` shows the same as a table, with the
evidence. A release of one's own is one of these with changes (:meth:`Release.evolve`), in a file or
in the name itself: ``7.3+restore_order_cap=on`` has that bug back.
"""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from khosim.errors import InputError
from khosim.kernel.behaviours import Release
from khosim.plugins import is_plugin, load_plugin

__all__ = ("MAINLINE", "RELEASES", "Release", "find_release", "option_release")

_V73 = Release(name="7.3", uname="7.3.4")

_V72 = _V73.evolve(
    name="7.2",
    uname="7.2.13",
    tree_root_from_slab=True,
    radix_key_width_checked=False,
    kdump_guard=False,
    scratch_excludes_hugetlb=False,
    hugetlb_outside_scratch=False,
    scratch_extension=False,
)

_V71 = _V72.evolve(
    name="7.1",
    uname="7.1.0",
    kho_compatible="kho-v3",
    reserve_size_is_int=True,
    preserved_pages_initialised=False,
    deferred_struct_pages=False,
    scratch_stays_cma=False,
    scratch_alignment="pageblock",
    scratch_explicit_rounded=False,
    scratch_rounds_first=True,
    luo="luo-v1",
    luo_checks_names=False,
    luo_checks_session_type=False,
    luo_checks_reserved=False,
    luo_get_name=False,
    luo_skips_preserve_context=False,
    luo_blocks_mutations=False,
    luo_retrieve_holds_list=False,
    luo_puts_module_last=False,
    luo_flb_counts_incoming=False,
    luo_flb_counts_outgoing=False,
    luo_flb_remembers_retrieve=False,
)

_V70 = _V71.evolve(
    name="7.0",
    uname="7.0.0",
    kho_compatible="kho-v1",
    tracker="chunks",
    tree_root_from_slab=False,
    subtree_phys_prop="fdt",
    subtree_size_prop="",
    kexec_metadata=False,
    functions=(*_V71.functions, "kho_finalize"),
    finalize="refresh",
    fill_crash_image=True,
    add_subtree_unwinds=False,
    preserve_splits_at_nodes=False,
    unpreserve_splits_at_nodes=False,
    restore_order_cap=True,
    revival_errno_told=True,
    scratch_failure_told="that",
    luo_one_owner=False,
    luo_bounds_strings=False,
    luo_pins_modules=True,
    dname_max_bytes=64,
    luo_remembers_deserialize=False,
    memfd="memfd-v1",
    memfd_id_is_inode=False,
    memfd_checks_count=False,
    memfd_accounts_pages=False,
    memfd_puts_by_address=False,
    memfd_tells_midloop=False,
    memfd_frees_header=False,
)

_V619 = _V70.evolve(
    name="6.19",
    uname="6.19.0",
    nr_pages_bits=32,
    luo_flb=False,
    luo_remembers_retrieve=False,
    memfd_makes_data=False,
)

_V618 = _V619.evolve(
    name="6.18",
    uname="6.18.0",
    functions=(
        "kho_preserve_folio",
        "kho_preserve_pages",
        "kho_preserve_vmalloc",
        "kho_add_subtree",
        "kho_retrieve_subtree",
        "kho_restore_folio",
        "kho_restore_pages",
        "kho_restore_vmalloc",
        "register_kho_notifier",
    ),
    finalize="notifiers",
    busy_when_finalized=True,
    abort_unpreserves=True,
    fill_kimage="finalized",
    kho_init_level="late",
    metadata_kfreed=True,
    reserve_mem_in_notifier=True,
    reserve_mem_unwinds=False,
    unpreserve_missing="return",
    vmalloc_enomem_told=False,
    vmalloc_fills_pages=False,
    empty_map_accepted=True,
    restores_root_fdt=True,
    restore_pages_compound=True,
    skip_init_told=True,
    test_kho_unwinds=False,
    scratch_skips_memoryless=False,
    luo="",
    memfd="",
)

_V617 = _V618.evolve(
    name="6.17",
    uname="6.17.0",
    bitmap_bytes=512,
    metadata_from_slab=True,
    metadata_kfreed=False,
    efi_keeps_scratch=False,
    test_kho_checks_enabled=False,
    functions=(
        "kho_preserve_folio",
        "kho_preserve_phys",
        "kho_add_subtree",
        "kho_retrieve_subtree",
        "kho_restore_folio",
        "register_kho_notifier",
    ),
    fill_kimage="enabled",
    unpreserve_missing="loop",
    scratch_overlap_checked=False,
    page_magic=False,
    restore_clears_private=False,
    restore_pages_compound=False,
    scratch_arg_zeros=False,
    scratch_arg_consumed=False,
)

_V616 = _V617.evolve(name="6.16", uname="6.16.0", scratch_failure_told="nothing")

_STABLE = (
    _V616.evolve(name="6.16.4", uname="6.16.4", scratch_failure_told="that"),
    _V617.evolve(name="6.17.4", uname="6.17.4", fill_kimage="finalized"),
    _V617.evolve(
        name="6.17.9", uname="6.17.9", fill_kimage="finalized", unpreserve_missing="return"
    ),
    _V618.evolve(
        name="6.18.y",
        uname="6.18.30",
        scratch_skips_memoryless=True,
        scratch_explicit_rounded=True,
        scratch_rounds_first=False,
    ),
    _V70.evolve(name="7.0.y", uname="7.0.10", fill_crash_image=False, add_subtree_unwinds=True),
)

MAINLINE = ("6.16", "6.17", "6.18", "6.19", "7.0", "7.1", "7.2", "7.3")
"""The tagged releases, oldest first."""

RELEASES: dict[str, Release] = {
    release.name: release
    for release in (_V616, _V617, _V618, _V619, _V70, _V71, _V72, _V73, *_STABLE)
}
"""All that can be named: the tagged releases, and stable ones where they differ."""

_FLAGS = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


def find_release(release: str | Release) -> Release:
    """The release that ``release`` names; a :class:`Release` passes through.

    A name is one of :data:`RELEASES`, or a file that defines ``RELEASE``, or either with changes:
    ``7.3+page_magic=off+bitmap_bytes=512``. Raises :class:`InputError` for any other. What a file
    defines under the name of one of Linux's gets the file's name too: ``7.3-mine``.
    """
    if isinstance(release, Release):
        return _with_plugins(release)
    base, *changes = release.split("+")
    found = _named(base)
    return _with_plugins(_changed(found, release, tuple(changes)) if changes else found)


@lru_cache(maxsize=32)
def _changed(base: Release, name: str, changes: tuple[str, ...]) -> Release:
    # A search names the same one, with dozens of changes, several times in each run.
    values = dict(_change(name, base, text) for text in changes)
    return base.evolve(**{"name": name, **values})


def option_release(name: str | None) -> Release | None:
    """What ``--release name`` asks for; None without it. What is wrong names the option."""
    if name is None:
        return None
    try:
        return find_release(name)
    except InputError as error:
        cause = error.cause if error.place == "release" else str(error)
        raise InputError("--release", cause) from None


def _with_plugins(release: Release) -> Release:
    from khosim.kernel.kho_tracker import BlockTracker

    if is_plugin(release.tracker):
        tracker = load_plugin(release.tracker)
        if not isinstance(tracker, type) or not issubclass(tracker, BlockTracker):
            raise InputError(release.tracker, "not a class derived from BlockTracker")
        missing = sorted(getattr(tracker, "__abstractmethods__", ()))
        if missing:
            raise InputError(release.tracker, f"it lacks {', '.join(missing)}")
    if release.decoder:
        if not is_plugin(release.decoder):
            cause = f"decoder={release.decoder}: not FILE.py:FUNCTION"
            raise InputError(f"release {release.name}", cause)
        if not callable(load_plugin(release.decoder)):
            raise InputError(release.decoder, "not a function")
    return release


def _named(name: str) -> Release:
    if is_plugin(name):
        found = load_plugin(name, "RELEASE")
        if not isinstance(found, Release):
            raise InputError(name, f"RELEASE is a {type(found).__name__}, not a Release")
        fields = [field.name for field in dataclasses.fields(found)]
        try:  # one made without evolve was not looked at
            _V73.evolve(**{field: getattr(found, field) for field in fields})
        except InputError as error:
            raise InputError(name, error.cause) from None
        if found.name in RELEASES and found != RELEASES[found.name]:
            return found.evolve(name=f"{found.name}-{Path(name).stem}")  # not to be taken for it
        return found
    known = RELEASES.get(name)
    if known is None:
        close = get_close_matches(name, RELEASES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it knows {', '.join(RELEASES)}"
        raise InputError("release", f"{name!r} is no release khosim knows; {hint}")
    return known


def _change(place: str, release: Release, text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    fields = {field.name for field in dataclasses.fields(release)}
    if name not in fields:
        close = get_close_matches(name, fields, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"release {place}", f"there is no behaviour named {name!r}{hint}")
    if not equals:
        raise InputError(f"release {place}", f"{name} needs a value: {name}=...")
    now = getattr(release, name)
    if isinstance(now, bool):
        if value not in _FLAGS:
            raise InputError(f"release {place}", f"{name}={value}: neither on nor off")
        return name, _FLAGS[value]
    if isinstance(now, int):
        if not value.isascii() or not value.isdigit() or len(value) > 9:
            raise InputError(f"release {place}", f"{name}={value}: not a whole number")
        return name, int(value)
    if isinstance(now, tuple):
        return name, tuple(part for part in value.split(",") if part)
    return name, value
