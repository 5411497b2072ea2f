"""What the Live Update Orchestrator hands over: its root, sessions, files and shared state.

Layouts of ``include/linux/kho/abi/luo.h`` @ 7.2 .. 7.3 (``luo-v5``), packed, little-endian. The
KHO subtree ``"LUO"`` is one :class:`LuoSer`. Sessions lie in KHO blocks
(:mod:`khosim.abi.kho_block`) of :class:`LuoSessionSer`, each with the chain of KHO blocks of its
:class:`LuoFileSer`. Shared state is an array: :class:`LuoFlbHeaderSer`, then :class:`LuoFlbSer`.

Before 7.2 the subtree was a device tree (``luo-v1``), sessions lay behind a u64 count in one array
and each session's files in another; the entries were the same.

Names are NUL-terminated in a field of fixed length. Packing pads with zeros; the kernel's
``strscpy`` writes up to the NUL and leaves the rest of the field as it was.
"""

from __future__ import annotations

import dataclasses
import struct

__all__ = (
    "LIVEUPDATE_FLB_COMPAT_LENGTH",
    "LIVEUPDATE_HNDL_COMPAT_LENGTH",
    "LIVEUPDATE_SESSION_NAME_LENGTH",
    "LUO_ABI_COMPATIBLE",
    "LUO_ABI_COMPAT_LEN",
    "LUO_FDT_COMPATIBLE",
    "LUO_FDT_FLB_COMPATIBLE",
    "LUO_FDT_FLB_HEADER",
    "LUO_FDT_FLB_NODE_NAME",
    "LUO_FDT_LIVEUPDATE_NUM",
    "LUO_FDT_SESSION_COMPATIBLE",
    "LUO_FDT_SESSION_HEADER",
    "LUO_FDT_SESSION_NODE_NAME",
    "LUO_FILE_SER_BYTES",
    "LUO_FLB_HEADER_SER_BYTES",
    "LUO_FLB_SER_BYTES",
    "LUO_KHO_ENTRY_NAME",
    "LUO_SER_BYTES",
    "LUO_SESSION_SER_BYTES",
    "LuoFileSer",
    "LuoFileSetSer",
    "LuoFlbHeaderSer",
    "LuoFlbSer",
    "LuoSer",
    "LuoSessionSer",
    "pack_luo_file_ser",
    "pack_luo_flb_header_ser",
    "pack_luo_flb_ser",
    "pack_luo_ser",
    "pack_luo_session_ser",
    "unpack_luo_file_ser",
    "unpack_luo_flb_header_ser",
    "unpack_luo_flb_ser",
    "unpack_luo_ser",
    "unpack_luo_session_ser",
)

LUO_KHO_ENTRY_NAME = "LUO"
LUO_ABI_COMPATIBLE = "luo-v5"
LUO_ABI_COMPAT_LEN = 8
"""The string and its NUL, rounded up to 8."""

LUO_FDT_COMPATIBLE = "luo-v1"
"""6.19 to 7.1: the subtree is a device tree with these nodes and properties."""
LUO_FDT_LIVEUPDATE_NUM = "liveupdate-number"
LUO_FDT_SESSION_NODE_NAME = "luo-session"
LUO_FDT_SESSION_COMPATIBLE = "luo-session-v2"
LUO_FDT_SESSION_HEADER = "luo-session-header"
LUO_FDT_FLB_NODE_NAME = "luo-flb"
LUO_FDT_FLB_COMPATIBLE = "luo-flb-v1"
LUO_FDT_FLB_HEADER = "luo-flb-header"

LIVEUPDATE_SESSION_NAME_LENGTH = 64
LIVEUPDATE_HNDL_COMPAT_LENGTH = 48
LIVEUPDATE_FLB_COMPAT_LENGTH = 48

_SER = struct.Struct(f"<{LUO_ABI_COMPAT_LEN}sQQQ")
_SESSION = struct.Struct(f"<{LIVEUPDATE_SESSION_NAME_LENGTH}sQQ")
_FILE = struct.Struct(f"<{LIVEUPDATE_HNDL_COMPAT_LENGTH}sQQ")
_FLB_HEADER = struct.Struct("<QQ")
_FLB = struct.Struct(f"<{LIVEUPDATE_FLB_COMPAT_LENGTH}sQQ")
LUO_SER_BYTES = _SER.size
LUO_SESSION_SER_BYTES = _SESSION.size
LUO_FILE_SER_BYTES = _FILE.size
LUO_FLB_HEADER_SER_BYTES = _FLB_HEADER.size
LUO_FLB_SER_BYTES = _FLB.size


@dataclasses.dataclass(frozen=True, slots=True)
class LuoSer:
    """``struct luo_ser``: physical addresses of the first session block and of the FLB header."""

    compatible: str
    liveupdate_num: int
    sessions_pa: int
    flbs_pa: int


@dataclasses.dataclass(frozen=True, slots=True)
class LuoFileSetSer:
    """``struct luo_file_set_ser``: physical address of the first file block, and how many files."""

    files: int
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class LuoSessionSer:
    """``struct luo_session_ser``: one session and its files."""

    name: str
    file_set: LuoFileSetSer


@dataclasses.dataclass(frozen=True, slots=True)
class LuoFileSer:
    """``struct luo_file_ser``: the handler's name, its handle and the user's token."""

    compatible: str
    data: int
    token: int


@dataclasses.dataclass(frozen=True, slots=True)
class LuoFlbHeaderSer:
    """``struct luo_flb_header_ser``: pages of the whole array, and its entries."""

    pgcnt: int
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class LuoFlbSer:
    """``struct luo_flb_ser``: the object's name, its handle and how many files depend on it."""

    name: str
    data: int
    count: int


def _name(text: str, length: int) -> bytes:
    return text.encode("utf-8", "surrogateescape")[: length - 1]


def _text(field: bytes) -> str:
    # A field without a NUL is read to its end: what the kernel prints with a bounded "%.*s".
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def pack_luo_ser(ser: LuoSer) -> bytes:
    """32 bytes."""
    return _SER.pack(
        _name(ser.compatible, LUO_ABI_COMPAT_LEN),
        ser.liveupdate_num,
        ser.sessions_pa,
        ser.flbs_pa,
    )


def unpack_luo_ser(data: bytes, offset: int = 0) -> LuoSer:
    """The record at ``data[offset:]``."""
    compatible, liveupdate_num, sessions_pa, flbs_pa = _SER.unpack_from(data, offset)
    return LuoSer(_text(compatible), liveupdate_num, sessions_pa, flbs_pa)


def pack_luo_session_ser(ser: LuoSessionSer) -> bytes:
    """80 bytes."""
    name = _name(ser.name, LIVEUPDATE_SESSION_NAME_LENGTH)
    return _SESSION.pack(name, ser.file_set.files, ser.file_set.count)


def unpack_luo_session_ser(data: bytes, offset: int = 0) -> LuoSessionSer:
    """The record at ``data[offset:]``."""
    name, files, count = _SESSION.unpack_from(data, offset)
    return LuoSessionSer(_text(name), LuoFileSetSer(files, count))


def pack_luo_file_ser(ser: LuoFileSer) -> bytes:
    """64 bytes."""
    name = _name(ser.compatible, LIVEUPDATE_HNDL_COMPAT_LENGTH)
    return _FILE.pack(name, ser.data, ser.token)


def unpack_luo_file_ser(data: bytes, offset: int = 0) -> LuoFileSer:
    """The record at ``data[offset:]``."""
    compatible, handle, token = _FILE.unpack_from(data, offset)
    return LuoFileSer(_text(compatible), handle, token)


def pack_luo_flb_header_ser(header: LuoFlbHeaderSer) -> bytes:
    """16 bytes."""
    return _FLB_HEADER.pack(header.pgcnt, header.count)


def unpack_luo_flb_header_ser(data: bytes, offset: int = 0) -> LuoFlbHeaderSer:
    """The header at ``data[offset:]``."""
    return LuoFlbHeaderSer(*_FLB_HEADER.unpack_from(data, offset))


def pack_luo_flb_ser(ser: LuoFlbSer) -> bytes:
    """64 bytes."""
    return _FLB.pack(_name(ser.name, LIVEUPDATE_FLB_COMPAT_LENGTH), ser.data, ser.count)


def unpack_luo_flb_ser(data: bytes, offset: int = 0) -> LuoFlbSer:
    """The record at ``data[offset:]``."""
    name, handle, count = _FLB.unpack_from(data, offset)
    return LuoFlbSer(_text(name), handle, count)
