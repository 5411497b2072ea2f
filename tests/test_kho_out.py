"""KHO, outgoing: preserving and forgetting, subtrees, and what is left when something fails."""

from __future__ import annotations

import errno
import struct

import numpy as np
import pytest

from khosim import KernelError, KernelPanic, Machine
from khosim.abi import fdt
from khosim.kernel.boot import boot
from khosim.kernel.bootloader import load_kernel
from khosim.kernel.image import KernelConfig, KernelImage
from khosim.kernel.kho_out import int_shift
from khosim.kernel.kho_radix_key import kho_decode_radix_key
from khosim.kernel.release import find_release

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 4096


@pytest.fixture
def kernel():
    """A small kernel with KHO on."""
    return Machine("64M").boot(cmdline="kho=on")


def preserved(kernel):
    """(pfn, order) of every key in the outgoing tree, sorted."""
    shift = kernel.arch.page_shift
    found = []
    for count, first in kernel.kho_out.tree.walk():
        for key in range(first, first + count):
            phys, order = kho_decode_radix_key(key, shift)
            found.append((phys >> shift, order))
    return sorted(found)


def new(kernel, before):
    """What was preserved since ``before``."""
    return sorted(set(preserved(kernel)) - set(before))


def subtrees(kernel):
    """name -> (phys, size) in the root FDT, in its order."""
    tree = kernel.fdt_at(kernel.kho_out.fdt_phys)
    found = {}
    node = fdt.fdt_first_subnode(tree, 0)
    while node >= 0:
        name = bytes(fdt.fdt_get_name(tree, node)[0]).decode()
        values = [
            struct.unpack("<Q", fdt.fdt_getprop(tree, node, prop)[0])[0]
            for prop in ("preserved-data", "blob-size")
        ]
        found[name] = tuple(values)
        node = fdt.fdt_next_subnode(tree, node)
    return found


def refusal(call, *args):
    """The errno's name that a call is refused with."""
    with pytest.raises(KernelError) as refused:
        call(*args)
    return refused.value.name


# -- folios ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 5, 9, 10])
def test_a_folio_is_one_key_of_its_order(kernel, order):
    """Preserved as a whole, forgotten as a whole; twice is once."""
    before = preserved(kernel)
    folio = kernel.alloc_folio(order)
    kernel.kho_preserve_folio(folio)
    kernel.kho_preserve_folio(folio)
    assert new(kernel, before) == [(folio.pfn, order)]
    kernel.kho_unpreserve_folio(folio)
    assert new(kernel, before) == []


def test_forgetting_what_was_never_preserved(kernel):
    """A warning where a table is missing; where all are there, a bit that is clear stays clear."""
    before = preserved(kernel)
    low = kernel.alloc_folio(0)
    high = kernel.alloc_folio(7)
    kernel.kho_unpreserve_folio(low)
    assert not any("never preserved" in line for line in kernel.messages)
    kernel.kho_unpreserve_folio(high)
    assert any("never preserved" in line for line in kernel.messages)
    assert preserved(kernel) == before


def test_the_other_order_is_another_key(kernel):
    """Unpreserving with the wrong order forgets nothing."""
    folio = kernel.alloc_folio(2)
    kernel.kho_preserve_folio(folio)
    kernel.kho_out.unpreserve_folio(folio.pfn, 1)
    assert (folio.pfn, 2) in preserved(kernel)


def test_many_folios_at_once_are_as_many_single_ones(kernel):
    """preserve_folios and preserve_folio_range leave what a loop leaves."""
    twin = Machine("64M").boot(cmdline="kho=on")
    pfns = list(range(0x1000, 0x1000 + 300 * 4, 4))
    kernel.kho_preserve_folios(np.array(pfns[:200], dtype=np.int64), 2)
    kernel.kho_out.preserve_folio_range(pfns[200], 100, 2)
    for pfn in pfns:
        twin.kho_out.preserve_folio(pfn, 2)
    assert preserved(kernel) == preserved(twin)
    kernel.kho_out.unpreserve_folio_range(pfns[200], 100, 2)
    assert not {(pfn, 2) for pfn in pfns[200:]} & set(preserved(kernel))
    assert (pfns[199], 2) in preserved(kernel)


# -- ranges of pages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "nr_pages", "blocks"),
    [
        (16, 1, [(16, 0)]),
        (16, 16, [(16, 4)]),
        (16, 17, [(16, 4), (32, 0)]),
        (15, 2, [(15, 0), (16, 0)]),
        (15, 18, [(15, 0), (16, 4), (32, 0)]),
        (5, 11, [(5, 0), (6, 1), (8, 3)]),
        (1, 1023, [(1 << i, i) for i in range(10)]),
        (4096, 4096, [(4096, 12)]),  # larger than the buddy allocator's blocks
        (4096, 0, []),
    ],
)
def test_a_range_is_cut_into_the_largest_aligned_blocks(kernel, first, nr_pages, blocks):
    """By hand, from a base that is aligned to 64 MiB's worth of pages or less."""
    before = preserved(kernel)
    kernel.kho_preserve_pages(first, nr_pages)
    assert new(kernel, before) == blocks
    kernel.kho_unpreserve_pages(first, nr_pages)
    assert new(kernel, before) == []


def test_a_sub_range_forgets_nothing_of_a_larger_block(kernel):
    """Only the same call undoes a preserve call: other blocks are other keys."""
    before = preserved(kernel)
    kernel.kho_preserve_pages(16, 16)
    kernel.kho_unpreserve_pages(16, 8)
    assert new(kernel, before) == [(16, 4)]


def test_a_block_never_spans_nodes():
    """Halved until its first and last page share a node, here at 160 MiB."""
    kernel = Machine("320M", nodes=["160M", "160M"]).boot(cmdline="kho=on", kernel_size="4M")
    before = preserved(kernel)
    start, end = (128 * MIB) >> 12, (192 * MIB) >> 12  # 64 MiB, aligned
    kernel.kho_preserve_pages(start, end - start)
    blocks = [(pfn << 12, (PAGE << order)) for pfn, order in new(kernel, before)]
    assert blocks == [(128 * MIB, 32 * MIB), (160 * MIB, 32 * MIB)]
    kernel.kho_unpreserve_pages(start, end - start)
    assert new(kernel, before) == []


def test_the_split_is_a_behaviour_of_the_release():
    """Without it the range is one block over both nodes."""
    machine = Machine("320M", nodes=["160M", "160M"])
    release = find_release("7.3").evolve(preserve_splits_at_nodes=False)
    kernel = machine.boot(release, cmdline="kho=on", kernel_size="4M")
    before = preserved(kernel)
    kernel.kho_preserve_pages((128 * MIB) >> 12, (64 * MIB) >> 12)
    assert new(kernel, before) == [((128 * MIB) >> 12, 14)]


@pytest.mark.parametrize(
    ("order", "step"),
    [(0, 1), (30, 1 << 30), (31, -(1 << 31)), (32, 1), (62, 1 << 30), (-1, -(1 << 31))],
)
def test_the_step_is_a_c_int(order, step):
    """1 << order: negative at 31, and the CPU takes the shift count modulo 32."""
    assert int_shift(order) == step


def test_pfn_0_has_no_alignment(kernel):
    """count_trailing_zeros(0) is -1: the kernel shifts by that and faults."""
    with pytest.raises(KernelPanic, match="pfn 0"):
        kernel.kho_preserve_pages(0, 1)


def test_a_failing_range_is_taken_back(kernel):
    """-ENOMEM in the middle: the blocks before it are forgotten again."""
    before = preserved(kernel)
    calls = 0

    def fail(order, owner):
        nonlocal calls
        calls += owner == "kho_radix_alloc_node"
        return calls > 1

    kernel.pages.fail = fail
    # Order 0 has its tables, orders 1 and 2 get theirs one by one.
    assert refusal(kernel.kho_preserve_pages, 1, 7) == "ENOMEM"
    kernel.pages.fail = None
    assert preserved(kernel) == before
    kernel.kho_preserve_pages(1, 7)
    assert new(kernel, before) == [(1, 0), (2, 1), (4, 2)]


@pytest.mark.parametrize("failing", range(4))
def test_a_key_whose_tables_fail_leaves_none(kernel, failing):
    """Each allocation on the way to a new leaf: freed again, and its entry cleared."""
    folio = kernel.alloc_folio(8)
    free = kernel.pages.nr_free_pages()
    before = preserved(kernel)
    calls = 0

    def fail(order, owner):
        nonlocal calls
        calls += 1
        return calls > failing

    kernel.pages.fail = fail
    if failing < 3:
        assert refusal(kernel.kho_preserve_folio, folio) == "ENOMEM"
        assert kernel.pages.nr_free_pages() == free
        assert preserved(kernel) == before
    kernel.pages.fail = None
    kernel.kho_preserve_folio(folio)
    assert new(kernel, before) == [(folio.pfn, 8)]


# -- CONFIG_KEXEC_HANDOVER_DEBUG ------------------------------------------------------------------


@pytest.fixture
def debug_kernel():
    """A kernel with the scratch check."""
    config = KernelConfig(release=find_release("7.3"), debug=True)
    image = KernelImage.build("7.3", config=config, size="4M")
    return Machine("64M").boot(cmdline="kho=on kho_scratch=4M,4M,4M", image=image)


def test_scratch_may_not_be_preserved(debug_kernel):
    """-EINVAL and a warning, for folios and for ranges that touch an area."""
    kernel = debug_kernel
    (addr, size), *_ = sorted(kernel.scratch_areas())
    before = preserved(kernel)
    first = addr >> 12
    assert refusal(kernel.kho_preserve_pages, first - 1, 2) == "EINVAL"
    assert refusal(kernel.kho_preserve_pages, first, 1) == "EINVAL"
    assert refusal(kernel.kho_out.preserve_folio, first + 4, 2) == "EINVAL"
    assert refusal(kernel.kho_out.preserve_folio_range, first - 8, 16, 0) == "EINVAL"
    assert refusal(kernel.kho_preserve_folios, np.array([first - 1, first], np.int64)) == "EINVAL"
    assert sum(line.startswith("WARNING: kho_preserve") for line in kernel.messages) == 5
    kernel.kho_out.unpreserve_folio(first - 1, 0)
    assert preserved(kernel) == before
    # Right up to the area's edge on either side is fine.
    kernel.kho_preserve_pages(first - 1, 1)
    kernel.kho_out.preserve_folio(first - 4, 2)
    kernel.kho_preserve_folios(np.array([first - 8], np.int64), 2)
    kernel.kho_out.preserve_folio_range(first - 16, 2, 2)
    areas = sorted(kernel.scratch_areas())
    end = max(addr + size for addr, size in areas) >> 12
    kernel.kho_out.preserve_folio(end, 0)
    assert sum(line.startswith("WARNING") for line in kernel.messages) == 5
    assert size == 4 * MIB


def test_without_the_check_scratch_is_preserved(kernel):
    """Nobody looks: the next kernel will run over it."""
    (addr, _), *_ = kernel.scratch_areas()
    kernel.kho_preserve_pages(addr >> 12, 1)
    assert (addr >> 12, 0) in preserved(kernel)


# -- kho_alloc_preserve ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "order"),
    [(1, 0), (4096, 0), (4097, 1), (8192, 1), (8193, 2), (4 * MIB - 1, 10), (4 * MIB, 10)],
)
def test_alloc_preserve_rounds_to_an_order(kernel, size, order):
    """Zeroed, preserved, of the smallest order that holds the size."""
    dirty = kernel.alloc_folio(order)
    dirty.write(0, b"dirt")
    dirty.put()
    before = preserved(kernel)
    folio = kernel.kho_alloc_preserve(size)
    assert folio.order == order
    assert folio.read(0, 4) == bytes(4)
    assert new(kernel, before) == [(folio.pfn, order)]
    assert not kernel.kho_scratch_overlap(folio.phys, folio.len_bytes)
    free = kernel.pages.nr_free_pages()
    kernel.kho_unpreserve_free(folio)
    assert new(kernel, before) == []
    assert kernel.pages.nr_free_pages() == free + (1 << order)


def test_alloc_preserve_refuses(kernel):
    """Nothing, more than the largest order, and more than there is."""
    assert refusal(kernel.kho_alloc_preserve, 0) == "EINVAL"
    assert refusal(kernel.kho_alloc_preserve, 4 * MIB + 1) == "E2BIG"
    assert refusal(kernel.kho_alloc_preserve, 1 << 40) == "E2BIG"
    kernel.kho_alloc_preserve(4 * MIB)
    assert refusal(lambda: [kernel.kho_alloc_preserve(4 * MIB) for _ in range(16)]) == "ENOMEM"


def test_alloc_preserve_frees_what_it_cannot_preserve(kernel):
    """No page for a table: the folio goes back."""
    free = kernel.pages.nr_free_pages()
    kernel.pages.fail = lambda order, owner: owner == "kho_radix_alloc_node"
    assert refusal(kernel.kho_alloc_preserve, 512 * KIB) == "ENOMEM"
    kernel.pages.fail = None
    assert kernel.pages.nr_free_pages() == free


# -- subtrees -------------------------------------------------------------------------------------


def test_the_newest_subtree_stands_first(kernel):
    """fdt_add_subnode puts a node in front of its siblings."""
    kernel.kho_add_subtree("a", 0x1000, 10)
    kernel.kho_add_subtree("b", 0x2000, 1 << 40)
    found = subtrees(kernel)
    assert list(found) == ["b", "a", "kexec-metadata"]
    assert found["b"] == (0x2000, 1 << 40)
    assert found["a"] == (0x1000, 10)


def test_a_name_can_be_used_once(kernel):
    """-EEXIST, and the first entry stays."""
    kernel.kho_add_subtree("a", 0x1000, 10)
    assert refusal(kernel.kho_add_subtree, "a", 0x2000, 20) == "EEXIST"
    assert subtrees(kernel)["a"] == (0x1000, 10)
    assert refusal(kernel.kho_add_subtree, "kexec-metadata", 1, 1) == "EEXIST"


def test_remove_goes_by_address(kernel):
    """The first node with that blob; another address changes nothing."""
    kernel.kho_add_subtree("a", 0x1000, 10)
    kernel.kho_add_subtree("b", 0x2000, 10)
    kernel.kho_add_subtree("c", 0x1000, 10)
    kernel.kho_remove_subtree(0x3000)
    assert list(subtrees(kernel)) == ["c", "b", "a", "kexec-metadata"]
    kernel.kho_remove_subtree(0x1000)
    assert list(subtrees(kernel)) == ["b", "a", "kexec-metadata"]
    kernel.kho_remove_subtree(0x1000)
    assert list(subtrees(kernel)) == ["b", "kexec-metadata"]
    kernel.kho_add_subtree("a", 0x5000, 10)
    assert subtrees(kernel)["a"] == (0x5000, 10)


def test_subtrees_until_the_page_is_full(kernel):
    """-ENOMEM when the FDT's page has no room; the tree stays sound, and removing makes room."""
    added = 0

    def add_many():
        nonlocal added
        while added < 200:
            kernel.kho_add_subtree(f"subtree-{added:04}", 0x1000 * (added + 1), 10)
            added += 1

    assert refusal(add_many) == "ENOMEM"
    tree = kernel.fdt_at(kernel.kho_out.fdt_phys)
    assert fdt.fdt_check_header(tree) == 0
    # A node: two tags and a name of 12 bytes with its NUL padded to 16, two properties of 20.
    per_node = 4 + 16 + 20 + 20 + 4
    room = PAGE - fdt.fdt_totalsize(tree)
    assert room < per_node
    found = subtrees(kernel)
    assert len(found) == added + 1
    assert 50 < added < 70
    kernel.kho_remove_subtree(0x1000)
    kernel.kho_add_subtree("subtree-9999", 0x99000, 10)
    assert next(iter(subtrees(kernel))) == "subtree-9999"


def test_a_node_without_room_for_its_second_property_is_undone(kernel):
    """Fill to the brim with names of every length: never half a node."""
    refused = 0
    for length in range(1, 60):
        name = f"n{length:02}".ljust(length + 3, "x")
        try:
            kernel.kho_add_subtree(name, 0x1000, 10)
        except KernelError as error:
            refused += error.name == "ENOMEM"
        for values in subtrees(kernel).values():
            assert len(values) == 2
    assert 0 < refused == 60 - len(subtrees(kernel))


def test_a_damaged_root_fdt(kernel):
    """What fdt_open_into refuses: -ENOMEM for adding, nothing for removing."""
    kernel.ram.write(kernel.kho_out.fdt_phys, b"\0\0\0\0", (0, "test"))
    assert refusal(kernel.kho_add_subtree, "a", 1, 1) == "ENOMEM"
    kernel.kho_remove_subtree(1)


def test_a_name_that_debugfs_refuses(kernel):
    """The subtree is added all the same; the kernel warns once."""
    assert not any("WARNING" in line for line in kernel.messages)
    kernel.kho_add_subtree("a/b", 0x1000, 10)
    kernel.kho_add_subtree("c/d", 0x2000, 10)
    assert list(subtrees(kernel))[:2] == ["c/d", "a/b"]
    assert sum(line.startswith("WARNING: kho_add_subtree") for line in kernel.messages) == 1


# -- with KHO off ---------------------------------------------------------------------------------


def test_kho_off():
    """No tree: -EINVAL for preserving; a subtree has nowhere to go, and the kernel faults."""
    kernel = Machine("64M").boot(cmdline="kho=off")
    folio = kernel.alloc_folio(0)
    free = kernel.pages.nr_free_pages()
    assert refusal(kernel.kho_preserve_folio, folio) == "EINVAL"
    assert refusal(kernel.kho_preserve_pages, folio.pfn, 1) == "EINVAL"
    assert refusal(kernel.kho_alloc_preserve, 1) == "EINVAL"
    assert kernel.pages.nr_free_pages() == free
    kernel.kho_unpreserve_folio(folio)
    assert any("no root" in line for line in kernel.messages)
    with pytest.raises(KernelPanic, match="NULL"):
        kernel.kho_add_subtree("a", 1, 1)
    with pytest.raises(KernelPanic, match="NULL"):
        kernel.kho_remove_subtree(1)


# -- kho_init -------------------------------------------------------------------------------------


def boot_failing(fails, cmdline="kho=on"):
    """Boot, with allocations of the running page allocator failing where ``fails`` says so."""
    owners: list[str] = []

    class Rig:
        def checkpoint(self, kernel, stage):
            if stage == "takeover":
                kernel.pages.fail = lambda order, owner: (
                    owners.append(owner) or fails(len(owners) - 1)
                )

    machine = Machine("64M")
    image = KernelImage.build("7.3", size="4M")
    load_kernel(machine.hardware, image.data, initrd_bytes=MIB, cmdline=cmdline)
    kernel = boot(machine.hardware, 0, host=Rig())
    kernel.pages.fail = None
    return kernel, owners


def test_kho_init_fails_at_each_allocation():
    """-ENOMEM anywhere: KHO off, scratch to the buddy, every page accounted for."""
    whole, owners = boot_failing(lambda nth: False)
    assert owners[0] == "kho_radix_alloc_node"
    assert "kho_alloc_preserve" in owners
    sound = sum(size for _, size in whole.scratch_areas()) >> 12
    total = whole.total_ram_pages()
    for failing in range(len(owners)):
        kernel, _ = boot_failing(lambda nth, f=failing: nth == f)
        assert not kernel.kho_enable
        assert kernel.kho_out.fdt_phys == 0
        assert kernel.kho_out.tree.root == 0
        assert kernel.total_ram_pages() == total
        assert kernel.pages.nr_free_pages() == kernel.total_ram_pages()
        assert sum(zone.cma_pages for zone in kernel.pages.zones) == 0
        freed = [line for line in kernel.messages if line.startswith("Freeing  memory: ")]
        assert sum(int(line[17:-1]) for line in freed) == sound * 4
        assert not any("Bad page" in line for line in kernel.messages)


def test_metadata_that_fails_is_reported():
    """The last allocations belong to kexec-metadata: its failure is KHO's."""
    _, owners = boot_failing(lambda nth: False)
    last = len(owners) - 1
    kernel, _ = boot_failing(lambda nth: nth == last)
    assert "KHO: failed to initialize kexec-metadata subtree: -12" in kernel.messages
    assert not kernel.kho_enable
    image = KernelImage.build("7.3", size="4M")
    kimage = kernel.kexec_file_load(image, cmdline="kho=on")
    assert kimage.kho_scratch is None


def test_metadata_that_finds_no_place_is_given_back(kernel):
    """The name is taken: the page with the metadata is neither preserved nor lost."""
    before, free = preserved(kernel), kernel.pages.nr_free_pages()
    assert kernel.kho_out.kexec_metadata(7) == -errno.EEXIST
    assert preserved(kernel) == before
    assert kernel.pages.nr_free_pages() == free


def test_the_root_fdt_of_a_new_kernel(kernel):
    """compatible, the tree's root, the metadata subtree."""
    tree = kernel.fdt_at(kernel.kho_out.fdt_phys)
    assert bytes(fdt.fdt_getprop(tree, 0, "compatible")[0]) == b"kho-v4\0"
    (root,) = struct.unpack("<Q", fdt.fdt_getprop(tree, 0, "preserved-memory-map")[0])
    assert root == kernel.kho_out.tree.root
    phys, size = subtrees(kernel)["kexec-metadata"]
    assert size == 73
    release = b"7.3.4".ljust(65, b"\0")
    assert kernel.ram.read(phys, 73) == struct.pack("<I65sI", 1, release, 1)


def test_the_trace_tells_of_every_call():
    """Symbol, arguments and result of each, in order."""
    machine = Machine("64M")
    events = []
    machine.listen(events.append)
    kernel = machine.boot(cmdline="kho=on")
    folio = kernel.alloc_folio(2)
    del events[:]
    kernel.kho_preserve_folio(folio)
    kernel.kho_unpreserve_folio(folio)
    kernel.kho_preserve_pages(16, 3)
    kernel.kho_unpreserve_pages(16, 3)
    kernel.kho_preserve_folios(np.array([16, 17], np.int64))
    kernel.kho_out.preserve_folio_range(20, 2, 1)
    kernel.kho_out.unpreserve_folio_range(20, 2, 1)
    kernel.kho_add_subtree("a", 0x5000, 9)
    kernel.kho_remove_subtree(0x5000)
    with pytest.raises(KernelError):
        kernel.kho_add_subtree("kexec-metadata", 1, 1)
    told = [
        (event.symbol, event.args, event.result)
        for event in events
        if event.symbol.startswith("kho_") and "radix" not in event.symbol
    ]
    assert told == [
        ("kho_preserve_folio", {"pfn": folio.pfn, "order": 2}, 0),
        ("kho_unpreserve_folio", {"pfn": folio.pfn, "order": 2}, None),
        ("kho_preserve_pages", {"pfn": 16, "nr_pages": 3}, 0),
        ("kho_unpreserve_pages", {"pfn": 16, "nr_pages": 3}, None),
        ("kho_preserve_folio", {"nr_folios": 2, "order": 0}, 0),
        ("kho_preserve_folio", {"pfn": 20, "order": 1, "nr_folios": 2}, 0),
        ("kho_unpreserve_folio", {"pfn": 20, "order": 1, "nr_folios": 2}, None),
        ("kho_add_subtree", {"name": "a", "phys": 0x5000, "size": 9}, 0),
        ("kho_remove_subtree", {"phys": 0x5000}, None),
        ("kho_add_subtree", {"name": "kexec-metadata", "phys": 1, "size": 1}, -errno.EEXIST),
    ]


def test_errors_name_the_kernels_errno(kernel):
    """str() of a refusal reads like the kernel's convention."""
    with pytest.raises(KernelError) as refused:
        kernel.kho_alloc_preserve(0)
    assert refused.value.errno == errno.EINVAL
    assert str(refused.value).startswith("kho_alloc_preserve: -EINVAL")
