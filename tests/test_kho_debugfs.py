"""/sys/kernel/debug/kho as the kernel shows it, quirks included."""

from __future__ import annotations

import struct

import pytest

from khosim import KernelPanic, Machine
from khosim.abi import fdt
from khosim.kernel.boot import boot
from khosim.kernel.bootloader import load_kernel
from khosim.kernel.image import KernelImage

OUT = ["out/scratch_len", "out/scratch_phys", "out/sub_fdts/kexec-metadata"]


def booted(cmdline="kho=on"):
    """A machine and its first kernel."""
    machine = Machine("64M")
    return machine, machine.boot(cmdline=cmdline)


def test_the_files_of_a_cold_boot():
    """out/ only; in/ is made when there is something in it."""
    _, kernel = booted("kho=on reserve_mem=4K:4096:x")
    assert kernel.debugfs.files() == sorted(["out/fdt", *OUT, "out/sub_fdts/memblock"])


def test_kho_off_has_no_files():
    """Not even the folder."""
    _, kernel = booted("kho=off")
    assert kernel.debugfs.files() == []
    with pytest.raises(KeyError):
        kernel.debugfs.read("out/scratch_phys")


def test_a_handover_boot_has_no_outgoing_fdt():
    """Quirk: kho_init returns before it adds out/fdt where there is an incoming FDT."""
    machine, kernel = booted("kho=on reserve_mem=4K:4096:x")
    successor = machine.kexec(kernel)
    assert successor.debugfs.files() == sorted(
        [
            *OUT,
            "out/sub_fdts/memblock",
            "in/fdt",
            "in/sub_fdts/kexec-metadata",
            "in/sub_fdts/memblock",
        ]
    )


def test_the_outgoing_fdt_is_cut_to_its_size_at_boot():
    """Quirk: the file shows what the FDT is now, but no more bytes than it had then."""
    _, kernel = booted()
    at_boot = kernel.debugfs.read("out/fdt")
    assert fdt.fdt_check_header(at_boot) == 0
    assert fdt.fdt_totalsize(at_boot) == len(at_boot)
    kernel.kho_add_subtree("mine", 0x5000, 10)
    now = kernel.debugfs.read("out/fdt")
    assert len(now) == len(at_boot)
    assert now != at_boot
    assert fdt.fdt_totalsize(now) > len(now)


def test_the_size_at_boot_is_without_the_memblock_subtree():
    """reserve_mem adds its own later than kho_init: never wholly visible in out/fdt."""
    _, kernel = booted("kho=on reserve_mem=4K:4096:x")
    shown = kernel.debugfs.read("out/fdt")
    assert fdt.fdt_totalsize(shown) > len(shown)


def test_the_incoming_fdt_is_whole():
    """in/fdt has the size that the predecessor's tree has now."""
    machine, kernel = booted()
    kernel.kho_add_subtree("mine", 0x5000, 10)
    tree = bytes(kernel.fdt_at(kernel.kho_out.fdt_phys))
    successor = machine.kexec(kernel)
    assert successor.debugfs.read("in/fdt") == tree


def test_scratch_files():
    """One line for each area, in hexadecimal, in the array's order."""
    _, kernel = booted()
    areas = kernel.scratch_areas()
    phys = "".join(f"0x{addr:x}\n" for addr, _ in areas).encode()
    sizes = "".join(f"0x{size:x}\n" for _, size in areas).encode()
    assert kernel.debugfs.read("out/scratch_phys") == phys
    assert kernel.debugfs.read("out/scratch_len") == sizes


def test_blobs_show_what_is_in_ram_now():
    """A file is a window onto the blob, with the size it was added with."""
    _, kernel = booted()
    folio = kernel.kho_alloc_preserve(100)
    kernel.kho_add_subtree("mine", folio.phys, 10)
    assert kernel.debugfs.read("out/sub_fdts/mine") == bytes(10)
    folio.write(0, b"0123456789abc")
    assert kernel.debugfs.read("out/sub_fdts/mine") == b"0123456789"


def test_a_subtree_may_be_called_fdt():
    """It lies among the subtrees; the root FDT is another file."""
    _, kernel = booted()
    folio = kernel.kho_alloc_preserve(100)
    kernel.kho_add_subtree("fdt", folio.phys, 4)
    assert kernel.debugfs.read("out/sub_fdts/fdt") == bytes(4)
    assert len(kernel.debugfs.read("out/fdt")) > 4


def test_removing_a_subtree_removes_its_file():
    """The newest of those with that address, as in the FDT; a file for nothing stays away."""
    _, kernel = booted()
    folio = kernel.kho_alloc_preserve(100)
    for name in ("a", "b"):
        kernel.kho_add_subtree(name, folio.phys, 4)
    kernel.kho_remove_subtree(folio.phys)
    assert "out/sub_fdts/b" not in kernel.debugfs.files()
    assert "out/sub_fdts/a" in kernel.debugfs.files()
    kernel.kho_remove_subtree(folio.phys)
    assert kernel.debugfs.files() == sorted(["out/fdt", *OUT])
    with pytest.raises(KeyError):
        kernel.debugfs.read("out/sub_fdts/a")


def test_incoming_nodes_that_are_broken():
    """No file and a word for a wrong length; not a word for a node without an address."""
    machine, kernel = booted()
    for name in ("good", "no-data", "short-data", "no-size", "short-size"):
        kernel.kho_add_subtree(name, 0x5000, 10)
    phys = kernel.kho_out.fdt_phys
    machine.load_successor(kernel)
    ram = machine.hardware.ram
    tree = memoryview(bytearray(ram.read(phys, 4096)))
    assert fdt.fdt_open_into(tree, tree, 4096) == 0

    def node(name):
        return fdt.fdt_subnode_offset(tree, 0, name)

    assert fdt.fdt_delprop(tree, node("no-data"), "preserved-data") == 0
    assert fdt.fdt_setprop(tree, node("short-data"), "preserved-data", bytes(4)) == 0
    assert fdt.fdt_delprop(tree, node("no-size"), "blob-size") == 0
    assert fdt.fdt_setprop(tree, node("short-size"), "blob-size", bytes(12)) == 0
    ram.write(phys, bytes(tree), (9, "poke"))
    successor = machine.resume()
    shown = [path for path in successor.debugfs.files() if path.startswith("in/sub_fdts/")]
    assert shown == ["in/sub_fdts/good", "in/sub_fdts/kexec-metadata"]
    about = [line for line in successor.messages if line.startswith("KHO: node")]
    assert about == [
        "KHO: node short-size missing or invalid blob-size property",
        "KHO: node no-size missing or invalid blob-size property",
        "KHO: node short-data prop preserved-data has invalid length: 4",
    ]


def test_a_blob_outside_of_memory():
    """The file is there; who reads it takes the fault."""
    machine, kernel = booted()
    kernel.kho_add_subtree("nowhere", 1 << 40, 10)
    kernel.kho_add_subtree("empty", 1 << 40, 0)
    for side, reader in (("out", kernel), ("in", machine.kexec(kernel))):
        assert reader.debugfs.read(f"{side}/sub_fdts/empty") == b""
        with pytest.raises(KernelPanic):
            reader.debugfs.read(f"{side}/sub_fdts/nowhere")


def test_kho_that_failed_late_leaves_its_files():
    """Nothing removes the folder again when kexec-metadata cannot be set up."""
    machine = Machine("64M")
    calls: list[str] = []

    def fail(order, owner):
        calls.append(owner)
        return calls.count("kho_alloc_preserve") == 2

    class Rig:
        def checkpoint(self, kernel, stage):
            if stage == "takeover":
                kernel.pages.fail = fail

    image = KernelImage.build("7.3", size="4M")
    load_kernel(machine.hardware, image.data, initrd_bytes=1 << 20, cmdline="kho=on")
    kernel = boot(machine.hardware, 0, host=Rig())
    assert not kernel.kho_enable
    assert kernel.debugfs.files() == ["out/scratch_len", "out/scratch_phys"]


def test_metadata_as_user_space_sees_it():
    """73 bytes: version, name, count."""
    machine, kernel = booted()
    successor = machine.kexec(kernel)
    blob = successor.debugfs.read("in/sub_fdts/kexec-metadata")
    assert blob == struct.pack("<I65sI", 1, b"7.3.4", 1)
    blob = successor.debugfs.read("out/sub_fdts/kexec-metadata")
    assert blob == struct.pack("<I65sI", 1, b"7.3.4", 2)
