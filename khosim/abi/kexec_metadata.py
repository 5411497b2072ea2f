"""The kexec-metadata blob: who handed over, and how often in a row.

Layout of ``include/linux/kho/abi/kexec_metadata.h:struct kho_kexec_metadata`` @ 7.1 .. 7.3, packed,
73 bytes: u32 version, char previous_release[65], u32 kexec_count.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = (
    "KEXEC_METADATA_BYTES",
    "KHO_KEXEC_METADATA_VERSION",
    "KHO_METADATA_NODE_NAME",
    "KexecMetadata",
    "pack_kexec_metadata",
    "unpack_kexec_metadata",
)

KHO_METADATA_NODE_NAME = "kexec-metadata"
KHO_KEXEC_METADATA_VERSION = 1
_RELEASE_BYTES = 65
_LAYOUT = struct.Struct(f"<I{_RELEASE_BYTES}sI")
KEXEC_METADATA_BYTES = _LAYOUT.size


class KexecMetadata(NamedTuple):
    """A decoded blob. ``previous_release`` is cut at its NUL, as ``strscpy`` does."""

    version: int
    previous_release: str
    kexec_count: int


def pack_kexec_metadata(release: str, kexec_count: int) -> bytes:
    """The blob of a kernel called ``release``; the count wraps at 32 bits."""
    name = release.encode("utf-8", "surrogateescape")[: _RELEASE_BYTES - 1]
    return _LAYOUT.pack(KHO_KEXEC_METADATA_VERSION, name, kexec_count & 0xFFFFFFFF)


def unpack_kexec_metadata(blob: bytes) -> KexecMetadata:
    """Decode 73 bytes; text that is not ASCII is kept as escapes."""
    version, name, count = _LAYOUT.unpack(blob)
    text = name[: _RELEASE_BYTES - 1].split(b"\0", 1)[0]
    return KexecMetadata(version, text.decode("ascii", "backslashreplace"), count)
