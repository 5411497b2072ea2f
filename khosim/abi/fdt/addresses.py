"""``#address-cells``, ``#size-cells`` and ranges written in those cells.

Models ``scripts/dtc/libfdt/fdt_addresses.c`` @ 7.3, whole. On arm64 the kernel tells its successor
of the handover this way, in ``/chosen``.
"""

from __future__ import annotations

from khosim.abi.fdt._blob import U32, U32_MASK, Buffer, Name, WritableBuffer
from khosim.abi.fdt.errors import FDT_ERR_BADNCELLS, FDT_ERR_BADVALUE, FDT_ERR_NOTFOUND
from khosim.abi.fdt.props import fdt_getprop
from khosim.abi.fdt.rw import fdt_appendprop

__all__ = ("fdt_address_cells", "fdt_appendprop_addrrange", "fdt_size_cells")

_FDT_MAX_NCELLS = 4


def _cells(fdt: Buffer, nodeoffset: int, name: bytes) -> int:
    value, err = fdt_getprop(fdt, nodeoffset, name)
    if value is None:
        return err
    if err != 4:
        return -FDT_ERR_BADNCELLS
    nr_cells: int = U32.unpack_from(value)[0]
    return nr_cells if nr_cells <= _FDT_MAX_NCELLS else -FDT_ERR_BADNCELLS


def fdt_address_cells(fdt: Buffer, nodeoffset: int) -> int:
    """``#address-cells`` of a node, 2 where it has none, -FDT_ERR_BADNCELLS outside 1..4."""
    nr_cells = _cells(fdt, nodeoffset, b"#address-cells")
    if nr_cells == 0:
        return -FDT_ERR_BADNCELLS
    return 2 if nr_cells == -FDT_ERR_NOTFOUND else nr_cells


def fdt_size_cells(fdt: Buffer, nodeoffset: int) -> int:
    """``#size-cells`` of a node, 1 where it has none, -FDT_ERR_BADNCELLS outside 0..4."""
    nr_cells = _cells(fdt, nodeoffset, b"#size-cells")
    return 1 if nr_cells == -FDT_ERR_NOTFOUND else nr_cells


def fdt_appendprop_addrrange(
    fdt: WritableBuffer, parent: int, nodeoffset: int, name: Name, addr: int, size: int
) -> int:
    """Append ``<addr size>`` to a property, in cells as ``parent`` prescribes: 0 or -FDT_ERR_*.

    -FDT_ERR_BADVALUE where a single cell cannot hold the value or the end of the range.
    """
    nr_addr = fdt_address_cells(fdt, parent)
    if nr_addr < 0:
        return nr_addr
    nr_size = fdt_size_cells(fdt, parent)
    if nr_size < 0:
        return nr_size
    if nr_addr == 1 and (addr > U32_MASK or U32_MASK + 1 - addr < size):
        return -FDT_ERR_BADVALUE
    if nr_addr > 2:
        return -FDT_ERR_BADNCELLS
    if nr_size == 1 and size > U32_MASK:
        return -FDT_ERR_BADVALUE
    if nr_size not in (1, 2):
        return -FDT_ERR_BADNCELLS
    value = addr.to_bytes(4 * nr_addr, "big") + size.to_bytes(4 * nr_size, "big")
    return fdt_appendprop(fdt, nodeoffset, name, value)
