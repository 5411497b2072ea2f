"""Simulated boots of captured machines against what the real kernels left behind.

The facts of each machine (sizes of image, initrd and per-cpu areas, CPUs) are read from its log;
the kernel code of khosim then has to arrive at the same addresses and bytes.
"""

from __future__ import annotations

import re
import struct
from functools import cache
from pathlib import Path

import pytest

from khosim import Machine
from khosim.abi import fdt
from khosim.capture.folder import Capture
from khosim.kernel.image import KernelConfig, KernelImage
from khosim.kernel.release import find_release

CAPTURES = Path(__file__).resolve().parent / "golden" / "captures"
NAMES = ["uma1g", "uma1g-7.2", "fixed2g", "numa4g", "arm64-16k"]
X86_OF_7_3 = ["uma1g", "fixed2g", "numa4g"]
_RANGE = r"\[(?:mem )?(0x[0-9a-f]+)-(0x[0-9a-f]+)\]"


def found(pattern, text):
    """[start, end) of the first address range in a line of the log that matches."""
    match = re.search(pattern, text)
    assert match is not None, pattern
    return int(match[1], 16), int(match[2], 16) + 1


def config_of(capture):
    """The real kernel's sizes, and the size of its initrd, from the log of its cold boot."""
    log = capture.generations[0].dmesg
    facts = {"init_offset_bytes": 6 << 20}
    if capture.arch == "x86_64":
        start, end = found(rf"__memblock_reserve: {_RANGE} nid=-1 flags=20 setup_arch", log)
        facts |= {"kernel_bytes": start - (16 << 20), "brk_bytes": end - start}
        initrd = found(rf"RAMDISK: {_RANGE}", log)
    else:
        lines = re.findall(rf"__memblock_reserve: {_RANGE} .*flags=0 arm64_memblock_init", log)
        initrd, image = ((int(low, 16), int(high, 16) + 1) for low, high in lines)
        facts["kernel_bytes"] = image[1] - image[0]
    facts["percpu_bytes"] = int(re.search(r"Embedded (\d+) pages/cpu", log)[1]) * capture.page_size
    cpus = re.search(r"nr_cpu_ids:(\d+)", log)
    facts["nr_cpus"] = int(cpus[1]) if cpus else 1
    facts["cpu_nodes"] = (0,) * facts["nr_cpus"]
    freed = re.search(r"Freeing unused kernel (?:image \(initmem\) )?memory: (\d+)K", log)
    facts["init_bytes"] = int(freed[1]) << 10
    release = find_release("7.2" if "7.2" in capture.path.name else "7.3")
    return KernelConfig(release=release, **facts), initrd[1] - initrd[0]


@cache
def boot_of(name):
    """The capture, a machine like its own, and the cold boot with its command line."""
    capture = Capture(CAPTURES / name)
    config, initrd = config_of(capture)
    machine = Machine.from_capture(capture.path)
    cmdline = capture.generations[0].cmdline
    return capture, machine, machine.boot(cmdline=cmdline, config=config, initrd=initrd)


@pytest.mark.parametrize("name", NAMES)
def test_scratch_areas(name):
    """Every address and every size, as /sys/kernel/debug/kho/out shows them."""
    capture, _, kernel = boot_of(name)
    assert tuple(kernel.scratch_areas()) == capture.generations[0].scratch_areas
    for column in ("scratch_phys", "scratch_len"):
        shown = kernel.debugfs.read(f"out/{column}")
        assert shown == capture.generations[0].bytes_of(f"kho/out/{column}")


@pytest.mark.parametrize("name", X86_OF_7_3)
def test_large_early_allocations(name):
    """Log buffer, memmap, per-cpu areas, reserve_mem, hashes, bounce buffers at the real places.

    Compared as the set of bytes taken by allocations of 1 MiB and more, all of which lie at
    addresses that no small allocation moves.
    """
    capture, _, kernel = boot_of(name)
    real: set[tuple[int, int]] = set()
    pattern = rf"__memblock_reserve: {_RANGE} .*memblock_alloc_range_nid"
    for low, high in re.findall(pattern, capture.generations[0].dmesg):
        start, end = int(low, 16), int(high, 16) + 1
        if end - start >= 1 << 20 and start % 4096 == 0:
            real.add((start, end))
    ours = [(start, start + size) for start, size in kernel.memblock.allocations]
    for start, end in real:
        assert any(low <= start and end <= high for low, high in ours), hex(start)


def subtrees_of(handover):
    """(name, phys, size, bytes) of the real handover's subtrees, oldest first."""
    tree = bytes.fromhex(handover["fdt"])
    order = []
    node = fdt.fdt_first_subnode(tree, 0)
    while node >= 0:
        order.append(bytes(fdt.fdt_get_name(tree, node)[0]).decode())
        node = fdt.fdt_next_subnode(tree, node)
    blobs = handover["subtrees"]
    return [
        (name, blobs[name]["phys"], blobs[name]["size"], bytes.fromhex(blobs[name]["hex"]))
        for name in reversed(order)
    ]


def with_addresses_of(tree, other):
    """``tree`` with the addresses in it (map and subtrees) replaced by those of ``other``."""
    copy = bytearray(tree)
    nodes = [(0, "preserved-memory-map")]
    node = fdt.fdt_first_subnode(tree, 0)
    while node >= 0:
        nodes.append((node, "preserved-data"))
        node = fdt.fdt_next_subnode(tree, node)
    for node, prop in nodes:
        name = bytes(fdt.fdt_get_name(tree, node)[0]).decode()
        there = fdt.fdt_subnode_offset(other, 0, name) if node else 0
        old, _ = fdt.fdt_getprop(tree, node, prop)
        new, _ = fdt.fdt_getprop(other, there, prop)
        at = bytes(tree).index(bytes(old))
        copy[at : at + 8] = bytes(new)
    return bytes(copy)


@pytest.mark.parametrize("name", NAMES)
def test_root_fdt(name):
    """The same calls make the same bytes: header, order of properties and nodes, strings.

    Only the addresses of tree and blobs are the simulation's own.
    """
    capture, _, kernel = boot_of(name)
    handover = capture.generations[0].handover
    shown_by_us = kernel.debugfs.read("out/fdt")
    # Another user's subtree came before those of late initcalls: take them out and put them back.
    ours_at = {}
    for subtree in ("LUO", "memblock"):
        tree = kernel.fdt_at(kernel.kho_out.fdt_phys)
        node = fdt.fdt_subnode_offset(tree, 0, subtree)
        (ours_at[subtree],) = struct.unpack("<Q", fdt.fdt_getprop(tree, node, "preserved-data")[0])
        kernel.kho_remove_subtree(ours_at[subtree])
    for subtree, phys, size, _ in subtrees_of(handover):
        if subtree != "kexec-metadata":
            kernel.kho_add_subtree(subtree, ours_at.get(subtree, phys), size)
    real = bytes.fromhex(handover["fdt"])
    ours = kernel.fdt_at(kernel.kho_out.fdt_phys)
    ours = bytes(ours[: fdt.fdt_totalsize(ours)])
    real = real[: fdt.fdt_totalsize(real)]
    assert with_addresses_of(ours, real) == real
    # debugfs cuts out/fdt to its size at boot, here as there.
    shown = capture.generations[0].bytes_of("kho/out/fdt")
    assert len(shown_by_us) == len(shown)
    assert shown == real[: len(shown)]


@pytest.mark.parametrize("name", NAMES)
def test_kexec_metadata(name):
    """All 73 bytes."""
    capture, _, kernel = boot_of(name)
    blob = capture.generations[0].bytes_of("kho/out/sub_fdts/kexec-metadata")
    assert kernel.debugfs.read("out/sub_fdts/kexec-metadata") == blob


@pytest.mark.parametrize("name", NAMES)
def test_memblock_subtree(name):
    """Byte for byte; on arm64 the region's address is the simulation's own."""
    capture, _, kernel = boot_of(name)
    real = capture.generations[0].bytes_of("kho/out/sub_fdts/memblock")
    ours = kernel.debugfs.read("out/sub_fdts/memblock")
    if name != "arm64-16k":
        assert ours == real
        return
    ((region, start, size),) = kernel.reserve_mem.regions
    node = fdt.fdt_subnode_offset(real, 0, region)
    (there,) = struct.unpack("<Q", fdt.fdt_getprop(real, node, "start")[0])
    assert abs(there - start) < 1 << 20  # real device trees are larger once unflattened
    assert size == 2 << 20
    assert ours == real.replace(struct.pack("<Q", there), struct.pack("<Q", start))


@pytest.mark.parametrize("name", X86_OF_7_3)
def test_where_kexec_puts_things(name):
    """Kernel, initrd, scratch array and setup_data of the successor, at the real addresses."""
    capture, _, kernel = boot_of(name)
    log = capture.generations[1].dmesg
    config, _ = config_of(capture)
    brk, brk_end = found(rf"__memblock_reserve: {_RANGE} nid=-1 flags=20 setup_arch", log)
    assert brk_end - brk == config.brk_bytes
    initrd = found(rf"RAMDISK: {_RANGE}", log)
    image = KernelImage.build("7.3", config=config)
    kimage = kernel.kexec_file_load(
        image, initrd_bytes=initrd[1] - initrd[0], cmdline=capture.generations[1].cmdline
    )
    segments = {segment.name: segment for segment in kimage.segments}
    assert segments["kernel"].mem == brk - config.kernel_bytes
    assert segments["initrd"].mem == initrd[0]
    # The first dump of memblock shows the array (not the kernel's own) and the setup_data entry.
    dump = log[log.index("reserved.cnt") : log.index("reserve_real_mode")]
    regions = [
        (int(low, 16), int(high, 16) + 1, int(flags, 16))
        for low, high, flags in re.findall(rf"{_RANGE}, .* bytes flags: (0x[0-9a-f]+)", dump)
    ]
    array = segments["KHO scratch array"]
    assert (array.mem, array.mem + len(array.data), 0) in regions
    page = segments["boot parameters"].data
    (setup_data,) = struct.unpack_from("<Q", page, 0x250)
    assert (setup_data, setup_data + 48, 0x20) in regions


def test_the_device_tree_that_kexec_hands_over():
    """arm64: the properties of /chosen, in the real order, with the real addresses."""
    capture, _, kernel = boot_of("arm64-16k")
    real = capture.generations[1].bytes_of("firmware/fdt")
    chosen = fdt.fdt_path_offset(real, "/chosen")
    start, end = (
        struct.unpack(">Q", fdt.fdt_getprop(real, chosen, f"linux,initrd-{edge}")[0])[0]
        for edge in ("start", "end")
    )
    config, _ = config_of(capture)
    image = KernelImage.build("7.3", arch="arm64", page_size=16384, config=config)
    cmdline = capture.generations[1].cmdline
    kimage = kernel.kexec_file_load(image, initrd_bytes=end - start, cmdline=cmdline)
    segments = {segment.name: segment for segment in kimage.segments}
    ours = segments["device tree"].data
    assert segments["initrd"].mem == start
    mine = fdt.fdt_path_offset(ours, "/chosen")
    for name in ("linux,initrd-start", "linux,initrd-end", "linux,kho-scratch", "bootargs"):
        assert bytes(fdt.fdt_getprop(ours, mine, name)[0]) == bytes(
            fdt.fdt_getprop(real, chosen, name)[0]
        ), name

    def names(tree, node):
        offset = fdt.fdt_first_property_offset(tree, node)
        while offset >= 0:
            _, _, name = fdt.fdt_getprop_by_offset(tree, offset)
            yield bytes(name).decode()
            offset = fdt.fdt_next_property_offset(tree, offset)

    # In the same order; the real one has a random seed and a console, too.
    real_only = {"kaslr-seed", "stdout-path"}
    assert list(names(ours, mine)) == [
        name for name in names(real, chosen) if name not in real_only
    ]
    rsv = [fdt.fdt_get_mem_rsv(real, i)[1:] for i in range(fdt.fdt_num_mem_rsv(real))]
    assert (start, end - start) in rsv
    assert fdt.fdt_get_mem_rsv(ours, 0)[1:] == (start, end - start)
