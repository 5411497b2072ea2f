"""KHO's test module: random folios, preserved, restored and compared.

Models ``lib/test_kho.c`` @ 6.16 to 7.3: ``kho_test_init``, ``kho_test_save`` and what it calls, for
as much as it preserves. Its data are a few folios of every order; a checksum and the restoring side
are left out, and so are the notifiers of 6.16 to 6.18.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.abi import fdt
from khosim.errors import KernelError
from khosim.kernel.kho_vmalloc import (
    KhoVmallocSlot,
    kho_preserve_vmalloc,
    kho_unpreserve_vmalloc,
)
from khosim.kernel.vmalloc import vfree, vmalloc

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.page import Folio
    from khosim.kernel.vmalloc import VmStruct

__all__ = ("kho_test_init",)

_KHO_TEST_FDT = "kho_test"
_ORDERS = (0, 3, 1, 9, 2)


def kho_test_init(kernel: Kernel) -> int:
    """``kho_test_init`` on a cold boot: preserve the test's data; 0 or a negative errno."""
    if kernel.release.test_kho_checks_enabled and not kernel.kho_enable:
        return 0
    folios = [kernel.alloc_folio(order, owner="kho_test") for order in _ORDERS]
    error = _preserve(kernel, folios)
    if error:
        for folio in folios:
            folio.put()
    return error


def _preserve(kernel: Kernel, folios: list[Folio]) -> int:
    # kho_test_preserve
    unwinds = kernel.release.test_kho_unwinds
    tree = kernel.alloc_folio(1, owner="kho_test")
    try:
        kernel.kho_preserve_folio(tree)
    except KernelError as refused:
        tree.put()
        return -refused.errno
    undo: list[Folio] = [tree]
    info = vmalloc(kernel, len(folios) * 8, owner="kho_test")
    slot = KhoVmallocSlot(kernel)
    is_listed = False
    try:
        if info is None:
            raise AssertionError("no memory for a list of five numbers")
        kho_preserve_vmalloc(kernel, info, slot)
        is_listed = True
        for i, folio in enumerate(folios):
            info.write(i * 8, (folio.phys | folio.order).to_bytes(8, "little"), by="kho_test")
            kernel.kho_preserve_folio(folio)
            undo.append(folio)
        kernel.kho_add_subtree(_KHO_TEST_FDT, tree.phys, _prepare_fdt(kernel, tree))
    except KernelError as refused:
        if unwinds:
            for folio in undo:
                kernel.kho_unpreserve_folio(folio)
            if is_listed:
                kho_unpreserve_vmalloc(kernel, slot)
        _give_back(kernel, info, tree)
        return -refused.errno
    return 0


def _give_back(kernel: Kernel, info: VmStruct | None, tree: Folio) -> None:
    vfree(kernel, info)
    tree.put()


def _prepare_fdt(kernel: Kernel, folio: Folio) -> int:
    # kho_test_prepare_fdt; returns its size in bytes.
    buf = kernel.ram.writable_mv(folio.phys, folio.len_bytes, kernel.by("kho_test_prepare_fdt"))
    fdt.fdt_create(buf, folio.len_bytes)
    fdt.fdt_finish_reservemap(buf)
    fdt.fdt_begin_node(buf, "")
    fdt.fdt_property_string(buf, "compatible", "kho-test-v1")
    fdt.fdt_end_node(buf)
    fdt.fdt_finish(buf)
    return fdt.fdt_totalsize(buf)
