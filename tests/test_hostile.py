"""Torn and hostile handovers: whatever the bytes say, the kernel answers as the real one would."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import pytest

from benchmarks.mutation import TARGETS, Site, Target, build_target
from benchmarks.soak import Soak, main
from khosim import KernelError, KernelPanic
from khosim.abi import fdt
from khosim.kernel.kernel import Kernel

BY = (-1, "test")
U64 = (1 << 64) - 1
FOUND = "KHO: found kexec handover data."
REFUSED = "KHO: disabling KHO revival"
CIRCLES = "watchdog: BUG: soft lockup in kho_radix_walk_tree: the radix tree runs in circles"
ORDER_0 = 1 << 52
"""The order bit of the keys of single pages of 4 KiB."""
NOWHERE = 1 << 40
"""An address at which no machine here has RAM."""


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[Target, int]]:
    """Return the targets with a snapshot each, made when first asked for."""
    return {}


class Victim:
    """A machine between jump and boot, to be spoiled and booted."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.page = target.ram.page_size
        self.spare = 0

    def write(self, site: str, offset: int, data: bytes) -> None:
        """Overwrite bytes of a site."""
        self.target.ram.write(self.target.site(site).phys + offset, data, BY)

    def read(self, site: str) -> bytes:
        """Every byte of a site."""
        where = self.target.site(site)
        return self.target.ram.read(where.phys, where.len_bytes)

    def put(self, site: str, offset: int, *words: int) -> None:
        """Overwrite little-endian u64 words of a site."""
        self.write(site, offset, struct.pack(f"<{len(words)}Q", *words))

    def phys(self, site: str) -> int:
        """Where a site begins."""
        return self.target.site(site).phys

    def replace(self, site: str, old: bytes, new: bytes) -> None:
        """Replace every occurrence of some bytes in a site by as many others."""
        content = self.read(site)
        assert old in content
        assert len(old) == len(new)
        self.write(site, 0, content.replace(old, new))

    def leaf_of(self, key: int) -> int:
        """The address of the leaf for ``key`` on x86-64, made in preserved pages if need be."""
        ram = self.target.ram
        node = self.phys("table 0.0")
        for shift in (51, 42, 33, 24, 15):
            entry = node + (key >> shift) % 512 * 8
            node = ram.read_u64(entry)
            if not node:
                node = self.target.blocks[-1] + self.spare * self.page
                self.spare += 1
                ram.zero(node, self.page, BY)
                ram.write_u64(entry, node, BY)
        return node

    def add_key(self, key: int) -> None:
        """Set the bit of any key."""
        at = self.leaf_of(key) + key % 32768 // 8
        old = self.target.ram.read(at, 1)[0]
        self.target.ram.write(at, bytes([old | 1 << key % 8]), BY)

    @property
    def tree(self) -> list[Site]:
        """Sites of all tables and leaves."""
        return [site for site in self.target.sites if site.kind in ("table", "leaf")]

    def boot(self) -> Kernel:
        """Boot what is there now."""
        return self.target.machine.resume()

    def panic(self) -> str:
        """Boot, and return what the kernel died of."""
        with pytest.raises(KernelPanic) as died:
            self.boot()
        return died.value.message

    def refused(self) -> list[str]:
        """Boot, and return what the kernel said before it refused the handover."""
        kernel = self.boot()
        assert not kernel.is_kho_boot
        return kernel.messages[: kernel.messages.index(REFUSED)]

    def accepted(self) -> Kernel:
        """Boot, and return the kernel, which took the handover over."""
        kernel = self.boot()
        assert kernel.is_kho_boot
        assert FOUND in kernel.messages
        return kernel


def _victims(made: dict[str, tuple[Target, int]], name: str) -> Iterator[Victim]:
    if name not in made:
        target = build_target(name)
        made[name] = target, target.machine.hardware.snapshot()
    target, token = made[name]
    yield Victim(target)
    target.machine.hardware.rollback(token)
    target.machine.hardware.registers = dict(target.registers)


@pytest.fixture
def pc(made: dict[str, tuple[Target, int]]) -> Iterator[Victim]:
    """Return a 64 MiB x86-64 machine."""
    yield from _victims(made, "x86-64 64M")


@pytest.fixture
def arm(made: dict[str, tuple[Target, int]]) -> Iterator[Victim]:
    """Return an arm64 machine with pages of 16 KiB."""
    yield from _victims(made, "arm64 16K pages")


@pytest.fixture
def two_nodes(made: dict[str, tuple[Target, int]]) -> Iterator[Victim]:
    """Return an x86-64 machine with two nodes and a hole."""
    yield from _victims(made, "two nodes 128M")


# -- the root FDT ---------------------------------------------------------------------------------


def test_an_unspoiled_handover_is_accepted(pc: Victim, arm: Victim, two_nodes: Victim) -> None:
    """The machines of these tests are sound before they are spoiled."""
    for victim in (pc, arm, two_nodes):
        kernel = victim.accepted()
        assert "KHO: exec from: 7.3.4 (count 1)" in kernel.messages
        assert "Revived memory reservation 'oops' from KHO" in kernel.messages


@pytest.mark.parametrize(
    ("offset", "word", "error"),
    [
        (0, 0xD00DFEEE, -9),  # magic
        (0, 0x2FF20112, -9),  # the magic of an unfinished tree, which only readers take
        (4, 39, -8),  # totalsize
        (4, 1 << 31, -8),
        (8, 0x3A, -19),  # off_dt_struct not a multiple of 4
        (16, 0x2C, -19),  # off_mem_rsvmap not a multiple of 8
        (12, 0x1000000, -8),  # off_dt_strings behind the end
        (20, 1, -10),  # version
        (24, 18, -10),  # last_comp_version
    ],
)
def test_bad_header(pc: Victim, offset: int, word: int, error: int) -> None:
    """A header that makes no sense is refused with libfdt's error."""
    phys = pc.phys("root FDT")
    pc.write("root FDT", offset, struct.pack(">I", word))
    assert pc.refused() == [f"KHO: setup: handover FDT ({phys:#x}) is invalid: {error}"]


def test_totalsize_too_large_goes_unnoticed(pc: Victim) -> None:
    """The kernel does not compare the header's size with the handover's."""
    pc.write("root FDT", 4, struct.pack(">I", 0x7FFFFFFE))
    pc.accepted()


def test_totalsize_at_the_limit(pc: Victim) -> None:
    """The header check takes 2**31 - 1 bytes; what reads names does not, and finds none."""
    pc.write("root FDT", 4, struct.pack(">I", 0x7FFFFFFF))
    phys = pc.phys("root FDT")
    assert pc.refused() == [
        f"KHO: setup: handover FDT ({phys:#x}) is incompatible with 'kho-v4': -1"
    ]


def test_other_compatible_string(pc: Victim) -> None:
    """Another ABI version is refused."""
    pc.replace("root FDT", b"kho-v4\0", b"kho-v3\0")
    phys = pc.phys("root FDT")
    assert pc.refused() == [
        f"KHO: setup: handover FDT ({phys:#x}) is incompatible with 'kho-v4': 1"
    ]


def test_structure_cut_short(pc: Victim) -> None:
    """A tag that is none where the root's properties should be."""
    off_struct = struct.unpack(">I", pc.target.ram.read(pc.phys("root FDT") + 8, 4))[0]
    pc.write("root FDT", off_struct + 8, struct.pack(">I", 7))
    phys = pc.phys("root FDT")
    assert pc.refused() == [
        f"KHO: setup: handover FDT ({phys:#x}) is incompatible with 'kho-v4': -11"
    ]


def _map_at(victim: Victim) -> int:
    return victim.read("root FDT").index(struct.pack("<Q", victim.phys("table 0.0")))


def test_no_memory_map(pc: Victim) -> None:
    """A map property under another name is no map."""
    pc.replace("root FDT", b"preserved-memory-map", b"Preserved-memory-map")
    assert pc.refused() == ["KHO: failed to get preserved memory map"]


def test_map_of_wrong_length(pc: Victim) -> None:
    """A map property of seven bytes is no map."""
    pc.write("root FDT", _map_at(pc) - 8, struct.pack(">I", 7))
    assert pc.refused() == ["KHO: failed to get preserved memory map"]


def test_null_map_is_refused_without_a_word(pc: Victim) -> None:
    """Address 0 cannot be told from a failure."""
    pc.put("root FDT", _map_at(pc), 0)
    assert pc.refused() == []


@pytest.mark.parametrize("address", [NOWHERE, U64, 1 << 63, 0xA0000_0000, 0x4000000 - 8])
def test_map_outside_of_ram(pc: Victim, address: int) -> None:
    """The kernel trusts the address of the map, and faults on it."""
    pc.put("root FDT", _map_at(pc), address)
    assert pc.panic() == (
        f"BUG: unable to handle page fault for address: phys {address:#x} is not mapped"
    )


def test_map_in_a_hole(two_nodes: Victim) -> None:
    """A hole between RAM is not mapped either."""
    two_nodes.put("root FDT", _map_at(two_nodes), 0x5001000)
    assert two_nodes.panic().endswith("phys 0x5001000 is not mapped")


# -- kho_data -------------------------------------------------------------------------------------

FDT_ADDR, FDT_SIZE, SCRATCH_ADDR, SCRATCH_SIZE = 16, 24, 32, 40
NULL_SIZE = "WARNING: mm/early_ioremap.c:136 at __early_ioremap"
TOO_LARGE = "WARNING: mm/early_ioremap.c:151 at __early_ioremap"


@pytest.mark.parametrize(
    ("size", "warning"),
    [(0, NULL_SIZE), (U64, NULL_SIZE), (1 << 40, TOO_LARGE), (256 * 1024 + 1, TOO_LARGE)],
)
def test_fdt_size_that_cannot_be_mapped(pc: Victim, size: int, warning: str) -> None:
    """Nothing, or more than 256 KiB, is refused before the FDT is looked at."""
    pc.put("setup_data", FDT_SIZE, size)
    phys = pc.phys("root FDT")
    assert pc.refused() == [warning, f"KHO: setup: failed to memremap FDT ({phys:#x})"]


@pytest.mark.parametrize("size", [1, 4095, 4097, 256 * 1024, (1 << 44) + 1])
def test_fdt_size_that_maps_a_page(pc: Victim, size: int) -> None:
    """Whole pages are mapped and counted in 32 bits; the size itself is never looked at again."""
    pc.put("setup_data", FDT_SIZE, size)
    pc.accepted()


@pytest.mark.parametrize("size", [1 << 44, 1 << 63])
def test_fdt_size_that_wraps_to_no_page(pc: Victim, size: int) -> None:
    """A multiple of 2**32 pages is none: the first look at the FDT faults."""
    pc.put("setup_data", FDT_SIZE, size)
    assert pc.panic().startswith("PANIC: early exception 0x0e: handover FDT")


def test_fdt_address_not_aligned(pc: Victim) -> None:
    """libfdt wants eight bytes of alignment."""
    pc.put("setup_data", FDT_ADDR, pc.phys("root FDT") + 4)
    phys = pc.phys("root FDT") + 4
    assert pc.refused() == [f"KHO: setup: handover FDT ({phys:#x}) is invalid: -19"]


@pytest.mark.parametrize("phys", [NOWHERE, 0x4000000, 0xA0000])
def test_fdt_address_without_ram(pc: Victim, phys: int) -> None:
    """Where no RAM answers all bits read as one."""
    pc.put("setup_data", FDT_ADDR, phys)
    assert pc.refused() == [f"KHO: setup: handover FDT ({phys:#x}) is invalid: -9"]


def test_fdt_header_at_the_end_of_its_page(pc: Victim) -> None:
    """A header that leaves the one page mapped is a fault, not an error."""
    phys = pc.phys("guests") + pc.page - 8
    pc.target.ram.write(phys, struct.pack(">II", 0xD00DFEED, 100), BY)
    pc.put("setup_data", FDT_ADDR, phys, 8)
    assert pc.panic().startswith("PANIC: early exception 0x0e: handover FDT")


@pytest.mark.parametrize(
    ("length", "shown", "warning"),
    [(0, 0, NULL_SIZE), (U64, -1, NULL_SIZE), (1 << 40, 1 << 40, TOO_LARGE)],
)
def test_scratch_length_that_cannot_be_mapped(
    pc: Victim, length: int, shown: int, warning: str
) -> None:
    """A scratch array of no bytes or of too many is refused."""
    pc.put("setup_data", SCRATCH_SIZE, length)
    phys = pc.phys("scratch array")
    assert pc.refused() == [
        warning,
        f"KHO: setup: failed to memremap scratch (phys={phys:#x}, len={shown})",
    ]


@pytest.mark.parametrize("more", [0, 1, 15])
def test_scratch_length_not_a_multiple(pc: Victim, more: int) -> None:
    """Part of an entry does not count."""
    pc.put("setup_data", SCRATCH_SIZE, 48 + more)
    assert len(pc.accepted().scratch_areas()) == 3


def test_scratch_length_below_one_entry(pc: Victim) -> None:
    """Without any area the handover is accepted, and there is nothing to allocate from."""
    pc.put("setup_data", SCRATCH_SIZE, 15)
    assert pc.panic() == "Cannot allocate 12480 bytes for node 0 data"


def test_scratch_array_without_ram(pc: Victim) -> None:
    """Areas made of ones lie at the end of the address space and are cut down to nothing."""
    pc.put("setup_data", SCRATCH_ADDR, NOWHERE)
    assert pc.panic() == "Cannot allocate 12480 bytes for node 0 data"


def test_fdt_at_address_zero(pc: Victim) -> None:
    """An FDT at 0 is accepted, but then looks like none, and its scratch array was never found."""
    pc.target.ram.write(0, pc.read("root FDT"), BY)
    pc.put("setup_data", FDT_ADDR, 0)
    assert pc.panic() == "BUG: kernel NULL pointer dereference: kho_scratch is gone"


# -- the scratch array ----------------------------------------------------------------------------


def test_zeroed_scratch_array(pc: Victim) -> None:
    """Areas of no bytes leave nothing to allocate from."""
    pc.put("scratch array", 0, *[0] * 6)
    assert pc.panic() == "Cannot allocate 12480 bytes for node 0 data"


def test_overlapping_scratch_areas(pc: Victim) -> None:
    """Areas may overlap: together they are one."""
    addr, size = struct.unpack("<QQ", pc.target.ram.read(pc.phys("scratch array"), 16))
    pc.put("scratch array", 16, addr + pc.page, size)
    assert pc.accepted().scratch_areas()[1] == (addr + pc.page, size)


@pytest.mark.parametrize("addr", [0x4000000, NOWHERE, 1 << 52, 1 << 63])
def test_scratch_area_beyond_ram(pc: Victim, addr: int) -> None:
    """Memory that belongs to no node lets no node go online."""
    pc.put("scratch array", 0, addr, 16 << 20)
    assert pc.panic() == "BUG: kernel NULL pointer dereference: no NUMA node is online"


def test_a_little_scratch_beyond_ram(pc: Victim) -> None:
    """A megabyte without a node is tolerated, until its struct pages are to be made."""
    pc.put("scratch array", 0, NOWHERE, 1 << 20)
    assert pc.panic().endswith("has no node in memmap_init")


def test_scratch_area_in_a_hole(two_nodes: Victim) -> None:
    """What has no RAM behind it becomes memory like any other, and the kernel dies of it."""
    two_nodes.put("scratch array", 0, 0x5000000, 0x200000)
    assert "no RAM" in two_nodes.panic()


def test_more_scratch_areas_than_memblock_has_room_for(pc: Victim) -> None:
    """Before memory is known the array of regions cannot grow."""
    areas = [word for i in range(200) for word in (0x1800000 + 0x2000 * i, 0x1000)]
    array = pc.phys("scratch array")
    pc.target.ram.write(array, struct.pack("<400Q", *areas), BY)
    pc.put("setup_data", SCRATCH_SIZE, 3200)
    assert pc.panic() == "memblock: cannot resize memory array"


@pytest.mark.parametrize("size", [U64, 1 << 62, 1 << 47])
def test_huge_scratch_area(pc: Victim, arm: Victim, size: int) -> None:
    """A scratch area of all there is ends the boot at once, not after a walk over it."""
    for victim in (pc, arm):
        addr = victim.target.ram.read_u64(victim.phys("scratch array"))
        victim.put("scratch array", 0, addr, size)
        victim.panic()


# -- the tree -------------------------------------------------------------------------------------


def test_entry_to_nowhere(pc: Victim) -> None:
    """Each table's entries are followed without a look at them."""
    pc.put("table 1.0", 8 * 5, NOWHERE)
    assert pc.panic().endswith(f"phys {NOWHERE:#x} is not mapped")


def test_truncated_leaf(pc: Victim) -> None:
    """Keys that are gone are pages that nobody has preserved."""
    pc.target.ram.zero(pc.leaf_of(ORDER_0), pc.page, BY)
    kernel = pc.accepted()
    first = pc.target.blocks[0]
    assert kernel.kho_restore_folio(first) is None
    assert kernel.messages[-1].startswith("WARNING: ")


def test_tree_that_holds_itself(pc: Victim) -> None:
    """Depth is fixed, so a table that is its own child is read as a leaf in the end."""
    pc.put("table 0.0", 8 * 3, pc.phys("table 0.0"))
    assert "kho_preserved_memory_reserve" in pc.panic()


def test_tree_of_endless_paths(pc: Victim) -> None:
    """A table full of pointers to itself has more paths than anybody can walk."""
    root = pc.phys("table 0.0")
    pc.put("table 0.0", 0, *[root] * 512)
    assert pc.panic() == CIRCLES


def test_misaligned_leaves(pc: Victim) -> None:
    """Leaves that overlap each other byte by byte are as many, and as endless."""
    leaf = pc.leaf_of(ORDER_0)
    pc.target.ram.write(leaf, b"\x55" * 2 * pc.page, BY)
    parent = next(
        site.phys
        for site in pc.tree
        if site.kind == "table" and struct.pack("<Q", leaf) in pc.read(site.name)
    )
    pc.target.ram.write(parent, struct.pack("<512Q", *range(leaf + 1, leaf + 513)), BY)
    assert pc.panic() == CIRCLES


@pytest.mark.parametrize(
    ("key", "order"), [(0, 53), (1, 52), (2, 51), (3, 51), (1 << 12, 40), (1 << 53, -1)]
)
def test_impossible_orders(pc: Victim, key: int, order: int) -> None:
    """The lowest keys mean blocks as large as the address space, too wide ones none at all."""
    pc.add_key(key)
    assert f"impossible order {order}" in pc.panic()


@pytest.mark.parametrize("order", [20, 30, 34])
def test_block_larger_than_ram(pc: Victim, order: int) -> None:
    """A block that begins in RAM is reserved to its end, whatever there is: nothing is left."""
    pc.add_key(1 << (52 - order))
    assert pc.panic() == "kernel BUG at mm/slub.c:7771!"


def test_key_outside_of_ram(pc: Victim) -> None:
    """A preserved page that has no struct page, in a section without memory, is a fault."""
    leaf = pc.leaf_of(ORDER_0)
    bit = next(i for i, byte in enumerate(pc.target.ram.read(leaf, pc.page)) if byte)
    table = next(
        (site.phys, index)
        for site in pc.tree
        for index in range(pc.page // 8)
        if site.kind == "table" and pc.target.ram.read_u64(site.phys + 8 * index) == leaf
    )
    # The same leaf once more, for the next 128 MiB: the machine ends after 64.
    pc.target.ram.write_u64(table[0] + 8 * table[1] + 8, leaf, BY)
    byte = pc.target.ram.read(leaf + bit, 1)[0]
    pfn = 0x8000 + 8 * bit + (byte & -byte).bit_length() - 1
    assert pc.panic() == (
        f"BUG: unable to handle page fault for address: struct page of pfn {pfn:#x} in "
        "kho_preserved_memory_reserve"
    )


def test_key_beyond_ram_with_a_struct_page(pc: Victim) -> None:
    """A section has all its struct pages, so a page of it that is no RAM goes unnoticed."""
    pc.add_key(ORDER_0 | 0x7FFF)
    kernel = pc.accepted()
    assert kernel.kho_restore_folio(0x7FFF << 12) is not None


def test_key_across_nodes(two_nodes: Victim) -> None:
    """A block that spans two nodes, which no writer makes, is taken over as one."""
    node_border = two_nodes.target.machine.hardware.memory_map.node_ranges[-1].start >> 12
    order = (node_border & -node_border).bit_length()
    start = node_border & -(1 << order)
    two_nodes.add_key(1 << (52 - order) | start >> order)
    kernel = two_nodes.accepted()
    for pfn in (start, node_border):
        assert kernel.page(pfn).kind == "incoming"
        assert kernel.page(pfn).order == order


# -- subtrees -------------------------------------------------------------------------------------


def _point_subtree(victim: Victim, name: str, phys: int) -> None:
    site = victim.target.site(name)
    victim.replace("root FDT", struct.pack("<Q", site.phys), struct.pack("<Q", phys))


@pytest.mark.parametrize("name", ["memblock", "kexec-metadata"])
@pytest.mark.parametrize("phys", [NOWHERE, U64 - 3, 0x3FFFFFE])
def test_blob_outside_of_ram(pc: Victim, name: str, phys: int) -> None:
    """The kernel follows the address of its own blobs, and faults."""
    _point_subtree(pc, name, phys)
    assert pc.panic().endswith(f"phys {phys:#x} is not mapped")


def test_user_blob_outside_of_ram(pc: Victim) -> None:
    """A user's blob is the user's business; whoever reads its file faults."""
    _point_subtree(pc, "guests", NOWHERE)
    kernel = pc.accepted()
    assert kernel.kho_retrieve_subtree("guests") == (NOWHERE, 300)
    with pytest.raises(KernelPanic, match="is not mapped"):
        kernel.debugfs.read("in/sub_fdts/guests")


def test_user_blob_larger_than_ram(pc: Victim) -> None:
    """A blob's size is passed on as it is; reading its file to the end faults."""
    pc.replace("root FDT", struct.pack("<Q", 300), struct.pack("<Q", 1 << 62))
    kernel = pc.accepted()
    assert kernel.kho_retrieve_subtree("guests")[1] == 1 << 62
    with pytest.raises(KernelPanic, match="is not mapped"):
        kernel.debugfs.read("in/sub_fdts/guests")


def test_subtrees_with_impossible_file_names(pc: Victim) -> None:
    """A name that debugfs cannot have costs the file and a message."""
    pc.replace("root FDT", b"guests\0", b"gue/ts\0")
    kernel = pc.accepted()
    assert "KHO: failed to add blob gue/ts to debugfs: -EACCES" in kernel.messages
    with pytest.raises(KernelError, match="-ENOENT"):
        kernel.kho_retrieve_subtree("guests")


def test_two_subtrees_of_one_name(pc: Victim) -> None:
    """The second of two equal names gets no file."""
    pc.replace("root FDT", b"guests\0\0", b"memblock")
    pc.boot()


# -- kexec-metadata -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "size", "message"),
    [
        (1, 3, "KHO: kexec-metadata blob too small (3 bytes)"),
        (1, 0, "KHO: kexec-metadata blob too small (0 bytes)"),
        (2, 73, "KHO: kexec-metadata version 2 not supported (expected 1)"),
        (0xFFFFFFFF, 4, "KHO: kexec-metadata version 4294967295 not supported (expected 1)"),
        (1, 72, "KHO: kexec-metadata blob too small for v1 (72 < 73)"),
    ],
)
def test_bad_kexec_metadata(pc: Victim, version: int, size: int, message: str) -> None:
    """Metadata of another version or size is passed over with a word."""
    pc.write("kexec-metadata", 0, struct.pack("<I", version))
    pc.replace("root FDT", struct.pack("<Q", 73), struct.pack("<Q", size))
    kernel = pc.accepted()
    assert message in kernel.messages
    assert kernel.kho_in.kexec_count == 0


def test_kexec_metadata_without_an_end(pc: Victim) -> None:
    """A release name without its NUL is cut, and the count wraps at 32 bits."""
    pc.write("kexec-metadata", 4, b"x" * 65 + b"\xff" * 4)
    kernel = pc.accepted()
    assert f"KHO: exec from: {'x' * 64} (count 4294967295)" in kernel.messages
    assert pc.target.machine.kexec(kernel).kho_in.kexec_count == 0


# -- reserve_mem ----------------------------------------------------------------------------------


def _reserve_mem(victim: Victim) -> tuple[int, int]:
    content = victim.read("memblock")
    node = fdt.fdt_subnode_offset(content, 0, "oops")
    start, _ = fdt.fdt_getprop(content, node, "start")
    size, _ = fdt.fdt_getprop(content, node, "size")
    assert start is not None
    assert size is not None
    at = content.index(bytes(start))
    return at, content.index(bytes(size), at + 8)


def test_reserve_mem_of_another_size(pc: Victim) -> None:
    """A region that has another size than the command line wants is allocated anew."""
    pc.put("memblock", _reserve_mem(pc)[1], 4096)
    message = "KHO reserve-mem 'oops' has wrong size (0x1000 != 0x10000)"
    assert message in pc.accepted().messages


def test_reserve_mem_not_aligned(pc: Victim) -> None:
    """A region that is not aligned as the command line wants is allocated anew."""
    pc.put("memblock", _reserve_mem(pc)[0], 0x2000800)
    message = "KHO reserve-mem 'oops' has wrong alignment (0x1000, 0x2000800)"
    assert message in pc.accepted().messages


@pytest.mark.parametrize("start", [NOWHERE, U64 & -4096])
def test_reserve_mem_outside_of_ram(pc: Victim, start: int) -> None:
    """A region without struct pages is revived, and preserving it for the next kernel faults."""
    pc.put("memblock", _reserve_mem(pc)[0], start)
    assert "struct page of pfn" in pc.panic()


def test_reserve_mem_at_page_zero(pc: Victim) -> None:
    """Page 0 has every alignment: the kernel shifts by -1."""
    pc.put("memblock", _reserve_mem(pc)[0], 0)
    assert "pfn 0" in pc.panic()


def test_reserve_mem_under_another_name(pc: Victim) -> None:
    """A name that the predecessor did not use is allocated anew."""
    pc.replace("memblock", b"oops\0", b"OOPS\0")
    assert "FDT 'memblock' has no child 'oops': -1" in pc.accepted().messages


def test_reserve_mem_fdt_overwritten(pc: Victim) -> None:
    """A memblock FDT that is none is passed over with libfdt's error."""
    pc.write("memblock", 0, bytes(64))
    assert "FDT 'memblock' is incompatible with 'memblock-v1': -4" in pc.accepted().messages


# -- boot protocol and image ----------------------------------------------------------------------


def test_endless_setup_data(pc: Victim) -> None:
    """A list that comes back to itself is walked for ever."""
    pc.put("setup_data", 0, pc.phys("setup_data"))
    assert "hangs" in pc.panic()


def test_setup_data_nowhere(pc: Victim) -> None:
    """Ones instead of a header lead to an address that cannot be mapped."""
    pc.put("boot parameters", 0x250, NOWHERE)
    assert pc.panic()


def test_no_setup_data(pc: Victim) -> None:
    """Without the pointer there was no handover: a cold boot, without a word."""
    pc.put("boot parameters", 0x250, 0)
    kernel = pc.boot()
    assert not kernel.is_kho_boot
    assert not [line for line in kernel.messages if "revival" in line or "found" in line]


@pytest.mark.parametrize("length", [0, 0xFFFFFFF0])
def test_kho_data_length(pc: Victim, length: int) -> None:
    """The length of the entry is computed in 32 bits and used in 64."""
    pc.write("setup_data", 12, struct.pack("<I", length))
    kernel = pc.boot()
    addr = pc.phys("setup_data") + 16
    size = length - (1 << 32) & U64 if length else 0
    assert f"setup: failed to memremap kho data (0x{addr:x}, 0x{size:x})" in kernel.messages
    assert not kernel.is_kho_boot


def test_no_memory_in_the_map(pc: Victim) -> None:
    """Without E820 entries and the older sources 636 KiB are left: the kernel does not fit."""
    pc.write("boot parameters", 0x1E8, b"\0")
    pc.write("boot parameters", 0x1E0, bytes(4))
    pc.write("boot parameters", 2, bytes(2))
    assert pc.panic()


@pytest.mark.parametrize("site", ["kernel image"])
def test_overwritten_image(pc: Victim, arm: Victim, site: str) -> None:
    """Zeros where the kernel's code was are no kernel."""
    for victim in (pc, arm):
        victim.write(site, 0, bytes(0x400))
        assert victim.panic() == "no kernel at the entry point: the image is overwritten"


def test_damaged_image(pc: Victim) -> None:
    """A kernel with damaged code dies early."""
    pc.write("kernel image", 0x220, b"\xff\xfe")
    assert pc.panic() == "the kernel image is corrupted: it faults in early boot"


def test_subtly_damaged_image(pc: Victim) -> None:
    """A single digit that has changed is damage too."""
    pc.replace("kernel image", b'"nr_cpus":2', b'"nr_cpus":9')
    assert pc.panic() == "the kernel image is corrupted: it faults in early boot"


# -- arm64 ----------------------------------------------------------------------------------------


def test_arm64_device_tree_refused(arm: Victim) -> None:
    """A device tree without its magic, or beyond 2 MiB, stops the kernel."""
    arm.write("device tree", 4, struct.pack(">I", (2 << 20) + 1))
    assert arm.panic().startswith("Error: invalid device tree blob")


def test_arm64_handover_under_another_name(arm: Victim) -> None:
    """Half of the handover's properties is no handover."""
    arm.replace("device tree", b"linux,kho-scratch\0", b"linux,kho-Scratch\0")
    assert not arm.boot().is_kho_boot


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (0, "Unable to handle kernel paging request: page table at 0x3ff74000 is not mapped"),
        (1, "no memory in the device tree"),
        (3, "no memory in the device tree"),
        (0x7FFFFFFF, "Unable to handle kernel paging request: the end of reg"),
        (0xFFFFFFFF, "Unable to handle kernel paging request: the end of reg"),
        (0xFFFFFFFE, "no memory in the device tree"),
    ],
)
def test_arm64_address_cells(arm: Victim, cells: int, message: str) -> None:
    """Addresses of another width make other memory of the same bytes, or none."""
    content = arm.read("device tree")
    strings = struct.unpack(">I", content[12:16])[0]
    at = content.index(struct.pack(">II", 4, content.index(b"#address-cells\0") - strings))
    arm.write("device tree", at + 8, struct.pack(">I", cells))
    assert arm.panic() == message


def test_arm64_kho_fdt_nowhere(arm: Victim) -> None:
    """The handover's address is looked at, and refused."""
    phys = arm.phys("root FDT")
    arm.replace("device tree", struct.pack(">QQ", phys, arm.page), struct.pack(">QQ", 0, arm.page))
    assert arm.refused() == ["KHO: setup: handover FDT (0x0) is invalid: -9"]


# -- by the hundred -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_hundreds_of_mutations(name: str) -> None:
    """Spoiled at random, every boot ends as a kernel's would, and soon."""
    soak = Soak(target=build_target(name), seed=7)
    for index in range(700):
        soak.run(index)
    assert [str(finding) for finding in soak.findings] == []
    assert {"accepted", "accepted, with complaints", "refused", "panic"} <= set(soak.outcomes)


def test_mutations_repeat() -> None:
    """The same seed and index make the same boot, whatever ran before."""
    one = Soak(target=build_target(TARGETS[0]), seed=3)
    outcomes = [one.run(index) for index in range(40)]
    other = Soak(target=build_target(TARGETS[0]), seed=3)
    assert [other.run(index) for index in reversed(range(40))] == outcomes[::-1]


def test_the_soak_reports(capsys: pytest.CaptureFixture[str]) -> None:
    """The command counts outcomes, and says what was slowest and how far memory grew."""
    assert main(["--count", "30", "--seed", "5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(report["outcomes"].values()) == report["mutations"] == 30
    assert report["findings"] == []
    assert report["slowest_seconds"] > 0
    assert report["peak_growth_bytes"] >= 0


def test_the_soak_finds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception that is no kernel's ends with status 1 and the recipe of its mutation."""
    monkeypatch.setattr(Soak, "_classify", lambda *args: [][1])
    assert main(["--target", TARGETS[0], "--count", "9"]) == 1
    out = capsys.readouterr().out
    assert f"FOUND target '{TARGETS[0]}', seed 0, index " in out
    assert "IndexError: list index out of range" in out


def test_the_soak_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A boot without an end is ended, and found."""
    soak = Soak(target=build_target(TARGETS[0]), seed=0)

    def forever(*args: object) -> str:
        while True:
            pass

    monkeypatch.setattr(Soak, "_classify", forever)
    monkeypatch.setattr("benchmarks.soak.TIMEOUT_SECONDS", 0.05)
    assert "timeout" in [soak.run(index) for index in range(9)]
    assert soak.findings[0].what == "no outcome in 0.05 s"


def test_the_soak_refuses_half_a_recipe() -> None:
    """An index means nothing without its target."""
    assert main(["--index", "0"]) == 2
