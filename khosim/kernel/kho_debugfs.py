"""What user space sees of KHO under ``/sys/kernel/debug/kho``.

Models ``kernel/liveupdate/kexec_handover_debugfs.c`` @ 7.3 with its quirks: a blob's size is fixed
when its file is made, so ``out/fdt`` stays cut to its size at boot while the FDT grows, and a
kernel that booted through KHO has no ``out/fdt`` at all.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from khosim.abi import fdt
from khosim.errors import KernelError
from khosim.kernel.page_map import INCOMING

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("KhoDebugfs",)

_NAME_MAX = 255
_MAX_RW_COUNT = 0x7FFFF000
"""What one ``read`` gives at most."""


def _waits(kernel: Kernel, phys: int) -> bool:
    # Whether the page is still to be restored; no kernel asks that yet.
    run = kernel.pages.pages.find(phys >> kernel.arch.page_shift)
    return run is not None and run.state.kind == INCOMING


class KhoDebugfs:
    """The files of one kernel; ``read`` answers with what their bytes in RAM are now."""

    __slots__ = ("_blobs", "_kernel", "_open")

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._blobs: dict[str, tuple[int, int]] = {}
        self._open = False

    def open(self) -> int:
        """``kho_debugfs_init`` and ``kho_out_debugfs_init``: 0, -ENOENT with ``debugfs=off``."""
        is_on = True
        for name, value in self._kernel.options.words:
            if name == "debugfs" and value in ("on", "off", "no-mount"):
                is_on = value == "on"
        self._open = is_on
        return 0 if is_on else -errno.ENOENT

    def blob_add(
        self, side: str, name: str, phys: int, size_bytes: int, *, root: bool = False
    ) -> int:
        """``kho_debugfs_blob_add``: 0, or the negative errno for a name that no file can have.

        The root FDT (``root``) lies beside the folder ``sub_fdts`` of all others.
        """
        path = f"{side}/{name}" if root else f"{side}/sub_fdts/{name}"
        if not self._open:
            return 0  # no kernel comes here yet
        if name in ("", ".", "..") or "/" in name:
            return -errno.EACCES
        if len(name) > _NAME_MAX:
            return -errno.ENAMETOOLONG
        if path in self._blobs:
            self._kernel.printk(f"debugfs: '{name}' already exists in '{path.split('/')[-2]}'")
            return -errno.EEXIST
        self._blobs[path] = (phys, size_bytes)
        return 0

    def blob_remove(self, side: str, phys: int) -> None:
        """``kho_debugfs_blob_remove``: the file of the blob at ``phys``."""
        for path, (blob_phys, _) in reversed(self._blobs.items()):  # the newest one first
            if path.startswith(f"{side}/") and blob_phys == phys:
                del self._blobs[path]
                return

    def restored(self, phys: int) -> None:
        """The blob at ``phys`` is its owner's again; no kernel has this yet."""
        if self._kernel.release.fix_debugfs_in:
            self.blob_remove("in", phys)

    def remove_all(self, side: str) -> None:
        """``kho_out_update_debugfs_fdt`` after an abort: the files of all blobs of a side."""
        self._blobs = {
            path: blob for path, blob in self._blobs.items() if not path.startswith(f"{side}/")
        }

    def in_init(self, tree: memoryview) -> None:
        """``kho_in_debugfs_init``: one file per subtree of the predecessor that is sound."""
        kernel = self._kernel
        release = kernel.release
        fdt_phys = kernel.kho_in.fdt_phys
        self.blob_add("in", "fdt", fdt_phys, fdt.fdt_totalsize(tree), root=True)
        child = fdt.fdt_first_subnode(tree, 0)
        while child >= 0:
            raw, _ = fdt.fdt_get_name(tree, child)
            name = bytes(raw or b"").decode("ascii", "backslashreplace")
            phys, length = fdt.fdt_getprop(tree, child, release.subtree_phys_prop)
            size, size_length = self._size_of(tree, child, phys)
            if phys is not None and length != 8:
                kernel.printk(
                    f"KHO: node {name} prop {release.subtree_phys_prop} has invalid length: "
                    f"{length}"
                )
            elif phys is not None and (size is None or size_length != 8):
                kernel.printk(
                    f"KHO: node {name} missing or invalid {release.subtree_size_prop} property"
                )
            elif phys is not None and size is not None:
                where = struct.unpack("<Q", phys)[0], struct.unpack("<Q", size)[0]
                is_gone = release.fix_debugfs_in and not _waits(kernel, where[0])
                error = 0 if is_gone else self.blob_add("in", name, *where)
                if error:
                    kernel.printk(
                        f"KHO: failed to add blob {name} to debugfs: -{errno.errorcode[-error]}"
                    )
            child = fdt.fdt_next_subnode(tree, child)

    def _size_of(
        self, tree: memoryview, child: int, phys: memoryview | None
    ) -> tuple[memoryview | bytes | None, int]:
        # The size property, or where there is none fdt_totalsize of the blob.
        kernel = self._kernel
        if kernel.release.subtree_size_prop and not kernel.release.debugfs_sizes_by_totalsize:
            return fdt.fdt_getprop(tree, child, kernel.release.subtree_size_prop)
        if phys is None or len(phys) != 8:
            return None, 0
        at = kernel.virt(struct.unpack("<Q", phys)[0], 8)
        return struct.pack("<Q", kernel.fdt_totalsize(at)), 8

    def files(self) -> list[str]:
        """Paths below ``kho/``, sorted; empty while KHO is off."""
        if not self._open:
            return []
        finalize = ["out/finalize"] if self._kernel.release.finalize else []
        return sorted([*finalize, "out/scratch_len", "out/scratch_phys", *self._blobs])

    def blob(self, path: str) -> tuple[int, int] | None:
        """Address and size in bytes of what a file shows; None for one that shows no blob."""
        return self._blobs.get(path)

    def write(self, path: str, value: int) -> None:
        """Write a number to a file; ``out/finalize`` is the only one that can be written.

        Raises what :func:`~khosim.kernel.kho_finalize.set_finalize` does.
        """
        from khosim.kernel.kho_finalize import set_finalize

        if path != "out/finalize":
            raise KernelError(errno.EACCES, "debugfs", f"{path} is read-only")
        set_finalize(self._kernel, value)

    def read(self, path: str, len_bytes: int = _MAX_RW_COUNT) -> bytes:
        """The first ``len_bytes`` of a file; ``KeyError`` for one that :meth:`files` does not list.

        A blob whose address or size lies leads out of the direct map: the reader takes the fault,
        a :class:`~khosim.errors.KernelPanic`.
        """
        kernel = self._kernel
        if path in ("out/scratch_phys", "out/scratch_len") and self._open:
            column = 0 if path.endswith("phys") else 1
            return "".join(f"{area[column]:#x}\n" for area in kernel.scratch_areas()).encode()
        if path == "out/finalize" and path in self.files():
            return b"%d\n" % kernel.kho_out.finalized
        phys, size_bytes = self._blobs[path]
        if path == "out/fdt" and kernel.release.fix_debugfs_out:
            size_bytes = kernel.fdt_totalsize(phys)
        size_bytes = min(size_bytes, len_bytes)
        if not size_bytes:
            return b""
        return kernel.ram.read(kernel.virt(phys, size_bytes), size_bytes)
