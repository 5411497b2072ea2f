"""Archives that the kernel unpacks as its initramfs: cpio in the "newc" form, uncompressed.

Documented in ``Documentation/driver-api/early-userspace/buffer-format.rst`` @ 7.3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from khosim.errors import InputError

__all__ = ("Entry", "newc")

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_U32 = (1 << 32) - 1


class Entry(NamedTuple):
    """One file: its name without a leading slash, its mode with the type's bits, its content."""

    name: str
    mode: int
    data: bytes = b""


def newc(entries: Iterable[Entry]) -> bytes:
    """The archive of ``entries`` in their order, owned by root, dated 1970, with its trailer.

    Raises :class:`InputError` for a file of 4 GiB and more.
    """
    parts: list[bytes] = []
    for inode, entry in enumerate([*entries, Entry(_TRAILER, 0)], start=1):
        name = entry.name.encode() + b"\0"
        if len(entry.data) > _U32:
            raise InputError(entry.name, "too large for an initramfs")
        fields = (inode, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
        head = _MAGIC + b"".join(b"%08X" % field for field in fields) + name
        parts += [_padded(head), _padded(entry.data)]
    return b"".join(parts)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
