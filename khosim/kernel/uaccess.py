"""User memory, as system calls read and write it.

Models ``get_user``, ``copy_to_user`` and ``copy_struct_from_user`` (``include/linux/uaccess.h``)
@ 7.3. User memory is a Python buffer: what lies behind its end is not mapped, ``bytes`` are mapped
read-only, and None is a null pointer. Left out: addresses, and copies that fail half way.
"""

from __future__ import annotations

import errno

from khosim.errors import KernelError

__all__ = ("UserBuffer", "copy_struct_from_user", "copy_to_user", "get_user_u32")

UserBuffer = bytes | bytearray | memoryview | None


def _fault(symbol: str) -> KernelError:
    return KernelError(errno.EFAULT, symbol, "user memory that is not mapped so")


def get_user_u32(user: UserBuffer) -> int:
    """The first u32; raises -EFAULT."""
    if user is None or len(user) < 4:
        raise _fault("get_user")
    return int.from_bytes(user[:4], "little")


def copy_struct_from_user(ksize: int, user: UserBuffer, usize: int) -> bytearray:
    """A structure of ``ksize`` bytes from one of ``usize`` bytes in user memory.

    What user space does not have is zero. Raises -E2BIG for anything but zeros in what the kernel
    does not have, -EFAULT.
    """
    symbol = "copy_struct_from_user"
    if user is None:
        raise _fault(symbol)
    if any(user[ksize:usize]):
        raise KernelError(errno.E2BIG, symbol, f"not zero behind byte {ksize}")
    if len(user) < usize:
        raise _fault(symbol)
    return bytearray(user[: min(ksize, usize)]).ljust(ksize, b"\0")


def copy_to_user(user: UserBuffer, data: bytes | bytearray) -> None:
    """Write ``data`` at the beginning; raises -EFAULT."""
    if user is None or isinstance(user, bytes) or len(user) < len(data):
        raise _fault("copy_to_user")
    user[: len(data)] = data
