"""The tracker of kho-v1: its bytes by hand, beside a set of blocks, and read with another size."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khosim import KernelPanic, Machine
from khosim.kernel.kho_chunks import KhoChunks
from khosim.kernel.kho_radix_key import kho_encode_radix_key
from khosim.kernel.release import Release, find_release

MIB = 1 << 20


def kernel_of(release: str | Release, **options):
    """A small cold-booted kernel whose tracker nobody else uses."""
    return Machine("64M", checks=False).boot(release, cmdline="kho=off", **options)


def empty_tracker(release):
    kernel = kernel_of(release)
    return kernel, KhoChunks(kernel)


def words(kernel, phys, count):
    """``count`` little-endian u64 at ``phys``."""
    data = kernel.ram.read(phys, 8 * count)
    return [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]


def test_bytes_of_one_page_with_short_bitmaps():
    """Pfn 0x1234 of order 0: window 1 (of 4096 pages), bit 0x234: word 8, bit 52 of it."""
    kernel, tracker = empty_tracker("6.16")
    assert tracker.add_block(0x1234, 0) == 0
    error, chunk = tracker.serialize()
    assert error == 0
    nxt, order_and_count, phys_start, bitmap = words(kernel, chunk, 4)
    assert (nxt, order_and_count, phys_start) == (0, 1 << 32, 0x1000000)
    assert bitmap % 512 == 0
    assert words(kernel, bitmap, 64) == [0] * 8 + [1 << 52] + [0] * 55
    assert words(kernel, chunk + 32, 508) == [0] * 508


def test_bytes_of_one_block_with_page_bitmaps():
    """The block of order 3 at pfn 0x40000: number 0x8000, the first of window 1, which is 1 GiB."""
    kernel, tracker = empty_tracker("6.18")
    assert tracker.add_block(0x40000, 3) == 0
    error, chunk = tracker.serialize()
    assert error == 0
    assert chunk % 4096 == 0
    nxt, order_and_count, phys_start, bitmap = words(kernel, chunk, 4)
    assert (nxt, order_and_count, phys_start) == (0, 1 << 32 | 3, 1 << 30)
    assert bitmap % 4096 == 0
    assert words(kernel, bitmap, 512) == [1] + [0] * 511


def test_one_list_in_ascending_order():
    """Each order begins a chunk of its own, linked from the lowest to the highest."""
    kernel, tracker = empty_tracker("6.16")
    for pfn, order in ((0x400, 9), (0x801, 0), (0x40, 5), (0x3, 0)):
        assert tracker.add_block(pfn, order) == 0
    _, chunk = tracker.serialize()
    orders = []
    while chunk:
        nxt, order_and_count = words(kernel, chunk, 2)
        orders.append((order_and_count & 0xFFFFFFFF, order_and_count >> 32))
        chunk = nxt
    assert orders == [(0, 1), (5, 1), (9, 1)]


def test_the_256th_bitmap_needs_another_chunk():
    """255 elements fill a chunk; the next chunk of the order follows it."""
    kernel, tracker = empty_tracker("6.16")
    for window in range(256):
        assert tracker.add_block(window * 4096 + 7, 0) == 0
    _, chunk = tracker.serialize()
    nxt, order_and_count = words(kernel, chunk, 2)
    assert order_and_count == 255 << 32
    last, order_and_count, phys_start, _ = words(kernel, nxt, 4)
    assert (last, order_and_count, phys_start) == (0, 1 << 32, 255 * 16 * MIB)


def test_an_order_stays_listed_when_its_blocks_are_gone():
    """Bitmaps are never freed one by one: an empty one is listed like the others."""
    kernel, tracker = empty_tracker("6.19")
    assert tracker.add_block(0x123, 0) == 0
    assert tracker.del_block(0x123, 0)
    _, chunk = tracker.serialize()
    assert words(kernel, chunk, 2) == [0, 1 << 32]
    assert list(KhoChunks(kernel, chunk).blocks()) == []


def test_nothing_marked_is_no_list():
    """Without any order there is no chunk."""
    _, tracker = empty_tracker("7.0")
    assert tracker.serialize() == (0, 0)


blocks_strategy = st.lists(
    st.integers(0, 10).flatmap(
        lambda order: st.tuples(st.integers(1, 1 << 22).map(lambda n: n << order), st.just(order))
    ),
    max_size=30,
)
_KERNELS = {name: kernel_of(name) for name in ("6.16", "6.19")}


@pytest.mark.parametrize("release", ["6.16", "6.19"])
@given(added=blocks_strategy, removed=st.lists(st.integers(0, 29)))
def test_beside_a_set_of_blocks(release, added, removed):
    """What comes out is what went in and was not taken out, by order and then by address."""
    kernel = _KERNELS[release]
    tracker = KhoChunks(kernel)
    model = set()
    for pfn, order in added:
        assert tracker.add_block(pfn, order) == 0
        model.add((order, pfn))
    for i in removed:
        if i < len(added):
            pfn, order = added[i]
            assert tracker.del_block(pfn, order)
            model.discard((order, pfn))
    error, tracker.root = tracker.serialize()
    assert error == 0
    read = [
        (order, (phys >> 12) + (n << order))
        for phys, order, nr_blocks in KhoChunks(kernel, tracker.root).blocks()
        for n in range(nr_blocks)
    ]
    assert read == sorted(model)
    free = kernel.pages.nr_free_pages()
    tracker.destroy()
    assert kernel.pages.nr_free_pages() >= free


@given(first=st.integers(1, 40000), count=st.integers(1, 9000), order=st.integers(0, 3))
def test_runs_and_arrays_do_what_single_blocks_do(first, count, order):
    """The whole-run calls set the same bits."""
    kernel = _KERNELS["6.16"]
    key = kho_encode_radix_key(first << order << 12, order, 12)
    one, many = KhoChunks(kernel), KhoChunks(kernel)
    assert one.add_run(key, count) == (0, count)
    assert many.add_many(np.arange(key, key + count, dtype=np.int64)) == (0, count)
    read = list(one.marked())
    assert sum(nr_blocks for _, _, nr_blocks in read) == count
    assert read[0][:2] == (first << order << 12, order)
    assert list(many.marked()) == read
    one.destroy()
    many.destroy()


def test_all_memory_comes_back():
    """Bitmaps, chunks and the slab's blocks: nothing is left behind."""
    for release in ("6.16", "6.18+metadata_kfreed=off"):
        kernel, tracker = empty_tracker(release)
        free = kernel.pages.nr_free_pages()
        for order in range(11):
            for number in range(20):
                assert tracker.add_block((number * 5000 + 1) << order, order) == 0
        error, tracker.root = tracker.serialize()
        assert error == 0
        assert kernel.pages.nr_free_pages() < free
        tracker.destroy()
        assert kernel.pages.nr_free_pages() == free


@pytest.mark.parametrize("release", ["6.16", "6.18+metadata_kfreed=off"], ids=["6.16", "6.18"])
def test_without_memory_nothing_is_listed(release):
    """Each allocation that fails is -ENOMEM, and a list that cannot be finished is freed."""
    kernel, tracker = empty_tracker(release)
    kernel.pages.fail = lambda order, symbol: symbol == "xa_load_or_alloc"
    assert tracker.add_block(0x100, 0) == -errno.ENOMEM
    kernel.pages.fail = None
    for order in range(5):
        assert tracker.add_block(1 << 10, order) == 0
    free = kernel.pages.nr_free_pages()
    left = iter([False, False, True])
    kernel.pages.fail = lambda order, symbol: symbol == "new_chunk" and next(left)
    assert tracker.serialize() == (-errno.ENOMEM, 0)
    assert kernel.pages.nr_free_pages() == free


@pytest.mark.parametrize(
    ("how", "goes_on"), [("continue", True), ("return", False)], ids=["6.19", "6.18"]
)
def test_a_block_that_was_never_marked(how, goes_on):
    """One warning; 6.18 leaves the range, later releases go on."""
    kernel = kernel_of(find_release("6.18").evolve(unpreserve_missing=how))
    tracker = KhoChunks(kernel)
    assert tracker.del_block(0x5000, 0) is goes_on
    assert tracker.del_block(0x5000, 0) is goes_on
    assert sum("__kho_unpreserve" in line for line in kernel.messages) == 1


def test_a_block_that_was_never_marked_in_6_16():
    """The loop goes round without moving: the watchdog's soft lockup."""
    _, tracker = empty_tracker("6.16")
    with pytest.raises(KernelPanic, match="soft lockup in __kho_unpreserve"):
        tracker.del_block(0x5000, 0)


# -- read with bitmaps of another size --------------------------------------------------------


def test_short_bitmaps_read_as_pages():
    """The reader goes on for 3584 bytes: the neighbours' bits become blocks 16 MiB further each."""
    kernel, writer = empty_tracker("6.16")
    assert writer.add_block(0x10, 0) == 0
    assert writer.add_block(0x2000, 0) == 0  # window 2: the next object of the slab
    assert writer.add_block(3 << 4, 4) == 0  # and the one after that
    _, chunk = writer.serialize()
    reader = KhoChunks(kernel_like(kernel, "6.18"), chunk)
    at_order_0 = [(phys, n) for phys, order, n in reader.blocks() if order == 0]
    assert at_order_0[:2] == [(0x10000, 1), (4096 << 12, 1)]
    # bit 4096 of the first: the neighbour's bit 0; bit 8192 + 3: the third one's bit 3.
    assert (0x10 << 12, 1) in at_order_0
    assert ((8192 + 3) << 12, 1) in at_order_0


def kernel_like(kernel, release):
    """The same kernel with the source of another release."""
    kernel.release = find_release(release)
    return kernel


def test_page_bitmaps_read_as_short_ones():
    """Only the first 4096 of 32768 blocks are seen: what lies above 16 MiB is lost."""
    kernel, writer = empty_tracker("6.18")
    for pfn in (5, 4095, 4096, 20000):
        assert writer.add_block(pfn, 0) == 0
    _, chunk = writer.serialize()
    reader = KhoChunks(kernel_like(kernel, "6.17"), chunk)
    assert list(reader.blocks()) == [(5 << 12, 0, 1), (4095 << 12, 0, 1)]


@pytest.mark.parametrize("order", [0, 2, 9])
@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_a_bitmap_written_by_hand_is_read_as_far_as_the_release_goes(page_size, order):
    """Up to 6.17 4096 bits, whatever the page; since 6.18 eight times the bytes of a page."""
    arch = "x86_64" if page_size == 4096 else "arm64"
    machine = Machine("512M", arch=arch, page_size=page_size, checks=False)
    kernel = machine.boot("6.18", cmdline="kho=off")
    folio = kernel.alloc_folio(1, zero=True)
    window, bitmap = 3 << 40, folio.phys + page_size
    header = (0).to_bytes(8, "little") + order.to_bytes(4, "little") + (1).to_bytes(4, "little")
    folio.write(0, header + window.to_bytes(8, "little") + bitmap.to_bytes(8, "little"))
    bits = (0, 9, 4095, 4096, 8 * page_size - 1)
    for bit in bits:
        folio.write(page_size + bit // 8, bytes([1 << bit % 8]))
    block = page_size << order
    for release, seen in (("6.16", bits[:3]), ("6.17.9", bits[:3]), ("6.18", bits), ("7.0", bits)):
        reader = KhoChunks(kernel_like(kernel, release), folio.phys)
        found = [(phys + i * block, o) for phys, o, n in reader.blocks() for i in range(n)]
        assert found == [(window + bit * block, order) for bit in seen], release


# -- whatever memory holds --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes.fromhex("00" * 8 + "00000000" + "01000000"), "NULL pointer"),
        (bytes.fromhex("00" * 8 + "00000000" + "ffffffff"), "NULL pointer"),
        (bytes.fromhex("00000000ff000000" + "00000000" + "00000000"), "not mapped"),
    ],
)
def test_a_torn_list_is_a_fault(data, message):
    """A bitmap at 0, a count that runs on, a chunk where nothing is."""
    kernel = kernel_of("6.18")
    folio = kernel.alloc_folio(0, zero=True)
    folio.write(0, data)
    with pytest.raises(KernelPanic, match=message):
        list(KhoChunks(kernel, folio.phys).blocks())


def test_a_ring_of_chunks_is_a_lockup():
    """A chunk that follows itself."""
    kernel = kernel_of("6.18")
    folio = kernel.alloc_folio(0, zero=True)
    folio.write(0, folio.phys.to_bytes(8, "little"))
    with pytest.raises(KernelPanic, match="soft lockup"):
        list(KhoChunks(kernel, folio.phys).blocks())
