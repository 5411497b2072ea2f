"""Peculiarities of a release that are accepted: each one named, and said why.

A search reports what no expectation covers. An expectation is no filter on a place: it says which
words of the kernel, or whose pages, are meant, and what is lost by them.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = (
    "EXPECTATIONS",
    "Expectation",
    "is_expected_after_death",
    "is_expected_leak",
    "is_expected_message",
    "is_expected_panic",
    "is_expected_writer",
)


class Expectation(NamedTuple):
    """One accepted peculiarity. ``what`` begins it.

    ``kind`` is "message", "leak", "panic", "writer" of handed-over pages, or "death", which names
    an invariant that is not asked any more once a task died in the middle of a call.
    """

    name: str
    kind: str
    what: str
    why: str


_LEFT_BEHIND = (
    "all-given-back",
    "luo-no-leftovers",
    "luo-references",
    "region-preserved",
)

EXPECTATIONS = (
    Expectation(
        "tree-tables-stay",
        "leak",
        "kho_radix_alloc_node",
        "kho_radix_del_key clears a bit and keeps the tables above it: a page for each range that "
        "was ever preserved, reused by the next block there.",
    ),
    Expectation(
        "loaded-image-stays",
        "leak",
        "kimage_",
        "An image whose kexec was refused stays loaded, for the next attempt.",
    ),
    Expectation(
        "root-fdt-stays",
        "leak",
        "root FDT",
        "The predecessor's root FDT is read all the time and never restored: one page.",
    ),
    Expectation(
        "subtrees-stay",
        "leak",
        "subtree kexec-metadata",
        "Nobody restores the predecessor's kexec-metadata: one page.",
    ),
    Expectation(
        "memblock-subtree-stays",
        "leak",
        "subtree memblock",
        "reserve_mem_kho_retrieve_fdt keeps the predecessor's description of regions: one page.",
    ),
    Expectation(
        "flb-page-stays",
        "leak",
        "page of shared objects",
        "luo_flb_retrieve_one may read the predecessor's page at any time: it is never restored.",
    ),
    Expectation(
        "regions-stay-incoming",
        "leak",
        "reserve_mem",
        "A revived region is in use where it lies; its struct pages are never restored, which "
        "release_by_name has no need of.",
    ),
    Expectation(
        "poisoned-pages-stay",
        "leak",
        "PG_hwpoison",
        "Memory that is broken is not handed out again.",
    ),
    Expectation(
        "devices-write-on",
        "writer",
        "device",
        "A device that writes to memory while kernels change does so on purpose: what it wrote is "
        "what has to arrive.",
    ),
    *(
        Expectation(
            "the-dead-leave-things",
            "death",
            invariant,
            "A task that dies in the middle of a call leaves what it was at: nobody undoes it.",
        )
        for invariant in _LEFT_BEHIND
    ),
    Expectation(
        "mem-leaves-no-place-for-the-initrd",
        "panic",
        "Cannot find place for new RAMDISK",
        "reserve_initrd dies where mem= leaves no room to move the initrd to: it was asked for.",
    ),
    Expectation(
        "no-memory-for-luo-is-fatal",
        "panic",
        "The incoming tree failed to initialize properly [-ENOMEM]",
        "liveupdate_early_init dies on purpose where it cannot read its predecessor's state; with "
        "an allocation refused at boot that is what it says.",
    ),
)
"""All of them, for every release."""


def _expected(kind: str, text: str) -> bool:
    return any(e.kind == kind and text.startswith(e.what) for e in EXPECTATIONS)


def is_expected_leak(owner: str) -> bool:
    """Whether pages of ``owner`` may be left behind."""
    return _expected("leak", owner)


def is_expected_message(message: str) -> bool:
    """Whether an alarm in the log is an accepted one."""
    return _expected("message", message)


def is_expected_panic(message: str, *, lacks_memory: bool) -> bool:
    """Whether a kernel that was refused memory may die with these words."""
    return lacks_memory and _expected("panic", message)


def is_expected_writer(invariant: str, writer: str) -> bool:
    """Whether handed-over content may have been changed by ``writer``."""
    return invariant == "preserved-content" and _expected("writer", writer)


def is_expected_after_death(invariant: str) -> bool:
    """Whether an invariant may be broken once a task died in the middle of a call."""
    return _expected("death", invariant)
