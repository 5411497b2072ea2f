"""What a machine keeps resident, against the bytes of RAM that were touched in it."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING

from benchmarks.harness import Context, Record, in_child, resident_bytes

if TYPE_CHECKING:
    from khosim import Machine

__all__ = ("memory",)

_GROWTH = ("1G", "16G", "256G", "1T", "16T")
_PAGES = 16384
_PAGE_BYTES = 4096


def memory(context: Context) -> Iterator[Record]:
    """A quarter of a host is one sparse guest: 64 MiB written all over it, then handed over."""
    for ram in _GROWTH:
        resident, touched = in_child(_resident_after_handover, ram, _PAGES)
        yield Record(
            name=f"memory.{ram}",
            baseline="bytes touched",
            unit="bytes",
            measured=resident,
            against=touched,
            limit=1.3,
            note=f"{_PAGES} pages written, a quarter of RAM preserved, one handover",
        )


def _resident_after_handover(ram: str, nr_pages: int) -> tuple[int, int]:
    from khosim import Machine

    # What Python and numpy load on first use is not the machine's.
    with Machine("256M", checks=False) as machine:
        _hand_over(machine, 64)
    before = resident_bytes()
    machine = Machine(ram, checks=False)
    _hand_over(machine, nr_pages)
    resident = resident_bytes() - before
    touched = sum(end - start for start, end in machine.hardware.ram.touched_ranges())
    return resident, touched


def _hand_over(machine: Machine, nr_pages: int) -> None:
    kernel = machine.boot(cmdline="kho=on")
    order = kernel.arch.max_page_order
    folio_bytes = _PAGE_BYTES << order
    nr_folios = machine.hardware.memory_map.ram_bytes // 4 // folio_bytes
    guest = kernel.alloc_folios(nr_folios, order, owner="guest")
    random = Random(0)
    content = bytes(range(256)) * 16
    pages = random.sample(range(nr_folios << order), nr_pages)
    for page in pages:
        kernel.ram.write(_page_phys(guest, order, page), content, kernel.by("guest"))
    for pfn, count in guest:
        kernel.kho_out.preserve_folio_range(pfn, count, order)
    machine.kexec(kernel)


def _page_phys(guest: list[tuple[int, int]], order: int, page: int) -> int:
    for pfn, count in guest:
        if page < count << order:
            return (pfn + page) * _PAGE_BYTES
        page -= count << order
    raise IndexError(page)
