"""What the IOMMU core asks of a unit's driver, Intel's or AMD's (``struct iommu_ops``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from khosim.drivers.page_table import PageTable, PteFormat

__all__ = ("IommuUnit",)


class IommuUnit(Protocol):
    """One unit as one kernel drives it."""

    @property
    def type(self) -> int:
        """``enum iommu_type`` of the records."""

    @property
    def format(self) -> PteFormat:
        """How its page tables are written."""

    @property
    def posts_interrupts(self) -> bool:
        """Whether messages can go to a vCPU's descriptor."""

    @property
    def base(self) -> int:
        """Where its registers are."""

    @property
    def root_value(self) -> int:
        """What its root or device table register holds."""

    @property
    def irq_table(self) -> int:
        """The interrupt remapping table; 0 where there is none."""

    @property
    def domain_ids(self) -> set[int]:
        """Domain ids in use."""

    def bring_up(
        self, last_bdf: int, *, root: int = 0, irta: int = 0, domain_ids: set[int] | None = None
    ) -> None:
        """Turn it on, with the predecessor's tables where they came."""

    def restore_tables(self) -> None:
        """Take those over, or die."""

    def shutdown(self, preserved: set[int] | None, buses: set[int]) -> None:
        """Turn it off, or leave it to the requesters that are preserved."""

    def unit_tables(self) -> list[tuple[int, int]]:
        """(physical address, order) of tables of the whole unit."""

    def bus_tables(self, bus: int) -> list[tuple[int, int]]:
        """The same of one bus."""

    def alloc_domain_id(self) -> int:
        """A domain id that is free."""

    def flush(self, domain_id: int | None = None) -> None:
        """Forget what is cached, of one domain or all."""

    def set_context(self, rid: int, table: PageTable, domain_id: int) -> None:
        """A function translates through ``table``; raises -EBUSY."""

    def clear_context(self, rid: int) -> None:
        """A function is blocked."""

    def contexts(self) -> Iterator[tuple[int, int]]:
        """Requester and domain id of each function that translates."""

    def post_interrupt(self, rid: int, pi_desc: int, vector: int, index: int | None = None) -> int:
        """Interrupts of a function go to a vCPU: an entry's index. -ENOSPC, -EOPNOTSUPP."""

    def clear_irte(self, index: int) -> None:
        """Give an entry back."""
