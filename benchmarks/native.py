"""The yardstick in C: ``native_radix.c``, compiled on the spot and called through ctypes."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ("Guest", "NativeRadix", "NoCompiler", "Walk", "build_native")

SOURCE = Path(__file__).with_name("native_radix.c")


class NoCompiler(Exception):
    """There is no C compiler, or it could not build the yardstick; the message says which."""


class Walk(NamedTuple):
    """What a walk over the finished tree saw."""

    nr_keys: int
    phys_sum: int
    """The sum of all physical addresses, modulo 2**64."""
    nr_nodes: int
    """Tables and bitmaps, one page each."""


class Guest(NamedTuple):
    """What became of a guest that was handed over folio by folio."""

    nr_folios: int
    index_sum: int
    nr_cache_nodes: int


class _WalkStruct(ctypes.Structure):
    _fields_ = (
        ("nr_keys", ctypes.c_uint64),
        ("phys_sum", ctypes.c_uint64),
        ("nr_nodes", ctypes.c_uint64),
    )


class _GuestStruct(ctypes.Structure):
    _fields_ = (
        ("nr_folios", ctypes.c_uint64),
        ("index_sum", ctypes.c_uint64),
        ("nr_cache_nodes", ctypes.c_uint64),
    )


class NativeRadix:
    """The functions of the compiled yardstick. Each builds a tree, walks it and frees it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def feed_run(self, start_pfn: int, nr_pages: int) -> Walk:
        """Add ``nr_pages`` order-0 pages from ``start_pfn`` on, one by one, then walk."""
        return self._call("feed_run", ctypes.c_uint64(start_pfn), ctypes.c_uint64(nr_pages))

    def feed_pfns(self, pfns: npt.NDArray[np.uint64]) -> Walk:
        """Add the order-0 pages ``pfns``, one by one in the given order, then walk."""
        pfns = np.ascontiguousarray(pfns, dtype=np.uint64)
        address = ctypes.c_void_p(pfns.ctypes.data)
        return self._call("feed_pfns", address, ctypes.c_size_t(pfns.size))

    def hand_over_guest(self, nr_folios: int) -> Guest:
        """The bookkeeping of a guest of order-0 folios in a live update, folio by folio."""
        guest = _GuestStruct()
        if self._library.hand_over_guest(ctypes.c_uint64(nr_folios), ctypes.byref(guest)):
            raise MemoryError("hand_over_guest: no memory, or a folio was lost")
        return Guest(guest.nr_folios, guest.index_sum, guest.nr_cache_nodes)

    def _call(self, name: str, *args: object) -> Walk:
        walk = _WalkStruct()
        if getattr(self._library, name)(*args, ctypes.byref(walk)):
            raise MemoryError(f"{name}: the native radix tree found no memory")
        return Walk(walk.nr_keys, walk.phys_sum, walk.nr_nodes)


def build_native() -> NativeRadix:
    """Compile and load the yardstick; raises :class:`NoCompiler`.

    The compiler is ``$CC`` or ``cc``, always with -O2.
    """
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(command[0]) is None:
        raise NoCompiler(f"no C compiler ({command[0]})")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "native_radix.so")
        done = subprocess.run(
            [*command, "-O2", "-shared", "-fPIC", "-o", str(target), str(SOURCE)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            why = (done.stderr or done.stdout).strip().splitlines()
            raise NoCompiler(f"{command[0]} failed: {why[0] if why else done.returncode}")
        return NativeRadix(ctypes.CDLL(str(target)))  # stays mapped when the file is gone
