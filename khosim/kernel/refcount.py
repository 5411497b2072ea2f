"""Reference counts that notice when they are wrong.

Models ``include/linux/refcount.h`` and ``lib/refcount.c:refcount_warn_saturate`` @ 7.3: a count
that was 0 or would run over sticks at a value far below 0 and stays there, with one warning of each
kind for the whole kernel. Left out: atomicity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("REFCOUNT_SATURATED", "Refcount")

REFCOUNT_SATURATED = -(1 << 30)
_INT_MAX = (1 << 31) - 1


def _int(value: int) -> int:
    # What a C int makes of a number.
    return (value & 0xFFFFFFFF ^ 1 << 31) - (1 << 31)


class Refcount:
    """``refcount_t``; ``value`` is what ``refcount_read`` returns."""

    __slots__ = ("_kernel", "value")

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.value = 0

    def __repr__(self) -> str:
        return f"Refcount({self.value})"

    def set(self, value: int) -> None:
        """``refcount_set``; the value is cut to 32 bits."""
        self.value = _int(value)

    def inc(self) -> None:
        """``refcount_inc``: warns and saturates where nobody held a reference any more."""
        old = self.value
        self.value = _int(old + 1)
        if not old:
            self._saturate("addition on 0; use-after-free.")
        elif old < 0 or self.value < 0:
            self._saturate("saturated; leaking memory.")

    def dec_and_test(self) -> bool:
        """``refcount_dec_and_test``: whether this was the last reference."""
        old = self.value
        self.value = _int(old - 1)
        if old == 1:
            return True
        if old <= 0:
            self._saturate("underflow; use-after-free.")
        return False

    def _saturate(self, why: str) -> None:
        self.value = REFCOUNT_SATURATED
        self._kernel.warn_once(f"WARNING: refcount_t: {why}", f"refcount_t: {why}")
