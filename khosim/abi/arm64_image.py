"""The header of an arm64 kernel ``Image``.

Layout of ``arch/arm64/include/asm/image.h`` and ``Documentation/arch/arm64/booting.rst`` @ 7.3.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = ("ARM64_HEADER_BYTES", "Arm64ImageHeader", "build_arm64_image", "parse_arm64_image")

ARM64_HEADER_BYTES = 64
_LAYOUT = struct.Struct("<IIQQQQQQ4sI")
_MAGIC = b"ARM\x64"
_PAGE_SIZE_CODE = {4096: 1, 16384: 2, 65536: 3}


class Arm64ImageHeader(NamedTuple):
    """What ``image_load`` reads. ``page_size`` is 0 where the image does not say."""

    text_offset: int
    image_size: int
    page_size: int


def build_arm64_image(payload: bytes, *, image_size: int, page_size: int) -> bytes:
    """An ``Image`` whose header says ``image_size`` bytes in memory, with ``payload`` after it."""
    flags = _PAGE_SIZE_CODE[page_size] << 1 | 1 << 3
    header = _LAYOUT.pack(0, 0, 0, image_size, flags, 0, 0, 0, _MAGIC, 0)
    return header + payload


def parse_arm64_image(image: bytes) -> Arm64ImageHeader | None:
    """The header, or None where ``image_probe`` refuses the file."""
    if len(image) < ARM64_HEADER_BYTES:
        return None
    _, _, text_offset, image_size, flags, _, _, _, magic, _ = _LAYOUT.unpack(
        image[:ARM64_HEADER_BYTES]
    )
    if magic != _MAGIC:
        return None
    code = flags >> 1 & 3
    page_size = next((size for size, c in _PAGE_SIZE_CODE.items() if c == code), 0)
    return Arm64ImageHeader(text_offset, image_size, page_size)
