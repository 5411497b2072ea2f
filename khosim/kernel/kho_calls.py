"""The calls of KHO that its users make, on a kernel.

Models the exported functions of ``kernel/liveupdate/kexec_handover.c`` @ 7.3 under their names;
:mod:`~khosim.kernel.kho_out`, :mod:`~khosim.kernel.kho_in` and :mod:`~khosim.kernel.kho` do the
work. Each refuses on a kernel that has jumped, and where the release has no such function. Left
out: ``kho_preserve_vmalloc`` and friends.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, cast

from khosim.errors import InputError, KernelError, KhoSimError
from khosim.kernel.page import Folio
from khosim.kernel.page_map import KHO_PAGE_MAGIC

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.kho_debugfs import KhoDebugfs
    from khosim.kernel.kho_in import KhoIn
    from khosim.kernel.kho_out import KhoNotifier, KhoOut
    from khosim.kernel.kho_radix import Pfns
    from khosim.kernel.release import Release

__all__ = ("KhoCalls",)


def _check_u64(what: str, value: int) -> None:
    if not 0 <= value < 1 << 64:
        raise InputError(what, f"{value} does not fit into 64 bits")


class KhoCalls:
    """KHO as its users see it; a base of :class:`~khosim.kernel.kernel.Kernel`."""

    __slots__ = ()

    alive: bool
    debugfs: KhoDebugfs
    generation: int
    kho_enable: bool
    kho_in: KhoIn
    kho_out: KhoOut
    release: Release

    def check_call(self, function: str) -> None:
        """Raise where ``function`` cannot be called: on a dead kernel, or if there is none."""
        self.check_alive()
        self.release.require(function)

    def check_alive(self) -> None:
        """Raise where a user holds on to a kernel that has jumped or died."""
        if not self.alive:
            raise KhoSimError(
                f"generation {self.generation} has handed over or was switched off: "
                "ask its successor instead"
            )

    def _check_own(self, folio: Folio) -> None:
        if not self.alive:
            self.check_alive()
        if folio.kernel is not self:
            raise KhoSimError(f"{folio!r} belongs to {folio.kernel!r}: only bytes cross a kexec")

    @property
    def kho_page_magic(self) -> int:
        """What marks ``page->private`` of a preserved page: a number, or 0 before 6.18."""
        return KHO_PAGE_MAGIC if self.release.page_magic else 0

    @property
    def is_kho_boot(self) -> bool:
        """``is_kho_boot``: whether this kernel took a handover over."""
        return bool(self.kho_in.fdt_phys)

    def finalize(self) -> None:
        """What user space does before it loads an image: write 1 to ``out/finalize``.

        Nothing where KHO is off, where there is no such file, and where a second time is refused.
        """
        self.check_alive()
        release = self.release
        if not release.finalize or not self.kho_enable:
            return
        if release.finalize == "refresh" or not self.kho_out.finalized:
            self.debugfs.write("out/finalize", 1)

    def kho_preserve_folio(self, folio: Folio) -> None:
        """``kho_preserve_folio``; see :meth:`KhoOut.preserve_folio`."""
        self._check_own(folio)
        self.kho_out.preserve_folio(folio.pfn, folio.order)

    def kho_preserve_folios(self, pfns: Pfns, order: int = 0) -> None:
        """Many folios of one order at once; see :meth:`KhoOut.preserve_folios`."""
        self.check_alive()
        self.kho_out.preserve_folios(pfns, order)

    def kho_preserve_phys(self, phys: int, size_bytes: int) -> None:
        """``kho_preserve_phys`` (6.16 and 6.17); see :meth:`KhoOut.preserve_phys`."""
        self.check_call("kho_preserve_phys")
        self.kho_out.preserve_phys(phys, size_bytes)

    def register_kho_notifier(self, notifier: KhoNotifier) -> None:
        """``register_kho_notifier`` (to 6.18): ``notifier`` is called when KHO is finalized.

        It gets "KEXEC_KHO_FINALIZE" or "KEXEC_KHO_ABORT" and returns 0 or a negative errno.
        """
        self.check_call("register_kho_notifier")
        self.kho_out.notifiers.append(notifier)

    def unregister_kho_notifier(self, notifier: KhoNotifier) -> None:
        """``unregister_kho_notifier``; raises -ENOENT for one that is not registered."""
        self.check_call("register_kho_notifier")
        if notifier not in self.kho_out.notifiers:
            raise KernelError(errno.ENOENT, "unregister_kho_notifier", "not registered")
        self.kho_out.notifiers.remove(notifier)

    def kho_unpreserve_folio(self, folio: Folio) -> None:
        """``kho_unpreserve_folio``; see :meth:`KhoOut.unpreserve_folio`."""
        self.check_call("kho_unpreserve_folio")
        self._check_own(folio)
        self.kho_out.unpreserve_folio(folio.pfn, folio.order)

    def kho_preserve_pages(self, pfn: int, nr_pages: int) -> None:
        """``kho_preserve_pages``; see :meth:`KhoOut.preserve_pages`."""
        self.check_call("kho_preserve_pages")
        self.kho_out.preserve_pages(pfn, nr_pages)

    def kho_unpreserve_pages(self, pfn: int, nr_pages: int) -> None:
        """``kho_unpreserve_pages``; see :meth:`KhoOut.unpreserve_pages`."""
        self.check_call("kho_unpreserve_pages")
        self.kho_out.unpreserve_pages(pfn, nr_pages)

    def kho_alloc_preserve(self, size_bytes: int) -> Folio:
        """``kho_alloc_preserve``; see :meth:`KhoOut.alloc_preserve`."""
        self.check_call("kho_alloc_preserve")
        _check_u64("size_bytes", size_bytes)
        return self.kho_out.alloc_preserve(size_bytes)

    def kho_unpreserve_free(self, folio: Folio) -> None:
        """``kho_unpreserve_free``; see :meth:`KhoOut.unpreserve_free`."""
        self.check_call("kho_unpreserve_free")
        self._check_own(folio)
        self.kho_out.unpreserve_free(folio)

    def kho_add_subtree(self, name: str, phys: int, size_bytes: int) -> None:
        """``kho_add_subtree``; see :meth:`KhoOut.add_subtree`."""
        self.check_alive()
        _check_u64("phys", phys)
        _check_u64("size_bytes", size_bytes)
        if not name.isascii() or "\0" in name:
            raise InputError("name", f"{name!r} is not ASCII text without NUL")
        self.kho_out.add_subtree(name, phys, size_bytes)

    def kho_remove_subtree(self, phys: int) -> None:
        """``kho_remove_subtree``; see :meth:`KhoOut.remove_subtree`."""
        self.check_call("kho_remove_subtree")
        _check_u64("phys", phys)
        self.kho_out.remove_subtree(phys)

    def kho_retrieve_subtree(self, name: str) -> tuple[int, int]:
        """``kho_retrieve_subtree``; see :meth:`KhoIn.retrieve_subtree`."""
        self.check_alive()
        return self.kho_in.retrieve_subtree(name)

    def kho_restore_folio(self, phys: int) -> Folio | None:
        """``kho_restore_folio``: the folio at ``phys``, or None where the kernel returns NULL."""
        self.check_alive()
        restored = self.kho_in.restore_folio(phys)
        return None if restored is None else Folio(cast("Kernel", self), *restored)

    def kho_restore_pages(self, phys: int, nr_pages: int) -> int | None:
        """``kho_restore_pages``; see :meth:`KhoIn.restore_pages`."""
        self.check_call("kho_restore_pages")
        return self.kho_in.restore_pages(phys, nr_pages)

    def kho_restore_free(self, phys: int) -> None:
        """``kho_restore_free``; see :meth:`KhoIn.restore_free`."""
        self.check_call("kho_restore_free")
        self.kho_in.restore_free(phys)
