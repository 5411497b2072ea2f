"""What a user of KHO does where a release lacks the call that later ones have.

Scenarios speak of folios, ranges of pages and blobs, whatever the release. Before 6.18 a range is
preserved by its address and comes back block by block, as folios to be split; before 6.19 memory is
allocated and preserved in two calls, and a subtree is added by a notifier. Before 7.1 a subtree is
a device tree, so that what is to be told is wrapped into one.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from khosim.abi import fdt
from khosim.errors import KernelError

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.page import Folio

__all__ = (
    "add_subtree",
    "alloc_preserve",
    "blob_is_subtree",
    "place_of",
    "preserve_range",
    "publish",
    "restore_range",
    "subtree_room",
    "wrapped",
)

_WRAPPING_BYTES = 256
_PLACE = struct.Struct("<QQ")


def preserve_range(kernel: Kernel, pfn: int, nr_pages: int) -> None:
    """Preserve ``nr_pages`` order-0 pages from ``pfn`` on; raises the kernel's refusal."""
    if kernel.release.has("kho_preserve_pages"):
        kernel.kho_preserve_pages(pfn, nr_pages)
    else:
        shift = kernel.arch.page_shift
        kernel.kho_preserve_phys(pfn << shift, nr_pages << shift)


def restore_range(kernel: Kernel, pfn: int, nr_pages: int, owner: str) -> bool:
    """Take such a range over; whether the kernel gave it."""
    shift = kernel.arch.page_shift
    if kernel.release.has("kho_restore_pages"):
        return kernel.kho_restore_pages(pfn << shift, nr_pages) is not None
    end_pfn = pfn + nr_pages
    while pfn < end_pfn:
        folio = kernel.kho_restore_folio(pfn << shift)
        if folio is None:
            return False
        kernel.pages.split_page(folio.pfn, folio.order, owner)
        pfn += 1 << folio.order
    return True


def alloc_preserve(kernel: Kernel, size_bytes: int) -> Folio:
    """Zeroed, preserved memory; raises the kernel's refusal."""
    if kernel.release.has("kho_alloc_preserve"):
        return kernel.kho_alloc_preserve(size_bytes)
    if not size_bytes:
        raise KernelError(errno.EINVAL, "folio_alloc", "size 0")
    order = ((size_bytes - 1) >> kernel.arch.page_shift).bit_length()
    if order > kernel.arch.max_page_order:
        raise KernelError(errno.E2BIG, "folio_alloc", f"order {order}")
    folio = kernel.alloc_folio(order, owner="user", zero=True)
    try:
        kernel.kho_preserve_folio(folio)
    except KernelError:
        folio.put()
        raise
    return folio


def blob_is_subtree(kernel: Kernel) -> bool:
    """Whether a subtree can be any bytes; else it is a device tree that leads to them."""
    return bool(kernel.release.subtree_size_prop)


def subtree_room(kernel: Kernel) -> int:
    """The most bytes that one :func:`publish` can tell."""
    largest = kernel.arch.page_size << kernel.arch.max_page_order
    return largest if blob_is_subtree(kernel) else largest - _WRAPPING_BYTES


def place_of(folio: Folio) -> bytes:
    """Address and size of a folio, as a device tree tells of it."""
    return _PLACE.pack(folio.phys, folio.len_bytes)


def wrapped(kernel: Kernel, data: bytes) -> bytes:
    """The bytes of a subtree that tells ``data`` to the successor."""
    if blob_is_subtree(kernel):
        return data
    buf = bytearray(len(data) + _WRAPPING_BYTES)
    error = fdt.fdt_create(buf, len(buf))
    error |= fdt.fdt_finish_reservemap(buf)
    error |= fdt.fdt_begin_node(buf, "")
    error |= fdt.fdt_property_string(buf, "compatible", "khosim-v1")
    error |= fdt.fdt_property(buf, "data", data)
    error |= fdt.fdt_end_node(buf)
    error |= fdt.fdt_finish(buf)
    assert not error, error
    return bytes(buf[: fdt.fdt_totalsize(buf)])


def publish(kernel: Kernel, name: str, data: bytes, owner: str) -> tuple[int, bytes]:
    """Tell ``data`` to the successor under ``name``: the subtree's address, and its bytes."""
    blob = wrapped(kernel, data)
    folio = alloc_preserve(kernel, len(blob))
    folio.write(0, blob, by=owner)
    add_subtree(kernel, name, folio.phys, len(blob))
    return folio.phys, blob


def add_subtree(kernel: Kernel, name: str, phys: int, size_bytes: int) -> None:
    """Have a preserved blob found under ``name``; raises the kernel's refusal."""
    if kernel.release.finalize != "notifiers":
        kernel.kho_add_subtree(name, phys, size_bytes)
        return

    def notified(action: str) -> int:
        if action == "KEXEC_KHO_FINALIZE":
            try:
                kernel.kho_add_subtree(name, phys, size_bytes)
            except KernelError as refused:
                return -refused.errno
        return 0

    kernel.register_kho_notifier(notified)
