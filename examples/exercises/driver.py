"""Exercise 3, after lessons 3 and 5: a driver with three bugs.

A driver keeps buffers for its device over updates. It works in every demonstration. khosim's
invariants do not like it. Find the three bugs and repair them; `test_driver.py` tells, one by one,
what is wrong.
"""

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
        folio = self.kernel.alloc_folio(order=1, owner="driver", movable=True)
        self.kernel.kho_preserve_folio(folio)
        self.buffers.append(folio)
        return folio

    def remove_buffer(self) -> None:
        """The device needs the last buffer no longer."""
        self.buffers.pop().put()

    def take_over(self, addresses: list[int]) -> None:
        """In a new kernel: the predecessor's buffers, at these addresses, are this driver's."""
        for phys in addresses:
            folio = self.kernel.kho_restore_folio(phys)
            assert folio is not None
            self.buffers.append(folio)
