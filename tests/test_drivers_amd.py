"""AMD's IOMMU as a kernel drives it: device table, commands, page tables, and across a kexec."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim import InputError, KernelError, KernelPanic, Machine
from khosim.drivers.amd_iommu import AmdIommu
from khosim.drivers.core import PIECES
from khosim.drivers.page_table import AMD_FORMAT, PageTable
from khosim.drivers.vmm import GUEST_BASE, Vmm, VmmPlan, drivers_of
from khosim.explore.hosts import Act, Host
from khosim.kernel.kernel import Kernel
from khosim.machine.devices import Amd, Bridge, Endpoint
from khosim.scenario.library import load_scenario
from khosim.scenario.parse import Overrides, parse_scenario
from khosim.scenario.play import play

NIC, RID = "0000:3b:00.0", 0x3B00
PARTS = [Amd(), Bridge("0000:00:01.0", secondary=0x3B), Endpoint(NIC)]
TABLE_PAGES = 128
"""Buses 0 to 0x3b: 0x3c00 entries of 32 bytes, and the next power of two of pages."""
RW = 3 << 61


def _kernel(cmdline: str = "kho=on liveupdate=on") -> Kernel:
    return Machine("256M", devices=PARTS, checks=False).boot(cmdline=cmdline)


def _unit(kernel: Kernel) -> AmdIommu:
    unit = drivers_of(kernel).iommu_of().unit
    assert isinstance(unit, AmdIommu)
    return unit


def _register(kernel: Kernel, offset: int) -> int:
    devices = kernel.hardware.devices
    assert devices is not None
    return devices.mmio_read(0xFEB8_0000 + offset, 8)


def _entry(kernel: Kernel, rid: int = RID) -> tuple[int, ...]:
    return struct.unpack("<QQQQ", kernel.ram.read(_unit(kernel).root + 32 * rid, 32))


def _guest(kernel: Kernel) -> Vmm:
    vmm = Vmm.start(kernel, VmmPlan("vm"), kernel.memfd("memory", size="8M"))
    vmm.assign("nic", NIC)
    return vmm


# -- coming up ------------------------------------------------------------------------------------


def test_a_unit_comes_up_with_everybody_blocked() -> None:
    """Device table of a power of two of pages, valid entries without a table, both buffers on."""
    kernel = _kernel()
    root = _unit(kernel).root
    assert _register(kernel, 0x00) == root | TABLE_PAGES - 1
    assert root % (TABLE_PAGES << 12) == 0
    assert _register(kernel, 0x18) & (1 | 1 << 2 | 1 << 12) == 1 | 1 << 2 | 1 << 12
    assert {_entry(kernel, rid) for rid in (0, RID, 0x3BFF)} == {(3, 0, 0, 0)}
    assert _register(kernel, 0x08) >> 56 == _register(kernel, 0x10) >> 56 == 9
    assert _register(kernel, 0x2000) == _register(kernel, 0x2008)  # all commands are done
    devices = kernel.hardware.devices
    assert devices is not None
    devices.write_config(NIC, 4, 6, 2)
    assert devices.dma(NIC, 0x1000, 8).outcome == "fault"


def test_an_attached_function_has_an_entry_of_the_format() -> None:
    """Valid, translated, to read and to write, four levels, the domain's number."""
    kernel = _kernel()
    vmm = _guest(kernel)
    assert vmm.hwpt is not None
    top = vmm.hwpt.domain.table.top_phys
    assert _entry(kernel) == (top | 4 << 9 | RW | 3, 1, 0, 0)
    assert list(_unit(kernel).contexts()) == [(RID, 1)]
    with pytest.raises(KernelError) as refused:
        _unit(kernel).set_context(RID, vmm.hwpt.domain.table, 7)
    assert refused.value.errno == errno.EBUSY
    vmm.stop()
    assert _entry(kernel) == (3, 0, 0, 0)
    assert list(_unit(kernel).contexts()) == []


def test_what_is_detached_is_not_translated_by_a_cache() -> None:
    """The entry and the domain are flushed with commands that the unit carries out."""
    kernel = _kernel()
    vmm = _guest(kernel)
    devices = kernel.hardware.devices
    assert devices is not None
    assert devices.dma(NIC, GUEST_BASE, 8).outcome == "done"
    _unit(kernel).clear_context(RID)
    assert devices.dma(NIC, GUEST_BASE, 8).outcome == "fault"
    assert vmm.hwpt is not None
    _unit(kernel).set_context(RID, vmm.hwpt.domain.table, 1)
    assert devices.dma(NIC, GUEST_BASE, 8).outcome == "done"


@settings(max_examples=25, deadline=None)
@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 18), st.integers(1, 1200)),
        min_size=1,
        max_size=4,
    )
)
def test_page_tables_translate_as_a_dict_does(pieces: list[tuple[int, int, int]]) -> None:
    """What was mapped comes back, page by page, as the unit itself walks the tables."""
    kernel = _kernel()
    table = PageTable(kernel, format=AMD_FORMAT)
    unit, hardware = _unit(kernel), kernel.hardware.devices
    assert hardware is not None
    unit.set_context(RID, table, 5)
    model: dict[int, int] = {}
    for iova, phys, count in pieces:
        wanted = range(iova, iova + count)
        if not any(page in model for page in wanted):
            table.map(iova << 12, phys << 12, count << 12)
            model.update({page: phys + page - iova for page in wanted})
    assert hardware.iommu is not None
    edges = {(iova, iova + count) for iova, _, count in pieces}
    for page in {page for edge in edges for at in edge for page in (at - 1, at)}:
        if page >= 0:
            runs = hardware.iommu.walk(RID, page << 12, 4096, True).runs
            assert runs == (((model[page] << 12, 4096),) if page in model else ())
    for iova, _, count in pieces:
        table.unmap(iova << 12, count << 12)
    assert all(not hardware.iommu.walk(RID, page << 12, 8, True).runs for page in model)


def test_a_table_names_its_level_and_a_leaf_none() -> None:
    """2 MiB and 4 KiB leaves below four levels."""
    kernel = _kernel()
    table = PageTable(kernel, format=AMD_FORMAT)
    table.map(0, 2 << 20, 2 << 20)
    table.map(2 << 20, 0x5000, 4096, write=False)
    first = kernel.ram.read_u64(table.top_phys)
    assert first & ~((1 << 52) - 4096) == 3 << 9 | RW | 1
    at = first & (1 << 52) - 4096
    second = kernel.ram.read_u64(at)
    assert second & ~((1 << 52) - 4096) == 2 << 9 | RW | 1
    third = second & (1 << 52) - 4096
    assert kernel.ram.read_u64(third) == 2 << 20 | RW | 1
    fourth = kernel.ram.read_u64(third + 8)
    assert fourth & ~((1 << 52) - 4096) == 1 << 9 | RW | 1
    assert kernel.ram.read_u64(fourth & (1 << 52) - 4096) == 0x5000 | 1 << 61 | 1


# -- across a kexec -------------------------------------------------------------------------------


def test_a_kexec_without_live_update_turns_it_off() -> None:
    """``disable_iommus``: the next kernel begins with a table of its own."""
    kernel = _kernel()
    _guest(kernel)
    machine = kernel.host
    assert isinstance(machine, Machine)
    machine.load_successor(kernel)
    assert not _register(kernel, 0x18) & (1 | 1 << 2 | 1 << 12)
    successor = machine.resume()
    assert list(_unit(successor).contexts()) == []
    assert _unit(successor).translates


def _preserved(kernel: Kernel) -> Machine:
    vmm = _guest(kernel)
    session = kernel.liveupdate.create_session("vm")
    for token, file in enumerate(vmm.files().values()):
        session.preserve(file, token)
    machine = kernel.host
    assert isinstance(machine, Machine)
    machine.load_successor(kernel)
    return machine


def test_a_live_update_leaves_the_device_table_where_it_is() -> None:
    """On all the while, with the entry as it was; new buffers, an id that is taken stays taken."""
    kernel = _kernel()
    machine = _preserved(kernel)
    root, entry = _unit(kernel).root, _entry(kernel)
    assert _register(kernel, 0x18) & 1
    successor = machine.resume()
    assert (_unit(successor).root, _entry(successor)) == (root, entry)
    assert _unit(successor).alloc_domain_id() == 2
    assert _register(successor, 0x18) & (1 | 1 << 2 | 1 << 12) == 1 | 1 << 2 | 1 << 12


def test_the_unit_logs_nothing_into_memory_that_is_not_its_kernels() -> None:
    """Stray requests between the kernels: refused, and no event is written anywhere."""
    kernel = _kernel()
    machine = _preserved(kernel)
    devices = machine.hardware.devices
    assert devices is not None
    log, tail = _register(kernel, 0x10) & (1 << 52) - 4096, _register(kernel, 0x2018)
    before = machine.hardware.ram.read(log, 8192)
    assert devices.dma(NIC, 0x1000, 8, bytes(8)).outcome == "fault"
    assert machine.hardware.ram.read(log, 8192) == before
    assert _register(kernel, 0x2018) == tail
    successor = machine.resume()
    assert devices.dma(NIC, 0x1000, 8, bytes(8)).outcome == "fault"
    log = _register(successor, 0x10) & (1 << 52) - 4096
    assert successor.ram.read_u64(log) & 0xFFFF == RID


@pytest.mark.parametrize("what", ["the table", "its size"])
def test_a_device_table_that_is_not_there_is_fatal(what: str) -> None:
    """Also one of another size than firmware's list of devices asks for."""
    kernel = _kernel()
    vmm = _guest(kernel)
    session = kernel.liveupdate.create_session("vm")
    for token, file in enumerate(vmm.files().values()):
        session.preserve(file, token)
    iommu = drivers_of(kernel).iommu_of()
    if what == "the table":
        kernel.kho_unpreserve_pages(iommu.unit.root_value >> 12, TABLE_PAGES)
    else:
        assert iommu.flb is not None
        arrays = kernel.liveupdate.flb_get_outgoing(iommu.flb)
        at = next(iter(arrays.units.entries())) + 40  # root_table
        value = kernel.ram.read_u64(at)
        assert value == iommu.unit.root_value
        kernel.ram.write_u64(at, value + 1, (0, "test"))
        kernel.liveupdate.flb_put_outgoing(iommu.flb)
    with pytest.raises(KernelPanic, match=r"no preserved page|not expected"):
        kernel.kexec()


def test_a_message_to_a_cpu_and_a_spurious_interrupt_for_the_guest() -> None:
    """No remapping: what came in the blackout is made up for when the guest runs again."""
    host = Host("cloud-host-amd")
    assert host.play([Act(200, "nic-b", "interrupt")]) == []
    assert {done.outcome for done in host.done} == {"latched"}
    injected = host.devices.interrupts.latched
    assert len(injected) == 1
    vmm = host.guests[1].vmm
    assert vmm is not None
    assert vmm.devices["nic-b"].irqs.keys() == {0}


# -- scenarios ------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", ["", *PIECES])
def test_the_scenario_names_what_speaks(piece: str) -> None:
    """With everything nothing speaks; without a piece just what names it."""
    overrides = Overrides(without=(piece,) if piece else (), generations=2)
    scenario = load_scenario("devices-amd", overrides=overrides)
    assert len(scenario.violations) == bool(piece)
    result = play(scenario)
    assert {violation.invariant for violation in result.violations} == scenario.violations
    assert result.ok, result.failures


@pytest.mark.parametrize(
    ("value", "kinds"),
    [("true", {"Vtd"}), ("false", set()), ('"vtd"', {"Vtd"}), ('"amd"', {"Amd"})],
)
def test_a_machine_says_whose_unit_it_has(value: str, kinds: set[str]) -> None:
    """By name, or whether there is one."""
    text = f'[machine]\ndevices = [{{ name = "a" }}]\niommu = {value}\n[[generation]]\nsteps = []'
    parts = {type(part).__name__ for part in parse_scenario(text, "t").parts}
    assert parts & {"Vtd", "Amd"} == kinds


@pytest.mark.parametrize("value", ['"arm"', "3"])
def test_a_unit_of_nobody_is_refused(value: str) -> None:
    """In one line."""
    with pytest.raises(InputError, match="iommu"):
        parse_scenario(f"[machine]\niommu = {value}\n[[generation]]\nsteps = []", "t")


# -- both kinds of unit ----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["cloud-host-devices", "cloud-host-amd"])
def test_domains_have_ids_of_their_own(host: str) -> None:
    """Devices of one guest share an id, those of different guests never do, also after a kexec.

    Its successor knows the ids that are taken: the next new domain gets another.
    """
    running = Host(host)
    for _ in range(2):
        core = drivers_of(running.kernel).iommu_of()
        assert [number for _, number in sorted(core.unit.contexts())] == [1, 1, 2, 3, 3]
        assert core.unit.domain_ids == {1, 2, 3}
        running.live_update()
    unit = drivers_of(running.kernel).iommu_of().unit
    assert [unit.alloc_domain_id(), unit.alloc_domain_id()] == [4, 5]
    running.close()
