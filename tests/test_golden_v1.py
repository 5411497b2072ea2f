"""Kernels of kho-v1 against real ones: both sizes of bitmaps, on the captured machines."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cache
from pathlib import Path

import pytest
from test_golden_bytes import config_of

from khosim import Machine
from khosim.abi import fdt
from khosim.capture.folder import Capture
from khosim.kernel.kho_chunks import KhoChunks
from khosim.kernel.release import find_release

CAPTURES = Path(__file__).resolve().parent / "golden" / "kho-v1"
RELEASE_OF = {"uma1g-v1": "6.16", "numa6g-v1": "6.16", "uma1g-v1page": "6.18"}
NAMES = list(RELEASE_OF)
HANDOVERS = [
    (name, number)
    for name in NAMES
    for number in (0, 1)
    if (CAPTURES / name / f"gen{number}" / "ram.npz").exists()
]


@cache
def cold(name):
    """The capture, a machine like its own, and its cold boot with the release's KHO."""
    capture = Capture(CAPTURES / name)
    config, initrd = config_of(capture)
    if name == "numa6g-v1":
        config = dataclasses.replace(config, cpu_nodes=(0, 1))
    machine = Machine.from_capture(capture.path)
    cmdline = capture.generations[0].cmdline.replace(" liveupdate=on", "")
    release = find_release(RELEASE_OF[name])
    return capture, machine.boot(release, cmdline=cmdline, config=config, initrd=initrd)


def with_pages_of(name, number):
    """A kernel of the capture's release on a machine that holds a handover's pages."""
    capture = Capture(CAPTURES / name)
    machine = Machine.from_capture(capture.path, checks=False)
    kernel = machine.boot(RELEASE_OF[name], cmdline="kho=off")
    generation = capture.generations[number]
    for pfn, data in zip(*generation.ram_pages, strict=True):
        kernel.ram.write(int(pfn) << 12, bytes(data), (0, "the predecessor"))
    return kernel, generation.handover


def blocks_of(tracker):
    """Every block as [phys, order], in the order of the walk."""
    return [
        [phys + (n << order + 12), order]
        for phys, order, nr_blocks in tracker.blocks()
        for n in range(nr_blocks)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_scratch_areas(name):
    """Sizes and addresses, by the rules of 6.16 to 7.1."""
    capture, kernel = cold(name)
    assert tuple(kernel.scratch_areas()) == capture.generations[0].scratch_areas


@pytest.mark.parametrize("name", NAMES)
def test_root_fdt_and_memblock_subtree(name):
    """What a finalize writes, byte for byte but for addresses of pages."""
    capture, kernel = cold(name)
    real = bytes.fromhex(capture.generations[0].handover["fdt"])
    subtrees = capture.generations[0].handover["subtrees"]
    mine = []

    def preserve_for_the_module(action):
        # The real kernel's test module came before reserve_mem.
        if action == "KEXEC_KHO_FINALIZE":
            folio = kernel.alloc_folio(0)
            folio.write(0, bytes.fromhex(subtrees["kho_test"]["hex"])[:4096])
            kernel.kho_add_subtree("kho_test", folio.phys, 0)
            mine.append(folio.phys)
        return 0

    if "kho_test" in subtrees and not kernel.kho_out.finalized:
        kernel.kho_out.notifiers.insert(0, preserve_for_the_module)
    kernel.finalize()
    blob = kernel.debugfs.read("out/sub_fdts/memblock")
    assert blob == capture.generations[0].bytes_of("kho/out/sub_fdts/memblock")
    ours = kernel.debugfs.read("out/fdt")
    assert len(ours) == len(real)
    assert without_addresses(ours) == without_addresses(real)
    assert capture.generations[0].bytes_of("kho/out/fdt") == real[: fdt.fdt_totalsize(real)]


def without_addresses(tree):
    """The tree with zeros for the map's address and for those of the subtrees."""
    copy = bytearray(tree)
    props = [(0, "preserved-memory-map")]
    node = fdt.fdt_first_subnode(tree, 0)
    while node >= 0:
        props.append((node, "fdt"))
        node = fdt.fdt_next_subnode(tree, node)
    for node, prop in props:
        value, length = fdt.fdt_getprop(copy, node, prop)
        assert length == 8
        value[:] = bytes(8)
    return bytes(copy)


@pytest.mark.parametrize(("name", "number"), HANDOVERS)
def test_the_real_list_is_read_as_the_real_kernel_read_it(name, number):
    """Block by block, in the order in which the successor's log tells of them."""
    kernel, handover = with_pages_of(name, number)
    read = blocks_of(KhoChunks(kernel, handover["mem_map"]))
    assert read == handover["preserved"]
    log = (CAPTURES / name / f"gen{number + 1}" / "dmesg").read_text()
    told = re.findall(r"__memblock_reserve: \[(0x\w+)-(0x\w+)\].* kho_memory_init", log)
    spans = [(int(low, 16), int(high, 16) + 1) for low, high in told]
    assert spans == [(phys, phys + (4096 << order)) for phys, order in read]


@pytest.mark.parametrize(("name", "number"), HANDOVERS)
def test_the_real_list_is_written_as_the_real_kernel_wrote_it(name, number):
    """The same blocks make the same chunks and bitmaps, but for where they lie."""
    kernel, handover = with_pages_of(name, number)
    tracker = KhoChunks(kernel)
    for phys, order in reversed(handover["preserved"]):
        assert tracker.add_block(phys >> 12, order) == 0
    error, at = tracker.serialize()
    assert error == 0
    size = handover["preserve_bits"] // 8
    for chunk in handover["chunks"]:
        real, ours = kernel.ram.read(chunk["phys"], 4096), kernel.ram.read(at, 4096)
        assert ours[8:16] == real[8:16]
        assert bool(chunk["next"]) == any(ours[:8])
        for i in range(chunk["num_elms"]):
            mine, theirs = ours[16 + 16 * i :][:16], real[16 + 16 * i :][:16]
            assert mine[:8] == theirs[:8]
            bitmaps = (int.from_bytes(element[8:], "little") for element in (mine, theirs))
            assert kernel.ram.read(next(bitmaps), size) == kernel.ram.read(next(bitmaps), size)
        used = 16 + 16 * chunk["num_elms"]
        assert ours[used:] == real[used:] == bytes(4096 - used)
        at = int.from_bytes(ours[:8], "little")
    assert at == 0


@pytest.mark.parametrize(("name", "number"), HANDOVERS)
def test_read_with_the_other_size(name, number):
    """Bit by bit out of the real chunks: what a kernel with the other size makes of them.

    No address is checked by a kernel: a longer bitmap runs on through the pages behind it, and its
    later bits stand for memory far above what the element was about.
    """
    kernel, handover = with_pages_of(name, number)
    other = "6.18" if RELEASE_OF[name] == "6.16" else "6.16"
    kernel.release = find_release(other)
    size = 4096 if other == "6.18" else 512
    expected = []
    for chunk in handover["chunks"]:
        for element in chunk["elms"]:
            bits = int.from_bytes(kernel.ram.read(element["bitmap"], size), "little")
            set_bits = [n for n, bit in enumerate(reversed(f"{bits:b}")) if bit == "1"]
            span = 4096 << chunk["order"]
            expected += [[element["phys_start"] + n * span, chunk["order"]] for n in set_bits]
    read = blocks_of(KhoChunks(kernel, handover["mem_map"]))
    assert read == expected
    kept = {tuple(block) for block in handover["preserved"]}
    if other == "6.16":
        assert {tuple(block) for block in read} < kept  # lost
    elif number == 0:
        assert {tuple(block) for block in read} > kept  # phantoms


def test_the_captures_are_what_they_say():
    """Sizes of bitmaps, as their describing files have them."""
    for name, release in RELEASE_OF.items():
        facts = json.loads((CAPTURES / name / "capture.json").read_text())
        size = find_release(release).bitmap_bytes or 4096
        assert facts["preserve_bits"] == [size * 8] * 3
