"""Giving a tree room to grow, and taking it back.

Models ``fdt_open_into``, ``fdt_pack`` and ``fdt_packblocks_`` of ``scripts/dtc/libfdt/fdt_rw.c``
and ``fdt_empty_tree.c`` @ 7.3. ``fdt_pack`` puts the reserve map at 0x28, 8 bytes below where
sequential write starts it.

Left out: overlap of two different buffers, which C resolves by address.
"""

from __future__ import annotations

from khosim.abi.fdt._blob import (
    FDT_END,
    FDT_LAST_COMPATIBLE_VERSION,
    FDT_LAST_SUPPORTED_VERSION,
    FDT_MAGIC,
    FDT_NOP,
    FDT_V17_SIZE,
    OFF_DT_STRINGS,
    OFF_DT_STRUCT,
    OFF_LAST_COMP_VERSION,
    OFF_MAGIC,
    OFF_MEM_RSVMAP,
    OFF_SIZE_DT_STRINGS,
    OFF_SIZE_DT_STRUCT,
    OFF_TOTALSIZE,
    OFF_VERSION,
    RSV_ENTRY,
    U32,
    Buffer,
    Header,
    WritableBuffer,
    as_view,
    header_of,
    layout_of,
    next_tag,
    ro_probe,
    to_s32,
)
from khosim.abi.fdt.errors import FDT_ERR_BADVERSION, FDT_ERR_NOSPACE, FDT_ERR_TRUNCATED
from khosim.abi.fdt.ro import count_mem_rsv
from khosim.abi.fdt.rw import blocks_misordered, rw_probe
from khosim.abi.fdt.sw import (
    fdt_begin_node,
    fdt_create,
    fdt_end_node,
    fdt_finish,
    fdt_finish_reservemap,
)

__all__ = ("fdt_create_empty_tree", "fdt_open_into", "fdt_pack")

_OFF_BOOT_CPUID_PHYS = 28
_put_u32 = U32.pack_into


def _pack_blocks(
    old: memoryview, new: memoryview, header: Header, len_rsv: int, len_struct: int
) -> int:
    """``fdt_packblocks_``: the three blocks one after the other behind the header; 0 or error."""
    len_strings = header[8]
    struct_at = FDT_V17_SIZE + len_rsv
    strings_at = struct_at + len_struct
    ends = (header[4] + len_rsv, header[2] + len_struct, header[3] + len_strings)
    if len_rsv < 0 or max(ends) > len(old) or strings_at + len_strings > len(new):
        return -FDT_ERR_TRUNCATED
    new[FDT_V17_SIZE:struct_at] = old[header[4] : header[4] + len_rsv]
    new[struct_at:strings_at] = old[header[2] : header[2] + len_struct]
    new[strings_at : strings_at + len_strings] = old[header[3] : header[3] + len_strings]
    _put_u32(new, OFF_MEM_RSVMAP, FDT_V17_SIZE)
    _put_u32(new, OFF_DT_STRUCT, struct_at)
    _put_u32(new, OFF_SIZE_DT_STRUCT, len_struct)
    _put_u32(new, OFF_DT_STRINGS, strings_at)
    _put_u32(new, OFF_SIZE_DT_STRINGS, len_strings)
    return 0


def fdt_open_into(fdt: Buffer, buf: WritableBuffer, bufsize: int) -> int:
    """Move the tree into ``bufsize`` bytes of ``buf`` so that it can grow: 0 or -FDT_ERR_*.

    ``buf`` may be the very object ``fdt``; otherwise the two must not overlap.
    """
    source = as_view(fdt)
    target = as_view(buf)
    header = header_of(source)
    if header is None:
        return -FDT_ERR_TRUNCATED
    total = ro_probe(header)
    if total < 0:
        return total
    len_rsv = (count_mem_rsv(source, header) + 1) * RSV_ENTRY.size
    if header[5] >= 17:
        len_struct = header[9]
    elif header[5] == 16:
        layout = layout_of(header)
        len_struct, tag = 0, FDT_NOP
        while tag != FDT_END:
            tag, len_struct = next_tag(source, *layout, len_struct)
        if len_struct < 0:
            return len_struct
    else:
        return -FDT_ERR_BADVERSION
    if bufsize > len(target):
        return -FDT_ERR_NOSPACE
    if blocks_misordered(header, len_rsv, len_struct):
        return _open_reordered(source, target, header, len_rsv, len_struct, bufsize, fdt is buf)
    if total > bufsize:
        return -FDT_ERR_NOSPACE
    if total > len(source):
        return -FDT_ERR_TRUNCATED
    if fdt is not buf:
        target[:total] = source[:total]
    _put_u32(target, OFF_VERSION, FDT_LAST_SUPPORTED_VERSION)
    _put_u32(target, OFF_SIZE_DT_STRUCT, len_struct)
    _put_u32(target, OFF_TOTALSIZE, bufsize)
    return 0


def _open_reordered(
    source: memoryview,
    target: memoryview,
    header: Header,
    len_rsv: int,
    len_struct: int,
    bufsize: int,
    in_place: bool,
) -> int:
    """The rest of :func:`fdt_open_into` for a tree whose blocks come in another order.

    In place, the packed copy is first built behind the old tree, and like libfdt this then takes
    ``boot_cpuid_phys`` from whatever bytes were there.
    """
    len_new = FDT_V17_SIZE + len_rsv + len_struct + header[8]
    if bufsize < to_s32(len_new):
        return -FDT_ERR_NOSPACE
    at = 0
    if in_place:
        at = header[1]
        if at + len_new > bufsize:
            return -FDT_ERR_NOSPACE
    boot_cpuid = header[7]
    err = _pack_blocks(source, target[at:], header, len_rsv, len_struct)
    if err:
        return err
    if at:
        target[:len_new] = target[at : at + len_new]
        boot_cpuid = U32.unpack_from(target, _OFF_BOOT_CPUID_PHYS)[0]
    _put_u32(target, OFF_MAGIC, FDT_MAGIC)
    _put_u32(target, OFF_TOTALSIZE, bufsize)
    _put_u32(target, OFF_VERSION, FDT_LAST_SUPPORTED_VERSION)
    _put_u32(target, OFF_LAST_COMP_VERSION, FDT_LAST_COMPATIBLE_VERSION)
    _put_u32(target, _OFF_BOOT_CPUID_PHYS, boot_cpuid)
    return 0


def fdt_pack(fdt: WritableBuffer) -> int:
    """Close the gaps between the blocks and shrink the total to what is used: 0 or -FDT_ERR_*."""
    mv = as_view(fdt)
    header = rw_probe(mv)
    if isinstance(header, int):
        return header
    len_rsv = (count_mem_rsv(mv, header) + 1) * RSV_ENTRY.size
    err = _pack_blocks(mv, mv, header, len_rsv, header[9])
    if err == 0:
        _put_u32(mv, OFF_TOTALSIZE, FDT_V17_SIZE + len_rsv + header[9] + header[8])
    return err


def fdt_create_empty_tree(buf: WritableBuffer, bufsize: int) -> int:
    """A tree with a bare root node, open for editing in ``bufsize`` bytes of ``buf``."""
    err = fdt_create(buf, bufsize)
    if err:
        return err
    err = fdt_finish_reservemap(buf)
    if err:
        return err
    err = fdt_begin_node(buf, b"")
    if err:
        return err
    err = fdt_end_node(buf)
    if err:
        return err
    err = fdt_finish(buf)
    return err or fdt_open_into(buf, buf, bufsize)
