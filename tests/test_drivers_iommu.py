"""Page tables of IOMMU domains, the VT-d unit's tables, iommufd."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim import KernelError, KernelPanic, Machine
from khosim.drivers.iommufd import IommufdFile
from khosim.drivers.page_table import PageTable
from khosim.drivers.vmm import drivers_of
from khosim.kernel.kernel import Kernel
from khosim.machine.devices import Bridge, Endpoint, Vtd

NIC, PORT = "0000:3b:00.0", "0000:00:01.0"
GIB, MIB, PAGE = 1 << 30, 1 << 20, 4096
IOVA = 1 << 40


def _kernel(ram: str = "256M") -> Kernel:
    parts = [Vtd(), Bridge(PORT, secondary=0x3B), Endpoint(NIC)]
    return Machine(ram, devices=parts, checks=False).boot(cmdline="kho=on liveupdate=on")


def _walk(kernel: Kernel, table: PageTable, iova: int) -> int | None:
    """Where an address goes, by the specification's own words, or None."""
    at = table.top_phys
    for bits in (39, 30, 21, 12):
        entry = kernel.ram.read_u64(at + 8 * (iova >> bits & 511))
        if not entry & 3:
            return None
        at = entry & ((1 << 52) - (1 << 12))
        if bits == 12 or entry & 1 << 7:
            return at + (iova & (1 << bits) - 1)
    return None


@pytest.mark.parametrize(
    ("iova", "phys", "size", "tables"),
    [
        (0, 0, PAGE, 4),
        (0, 0, 2 * MIB, 3),
        (0, 0, GIB, 2),
        (0, PAGE, 2 * MIB, 4),
        (511 * GIB, GIB, 2 * GIB, 3),
        (2 * MIB - PAGE, 2 * MIB - PAGE, 2 * MIB + 2 * PAGE, 5),
    ],
)
def test_leaves_are_as_large_as_addresses_allow(
    iova: int, phys: int, size: int, tables: int
) -> None:
    """The number of tables tells which leaves were used; both ends translate, no more."""
    kernel = _kernel()
    table = PageTable(kernel)
    table.map(iova, phys, size)
    assert len(table.pages()) == tables
    assert _walk(kernel, table, iova) == phys
    assert _walk(kernel, table, iova + size - 1) == phys + size - 1
    assert _walk(kernel, table, iova + size) is None
    free = kernel.pages.nr_free_pages()
    table.free()
    assert kernel.pages.nr_free_pages() == free + tables


PIECES = st.tuples(st.integers(0, 1100), st.integers(0, 1100), st.integers(1, 1030))


@settings(max_examples=10)
@given(pieces=st.lists(PIECES, min_size=1, max_size=5), drop=st.integers(0, 4))
def test_mapping_is_what_a_dictionary_would_be(
    pieces: list[tuple[int, int, int]], drop: int
) -> None:
    """Pages mapped one by one into a dictionary are what the tables say; so after an unmap."""
    kernel = _kernel("64M")
    table = PageTable(kernel)
    pages: dict[int, int] = {}
    mapped = []
    for first, frame, count in pieces:
        if any(page in pages for page in range(first, first + count)):
            continue
        table.map(first * PAGE, frame * PAGE, count * PAGE)
        pages.update((first + i, frame + i) for i in range(count))
        mapped.append((first, count))
    first, count = mapped[drop % len(mapped)]
    table.unmap(first * PAGE, count * PAGE)
    for page in range(first, first + count):
        del pages[page]
    for page in range(2200):
        found = _walk(kernel, table, page * PAGE)
        assert found == (pages[page] * PAGE if page in pages else None)


def test_refusals_of_a_mapping() -> None:
    """Half pages, addresses that are too large, and what is mapped already."""
    kernel = _kernel()
    table = PageTable(kernel)
    table.map(GIB, 0, 4 * MIB)
    for iova, size, name in (
        (1, PAGE, "EINVAL"),
        (0, 0, "EINVAL"),
        (1 << 48, PAGE, "ERANGE"),
        (GIB, PAGE, "EEXIST"),
        (GIB, 2 * MIB, "EEXIST"),
    ):
        with pytest.raises(KernelError, match=name):
            table.map(iova, 0, size)


def test_a_function_without_a_domain_is_blocked() -> None:
    """No context entry, no DMA; attached it goes through, detached no more."""
    kernel = _kernel()
    devices = kernel.hardware.devices
    assert devices is not None
    drivers = drivers_of(kernel)
    iommu = drivers.iommu_of()
    dev = next(dev for dev in drivers.pci.devs if str(dev.bdf) == NIC)
    drivers.pci.command(dev, 6)
    domain = iommu.alloc_domain()
    folio = kernel.alloc_folio(zero=True)
    domain.table.map(IOVA, folio.phys, PAGE)
    assert devices.dma(NIC, IOVA, 8, b"x" * 8).outcome == "fault"
    iommu.attach(domain, dev)
    with pytest.raises(KernelError, match="EBUSY"):
        iommu.attach(iommu.alloc_domain(), dev)
    assert devices.dma(NIC, IOVA, 8, b"x" * 8).outcome == "done"
    assert folio.read(0, 8) == b"x" * 8
    iommu.detach(domain, dev)
    assert devices.dma(NIC, IOVA, 8, b"y" * 8).outcome == "fault"


def _space(kernel: Kernel, name: str = "memory") -> tuple[IommufdFile, object]:
    iommufd = IommufdFile(drivers_of(kernel).iommu_of())
    hwpt = iommufd.alloc_hwpt()
    memfd = kernel.memfd(name, size="4M")
    iommufd.map_file(IOVA, memfd, 0, memfd.size)
    return iommufd, hwpt


def test_mapped_memory_is_pinned_and_unmapped_memory_is_not() -> None:
    """A truncated memfd keeps pages that a device may write to, until they are unmapped."""
    kernel = _kernel()
    free = kernel.pages.nr_free_pages()
    iommufd, _ = _space(kernel)
    memfd = iommufd.mappings[0].memfd
    assert memfd is not None
    memfd.fput()  # the mapping holds on to it
    used = free - kernel.pages.nr_free_pages()
    assert used >= 1024
    iommufd.unmap(IOVA, 4 * MIB)
    assert free - kernel.pages.nr_free_pages() == used - 1024
    with pytest.raises(KernelError, match="ENOENT"):
        iommufd.unmap(IOVA, 4 * MIB)
    iommufd.fput()
    assert kernel.pages.nr_free_pages() == free


def test_preserved_mappings_cannot_be_changed() -> None:
    """Marked and preserved: no map, no unmap; tokens are used once; unmarked is nothing to keep."""
    kernel = _kernel()
    iommufd, hwpt = _space(kernel)
    session = kernel.liveupdate.create_session("vm")
    with pytest.raises(KernelError, match="EINVAL"):
        session.preserve(iommufd, 1)
    iommufd.mark_preserve(hwpt, 7)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="EADDRINUSE"):
        iommufd.mark_preserve(iommufd.alloc_hwpt(), 7)
    session.preserve(iommufd, 1)
    for call in (
        lambda: iommufd.unmap(IOVA, 4 * MIB),
        lambda: iommufd.map_bar(0, 1 << 44, PAGE),
    ):
        with pytest.raises(KernelError, match="EBUSY"):
            call()
    session.close()
    iommufd.unmap(IOVA, 4 * MIB)


def test_a_device_needs_its_page_table_preserved_first() -> None:
    """vfio before iommufd is refused, and nothing stays behind."""
    kernel = _kernel()
    iommufd, hwpt = _space(kernel)
    iommufd.mark_preserve(hwpt, 1)  # type: ignore[arg-type]
    device = drivers_of(kernel).vfio_of().open(NIC)
    device.attach(iommufd, hwpt)  # type: ignore[arg-type]
    session = kernel.liveupdate.create_session("vm")
    with pytest.raises(KernelError, match="EINVAL"):
        session.preserve(device, 1)
    assert not device.dev.outgoing
    session.preserve(iommufd, 2)
    session.preserve(device, 1)
    with pytest.raises(KernelError, match="EBUSY"):
        device.detach()


def test_others_are_blocked_while_some_are_preserved() -> None:
    """At the jump context entries of functions that are not preserved are cleared."""
    parts = [Vtd()]
    names = ["0000:3b:00.0", "0000:3c:00.0", "0000:3c:00.1"]
    machine = Machine(
        "256M",
        devices=[
            *parts,
            Bridge("0000:00:01.0", secondary=0x3B),
            Bridge("0000:00:02.0", secondary=0x3C),
            *(Endpoint(name) for name in names),
        ],
        checks=False,
    )
    kernel = machine.boot(cmdline="kho=on liveupdate=on")
    iommufd, hwpt = _space(kernel)
    iommufd.mark_preserve(hwpt, 1)  # type: ignore[arg-type]
    session = kernel.liveupdate.create_session("vm")
    session.preserve(iommufd, 1)
    for token, name in enumerate(names, 2):
        device = drivers_of(kernel).vfio_of().open(name)
        device.attach(iommufd, hwpt)  # type: ignore[arg-type]
        device.set_master()
        if token != 3:
            session.preserve(device, token)
    kernel.kexec()
    devices = machine.hardware.devices
    assert devices is not None
    assert devices.iommu is not None
    found = [bool(devices.iommu.walk(rid, IOVA, 8, True).runs) for rid in (0x3B00, 0x3C00, 0x3C01)]
    assert found == [True, False, True]


@pytest.mark.parametrize("what", ["root", "context", "table", "array"])
def test_a_table_that_is_not_there_is_fatal(what: str) -> None:
    """A device may be using it: the successor does not go on without."""
    kernel = _kernel()
    machine = kernel.host
    assert isinstance(machine, Machine)
    iommufd, hwpt = _space(kernel)
    iommufd.mark_preserve(hwpt, 1)  # type: ignore[arg-type]
    device = drivers_of(kernel).vfio_of().open(NIC)
    device.attach(iommufd, hwpt)  # type: ignore[arg-type]
    session = kernel.liveupdate.create_session("vm")
    session.preserve(iommufd, 1)
    session.preserve(device, 2)
    iommu = drivers_of(kernel).iommu_of()
    assert iommu.flb is not None
    arrays = kernel.liveupdate.flb_get_outgoing(iommu.flb)
    phys = {
        "root": iommu.unit.root,
        "context": iommu.unit.context_table(0x3B),
        "table": iommufd.hwpts[0].domain.table.pages()[1],
        "array": arrays.domains.pages[0],
    }[what]
    kernel.liveupdate.flb_put_outgoing(iommu.flb)
    kernel.kho_unpreserve_pages(phys >> 12, 1)
    with pytest.raises(KernelPanic, match="no preserved page"):
        kernel.kexec()


def test_arrays_grow_over_pages_and_use_gaps_again() -> None:
    """More records than a page holds, one given back in the middle, all read by the successor."""
    from khosim.drivers.iommu_arrays import ObjectArray

    kernel = _kernel()
    array = ObjectArray.make(kernel, 64)
    record = (1).to_bytes(4, "little").ljust(64, b"\0")
    entries = [array.add(record) for _ in range(100)]
    assert len(array.pages) == 2
    array.delete(entries[10])
    assert len(list(array.entries())) == 99
    assert array.add(record) == entries[10]
    free = kernel.pages.nr_free_pages()
    array.free_outgoing()
    assert kernel.pages.nr_free_pages() == free + 2


def test_every_errno_is_one_of_the_kernel() -> None:
    """Without a remapping unit there is no iommufd."""
    kernel = Machine("64M", devices=[Endpoint("0000:00:03.0")], checks=False).boot()
    with pytest.raises(KernelError) as refused:
        drivers_of(kernel).iommu_of()
    assert refused.value.errno == errno.ENODEV
