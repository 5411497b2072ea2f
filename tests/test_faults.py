"""Faults between two kernels, in a call, by a device: they strike where they say."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import pytest

from khosim import KernelError, Machine
from khosim.errors import InputError, KernelPanic
from khosim.explore.hazards import fixed
from khosim.explore.kit import Stage, audit, lost_memory, regained_memory, take_range
from khosim.explore.search import replay
from khosim.explore.shrink import cause_of, shrink
from khosim.explore.tokens import Token, ledger
from khosim.explore.world import Step
from khosim.faults.between import flipped, jump_with, overwritten, stale, torn, without
from khosim.faults.calls import failing_allocation, kill, oops
from khosim.faults.device import Dma
from khosim.faults.places import places
from khosim.kernel.contig_range import alloc_contig_range, free_contig_range
from khosim.kernel.kernel import Kernel
from khosim.kernel.release import find_release

ON = "kho=on liveupdate=on"
BOOT = Step("boot", ('"64M"', ON, "7.3"))


def _kernel(cmdline: str = ON) -> Kernel:
    return Machine("64M").boot(cmdline=cmdline)


def test_places_of_a_handover() -> None:
    """Each part is found by its name: the root FDT says so itself, LUO's begin as they should."""
    kernel = _kernel(f"{ON} reserve_mem=4096:4096:a")
    session = kernel.liveupdate.create_session("vm")
    session.preserve(kernel.memfd("ram", size=8192), 1)
    found = places(kernel)
    ram = kernel.ram
    assert ram.read(found["root FDT"], 4) == b"\xd0\x0d\xfe\xed"
    assert ram.read(found["memblock"], 4) == b"\xd0\x0d\xfe\xed"
    assert ram.read(found["LUO"], 8) == b"luo-v5\0\0"
    assert {"map", "table", "scratch array", "kexec-metadata"} <= set(found)
    assert places(_kernel("kho=off")) == {}


@pytest.mark.parametrize(
    ("place", "data", "said"),
    [
        ("root FDT", "ffffffff", "is invalid"),
        ("kexec-metadata", "ffffffff", "not supported"),
        ("memblock", "ffffffff", "is incompatible"),
    ],
)
def test_a_check_that_claims_to_notice_does(place: str, data: str, said: str) -> None:
    """A broken magic or version is refused in the words that the fault announces."""
    fault = overwritten(place, 0, data)
    assert said in fault.words
    successor = jump_with(_kernel("kho=on reserve_mem=4096:4096:a"), fault)
    assert fault.has_struck
    assert not fault.spares
    assert any(said in message for message in successor.messages)


def test_a_broken_live_update_is_fatal() -> None:
    """As in Linux: a successor that cannot read LUO's state dies."""
    with pytest.raises(KernelPanic, match="incoming tree failed"):
        jump_with(_kernel(), overwritten("LUO", 0, "00000000"))


def test_stale_and_torn_bytes() -> None:
    """What was written since is lost, all of it or the second half: a subtree is not there."""
    kernel = _kernel("kho=on")
    fault = stale(kernel, "root FDT")
    blob = kernel.kho_alloc_preserve(1)
    kernel.kho_add_subtree("t", blob.phys, 1)
    successor = jump_with(kernel, fault)
    assert fault.has_struck
    with pytest.raises(KernelError, match="ENOENT"):
        successor.kho_retrieve_subtree("t")
    kernel = _kernel("kho=on")
    fault = torn(kernel, "root FDT")
    blob = kernel.kho_alloc_preserve(1)
    kernel.kho_add_subtree("t", blob.phys, 1)
    assert jump_with(kernel, fault).kho_retrieve_subtree("t") == (blob.phys, 1)
    assert fault.spares  # a tree of some hundred bytes has no second half


def test_a_bit_flips() -> None:
    """One bit, at the place that is named; a place that there is not is left alone."""
    kernel = _kernel("kho=on")
    at = places(kernel)["kexec-metadata"]
    before = kernel.ram.read(at, 64)
    successor = jump_with(kernel, flipped("kexec-metadata", 70), flipped("no such place", 0))
    after = successor.ram.read(at, 64)
    assert [(i, a ^ b) for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [
        (8, 1 << 6)
    ]


def test_memory_that_is_gone_and_back() -> None:
    """A hole where nothing was handed over spares all; the successor has that much less."""
    machine = Stage("64M")
    whole = machine.hardware.memory_map
    kernel = machine.boot(cmdline=ON)
    folio = kernel.alloc_folio(0)
    folio.write(0, b"f")
    kernel.kho_preserve_folio(folio)
    before = kernel.total_ram_pages()
    machine.next_boot(lost_memory(machine.hardware, 16 << 20, 20 << 20))
    kernel = kernel.kexec()
    assert [fault.spares for fault in machine.struck] == [True]
    assert not any(16 << 20 <= start < 20 << 20 for start, _ in machine.hardware.ram_ranges)
    assert machine.hardware.memory_map.ram_bytes == whole.ram_bytes - (4 << 20)
    restored = kernel.kho_restore_folio(folio.phys)
    assert restored is not None
    assert restored.read(0, 1) == b"f"
    assert kernel.total_ram_pages() < before
    machine.next_boot(regained_memory(whole))
    kernel.kexec()
    assert machine.hardware.memory_map == whole
    assert audit(machine) == []


def test_memory_that_was_needed() -> None:
    """Scratch that is gone spares nothing, and the fault says so."""
    machine = Stage("64M")
    kernel = machine.boot(cmdline="kho=on")
    start, size = kernel.scratch_areas()[0]
    machine.next_boot(lost_memory(machine.hardware, start, start + size))
    with suppress(KernelPanic):
        kernel.kexec()
    assert [fault.spares for fault in machine.struck] == [False]


def test_a_node_goes_with_its_memory() -> None:
    """A map without the last node's memory has no such node."""
    machine = Machine("96M", nodes=2)
    memory = machine.hardware.memory_map
    last = memory.node_ranges[-1]
    smaller = without(memory, last.start, last.end)
    assert {node.nid for node in smaller.node_ranges} == {0}
    assert smaller.end_phys == last.start


def test_a_task_dies_in_the_middle() -> None:
    """What it had done is done: the folio is there and not preserved. The kernel lives on."""
    kernel = _kernel("kho=on")
    free = kernel.pages.nr_free_pages()
    with oops(kernel, 1):
        kernel.kho_alloc_preserve(1)
        raise AssertionError("the task is dead")
    assert kernel.pages.nr_free_pages() == free - 1
    with oops(kernel, 100):
        blob = kernel.kho_alloc_preserve(1)
    kernel.kho_unpreserve_free(blob)
    assert kernel.pages.nr_free_pages() == free - 1
    with pytest.raises(InputError, match="oops: n"), oops(kernel, 0):
        pass


def test_a_failing_allocation_says_where() -> None:
    """Who was refused memory is known afterwards."""
    kernel = _kernel("kho=on")
    with pytest.raises(KernelError), failing_allocation(kernel, 1) as fault:
        kernel.kho_alloc_preserve(1)
    assert fault.where == "kho_alloc_preserve"


def test_a_device_writes_on() -> None:
    """What it wrote while kernels changed is there, and its writing is no violation."""
    machine = Stage("64M")
    kernel = machine.boot(cmdline="kho=on")
    folio = kernel.alloc_folio(0)
    kernel.kho_preserve_folio(folio)
    device = Dma(machine, folio.phys)
    kernel = kernel.kexec()
    device.stop()
    assert device.count > 1
    restored = kernel.kho_restore_folio(folio.phys)
    assert restored is not None
    assert restored.read(0, 8) == device.count.to_bytes(8, "little")
    assert audit(machine) == []


def test_a_reset_stops_devices() -> None:
    """After a cold boot nobody writes any more."""
    machine = Stage("64M")
    kernel = machine.boot(cmdline="kho=on")
    device = Dma(machine, kernel.alloc_folio(0).phys)
    machine.boot(cmdline="kho=on")
    assert machine.watchers == []
    assert device.count == 1


def test_taking_a_range() -> None:
    """alloc_contig_range takes just these pages, whatever blocks they were in, or none."""
    kernel = _kernel("kho=on")
    free = kernel.pages.nr_free_pages()
    start = kernel.alloc_pages_exact(1024)
    kernel.pages.free_range(start, start + 1024)
    assert alloc_contig_range(kernel, start + 3, 1000) == start + 3
    assert kernel.pages.nr_free_pages() == free - 1000
    assert kernel.page(start + 2).kind == "free"
    with pytest.raises(KernelError, match="EBUSY"):
        alloc_contig_range(kernel, start, 8)
    assert kernel.pages.nr_free_pages() == free - 1000
    free_contig_range(kernel, start + 3, 1000)
    assert kernel.pages.nr_free_pages() == free
    with pytest.raises(KernelError, match="EINVAL"):
        take_range(kernel, 64 << 20 >> 12, 1)


def test_a_list_that_leads_to_the_first_page() -> None:
    """A chunk whose next one lies in page 0 is refused, with all fixes and without."""
    for release in (find_release("7.3"), fixed("7.3")):
        kernel = Machine("64M").boot(release, cmdline=ON)
        session = kernel.liveupdate.create_session("vm")
        session.preserve(kernel.memfd("ram", size=1), 1)
        chunk = "/LUO/sessions[0]/files[0]/folios/chunks[0]"
        kernel = jump_with(kernel, flipped(chunk, 0))
        with pytest.raises(KernelError):
            kernel.liveupdate.retrieve_session("vm").retrieve(1)


def test_a_list_that_leads_back_ends() -> None:
    """A chunk that is its own next one: refused, and given up without going round for ever."""
    chunk = "/LUO/sessions[0]/files[0]/folios/chunks[0]"
    for release in (find_release("7.3"), fixed("7.3")):
        machine = Machine("64M")
        kernel = machine.boot(release, cmdline=ON)
        session = kernel.liveupdate.create_session("vm")
        session.preserve(kernel.memfd("ram", size=1), 1)
        machine.load_successor(kernel)
        at = places(kernel)[chunk]
        overwritten(chunk, 0, at.to_bytes(8, "little").hex()).strike(kernel)
        successor = machine.resume()
        with pytest.raises(KernelError):
            successor.liveupdate.retrieve_session("vm").retrieve(1)


def test_an_agent_is_killed() -> None:
    """The kernel closes all that it had open: nothing is handed over, nothing is left."""
    for reverse in (False, True):
        kernel = _kernel()
        free = kernel.pages.nr_free_pages()
        session = kernel.liveupdate.create_session("vm")
        ram = kernel.memfd("ram", size=8192)
        ram.write(0, b"m")
        session.preserve(ram, 1)
        kill(kernel, *([ram, session] if reverse else [session, ram]))
        assert not kernel.liveupdate.sessions.outgoing.sessions
        assert (ram.f_count, session.f_count) == (0, 0)
        left = {state.owner for state in kernel.pages.pages.columns()[2]}
        assert not any("memfd" in owner or "shmem" in owner for owner in left)
        # What stays are tables of the map, and the page for sessions to come.
        assert free - kernel.pages.nr_free_pages() < 8


def test_an_image_that_waits() -> None:
    """What is preserved after the image was loaded crosses the jump with it, as does its line."""
    machine = Stage("64M")
    kernel = machine.boot(cmdline=ON)
    with pytest.raises(KernelError, match="EINVAL"):
        machine.jump(kernel)
    machine.load_image(kernel, cmdline=f"{ON} quiet")
    folio = kernel.alloc_folio(0)
    folio.write(0, b"late")
    kernel.kho_preserve_folio(folio)
    token = Token(kernel, 7, "freeze")
    ledger(kernel)
    session = kernel.liveupdate.create_session("vm")
    session.preserve(token, 1)
    with pytest.raises(KernelError, match="EBUSY"):
        machine.jump(kernel)
    kill(kernel, token, session)
    machine.jump(kernel)
    successor = machine.resume()
    assert "quiet" in successor.cmdline.split()
    restored = successor.kho_restore_folio(folio.phys)
    assert restored is not None
    assert restored.read(0, 4) == b"late"
    assert audit(machine) == []


def test_a_token_that_cannot_be_made_again() -> None:
    """It is refused once and for all, and its page is free when the session is finished."""
    release = fixed("7.3")
    world = replay(
        [
            BOOT._replace(args=(*BOOT.args[:2], release)),
            Step("ledger", ("g0",)),
            Step("token", ("k0", "retrieve")),
            Step("create_session", ("s0", "vm")),
            Step("preserve_file", ("s0", "k0", 0)),
            Step("load_image", (ON,)),
            Step("jump"),
            Step("ledger", ("g0",)),
            Step("retrieve_session", ("s0", "vm")),
            Step("retrieve_lost", ("s0", "k0", 0)),
            Step("kill", ("",)),
        ],
        release,
    )
    assert world is not None
    assert list(world.items) == ["g0"]
    assert world.problems == []


def test_a_stray_device_is_a_scenario() -> None:
    """Who writes to what is not his breaks anything, and nothing of it is a finding."""
    steps = [
        BOOT,
        Step("alloc_folio", ("f0", 0)),
        Step("preserve_folio", ("f0",)),
        Step("stray_device", ("d0", "'table'")),
        Step("kexec", (ON,)),
    ]
    world = replay(steps)
    assert world is not None
    assert world.is_harmed
    assert world.problems == []
    assert world.machine.hardware.ram.last_writer(world.vars["d0"].phys)[1] == "device"


def test_a_late_image_becomes_a_plain_kexec() -> None:
    """A program that does not need its early image is told without."""
    line = "kho=on reserve_mem=4096:4096:a"
    steps = [
        Step("boot", ('"64M"', line, "7.3")),
        Step("load_image", ("kho=off reserve_mem=4096:4096:a",)),
        Step("jump"),
    ]
    world = replay(steps)
    assert world is not None
    shrunk = shrink(steps, cause_of(world.problems[0]), "7.3")
    assert shrunk is not None
    assert [step.kind for step in shrunk[0]] == ["boot", "kexec"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: overwritten("root FDT", 0, "zz"), "overwritten: data: 'zz' is not hexadecimal"),
        (lambda m: overwritten("root FDT", -1, "00"), "overwritten: offset: -1 is less than 0"),
        (lambda m: flipped("root FDT", -1), "flipped: bit: -1 is less than 0"),
        (lambda m: lost_memory(m.hardware, 5, 3), "lost_memory: [0x5, 0x3) is no range"),
        (lambda m: lost_memory(m.hardware, 0, 1 << 40), "there is no RAM"),
        (lambda m: jump_with(m.kernel, "torn"), "jump_with: 'torn' is no fault"),
        (lambda m: kill(m.kernel, 7), "kill: 7 is no open file"),
        (lambda m: Dma(m, -8), "Dma: phys: -8 is no address"),
    ],
)
def test_a_fault_that_cannot_be_is_one_line(call: Any, says: str) -> None:
    """What is wrong about it, before anything strikes."""
    machine = Machine("64M")
    machine.boot(cmdline=ON)
    with pytest.raises(InputError, match=re.escape(says)):
        call(machine)
    assert machine.kernel is not None
    assert machine.kernel.alive
