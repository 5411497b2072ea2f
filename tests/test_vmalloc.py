"""vmalloc areas, and their way across kexec through chunk pages."""

from __future__ import annotations

import errno
import struct
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim import KernelError, KernelPanic, Machine
from khosim.abi.kho_vmalloc import (
    KHO_VMALLOC_BYTES,
    KhoVmalloc,
    kho_vmalloc_size,
    pack_kho_vmalloc,
    pack_kho_vmalloc_chunk,
    unpack_kho_vmalloc,
    unpack_kho_vmalloc_chunk,
)
from khosim.errors import KhoSimError
from khosim.kernel.image import KernelConfig
from khosim.kernel.kernel import Kernel
from khosim.kernel.kho_vmalloc import (
    KhoVmallocSlot,
    kho_preserve_vmalloc,
    kho_restore_vmalloc,
    kho_unpreserve_vmalloc,
)
from khosim.kernel.kvmalloc import kvfree, kvmalloc
from khosim.kernel.release import find_release
from khosim.kernel.vmalloc import (
    VM_ALLOC,
    VM_ALLOW_HUGE_VMAP,
    VM_USERMAP,
    VmStruct,
    find_vm_area,
    vfree,
    vmalloc,
)

PAGE = 4096
MIB = 1 << 20


def boot(ram: str = "64M", **options: object) -> tuple[Machine, Kernel]:
    machine = Machine(ram, checks=False, **options)  # type: ignore[arg-type]
    return machine, machine.boot(cmdline="kho=on")


def preserved(kernel: Kernel) -> Counter[int]:
    """Every key of the preserved-memory tree."""
    keys: Counter[int] = Counter()
    for nr_keys, first in kernel.kho_out.tree.walk():
        keys.update(range(first, first + nr_keys))
    return keys


def nr_tree_pages(kernel: Kernel) -> int:
    """Pages of the tree itself: they are kept when the last key goes."""
    return sum(1 for nr_keys, _ in kernel.kho_out.tree.walk() if not nr_keys)


def balance(kernel: Kernel) -> tuple[int, Counter[int]]:
    """What an undone operation must leave as it was."""
    return kernel.pages.nr_free_pages() + nr_tree_pages(kernel), preserved(kernel)


def fail_nth(kernel: Kernel, n: int) -> Callable[[], bool]:
    """Let the nth allocation from now on fail; the result says whether it came to that."""
    calls = iter(range(1 << 30))
    hit: list[int] = []

    def fail(order: int, owner: str) -> bool:
        if next(calls) != n:
            return False
        hit.append(order)
        return True

    kernel.pages.fail = fail
    return lambda: bool(hit)


def key(pfn: int, order: int = 0) -> int:
    return 1 << (52 - order) | pfn >> order


def pfns_of(area: VmStruct) -> Iterator[int]:
    for start_pfn, nr_pages in area.runs:
        yield from range(start_pfn, start_pfn + nr_pages)


# -- layouts --------------------------------------------------------------------------------------


def test_descriptor_bytes() -> None:
    """16 bytes: u64 first, u32 total_pages, u16 flags, u16 order."""
    data = bytes.fromhex("0040230100000000 09000000 0300 0900")
    assert pack_kho_vmalloc(KhoVmalloc(0x1234000, 9, 3, 9)) == data
    assert unpack_kho_vmalloc(b"xx" + data, 2) == KhoVmalloc(0x1234000, 9, 3, 9)
    assert KHO_VMALLOC_BYTES == 16


@pytest.mark.parametrize(("page_size", "entries"), [(4096, 511), (16384, 2047), (65536, 8191)])
def test_chunk_bytes(page_size: int, entries: int) -> None:
    """A chunk is a page: the link, then addresses up to the first zero or the end."""
    assert kho_vmalloc_size(page_size) == entries
    page = pack_kho_vmalloc_chunk(0x7000, [0x1000, 0x2000], page_size)
    assert page == bytes.fromhex("0070000000000000 0010000000000000 0020000000000000") + bytes(
        page_size - 24
    )
    assert unpack_kho_vmalloc_chunk(page) == (0x7000, [0x1000, 0x2000])
    full = list(range(1, entries + 1))
    assert unpack_kho_vmalloc_chunk(pack_kho_vmalloc_chunk(0, full, page_size)) == (0, full)
    with pytest.raises(ValueError, match="do not fit"):
        pack_kho_vmalloc_chunk(0, [*full, 1], page_size)


# -- areas ----------------------------------------------------------------------------------------


def test_content_runs_across_pages() -> None:
    """What is written into an area is read back, wherever its pages lie."""
    _, kernel = boot()
    held = [kernel.alloc_folio() for _ in range(4)]
    area = vmalloc(kernel, 3 * PAGE, zero=True)
    assert area is not None
    held[0].put()
    assert area.nr_pages == 3
    assert area.read(0, 3 * PAGE) == bytes(3 * PAGE)
    area.write(PAGE - 3, b"across")
    assert area.read(PAGE - 4, 8) == b"\0across\0"
    second = area.vmalloc_to_pfn(1)
    assert kernel.ram.read(second << 12, 3) == b"oss"
    with pytest.raises(KernelPanic, match="page fault"):
        area.read(3 * PAGE - 1, 2)
    with pytest.raises(KernelPanic, match="page fault"):
        area.vmalloc_to_pfn(3)


def test_pages_are_single_and_come_back() -> None:
    """Large blocks are split up into single pages, and vfree returns every one."""
    _, kernel = boot()
    free = kernel.pages.nr_free_pages()
    area = vmalloc(kernel, 777 * PAGE + 1)
    assert area is not None
    assert area.nr_pages == 778
    assert (area.flags, area.page_order) == (VM_ALLOC, 0)
    # 778 pointers do not fit into a page: the array of pages is an area of two pages itself.
    assert kernel.pages.nr_free_pages() == free - 778 - 2
    assert {kernel.page(pfn).order for pfn in pfns_of(area)} == {0}
    assert {kernel.page(pfn).refcount for pfn in pfns_of(area)} == {1}
    vfree(kernel, area)
    assert kernel.pages.nr_free_pages() == free
    assert find_vm_area(area) is None
    with pytest.raises(KhoSimError, match="after vfree"):
        area.read(0, 1)


def test_large_blocks_first() -> None:
    """The allocator is asked for the largest power of two, then for what is left."""
    _, kernel = boot()
    asked: list[tuple[int, str]] = []

    def spy(order: int, owner: str) -> bool:
        asked.append((order, owner))
        return False

    kernel.pages.fail = spy
    vmalloc(kernel, 11 * PAGE, owner="me")
    assert [order for order, owner in asked if owner == "me"] == [3, 1, 0]


def test_smaller_blocks_where_large_ones_are_short() -> None:
    """A size that fails is not tried again; the next smaller one is."""
    _, kernel = boot()
    asked: list[int] = []

    def no_order_3(order: int, owner: str) -> bool:
        if owner == "me":
            asked.append(order)
        return order == 3

    kernel.pages.fail = no_order_3
    area = vmalloc(kernel, 19 * PAGE, owner="me")
    assert area is not None
    assert (area.nr_pages, asked) == (19, [4, 1, 0])
    del asked[:]
    area = vmalloc(kernel, 15 * PAGE, owner="me")
    assert area is not None
    assert (area.nr_pages, asked) == (15, [3, 2, 2, 2, 1, 0])


def test_huge_area() -> None:
    """With huge pages allowed an area of 2 MiB and more is made of blocks of 2 MiB."""
    _, kernel = boot()
    area = vmalloc(kernel, 3 * MIB, huge=True)
    assert area is not None
    assert (area.page_order, area.nr_pages) == (9, 1024)
    assert area.flags == VM_ALLOC | VM_ALLOW_HUGE_VMAP
    assert all(start % 512 == 0 and nr % 512 == 0 for start, nr in area.runs)
    small = vmalloc(kernel, 2 * MIB - 1, huge=True)
    assert small is not None
    assert (small.page_order, small.nr_pages) == (0, 512)


@pytest.mark.parametrize(
    ("page_size", "size", "order"),
    [(4096, 64 << 10, 4), (4096, 2 << 20, 9), (16384, 2 << 20, 7), (65536, 2 << 20, 5)],
)
def test_huge_orders_of_arm64(page_size: int, size: int, order: int) -> None:
    """arm64 also maps contiguous entries: blocks of 64 KiB or 2 MiB."""
    _, kernel = boot("2G", arch="arm64", page_size=page_size)
    area = vmalloc(kernel, size, huge=True)
    assert area is not None
    assert area.page_order == order


def test_huge_falls_back_to_single_pages() -> None:
    """Without a block of 2 MiB the area is made of pages, and keeps its flag."""
    _, kernel = boot()
    kernel.pages.fail = lambda order, owner: order >= 9
    area = vmalloc(kernel, 2 * MIB, huge=True)
    assert area is not None
    assert (area.page_order, area.flags) == (0, VM_ALLOC | VM_ALLOW_HUGE_VMAP)


def test_vfree_leaves_what_others_hold() -> None:
    """A page with another reference outlives its area."""
    _, kernel = boot()
    free = kernel.pages.nr_free_pages()
    area = vmalloc(kernel, 8 * PAGE)
    assert area is not None
    pfn = area.vmalloc_to_pfn(5)
    kernel.pages.get_page(pfn)
    vfree(kernel, area)
    assert kernel.pages.nr_free_pages() == free - 1
    assert kernel.page(pfn).refcount == 1
    vfree(kernel, None)
    vfree(kernel, area)
    assert "nonexistent vm area" in kernel.messages[-1]


@pytest.mark.parametrize("size", [0, 65 * MIB])
def test_impossible_sizes(size: int) -> None:
    """Nothing, and more than all of memory, is refused at once."""
    _, kernel = boot()
    assert vmalloc(kernel, size) is None


def test_every_failing_allocation_leaves_nothing() -> None:
    """vmalloc returns NULL or an area, and never loses a page."""
    _, kernel = boot()
    free = kernel.pages.nr_free_pages()
    for n in range(1000):
        hit = fail_nth(kernel, n)
        area = vmalloc(kernel, 600 * PAGE)
        kernel.pages.fail = None
        if area is not None:
            vfree(kernel, area)
        assert kernel.pages.nr_free_pages() == free, n
        if not hit():
            assert area is not None
            break
    else:
        pytest.fail("allocations without end")


def test_kvmalloc() -> None:
    """Small buffers are slab memory, larger ones a block, the largest an area; INT_MAX ends it."""
    _, kernel = boot()
    free = kernel.pages.nr_free_pages()
    small = kvmalloc(kernel, 2 * PAGE, "me")
    assert kernel.pages.nr_free_pages() == free
    block = kvmalloc(kernel, 2 * PAGE + 1, "me")
    assert kernel.pages.nr_free_pages() == free - 4
    area = kvmalloc(kernel, 5 * MIB, "me")
    assert kernel.pages.nr_free_pages() == free - 4 - 3 * 512 - 3
    for buffer in (small, block, area, None):
        kvfree(kernel, buffer)
    assert kernel.pages.nr_free_pages() == free
    assert kvmalloc(kernel, 1 << 31, "me") is None
    assert "kvmalloc of 2147483648 bytes" in kernel.messages[-1]
    kernel.pages.fail = lambda order, owner: True
    assert kvmalloc(kernel, 0, "me") is not None
    assert kvmalloc(kernel, 1, "me") is None


# -- preserving -----------------------------------------------------------------------------------


def test_preserved_bytes() -> None:
    """Descriptor, chunk and keys of an area of three pages, by hand."""
    _, kernel = boot()
    area = vmalloc(kernel, 3 * PAGE)
    assert area is not None
    before = preserved(kernel)
    holder = kernel.alloc_folio(zero=True)
    slot = KhoVmallocSlot(kernel, holder.phys + 32)
    kho_preserve_vmalloc(kernel, area, slot)
    first, total, flags, order = struct.unpack("<QIHH", kernel.ram.read(holder.phys + 32, 16))
    assert (total, flags, order) == (3, 1, 0)
    pages = list(pfns_of(area))
    expected = struct.pack("<4Q", 0, *(pfn << 12 for pfn in pages)) + bytes(PAGE - 32)
    assert kernel.ram.read(first, PAGE) == expected
    assert preserved(kernel) - before == Counter(map(key, [*pages, first >> 12]))


@pytest.mark.parametrize(
    ("nr_pages", "chunks"), [(1, [1]), (510, [510]), (511, [511, 0]), (512, [511, 1])]
)
def test_a_full_chunk_is_followed_by_another(nr_pages: int, chunks: list[int]) -> None:
    """The 511th address always brings a further chunk, even an empty one."""
    _, kernel = boot()
    area = vmalloc(kernel, nr_pages * PAGE)
    assert area is not None
    slot = KhoVmallocSlot(kernel)
    kho_preserve_vmalloc(kernel, area, slot)
    listed: list[int] = []
    at = slot.load().first
    lengths = []
    while at:
        at, phys = unpack_kho_vmalloc_chunk(kernel.ram.read(at, PAGE))
        lengths.append(len(phys))
        listed += phys
    assert lengths == chunks
    assert listed == [pfn << 12 for pfn in pfns_of(area)]


def test_huge_blocks_have_keys_of_their_order() -> None:
    """One address and one key of order 9 for each block of 2 MiB."""
    _, kernel = boot()
    before = preserved(kernel)
    area = vmalloc(kernel, 4 * MIB, huge=True)
    assert area is not None
    slot = KhoVmallocSlot(kernel)
    kho_preserve_vmalloc(kernel, area, slot)
    descriptor = slot.load()
    assert descriptor[1:] == (1024, 3, 9)
    heads = list(pfns_of(area))[::512]
    assert unpack_kho_vmalloc_chunk(kernel.ram.read(descriptor.first, PAGE)) == (
        0,
        [pfn << 12 for pfn in heads],
    )
    expected = Counter([*(key(pfn, 9) for pfn in heads), key(descriptor.first >> 12)])
    assert preserved(kernel) - before == expected


def test_refusals() -> None:
    """-EINVAL for what is no area, -EOPNOTSUPP for an area of another kind."""
    _, kernel = boot()
    slot = KhoVmallocSlot(kernel)
    freed = vmalloc(kernel, PAGE)
    vfree(kernel, freed)
    user = vmalloc(kernel, PAGE, vm_flags=VM_USERMAP)
    for area, error in (
        (None, errno.EINVAL),
        (freed, errno.EINVAL),
        (user, errno.EOPNOTSUPP),
    ):
        before = balance(kernel)
        with pytest.raises(KernelError) as refused:
            kho_preserve_vmalloc(kernel, area, slot)
        assert (refused.value.errno, refused.value.symbol) == (error, "kho_preserve_vmalloc")
        assert balance(kernel) == before
    assert slot.load() == KhoVmalloc(0, 0, 0, 0)


@pytest.mark.parametrize(("nr_pages", "huge"), [(3, False), (1030, False), (1024, True)])
def test_preserve_and_unpreserve(nr_pages: int, huge: bool) -> None:
    """Afterwards all is as it was, but for the tree's own pages."""
    _, kernel = boot()
    area = vmalloc(kernel, nr_pages * PAGE, huge=huge)
    before = balance(kernel)
    slot = KhoVmallocSlot(kernel)
    kho_preserve_vmalloc(kernel, area, slot)
    assert balance(kernel) != before
    kho_unpreserve_vmalloc(kernel, slot)
    assert balance(kernel) == before


def test_preserve_without_memory() -> None:
    """Each allocation may fail: -ENOMEM, and nothing stays preserved or lost."""
    _, kernel = boot()
    area = vmalloc(kernel, 1030 * PAGE)
    before = balance(kernel)
    for n in range(100):
        hit = fail_nth(kernel, n)
        error = 0
        try:
            kho_preserve_vmalloc(kernel, area, KhoVmallocSlot(kernel))
        except KernelError as refused:
            error = refused.errno
        kernel.pages.fail = None
        if not hit():
            break
        assert error == errno.ENOMEM, n
        assert balance(kernel) == before, n
    assert n == 3  # one for each chunk


def preserve_huge_without_second_chunk(kernel: Kernel, slot: KhoVmallocSlot) -> list[int]:
    area = vmalloc(kernel, 511 * 2 * MIB, huge=True)
    assert area is not None
    assert area.page_order == 9
    chunks = iter((False, True))
    kernel.pages.fail = lambda order, owner: owner == "new_vmalloc_chunk" and next(chunks)
    with pytest.raises(KernelError, match="ENOMEM"):
        kho_preserve_vmalloc(kernel, area, slot)
    kernel.pages.fail = None
    return list(pfns_of(area))[::512]


def test_failed_preserve_of_huge_blocks_leaves_them_preserved() -> None:
    """The descriptor's order is still 0 while it unwinds: keys of order 9 are not found."""
    _, kernel = boot("4G")
    before = preserved(kernel)
    heads = preserve_huge_without_second_chunk(kernel, KhoVmallocSlot(kernel))
    assert preserved(kernel) - before == Counter(key(pfn, 9) for pfn in heads)


def test_failed_preserve_with_the_right_order_on_the_stack() -> None:
    """An uninitialised descriptor that happens to hold the order unwinds well."""
    _, kernel = boot("4G")
    before = preserved(kernel)
    stack = pack_kho_vmalloc(KhoVmalloc(0xDEAD, 1, 2, 9))
    preserve_huge_without_second_chunk(kernel, KhoVmallocSlot(kernel, stack=stack))
    assert preserved(kernel) - before == Counter()


def test_debug_kernels_refuse_areas_in_scratch() -> None:
    """With the DEBUG option pages in scratch are refused with -EINVAL, and all is undone."""
    machine = Machine("64M", checks=False)
    config = KernelConfig(release=find_release("7.3"), debug=True)
    kernel = machine.boot(cmdline="kho=on", config=config, kernel_size="4M")
    addr, _ = kernel.scratch_areas()[0]
    area = VmStruct(kernel, VM_ALLOC, 0)
    good = kernel.alloc_folio()
    area.add_run(good.pfn, 1)
    area.add_run(addr >> 12, 1)
    before = balance(kernel)
    with pytest.raises(KernelError, match="EINVAL"):
        kho_preserve_vmalloc(kernel, area, KhoVmallocSlot(kernel))
    assert balance(kernel) == before


# -- across kexec ---------------------------------------------------------------------------------


def hand_over(
    machine: Machine, kernel: Kernel, area: VmStruct
) -> tuple[Kernel, KhoVmallocSlot, int]:
    holder = kernel.kho_alloc_preserve(16)
    kho_preserve_vmalloc(kernel, area, KhoVmallocSlot(kernel, holder.phys))
    successor = machine.kexec(kernel)
    return successor, KhoVmallocSlot(successor, holder.phys), holder.phys


@pytest.mark.parametrize(
    ("nr_pages", "huge"), [(1, False), (511, False), (1030, False), (1024, True)]
)
def test_content_survives(nr_pages: int, huge: bool) -> None:
    """Pages and bytes are those of the predecessor; vfree then gives back every page."""
    machine, kernel = boot()
    area = vmalloc(kernel, nr_pages * PAGE, huge=huge, zero=True)
    assert area is not None
    area.write(nr_pages * PAGE - 9, b"last word")
    area.write(100, b"first")
    pages = list(pfns_of(area))
    successor, slot, holder = hand_over(machine, kernel, area)
    free = successor.pages.nr_free_pages()
    again = kho_restore_vmalloc(successor, slot)
    assert again is not None
    assert list(pfns_of(again)) == pages
    assert again.flags == area.flags
    assert again.page_order == 0
    assert again.read(100, 5) + again.read(nr_pages * PAGE - 9, 9) == b"firstlast word"
    assert {successor.page(pfn).order for pfn in pages} == {0}
    vfree(successor, again)
    chunks = nr_pages // (512 if huge else 1) // 511 + 1
    assert successor.pages.nr_free_pages() == free + nr_pages + chunks
    successor.kho_restore_free(holder)


def test_a_restored_huge_area_is_single_pages_from_then_on() -> None:
    """The area forgets its order: preserved again, each page has a key and an address."""
    machine, kernel = boot()
    area = vmalloc(kernel, 2 * MIB, huge=True)
    assert area is not None
    successor, slot, _ = hand_over(machine, kernel, area)
    again = kho_restore_vmalloc(successor, slot)
    second = KhoVmallocSlot(successor)
    kho_preserve_vmalloc(successor, again, second)
    assert second.load()[1:] == (512, 3, 0)
    assert preserved(successor)[key(again.vmalloc_to_pfn(511) if again else 0)] == 1


def lost(kernel: Kernel) -> int:
    """Pages that were restored and belong to nobody who could free them."""
    runs = kernel.pages.pages.runs()
    return sum(run.end_pfn - run.start_pfn for run in runs if run.state.owner == "kho_restore")


@pytest.mark.parametrize(
    ("total_pages", "restored"),
    [(4, 4), (6, 6), (0, 0)],
    ids=["fewer than listed", "more than listed", "none"],
)
def test_wrong_page_count(total_pages: int, restored: int) -> None:
    """The count must match; what was restored before it is noticed has no owner any more."""
    machine, kernel = boot()
    area = vmalloc(kernel, 5 * PAGE)
    assert area is not None
    holder = kernel.kho_alloc_preserve(16)
    slot = KhoVmallocSlot(kernel, holder.phys)
    kho_preserve_vmalloc(kernel, area, slot)
    slot.store(slot.load()._replace(total_pages=total_pages))
    successor = machine.kexec(kernel)
    assert kho_restore_vmalloc(successor, KhoVmallocSlot(successor, holder.phys)) is None
    assert lost(successor) == {4: 4, 6: 5, 0: 0}[total_pages]


def test_restore_twice() -> None:
    """The chunk has been given back already: the second time it has no magic."""
    machine, kernel = boot()
    area = vmalloc(kernel, 2 * PAGE)
    assert area is not None
    successor, slot, _ = hand_over(machine, kernel, area)
    assert kho_restore_vmalloc(successor, slot) is not None
    assert kho_restore_vmalloc(successor, slot) is None


def test_an_unpreserved_page_ends_it() -> None:
    """A listed page without magic: the pages before it are restored and lost."""
    machine, kernel = boot()
    area = vmalloc(kernel, 4 * PAGE)
    assert area is not None
    holder = kernel.kho_alloc_preserve(16)
    kho_preserve_vmalloc(kernel, area, KhoVmallocSlot(kernel, holder.phys))
    kernel.kho_unpreserve_pages(area.vmalloc_to_pfn(2), 1)
    successor = machine.kexec(kernel)
    free = successor.pages.nr_free_pages()
    assert kho_restore_vmalloc(successor, KhoVmallocSlot(successor, holder.phys)) is None
    assert lost(successor) == 2
    assert successor.pages.nr_free_pages() == free


def test_a_cyclic_chain_ends_at_the_missing_magic() -> None:
    """A chunk that links itself is restored once, and its page is free by then."""
    machine, kernel = boot()
    area = vmalloc(kernel, 2 * PAGE)
    assert area is not None
    holder = kernel.kho_alloc_preserve(16)
    slot = KhoVmallocSlot(kernel, holder.phys)
    kho_preserve_vmalloc(kernel, area, slot)
    kernel.ram.write_u64(slot.load().first, slot.load().first, kernel.by("bug"))
    successor = machine.kexec(kernel)
    assert kho_restore_vmalloc(successor, KhoVmallocSlot(successor, holder.phys)) is None
    assert lost(successor) == 2


def test_a_chunk_outside_of_memory_is_fatal() -> None:
    """phys_to_virt of an address without memory, and the page fault after it."""
    _, kernel = boot()
    slot = KhoVmallocSlot(kernel, stack=pack_kho_vmalloc(KhoVmalloc(1 << 45, 1, 1, 0)))
    with pytest.raises(KernelPanic, match="not mapped"):
        kho_restore_vmalloc(kernel, slot)


def test_unknown_flags_are_ignored() -> None:
    """Flags of a newer kernel do not stop this one; it restores what it knows of them."""
    machine, kernel = boot()
    area = vmalloc(kernel, PAGE)
    assert area is not None
    holder = kernel.kho_alloc_preserve(16)
    slot = KhoVmallocSlot(kernel, holder.phys)
    kho_preserve_vmalloc(kernel, area, slot)
    slot.store(slot.load()._replace(flags=0x8002))
    successor = machine.kexec(kernel)
    again = kho_restore_vmalloc(successor, KhoVmallocSlot(successor, holder.phys))
    assert again is not None
    assert again.flags == VM_ALLOW_HUGE_VMAP


@pytest.mark.parametrize(
    "symbol", ["kho_restore_vmalloc", "__get_vm_area_node", "alloc_vmap_area", "vmap_pages_range"]
)
def test_restore_without_memory(symbol: str) -> None:
    """NULL: before any page is touched, or when all are restored and nobody has them."""
    machine, kernel = boot()
    area = vmalloc(kernel, 3 * PAGE)
    assert area is not None
    successor, slot, _ = hand_over(machine, kernel, area)
    successor.pages.fail = lambda order, owner: owner == symbol
    assert kho_restore_vmalloc(successor, slot) is None
    assert lost(successor) == (0 if symbol == "kho_restore_vmalloc" else 3)


@settings(max_examples=40)
@given(
    nr_pages=st.integers(1, 1100),
    seed=st.integers(0, 1 << 16),
    huge=st.booleans(),
    data=st.lists(
        st.tuples(st.integers(0, 1 << 30), st.binary(min_size=1, max_size=20)), max_size=5
    ),
)
def test_any_area_under_any_allocator(
    nr_pages: int, seed: int, huge: bool, data: list[tuple[int, bytes]]
) -> None:
    """Wherever the pages come from: content, order of pages and free memory are right."""
    machine = Machine("64M", allocator="adversarial", seed=seed, checks=False)
    kernel = machine.boot(cmdline="kho=on")
    area = vmalloc(kernel, nr_pages * PAGE, huge=huge, zero=True)
    assert area is not None
    model = bytearray(nr_pages * PAGE)
    for offset, text in data:
        offset %= len(model) - len(text)
        model[offset : offset + len(text)] = text
        area.write(offset, text)
    assert area.read(0, len(model)) == model
    successor, slot, _ = hand_over(machine, kernel, area)
    free = successor.pages.nr_free_pages()
    descriptor = slot.load()
    again = kho_restore_vmalloc(successor, slot)
    assert again is not None
    assert again.read(0, len(model)) == model
    assert list(pfns_of(again)) == list(pfns_of(area))
    vfree(successor, again)
    chunks = (area.nr_pages >> descriptor.order) // 511 + 1
    assert successor.pages.nr_free_pages() == free + area.nr_pages + chunks
