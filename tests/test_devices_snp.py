"""SEV-SNP: who owns a page, what firmware does for a guest, and what a host cannot do or read."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khosim.errors import HardwareFault, InputError, RmpFault
from khosim.machine.devices import Endpoint, GuestWrite, Snp, SnpStatus, Vtd
from khosim.machine.devices.cipher import scramble
from khosim.machine.hardware import Hardware
from khosim.machine.memory_map import MemoryMap

MIB = 1 << 20
BY = (0, "host")
GCTX, MEMORY, SIZE = 0x10_0000, 0x100_0000, 0x20_0000
DMA = "0000:00:03.0"


def host():
    """A machine with SNP on and firmware initialised."""
    hardware = Hardware(MemoryMap.from_size("64M"), devices=[Snp(asids=9), Endpoint(DMA)])
    hardware.devices.write_config(DMA, 4, 6, 2)
    snp = hardware.devices.snp
    snp.enable()
    assert snp.init() == SnpStatus.SUCCESS
    return hardware, snp


def launched(asid=3, gctx=GCTX, phys=MEMORY, text=b"bootloader"):
    """A host with one guest whose 2 MiB at guest address 0 were launched page by page."""
    hardware, snp = host()
    launch(hardware, snp, asid, gctx, phys, text)
    return hardware, snp


def launch(hardware, snp, asid=3, gctx=GCTX, phys=MEMORY, text=b"bootloader"):
    """What KVM does for a guest of 2 MiB."""
    hardware.ram.write(phys, text, BY)
    assert snp.rmp.rmpupdate(gctx, 4096, assigned=True, immutable=True) == 0
    assert snp.gctx_create(gctx) == SnpStatus.SUCCESS
    assert snp.launch_start(gctx) == SnpStatus.SUCCESS
    assert snp.activate(gctx, asid) == SnpStatus.SUCCESS
    given = {"assigned": True, "asid": asid, "gpa": 0, "immutable": True}
    assert snp.rmp.rmpupdate(phys, SIZE, **given) == 0
    assert snp.launch_update(gctx, phys, SIZE) == SnpStatus.SUCCESS
    assert snp.launch_finish(gctx) == SnpStatus.SUCCESS


def test_a_guest_from_creation_to_its_end() -> None:
    """The states of its context and its pages, as the firmware ABI names them."""
    hardware, snp = launched()
    rmp = snp.rmp
    assert snp.guest_status(GCTX) == (SnpStatus.SUCCESS, 2, 3)
    assert rmp.entry(GCTX >> 12).kind == "context"
    entry = rmp.entry((MEMORY >> 12) + 5)
    assert entry[:5] == ("guest-valid", True, 3, 0x5000, 4096)
    assert (entry.validated, entry.immutable) == (True, False)
    assert [run[:2] for run in rmp.runs()] == [(GCTX, GCTX + 4096), (MEMORY, MEMORY + SIZE)]
    assert rmp.rmpupdate(GCTX, 4096, assigned=False) == 2  # FAIL_PERMISSION: immutable
    assert snp.page_reclaim(GCTX) == SnpStatus.INVALID_PAGE_STATE
    assert snp.decommission(GCTX) == SnpStatus.SUCCESS
    assert snp.guest_status(GCTX)[0] == SnpStatus.INVALID_GUEST
    assert rmp.entry(GCTX >> 12).kind == "firmware"
    assert snp.page_reclaim(GCTX) == SnpStatus.SUCCESS
    assert rmp.rmpupdate(GCTX, 4096, assigned=False) == 0
    assert rmp.rmpupdate(MEMORY, SIZE, assigned=False) == 0
    assert rmp.runs() == []
    hardware.ram.write(MEMORY, b"host again", BY)


def test_the_raw_entry_is_what_linux_reads() -> None:
    """Bit by bit as struct rmpentry_raw has it: assigned 0, gpa 12.., asid 51.., validated 62."""
    _, snp = launched()
    low = int.from_bytes(snp.rmp.raw((MEMORY >> 12) + 5), "little")
    assert low == 1 | 5 << 12 | 3 << 51 | 1 << 62
    assert int.from_bytes(snp.rmp.raw(GCTX >> 12), "little") == 1 | 1 << 2
    assert snp.rmp.raw(0) == bytes(16)


def test_a_host_cannot_write_to_a_guest() -> None:
    """Every way of writing faults, at the first assigned page, and changes nothing."""
    hardware, _ = launched()
    ram = hardware.ram
    before = ram.read(MEMORY, 64)
    ways = [
        lambda: ram.write(MEMORY + 4, b"x", BY),
        lambda: ram.write(MEMORY - 2, bytearray(b"xxxx"), BY),
        lambda: ram.write(MEMORY, np.ones(64, dtype=np.uint8), BY),
        lambda: ram.write_u64(MEMORY, 1, BY),
        lambda: ram.write_u32(MEMORY, 1, BY),
        lambda: ram.zero(0, 32 * MIB, BY),
        lambda: ram.copy(0, MEMORY - 0x10_0000, 0x20_0000, BY),
        lambda: ram.writable(MEMORY, 1, BY),
        lambda: ram.writable_mv(MEMORY, 1, BY),
        lambda: ram.note_writes([7, MEMORY >> 12, 3], BY),
        lambda: ram.write(GCTX, b"x", BY),
    ]
    for way in ways:
        with pytest.raises(RmpFault, match=r"#PF\(RMP\)"):
            way()
    assert ram.read(MEMORY, 64) == before
    assert ram.last_writer(MEMORY) == (-1, "psp")
    ram.write(MEMORY - 4, b"fine", BY)
    ram.note_writes([7, 3], BY)
    with pytest.raises(HardwareFault) as found:
        ram.write_u64(MEMORY, 1, BY)
    fault = pickle.loads(pickle.dumps(found.value))
    assert (fault.phys, fault.len_bytes, fault.asid, str(fault)) == (
        MEMORY,
        8,
        3,
        f"#PF(RMP) on a write to [{MEMORY:#x}-{MEMORY + 8:#x}): page {MEMORY:#x} is guest-valid",
    )


def test_nothing_is_checked_before_snp_is_on() -> None:
    """Without SYSCFG.SNP_EN the table has no say."""
    hardware = Hardware(MemoryMap.from_size("64M"), devices=[Snp()])
    snp = hardware.devices.snp
    assert snp.init() == SnpStatus.INVALID_CONFIG
    assert snp.rmp.rmpupdate(MEMORY, 4096, assigned=True, asid=1) == 0
    hardware.ram.write(MEMORY, b"fine", BY)
    snp.enable()
    with pytest.raises(RmpFault):
        hardware.ram.write(MEMORY, b"fine", BY)


def test_memory_of_a_guest_is_ciphertext() -> None:
    """The guest reads its text; the host, another guest's key or another address do not."""
    hardware, snp = launched()
    vcpus = hardware.devices.vcpus
    maps = [(0, MEMORY, SIZE)]
    assert vcpus.read_guest(maps, 3, 0, 10) == b"bootloader"
    seen = hardware.ram.read(MEMORY, SIZE)
    assert b"bootloader" not in seen
    assert len(set(seen[:4096])) > 200
    assert vcpus.write_guest(maps, 3, 0xFFE, b"secret") == ""
    assert vcpus.read_guest(maps, 3, 0xFFE, 6) == b"secret"
    assert b"secret" not in hardware.ram.read(MEMORY, SIZE)
    assert hardware.ram.last_writer(MEMORY + 0x1000) == (-1, "guest")
    keys = {guest.key for guest in snp.guests.values()}
    in_ram = b"".join(
        hardware.ram.read(start, end - start) for start, end in hardware.ram.touched_ranges()
    )
    assert not any(key.to_bytes(8, "little") in in_ram for key in keys)


@pytest.mark.parametrize(
    ("maps", "asid", "why"),
    [
        ([(0, MEMORY, SIZE)], 4, "no key|belongs to"),
        ([(0, MEMORY + 4096, 4096)], 3, "another guest address"),
        ([(0, 0, 4096)], 3, "hypervisor"),
        ([(0, MEMORY, SIZE)], 0, "assigned"),
        ([(4096, MEMORY, SIZE)], 3, "nested page fault"),
        ([(0, 1 << 40, SIZE)], 3, "no memory"),
    ],
)
def test_a_guest_faults(maps, asid, why) -> None:
    """Remapped, borrowed or missing pages: the guest stops instead of reading them."""
    hardware, _ = launched()
    with pytest.raises(InputError, match=why):
        hardware.devices.vcpus.read_guest(maps, asid, 0, 8)


def test_device_writes_to_a_guest_are_blocked() -> None:
    """Up to the first page of a guest, and only while the IOMMU enforces it; reads pass."""
    hardware, snp = launched()
    devices = hardware.devices
    event = devices.dma(DMA, MEMORY - 2, 4, b"abcd")
    assert (event.outcome, event.runs) == ("rmp", ((MEMORY - 2, 2),))
    assert devices.dma(DMA, MEMORY, 4).outcome == "done"
    assert snp.shutdown(x86=False) == SnpStatus.SUCCESS
    assert devices.dma(DMA, MEMORY, 4, b"abcd").outcome == "done"
    with pytest.raises(RmpFault):
        hardware.ram.write(MEMORY, b"x", BY)  # a new kernel meets what the old one left
    assert snp.platform_status() == {"state": 0, "guest_count": 0, "snp_en": 1}


def test_rmpupdate_refuses() -> None:
    """Its four codes, each with the table as it was."""
    _, snp = launched()
    update = snp.rmp.rmpupdate
    before = snp.rmp.state()
    assert update(MEMORY + 1, 4096, assigned=True) == 1
    assert update(MEMORY, 4096, assigned=True, asid=10) == 1
    assert update(64 * MIB, 4096, assigned=True) == 1
    assert update(0x1000, 4096, assigned=True, page_size=2 * MIB) == 1
    assert update(0, 4096, assigned=False, asid=1) == 1
    assert update(GCTX - 4096, 8192, assigned=True) == 2
    assert update(MEMORY, SIZE, assigned=True, page_size=2 * MIB, asid=3) == 4
    assert snp.rmp.state() == before


def test_large_pages_split() -> None:
    """A page of 2 MiB is touched as a whole until PSMASH makes 512 of it."""
    _, snp = host()
    rmp = snp.rmp
    assert rmp.rmpupdate(MEMORY, SIZE, assigned=True, asid=2, gpa=SIZE, page_size=2 * MIB) == 0
    assert rmp.entry((MEMORY >> 12) + 3).page_size == 2 * MIB
    assert rmp.rmpupdate(MEMORY, 4096, assigned=False) == 4
    assert rmp.psmash(MEMORY + 4096) == 1
    assert rmp.psmash(MEMORY) == 0
    assert rmp.rmpupdate(MEMORY, 4096, assigned=False) == 0
    assert rmp.entry((MEMORY >> 12) + 3)[2:5] == (2, SIZE + 0x3000, 4096)


def test_pages_change_hands_unvalidated() -> None:
    """A guest validates what it is given; what the host touches in between is not valid."""
    _, snp = launched()
    rmp = snp.rmp
    page = MEMORY + 0x3000
    assert rmp.rmpupdate(page, 4096, assigned=True, asid=3, gpa=0x3000) == 0
    assert rmp.entry(page >> 12).kind == "guest-invalid"
    assert "another guest address" not in rmp.guest_may(3, 0x3000, page, 8)
    assert rmp.guest_may(3, 0x3000, page, 8) != ""
    assert rmp.pvalidate(3, 0x4000, page, 4096, True) != ""
    assert rmp.pvalidate(4, 0x3000, page, 4096, True) != ""
    assert rmp.pvalidate(3, 0x3000, page, 4096, True) == ""
    assert rmp.guest_may(3, 0x2000, page - 4096, 3 * 4096) == ""


def test_a_context_page_that_was_overwritten() -> None:
    """Firmware sees that the page is not what it sealed, and the guest is lost."""
    hardware, snp = launched()
    snp.rmp.enabled = False  # nothing stops the host now
    hardware.ram.write(GCTX + 100, b"oops", BY)
    assert snp.guest_status(GCTX)[0] == SnpStatus.INVALID_GUEST


@pytest.mark.parametrize(
    ("call", "status"),
    [
        (lambda snp: snp.init(), SnpStatus.INVALID_PLATFORM_STATE),
        (lambda snp: snp.gctx_create(0x50_0000), SnpStatus.INVALID_PAGE_STATE),
        (lambda snp: snp.gctx_create(GCTX + 8), SnpStatus.INVALID_ADDRESS),
        (lambda snp: snp.launch_start(GCTX), SnpStatus.INVALID_GUEST_STATE),
        (lambda snp: snp.launch_finish(GCTX), SnpStatus.INVALID_GUEST_STATE),
        (lambda snp: snp.launch_update(GCTX, MEMORY), SnpStatus.INVALID_GUEST_STATE),
        (lambda snp: snp.activate(GCTX, 4), SnpStatus.ACTIVE),
        (lambda snp: snp.activate(GCTX, 3), SnpStatus.ASID_OWNED),
        (lambda snp: snp.activate(GCTX, 10), SnpStatus.INVALID_ASID),
        (lambda snp: snp.decommission(MEMORY), SnpStatus.INVALID_GUEST),
        (lambda snp: snp.page_reclaim(MEMORY), SnpStatus.INVALID_PAGE_STATE),
        (lambda snp: snp.page_reclaim(3), SnpStatus.INVALID_ADDRESS),
    ],
)
def test_commands_that_firmware_refuses(call, status) -> None:
    """The status of the ABI, and nothing changed."""
    _, snp = launched()
    before = snp.state()
    assert call(snp) == status
    assert snp.state() == before


def test_a_guest_is_activated_after_its_launch_began() -> None:
    """SNP_ACTIVATE in the state INIT is refused."""
    _, snp = host()
    assert snp.rmp.rmpupdate(GCTX, 4096, assigned=True, immutable=True) == 0
    assert snp.gctx_create(GCTX) == SnpStatus.SUCCESS
    assert snp.activate(GCTX, 3) == SnpStatus.INVALID_GUEST_STATE
    assert snp.launch_start(GCTX, policy=0) == SnpStatus.POLICY_FAILURE
    assert snp.launch_start(GCTX) == SnpStatus.SUCCESS
    assert snp.launch_update(GCTX, MEMORY) == SnpStatus.INACTIVE
    assert snp.activate(GCTX, 3) == SnpStatus.SUCCESS
    assert snp.launch_update(GCTX, MEMORY) == SnpStatus.INVALID_PAGE_STATE


def test_an_asid_is_used_again_after_a_flush() -> None:
    """SNP_ACTIVATE and SNP_SHUTDOWN ask for DF_FLUSH after a guest with the ASID has gone."""
    hardware, snp = launched()
    snp.decommission(GCTX)
    assert snp.shutdown() == SnpStatus.DFFLUSH_REQUIRED
    assert snp.gctx_create(GCTX) == SnpStatus.SUCCESS
    assert snp.launch_start(GCTX) == SnpStatus.SUCCESS
    assert snp.activate(GCTX, 3) == SnpStatus.DFFLUSH_REQUIRED
    assert snp.df_flush() == SnpStatus.SUCCESS
    assert snp.activate(GCTX, 3) == SnpStatus.SUCCESS
    # The new guest has a new key: what the old one left is garbage to it.
    found = hardware.devices.vcpus.read_guest([(0, MEMORY, SIZE)], 3, 0, 10)
    assert found != b"bootloader"


def test_a_running_vcpu_writes_until_the_jump() -> None:
    """One write each tick, with its key; stopped at the jump, or by a fault."""
    hardware, snp = launched()
    devices = hardware.devices
    maps = [(0, MEMORY, SIZE)]
    devices.vcpus.enter("vm0/0", maps, asid=3, program=[GuestWrite(0x1000, 16, 0xAB)])
    devices.tick()
    seen = devices.vcpus.read_guest(maps, 3, 0x1000, 8)
    assert int.from_bytes(seen, "little") == 1 << 32 ^ 0xAB
    assert hardware.ram.last_writer(MEMORY + 0x1000) == (-1, "vcpu vm0/0")
    devices.at_jump()
    assert (devices.vcpus.running, devices.vcpus.stopped_by_jump) == ([], 1)
    devices.vcpus.enter("vm0/0", maps, asid=3, program=[GuestWrite(0x1000, 16)], steps=1)
    snp.rmp.rmpupdate(MEMORY + 0x1000, 4096, assigned=False)
    devices.tick()
    assert devices.vcpus.running == []
    assert [why.partition(":")[0] for _, _, why in devices.vcpus.exits] == [
        "jump",
        "RMP fault at 0x1000",
    ]


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**46),
    st.binary(max_size=40),
    st.integers(0, 40),
)
def test_scrambling_works_from_any_byte_on(key, phys, data, cut) -> None:
    """Its own inverse, and the same whether done at once or in two pieces."""
    whole = scramble(key, phys, data)
    assert scramble(key, phys, whole) == data
    head, tail = data[:cut], data[cut:]
    assert scramble(key, phys, head) + scramble(key, phys + len(head), tail) == whole


OPS = st.lists(
    st.tuples(
        st.sampled_from(["give", "take", "validate"]),
        st.integers(0, 30),
        st.integers(1, 12),
        st.integers(1, 3),
    ),
    max_size=12,
)


@given(OPS)
def test_the_table_is_what_a_list_of_pages_would_be(ops) -> None:
    """Random updates of ranges: the same entries as one record per page gives."""
    hardware = Hardware(MemoryMap.from_size("64M"), devices=[Snp(), Vtd()])
    rmp = hardware.devices.snp.rmp
    model = {}
    for what, first, count, asid in ops:
        pages = range(first, first + count)
        gpa = asid + first
        if what == "give":
            given = {"assigned": True, "asid": asid, "gpa": gpa << 12}
            assert rmp.rmpupdate(first << 12, count << 12, **given) == 0
            model |= {page: ("guest-invalid", asid, asid + page) for page in pages}
        elif what == "take":
            assert rmp.rmpupdate(first << 12, count << 12, assigned=False) == 0
            for page in pages:
                model.pop(page, None)
        else:
            may = all(model.get(page, ("", 0, 0))[1:] == (asid, asid + page) for page in pages)
            why = rmp.pvalidate(asid, gpa << 12, first << 12, count << 12, True)
            assert (why == "") == may
            if may:
                model |= {page: ("guest-valid", *model[page][1:]) for page in pages}
    for page in range(45):
        kind, asid, frame = model.get(page, ("hypervisor", 0, 0))
        entry = rmp.entry(page)
        assert (entry.kind, entry.asid, entry.gpa) == (kind, asid, frame << 12)
