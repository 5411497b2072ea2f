"""memblock's arrays as a running kernel still shows them, against those of the replay.

Kernels that keep memblock (arm64) list its arrays under debugfs ``memblock/``
(``mm/memblock.c:memblock_debug_show`` @ 7.3). Between the end of the replay and then, boot gives
every reservation the node of its memory (``memmap_init_reserved_pages``) and gives back the initrd
and its own init code, of which the log tells the sizes only. Left out: nodes, which the files show
as the kernel was built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from khosim.capture.folder import CapturedGeneration
from khosim.conform.replay import Replay
from khosim.conform.start import covered, subtract
from khosim.conform.state import Difference
from khosim.errors import InputError
from khosim.kernel.memblock import (
    MEMBLOCK_DRIVER_MANAGED,
    MEMBLOCK_HOTPLUG,
    MEMBLOCK_KHO_SCRATCH,
    MEMBLOCK_MIRROR,
    MEMBLOCK_NOMAP,
    MEMBLOCK_RSRV_HUGETLB,
    MEMBLOCK_RSRV_KERN,
    MEMBLOCK_RSRV_NOINIT,
    RegionArray,
)

__all__ = ("compare_final_arrays",)

_LINE = re.compile(r"\s*\d+: 0x([0-9a-f]+)\.\.0x([0-9a-f]+)\s+\d+ (\S+)")
_FREED = re.compile(r"Freeing (?:initrd|unused kernel[^:]*) memory: (\d+)K")
_FLAGS: Mapping[str, int] = {
    "NONE": 0,
    "HOTPLUG": MEMBLOCK_HOTPLUG,
    "MIRROR": MEMBLOCK_MIRROR,
    "NOMAP": MEMBLOCK_NOMAP,
    "DRV_MNG": MEMBLOCK_DRIVER_MANAGED,
    "RSV_NIT": MEMBLOCK_RSRV_NOINIT,
    "RSV_KERN": MEMBLOCK_RSRV_KERN,
    "KHO_SCRATCH": MEMBLOCK_KHO_SCRATCH,
    "RSV_HUGETLB": MEMBLOCK_RSRV_HUGETLB,
}
_Region = tuple[int, int, int]
"""(base, end, flags)."""


def compare_final_arrays(replay: Replay, generation: CapturedGeneration) -> list[Difference] | None:
    """What the captured final arrays say otherwise; None where the capture has none.

    Raises :class:`InputError` for a file that is no such list. Leaves ``replay.memblock`` as
    ``memblock_free_all`` does.
    """
    if not generation.has("memblock/memory") or not generation.has("memblock/reserved"):
        return None
    memblock = replay.memblock
    memblock.free_ranges()
    differences = []
    memory, real_memory = _joined(memblock.memory), _read(generation, "memory")
    for own, real in zip(memory, real_memory, strict=False):
        if own != real:
            differences.append(Difference(0, "memblock/memory", real[0], own[0]))
    if len(memory) != len(real_memory):
        difference = Difference(0, "memblock/memory: regions", len(real_memory), len(memory))
        differences.append(difference)
    differences += _reserved(replay, generation)
    return differences


def _reserved(replay: Replay, generation: CapturedGeneration) -> list[Difference]:
    own = _joined(replay.memblock.reserved)
    real = _read(generation, "reserved")
    found = []
    for base, end, flags in real:
        known = [(low, high) for low, high, mine in own if mine == flags]
        if not covered(base, end, known):
            found.append(Difference(0, "memblock/reserved", base, None))
    page = replay.facts.page_size
    freed = {int(kib) << 10 for kib in _FREED.findall(generation.dmesg)}
    shown = [(base, end) for base, end, _ in real]
    for base, end, flags in own:
        for low, high in subtract([(base, end)], shown):
            pages = high // page * page - -(-low // page) * page
            if flags or pages not in freed:
                found.append(Difference(0, "memblock/reserved", None, low))
    return found


def _joined(array: RegionArray) -> list[_Region]:
    """Regions without their nodes, those that only nodes tell apart joined."""
    joined: list[_Region] = []
    for base, size, flags, _nid in array.rows():
        if joined and joined[-1][1:] == (base, flags):
            joined[-1] = (joined[-1][0], base + size, flags)
        else:
            joined.append((base, base + size, flags))
    return joined


def _read(generation: CapturedGeneration, name: str) -> list[_Region]:
    place = str(generation.path / "memblock" / name)
    joined: list[_Region] = []
    for number, line in enumerate(generation.text_of(f"memblock/{name}").splitlines(), 1):
        found = _LINE.fullmatch(line.rstrip())
        words = found.group(3).split("|") if found else []
        if not found or any(word not in _FLAGS for word in words):
            raise InputError(f"{place}: line {number}", "no memblock region")
        base, end = int(found.group(1), 16), int(found.group(2), 16) + 1
        flags = sum(_FLAGS[word] for word in words)
        if joined and joined[-1][1:] == (base, flags):
            joined[-1] = (joined[-1][0], end, flags)
        else:
            joined.append((base, end, flags))
    return joined
