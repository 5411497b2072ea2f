"""What the IOMMU core asks of a unit's driver, Intel's or AMD's (``struct iommu_ops``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from khosim.errors import KernelPanic

if TYPE_CHECKING:
    from khosim.drivers.page_table import PageTable, PteFormat
    from khosim.kernel.kernel import Kernel
    from khosim.machine.devices import Devices

__all__ = ("IommuUnit",)


class IommuUnit(ABC):
    """``struct intel_iommu``, ``struct amd_iommu``: one unit as one kernel drives it.

    ``base`` is the address of its registers, ``root`` its root or device table, ``domain_ids`` are
    those in use. ``type`` is the ``enum iommu_type`` of its records, ``format`` how its page tables
    are written; ``posts_interrupts`` says whether messages can go to a vCPU's descriptor, and
    ``irq_table`` is the interrupt remapping table, 0 where there is none.
    """

    __slots__ = ("base", "devices", "domain_ids", "kernel", "root")

    type: int
    format: PteFormat
    posts_interrupts: bool
    irq_table: int

    def __init__(self, kernel: Kernel, devices: Devices, base: int) -> None:
        self.kernel = kernel
        self.devices = devices
        self.base = base
        self.root = 0
        self.domain_ids: set[int] = set()

    def _alloc(self, order: int = 0) -> int:
        return self.kernel.alloc_folio(order, owner="iommu_alloc_pages", zero=True).phys

    def alloc_domain_id(self) -> int:
        """``domain_attach_iommu``, ``pdom_id_alloc``: the lowest that is free; 0 is nobody's."""
        number = 1
        while number in self.domain_ids:
            number += 1
        self.domain_ids.add(number)
        return number

    def restore_tables(self) -> None:
        """``intel_iommu_liveupdate_restore_root_table``: take its tables over, or die."""
        tables = self.unit_tables()
        for bus in range(256):
            tables += self.bus_tables(bus)
        for phys, _ in tables:
            if self.kernel.kho_restore_folio(phys) is None:
                raise KernelPanic(
                    f"kernel BUG in iommu_restore_pages: no preserved page at {phys:#x}",
                    self.kernel.generation,
                )

    # -- what each kind of unit does its own way ------------------------------------------------

    @property
    @abstractmethod
    def root_value(self) -> int:
        """What its root or device table register holds."""

    @abstractmethod
    def bring_up(
        self, last_bdf: int, *, root: int = 0, irta: int = 0, domain_ids: set[int] | None = None
    ) -> None:
        """Turn it on, with the predecessor's tables where they came."""

    @abstractmethod
    def shutdown(self, preserved: set[int] | None, buses: set[int]) -> None:
        """Turn it off, or leave it to the requesters that are preserved."""

    @abstractmethod
    def unit_tables(self) -> list[tuple[int, int]]:
        """(physical address, order) of tables of the whole unit."""

    @abstractmethod
    def bus_tables(self, bus: int) -> list[tuple[int, int]]:
        """The same of one bus."""

    @abstractmethod
    def flush(self, domain_id: int | None = None) -> None:
        """Forget what is cached, of one domain or all."""

    @abstractmethod
    def set_context(self, rid: int, table: PageTable, domain_id: int) -> None:
        """A function translates through ``table``; raises -EBUSY."""

    @abstractmethod
    def clear_context(self, rid: int) -> None:
        """A function is blocked."""

    @abstractmethod
    def contexts(self) -> Iterator[tuple[int, int]]:
        """Requester and domain id of each function that translates."""

    @abstractmethod
    def post_interrupt(self, rid: int, pi_desc: int, vector: int, index: int | None = None) -> int:
        """Interrupts of a function go to a vCPU: an entry's index. -ENOSPC, -EOPNOTSUPP."""

    @abstractmethod
    def clear_irte(self, index: int) -> None:
        """Give an entry back."""
