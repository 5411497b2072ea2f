"""A kho-v1 map read with bitmaps of another size than it was written with.

6.18 made bitmaps longer and kept the format's name (``kernel/kexec_handover.c:PRESERVE_BITS`` @
6.17 and 6.18), so that a real kernel may have read too little of each bitmap, or on into what lies
behind. A capture that names the size each of its kernels has can show either. What lies behind is
known only as far as its pages were captured.
"""

from __future__ import annotations

import re

import numpy as np

from khosim.capture.folder import CapturedGeneration
from khosim.checks.decode_chunks import ChunkMap
from khosim.checks.preserved import expand
from khosim.conform.held import Held
from khosim.conform.items import Item
from khosim.errors import KernelPanic, RamFault
from khosim.kernel.release import Release

__all__ = ("as_read", "behind", "blocks_read", "death", "dies")

_DEATH = re.compile(r"(?:BUG: |Oops|Kernel panic|Unable to handle kernel)")
_ADDRESS = re.compile(r"page fault for address: ([0-9a-f]+)")


def as_read(release: Release, after: CapturedGeneration) -> Release:
    """``release`` with bitmaps of the size that the captured kernel ``after`` is said to have."""
    bits = after.preserve_bits
    own = (release.bitmap_bytes or after.page_size) * 8
    if bits is None or bits == own or release.tracker != "chunks":
        return release
    return release.evolve(bitmap_bytes=bits // 8)


def blocks_read(before: Held, after: CapturedGeneration) -> tuple[list[tuple[int, int]], bool]:
    """``(phys, order)`` of each block that ``after`` reads, and whether all it reads is captured.

    In the kernel's order, as if none of them killed it.
    """
    assert before.handover is not None
    told = before.handover.preserved
    bits = after.preserve_bits
    if not isinstance(told, ChunkMap) or bits in (None, told.preserve_bits):
        return expand(told), True
    assert bits is not None
    blocks: list[tuple[int, int]] = []
    is_complete = True
    page = told.page_size
    for chunk in told.chunks:
        width = chunk.order + page.bit_length() - 1
        for element in chunk.elements:
            data = b""
            at, left = element.bitmap, bits // 8
            while left:
                piece = min(left, page - at % page)
                try:
                    data += before.reader.read(at, piece)
                except RamFault:
                    data += bytes(piece)
                    is_complete = False
                at, left = at + piece, left - piece
            set_bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
            blocks += [
                (element.phys_start + (bit << width), chunk.order)
                for bit in np.flatnonzero(set_bits).tolist()
            ]
    return blocks, is_complete


def behind(item: Item) -> Item:
    """An item that differs where bytes behind a bitmap were not captured: not to be judged."""
    note = "the kernel read on behind bitmaps, where pages were not captured"
    return item._replace(ok=None, note=note)


def dies(after: CapturedGeneration) -> bool:
    """Whether the log of ``after`` ends in a kernel's death."""
    return after.has("dmesg") and _DEATH.search(after.dmesg) is not None


def death(panic: KernelPanic, after: CapturedGeneration, needs: tuple[str, ...]) -> Item:
    """Whether the simulated kernel died of what the real one did: of a store to the same page."""
    name = "successor: dies"
    real, own = (_ADDRESS.search(text) for text in (after.dmesg, str(panic)))
    if real is None or own is None:
        return Item(name, True, 1, 1, note="both die; the log has no address", needs=needs)
    differences = []
    if int(real.group(1), 16) != int(own.group(1), 16):
        differences.append(f"fault at {real.group(1)}, simulated {own.group(1)}")
    return Item.counted(name, int(not differences), 1, differences, needs=needs)
