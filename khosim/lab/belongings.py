"""What khosim's kernel preserves for a real successor.

Regions of ``reserve_mem=`` with content, live update sessions with the memfds that the guest's
program asks for, a run of pages, and the subtree of the kernel's own test module
(``lib/test_kho.c`` @ 7.3) with folios of every order: a kernel that has it built in restores them
from the vmalloc area that lists them and compares their checksum.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from khosim.abi import fdt
from khosim.abi.kho_vmalloc import pack_kho_vmalloc
from khosim.abi.memfd import F_SEAL_GROW, F_SEAL_SHRINK
from khosim.errors import KhoSimError
from khosim.kernel.kernel import Kernel
from khosim.kernel.kho_vmalloc import KhoVmallocSlot, kho_preserve_vmalloc
from khosim.kernel.liveupdate.luo_session import Session
from khosim.kernel.memfd import memfd
from khosim.kernel.vmalloc import vmalloc

__all__ = ("Belongings", "LeftFile", "csum_partial", "fill_kernel")

_TEST_NAME = "kho_test"
_TEST_COMPATIBLE = "kho-test-v1"
_TEST_MAGIC = 0x4B484F21
_MAX_ORDER = 10
_RUN_PAGES = 11
_U32 = (1 << 32) - 1


_FILES = (
    ("vm-a", 0x10, 12411, 0),
    ("vm-a", 0x11, 2 << 20, 0),
    ("vm-b", 0xDEADBEEF, 1, F_SEAL_SHRINK | F_SEAL_GROW),
    ("vm-b", 0x7, 0, 0),
    ("vm-b", 0x8, 256 << 10, 0),
)
"""Session, token, bytes and seals: the table of ``init.c``, which asks for these files."""


class LeftFile(NamedTuple):
    """A memfd as khosim left it, ``pos`` in bytes."""

    pos: int
    seals: int
    content: bytes


class Belongings(NamedTuple):
    """Content: (start, bytes) of each ``reserve_mem`` name, a file for each session and token."""

    regions: dict[str, tuple[int, bytes]]
    files: dict[tuple[str, int], LeftFile]


def fill_kernel(kernel: Kernel, seed: int) -> Belongings:
    """Let ``kernel`` preserve one of each; all content comes from ``seed``."""
    random = np.random.default_rng(seed)
    regions: dict[str, tuple[int, bytes]] = {}
    for name, start, size in kernel.reserve_mem.regions:
        content = random.bytes(size)
        kernel.ram.write(start, content, kernel.by("user"))
        regions[name] = start, content
    run = kernel.alloc_pages_exact(_RUN_PAGES)
    kernel.kho_preserve_pages(run, _RUN_PAGES)
    _test_module(kernel, random)
    files = _sessions(kernel, random) if kernel.liveupdate.enabled else {}
    return Belongings(regions, files)


def csum_partial(data: bytes) -> int:
    """``csum_partial`` from 0 over whole 32-bit words: their sum, with each carry added again."""
    words = np.frombuffer(data, dtype="<u4")
    total = int(words.sum(dtype=np.uint64))
    while total > _U32:
        total = (total & _U32) + (total >> 32)
    return total


def _sessions(
    kernel: Kernel, random: np.random.Generator
) -> dict[tuple[str, int], LeftFile]:
    sessions: dict[str, Session] = {}
    left: dict[tuple[str, int], LeftFile] = {}
    for name, token, size, seals in _FILES:
        if name not in sessions:
            sessions[name] = kernel.liveupdate.create_session(name)
        content = random.bytes(size)
        file = memfd(kernel, "lab", size=size)
        file.write(0, content)
        file.lseek(size // 2)
        if seals:
            file.add_seals(seals)
        sessions[name].preserve(file, token)
        left[name, token] = LeftFile(size // 2, seals, content)
    return left


def _test_module(kernel: Kernel, random: np.random.Generator) -> None:
    # kho_test_generate_data, kho_test_preserve
    folios = [kernel.alloc_folio(order) for order in (*range(_MAX_ORDER + 1), 0, 3, 0)]
    checksum = 0
    for folio in folios:
        content = random.bytes(folio.len_bytes)
        folio.write(0, content)
        total = checksum + csum_partial(content)
        checksum = (total & _U32) + (total >> 32)
        kernel.kho_preserve_folio(folio)
    listed = b"".join(struct.pack("<Q", folio.phys | folio.order) for folio in folios)
    area = vmalloc(kernel, len(listed))
    if area is None:
        raise KhoSimError("khosim's kernel has no memory for the list of folios")
    area.write(0, listed)
    slot = KhoVmallocSlot(kernel)
    kho_preserve_vmalloc(kernel, area, slot)
    page = kernel.kho_alloc_preserve(kernel.arch.page_size)
    buf = kernel.ram.writable_mv(page.phys, kernel.arch.page_size, kernel.by("kho_test"))
    error = fdt.fdt_create(buf, kernel.arch.page_size)
    error |= fdt.fdt_finish_reservemap(buf)
    error |= fdt.fdt_begin_node(buf, "")
    error |= fdt.fdt_property_string(buf, "compatible", _TEST_COMPATIBLE)
    error |= fdt.fdt_property(buf, "magic", struct.pack("<I", _TEST_MAGIC))
    error |= fdt.fdt_begin_node(buf, "data")
    error |= fdt.fdt_property(buf, "nr_folios", struct.pack("<I", len(folios)))
    error |= fdt.fdt_property(buf, "folios_info", pack_kho_vmalloc(slot.load()))
    error |= fdt.fdt_property(buf, "csum", struct.pack("<I", checksum))
    error |= fdt.fdt_end_node(buf)
    error |= fdt.fdt_end_node(buf)
    error |= fdt.fdt_finish(buf)
    if error:
        raise KhoSimError(f"the test module's device tree: libfdt error {error}")
    kernel.kho_add_subtree(_TEST_NAME, page.phys, fdt.fdt_totalsize(buf))
