"""KHO, incoming: what is accepted, what comes back, and what every wrong call gets.

The many ways to damage a handover are in test_hostile.py.
"""

from __future__ import annotations

import struct

import pytest

from khosim import KernelError, KernelPanic, KhoSimError, Machine
from khosim.abi import fdt
from khosim.kernel.kho_in import KHO_PAGE_MAGIC, KhoIn
from khosim.kernel.kho_radix_key import kho_encode_radix_key
from khosim.kernel.memblock import MEMBLOCK_RSRV_NOINIT

MIB = 1 << 20
CMDLINE = "kho=on"
COLD = "KHO: disabling KHO revival"


def booted(ram="64M", cmdline=CMDLINE, **options):
    """A machine and its first kernel."""
    machine = Machine(ram, **options)
    return machine, machine.boot(cmdline=cmdline, kernel_size="4M", initrd="1M")


def handover(machine, kernel, poke=None, **options):
    """The successor; ``poke(ram)`` may spoil RAM between the jump and the boot."""
    machine.load_successor(kernel, **options)
    if poke is not None:
        poke(machine.hardware.ram)
    return machine.resume()


def edit_root_fdt(kernel, edit):
    """A poke that lets ``edit(tree)`` change the predecessor's root FDT in place."""
    phys = kernel.kho_out.fdt_phys

    def poke(ram):
        tree = memoryview(bytearray(ram.read(phys, 4096)))
        assert fdt.fdt_open_into(tree, tree, 4096) == 0
        assert edit(tree) == 0
        ram.write(phys, bytes(tree), (9, "poke"))

    return poke


def pages_of(kernel, pfn, nr_pages):
    """(kind, refcount, order, compound) of each page."""
    pages = [kernel.page(pfn + i) for i in range(nr_pages)]
    return [(page.kind, page.refcount, page.order, page.compound) for page in pages]


# -- taking over ----------------------------------------------------------------------------------


def test_a_handover_is_found():
    """The word for it, the predecessor's scratch, and what was preserved reserved as NOINIT."""
    machine, kernel = booted()
    areas = kernel.scratch_areas()
    folio = kernel.alloc_folio(3)
    kernel.kho_preserve_folio(folio)
    successor = handover(machine, kernel)
    assert "KHO: found kexec handover data." in successor.messages
    assert COLD not in successor.messages
    assert successor.is_kho_boot
    assert successor.scratch_areas() == areas
    noinit = [
        (base, end)
        for base, end, flags in zip(
            successor.memblock.reserved.base,
            successor.memblock.reserved.end,
            successor.memblock.reserved.flags,
            strict=True,
        )
        if flags & MEMBLOCK_RSRV_NOINIT
    ]
    assert any(base <= folio.phys and folio.phys + 8 * 4096 <= end for base, end in noinit)
    assert pages_of(successor, folio.pfn, 8) == [("incoming", 1, 3, False)] * 8
    assert successor.page(folio.pfn).private == 0x4B484F50_00000003  # "KHOP"
    assert [successor.page(folio.pfn + i).private for i in range(1, 8)] == [0] * 7


def test_early_allocations_stay_in_scratch():
    """Everything that memblock hands out before the page allocator is up."""
    machine, kernel = booted("256M")
    successor = handover(machine, kernel)
    areas = [*successor.scratch_areas(), (0, MIB)]
    for phys, size in successor.memblock.allocations:
        assert any(addr <= phys and phys + size <= addr + length for addr, length in areas)


REFUSALS = {
    "incompatible": lambda tree: fdt.fdt_setprop(tree, 0, "compatible", b"kho-v3\0"),
    "no compatible": lambda tree: fdt.fdt_delprop(tree, 0, "compatible"),
    "no map": lambda tree: fdt.fdt_delprop(tree, 0, "preserved-memory-map"),
    "short map": lambda tree: fdt.fdt_setprop(tree, 0, "preserved-memory-map", bytes(4)),
    "zero map": lambda tree: fdt.fdt_setprop(tree, 0, "preserved-memory-map", bytes(8)),
}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "incompatible",
            "KHO: setup: handover FDT ({:#x}) is incompatible with 'kho-v4': 1",
        ),
        (
            "no compatible",
            "KHO: setup: handover FDT ({:#x}) is incompatible with 'kho-v4': -1",
        ),
        ("no map", "KHO: failed to get preserved memory map"),
        ("short map", "KHO: failed to get preserved memory map"),
        ("zero map", None),
    ],
)
def test_a_refused_handover_boots_cold(case, message):
    """The kernel's words, scratch of its own, and not a trace of the predecessor."""
    machine, kernel = booted()
    folio = kernel.alloc_folio(0)
    kernel.kho_preserve_folio(folio)
    poke = edit_root_fdt(kernel, REFUSALS[case])
    successor = handover(machine, kernel, poke)
    about = [line for line in successor.messages if line.startswith("KHO")]
    wanted = [message.format(kernel.kho_out.fdt_phys)] if message else []
    assert about == [*wanted, COLD]
    assert not successor.is_kho_boot
    assert successor.kho_enable
    assert len(successor.scratch_areas()) == 3
    assert successor.page(folio.pfn).kind in ("free", "allocated")
    assert successor.kho_restore_folio(folio.phys) is None


def test_a_header_that_is_none():
    """fdt_check_header's number in the message."""
    machine, kernel = booted()
    phys = kernel.kho_out.fdt_phys
    successor = handover(machine, kernel, lambda ram: ram.write(phys, bytes(4), (9, "poke")))
    assert f"KHO: setup: handover FDT ({phys:#x}) is invalid: -9" in successor.messages
    assert not successor.is_kho_boot


def test_a_scratch_array_of_odd_length():
    """A partial entry at the end is not counted."""
    machine, kernel = booted()
    areas = kernel.scratch_areas()
    machine.load_successor(kernel)
    ram = machine.hardware.ram
    params = machine.hardware.registers["rsi"]
    data = ram.read_u64(params + 0x250) + 16
    assert ram.read_u64(data + 24) == 48
    ram.write_u64(data + 24, 48 + 15, (9, "poke"))
    successor = machine.resume()
    assert successor.is_kho_boot
    assert successor.kho_scratch_cnt == 3
    assert successor.scratch_areas() == areas


# -- folios ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 4, 10])
def test_a_folio_comes_back_once(order):
    """With its order and its bytes; a second time it is NULL with a warning."""
    machine, kernel = booted("128M")
    folio = kernel.alloc_folio(order)
    folio.write(folio.len_bytes - 5, b"state")
    kernel.kho_preserve_folio(folio)
    successor = handover(machine, kernel)
    managed = successor.total_ram_pages()
    restored = successor.kho_restore_folio(folio.phys)
    assert (restored.pfn, restored.order) == (folio.pfn, order)
    assert restored.read(restored.len_bytes - 5, 5) == b"state"
    assert successor.total_ram_pages() == managed + (1 << order)
    head = ("allocated", 1, order, order > 0)
    tail = ("allocated", 0, order, order > 0)
    assert pages_of(successor, folio.pfn, 1 << order) == [head] + [tail] * ((1 << order) - 1)
    assert successor.page(folio.pfn).private == 0
    assert successor.kho_restore_folio(folio.phys) is None
    assert successor.total_ram_pages() == managed + (1 << order)
    restored.put()
    assert successor.page(folio.pfn).kind == "free"


def test_wrong_addresses_are_refused():
    """A tail page, a page of nobody, a hole: NULL; the warning comes once."""
    machine, kernel = booted()
    folio = kernel.alloc_folio(2)
    kernel.kho_preserve_folio(folio)
    successor = handover(machine, kernel)
    free = successor.alloc_folio(0)
    for phys in (folio.phys + 4096, free.phys, 0xA0000, 1 << 40, (1 << 64) - 4096):
        assert successor.kho_restore_folio(phys) is None
    warnings = [line for line in successor.messages if "kho_restore_page" in line]
    assert warnings == [f"WARNING: kho_restore_page: no magic at {folio.phys + 4096:#x}"]
    restored = successor.kho_restore_folio(folio.phys + 100)  # any byte of the head page
    assert restored.pfn == folio.pfn


def test_without_a_handover_nothing_comes_back():
    """A cold kernel has no page with the magic."""
    _, kernel = booted()
    folio = kernel.alloc_folio(0)
    assert kernel.kho_restore_folio(folio.phys) is None
    assert kernel.kho_restore_pages(folio.phys, 1) is None


def test_restore_free():
    """Restored and freed at once; a warning where there is nothing to restore."""
    machine, kernel = booted()
    folio = kernel.kho_alloc_preserve(10000)
    successor = handover(machine, kernel)
    free = successor.pages.nr_free_pages()
    successor.kho_restore_free(folio.phys)
    assert successor.pages.nr_free_pages() == free + 4
    successor.kho_restore_free(folio.phys)
    assert successor.pages.nr_free_pages() == free + 4
    assert any("WARNING: kho_restore_free" in line for line in successor.messages)


def test_what_nobody_restores_stays_out_of_reach():
    """Preserved pages are never handed out, however much is allocated."""
    machine, kernel = booted()
    folio = kernel.alloc_folio(5)
    kernel.kho_preserve_folio(folio)
    successor = handover(machine, kernel)
    taken = set()
    while successor.pages.nr_free_pages():
        taken.add(successor.alloc_folio(0, movable=True).pfn)
    with pytest.raises(KernelError, match="ENOMEM"):
        successor.alloc_folio(0, movable=True)
    assert not taken & set(range(folio.pfn, folio.pfn + 32))


def test_preserved_pages_are_not_preserved_again():
    """Each kernel says anew what the next one gets."""
    machine, kernel = booted()
    folio = kernel.alloc_folio(0)
    kernel.kho_preserve_folio(folio)
    second = handover(machine, kernel)
    third = handover(machine, second)
    assert third.page(folio.pfn).kind != "incoming"
    assert third.kho_restore_folio(folio.phys) is None


# -- ranges of pages ------------------------------------------------------------------------------


def test_pages_come_back_as_order_0():
    """Each with a reference of its own, whatever blocks they were preserved in."""
    machine, kernel = booted()
    first = kernel.alloc_pages_exact(21)
    assert first % 32 == 0
    kernel.kho_preserve_pages(first + 1, 20)
    successor = handover(machine, kernel)
    phys = (first + 1) << 12
    assert successor.kho_restore_pages(phys, 20) == first + 1
    assert pages_of(successor, first + 1, 20) == [("allocated", 1, 0, False)] * 20
    assert successor.kho_in.restored == [
        (first + 1, 0),
        (first + 2, 1),
        (first + 4, 2),
        (first + 8, 3),
        (first + 16, 2),
        (first + 20, 0),
    ]
    assert successor.kho_restore_pages(phys, 20) is None


def test_a_range_of_nothing():
    """No page to look at: success."""
    machine, kernel = booted()
    successor = handover(machine, kernel)
    assert successor.kho_restore_pages(0x5000, 0) == 5


def test_another_range_than_was_preserved():
    """Blocks that begin elsewhere are refused; those before the refused one stay restored."""
    machine, kernel = booted()
    first = kernel.alloc_pages_exact(16)
    assert first % 16 == 0
    kernel.kho_preserve_pages(first, 16)
    successor = handover(machine, kernel)
    assert successor.kho_restore_pages((first + 1) << 12, 2) is None
    # The head is there: it brings all 16 pages, though only one was asked for.
    assert successor.kho_restore_pages(first << 12, 1) == first
    assert pages_of(successor, first, 16) == [("allocated", 1, 0, False)] * 16


def test_pages_and_folios_can_be_mixed_up():
    """The kernel does not remember which call preserved a block."""
    machine, kernel = booted()
    folio = kernel.alloc_folio(2)
    kernel.kho_preserve_folio(folio)
    pages = kernel.alloc_pages_exact(4)
    kernel.kho_preserve_pages(pages, 4)
    successor = handover(machine, kernel)
    assert successor.kho_restore_pages(folio.phys, 4) == folio.pfn
    assert pages_of(successor, folio.pfn, 4) == [("allocated", 1, 0, False)] * 4
    restored = successor.kho_restore_folio(pages << 12)
    assert restored.order == 2


def test_a_range_across_nodes_loses_its_second_half():
    """Hazard: preserving splits at the node border, restoring steps over the second block."""
    machine, kernel = booted("320M", nodes=["160M", "160M"], cmdline="kho=on kho_scratch=8M,16M,8M")
    start, nr_pages = (128 * MIB) >> 12, (64 * MIB) >> 12
    kernel.kho_preserve_pages(start, nr_pages)
    successor = handover(machine, kernel)
    assert successor.kho_restore_pages(start << 12, nr_pages) == start
    assert successor.kho_in.restored == [(start, 13)]
    assert successor.page(start + nr_pages // 2).kind == "incoming"


def test_an_order_too_large_for_an_int():
    """1 << 31 is negative as a C int: the loop over struct pages runs off the map."""
    machine, kernel = booted()
    folio = kernel.alloc_folio(0)
    kernel.kho_preserve_folio(folio)
    successor = handover(machine, kernel)
    successor.pages.pages.private[folio.pfn] = KHO_PAGE_MAGIC << 32 | 31
    with pytest.raises(KernelPanic, match="order 31"):
        successor.kho_restore_folio(folio.phys)


# -- subtrees -------------------------------------------------------------------------------------


def test_a_subtree_is_found_by_name():
    """Address and size as they were given; -ENOENT for others, and without a handover."""
    machine, kernel = booted()
    blob = kernel.kho_alloc_preserve(100)
    blob.write(0, b"blob")
    kernel.kho_add_subtree("mine", blob.phys, 100)
    kernel.kho_add_subtree("gone", blob.phys + 1, 100)
    kernel.kho_remove_subtree(blob.phys + 1)
    with pytest.raises(KernelError) as refused:
        kernel.kho_retrieve_subtree("mine")
    assert refused.value.name == "ENOENT"
    successor = handover(machine, kernel)
    assert successor.kho_retrieve_subtree("mine") == (blob.phys, 100)
    assert successor.ram.read(blob.phys, 4) == b"blob"
    for name in ("gone", "min", "mine2", ""):
        with pytest.raises(KernelError) as refused:
            successor.kho_retrieve_subtree(name)
        assert refused.value.name == "ENOENT"


@pytest.mark.parametrize(
    ("prop", "value", "message"),
    [
        ("preserved-data", None, None),
        ("preserved-data", bytes(4), None),
        (
            "blob-size",
            None,
            "KHO: broken KHO subnode 'mine': missing or invalid blob-size property",
        ),
        (
            "blob-size",
            bytes(9),
            "KHO: broken KHO subnode 'mine': missing or invalid blob-size property",
        ),
    ],
)
def test_a_broken_subtree(prop, value, message):
    """-EINVAL for a property that is missing or of another length; only the size is talked of."""
    machine, kernel = booted()
    kernel.kho_add_subtree("mine", 0x5000, 100)

    def edit(tree):
        node = fdt.fdt_subnode_offset(tree, 0, "mine")
        if value is None:
            return fdt.fdt_delprop(tree, node, prop)
        return fdt.fdt_setprop(tree, node, prop, value)

    successor = handover(machine, kernel, edit_root_fdt(kernel, edit))
    said = len(successor.messages)
    with pytest.raises(KernelError) as refused:
        successor.kho_retrieve_subtree("mine")
    assert refused.value.name == "EINVAL"
    assert successor.messages[said:] == ([message] if message else [])


# -- kexec-metadata -------------------------------------------------------------------------------


def test_kexecs_are_counted():
    """Who handed over, and how often in a row; a cold boot starts again."""
    machine, kernel = booted()
    for count in (1, 2, 3):
        kernel = handover(machine, kernel)
        assert kernel.kho_in.kexec_count == count
        assert kernel.kho_in.previous_release == "7.3.4"
        assert f"KHO: exec from: 7.3.4 (count {count})" in kernel.messages
    cold = machine.boot(cmdline=CMDLINE, kernel_size="4M", initrd="1M")
    assert cold.kho_in.kexec_count == 0
    assert not any("exec from" in line for line in cold.messages)


def metadata_poke(kernel, data):
    """A poke that overwrites the start of the predecessor's metadata blob."""
    tree = kernel.fdt_at(kernel.kho_out.fdt_phys)
    node = fdt.fdt_subnode_offset(tree, 0, "kexec-metadata")
    (phys,) = struct.unpack("<Q", fdt.fdt_getprop(tree, node, "preserved-data")[0])
    return lambda ram: ram.write(phys, data, (9, "poke"))


def resize_metadata(kernel, size):
    """A poke that changes the size of the metadata blob in the root FDT."""

    def edit(tree):
        node = fdt.fdt_subnode_offset(tree, 0, "kexec-metadata")
        return fdt.fdt_setprop(tree, node, "blob-size", struct.pack("<Q", size))

    return edit_root_fdt(kernel, edit)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "KHO: kexec-metadata blob too small (0 bytes)"),
        (3, "KHO: kexec-metadata blob too small (3 bytes)"),
        (4, "KHO: kexec-metadata blob too small for v1 (4 < 73)"),
        (72, "KHO: kexec-metadata blob too small for v1 (72 < 73)"),
        (74, "KHO: exec from: 7.3.4 (count 1)"),
    ],
)
def test_metadata_sizes(size, message):
    """Too small for a version, too small for this one; larger is fine."""
    machine, kernel = booted()
    successor = handover(machine, kernel, resize_metadata(kernel, size))
    assert message in successor.messages
    assert successor.kho_in.kexec_count == (1 if size == 74 else 0)


@pytest.mark.parametrize("version", [0, 2])
def test_metadata_of_another_version(version):
    """Not read; the count starts again."""
    machine, kernel = booted()
    successor = handover(machine, kernel, metadata_poke(kernel, bytes([version, 0, 0, 0])))
    assert f"KHO: kexec-metadata version {version} not supported (expected 1)" in successor.messages
    assert successor.kho_in.kexec_count == 0
    third = handover(machine, successor)
    assert "KHO: exec from: 7.3.4 (count 1)" in third.messages


def test_metadata_counts_wrap_and_names_are_cut():
    """u32 for the count; a name without NUL ends after 64 characters."""
    machine, kernel = booted()
    blob = struct.pack("<I65sI", 1, b"x" * 65, 0xFFFFFFFF)
    successor = handover(machine, kernel, metadata_poke(kernel, blob))
    assert f"KHO: exec from: {'x' * 64} (count 4294967295)" in successor.messages
    third = handover(machine, successor)
    assert "KHO: exec from: 7.3.4 (count 0)" in third.messages


def test_no_metadata_is_fine():
    """A predecessor that exports none."""
    machine, kernel = booted()

    def edit(tree):
        return fdt.fdt_del_node(tree, fdt.fdt_subnode_offset(tree, 0, "kexec-metadata"))

    successor = handover(machine, kernel, edit_root_fdt(kernel, edit))
    assert successor.is_kho_boot
    assert not any("metadata" in line or "exec from" in line for line in successor.messages)


# -- the rest -------------------------------------------------------------------------------------


def test_a_wide_range_of_orders_arrives():
    """The walk's blocks, decoded: one of each order up to the largest."""
    machine, kernel = booted("256M")
    folios = [kernel.alloc_folio(order) for order in range(11)]
    for folio in folios:
        kernel.kho_preserve_folio(folio)
    keys = [kho_encode_radix_key(folio.phys, folio.order, 12) for folio in folios]
    assert keys == sorted(keys, reverse=True)  # low orders have high keys
    successor = handover(machine, kernel)
    for folio in folios:
        assert successor.kho_restore_folio(folio.phys).order == folio.order


def test_a_dead_kernel_restores_nothing():
    """Handles of a kernel that has jumped are refused."""
    machine, kernel = booted()
    successor = handover(machine, kernel)
    handover(machine, successor)
    for call in (
        lambda: successor.kho_restore_folio(0x1000),
        lambda: successor.kho_restore_pages(0x1000, 1),
        lambda: successor.kho_restore_free(0x1000),
        lambda: successor.kho_retrieve_subtree("x"),
    ):
        with pytest.raises(KhoSimError, match="ask its successor"):
            call()


def test_a_memory_map_lost_in_early_boot(monkeypatch):
    """The kernel warns, forgets kho_scratch but not its count, and dies at the next look at it."""
    machine, kernel = booted()
    early = KhoIn.memory_init_early
    spoil = edit_root_fdt(kernel, lambda tree: fdt.fdt_delprop(tree, 0, "preserved-memory-map"))

    def lose_the_map(incoming):
        spoil(machine.hardware.ram)
        early(incoming)

    monkeypatch.setattr(KhoIn, "memory_init_early", lose_the_map)
    events = []
    machine.listen(events.append)
    with pytest.raises(KernelPanic, match="kho_scratch is gone"):
        handover(machine, kernel)
    messages = [event.args["message"] for event in events if event.symbol == "printk"]
    assert "KHO: found kexec handover data." in messages
    assert messages[-3:-1] == [
        "KHO: failed to get preserved memory map",
        "WARNING: kho_memory_init_early: no memory map",
    ]
