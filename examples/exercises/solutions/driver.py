"""A solution of exercise 3."""

from __future__ import annotations

from khosim.kernel.kernel import Kernel
from khosim.kernel.page import Folio


class Driver:
    """The buffers of a device: ``buffers`` are folios of this kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.buffers: list[Folio] = []

    def add_buffer(self) -> Folio:
        """A buffer more, for the device to use; it is preserved at once."""
        folio = self.kernel.alloc_folio(order=1, owner="driver")  # movable memory is from scratch
        self.kernel.kho_preserve_folio(folio)
        self.buffers.append(folio)
        return folio

    def remove_buffer(self) -> None:
        """The device needs the last buffer no longer."""
        folio = self.buffers.pop()
        self.kernel.kho_unpreserve_folio(folio)  # first the promise, then the page
        folio.put()

    def take_over(self, addresses: list[int]) -> None:
        """In a new kernel: the predecessor's buffers, at these addresses, are this driver's."""
        for phys in addresses:
            folio = self.kernel.kho_restore_folio(phys)
            assert folio is not None
            self.kernel.kho_preserve_folio(folio)  # each kernel promises for itself
            self.buffers.append(folio)
