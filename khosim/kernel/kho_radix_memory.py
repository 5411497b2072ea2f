"""What a radix tree asks of the kernel it belongs to: pages for its nodes, and a way to reach them.

Serves :mod:`khosim.kernel.kho_radix`, where the kernel calls ``kho_radix_alloc_node``,
``free_page`` and ``phys_to_virt`` (``kernel/liveupdate/kexec_handover.c`` @ 7.3).
"""

from __future__ import annotations

from typing import Protocol

from khosim.kernel.arch import Arch
from khosim.machine.ram import Ram

__all__ = ("NodeMemory",)


class NodeMemory(Protocol):
    """Where tree nodes come from and how a kernel reaches them."""

    @property
    def ram(self) -> Ram:
        """The machine's memory."""

    @property
    def arch(self) -> Arch:
        """Page size and depth of the tree."""

    def kho_radix_alloc_node(self) -> int:
        """A zeroed page's physical address, or 0."""

    def kho_radix_alloc_nodes(self, nr_nodes: int) -> list[int]:
        """As so many :meth:`kho_radix_alloc_node`; fewer where one of them would fail."""

    def kho_radix_free_node(self, phys: int) -> None:
        """Give back a page that :meth:`kho_radix_alloc_node` gave."""

    def virt(self, phys: int, len_bytes: int) -> int:
        """``phys_to_virt`` and a first access: ``phys`` again, or a panic where nothing is."""

    def warn(self, message: str) -> None:
        """``WARN``: a line of the kernel log."""

    def warn_once(self, message: str, where: str) -> None:
        """``WARN_ON_ONCE``: a line of the kernel log, once for each ``where``."""

    def by(self, symbol: str) -> tuple[int, str]:
        """The writer tag of a kernel function: (generation, symbol)."""
