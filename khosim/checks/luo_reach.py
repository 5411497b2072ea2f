"""Which pages the sessions of a running kernel lead to, whether they are written down yet or not.

Until the reboot system call the orchestrator knows its files from its own memory; what a file's
handler preserved is behind the number that it gave for it. Addresses come from the live lists, all
else from RAM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from khosim.checks.decode_luo import parse_luo_header
from khosim.checks.decode_memfd import decode_memfd
from khosim.checks.decode_walk import Walk
from khosim.checks.live_files import is_memfd, outgoing_files
from khosim.checks.ranges import merged
from khosim.checks.reader import ProblemLog

if TYPE_CHECKING:
    from khosim.checks.kernel_view import KernelView
    from khosim.checks.ranges import Ranges
    from khosim.machine.hardware import Hardware

__all__ = ("reachable_pages",)

_WORDS_BYTES = 64
_BLOCKS_MAX = 10_000


def reachable_pages(hardware: Hardware, kernel: KernelView) -> Ranges:
    """Page frames of blocks, records and folios of all sessions for the successor."""
    luo = kernel.liveupdate
    shift, page_size = hardware.page_shift, hardware.page_size
    sessions = luo.sessions.outgoing
    log = ProblemLog()
    walk = Walk(hardware.ram, page_size, log)
    pages = [luo.luo_ser_out, *sessions.block_set.blocks]
    header = None
    if luo.luo_ser_out:
        data = hardware.ram.read(luo.luo_ser_out, page_size)
        header = parse_luo_header(data, luo.luo_ser_out, log)
    if header is not None:
        pages.append(header[3])
    for session in sessions.sessions.values():
        pages += session.file_set.block_set.blocks
    for private in luo.flb.registered:
        pages += _of_shared_object(hardware, private.outgoing.data)
    folios: list[Ranges] = []
    for name, luo_file in outgoing_files(kernel):
        phys = luo_file.serialized_data
        if not is_memfd(luo_file):
            pages.append(phys)
            continue
        kind = luo_file.handler.compatible
        memfd = decode_memfd(walk, phys, phys, name, None, content=False, compatible=kind)
        if memfd is None:
            continue
        if memfd.vmalloc is not None:
            size = page_size << memfd.vmalloc.order
            for area in memfd.vmalloc.areas:
                pages += range(int(area), int(area) + size, page_size)
        folios.append(_folios_of(luo_file.file))
    pages += walk.pages
    pfns = np.array([phys >> shift for phys in pages if 0 < phys < 1 << 63], dtype=np.int64)
    return merged((np.sort(pfns), np.sort(pfns) + 1), *folios)


def _of_shared_object(hardware: Hardware, phys: int) -> list[int]:
    # The page of a shared object, and the KHO blocks that its first words lead to: chained by their
    # own first word.
    ram, page_size = hardware.ram, hardware.page_size
    pages = [phys]
    if not phys or not hardware.is_ram(phys, _WORDS_BYTES):
        return pages
    words = memoryview(ram.read(phys, _WORDS_BYTES)).cast("Q").tolist()
    for word in words:
        while word and not word % page_size and hardware.is_ram(word, page_size):
            if word in pages or len(pages) > _BLOCKS_MAX:
                break
            pages.append(word)
            word = ram.read_u64(word)
    return pages


def _folios_of(file: object) -> Ranges:
    mapping = file.inode.mapping  # type: ignore[attr-defined]
    columns = np.array(
        [(run.pfn, run.pfn + run.end - run.index) for run in mapping], dtype=np.int64
    ).reshape(-1, 2)
    return merged((columns[:, 0], columns[:, 1]))
