"""The user's kernel: is it one, and which."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from khosim.abi.boot_params import parse_bzimage
from khosim.errors import InputError

__all__ = ("BzImage", "read_bzimage")

_NOT_THIS = (
    (b"\x7fELF", "an ELF file; the lab boots a bzImage (arch/x86/boot/bzImage)"),
    (b"\x1f\x8b", "gzip data, not a bzImage"),
    (b"MZ\x00\x00\x1f\x20\x03\xd5", "an arm64 Image; the lab knows x86-64 only"),
)
_MAX_BYTES = 256 << 20
_VERSION_AT = 0x20E
_SECTOR = 512


@dataclass(frozen=True, slots=True)
class BzImage:
    """A bzImage. ``version`` is what its header says (``"7.3.4 (user@host) #1 ..."``), or empty.

    ``load_phys`` is where its code starts without KASLR.
    """

    path: Path
    data: bytes
    version: str
    load_phys: int


def read_bzimage(path: str | Path) -> BzImage:
    """The kernel at ``path``; :class:`InputError` where it is no x86-64 bzImage."""
    path = Path(path)
    place = str(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(place, "too large for a bzImage")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(place, error.strerror or str(error)) from None
    for magic, cause in _NOT_THIS:
        if data.startswith(magic):
            raise InputError(place, cause)
    header = parse_bzimage(data)
    if header is None or len(data) <= header.setup_bytes:
        raise InputError(place, "not a 64-bit bzImage")
    return BzImage(path, data, _version(data), header.pref_address)


def _version(data: bytes) -> str:
    pointer = int.from_bytes(data[_VERSION_AT : _VERSION_AT + 2], "little")
    if not pointer:
        return ""
    text = data[pointer + _SECTOR : pointer + 2 * _SECTOR]
    return text.partition(b"\0")[0].decode("ascii", "replace")
