"""The memfd handler: guest memory into a live update and out of it."""

from __future__ import annotations

import errno
import hashlib
import struct
from collections import Counter
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khosim import KernelError, KernelPanic, Machine
from khosim.abi.kho_vmalloc import KhoVmalloc, unpack_kho_vmalloc_chunk
from khosim.abi.memfd import (
    MEMFD_LUO_ALL_SEALS,
    MemfdLuoFolioSer,
    MemfdLuoSer,
    pack_memfd_luo_folio_ser,
    pack_memfd_luo_ser,
    unpack_memfd_luo_folio_ser,
    unpack_memfd_luo_ser,
)
from khosim.kernel.folio_range import (
    restored_log,
)
from khosim.kernel.kernel import Kernel
from khosim.kernel.liveupdate.file_ops import LiveupdateFileOpArgs
from khosim.kernel.liveupdate.memfd_luo import MemfdLuoHandler
from khosim.kernel.liveupdate.memfd_records import read_records
from khosim.kernel.memfd import (
    MFD_ALLOW_SEALING,
    MFD_HUGETLB,
    MFD_NOEXEC_SEAL,
    Memfd,
    memfd,
    memfd_create,
)
from khosim.kernel.page_cache import CacheRun
from khosim.kernel.page_map import ALLOCATED, PageState

GOLDEN = Path(__file__).parent / "golden" / "captures"
PAGE = 4096
MIB = 1 << 20
HANDLER = MemfdLuoHandler()
SEAL, SHRINK, GROW, WRITE, FUTURE_WRITE, EXEC = 1, 2, 4, 8, 16, 32


def boot(ram: str = "64M", **options: Any) -> tuple[Machine, Kernel]:
    machine = Machine(ram, checks=False, **options)
    return machine, machine.boot(cmdline="kho=on")


def preserve(file: Memfd) -> LiveupdateFileOpArgs:
    """What luo_preserve_file and, before the jump, luo_file_freeze do."""
    args = LiveupdateFileOpArgs(file.kernel, HANDLER, file=file)
    HANDLER.preserve(args)
    return args


def unpreserve(args: LiveupdateFileOpArgs) -> None:
    HANDLER.unpreserve(
        LiveupdateFileOpArgs(
            args.kernel,
            HANDLER,
            file=args.file,
            serialized_data=args.serialized_data,
            private_data=args.private_data,
        )
    )


def freeze(args: LiveupdateFileOpArgs) -> None:
    HANDLER.freeze(args)


def retrieve(kernel: Kernel, data: int) -> Memfd:
    args = LiveupdateFileOpArgs(kernel, HANDLER, serialized_data=data)
    HANDLER.retrieve(args)
    assert isinstance(args.file, Memfd)
    return args.file


def finish(kernel: Kernel, data: int, status: int = 0) -> None:
    args = LiveupdateFileOpArgs(kernel, HANDLER, serialized_data=data, retrieve_status=status)
    HANDLER.finish(args)


def refused(error: int, call: Callable[..., object], *args: object) -> None:
    with pytest.raises(KernelError) as caught:
        call(*args)
    assert caught.value.errno == error


def preserved(kernel: Kernel) -> Counter[int]:
    keys: Counter[int] = Counter()
    for nr_keys, first in kernel.kho_out.tree.walk():
        keys.update(range(first, first + nr_keys) if nr_keys else ())
    return keys


def balance(kernel: Kernel) -> tuple[int, Counter[int]]:
    """Free pages with those of the tree, and what is preserved."""
    tree_pages = sum(1 for nr_keys, _ in kernel.kho_out.tree.walk() if not nr_keys)
    return kernel.pages.nr_free_pages() + tree_pages, preserved(kernel)


def fail_nth(kernel: Kernel, n: int) -> Callable[[], bool]:
    calls = iter(range(1 << 30))
    hit: list[str] = []

    def fail(order: int, owner: str) -> bool:
        if next(calls) != n:
            return False
        hit.append(owner)
        return True

    kernel.pages.fail = fail
    return lambda: bool(hit)


def reserved_by_predecessor(kernel: Kernel) -> int:
    return kernel.pages.nr_pages("incoming")


# -- layouts --------------------------------------------------------------------------------------


def test_descriptor_bytes() -> None:
    """48 bytes, field by field."""
    ser = MemfdLuoSer(0x1122, 0x40000, 6, 0, 64, KhoVmalloc(0x45A000, 1, 1, 0))
    data = bytes.fromhex(
        "2211000000000000 0000040000000000 06000000 00000000 4000000000000000"
        "00a0450000000000 01000000 0100 0000"
    )
    assert pack_memfd_luo_ser(ser) == data
    assert unpack_memfd_luo_ser(b"." + data, 1) == ser


def test_record_bytes() -> None:
    """16 bytes: 52 bits of pfn, 12 bits of flags, the page in the file."""
    folio = MemfdLuoFolioSer(0x123456789, 3, 0x55)
    data = bytes.fromhex("8967452301003000 5500000000000000")
    assert pack_memfd_luo_folio_ser(folio) == data
    assert unpack_memfd_luo_folio_ser(data) == folio
    assert pack_memfd_luo_folio_ser(MemfdLuoFolioSer(1 << 52, 1 << 12, 0)) == bytes(16)


def test_bytes_in_ram() -> None:
    """Descriptor, chunk and records of a file of three pages."""
    _, kernel = boot()
    file = memfd(kernel, "guest", size=3 * PAGE)
    file.write(PAGE, b"x")
    file.lseek(5)
    file.add_seals(SHRINK | GROW)
    args = preserve(file)
    ser = unpack_memfd_luo_ser(kernel.ram.read(args.serialized_data, 48))
    assert kernel.ram.read(args.serialized_data + 48, PAGE - 48) == bytes(PAGE - 48)
    assert (ser.pos, ser.size, ser.seals, ser.flags, ser.nr_folios) == (5, 3 * PAGE, 6, 0, 3)
    following, (records,) = unpack_kho_vmalloc_chunk(kernel.ram.read(ser.folios.first, PAGE))
    assert (following, ser.folios[1:]) == (0, (1, 1, 0))
    pfns = [run.pfn_of(i) for run in file.inode.mapping for i in range(run.index, run.end)]
    expected = b"".join(struct.pack("<QQ", pfn | 3 << 52, index) for index, pfn in enumerate(pfns))
    assert kernel.ram.read(records, PAGE) == expected.ljust(PAGE, b"\0")
    keys = {1 << 52 | pfn for pfn in pfns}
    keys |= {1 << 52 | phys >> 12 for phys in (args.serialized_data, ser.folios.first, records)}
    assert keys <= set(preserved(kernel))


# -- the old kernel -------------------------------------------------------------------------------


def test_which_files() -> None:
    """shmem memfds, and nothing else; two descriptors of one inode have one id."""
    _, kernel = boot()
    file = memfd(kernel, "f")
    assert HANDLER.can_preserve(file)
    assert not HANDLER.can_preserve(memfd_create(kernel, "f", MFD_HUGETLB))
    file.inode.i_nlink = 1
    assert not HANDLER.can_preserve(file)
    again = Memfd(kernel, file.inode, "again")
    assert HANDLER.get_id(file) == HANDLER.get_id(again)
    assert HANDLER.get_id(file) != HANDLER.get_id(memfd(kernel, "f"))
    assert HANDLER.ops.unfreeze is None
    assert HANDLER.ops.can_finish is None
    assert HANDLER.ops.missing() == []


def test_preserve_and_unpreserve() -> None:
    """Afterwards only the holes are different: they are folios now."""
    _, kernel = boot()
    file = memfd(kernel, "f", size=600 * PAGE)
    file.write(7 * PAGE, b"x")
    free, keys = balance(kernel)
    args = preserve(file)
    assert file.inode.frozen
    assert {run.pins for run in file.inode.mapping} == {1}
    unpreserve(args)
    assert not file.inode.frozen
    assert {run.pins for run in file.inode.mapping} == {0}
    assert balance(kernel) == (free - 599, keys)
    args = preserve(file)
    unpreserve(args)
    assert balance(kernel) == (free - 599, keys)
    file.fput()
    assert balance(kernel) == (free + 1, keys)


def test_orders_side_by_side() -> None:
    """A small folio right behind a large one, in file and memory: each has its own key."""
    _, kernel = boot("1G")
    file = memfd(kernel, "f", size=2 * MIB + 20 * PAGE)
    block = kernel.pages.alloc_pages(10, "shmem_alloc_folio")
    assert block is not None
    large = PageState(ALLOCATED, 9, True, "shmem_alloc_folio")
    single = PageState(ALLOCATED, 0, False, "shmem_alloc_folio")
    kernel.pages.pages.set(block, block + 512, large)
    kernel.pages.pages.set(block + 512, block + 1024, single)
    file.inode.add_many(0, 532, [CacheRun(0, block, 9, 1), CacheRun(512, block + 512, 0, 20)])
    file.inode.recalc(532)
    before = balance(kernel)
    args = preserve(file)
    added = preserved(kernel) - before[1]
    assert {1 << 43 | block >> 9, 1 << 52 | (block + 512)} <= set(added)
    unpreserve(args)
    assert balance(kernel) == before


def test_an_empty_file() -> None:
    """Size 0: a descriptor without folios."""
    machine, kernel = boot()
    before = balance(kernel)
    file = memfd(kernel, "f")
    args = preserve(file)
    ser = unpack_memfd_luo_ser(kernel.ram.read(args.serialized_data, 48))
    assert ser == MemfdLuoSer(0, 0, 0, 0, 0, KhoVmalloc(0, 0, 0, 0))
    assert args.private_data is None
    unpreserve(args)
    assert balance(kernel) == before
    data = preserve(file).serialized_data
    assert retrieve(machine.kexec(kernel), data).size == 0


def test_everything_becomes_data() -> None:
    """Folios that nobody used are zeroed; all are dirty and up to date, in file and record."""
    _, kernel = boot()
    for folio in [kernel.alloc_folio() for _ in range(3)]:
        folio.write(0, b"\xee" * PAGE)
        folio.put()
    file = memfd(kernel, "f")
    file.fallocate(0, 4 * PAGE)
    assert not any(run.uptodate for run in file.inode.mapping)
    args = preserve(file)
    assert all(run.uptodate and run.dirty for run in file.inode.mapping)
    assert file.read(0, 4 * PAGE) == bytes(4 * PAGE)
    assert {flags for _, _, flags, _, _ in read_records(kernel, args.private_data, 4)} == {3}


def test_freeze_updates_the_position_alone() -> None:
    """The position is what it is at the jump; without a handle -EINVAL."""
    _, kernel = boot()
    file = memfd(kernel, "f", size=PAGE)
    args = preserve(file)
    file.lseek(77)
    freeze(args)
    ser = unpack_memfd_luo_ser(kernel.ram.read(args.serialized_data, 48))
    assert (ser.pos, ser.size) == (77, PAGE)
    empty = LiveupdateFileOpArgs(kernel, HANDLER, file=file)
    refused(errno.EINVAL, HANDLER.freeze, empty)
    HANDLER.unpreserve(empty)
    assert file.inode.frozen


def test_unknown_seals() -> None:
    """-EOPNOTSUPP for a seal that memfd-v2 does not know; all is undone."""
    _, kernel = boot()
    file = memfd(kernel, "f", size=PAGE)
    file.inode.seals = 64
    before = balance(kernel)
    refused(errno.EOPNOTSUPP, preserve, file)
    assert balance(kernel) == before
    assert not file.inode.frozen
    assert MEMFD_LUO_ALL_SEALS == 63


@pytest.mark.parametrize(
    ("size", "error", "warns"),
    [
        (1 << 63, None, False),
        ((1 << 44) - PAGE + 1, errno.EFBIG, False),
        ((1 << 44) - PAGE, errno.ENOMEM, True),
        (1 << 40, errno.ENOMEM, True),
        ((1 << 40) - PAGE, errno.ENOMEM, False),
    ],
)
def test_sizes_too_large(size: int, error: int | None, warns: bool) -> None:
    """2**32 pages are -EFBIG. From 2**28 on the pointer array is above INT_MAX: -ENOMEM."""
    _, kernel = boot()
    if error is None:
        refused(errno.EFBIG, memfd(kernel, "f").ftruncate, size)
        return
    file = memfd(kernel, "f", size=size)
    before = balance(kernel)
    refused(error, preserve, file)
    assert balance(kernel) == before
    assert file.inode.mapping.nrpages == 0
    assert any("kvmalloc" in line for line in kernel.messages) == warns


def test_every_failing_allocation() -> None:
    """-ENOMEM, and nothing but filled holes is left of the attempt."""
    _, kernel = boot()
    file = memfd(kernel, "f", size=610 * PAGE)
    file.write(0, b"x" * (600 * PAGE))
    free, keys = balance(kernel)
    free += 600
    symbols = []
    errors = set()
    for n in range(1000):
        hit = fail_nth(kernel, n)
        try:
            args = preserve(file)
        except KernelError as error:
            symbols.append(error.symbol)
            errors.add(error.errno)
        kernel.pages.fail = None
        if not hit():
            break
        if len(symbols) <= n:
            unpreserve(args)  # the kernel could do without what failed
            symbols.append("")
        assert balance(kernel) == (free - file.inode.mapping.nrpages, keys), n
        assert not file.inode.frozen
        assert {run.pins for run in file.inode.mapping} == {0}
        file.fallocate(600 * PAGE, 10 * PAGE, 3)
    expected = {"folio_alloc", "memfd_pin_folios", "memfd_luo_preserve_folios"}
    assert expected | {"kho_preserve_vmalloc", ""} == set(symbols)
    assert symbols.count("memfd_pin_folios") >= 30
    assert errors == {errno.ENOMEM}
    assert file.read(0, 610 * PAGE) == b"x" * (600 * PAGE) + bytes(10 * PAGE)


def test_folios_behind_the_end_are_not_preserved() -> None:
    """What fallocate reserved behind the end of the file is lost."""
    machine, kernel = boot()
    file = memfd(kernel, "f", size=2 * PAGE)
    file.fallocate(0, 8 * PAGE, 1)
    args = preserve(file)
    assert [run.pins for run in file.inode.mapping] == [1, 0]
    again = retrieve(machine.kexec(kernel), args.serialized_data)
    assert again.inode.mapping.nrpages == 2


def test_seals_added_after_preserve_are_lost() -> None:
    """Nothing freezes the seals, and the descriptor keeps those of preserve."""
    machine, kernel = boot()
    file = memfd(kernel, "f", size=PAGE)
    args = preserve(file)
    file.add_seals(SHRINK | GROW)
    refused(errno.EBUSY, file.add_seals, WRITE)
    freeze(args)
    assert retrieve(machine.kexec(kernel), args.serialized_data).seals == 0


# -- the new kernel -------------------------------------------------------------------------------


@pytest.mark.parametrize("huge", ["never", "always"])
def test_a_guest_survives(huge: str) -> None:
    """Bytes, size, position, seals, orders and places: all as they were."""
    machine, kernel = boot("128M")
    file = memfd(kernel, "guest", size=9 * MIB, huge=huge)
    file.write(5000, b"early")
    file.write(4 * MIB, b"m" * MIB)
    file.add_seals(SHRINK | SEAL)
    args = preserve(file)
    file.store(5000, b"later")
    file.write(9 * MIB - 3, b"end")
    file.lseek(1234)
    freeze(args)
    places = [(run.index, run.pfn, run.order, run.nr_folios) for run in file.inode.mapping]
    content = hashlib.sha256(file.read(0, 9 * MIB)).digest()
    successor = machine.kexec(kernel)
    waiting = reserved_by_predecessor(successor)
    again = retrieve(successor, args.serialized_data)
    assert (again.size, again.f_pos, again.seals) == (9 * MIB, 1234, SHRINK | SEAL)
    now = [(run.index, run.pfn, run.order, run.nr_folios) for run in again.inode.mapping]
    assert now == places
    assert all(run.dirty and run.uptodate for run in again.inode.mapping)
    assert again.read(5000, 5) == b"later"
    assert hashlib.sha256(again.read(0, 9 * MIB)).digest() == content
    assert again.inode.alloced == again.inode.mapping.nrpages == 2304 + 256 * (huge == "always")
    gone = waiting - reserved_by_predecessor(successor)
    assert gone == again.inode.mapping.nrpages + 3 + (8 if huge == "never" else 0)
    again.write(0, b"alive")
    finish(successor, args.serialized_data, status=1)
    free = successor.pages.nr_free_pages()
    pages = again.inode.mapping.nrpages
    again.fput()
    assert successor.pages.nr_free_pages() == free + pages


def test_generations() -> None:
    """The same memory, preserved again and again; sparse content in both guests."""
    machine, kernel = boot("128M", nodes=2)
    guests = [memfd(kernel, f"vm{n}", size="20M", nid=n) for n in range(2)]
    for n, guest in enumerate(guests):
        guest.write(n * MIB, b"generation 0")
    for generation in range(1, 4):
        handles = [preserve(guest) for guest in guests]
        for handle in handles:
            freeze(handle)
        kernel = machine.kexec(kernel)
        guests = [retrieve(kernel, handle.serialized_data) for handle in handles]
        for n, guest in enumerate(guests):
            text = b"".join(b"generation %d" % g for g in range(generation))
            assert guest.read(n * MIB, len(text) + 1) == text + b"\0"
            assert kernel.nid_of_pfn(next(iter(guest.inode.mapping)).pfn) == n
            guest.store(n * MIB + len(text), b"generation %d" % generation)


@pytest.mark.parametrize(
    ("huge", "gib", "nodes"), [("never", 2, 1), ("always", 1023, 2)], ids=["4 KiB", "2 MiB"]
)
def test_a_large_guest(huge: str, gib: int, nodes: int) -> None:
    """Half a million folios are a few runs and no work of their own."""
    machine, kernel = boot(f"{2 * gib}G", nodes=nodes)
    file = memfd(kernel, "guest", size=gib << 30, huge=huge)
    for n in range(8):
        file.write(n * (gib << 27) + 5, b"guest %d" % n)
    args = preserve(file)
    assert len(file.inode.mapping) < 64
    successor = machine.kexec(kernel)
    again = retrieve(successor, args.serialized_data)
    assert len(again.inode.mapping) < 64
    assert again.inode.mapping.nrpages == gib << 18
    for n in range(8):
        assert again.read(n * (gib << 27), 14) == b"\0" * 5 + b"guest %d" % n + b"\0\0"
    written = sum(data.count(b"guest") for _, data in again.data())
    assert written == 8
    free = successor.pages.nr_free_pages()
    again.fput()
    assert successor.pages.nr_free_pages() == free + (gib << 18)


def test_finish_without_retrieve() -> None:
    """Everything is freed; after a retrieve, good or bad, nothing is touched."""
    machine, kernel = boot()
    file = memfd(kernel, "f", size=600 * PAGE)
    args = preserve(file)
    successor = machine.kexec(kernel)
    free, waiting = successor.pages.nr_free_pages(), reserved_by_predecessor(successor)
    finish(successor, args.serialized_data, status=-errno.EINVAL)
    finish(successor, args.serialized_data, status=1)
    assert reserved_by_predecessor(successor) == waiting
    finish(successor, args.serialized_data)
    assert waiting - reserved_by_predecessor(successor) == 600 + 3 + 1 + 1
    assert successor.pages.nr_free_pages() == free + 600 + 3 + 1 + 1


def test_finish_without_records() -> None:
    """Where the records cannot be restored only descriptor and chunk are freed."""
    machine, kernel = boot()
    args = preserve(memfd(kernel, "f", size=PAGE))
    kernel.ram.write_u64(args.serialized_data + 40, 7, kernel.by("bug"))  # total_pages and on
    successor = machine.kexec(kernel)
    free = successor.pages.nr_free_pages()
    finish(successor, args.serialized_data)
    assert successor.pages.nr_free_pages() == free + 2


def test_the_exec_seal_comes_back_with_all_the_others() -> None:
    """A file sealed against execution alone cannot be written any more after the update."""
    machine, kernel = boot()
    file = memfd(kernel, "f", size=PAGE, flags=MFD_NOEXEC_SEAL)
    file.write(0, b"x")
    assert file.seals == EXEC
    args = preserve(file)
    again = retrieve(machine.kexec(kernel), args.serialized_data)
    assert again.seals == EXEC | SHRINK | GROW | WRITE | FUTURE_WRITE
    assert again.inode.i_mode == 0o777
    refused(errno.EPERM, again.write, 0, b"y")


@pytest.mark.parametrize(
    ("offset", "value", "error"),
    [(16, 64, errno.EOPNOTSUPP), (40, 2, errno.EINVAL), (32, 0, errno.EINVAL)],
    ids=["seals", "total_pages", "no chunk"],
)
def test_bad_descriptors(offset: int, value: int, error: int) -> None:
    """The descriptor is freed, the folios stay reserved: retrieve has given up on them."""
    machine, kernel = boot()
    args = preserve(memfd(kernel, "f", size=5 * PAGE))
    write = kernel.ram.write_u64 if offset == 32 else kernel.ram.write_u32
    write(args.serialized_data + offset, value, kernel.by("bug"))
    successor = machine.kexec(kernel)
    free, waiting = successor.pages.nr_free_pages(), reserved_by_predecessor(successor)
    refused(error, retrieve, successor, args.serialized_data)
    assert reserved_by_predecessor(successor) in (waiting - 1, waiting - 3)
    assert successor.pages.nr_free_pages() == free + 1 + (offset == 40)


def test_a_position_that_no_file_has() -> None:
    """It is ignored without a word: the file is at 0."""
    machine, kernel = boot()
    args = preserve(memfd(kernel, "f", size=PAGE))
    kernel.ram.write_u64(args.serialized_data, 1 << 63, kernel.by("bug"))
    assert retrieve(machine.kexec(kernel), args.serialized_data).f_pos == 0


def edit_records(kernel: Kernel, args: LiveupdateFileOpArgs, edit: dict[int, bytes]) -> None:
    for at, record in edit.items():
        args.private_data.write(at * 16, record, by="bug")


def test_records_without_a_folio_are_holes() -> None:
    """pfn 0 is passed over; a folio nobody names stays reserved."""
    machine, kernel = boot()
    file = memfd(kernel, "f", size=40 * PAGE)
    file.write(0, b"a" * 40 * PAGE)
    args = preserve(file)
    edit_records(kernel, args, {7: bytes(16), 8: struct.pack("<QQ", 3 << 52, 8)})
    successor = machine.kexec(kernel)
    again = retrieve(successor, args.serialized_data)
    assert list(again.inode.mapping.holes(0, 40)) == [(7, 9)]
    assert again.read(6 * PAGE, 4 * PAGE) == b"a" * PAGE + bytes(2 * PAGE) + b"a" * PAGE


@pytest.mark.parametrize("at", [0, 3, 39])
def test_a_folio_that_was_not_preserved(at: int) -> None:
    """-EIO; all other folios are freed, those in the file with it."""
    machine, kernel = boot()
    args = preserve(memfd(kernel, "f", size=40 * PAGE))
    record = unpack_memfd_luo_folio_ser(args.private_data.read(at * 16, 16))
    kernel.kho_unpreserve_pages(record.pfn, 1)
    successor = machine.kexec(kernel)
    free = successor.pages.nr_free_pages()
    refused(errno.EIO, retrieve, successor, args.serialized_data)
    assert f"memfd_luo: Unable to restore folio at physical address: {record.pfn << 12:x}" in (
        successor.messages
    )
    assert successor.pages.nr_free_pages() == free + 39 + 3


def test_two_folios_at_one_place() -> None:
    """-EEXIST, and no page is lost or restored twice."""
    machine, kernel = boot()
    args = preserve(memfd(kernel, "f", size=40 * PAGE))
    first = unpack_memfd_luo_folio_ser(args.private_data.read(20 * 16, 16)).pfn
    assert unpack_memfd_luo_folio_ser(args.private_data.read(29 * 16, 16)).pfn == first + 9
    edit_records(
        kernel, args, {20 + n: struct.pack("<QQ", first + n | 3 << 52, 5 + n) for n in range(10)}
    )
    successor = machine.kexec(kernel)
    free = successor.pages.nr_free_pages()
    refused(errno.EEXIST, retrieve, successor, args.serialized_data)
    assert successor.pages.nr_free_pages() == free + 40 + 3
    assert not any("no magic" in line for line in successor.messages)


def test_one_folio_at_two_places() -> None:
    """-EIO for the second; the folio that is named nowhere stays reserved."""
    machine, kernel = boot()
    args = preserve(memfd(kernel, "f", size=40 * PAGE))
    twice = unpack_memfd_luo_folio_ser(args.private_data.read(5 * 16, 16)).pfn
    edit_records(kernel, args, {20: struct.pack("<QQ", twice | 3 << 52, 20)})
    successor = machine.kexec(kernel)
    free = successor.pages.nr_free_pages()
    refused(errno.EIO, retrieve, successor, args.serialized_data)
    assert successor.pages.nr_free_pages() == free + 39 + 3


def test_a_large_folio_out_of_line_is_fatal() -> None:
    """VM_BUG_ON for a folio at a page that its order does not divide."""
    machine, kernel = boot()
    file = memfd(kernel, "f", size=2 * MIB, huge="always")
    args = preserve(file)
    record = unpack_memfd_luo_folio_ser(args.private_data.read(0, 16))
    edit_records(kernel, args, {0: struct.pack("<QQ", record.pfn | 3 << 52, 5)})
    successor = machine.kexec(kernel)
    with pytest.raises(KernelPanic, match="VM_BUG_ON_FOLIO"):
        retrieve(successor, args.serialized_data)


def test_more_records_than_there_are() -> None:
    """The count is believed: the kernel reads on behind the area and faults."""
    machine, kernel = boot()
    args = preserve(memfd(kernel, "f", size=PAGE))
    kernel.ram.write_u64(args.serialized_data + 24, 257, kernel.by("bug"))
    successor = machine.kexec(kernel)
    with pytest.raises(KernelPanic, match="page fault"):
        retrieve(successor, args.serialized_data)


def test_flags_are_taken_over() -> None:
    """A record says whether its folio is dirty and up to date."""
    machine, kernel = boot()
    file = memfd(kernel, "f", size=3 * PAGE)
    file.write(0, b"a" * 3 * PAGE)
    args = preserve(file)
    for at, flags in enumerate((0, 1, 2)):
        record = unpack_memfd_luo_folio_ser(args.private_data.read(at * 16, 16))
        word = record.pfn | flags << 52
        edit_records(kernel, args, {at: struct.pack("<QQ", word, at)})
    again = retrieve(machine.kexec(kernel), args.serialized_data)
    flags_now = [(run.dirty, run.uptodate) for run in again.inode.mapping]
    assert flags_now == [(False, False), (True, False), (False, True)]
    assert again.read(0, 3 * PAGE) == bytes(2 * PAGE) + b"a" * PAGE


def test_holes_that_cannot_be_filled() -> None:
    """-ENOMEM from pinning, which the log tells; the file is free to change again."""
    _, kernel = boot()
    file = memfd(kernel, "f")
    file.ftruncate(40 * PAGE)
    kernel.pages.fail = lambda order, owner: owner == "shmem_alloc_folio"
    refused(errno.ENOMEM, preserve, file)
    kernel.pages.fail = None
    assert kernel.messages[-1] == "memfd_luo: failed to pin folios: -12"
    file.ftruncate(0)


@pytest.mark.parametrize(
    ("symbol", "error", "lost", "told"),
    [
        ("shmem_alloc_inode", errno.ENOSPC, 42, "memfd_luo: failed to setup file: -ENOSPC"),
        ("alloc_file_pseudo", errno.ENOMEM, 42, "memfd_luo: failed to setup file: -ENOMEM"),
        ("kho_restore_vmalloc", errno.EINVAL, 42, ""),
        ("vmap_pages_range", errno.EINVAL, 41, ""),
        ("mem_cgroup_charge", errno.ENOMEM, 0, "charge folio index {}: -12"),
        ("shmem_add_to_page_cache", errno.ENOMEM, 0, "add to page cache folio index {}: -12"),
        ("shmem_inode_acct_blocks", errno.ENOSPC, 0, "account folio index {}(1 pages): -28"),
    ],
)
@pytest.mark.parametrize("after", [0, 17, 39])
def test_retrieve_without_memory(
    symbol: str, error: int, lost: int, told: str, after: int
) -> None:
    """Before the folios are in sight they are given up; from then on all are freed."""
    machine, kernel = boot()
    args = preserve(memfd(kernel, "f", size=40 * PAGE))
    successor = machine.kexec(kernel)
    free = successor.pages.nr_free_pages()
    if lost:
        after = 0
    answers = chain(repeat(False, after), repeat(True))
    successor.pages.fail = lambda order, owner: owner == symbol and next(answers)
    refused(error, retrieve, successor, args.serialized_data)
    assert successor.pages.nr_free_pages() == free + 40 + 3 - lost
    assert not any("i_blocks" in line for line in successor.messages)
    if told:
        line = told.format(after)
        assert successor.messages[-1] == (line if lost else f"memfd_luo: shmem: failed to {line}")
    finish(successor, args.serialized_data, status=-error)


# -- against a model ------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1 << 16),
    huge=st.sampled_from(["never", "always", "within_size"]),
    size=st.integers(0, 1500 * PAGE),
    writes=st.lists(st.tuples(st.integers(0, 1500 * PAGE), st.binary(max_size=50)), max_size=6),
    late=st.lists(st.tuples(st.integers(0, 1500 * PAGE), st.binary(max_size=50)), max_size=3),
    rounds=st.integers(1, 3),
)
def test_any_file_under_any_allocator(
    seed: int,
    huge: str,
    size: int,
    writes: list[tuple[int, bytes]],
    late: list[tuple[int, bytes]],
    rounds: int,
) -> None:
    """Bytes and size are the same after each jump, and finish or close frees every page."""
    machine = Machine("64M", allocator="adversarial", seed=seed, checks=False)
    kernel = machine.boot(cmdline="kho=on")
    file = memfd(kernel, "f", size=size, huge=huge)
    model = bytearray(size)
    for offset, text in writes:
        done = file.write(offset, text)
        model.extend(bytes(max(0, offset + done - len(model)) if done else 0))
        model[offset : offset + done] = text
    for _ in range(rounds):
        args = preserve(file)
        for offset, text in late:
            text = text[: max(0, len(model) - offset)]
            file.store(offset, text)
            model[offset : offset + len(text)] = text
        freeze(args)
        kernel = machine.kexec(kernel)
        free, waiting = kernel.pages.nr_free_pages(), reserved_by_predecessor(kernel)
        file = retrieve(kernel, args.serialized_data)
        assert file.read(0, len(model) + 1) == model
    nr_pages = file.inode.mapping.nrpages
    file.fput()
    given_back = waiting - reserved_by_predecessor(kernel)
    assert kernel.pages.nr_free_pages() == free + given_back
    assert given_back > nr_pages


def test_restored_log_replaces_the_plain_list() -> None:
    """The first range turns the kernel's record into one that takes ranges."""
    machine, kernel = boot()
    args = preserve(memfd(kernel, "f", size=100 * PAGE))
    successor = machine.kexec(kernel)
    retrieve(successor, args.serialized_data)
    log = restored_log(successor)
    assert len(log) == 103
    assert len(log.runs) < 20


def test_allow_sealing_is_the_default() -> None:
    """memfd() makes files that take seals."""
    _, kernel = boot()
    assert memfd(kernel, "f").seals == 0
    assert memfd(kernel, "f", flags=MFD_ALLOW_SEALING).seals == 0
