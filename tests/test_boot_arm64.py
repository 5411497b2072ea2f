"""What an arm64 kernel makes of its device tree: memory, nodes, what is reserved, its limits."""

from __future__ import annotations

import struct

import pytest

from khosim import KernelPanic, Machine
from khosim.abi import fdt
from khosim.kernel.bootloader import load_kernel
from khosim.kernel.image import KernelImage

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
BY = (-1, "test")


class Tree:
    """The device tree of a machine that is about to boot, to be edited in place."""

    def __init__(self, ram="256M", cmdline="kho=off", *, page_size=4096, initrd=MIB, **options):
        self.machine = Machine(ram, arch="arm64", page_size=page_size, **options)
        image = KernelImage.build("7.3", arch="arm64", page_size=page_size, size="4M")
        load_kernel(self.machine.hardware, image.data, initrd_bytes=initrd, cmdline=cmdline)
        self.at = self.machine.hardware.registers["x0"]
        ram_ = self.machine.hardware.ram
        size = int.from_bytes(ram_.read(self.at + 4, 4), "big")
        self.blob = bytearray(size + 8192)
        assert fdt.fdt_open_into(ram_.read(self.at, size), self.blob, len(self.blob)) == 0

    def node(self, path="/chosen"):
        """The offset of a node."""
        return fdt.fdt_path_offset(self.blob, path)

    def set(self, path, name, *numbers, cell="Q"):
        """Set a property to big-endian numbers."""
        data = struct.pack(f">{len(numbers)}{cell}", *numbers)
        assert fdt.fdt_setprop(self.blob, self.node(path), name, data) == 0

    def get(self, name, path="/chosen"):
        """A property as one number."""
        return int.from_bytes(fdt.fdt_getprop(self.blob, self.node(path), name)[0], "big")

    def boot(self):
        """Start the kernel on the edited tree."""
        self.machine.hardware.ram.write(self.at, bytes(self.blob), BY)
        return self.machine.resume()


MEMORY = "/memory@40000000"
NONE = (0, 0)


def memory(kernel):
    """(start, end, nid) of memblock.memory."""
    array = kernel.memblock.memory
    return list(zip(array.base, array.end, array.nid, strict=True))


def is_reserved_apart(kernel, start, end):
    """Whether all of [start, end) is reserved and the bytes around it are not."""
    reserved = kernel.memblock.memblock_is_region_reserved
    array = kernel.memblock.reserved
    inside = any(
        low <= start and end <= high for low, high in zip(array.base, array.end, strict=True)
    )
    return inside and not reserved(start - 1, 1) and not reserved(end, 1)


# -- the blob itself ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "boots"), [(2 * MIB, True), (2 * MIB + 1, False), (0, False), (39, False)]
)
def test_the_size_of_the_tree(size, boots):
    """At most 2 MiB, at least a header; all of it is reserved."""
    tree = Tree()
    tree.blob[4:8] = size.to_bytes(4, "big")
    if not boots:
        with pytest.raises(KernelPanic, match=f"invalid device tree blob: PA={tree.at:#x}"):
            tree.boot()
        return
    kernel = tree.boot()
    assert kernel.memblock.memblock_is_region_reserved(tree.at + size - 1, 1)
    assert len(kernel.boot_fdt()) == size


@pytest.mark.parametrize("at", [0, 4, 64 * GIB])
def test_a_tree_that_is_not_there(at):
    """NULL, an address that is not a multiple of 8, and no RAM."""
    tree = Tree()
    low = tree.at + 4
    tree.machine.hardware.ram.write(low, bytes(tree.blob), BY)
    tree.machine.hardware.registers["x0"] = low if at == 4 else at
    with pytest.raises(KernelPanic, match="invalid device tree blob"):
        tree.machine.resume()


def test_not_a_tree():
    """Another magic number."""
    tree = Tree()
    tree.blob[0] ^= 1
    with pytest.raises(KernelPanic, match="invalid device tree blob"):
        tree.boot()


# -- /chosen --------------------------------------------------------------------------------------


def test_chosen_may_have_an_address():
    """/chosen@0 serves where there is no /chosen."""
    tree = Tree()
    assert fdt.fdt_del_node(tree.blob, tree.node()) == 0
    node = fdt.fdt_add_subnode(tree.blob, 0, "chosen@0")
    assert fdt.fdt_setprop(tree.blob, node, "bootargs", b"quiet kho=off\0") == 0
    assert tree.boot().cmdline == "quiet kho=off"


def test_no_chosen_at_all():
    """No command line, no initrd."""
    tree = Tree(cmdline="kho=on")
    assert fdt.fdt_del_node(tree.blob, tree.node()) == 0
    kernel = tree.boot()
    assert kernel.cmdline == ""
    assert kernel.initrd == NONE


def test_bootargs_are_cut():
    """2047 characters of it."""
    tree = Tree()
    text = b"kho=off " + b"x" * 3000 + b"\0"
    assert fdt.fdt_setprop(tree.blob, tree.node(), "bootargs", text) == 0
    assert tree.boot().cmdline == "kho=off " + "x" * 2039


def test_usable_memory_ranges():
    """The first cuts memory, the second adds to it, a third does not count."""
    tree = Tree()
    ranges = (GIB, 192 * MIB, GIB + 224 * MIB, 16 * MIB, GIB + 248 * MIB, 8 * MIB)
    tree.set("/chosen", "linux,usable-memory-range", *ranges)
    assert [(start - GIB, end - GIB) for start, end, _ in memory(tree.boot())] == [
        (0, 192 * MIB),
        (224 * MIB, 240 * MIB),
    ]


@pytest.mark.parametrize("count", [1, 3, 4])
def test_usable_memory_of_an_odd_length(count):
    """Ignored as a whole where it is not made of pairs; two cells each here."""
    tree = Tree()
    numbers = (GIB, 64 * MIB, GIB + 128 * MIB, 64 * MIB)[:count]
    tree.set("/chosen", "linux,usable-memory-range", *numbers)
    whole = [(GIB, GIB + 256 * MIB, 0)]
    cut = [(GIB, GIB + 64 * MIB, 0), (GIB + 128 * MIB, GIB + 192 * MIB, 0)]
    if count == 4:
        # The initrd at 128 MiB needs the second range.
        assert memory(tree.boot()) == cut
    else:
        assert memory(tree.boot()) == whole


# -- memory nodes ---------------------------------------------------------------------------------


def test_memory_is_cut_to_whole_pages():
    """Up at its start, down at its end; less than a page is told of and dropped."""
    tree = Tree(page_size=16 * KIB)
    top = GIB + 256 * MIB
    reg = (GIB, 192 * MIB + 5000, GIB + 200 * MIB + 100, 32 * KIB, top - 4095, 4094, top, 0)
    tree.set(MEMORY, "reg", *reg)
    kernel = tree.boot()
    assert [(start - GIB, end - GIB) for start, end, _ in memory(kernel)] == [
        (0, 192 * MIB),
        (200 * MIB + 16 * KIB, 200 * MIB + 32 * KIB),
    ]
    ignored = f"OF: fdt: Ignoring memory block 0x{top - 4095:x} - 0x{top - 1:x}"
    assert [line for line in kernel.messages if "Ignoring" in line] == [ignored]


def test_which_nodes_are_memory():
    """linux,usable-memory instead of reg; a node that is disabled is not there."""
    tree = Tree()
    tree.set(MEMORY, "linux,usable-memory", GIB, 224 * MIB)
    for name, status in (("a", b"okay\0"), ("b", b"disabled\0"), ("c", b"ok\0"), ("d", None)):
        at = GIB + 224 * MIB + "abcd".index(name) * 8 * MIB
        node = fdt.fdt_add_subnode(tree.blob, 0, name)
        path = f"/{name}"
        assert node > 0
        tree.set(path, "reg", at, 4 * MIB)
        kind = b"memory\0" if name != "d" else b"cpu\0"
        assert fdt.fdt_setprop(tree.blob, tree.node(path), "device_type", kind) == 0
        if status is not None:
            assert fdt.fdt_setprop(tree.blob, tree.node(path), "status", status) == 0
    assert [(start - GIB, end - GIB) for start, end, _ in memory(tree.boot())] == [
        (0, 228 * MIB),
        (240 * MIB, 244 * MIB),
    ]


@pytest.mark.parametrize(("nid", "nids"), [(1, {0, 1}), (63, {0, 63}), (64, {0}), (None, {0})])
def test_nodes_that_do_not_cover_memory(nid, nids):
    """A node of number 64, or memory of no node at all: everything is node 0 then."""
    tree = Tree(nodes=2)
    path = f"/memory@{GIB + 128 * MIB:x}"
    if nid is None:
        assert fdt.fdt_delprop(tree.blob, tree.node(path), "numa-node-id") == 0
    else:
        tree.set(path, "numa-node-id", nid, cell="I")
    assert {node for _, _, node in memory(tree.boot())} == nids


def test_cells_that_the_root_does_not_tell():
    """One each then, with a warning: the 64-bit reg reads as pairs of 32-bit numbers."""
    tree = Tree()
    for name in ("#address-cells", "#size-cells"):
        assert fdt.fdt_delprop(tree.blob, 0, name) == 0
    tree.set(MEMORY, "reg", GIB, 256 * MIB, cell="I")
    kernel = tree.boot()
    assert memory(kernel) == [(GIB, GIB + 256 * MIB, 0)]
    warnings = [line for line in kernel.messages if "in root node" in line]
    assert warnings == [
        "WARNING: No '#address-cells' in root node",
        "WARNING: No '#size-cells' in root node",
    ]


# -- the linear map -------------------------------------------------------------------------------

TOO_FAR = "Memory doesn't fit in the linear mapping, VA_BITS too small"


def test_memory_too_far_up():
    """The linear map has 128 TiB, from the GiB that RAM starts in."""
    for size, fits in ((GIB, True), (GIB + 4096, False)):
        tree = Tree()
        tree.set(MEMORY, "reg", GIB, 256 * MIB, 128 * TIB, size)
        # There is no RAM: reserved, so that the kernel gets to its end.
        assert fdt.fdt_add_mem_rsv(tree.blob, 128 * TIB, size) == 0
        events = []
        tree.machine.listen(events.append)
        kept = rf"no RAM, in \[{128 * TIB:#x}, {128 * TIB + GIB:#x}\)"
        with pytest.raises(KernelPanic, match=kept):
            tree.boot()
        said = [event.args["message"] for event in events if event.symbol == "printk"]
        assert (TOO_FAR in said) != fits


@pytest.mark.parametrize("far", [False, True])
def test_an_initrd_outside_of_the_linear_map(far):
    """Warned of and left out; so is one below all memory."""
    tree = Tree()
    start = GIB + 128 * TIB - 4096 if far else GIB - 4096
    tree.set("/chosen", "linux,initrd-start", start)
    tree.set("/chosen", "linux,initrd-end", start + 4097)
    kernel = tree.boot()
    assert kernel.initrd == NONE
    assert sum("initrd not fully accessible" in line for line in kernel.messages) == 1


@pytest.mark.parametrize("start", [GIB, GIB + 128 * TIB - MIB])
def test_an_initrd_at_the_edges_of_the_linear_map(start):
    """In memory from its first byte on, or added to it up to the map's last."""
    tree = Tree()
    tree.set("/chosen", "linux,initrd-start", start)
    tree.set("/chosen", "linux,initrd-end", start + MIB)
    if start == GIB:
        assert tree.boot().initrd == (GIB, GIB + MIB)
        return
    with pytest.raises(KernelPanic, match=rf"{start:#x}"):
        tree.boot()


def test_an_initrd_of_nothing():
    """Start and end alike, or the wrong way round."""
    for end in (GIB + 128 * MIB, GIB + 100 * MIB):
        tree = Tree()
        tree.set("/chosen", "linux,initrd-start", GIB + 128 * MIB)
        tree.set("/chosen", "linux,initrd-end", end)
        assert tree.boot().initrd == NONE


def test_an_initrd_of_32_bits():
    """A property of one cell is a number as well."""
    tree = Tree(initrd=5000)
    start, end = tree.get("linux,initrd-start"), tree.get("linux,initrd-end")
    tree.set("/chosen", "linux,initrd-start", start, cell="I")
    tree.set("/chosen", "linux,initrd-end", end, cell="I")
    kernel = tree.boot()
    assert kernel.initrd == (start, start + 5000)


@pytest.mark.parametrize(
    ("page_size", "ram", "tables"),
    # 4 KiB: 128 tables of pages (2 MiB each), then one of 1 GiB and one of 512 GiB.
    # 16 KiB: 16 of 32 MiB, one of 64 GiB, one of 128 TiB. 64 KiB: 8 of 512 MiB, one of 4 TiB.
    [(4096, "256M", 128 + 2), (16 * KIB, "512M", 16 + 2), (64 * KIB, "4G", 8 + 1)],
)
def test_tables_of_the_linear_map(page_size, ram, tables):
    """One page for each piece of the map that a table of some level covers, pages mapped singly."""
    tree = Tree(ram, page_size=page_size)
    events = []
    tree.machine.listen(events.append)
    tree.boot()
    first, *_ = [
        event.args["args"][0]
        for event in events
        if event.phase == "paging_init" and "alloc" in event.symbol
    ]
    assert first == tables * page_size


# -- reservations ---------------------------------------------------------------------------------


def test_elf_core_headers():
    """Reserved and told of; not where something else is reserved already."""
    at = GIB + 160 * MIB
    tree = Tree()
    tree.set("/chosen", "linux,elfcorehdr", at, 8192)
    kernel = tree.boot()
    assert is_reserved_apart(kernel, at, at + 8192)
    assert (
        f"OF: reserved mem: Reserving 8 KiB of memory at 0x{at:x} for elfcorehdr"
        in kernel.messages
    )
    tree = Tree()
    initrd = tree.get("linux,initrd-start")
    tree.set("/chosen", "linux,elfcorehdr", initrd - 4096, 8192)
    kernel = tree.boot()
    assert not kernel.memblock.memblock_is_region_reserved(initrd - 4096, 4096)
    assert "OF: reserved mem: elfcorehdr is overlapped" in kernel.messages


def test_elf_core_headers_make_a_crash_kernel():
    """One pair exactly: another length is no elfcorehdr. Without a size nothing is reserved."""
    disabled = "KHO: disabled in the kdump kernel"
    tree = Tree(cmdline="kho=on")
    tree.set("/chosen", "linux,elfcorehdr", GIB + 160 * MIB, 0)
    kernel = tree.boot()
    assert disabled in kernel.messages
    assert not any("elfcorehdr" in line for line in kernel.messages)
    tree = Tree(cmdline="kho=on kho_scratch=8M,8M,0")
    tree.set("/chosen", "linux,elfcorehdr", GIB + 160 * MIB, 4096, GIB, 4096)
    kernel = tree.boot()
    assert disabled not in kernel.messages
    assert kernel.kho_enable


def test_the_trees_own_reservations():
    """Up to the first of no size."""
    first, last = GIB + 160 * MIB, GIB + 170 * MIB
    tree = Tree()
    for start, size in ((first, 5000), (last, 4096), (last, 4096)):
        assert fdt.fdt_add_mem_rsv(tree.blob, start, size) == 0
    at = int.from_bytes(tree.blob[16:20], "big")  # off_mem_rsvmap
    tree.blob[at + 24 : at + 32] = bytes(8)
    kernel = tree.boot()
    assert is_reserved_apart(kernel, first, first + 5000)
    assert not kernel.memblock.memblock_is_region_reserved(last, 1)
