"""Each invariant speaks when, and only when, its own promise is broken.

Every test breaks a machine in one way, by a write to RAM, by damaged data of a kernel or by one of
its functions that misbehaves, and names the exact set of invariants that speak.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest

from khosim import Machine
from khosim.checks.invariants import INVARIANTS
from khosim.checks.violation import Violation
from khosim.kernel import reserve_mem
from khosim.kernel.buddy import Zone
from khosim.kernel.image import KernelConfig
from khosim.kernel.kernel import Kernel
from khosim.kernel.kexec import Kimage
from khosim.kernel.kho_in import KhoIn
from khosim.kernel.page import Folio
from khosim.kernel.page_map import PageState
from khosim.kernel.release import find_release
from khosim.machine.memory_map import MemoryMap, NodeRange

PAGE = 4096
INTRUDER = (7, "intruder")


def names(machine: Machine) -> set[str]:
    """Return which invariants speak."""
    return {violation.invariant for violation in machine.check()}


def only(machine: Machine) -> Violation:
    """Return the one violation there is."""
    (violation,) = machine.check()
    return violation


def keep(kernel: Kernel, nr_folios: int = 4, order: int = 0) -> list[Folio]:
    """Preserve some folios with something in them."""
    folios = []
    for i in range(nr_folios):
        folio = kernel.alloc_folio(order, owner=f"agent {i}")
        folio.write(0, b"precious %d" % i, by="agent")
        kernel.kho_preserve_folio(folio)
        folios.append(folio)
    return folios


def started(cmdline: str = "kho=on", ram: str = "64M", **options: object) -> tuple[Machine, Kernel]:
    """Return a machine and its first kernel."""
    machine = Machine(ram, **options)  # type: ignore[arg-type]
    return machine, machine.boot(cmdline=cmdline)


# -- the bytes ----------------------------------------------------------------------------------


def test_content_changed_before_the_takeover() -> None:
    """A byte of a preserved page that changes between two kernels is seen, with all its story."""
    machine, kernel = started()
    folio = keep(kernel)[2]
    machine.load_successor(kernel)
    machine.hardware.ram.write(folio.phys + 100, b"!", INTRUDER)
    machine.resume()
    found = only(machine)
    assert found.invariant == "preserved-content"
    assert found.phys == folio.phys
    assert found.generation == 1
    text = str(found)
    for part in (f"page {folio.phys:#x}", "agent 2", "intruder in generation 7", "generation 0"):
        assert part in text


def test_content_changed_while_nobody_runs() -> None:
    """The same is seen when the machine is asked before the successor begins, and told once."""
    machine, kernel = started()
    folio = keep(kernel)[0]
    machine.load_successor(kernel)
    assert machine.check() == []
    machine.hardware.ram.write(folio.phys, b"!", INTRUDER)
    assert only(machine).phys == folio.phys
    machine.resume()
    assert only(machine).phys == folio.phys


def test_content_changed_in_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose boot code writes into a preserved page after the takeover is seen."""
    machine, kernel = started()
    folio = keep(kernel)[0]
    init = reserve_mem.ReserveMem.init

    def wild(self: reserve_mem.ReserveMem) -> int:
        machine.hardware.ram.write(folio.phys + 8, b"?", (1, "wild_initcall"))
        return init(self)

    monkeypatch.setattr(reserve_mem.ReserveMem, "init", wild)
    kernel.kexec()
    assert "wild_initcall in generation 1" in str(only(machine))


def test_content_changed_later() -> None:
    """Until it is restored a page may not change; afterwards it is its owner's."""
    machine, kernel = started()
    one, other = keep(kernel, 2)
    successor = kernel.kexec()
    successor.kho_restore_folio(one.phys)
    machine.hardware.ram.write(one.phys, b"mine again", (1, "agent"))
    assert machine.check() == []
    machine.hardware.ram.write(other.phys, b"not mine", (1, "agent"))
    assert only(machine).invariant == "preserved-content"
    assert only(machine).phys == other.phys
    machine.hardware.ram.write(other.phys, b"again", (1, "agent"))
    assert [found.phys for found in machine.check()] == [other.phys]


def test_content_changed_before_the_next_jump() -> None:
    """What changed since the last look is seen when the kernel leaves, before its record goes."""
    machine, kernel = started()
    folio = keep(kernel, 1)[0]
    successor = kernel.kexec()
    machine.hardware.ram.write(folio.phys, b"!", (1, "late"))
    machine.load_successor(successor)
    assert "late in generation 1" in str(only(machine))


def test_handover_changed_after_it_was_read() -> None:
    """Once read, the handover's own pages are preserved memory like any other."""
    machine, kernel = started()
    fdt_phys = kernel.kho_out.fdt_phys
    kernel.kexec()
    machine.hardware.ram.write(fdt_phys + PAGE - 1, b"!", INTRUDER)
    assert only(machine).invariant == "preserved-content"
    assert only(machine).phys == fdt_phys


def test_zeroed_and_untouched_content() -> None:
    """A page wiped to zeros is a change, and so is the first write to a page of zeros."""
    machine, kernel = started()
    folio = keep(kernel, 1)[0]
    blank = kernel.alloc_folio(owner="blank")
    kernel.kho_preserve_folio(blank)
    machine.load_successor(kernel)
    machine.hardware.ram.zero(folio.phys, PAGE, INTRUDER)
    machine.hardware.ram.write(blank.phys + PAGE - 1, b"\1", INTRUDER)
    machine.resume()
    assert {found.phys for found in machine.check()} == {folio.phys, blank.phys}
    assert names(machine) == {"preserved-content"}


def test_much_content() -> None:
    """More content than is kept as it is: one changed byte among 12 MiB is found all the same."""
    machine, kernel = started(ram="256M")
    ram = machine.hardware.ram
    folios = keep(kernel, 3, order=10)
    for i, folio in enumerate(folios):
        numbers = np.arange(i, i + folio.len_bytes // 4, dtype=np.uint32)
        ram.write(folio.phys, numbers.view(np.uint8), (0, "guest"))
    machine.load_successor(kernel)
    assert machine.check() == []
    phys = folios[1].phys + 1000 * PAGE
    ram.write(phys + 77, b"\xee", INTRUDER)
    machine.resume()
    assert only(machine).phys == phys
    assert only(machine).owner == "agent 1"


def test_many_changed_pages_are_counted() -> None:
    """A report has a bounded number of places and says how many more there are."""
    machine, kernel = started()
    folio = keep(kernel, 1, order=6)[0]
    machine.load_successor(kernel)
    machine.hardware.ram.write(folio.phys, b"\xaa" * folio.len_bytes, INTRUDER)
    machine.resume()
    found = machine.check()
    assert len(found) == 17
    assert "48 more pages changed" in str(found[-1])


@pytest.mark.parametrize("what", ["root FDT", "map", "subtree"])
def test_handover_changed(what: str) -> None:
    """Pages that hold the handover may not change before they are read, not even unused bytes."""
    machine, kernel = started()
    keep(kernel)
    fdt_phys, table = kernel.kho_out.fdt_phys, kernel.kho_out.tree.root
    machine.load_successor(kernel)
    if what == "map":
        # Set a word and clear it again where a leaf would not see it: a copy of the same bytes is
        # no change; an entry that leads to an empty table is one that no reader minds.
        spare = _empty_table_for(machine, table)
        assert spare
    else:
        blob = _subtree(machine, "kexec-metadata")
        phys = fdt_phys if what == "root FDT" else blob
        machine.hardware.ram.write(phys + PAGE - 4, b"!", INTRUDER)
    machine.resume()
    found = only(machine)
    assert found.invariant == "handover-intact"
    assert "intruder in generation 7" in str(found)


def _empty_table_for(machine: Machine, root: int) -> int:
    # Point an unused entry of the root table at a table that has no entries itself: the same map.
    ram = machine.hardware.ram
    spare = next(phys for phys in range(48 << 20, 64 << 20, PAGE) if ram.last_writer(phys) is None)
    unused = next(root + 8 * i for i in range(1, 8) if not ram.read_u64(root + 8 * i))
    ram.write_u64(unused, spare, INTRUDER)
    return spare


def _subtree(machine: Machine, name: str) -> int:
    # Where the blob of a subtree lies, read from the bytes of the root FDT the hard way.
    ram = machine.hardware.ram
    assert machine._auditor is not None
    handed = machine._auditor._history.handed
    assert handed is not None
    start, _ = handed.handover.subtrees[name]
    assert ram.read_u32(start) == 1
    return start


def test_region_changed() -> None:
    """The bytes of a reserve_mem region are held to account by the invariant that names them."""
    machine, kernel = started("kho=on reserve_mem=64K:4096:oops", ram="128M")
    start, _ = kernel.reserve_mem.find_by_name("oops") or (0, 0)
    machine.hardware.ram.write(start, b"panic log", (0, "ramoops"))
    machine.load_successor(kernel)
    machine.hardware.ram.write(start + 0x5000, b"!", INTRUDER)
    successor = machine.resume()
    found = only(machine)
    assert found.invariant == "reserve-mem-stable"
    assert found.owner == "reserve_mem oops"
    assert found.phys == start + 0x5000
    assert successor.reserve_mem.find_by_name("oops") == (start, 64 << 10)
    machine.hardware.ram.write(start, b"next log", (1, "ramoops"))
    assert len(machine.check()) == 1


def test_region_that_is_not_whole_pages() -> None:
    """Bytes of a region before and behind its whole pages count as well."""
    machine, kernel = started("kho=on reserve_mem=5000:64:odd", ram="128M")
    start, size = kernel.reserve_mem.find_by_name("odd") or (0, 0)
    assert (start % PAGE, size) != (0, PAGE)
    for at in (start, start + size - 1):
        machine, kernel = started("kho=on reserve_mem=5000:64:odd", ram="128M")
        machine.load_successor(kernel)
        machine.hardware.ram.write(at, b"!", INTRUDER)
        machine.resume()
        assert only(machine).invariant == "reserve-mem-stable"
        assert f"byte {at:#x}" in str(only(machine))
        assert only(machine).writer == "intruder"


def test_region_moved() -> None:
    """A region that turns up elsewhere, and no word about it, is seen: here its FDT lies."""
    machine, kernel = started("kho=on reserve_mem=64K:4096:oops", ram="128M")
    start, _ = kernel.reserve_mem.find_by_name("oops") or (0, 0)
    ram = machine.hardware.ram
    blob, size = kernel_subtree(kernel, "memblock")
    at = ram.read(blob, size).index(struct.pack("<Q", start))
    ram.write_u64(blob + at, start - (1 << 20), INTRUDER)
    kernel.kexec()
    found = only(machine)
    assert found.invariant == "reserve-mem-stable"
    assert f"moved from {start:#x} to {start - (1 << 20):#x}" in str(found)


def kernel_subtree(kernel: Kernel, name: str) -> tuple[int, int]:
    """Return where a running kernel keeps a subtree's blob, from its debugfs."""
    from khosim.checks.decode import decode_handover

    handover = decode_handover(kernel.ram, kernel.kho_out.fdt_phys, kernel.arch.page_size)
    return handover.subtrees[name]


def test_region_not_preserved() -> None:
    """Bytes of a region that lives on count even where nobody preserved its pages."""
    machine, kernel = started("kho=on reserve_mem=64K:4096:oops", ram="128M")
    start, size = kernel.reserve_mem.find_by_name("oops") or (0, 0)
    kernel.kho_unpreserve_pages(start // PAGE, size // PAGE)
    machine.hardware.ram.write(start + 2 * PAGE, b"log", (0, "ramoops"))
    machine.load_successor(kernel)
    machine.hardware.ram.write(start + PAGE, b"!", INTRUDER)
    machine.resume()
    assert only(machine).invariant == "reserve-mem-stable"
    assert only(machine).phys == start + PAGE


def test_region_that_could_not_be_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that says that it cannot hand its regions over has promised nothing."""
    monkeypatch.setattr(reserve_mem.ReserveMem, "_prepare_kho_fdt", lambda self: -12)
    machine, kernel = started("kho=on reserve_mem=64K:4096:oops", ram="128M")
    start, _ = kernel.reserve_mem.find_by_name("oops") or (0, 0)
    machine.load_successor(kernel)
    machine.hardware.ram.write(start, b"!", INTRUDER)
    successor = machine.resume()
    assert successor.reserve_mem.find_by_name("oops") != (start, 64 << 10)
    assert machine.check() == []


def test_region_refused_with_a_reason() -> None:
    """A region that is wanted with another alignment is refused aloud: its move is no secret."""
    machine, kernel = started("kho=on reserve_mem=64K:4096:oops", ram="128M")
    start, _ = kernel.reserve_mem.find_by_name("oops") or (0, 0)
    align = 2 * (start & -start)
    successor = kernel.kexec(cmdline=f"kho=on reserve_mem=64K:{align}:oops")
    assert any("wrong alignment" in message for message in successor.messages)
    # The kernel then allocates it anew, confined to scratch as it is, and preserves it there.
    assert names(machine) == {"preserved-outside-scratch"}


# -- what is about to be handed over ------------------------------------------------------------


def test_preserved_in_scratch() -> None:
    """A folio in scratch, preserved by a kernel without the debug check, is seen at once."""
    machine, kernel = started()
    addr, size = max(kernel.scratch_areas(), key=lambda area: area[1])
    while True:
        folio = kernel.alloc_folio(owner="movable", movable=True)
        if addr <= folio.phys < addr + size:
            break
    kernel.kho_preserve_folio(folio)
    found = only(machine)
    assert found.invariant == "preserved-outside-scratch"
    assert f"page {folio.phys:#x}" in str(found)
    assert found.owner == "movable"


def test_handover_not_wellformed() -> None:
    """A pointer that no kernel writes is seen in the table that holds it."""
    machine, kernel = started()
    keep(kernel)
    root = kernel.kho_out.tree.root
    entry = next(root + 8 * i for i in range(1, 9) if not kernel.ram.read_u64(root + 8 * i))
    kernel.ram.write_u64(entry, 0x1234, INTRUDER)
    found = only(machine)
    assert found.invariant == "handover-wellformed"
    assert f"page {root:#x}" in str(found)
    assert found.owner == "kho_radix_alloc_node"
    assert (found.writer, found.writer_generation) == INTRUDER[::-1]


def test_two_keys_for_a_frame() -> None:
    """A page of a preserved folio that is preserved once more by itself has two keys."""
    machine, kernel = started()
    folio = keep(kernel, 1, order=2)[0]
    kernel.kho_preserve_pages(folio.pfn + 3, 1)
    found = only(machine)
    assert found.invariant == "one-key-per-frame"
    assert found.phys == folio.phys + 3 * PAGE
    assert "order 2 at" in str(found)
    assert "order 0 at" in str(found)


def test_two_keys_for_a_frame_after_the_jump() -> None:
    """The successor reserves the pages of both keys: nothing is lost, and nobody else complains."""
    machine, kernel = started()
    folio = keep(kernel, 1, order=2)[0]
    kernel.kho_preserve_pages(folio.pfn + 3, 1)
    kernel.kexec()
    assert names(machine) == {"one-key-per-frame"}


def test_block_on_two_nodes() -> None:
    """Without the split at nodes a range that crosses a border becomes a block on both."""
    machine = Machine("256M", nodes=["129M", "127M"])
    release = find_release("7.3").evolve(preserve_splits_at_nodes=False)
    config = KernelConfig(release=release)
    kernel = machine.boot(release, config=config, kernel_size="4M", cmdline="kho=on")
    border = next(node.start for node in machine.hardware.memory_map.node_ranges if node.nid == 1)
    start = border - (1 << 20)
    kernel.kho_preserve_pages(start // PAGE, 512)
    found = only(machine)
    assert found.invariant == "one-node-per-block"
    assert f"page {start:#x}" in str(found)
    assert f"from {border:#x}, on node 1" in str(found)


def test_split_at_nodes_is_silent() -> None:
    """The same range in blocks that keep to one node is fine."""
    machine = Machine("256M", nodes=["129M", "127M"])
    kernel = machine.boot(cmdline="kho=on", kernel_size="4M")
    border = next(node.start for node in machine.hardware.memory_map.node_ranges if node.nid == 1)
    kernel.kho_preserve_pages((border - (1 << 20)) // PAGE, 512)
    assert machine.check() == []


def test_two_ranges_of_one_node_are_silent() -> None:
    """A border between two ranges of the same node is none."""
    machine, kernel = started()
    border = kernel.alloc_folio(9).phys + (1 << 20)
    whole = machine.hardware.memory_map
    halves = (NodeRange(0, border, 0), NodeRange(border, whole.end_phys, 0))
    machine = Machine(memory_map=MemoryMap(whole.entries, halves))
    kernel = machine.boot(cmdline="kho=on")
    folio = keep(kernel, 1, order=9)[0]
    assert folio.phys + (1 << 20) == border
    assert machine.check() == []


@pytest.mark.parametrize("what", ["the root FDT", "subtree 'kexec-metadata'"])
def test_metadata_not_preserved(what: str) -> None:
    """A page of the handover that is not preserved itself would be gone before it is read."""
    machine, kernel = started()
    phys = kernel.kho_out.fdt_phys
    if what != "the root FDT":
        phys, _ = kernel_subtree(kernel, "kexec-metadata")
    kernel.kho_unpreserve_folio(Folio(kernel, phys // PAGE, 0))
    found = only(machine)
    assert found.invariant == "metadata-preserved"
    assert what in str(found)
    assert found.phys == phys


def test_image_outside_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment that kexec puts where nobody reserved anything is seen at the jump."""
    machine, kernel = started()
    free = kernel.alloc_folio(3, owner="just freed")
    free.put()
    locate = Kimage._locate

    def astray(self: Kimage, kbuf: object) -> int:
        if getattr(kbuf, "name", "") == "purgatory":
            return free.phys
        return locate(self, kbuf)  # type: ignore[arg-type]

    monkeypatch.setattr(Kimage, "_locate", astray)
    machine.load_successor(kernel)
    found = only(machine)
    assert found.invariant == "images-in-scratch"
    assert "segment 'purgatory'" in str(found)
    assert found.phys == free.phys


# -- what is made of it -------------------------------------------------------------------------


def test_handover_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that boots cold over preserved memory and does not say so is seen."""
    machine, kernel = started()
    folio = keep(kernel, 1)[0]
    monkeypatch.setattr(KhoIn, "populate", lambda self, *where: None)
    kernel.kexec()
    found = only(machine)
    assert found.invariant == "handover-accepted"
    assert f"page {folio.phys:#x}" in str(found)
    assert found.owner == "agent 0"


def test_handover_refused() -> None:
    """A refusal that the kernel prints is an outcome; what it kept nobody asks for any more."""
    machine, kernel = started()
    folio = keep(kernel, 1)[0]
    stranger = find_release("7.3").evolve(name="stranger", kho_compatible="kho-v9")
    successor = kernel.kexec(release=stranger)
    assert "KHO: disabling KHO revival" in successor.messages
    machine.hardware.ram.write(folio.phys, b"reused", (1, "anybody"))
    assert machine.check() == []


def test_refused_and_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that refused may use all memory at once, the pages of the handover included."""
    machine, kernel = started()
    folio = keep(kernel, 1)[0]
    fdt_phys = kernel.kho_out.fdt_phys
    populate = KhoIn.populate

    def greedy(self: KhoIn, *where: int) -> None:
        populate(self, *where)
        for phys in (fdt_phys, folio.phys):
            machine.hardware.ram.write(phys, b"log buffer", (1, "early boot"))

    monkeypatch.setattr(KhoIn, "populate", greedy)
    kernel.kexec(release=find_release("7.3").evolve(name="stranger", kho_compatible="kho-v9"))
    assert machine.check() == []


def test_corrupted_and_refused() -> None:
    """Where corruption makes the kernel refuse, the corruption is still named."""
    machine, kernel = started()
    keep(kernel)
    fdt_phys = kernel.kho_out.fdt_phys
    machine.load_successor(kernel)
    machine.hardware.ram.write(fdt_phys, b"\0\0\0\0", INTRUDER)
    machine.resume()
    assert only(machine).invariant == "handover-intact"
    assert only(machine).phys == fdt_phys


def test_nothing_of_value_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody misses a handover that held nothing but itself."""
    machine, kernel = started()
    monkeypatch.setattr(KhoIn, "populate", lambda self, *where: None)
    kernel.kexec()
    assert machine.check() == []


def _spoil_reserve(
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[list[tuple[int, int, int]]], list[tuple[int, int, int]]],
) -> None:
    reserve = KhoIn._reserve

    def spoiled(self: KhoIn, runs: list[tuple[int, int, int]]) -> None:
        reserve(self, spoil(runs))

    monkeypatch.setattr(KhoIn, "_reserve", spoiled)


def test_block_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preserved block that the successor does not reserve is lost, and named."""
    machine, kernel = started()
    folio = keep(kernel, 1, order=3)[0]
    _spoil_reserve(monkeypatch, lambda runs: [run for run in runs if run[0] != folio.phys])
    kernel.kexec()
    found = only(machine)
    assert found.invariant == "map-agrees"
    assert f"page {folio.phys:#x}" in str(found)
    assert "8 pages, order 3) was preserved but is not reserved" in str(found)
    assert found.owner == "agent 0"


@pytest.mark.parametrize("first", [0, 1])
def test_block_forgotten_at_the_edge(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """The first or the last of neighbouring blocks is missed as well."""
    machine, kernel = started()
    pfn = kernel.alloc_folio(5).pfn + 8
    kernel.kho_preserve_folios(np.arange(pfn, pfn + 8))
    whole, part = (pfn * PAGE, 0, 8), ((pfn + first) * PAGE, 0, 7)
    _spoil_reserve(monkeypatch, lambda runs: [part if run == whole else run for run in runs])
    kernel.kexec()
    assert names(machine) == {"map-agrees"}


def test_block_with_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pages with another order are not the same blocks."""
    machine, kernel = started()
    folio = keep(kernel, 1, order=3)[0]
    _spoil_reserve(
        monkeypatch,
        lambda runs: [(run[0], 2, 2) if run[0] == folio.phys else run for run in runs],
    )
    kernel.kexec()
    assert names(machine) == {"map-agrees"}
    assert len(machine.check()) == 2


def test_phantom_block() -> None:
    """A key that appears in the map between two kernels is reserved by the one who believes it.

    The bytes that changed are the map's, so ``handover-intact`` has to speak as well.
    """
    machine, kernel = started()
    folio = keep(kernel, 1)[0]
    tree = kernel.kho_out.tree
    victim = next(pfn for pfn in range(folio.pfn + 1, folio.pfn + 200) if not _is_kept(kernel, pfn))
    machine.load_successor(kernel)
    key = 1 << 52 | victim
    ram = machine.hardware.ram
    node = tree.root
    for level in range(5, 0, -1):
        node = ram.read_u64(node + ((key >> (15 + 9 * (level - 1))) & 511) * 8)
    bit = key & 0x7FFF
    word = node + bit // 64 * 8
    ram.write_u64(word, ram.read_u64(word) | 1 << (bit % 64), INTRUDER)
    machine.resume()
    assert names(machine) == {"handover-intact", "map-agrees"}
    told = {found.invariant: str(found) for found in machine.check()}
    assert f"page {victim * PAGE:#x}" in told["map-agrees"]
    assert "is reserved but was not preserved" in told["map-agrees"]
    assert "intruder in generation 7" in told["handover-intact"]


def _is_kept(kernel: Kernel, pfn: int) -> bool:
    return kernel.page(pfn).kind != "free"


def test_memblock_may_hand_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserved in the page map but not in memblock is not reserved."""
    machine, kernel = started()
    folio = keep(kernel, 1, order=3)[0]
    _spoil_reserve(monkeypatch, lambda runs: runs)
    reserve = KhoIn._reserve

    def half(self: KhoIn, runs: list[tuple[int, int, int]]) -> None:
        reserve(self, runs)
        self._kernel.memblock.memblock_phys_free(folio.phys, folio.len_bytes)

    monkeypatch.setattr(KhoIn, "_reserve", half)
    kernel.kexec()
    # memblock then frees what the page map calls incoming: two owners follow.
    assert names(machine) == {"map-agrees", "one-owner-per-page"}
    assert "memblock may hand it out" in str(machine.check()[0])


def test_early_allocation_outside_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One allocation of early boot that escapes the confinement is seen."""
    machine, kernel = started()
    folio = keep(kernel, 1)[0]
    escaped = []
    retrieve = KhoIn.mem_retrieve

    def loose(self: KhoIn) -> None:
        memblock = self._kernel.memblock
        memblock.kho_scratch_only = False
        escaped.append(memblock.memblock_phys_alloc_range(PAGE, PAGE, 5 << 20, 6 << 20))
        memblock.kho_scratch_only = True
        retrieve(self)

    monkeypatch.setattr(KhoIn, "mem_retrieve", loose)
    kernel.kexec()
    assert escaped[0] not in (0, folio.phys)
    found = only(machine)
    assert found.invariant == "early-allocations-in-scratch"
    assert found.phys == escaped[0]
    assert f"page {escaped[0]:#x}" in str(found)


def test_scratch_altered() -> None:
    """An entry of the scratch array that changes while a kernel runs is seen."""
    machine, kernel = started()
    assert machine.check() == []
    addr, size = kernel.scratch_areas()[0]
    phys = kernel.kho_scratch_phys + 8
    kernel.ram.write_u64(phys, size - PAGE, INTRUDER)
    found = only(machine)
    assert found.invariant == "scratch-stable"
    assert f"was {addr:#x}+{size:#x} and is {addr:#x}+{size - PAGE:#x}" in str(found)
    assert "intruder in generation 7" in str(found)


def test_scratch_altered_on_the_way() -> None:
    """The successor's areas are held against those its predecessor had."""
    machine, kernel = started()
    machine.load_successor(kernel)
    image = kernel.kexec_image
    assert image is not None
    assert image.kho_scratch is not None
    phys = image.kho_scratch.mem + 8
    size = machine.hardware.ram.read_u64(phys)
    machine.hardware.ram.write_u64(phys, size - PAGE, INTRUDER)
    machine.resume()
    assert names(machine) == {"scratch-stable"}


def test_restored_twice() -> None:
    """A block that is handed out to two owners is seen."""
    machine, kernel = started()
    folio = keep(kernel, 2, order=1)[0]
    successor = kernel.kexec()
    successor.kho_restore_folio(folio.phys)
    assert machine.check() == []
    successor.kho_in.restored.append((folio.pfn, 1))
    found = only(machine)
    assert found.invariant == "restored-once"
    assert f"page {folio.phys:#x} (pfn {folio.pfn:#x}) of order 1 was restored more" in str(found)
    assert found.owner == "agent 0"


@pytest.mark.parametrize(
    ("pfn_off", "order", "others"),
    [
        (0, 2, set()),
        (0, 0, {"one-owner-per-page"}),
        (1, 1, {"one-owner-per-page"}),
        (512, 1, {"one-owner-per-page"}),
    ],
)
def test_restored_what_never_was(pfn_off: int, order: int, others: set[str]) -> None:
    """A block of another order, place or alignment is not the one that was preserved.

    Pages that were restored and that the log does not name look stolen from their owner.
    """
    machine, kernel = started()
    folio = keep(kernel, 1, order=1)[0]
    successor = kernel.kexec()
    successor.kho_restore_folio(folio.phys)
    successor.kho_in.restored[:] = [(folio.pfn + pfn_off, order)]
    assert names(machine) == {"restored-once"} | others
    assert "no such block was handed over" in str(machine.check()[0])


def test_restored_across_two_blocks() -> None:
    """Half of one block and half of the next are no block, though both were handed over."""
    machine, kernel = started()
    folio = kernel.alloc_folio(2, owner="agent")
    for pfn in (folio.pfn, folio.pfn + 2):
        kernel.kho_preserve_folio(Folio(kernel, pfn, 1))
    successor = kernel.kexec()
    for pfn in (folio.pfn, folio.pfn + 2):
        successor.kho_restore_folio(pfn * PAGE)
    assert machine.check() == []
    successor.kho_in.restored.append((folio.pfn + 1, 1))
    assert names(machine) == {"restored-once"}
    assert any("no such block" in str(found) for found in machine.check())


def test_restored_without_a_handover() -> None:
    """Nothing can be restored in a kernel that was handed nothing."""
    machine, kernel = started()
    kernel.kho_in.restored.append((0x1000, 0))
    assert names(machine) == {"restored-once"}


# -- every page has one place -------------------------------------------------------------------


def test_page_handed_out_and_still_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocator that leaves a block on its list will hand it out twice; seen the first time."""
    machine, kernel = started()
    free = kernel.alloc_folio(owner="first")
    free.put()
    with monkeypatch.context() as patch:
        patch.setattr(Zone, "take", lambda self, *block: None)
        twice = kernel.alloc_folio(owner="second")
    found = only(machine)
    assert found.invariant == "one-owner-per-page"
    assert f"page {twice.phys:#x}" in str(found)
    assert "the free list of order" in str(found)
    assert "second (allocated)" in str(found)


def test_preserved_page_in_other_hands() -> None:
    """A page that waits to be restored and is in somebody's hands has two owners."""
    machine, kernel = started()
    folio = keep(kernel, 1)[0]
    successor = kernel.kexec()
    state = PageState("allocated", 0, False, "thief")
    successor.pages.pages.set(folio.pfn, folio.pfn + 1, state)
    successor.pages.adjust_managed_page_count(folio.pfn, 1)
    found = only(machine)
    assert found.invariant == "one-owner-per-page"
    assert "is held by thief (allocated)" in str(found)
    assert found.owner == "agent 0"


def test_deferred_page_in_use() -> None:
    """A page that is still to be initialised cannot be in use."""
    machine, kernel = started()
    folio = kernel.alloc_folio(owner="user")
    kernel.pages.deferred.append((folio.pfn, folio.pfn + 1, 0))
    assert names(machine) == {"one-owner-per-page"}
    assert "deferred initialisation" in str(only(machine))


def test_page_lost() -> None:
    """Pages that are neither free nor anybody's are gone for good."""
    machine, kernel = started()
    folio = kernel.alloc_folio(2, owner="loser")
    kernel.pages.pages.clear(folio.pfn, folio.pfn + 4)
    found = only(machine)
    assert found.invariant == "page-budget"
    assert f"page {folio.phys:#x} (pfn {folio.pfn:#x}, 4 pages) is lost" in str(found)


def test_page_invented() -> None:
    """A free block where the machine has no memory is no memory."""
    machine, kernel = started()
    zone = kernel.pages.zones[-1]
    hole = machine.hardware.memory_map.end_phys // PAGE + 64
    zone.free_one_page(hole, 0, 0)
    assert names(machine) == {"page-budget"}
    assert f"page {hole * PAGE:#x}" in str(only(machine))


def test_counters_astray() -> None:
    """The counters of a zone are part of the budget."""
    machine, kernel = started()
    kernel.pages.zones[0].nr_free[1] += 1
    assert names(machine) == {"page-budget"}
    machine, kernel = started()
    kernel.pages.zones[0].managed_pages -= 1
    assert names(machine) == {"page-budget"}
    assert "the zones manage" in str(only(machine))


# -- the list -----------------------------------------------------------------------------------


def test_each_invariant_is_broken_above() -> None:
    """Every invariant has a name, a sentence, and a test that makes it speak, here or beside."""
    from pathlib import Path

    tests = Path(__file__).parent.glob("test_invariants*.py")
    source = "".join(path.read_text(encoding="utf-8") for path in tests)
    listed = [invariant.name for invariant in INVARIANTS]
    assert len(listed) == len(set(listed)) == 34
    for invariant in INVARIANTS:
        assert source.count(f'"{invariant.name}"') >= 1
        assert invariant.protects.endswith(".")
        assert invariant.kind in ("always", "devices")
        assert invariant.stages
