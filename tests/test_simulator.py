"""The front door: machines, boots, kexecs, images, and that nothing else crosses a kexec."""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from khosim import InputError, KernelError, KernelPanic, KhoSimError, Machine
from khosim.kernel.image import KernelConfig, KernelImage
from khosim.kernel.release import find_release
from khosim.machine.devices import Bridge, Endpoint, Snp, Transfer, Vtd, seeded

ROOT = Path(__file__).resolve().parent.parent
CAPTURES = Path(__file__).resolve().parent / "golden" / "captures"
MIB = 1 << 20


# -- making one -----------------------------------------------------------------------------------


def test_a_machine_from_a_size():
    """Text or bytes; one node, x86-64 and 4 KiB pages unless told otherwise."""
    machine = Machine("128M")
    assert machine.hardware.arch == "x86_64"
    assert machine.hardware.page_size == 4096
    assert machine.hardware.memory_map.ram_ranges[-1][1] == 128 * MIB - (128 << 10)
    assert Machine(128 * MIB).hardware.memory_map == machine.hardware.memory_map
    assert repr(machine) == "Machine(x86_64, 127 MiB, generation -1)"


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"ram": "lots"}, "RAM"),
        ({"ram": "1M"}, "RAM"),
        ({"allocator": "best"}, "allocator"),
        ({"page_size": 16384}, "page size"),
        ({"arch": "mips"}, "arch"),
        ({"seed": "1"}, "seed"),
    ],
)
def test_bad_machines(options, place):
    """An InputError that names the place."""
    with pytest.raises(InputError) as refused:
        Machine(**options)
    assert place.lower() in str(refused.value).lower()


def test_a_machine_from_a_capture_a_log_and_iomem():
    """The memory map and nodes that a real kernel told of."""
    path = CAPTURES / "numa4g"
    machine = Machine.from_capture(path)
    assert machine.hardware.memory_map.online_nodes == (0, 1)
    text = (path / "gen0" / "dmesg").read_text()
    assert Machine.from_dmesg(text).hardware.memory_map == machine.hardware.memory_map
    iomem = Machine.from_iomem((path / "gen0" / "iomem").read_text())
    assert iomem.hardware.memory_map.ram_bytes > 4000 * MIB
    arm = Machine.from_capture(CAPTURES / "arm64-16k")
    assert (arm.hardware.arch, arm.hardware.page_size) == ("arm64", 16384)


# -- running --------------------------------------------------------------------------------------


def test_boot_and_kexec():
    """The kernel of the moment, the generation, options carried over from boot to boot."""
    machine = Machine("128M")
    assert machine.kernel is None
    kernel = machine.boot(cmdline="kho=on reserve_mem=4K:4096:x", initrd="2M")
    assert machine.kernel is kernel
    assert (machine.generation, kernel.generation) == (0, 0)
    successor = machine.kexec(kernel)
    assert machine.kernel is successor
    assert (machine.generation, successor.generation) == (1, 1)
    assert successor.cmdline == kernel.cmdline
    assert successor.config == kernel.config
    assert successor.initrd[1] - successor.initrd[0] == 2 * MIB
    third = successor.kexec(cmdline="kho=on quiet", initrd=0)
    assert third.cmdline == "kho=on quiet"
    assert third.initrd == (0, 0)
    assert not kernel.alive
    assert not successor.alive


def test_releases_and_configurations():
    """By name, as an object with changes, or inside a configuration; unknown names are refused."""
    machine = Machine("128M")
    kernel = machine.boot("7.3", cmdline="kho=on")
    assert kernel.release.name == "7.3"
    assert kernel.config.kernel_bytes == 4 * MIB  # a small machine gets a small kernel
    other = find_release("7.3").evolve(uname="7.3.99")
    successor = kernel.kexec(release=other)
    assert successor.release.uname == "7.3.99"
    third = successor.kexec()
    assert third.release.uname == "7.3.99"
    assert third.kho_in.previous_release == "7.3.99"
    config = KernelConfig(release=other, debug=True)
    big = Machine("512M").boot(config=config)
    assert big.config == config
    with pytest.raises(InputError, match="is no release khosim knows"):
        machine.boot("2.6")
    with pytest.raises(InputError, match="no behaviour"):
        find_release("7.3").evolve(wings=2)


def test_a_refused_load_changes_nothing():
    """The kernel lives on and can try again."""
    machine = Machine("128M")
    kernel = machine.boot(cmdline="kho=on kho_scratch=16M,4M,4M")
    with pytest.raises(KernelError):
        machine.kexec(kernel, initrd="30M")
    assert machine.kernel is kernel
    assert kernel.alive
    assert machine.kexec(kernel).is_kho_boot


def test_a_panic_leaves_a_machine_without_a_kernel():
    """RAM is still there; a cold boot works."""
    machine = Machine("128M")
    kernel = machine.boot(cmdline="kho=on kho_scratch=16M,0,0")
    with pytest.raises(KernelPanic) as death:
        machine.kexec(kernel, initrd="9M")
    assert death.value.generation == 1
    assert machine.kernel is None
    again = machine.boot(cmdline="kho=on", initrd="1M")
    assert again.generation == 2
    assert not again.is_kho_boot


def test_a_kernel_without_a_machine_cannot_kexec_by_itself():
    """kexec is the machine's work; loading and jumping is the kernel's."""
    machine = Machine("64M")
    kernel = machine.boot(cmdline="kho=on")
    kernel.host = None
    with pytest.raises(KhoSimError, match="without a Machine"):
        kernel.kexec()


def test_listeners_hear_every_kernel():
    """Events of all generations, to every listener; none without listeners."""
    machine = Machine("64M")
    silent = machine.boot(cmdline="kho=on")
    assert silent.trace is None
    first, second = [], []
    machine.listen(first.append)
    kernel = machine.boot(cmdline="kho=on")
    machine.listen(second.append)
    kernel.kexec()
    assert {event.generation for event in first} == {1, 2}
    assert {event.generation for event in second} == {2}
    symbols = {event.symbol for event in first}
    assert {"kho_populate", "kho_memory_init_early", "kho_memory_init", "kho_init"} <= symbols
    assert {"kexec_file_load", "machine_kexec", "printk"} <= symbols
    assert all(isinstance(event.args, dict) for event in first)


def test_equal_seeds_make_equal_runs():
    """The adversarial allocator draws from the seed and nothing else."""

    def run(seed):
        machine = Machine("128M", allocator="adversarial", seed=seed)
        kernel = machine.boot(cmdline="kho=on")
        pfns = [kernel.alloc_folio(i % 3).pfn for i in range(20)]
        successor = kernel.kexec()
        return pfns, [successor.alloc_folio(0).pfn for _ in range(5)]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert Machine("128M", allocator="adversarial", seed=1).check() == []


def test_checks_can_be_left_out():
    """Then asking for them is an error, not an empty answer."""
    machine = Machine("64M", checks=False)
    machine.boot(cmdline="kho=on").kexec()
    with pytest.raises(KhoSimError, match="checks=False"):
        machine.check()


# -- images on disk -------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    """RAM, memory map and registers; a loaded machine has no kernel until it resumes."""
    machine = Machine("64M")
    kernel = machine.boot(cmdline="kho=on reserve_mem=4K:4096:x")
    start, _ = kernel.reserve_mem.find_by_name("x")
    kernel.ram.write(start, b"content", (0, "user"))
    machine.load_successor(kernel)
    assert machine.kernel is None
    machine.save(tmp_path / "image")
    loaded = Machine.load(tmp_path / "image")
    assert loaded.kernel is None
    assert loaded.hardware.registers == machine.hardware.registers
    assert loaded.hardware.memory_map == machine.hardware.memory_map
    successor = loaded.resume()
    assert successor.reserve_mem.find_by_name("x")[0] == start
    assert successor.ram.read(start, 7) == b"content"
    with pytest.raises(InputError):
        Machine.load(tmp_path / "nothing")


# -- nothing else crosses a kexec -----------------------------------------------------------------

DEVICES = (
    Vtd(),
    Snp(),
    Bridge("00:01.0", secondary=1),
    Endpoint("01:00.0", kind="nic", vfs=2),
    Endpoint("00:03.0"),
)

# Run in both processes. Takes a machine that is about to boot; tells all of what came of it.
DESCRIBE = '''
import hashlib

def describe(machine):
    kernel = machine.resume()
    ram = kernel.ram
    digest = hashlib.sha256()
    for start, end in ram.touched_ranges():
        for phys in range(start, min(end, ram.size_bytes), ram.page_size):
            content = ram.read(phys, min(ram.page_size, ram.size_bytes - phys))
            if any(content):
                digest.update(f"{phys:x}:".encode() + content)
    columns = lambda a: [list(map(int, c)) for c in (a.base, a.end, a.flags, a.nid)]
    return {
        "messages": kernel.messages,
        "cmdline": kernel.cmdline,
        "config": repr(kernel.config),
        "memory": columns(kernel.memblock.memory),
        "reserved": columns(kernel.memblock.reserved),
        "allocations": kernel.memblock.allocations,
        "pages": [
            [run.start_pfn, run.end_pfn, run.state.kind, run.state.order, run.state.owner]
            for run in kernel.pages.pages.runs()
        ],
        "free": [list(zone.nr_free) for zone in kernel.pages.zones],
        "scratch": kernel.scratch_areas(),
        "reserve_mem": kernel.reserve_mem.regions,
        "files": {path: kernel.debugfs.read(path).hex() for path in kernel.debugfs.files()},
        "next pages": [kernel.alloc_folio(order).pfn for order in (0, 0, 3, 9)],
        "ram": digest.hexdigest(),
        "devices": machine.hardware.devices and repr(machine.hardware.devices.state()),
    }
'''
OTHER_PROCESS = DESCRIBE + '''
import json, sys
from khosim import Machine
print(json.dumps(describe(Machine.load(sys.argv[1], allocator=sys.argv[2]))))
'''


@pytest.mark.parametrize(
    ("options", "cmdline"),
    [
        ({"ram": "64M"}, "kho=on reserve_mem=64K:4096:x"),
        ({"ram": "512M", "nodes": 2, "memoryless": [3]}, "kho=on log_buf_len=1M hugepages=3"),
        ({"ram": "256M", "arch": "arm64", "page_size": 16384}, "kho=on reserve_mem=64K:16384:x"),
        ({"ram": "64M", "devices": DEVICES}, "kho=on"),
    ],
    ids=["x86", "numa", "arm64", "devices"],
)
def test_no_python_object_crosses(tmp_path, options, cmdline):
    """A successor booted from a saved image in another process is the same, to the last byte.

    Where there are devices, they go on writing a preserved page while it boots.
    """
    machine = Machine(**options)
    kernel = machine.boot(cmdline=cmdline, kernel_size="4M", initrd="1M")
    for i in range(20):
        folio = kernel.alloc_folio(i % 4)
        folio.write(0, b"state %d" % i)
        kernel.kho_preserve_folio(folio)
    blob = kernel.kho_alloc_preserve(100)
    blob.write(0, b"blob")
    kernel.kho_add_subtree("mine", blob.phys, 100)
    machine.load_successor(kernel)
    if options.get("devices"):
        devices = machine.hardware.devices
        devices.write_config("00:03.0", 4, 6, 2)
        engine = devices.pci.named("0000:00:03.0").engine
        engine.program([Transfer(folio.phys, 512, True, 7), Transfer(folio.phys, 64, False)])
        devices.clock.schedule = seeded(3, 0.3)
    path = tmp_path / "image"
    machine.save(path)
    names: dict[str, object] = {}
    exec(DESCRIBE, names)
    here = json.loads(json.dumps(names["describe"](machine)))
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(path), "linux"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    there = json.loads(done.stdout)
    assert there.keys() == here.keys()
    for key in here:
        assert there[key] == here[key], key
    assert any("found kexec handover data" in line for line in here["messages"])
    if options.get("devices"):
        assert engine.steps > 3
        assert machine.hardware.ram.last_writer(folio.phys) == (-1, "device 0000:00:03.0")


def test_the_image_in_ram_is_what_boots():
    """Another kernel's bytes at the entry point, and that kernel comes up."""
    machine = Machine("128M")
    kernel = machine.boot(cmdline="kho=on")
    machine.load_successor(kernel)
    other = KernelConfig(
        release=find_release("7.3").evolve(uname="9.9.9"),
        kernel_bytes=4 * MIB,
        init_offset_bytes=3 * MIB,
        init_bytes=512 << 10,
        init_size_bytes=5 * MIB,
    )
    code = KernelImage.build("7.3", config=other).data[5 * 512 :]
    machine.hardware.ram.write(machine.hardware.registers["rip"], code, (9, "poke"))
    successor = machine.resume()
    assert successor.release.uname == "9.9.9"
    digest = hashlib.sha256(repr(successor.config).encode()).hexdigest()
    assert digest == hashlib.sha256(repr(other).encode()).hexdigest()


# -- what is not one machine's, or no request at all ----------------------------------------------


def test_reset_ends_the_kernel_that_ran():
    """A cold boot leaves one live kernel, not two that write into the same RAM."""
    machine = Machine("64M")
    first = machine.boot(cmdline="kho=on")
    second = machine.boot(cmdline="kho=on")
    assert not first.alive
    assert second.alive
    with pytest.raises(KhoSimError, match="switched off"):
        first.alloc_folio()


def test_kernels_and_folios_stay_with_their_machine():
    """Neither a kernel nor a folio of somebody else is taken for one's own."""
    machine, other = Machine("64M"), Machine("64M")
    kernel, stranger = machine.boot(cmdline="kho=on"), other.boot(cmdline="kho=on")
    folio = stranger.alloc_folio()
    for call in (
        kernel.kho_preserve_folio,
        kernel.kho_unpreserve_folio,
        kernel.kho_unpreserve_free,
    ):
        with pytest.raises(KhoSimError, match="belongs to"):
            call(folio)
    with pytest.raises(KhoSimError, match="does not run on this machine"):
        machine.kexec(stranger)
    assert stranger.alive
    successor = stranger.kexec()
    with pytest.raises(KhoSimError, match="belongs to"):
        successor.kho_preserve_folio(folio)


@pytest.mark.parametrize(
    ("call", "place"),
    [
        (lambda kernel: kernel.alloc_folio(-1), "order"),
        (lambda kernel: kernel.alloc_folios(3, -1), "order"),
        (lambda kernel: kernel.alloc_folio(nid=1), "nid"),
        (lambda kernel: kernel.alloc_folios(2, nid=-7), "nid"),
        (lambda kernel: kernel.kho_alloc_preserve(-1), "size_bytes"),
        (lambda kernel: kernel.kho_add_subtree("x", -1, 8), "phys"),
        (lambda kernel: kernel.kho_add_subtree("x", 4096, 1 << 64), "size_bytes"),
        (lambda kernel: kernel.kho_add_subtree("a\0b", 4096, 8), "name"),
        (lambda kernel: kernel.kho_add_subtree("\u00e9", 4096, 8), "name"),
        (lambda kernel: kernel.kho_remove_subtree(1 << 64), "phys"),
        (lambda kernel: kernel.kexec(cmdline="kho=on \u00e9"), "cmdline"),
    ],
)
def test_impossible_requests_are_refused(call, place):
    """An InputError before anything has changed."""
    machine = Machine("64M")
    kernel = machine.boot(cmdline="kho=on")
    before = (kernel.pages.nr_free_pages(), kernel.ram.read(kernel.kho_out.fdt_phys, 4096))
    with pytest.raises(InputError) as refused:
        call(kernel)
    assert refused.value.place == place
    assert (kernel.pages.nr_free_pages(), kernel.ram.read(kernel.kho_out.fdt_phys, 4096)) == before
    assert kernel.alive


@pytest.mark.parametrize("nr_pages", [0, 1025])
def test_no_pages_and_too_many_are_refused_alike(nr_pages):
    """get_order(0) is as far above the largest order as it gets."""
    kernel = Machine("64M").boot(cmdline="kho=on")
    with pytest.raises(KernelError) as refused:
        kernel.alloc_pages_exact(nr_pages)
    assert refused.value.name == "ENOMEM"


# -- freeing one ----------------------------------------------------------------------------------


def test_a_closed_machine_is_freed_at_once():
    """Machine, kernels and RAM are gone with their last use, without the garbage collector."""
    gc.disable()
    try:
        with Machine("64M") as machine:
            kernel = machine.boot(cmdline="kho=on reserve_mem=64K:4096:oops")
            folio = kernel.alloc_folio(1)
            kernel.kho_preserve_folio(folio)
            successor = machine.kexec(kernel)
            assert successor.kho_restore_folio(folio.phys) is not None
            assert machine.check() == []
            alive = [weakref.ref(part) for part in (machine, kernel, successor, kernel.ram)]
        del machine, kernel, successor, folio
        assert [part() for part in alive] == [None] * 4
    finally:
        gc.enable()


def test_huge_machines_in_a_row_need_no_close():
    """Twelve of 16 TiB do not fit the address space; those that are gone make room for the next."""
    gc.disable()
    try:
        for _ in range(12):
            kernel = Machine("16T", checks=False).boot(cmdline="kho=on")
            assert kernel.ram.read(kernel.kho_out.fdt_phys, 4) == bytes.fromhex("d00dfeed")
    finally:
        gc.enable()


def test_huge_machines_in_use_are_kept():
    """Where all of them are still needed, the next one is refused, and they go on working."""
    machines = []
    with pytest.raises(InputError, match=r"^RAM: size: the host does not map 17\d+ bytes"):
        machines.extend(Machine("16T", checks=False) for _ in range(12))
    assert len(machines) > 1
    assert [machine.boot().generation for machine in machines[:2]] == [0, 0]


def test_kernels_of_a_closed_machine_are_dead():
    """They still tell who they were and what they logged; RAM outlives them."""
    with Machine("64M", checks=False) as machine:
        kernel = machine.boot(cmdline="kho=on")
        ram = machine.hardware.ram
        phys = kernel.kho_out.fdt_phys
    assert repr(kernel) == "Kernel(generation=0, release='7.3', dead)"
    with pytest.raises(KhoSimError, match="has handed over"):
        kernel.alloc_folio()
    assert machine.kernel is None
    assert ram.read(phys, 4) == bytes.fromhex("d00dfeed")


def test_a_panic_leaves_a_with_statement():
    """What a kernel raises passes through the end of its machine."""
    with pytest.raises(InputError), Machine("64M") as machine:
        machine.boot(cmdline="x" * 3000)
