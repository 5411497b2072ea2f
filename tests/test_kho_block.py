"""KHO blocks: chained pages of equal entries."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim import KernelError, KernelPanic, Machine
from khosim.abi.kho_block import (
    KhoBlockHeaderSer,
    kho_block_capacity,
    pack_kho_block_header,
    unpack_kho_block_header,
)
from khosim.kernel.kernel import Kernel
from khosim.kernel.kho_block import KHO_MAX_BLOCKS, KhoBlockSet

PAGE = 4096
PER_BLOCK = 63  # entries of 64 bytes


def boot(ram: str = "64M") -> tuple[Machine, Kernel]:
    machine = Machine(ram, checks=False)
    return machine, machine.boot(cmdline="kho=on")


def balance(kernel: Kernel) -> tuple[int, set[tuple[int, int]]]:
    """Free pages with those of the tree, and the preserved keys."""
    walk = list(kernel.kho_out.tree.walk())
    tree_pages = sum(1 for nr_keys, _ in walk if not nr_keys)
    return kernel.pages.nr_free_pages() + tree_pages, {step for step in walk if step[0]}


def fail_nth(kernel: Kernel, n: int) -> Callable[[], bool]:
    calls = iter(range(1 << 30))
    hit: list[int] = []

    def fail(order: int, owner: str) -> bool:
        if next(calls) != n:
            return False
        hit.append(order)
        return True

    kernel.pages.fail = fail
    return lambda: bool(hit)


def fill(bs: KhoBlockSet, nr_entries: int) -> None:
    """Write ``nr_entries`` entries, each its own number."""
    bs.grow(nr_entries)
    it = bs.iterate()
    for n in range(nr_entries):
        entry = it.reserve_entry()
        assert entry is not None
        bs.kernel.ram.write_u64(entry, n, bs.kernel.by("test"))


def numbers(bs: KhoBlockSet) -> list[int]:
    it = bs.iterate()
    found = []
    while (entry := it.read_entry()) is not None:
        found.append(bs.kernel.ram.read_u64(entry))
    return found


def chain(bs: KhoBlockSet) -> list[KhoBlockHeaderSer]:
    """The headers along the chain, as another kernel would follow it."""
    found = []
    at = bs.head_pa
    while at:
        found.append(unpack_kho_block_header(bs.kernel.ram.read(at, 16)))
        at = found[-1].next
    return found


# -- layout ---------------------------------------------------------------------------------------


def test_header_bytes() -> None:
    """u64 next, u64 count; then as many entries as the page has room for."""
    data = bytes.fromhex("00a0450000000000 3300000000000000")
    assert pack_kho_block_header(KhoBlockHeaderSer(0x45A000, 51)) == data
    assert unpack_kho_block_header(b"?" + data, 1) == KhoBlockHeaderSer(0x45A000, 51)


@pytest.mark.parametrize(
    ("page_size", "entry", "capacity"),
    [(4096, 80, 51), (4096, 64, 63), (16384, 80, 204), (65536, 64, 1023), (4096, 4081, 0)],
)
def test_capacity(page_size: int, entry: int, capacity: int) -> None:
    """51 sessions or 63 files in a block of 4 KiB."""
    assert kho_block_capacity(page_size, entry) == capacity


def test_bytes_in_ram() -> None:
    """Two blocks, 64 entries: link, counts and entries where the successor looks for them."""
    _, kernel = boot()
    bs = KhoBlockSet(kernel, 64)
    fill(bs, 64)
    first, second = bs.blocks
    page = kernel.ram.read(first, PAGE)
    assert page[:24] == struct.pack("<QQQ", second, 63, 0)
    assert page[16 + 62 * 64 :][:8] == struct.pack("<Q", 62)
    assert page[16 + 63 * 64 :] == bytes(48)
    assert kernel.ram.read(second, 24) == struct.pack("<QQQ", 0, 1, 63)
    assert bs.head_pa == first


# -- outgoing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "nblocks"), [(0, 0), (1, 1), (63, 1), (64, 2), (126, 2), (127, 3)]
)
def test_grow_and_shrink(count: int, nblocks: int) -> None:
    """Blocks are added and dropped at the end, exactly as many as the entries need."""
    _, kernel = boot()
    before = balance(kernel)
    bs = KhoBlockSet(kernel, 64)
    bs.grow(count)
    assert bs.nblocks == nblocks
    assert len(chain(bs)) == nblocks
    bs.grow(max(0, count - 1))
    assert bs.nblocks == nblocks
    bs.shrink(count)
    assert bs.nblocks == nblocks
    for left in range(count, -1, -1):
        bs.shrink(left)
        assert bs.nblocks == -(-left // PER_BLOCK)
        assert len(chain(bs)) == bs.nblocks
    assert bs.is_empty
    assert bs.head_pa == 0
    assert balance(kernel) == before


def test_grow_without_memory() -> None:
    """A growth that fails half way takes back the blocks it added, and only those."""
    _, kernel = boot()
    bs = KhoBlockSet(kernel, 64)
    bs.grow(PER_BLOCK)
    kept = list(bs.blocks)
    before = balance(kernel)
    for n in range(100):
        hit = fail_nth(kernel, n)
        error = 0
        try:
            bs.grow(3 * PER_BLOCK)
        except KernelError as refused:
            error = refused.errno
        kernel.pages.fail = None
        if not hit():
            break
        assert error == errno.ENOMEM, n
        assert bs.blocks == kept, n
        assert chain(bs) == [KhoBlockHeaderSer(0, 0)], n
        assert balance(kernel) == before, n
    assert n == 4  # page and list entry of each of two blocks
    assert bs.nblocks == 3


def test_the_most_blocks() -> None:
    """10000 blocks and not one more: -ENOSPC, and what was there stays."""
    _, kernel = boot("256M")
    bs = KhoBlockSet(kernel, 4080)
    bs.grow(KHO_MAX_BLOCKS)
    before = balance(kernel)
    with pytest.raises(KernelError) as refused:
        bs.grow(KHO_MAX_BLOCKS + 1)
    assert refused.value.errno == errno.ENOSPC
    assert balance(kernel) == before
    assert bs.nblocks == KHO_MAX_BLOCKS


def test_entry_too_large() -> None:
    """A set whose entries fit nowhere is warned about; growing it never ends but by -ENOSPC."""
    _, kernel = boot()
    KhoBlockSet(kernel, 4081)
    assert "WARNING: kho_block_set_init" in kernel.messages[-1]


def test_reserve_until_full() -> None:
    """Slots are handed out in order; the count in the header follows; then there are none."""
    _, kernel = boot()
    bs = KhoBlockSet(kernel, 64)
    assert bs.iterate().reserve_entry() is None
    bs.grow(64)
    it = bs.iterate()
    entries = [it.reserve_entry() for _ in range(127)]
    assert entries[:126] == [block + 16 + 64 * n for block in bs.blocks for n in range(PER_BLOCK)]
    assert entries[126] is None
    assert [header.count for header in chain(bs)] == [63, 63]


def test_counts_of_unreached_blocks_stay() -> None:
    """Serialising fewer entries than last time leaves the old count in the later blocks."""
    _, kernel = boot()
    bs = KhoBlockSet(kernel, 64)
    fill(bs, 70)
    bs.iterate().reserve_entry()
    assert [header.count for header in chain(bs)] == [1, 7]


def test_going_back() -> None:
    """prev returns what reserve_entry and read_entry returned, in reverse."""
    _, kernel = boot()
    bs = KhoBlockSet(kernel, 64)
    assert bs.iterate().prev() is None
    bs.grow(64)
    it = bs.iterate()
    forward = [it.reserve_entry() for _ in range(64)]
    backward = [it.prev() for _ in range(65)]
    assert backward == [*forward[::-1], None]


def test_clear() -> None:
    """Counts and entries become zero; the chain stays."""
    _, kernel = boot()
    bs = KhoBlockSet(kernel, 64)
    fill(bs, 64)
    bs.clear()
    assert chain(bs) == [KhoBlockHeaderSer(bs.blocks[1], 0), KhoBlockHeaderSer(0, 0)]
    assert kernel.ram.read(bs.blocks[0] + 8, PAGE - 8) == bytes(PAGE - 8)


def test_reading_an_empty_block_behind_another() -> None:
    """Only the block at hand is asked for its count: an empty one behind it is read, too."""
    _, kernel = boot()
    bs = KhoBlockSet(kernel, 64)
    bs.grow(1)
    assert numbers(bs) == []
    bs.grow(64)
    it = bs.iterate()
    assert it.read_entry() == bs.blocks[1] + 16
    assert it.read_entry() == bs.blocks[1] + 16 + 64


# -- incoming -------------------------------------------------------------------------------------


def hand_over(nr_entries: int) -> tuple[Kernel, KhoBlockSet, int]:
    machine, kernel = boot()
    bs = KhoBlockSet(kernel, 64)
    fill(bs, nr_entries)
    successor = machine.kexec(kernel)
    return successor, KhoBlockSet(successor, 64), bs.head_pa


@pytest.mark.parametrize("nr_entries", [1, 63, 64, 200])
def test_entries_survive(nr_entries: int) -> None:
    """All entries are read in order; shrinking and destroying frees every block."""
    successor, bs, head_pa = hand_over(nr_entries)
    free = successor.pages.nr_free_pages()
    bs.restore(head_pa)
    assert numbers(bs) == list(range(nr_entries))
    nblocks = -(-nr_entries // PER_BLOCK)
    assert (bs.nblocks, bs.head_pa, bs.incoming) == (nblocks, head_pa, True)
    bs.shrink(min(nr_entries, PER_BLOCK))
    assert bs.nblocks == 1
    assert chain(bs)[-1].next == 0
    bs.destroy()
    assert (bs.nblocks, bs.head_pa) == (0, 0)
    assert successor.pages.nr_free_pages() == free + nblocks


def test_nothing_to_restore() -> None:
    """Address 0 is an empty set, which cannot grow."""
    _, kernel = boot()
    bs = KhoBlockSet(kernel, 64)
    bs.restore(0)
    assert bs.is_empty
    assert numbers(bs) == []
    with pytest.raises(KernelError) as refused:
        bs.grow(1)
    assert refused.value.errno == errno.EINVAL
    assert "WARNING: kho_block_set_grow" in kernel.messages[-1]


@pytest.mark.parametrize("bad", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 64, 1 << 63])
def test_bad_counts(bad: int, count: int) -> None:
    """A block with no entries or too many: -EINVAL, and the whole chain is given back."""
    machine, kernel = boot()
    out = KhoBlockSet(kernel, 64)
    fill(out, 200)
    kernel.ram.write_u64(out.blocks[bad] + 8, count, kernel.by("bug"))
    successor = machine.kexec(kernel)
    free = successor.pages.nr_free_pages()
    bs = KhoBlockSet(successor, 64)
    with pytest.raises(KernelError) as refused:
        bs.restore(out.head_pa)
    assert refused.value.errno == errno.EINVAL
    assert f"luo: Block contains invalid entry count: {count}" in successor.messages
    assert (bs.nblocks, bs.head_pa) == (0, 0)
    assert successor.pages.nr_free_pages() == free + 4


@pytest.mark.parametrize("to", [0, 1, 2, 3])
def test_cycles(to: int) -> None:
    """A chain that comes back to itself is refused, and left as it is."""
    machine, kernel = boot()
    out = KhoBlockSet(kernel, 64)
    fill(out, 200)
    kernel.ram.write_u64(out.blocks[3], out.blocks[to], kernel.by("bug"))
    successor = machine.kexec(kernel)
    free = successor.pages.nr_free_pages()
    bs = KhoBlockSet(successor, 64)
    with pytest.raises(KernelError) as refused:
        bs.restore(out.head_pa)
    assert refused.value.errno == errno.EINVAL
    assert successor.messages[-1] == "luo: Block set is corrupted"
    assert (bs.nblocks, bs.head_pa) == (0, 0)
    assert successor.pages.nr_free_pages() == free


def write_chain(kernel: Kernel, nr_blocks: int) -> int:
    """A chain with one entry in each block, made by hand; returns its head."""
    first = kernel.alloc_pages_exact(1)
    runs = kernel.alloc_folios(nr_blocks - 1)
    pfns = [first, *(pfn + n for pfn, count in runs for n in range(count))]
    for pfn, following in zip(pfns, [*pfns[1:], 0], strict=True):
        kernel.ram.write(pfn << 12, struct.pack("<QQ", following << 12, 1), kernel.by("test"))
        kernel.kho_preserve_pages(pfn, 1)
    return pfns[0] << 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nr_blocks", "error"), [(10_000, 0), (10_001, errno.ENOSPC), (20_001, errno.EINVAL)]
)
def test_long_chains(nr_blocks: int, error: int) -> None:
    """10000 blocks are adopted; a few more are freed again; 20001 count as a cycle and stay."""
    machine, kernel = boot("256M")
    head_pa = write_chain(kernel, nr_blocks)
    successor = machine.kexec(kernel)
    free = successor.pages.nr_free_pages()
    bs = KhoBlockSet(successor, 4080)
    if error:
        with pytest.raises(KernelError) as refused:
            bs.restore(head_pa)
        assert refused.value.errno == error
        freed = nr_blocks if error == errno.ENOSPC else 0
        assert successor.pages.nr_free_pages() == free + freed
    else:
        bs.restore(head_pa)
        assert bs.nblocks == nr_blocks


def test_restore_without_memory() -> None:
    """Without memory for the list the chain is given back: -ENOMEM."""
    successor, bs, head_pa = hand_over(200)
    free = successor.pages.nr_free_pages()
    fail_nth(successor, 2)
    with pytest.raises(KernelError) as refused:
        bs.restore(head_pa)
    assert refused.value.errno == errno.ENOMEM
    assert successor.pages.nr_free_pages() == free + 4


def test_a_link_into_nowhere_is_fatal() -> None:
    """The kernel follows links before it checks them."""
    machine, kernel = boot()
    out = KhoBlockSet(kernel, 64)
    fill(out, 64)
    kernel.ram.write_u64(out.blocks[1], 1 << 45, kernel.by("bug"))
    successor = machine.kexec(kernel)
    with pytest.raises(KernelPanic, match="not mapped"):
        KhoBlockSet(successor, 64).restore(out.head_pa)


def test_blocks_that_were_not_preserved() -> None:
    """They are read all the same; only freeing them warns, and frees nothing."""
    machine, kernel = boot()
    out = KhoBlockSet(kernel, 64)
    fill(out, 3)
    kernel.kho_unpreserve_pages(out.head_pa >> 12, 1)
    successor = machine.kexec(kernel)
    if successor.ram.read_u64(out.head_pa + 8) != 3:
        pytest.skip("the successor has used the page by now")
    bs = KhoBlockSet(successor, 64)
    bs.restore(out.head_pa)
    assert numbers(bs) == [0, 1, 2]
    bs.destroy()
    assert "kho_restore_free: nothing to restore" in successor.messages[-1]


@settings(max_examples=40)
@given(
    entry_size=st.sampled_from([64, 80, 500, 4080]),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=12),
    seed=st.integers(0, 1 << 16),
)
def test_as_a_list_would(entry_size: int, steps: list[tuple[bool, int]], seed: int) -> None:
    """Grow by some, shrink by some, write, hand over and read: the same numbers as a list."""
    machine = Machine("64M", allocator="adversarial", seed=seed, checks=False)
    kernel = machine.boot(cmdline="kho=on")
    bs = KhoBlockSet(kernel, entry_size)
    count = 0
    for up, some in steps:
        count = count + some if up else max(0, count - some)
        (bs.grow if up else bs.shrink)(count)
        assert bs.nblocks == -(-count // bs.count_per_block)
    fill(bs, count)
    assert numbers(bs) == list(range(count))
    successor = machine.kexec(kernel)
    again = KhoBlockSet(successor, entry_size)
    again.restore(bs.head_pa)
    assert numbers(again) == list(range(count))
    free = successor.pages.nr_free_pages()
    for left in range(count, -1, -1):
        again.shrink(left)
    assert successor.pages.nr_free_pages() == free + bs.nblocks
