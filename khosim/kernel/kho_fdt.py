"""The device trees that KHO's parts write, as functions from what is to be said to bytes.

Models the libfdt calls of ``kernel/liveupdate/kexec_handover.c`` (``kho_out_fdt_setup``,
``kho_add_subtree``) and of ``mm/memblock.c:prepare_kho_fdt`` @ 7.3. Each answers with the page as
those calls leave it, to its last byte. Machines of one shape write the same trees again and again:
the latest answers are remembered.
"""

from __future__ import annotations

import errno
import struct
from functools import lru_cache

from khosim.abi import fdt
from khosim.abi.memblock import MEMBLOCK_KHO_NODE_COMPATIBLE, RESERVE_MEM_KHO_NODE_COMPATIBLE

__all__ = ("child_props", "memblock_fdt", "new_root_fdt", "with_subtree")

_U64_LE = struct.Struct("<Q")
_SMALL_BYTES = 4096


@lru_cache(maxsize=32)
def new_root_fdt(
    page_size: int, compatible: str, map_prop: str, map_phys: int
) -> tuple[int, bytes]:
    """The root FDT before any subtree: libfdt's errors or-ed together, and the page."""
    buf = memoryview(bytearray(page_size))
    error = fdt.fdt_create(buf, page_size)
    error |= fdt.fdt_finish_reservemap(buf)
    error |= fdt.fdt_begin_node(buf, "")
    error |= fdt.fdt_property_string(buf, "compatible", compatible)
    error |= fdt.fdt_property(buf, map_prop, _U64_LE.pack(map_phys))
    error |= fdt.fdt_end_node(buf)
    error |= fdt.fdt_finish(buf)
    return error, bytes(buf)


@lru_cache(maxsize=64)
def with_subtree(
    page: bytes, name: str, props: tuple[tuple[str, int], ...], *, unwinds: bool
) -> tuple[int | None, bytes]:
    """The root FDT in ``page`` with a node ``name`` of u64 ``props``, and not packed yet.

    The first is 0; EEXIST for a name in use; ENOMEM when the page is full, or libfdt's error for
    a node that stays behind half made unless the release ``unwinds``; None for a damaged tree.
    """
    buf = memoryview(bytearray(page))
    if fdt.fdt_open_into(buf, buf, len(page)) < 0:
        return None, bytes(buf)
    error = errno.ENOMEM
    offset = fdt.fdt_add_subnode(buf, 0, name)
    if offset >= 0:
        failed = 0
        for prop, value in props:
            if failed >= 0:
                failed = fdt.fdt_setprop(buf, offset, prop, _U64_LE.pack(value))
        if failed < 0 and unwinds:
            fdt.fdt_del_node(buf, offset)
        else:
            error = -failed
    elif offset == -fdt.FDT_ERR_EXISTS:
        error = errno.EEXIST
    return error, bytes(buf)


def child_props(
    tree: memoryview, name: str, props: tuple[str, ...]
) -> tuple[int, tuple[tuple[bytes | None, int], ...]]:
    """``fdt_subnode_offset`` below the root, and ``fdt_getprop`` of each of ``props`` there.

    Each as libfdt answers, a value as bytes of its own. No props where there is no such node.
    """
    if len(tree) <= _SMALL_BYTES:
        return _known_props(bytes(tree), name, props)
    return _props(tree, name, props)


def _props(
    tree: bytes | memoryview, name: str, props: tuple[str, ...]
) -> tuple[int, tuple[tuple[bytes | None, int], ...]]:
    view = memoryview(tree)
    offset = fdt.fdt_subnode_offset(view, 0, name)
    if offset < 0:
        return offset, ()
    values: list[tuple[bytes | None, int]] = []
    for prop in props:
        value, length = fdt.fdt_getprop(view, offset, prop)
        values.append((None if value is None else bytes(value), length))
    return offset, tuple(values)


_known_props = lru_cache(maxsize=64)(_props)


@lru_cache(maxsize=32)
def memblock_fdt(
    page_size: int, regions: tuple[tuple[str, int, int], ...]
) -> tuple[int, bytes]:
    """The "memblock" subtree of ``(name, start, size)`` regions: libfdt's errors, and the page."""
    buf = memoryview(bytearray(page_size))
    error = fdt.fdt_create(buf, page_size)
    error |= fdt.fdt_finish_reservemap(buf)
    error |= fdt.fdt_begin_node(buf, "")
    error |= fdt.fdt_property_string(buf, "compatible", MEMBLOCK_KHO_NODE_COMPATIBLE)
    for name, start, size in regions:
        if error:
            break
        error |= fdt.fdt_begin_node(buf, name)
        error |= fdt.fdt_property_string(buf, "compatible", RESERVE_MEM_KHO_NODE_COMPATIBLE)
        error |= fdt.fdt_property(buf, "start", _U64_LE.pack(start))
        error |= fdt.fdt_property(buf, "size", _U64_LE.pack(size))
        error |= fdt.fdt_end_node(buf)
    error |= fdt.fdt_end_node(buf)
    error |= fdt.fdt_finish(buf)
    return error, bytes(buf)
