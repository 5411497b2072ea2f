"""reserve_mem=: what it takes, what it refuses, and what becomes of a region in a successor."""

from __future__ import annotations

import errno
import struct

import pytest

from khosim import KernelError, Machine
from khosim.abi import fdt
from khosim.kernel.boot import boot
from khosim.kernel.bootloader import load_kernel
from khosim.kernel.image import KernelConfig, KernelImage
from khosim.kernel.release import find_release

MIB = 1 << 20
MALFORMED = "reserve_mem: empty or malformed parameter"


def booted(cmdline, *, kho="kho=on", ram="64M", **options):
    """A machine and its first kernel."""
    machine = Machine(ram, **options)
    return machine, machine.boot(cmdline=f"{kho} {cmdline}")


def said(kernel, *words):
    """The kernel's messages that have one of ``words`` in them."""
    return [line for line in kernel.messages if any(word in line for word in words)]


def kexec(machine, kernel, cmdline=None, poke=None):
    """The successor; ``poke(machine)`` may spoil RAM between the jump and the boot."""
    machine.load_successor(kernel, cmdline=cmdline)
    if poke is not None:
        poke(machine)
    return machine.resume()


# -- the parameter --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size", "align"),
    [
        ("64K:4096:x", 64 << 10, 4096),
        ("0x10000:0x1000:x", 64 << 10, 4096),
        ("1M:2M:x", MIB, 2 * MIB),
        ("4096:1:x", 4096, 64),
        ("4096::x", 4096, 64),
        ("4096:K:x", 4096, 64),
        ("100:64:x", 100, 64),
        ("010:64:x", 8, 64),
    ],
)
def test_size_and_alignment_are_read_by_memparse(text, size, align):
    """Octal, hexadecimal, suffixes; less than a cache line of alignment becomes one.

    "K" alone is no number, so the colon is missing where it is looked for.
    """
    _, kernel = booted(f"reserve_mem={text}")
    if text == "4096:K:x":
        assert said(kernel, "reserve_mem") == [MALFORMED]
        return
    start, got = kernel.reserve_mem.find_by_name("x")
    assert got == size
    assert start % align == 0
    assert kernel.memblock.memblock_is_region_reserved(start, size)
    assert said(kernel, "reserve_mem") == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "::",
        "1M",
        "1M:",
        "1M:4096",
        "1M:4096:",
        "M:4096:x",
        "0:4096:x",
        "1M 4096 x",
        "1Mx:4096:x",
        "1M:4096x:x",
        "-1:4096:x",
        "1M:4096:" + "n" * 16,
        '"1M:4096:  "',
        "1M;4096;x",
    ],
)
def test_malformed(text):
    """No size, no colon, no name, a blank name, or one of 16 characters and more."""
    _, kernel = booted(f"reserve_mem={text}")
    assert said(kernel, "reserve_mem") == [MALFORMED]
    assert kernel.reserve_mem.regions == []


def test_a_name_of_fifteen_characters_fits():
    """RESERVE_MEM_NAME_SIZE counts the NUL; colons and blanks are part of a name."""
    _, kernel = booted('reserve_mem=4K:4096:fifteen-letters "reserve_mem=4K:4096:a: b"')
    assert [name for name, _, _ in kernel.reserve_mem.regions] == ["fifteen-letters", "a: b"]


def test_a_word_without_an_equals_sign_is_nothing():
    """__setup("reserve_mem=") does not match it."""
    _, kernel = booted("reserve_mem")
    assert said(kernel, "reserve_mem") == []


def test_duplicate_names():
    """The first one counts."""
    _, kernel = booted("reserve_mem=64K:4096:x reserve_mem=128K:4096:x")
    assert said(kernel, "reserve_mem") == ['reserve_mem: name "x" was already used']
    assert kernel.reserve_mem.find_by_name("x")[1] == 64 << 10


def test_eight_at_most():
    """The ninth and tenth are refused before they are even read; failed ones take no room."""
    words = ["reserve_mem=bad", *(f"reserve_mem=4K:4096:r{i}" for i in range(9)), "reserve_mem=bad"]
    _, kernel = booted(" ".join(words))
    full = "reserve_mem: no more room for reserved memory"
    assert said(kernel, "reserve_mem") == [MALFORMED, full, full]
    assert [name for name, _, _ in kernel.reserve_mem.regions] == [f"r{i}" for i in range(8)]


def test_what_does_not_fit():
    """memblock has no such range."""
    _, kernel = booted("reserve_mem=1G:4096:x reserve_mem=4K:1G:y")
    assert said(kernel, "reserve_mem") == ["reserve_mem: memblock allocation failed"] * 2
    assert kernel.reserve_mem.regions == []


def test_regions_count_as_the_kernels_own():
    """They make the scratch areas of this kernel larger, though the next one revives them."""
    plain = Machine("256M").boot(cmdline="kho=on").scratch_areas()
    more = Machine("256M").boot(cmdline="kho=on reserve_mem=8M:4096:x").scratch_areas()
    assert more[0][1] - plain[0][1] == 16 * MIB


def test_without_kho_regions_are_only_reserved():
    """No subtree, nothing preserved."""
    _, kernel = booted("reserve_mem=64K:4096:x", kho="kho=off")
    assert kernel.reserve_mem.find_by_name("x")[1] == 64 << 10
    assert kernel.debugfs.files() == []


def test_find_by_name():
    """Exactly that name; None for another."""
    _, kernel = booted("reserve_mem=64K:4096:x reserve_mem=4K:4096:xy")
    assert kernel.reserve_mem.find_by_name("xy")[1] == 4096
    assert kernel.reserve_mem.find_by_name("y") is None
    assert kernel.reserve_mem.find_by_name("") is None


# -- the subtree ----------------------------------------------------------------------------------


def test_the_subtree_byte_for_byte():
    """Header, one node for each region with compatible, start and size; names shared."""
    _, kernel = booted("reserve_mem=64K:4096:oops reserve_mem=4K:4096:b")
    blob = kernel.debugfs.read("out/sub_fdts/memblock")
    oops, b = (kernel.reserve_mem.find_by_name(name) for name in ("oops", "b"))

    def prop(name_at, value):
        padded = value.ljust(-(-len(value) // 4) * 4, b"\0")
        return struct.pack(">III", 3, len(value), name_at) + padded

    def region(name, where):
        return (
            struct.pack(">I", 1)
            + name.ljust(-(-(len(name) + 1) // 4) * 4, b"\0")
            + prop(11, b"reserve-mem-v1\0")
            + prop(5, struct.pack("<Q", where[0]))
            + prop(0, struct.pack("<Q", where[1]))
            + struct.pack(">I", 2)
        )

    structure = struct.pack(">II", 1, 0) + prop(11, b"memblock-v1\0")
    structure += region(b"oops", oops) + region(b"b", b) + struct.pack(">II", 2, 9)
    strings = b"size\0start\0compatible\0"  # written from the end of the page downwards
    # The header, rounded up to 16 bytes; the end of the empty reserve map; structure; strings.
    struct_at = 48 + 16
    strings_at = struct_at + len(structure)
    total = strings_at + len(strings)
    fields = 0xD00DFEED, total, struct_at, strings_at, 48, 17, 16, 0, len(strings), len(structure)
    header = struct.pack(">10I", *fields).ljust(48, b"\0")
    assert blob == header + bytes(16) + structure + strings


def test_regions_and_their_description_are_preserved():
    """Each whole page of each region, and the subtree's own page."""
    machine, kernel = booted("reserve_mem=128K:4096:x")
    start, size = kernel.reserve_mem.find_by_name("x")
    successor = kexec(machine, kernel)
    subtree, _ = successor.kho_retrieve_subtree("memblock")
    for pfn in (start >> 12, (start + size - 1) >> 12, subtree >> 12):
        assert successor.page(pfn).kind == "incoming"
    assert successor.page((start + size) >> 12).kind != "incoming"


def test_a_partial_page_is_not_preserved():
    """size >> PAGE_SHIFT pages from the page of the start: the rest is lost on the way."""
    machine, kernel = booted("reserve_mem=6000:4096:x reserve_mem=100:64:tiny")
    start, _ = kernel.reserve_mem.find_by_name("x")
    tiny, _ = kernel.reserve_mem.find_by_name("tiny")
    successor = kexec(machine, kernel)
    assert successor.page(start >> 12).kind == "incoming"
    assert successor.page((start >> 12) + 1).kind != "incoming"
    assert successor.page(tiny >> 12).kind != "incoming"
    assert successor.reserve_mem.find_by_name("tiny") == (tiny, 100)


# -- revival --------------------------------------------------------------------------------------


def test_revived_at_the_same_place_with_every_byte():
    """Three generations in a row; content written in the first is there in the last."""
    machine, kernel = booted("reserve_mem=64K:4096:x reserve_mem=128K:64K:y")
    wanted = kernel.reserve_mem.regions[:]
    start, size = kernel.reserve_mem.find_by_name("x")
    content = bytes(range(256)) * (size // 256)
    kernel.ram.write(start, content, (0, "user"))
    for _ in range(3):
        kernel = kexec(machine, kernel)
        assert kernel.reserve_mem.regions == wanted
        assert kernel.ram.read(start, size) == content
        assert said(kernel, "reserve", "Revived", "FDT") == [
            "Revived memory reservation 'x' from KHO",
            "Revived memory reservation 'y' from KHO",
        ]


def test_a_new_name_is_allocated_in_scratch():
    """No such child: a new region, and on a handover boot memblock has nothing but scratch."""
    machine, kernel = booted("reserve_mem=64K:4096:x")
    successor = kexec(machine, kernel, "kho=on reserve_mem=64K:4096:other")
    assert said(successor, "FDT", "Revived") == ["FDT 'memblock' has no child 'other': -1"]
    start, size = successor.reserve_mem.find_by_name("other")
    assert successor.kho_scratch_overlap(start, size)


def test_a_new_region_fails_the_debug_check():
    """With KEXEC_HANDOVER_DEBUG scratch cannot be preserved: no region is handed on at all."""
    machine = Machine("256M")
    config = KernelConfig(release=find_release("7.3"), debug=True)
    kernel = machine.boot(cmdline="kho=on reserve_mem=64K:4096:x", config=config)
    successor = kexec(machine, kernel, "kho=on reserve_mem=64K:4096:other")
    assert "failed to prepare memblock FDT for KHO: -22" in successor.messages
    assert "out/sub_fdts/memblock" not in successor.debugfs.files()
    assert successor.kho_enable


def test_another_size_is_refused():
    """The message names both sizes; the region is allocated anew."""
    machine, kernel = booted("reserve_mem=64K:4096:x")
    old, _ = kernel.reserve_mem.find_by_name("x")
    successor = kexec(machine, kernel, "kho=on reserve_mem=128K:4096:x")
    assert said(successor, "reserve-mem", "Revived") == [
        "KHO reserve-mem 'x' has wrong size (0x10000 != 0x20000)"
    ]
    start, size = successor.reserve_mem.find_by_name("x")
    assert size == 128 << 10
    assert start != old


def test_another_alignment_is_refused():
    """Unless the old address happens to have it."""
    machine, kernel = booted("reserve_mem=64K:4096:x")
    start, _ = kernel.reserve_mem.find_by_name("x")
    align = 2 * (start & -start)
    assert align <= 32 * MIB
    successor = kexec(machine, kernel, f"kho=on reserve_mem=64K:{align}:x")
    assert said(successor, "wrong alignment") == [
        f"KHO reserve-mem 'x' has wrong alignment ({align:#x}, {start:#x})"
    ]
    machine, kernel = booted("reserve_mem=64K:4096:x")
    assert kernel.reserve_mem.find_by_name("x")[0] == start
    successor = kexec(machine, kernel, f"kho=on reserve_mem=64K:{start & -start}:x")
    assert successor.reserve_mem.find_by_name("x")[0] == start


def test_an_alignment_that_is_no_power_of_two():
    """The kernel masks with align - 1 and does not divide: multiples may fail, others pass."""
    machine, kernel = booted("reserve_mem=64K:4096:x")
    start, _ = kernel.reserve_mem.find_by_name("x")
    assert start & (start - 1)
    successor = kexec(machine, kernel, f"kho=on reserve_mem=64K:{start}:x")
    assert said(successor, "wrong alignment") == [
        f"KHO reserve-mem 'x' has wrong alignment ({start:#x}, {start:#x})"
    ]
    machine, kernel = booted("reserve_mem=64K:4096:x")
    align = 0xC01
    assert start % align
    successor = kexec(machine, kernel, f"kho=on reserve_mem=64K:{align}:x")
    assert successor.reserve_mem.find_by_name("x")[0] == start


def test_a_predecessor_without_regions():
    """No memblock subtree: -ENOENT, and not a word."""
    machine, kernel = booted("")
    successor = kexec(machine, kernel, "kho=on reserve_mem=64K:4096:x")
    assert said(successor, "FDT", "Revived", "reserve") == []
    assert successor.reserve_mem.find_by_name("x")[1] == 64 << 10


def spoil(kernel, old, new):
    """A poke that replaces bytes in the memblock subtree's blob."""
    tree = kernel.fdt_at(kernel.kho_out.fdt_phys)
    node = fdt.fdt_subnode_offset(tree, 0, "memblock")
    (phys,) = struct.unpack("<Q", fdt.fdt_getprop(tree, node, "preserved-data")[0])

    def poke(machine):
        blob = machine.hardware.ram.read(phys, 4096)
        assert old in blob
        machine.hardware.ram.write(phys, blob.replace(old, new), (9, "poke"))

    return poke


@pytest.mark.parametrize(
    ("old", "new", "messages"),
    [
        (
            b"memblock-v1",
            b"memblock-v9",
            ["FDT 'memblock' is incompatible with 'memblock-v1': 1"] * 2,
        ),
        (
            b"reserve-mem-v1",
            b"reserve-mem-v9",
            [
                "Node 'x' is incompatible with 'reserve-mem-v1': 1",
                "Node 'y' is incompatible with 'reserve-mem-v1': 1",
            ],
        ),
        (b"start\0", b"stort\0", []),
        (b"size\0", b"sise\0", []),
        (
            b"compatible\0",
            b"compotible\0",
            ["FDT 'memblock' is incompatible with 'memblock-v1': -1"] * 2,
        ),
    ],
)
def test_a_spoiled_subtree(old, new, messages):
    """Every refusal with the kernel's words; the region is allocated anew and life goes on."""
    machine, kernel = booted("reserve_mem=64K:4096:x reserve_mem=4K:4096:y")
    successor = kexec(machine, kernel, poke=spoil(kernel, old, new))
    assert said(successor, "FDT", "Node", "Revived", "reserve") == messages
    assert [size for _, _, size in successor.reserve_mem.regions] == [64 << 10, 4096]


def test_a_start_of_another_length():
    """start and size must be 8 bytes each; no message says so."""
    machine, kernel = booted("reserve_mem=64K:4096:x")
    start = struct.pack(">II", 8, 5)
    successor = kexec(machine, kernel, poke=spoil(kernel, start, struct.pack(">II", 7, 5)))
    assert said(successor, "FDT", "Revived", "reserve") == []
    assert successor.reserve_mem.find_by_name("x")[1] == 64 << 10


def test_a_subtree_without_a_size_in_the_root():
    """The root FDT's node is broken: reported by KHO and by reserve_mem."""
    machine, kernel = booted("reserve_mem=64K:4096:x")
    fdt_phys = kernel.kho_out.fdt_phys

    def poke(machine):
        ram = machine.hardware.ram
        tree = memoryview(bytearray(ram.read(fdt_phys, 4096)))
        node = fdt.fdt_subnode_offset(tree, 0, "memblock")
        assert fdt.fdt_delprop(tree, node, "blob-size") == 0
        ram.write(fdt_phys, bytes(tree), (9, "poke"))

    successor = kexec(machine, kernel, poke=poke)
    assert said(successor, "broken", "retrieve") == [
        "KHO: broken KHO subnode 'memblock': missing or invalid blob-size property",
        "failed to retrieve FDT 'memblock' from KHO: -22",
    ]


# -- when memory runs out -------------------------------------------------------------------------


def boot_with_failures(
    machine, fails, cmdline="kho=on reserve_mem=64K:64K:x reserve_mem=8K:8K:y"
):
    """Boot, but make the allocations for which ``fails(nth, owner)`` holds come back empty."""
    seen: list[str] = []

    class Rig:
        def checkpoint(self, kernel, stage):
            if stage == "takeover":
                kernel.pages.fail = lambda order, owner: (
                    seen.append(owner) or fails(len(seen) - 1, owner)
                )

    image = KernelImage.build("7.3", size="4M")
    load_kernel(machine.hardware, image.data, initrd_bytes=MIB, cmdline=cmdline)
    return boot(machine.hardware, 0, host=Rig()), seen


def test_prepare_kho_fdt_fails_at_each_allocation():
    """-ENOMEM anywhere in reserve_mem_init: said, and nothing of it is left behind."""
    kernel, owners = boot_with_failures(Machine("64M"), lambda nth, owner: False)
    first = owners.index("prepare_kho_fdt")
    assert len(owners) > first + 1
    for failing in range(first, len(owners)):
        kernel, seen = boot_with_failures(Machine("64M"), lambda nth, owner, f=failing: nth == f)
        assert len(seen) > first
        assert "failed to prepare memblock FDT for KHO: -12" in kernel.messages
        assert "out/sub_fdts/memblock" not in kernel.debugfs.files()
        tree = kernel.fdt_at(kernel.kho_out.fdt_phys)
        assert fdt.fdt_subnode_offset(tree, 0, "memblock") == -1
        left = [
            name
            for count, key in kernel.kho_out.tree.walk()
            for name, start, size in kernel.reserve_mem.regions
            if count and _overlaps(key, count, start, size)
        ]
        assert left == []
        assert "prepare_kho_fdt" not in {run.state.owner for run in kernel.pages.pages.runs()}
        assert not any("Bad page" in line for line in kernel.messages)
        assert not any("never preserved" in line for line in kernel.messages)
        assert kernel.kho_enable


def _overlaps(key, count, start, size):
    # All keys of these tests are of one order.
    order = 64 - 12 - (key.bit_length() - 1)
    phys = (key << (12 + order)) & ((1 << 64) - 1)
    return phys < start + size and phys + (count << (12 + order)) > start


# -- release --------------------------------------------------------------------------------------


def test_release_gives_whole_pages_back():
    """Zeroed, free, and unknown from then on; the message names the region."""
    _, kernel = booted("reserve_mem=64K:4096:x", kho="kho=off")
    start, size = kernel.reserve_mem.find_by_name("x")
    kernel.ram.write(start, b"x" * size, (0, "user"))
    free = kernel.pages.nr_free_pages()
    assert kernel.reserve_mem.release_by_name("x")
    assert kernel.messages[-1] == "Freeing reserve_mem:x memory: 64K"
    assert kernel.pages.nr_free_pages() == free + 16
    assert kernel.ram.read(start, size) == bytes(size)
    assert kernel.reserve_mem.find_by_name("x") is None
    assert not kernel.reserve_mem.release_by_name("x")
    assert kernel.reserve_mem.regions == [("x", start, 0)]


def test_release_rounds_inwards():
    """A page that others share stays reserved; less than a page says nothing."""
    _, kernel = booted("reserve_mem=6000:4096:x reserve_mem=100:64:tiny", kho="kho=off")
    free = kernel.pages.nr_free_pages()
    assert kernel.reserve_mem.release_by_name("x")
    assert kernel.pages.nr_free_pages() == free + 1
    before = len(kernel.messages)
    assert kernel.reserve_mem.release_by_name("tiny")
    assert len(kernel.messages) == before


def test_a_released_region_is_still_handed_over():
    """Hazard: its pages stay preserved and described, so that the successor revives it."""
    machine, kernel = booted("reserve_mem=64K:4096:x")
    start, _ = kernel.reserve_mem.find_by_name("x")
    assert kernel.reserve_mem.release_by_name("x")
    successor = kexec(machine, kernel)
    assert "Revived memory reservation 'x' from KHO" in successor.messages
    assert successor.reserve_mem.find_by_name("x") == (start, 64 << 10)


def test_a_name_can_be_used_again_after_release():
    """The table keeps the old entry; lookups skip entries of size 0."""
    _, kernel = booted("reserve_mem=64K:4096:x", kho="kho=off")
    kernel.reserve_mem.release_by_name("x")
    assert kernel.reserve_mem.find_by_name("x") is None


def test_the_trace_tells_of_regions():
    """Allocated in one generation, revived in the next."""
    machine = Machine("64M")
    events = []
    machine.listen(events.append)
    kernel = machine.boot(cmdline="kho=on reserve_mem=64K:4096:x")
    start, size = kernel.reserve_mem.find_by_name("x")
    kernel.kexec()
    told = [
        (event.generation, event.symbol, event.args, event.result)
        for event in events
        if event.symbol.startswith("reserve_mem")
    ]
    assert told == [
        (0, "reserve_mem", {"name": "x", "size": size, "align": 4096}, start),
        (1, "reserve_mem_kho_revive", {"name": "x", "size": size}, start),
    ]


def test_errors_are_the_kernels():
    """parse returns 1 for success and negative errnos; all are printed, none is raised."""
    _, kernel = booted("", kho="kho=off")
    assert kernel.reserve_mem.parse("bad") == -errno.EINVAL
    with pytest.raises(KernelError, match="ENOENT"):
        kernel.kho_retrieve_subtree("memblock")
