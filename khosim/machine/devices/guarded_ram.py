"""RAM whose pages may belong to a guest: a kernel that writes to one gets a #PF(RMP).

The CPU checks the reverse map table on each write of a host; reads are not checked and give
ciphertext. Only machines with a secure processor have this kind of RAM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from khosim.machine.devices.rmp import Rmp
from khosim.machine.ram import By, Bytes, Ram

__all__ = ("GuardedRam", "guard")


class GuardedRam(Ram):
    """As :class:`Ram`; each writing call raises :class:`~khosim.errors.RmpFault` where it must.

    Devices and guests write with the methods of :class:`Ram` itself: theirs are other checks.
    """

    __slots__ = ()

    def _check(self, phys: int, len_bytes: int) -> None:
        rmp: Rmp = self.guard
        if rmp.enabled and len_bytes > 0:
            rmp.check_host_write(phys, len_bytes)

    def write(self, phys: int, data: bytes | bytearray | memoryview | Bytes, by: By) -> None:
        """As :meth:`Ram.write`, checked."""
        self._check(phys, data.nbytes if isinstance(data, np.ndarray | memoryview) else len(data))
        super().write(phys, data, by)

    def write_u64(self, phys: int, value: int, by: By) -> None:
        """As :meth:`Ram.write_u64`, checked."""
        self._check(phys, 8)
        super().write_u64(phys, value, by)

    def write_u32(self, phys: int, value: int, by: By) -> None:
        """As :meth:`Ram.write_u32`, checked."""
        self._check(phys, 4)
        super().write_u32(phys, value, by)

    def writable(self, phys: int, len_bytes: int, by: By) -> Bytes:
        """As :meth:`Ram.writable`, checked."""
        self._check(phys, len_bytes)
        return super().writable(phys, len_bytes, by)

    def writable_mv(self, phys: int, len_bytes: int, by: By) -> memoryview:
        """As :meth:`Ram.writable_mv`, checked."""
        self._check(phys, len_bytes)
        return super().writable_mv(phys, len_bytes, by)

    def note_writes(self, pfns: np.ndarray[Any, Any] | Sequence[int], by: By) -> None:
        """As :meth:`Ram.note_writes`, checked."""
        if self.guard.enabled and len(pfns):
            frames = np.unique(np.asarray(pfns))
            cuts = np.flatnonzero(np.diff(frames.astype(np.int64)) != 1) + 1
            for piece in np.split(frames, cuts):
                self._check(int(piece[0]) << self.page_shift, len(piece) << self.page_shift)
        super().note_writes(pfns, by)

    def zero(self, phys: int, len_bytes: int, by: By) -> None:
        """As :meth:`Ram.zero`, checked."""
        self._check(phys, len_bytes)
        super().zero(phys, len_bytes, by)

    def copy(self, src: int, dst: int, len_bytes: int, by: By) -> None:
        """As :meth:`Ram.copy`, checked."""
        self._check(dst, len_bytes)
        super().copy(src, dst, len_bytes, by)


def guard(ram: Ram, rmp: Rmp) -> None:
    """Make a machine's RAM one whose writes ``rmp`` checks; who holds it notices nothing."""
    ram.guard = rmp
    ram.__class__ = GuardedRam
