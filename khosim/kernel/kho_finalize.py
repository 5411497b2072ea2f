"""Finalizing a handover, and taking that back: releases before 7.1.

Models ``kernel/kexec_handover.c`` @ 6.16 to 6.18 (``kho_finalize``, ``kho_abort``,
``kho_out_finalize_set``, the notifier chain) and ``kernel/liveupdate/kexec_handover.c`` @ 6.19 and
7.0 (``kho_finalize``, ``kho_update_memory_map``).

Up to 6.18 everything happens here, when user space writes to ``out/finalize``: the root FDT is
written from scratch, notifiers preserve their memory and append their subtrees, the bitmaps are
listed. From 6.19 on the root FDT is always valid and only its memory map is renewed, as often as
one likes. Left out: locks.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from khosim.abi import fdt
from khosim.errors import KernelError, KernelPanic, KhoSimError
from khosim.kernel.kho_chunks import KhoChunks
from khosim.kernel.kho_out import root_fdt

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("FINALIZE_NOW", "KEXEC_KHO_ABORT", "KEXEC_KHO_FINALIZE", "kho_finalize", "set_finalize")

KEXEC_KHO_FINALIZE = "KEXEC_KHO_FINALIZE"
KEXEC_KHO_ABORT = "KEXEC_KHO_ABORT"
FINALIZE_NOW = "out/finalize"
"""The debugfs file that user space writes to."""
_U64_LE = struct.Struct("<Q")


def set_finalize(kernel: Kernel, value: int) -> None:
    """``kho_out_finalize_set``: what a write of ``value`` to ``out/finalize`` does.

    Raises -EEXIST and -ENOENT where that is how things are already (to 6.18), -EINVAL for 0 (from
    6.19), and the errors of what was tried. :class:`KhoSimError` for a release without the file.
    """
    release, out = kernel.release, kernel.kho_out
    symbol = "kho_out_finalize_set"
    if not release.finalize:
        raise KhoSimError(f"Linux {release.name} has no {FINALIZE_NOW}: nothing is to be finalized")
    if not kernel.kho_enable:
        raise KernelError(errno.ENOENT, symbol, "KHO is off: there is no such file")
    if release.finalize == "refresh":
        error = kho_finalize(kernel) if value else -errno.EINVAL
    elif bool(value) == out.finalized:
        error = -errno.EEXIST if out.finalized else -errno.ENOENT
    else:
        error = _finalize(kernel) if value else _abort(kernel)
        if not error:
            out.finalized = bool(value)
            error = _update_debugfs(kernel)
    if error:
        raise KernelError(-error, symbol, f"writing {value}")


def _update_debugfs(kernel: Kernel) -> int:
    # kho_out_update_debugfs_fdt
    debugfs, phys = kernel.debugfs, kernel.kho_out.fdt_phys
    if kernel.kho_out.finalized:
        return debugfs.blob_add("out", "fdt", phys, kernel.fdt_totalsize(phys), root=True)
    debugfs.remove_all("out")
    return 0


def _chunks(kernel: Kernel) -> KhoChunks:
    tree = kernel.kho_out.tree
    if not isinstance(tree, KhoChunks):
        raise KhoSimError(f"release {kernel.release.name}: only chunks can be finalized")
    return tree


# -- 6.16 to 6.18 -------------------------------------------------------------------------------


def _finalize(kernel: Kernel) -> int:
    # kho_finalize
    tree = _chunks(kernel)
    error = _write_root(kernel)
    if kernel.trace is not None:
        kernel.emit("kho_finalize", {"nr_bitmaps": tree.nr_bitmaps}, error)
    if error:
        kernel.printk(f"KHO: Failed to convert KHO state tree: {error}")
        _abort(kernel)
    return error


def _write_root(kernel: Kernel) -> int:
    out, release = kernel.kho_out, kernel.release
    tree = _chunks(kernel)
    page_size = kernel.arch.page_size
    buf = root_fdt(kernel, "kho_finalize")
    error = fdt.fdt_create(buf, page_size)
    error |= fdt.fdt_finish_reservemap(buf)
    error |= fdt.fdt_begin_node(buf, "")
    error |= fdt.fdt_property_string(buf, "compatible", release.kho_compatible)
    failed, map_value = fdt.fdt_property_placeholder(buf, release.memory_map_prop, 8)
    error |= failed
    if error or map_value is None:
        return error
    try:
        out.preserve_folio(out.fdt_phys >> kernel.arch.page_shift, 0)
    except KernelError as refused:
        return -refused.errno
    error = _call_chain(kernel, KEXEC_KHO_FINALIZE)
    if error:
        return error
    error, first_chunk = tree.serialize()
    if error:
        return error
    tree.root = first_chunk
    map_value[:] = _U64_LE.pack(first_chunk)
    return fdt.fdt_end_node(buf) | fdt.fdt_finish(buf)


def _call_chain(kernel: Kernel, action: str) -> int:
    # blocking_notifier_call_chain: the first error ends it.
    out = kernel.kho_out
    out.is_finalizing = action == KEXEC_KHO_FINALIZE
    try:
        for notifier in list(out.notifiers):
            error = notifier(action)
            if error:
                return error
    finally:
        out.is_finalizing = False
    return 0


def _abort(kernel: Kernel) -> int:
    # kho_abort (__kho_abort): whatever was preserved, by whomever and whenever, is forgotten.
    tree = _chunks(kernel)
    if kernel.release.abort_unpreserves:
        tree.drop_all()
    if tree.root:
        tree.free_chunks(tree.root)
        tree.root = 0
    error = _call_chain(kernel, KEXEC_KHO_ABORT)
    if error:
        kernel.printk(f"KHO: Failed to abort KHO finalization: {error}")
    if kernel.trace is not None:
        kernel.emit("kho_abort", {}, error)
    return error


# -- 6.19 and 7.0 -------------------------------------------------------------------------------


def kho_finalize(kernel: Kernel) -> int:
    """``kho_finalize``: list what is preserved now, in place of an older list; 0 or an errno."""
    out, release = kernel.kho_out, kernel.release
    if not kernel.kho_enable:
        return -errno.EOPNOTSUPP
    tree = _chunks(kernel)
    error, first_chunk = tree.serialize()
    if not error:
        # kho_update_memory_map
        buf = root_fdt(kernel, "kho_update_memory_map")
        value, _ = fdt.fdt_getprop(buf, 0, release.memory_map_prop)
        if value is None:
            raise KernelPanic(
                "BUG: kernel NULL pointer dereference in kho_update_memory_map", kernel.generation
            )
        tree.free_chunks(_U64_LE.unpack(value)[0])
        value[:] = _U64_LE.pack(first_chunk)
        tree.root = first_chunk
        out.finalized = True
    if kernel.trace is not None:
        kernel.emit("kho_finalize", {"nr_bitmaps": tree.nr_bitmaps}, error)
    return error

