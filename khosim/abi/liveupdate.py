"""The orchestrator's ioctls as user space sees them.

Numbers and structures of ``include/uapi/linux/liveupdate.h`` @ 7.3, little-endian. Each structure
begins with its own size in bytes, so that it can grow: a shorter one than the kernel knows is
refused, a longer one has to be zero beyond that.
"""

from __future__ import annotations

import struct

__all__ = (
    "CREATE_SESSION",
    "FINISH",
    "GET_NAME",
    "LIVEUPDATE_CMD_BASE",
    "LIVEUPDATE_CMD_SESSION_BASE",
    "LIVEUPDATE_IOCTL_CREATE_SESSION",
    "LIVEUPDATE_IOCTL_RETRIEVE_SESSION",
    "LIVEUPDATE_IOCTL_TYPE",
    "LIVEUPDATE_SESSION_FINISH",
    "LIVEUPDATE_SESSION_GET_NAME",
    "LIVEUPDATE_SESSION_NAME_LENGTH",
    "LIVEUPDATE_SESSION_PRESERVE_FD",
    "LIVEUPDATE_SESSION_RETRIEVE_FD",
    "PRESERVE_FD",
    "RETRIEVE_FD",
    "RETRIEVE_SESSION",
    "create_session",
    "finish",
    "get_name",
    "ioc_nr",
    "liveupdate_io",
    "preserve_fd",
    "retrieve_fd",
    "retrieve_session",
)

LIVEUPDATE_IOCTL_TYPE = 0xBA
LIVEUPDATE_SESSION_NAME_LENGTH = 64
"""With the NUL."""
LIVEUPDATE_CMD_BASE = 0x00
LIVEUPDATE_CMD_SESSION_BASE = 0x40


def liveupdate_io(number: int) -> int:
    """``_IO``: the command of a number within ``LIVEUPDATE_IOCTL_TYPE``."""
    return LIVEUPDATE_IOCTL_TYPE << 8 | number


def ioc_nr(cmd: int) -> int:
    """``_IOC_NR``: the number of an ioctl within its type."""
    return cmd & 0xFF


# On /dev/liveupdate
LIVEUPDATE_IOCTL_CREATE_SESSION = liveupdate_io(0x00)
LIVEUPDATE_IOCTL_RETRIEVE_SESSION = liveupdate_io(0x01)
# On a session
LIVEUPDATE_SESSION_PRESERVE_FD = liveupdate_io(0x40)
LIVEUPDATE_SESSION_RETRIEVE_FD = liveupdate_io(0x41)
LIVEUPDATE_SESSION_FINISH = liveupdate_io(0x42)
LIVEUPDATE_SESSION_GET_NAME = liveupdate_io(0x43)

CREATE_SESSION = struct.Struct("<Ii64s")
"""u32 size, s32 fd (out), name."""
RETRIEVE_SESSION = struct.Struct("<Ii64s")
"""u32 size, s32 fd (out), name."""
PRESERVE_FD = struct.Struct("<IiQ")
"""u32 size, s32 fd, u64 token."""
RETRIEVE_FD = struct.Struct("<IiQ")
"""u32 size, s32 fd (out), u64 token."""
FINISH = struct.Struct("<II")
"""u32 size, u32 reserved (0)."""
GET_NAME = struct.Struct("<II64s")
"""u32 size, u32 reserved (0), name (out)."""


def create_session(name: bytes) -> bytearray:
    """``struct liveupdate_ioctl_create_session``, ready for the call."""
    return bytearray(CREATE_SESSION.pack(CREATE_SESSION.size, 0, name))


def retrieve_session(name: bytes) -> bytearray:
    """``struct liveupdate_ioctl_retrieve_session``, ready for the call."""
    return bytearray(RETRIEVE_SESSION.pack(RETRIEVE_SESSION.size, 0, name))


def preserve_fd(fd: int, token: int) -> bytearray:
    """``struct liveupdate_session_preserve_fd``, ready for the call."""
    return bytearray(PRESERVE_FD.pack(PRESERVE_FD.size, fd, token))


def retrieve_fd(token: int) -> bytearray:
    """``struct liveupdate_session_retrieve_fd``, ready for the call."""
    return bytearray(RETRIEVE_FD.pack(RETRIEVE_FD.size, 0, token))


def finish() -> bytearray:
    """``struct liveupdate_session_finish``, ready for the call."""
    return bytearray(FINISH.pack(FINISH.size, 0))


def get_name() -> bytearray:
    """``struct liveupdate_session_get_name``, ready for the call."""
    return bytearray(GET_NAME.pack(GET_NAME.size, 0, b""))
