"""The auditor as a whole: silent where all is well, unshakable where it is not."""

from __future__ import annotations

import ast
import contextlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khosim import KernelPanic, KhoSimError, Machine
from khosim.checks.auditor import Auditor
from khosim.checks.decode import decode_handover
from khosim.checks.invariants import INVARIANTS
from khosim.kernel.kernel import Kernel
from khosim.kernel.page import Folio
from khosim.kernel.release import find_release

CHECKS = Path(__file__).resolve().parent.parent / "khosim" / "checks"
INTRUDER = (7, "intruder")


def populate(kernel: Kernel, seed: int) -> list[Folio]:
    """Preserve folios of several orders and a range, some written and some not."""
    folios = []
    for i in range(12):
        folio = kernel.alloc_folio(i % 4, owner=f"agent {i}")
        if i % 3:
            folio.write(i, b"%d of %d" % (i, seed), by="agent")
        kernel.kho_preserve_folio(folio)
        folios.append(folio)
    kernel.kho_unpreserve_folio(folios[5])
    folios.pop(5).put()
    return folios


def restore_some(kernel: Kernel, folios: list[Folio]) -> None:
    """Restore every other folio, write to it, free every fourth."""
    for i, folio in enumerate(folios[::2]):
        restored = kernel.kho_restore_folio(folio.phys)
        assert restored is not None
        restored.write(0, b"the next one", by="agent")
        if i % 2:
            restored.put()


MACHINES: dict[str, dict[str, Any]] = {
    "small": {"ram": "128M"},
    "adversarial": {"ram": "256M", "allocator": "adversarial", "seed": 4},
    "two nodes": {"ram": "1G", "nodes": 2, "allocator": "adversarial", "seed": 9},
    "memoryless": {"ram": "512M", "nodes": 2, "memoryless": [1]},
    "above 4 GiB": {"ram": "6G", "nodes": ["1G", "5G"]},
    "holes": {"ram": "1G", "holes": [(0x10000000, 0x10123000), (0x20000000, 0x20001000)]},
    "arm64": {"ram": "1G", "arch": "arm64"},
    "arm64 16K": {"ram": "1G", "arch": "arm64", "page_size": 16384},
    "torn pages": {
        "ram": "1G",
        "arch": "arm64",
        "page_size": 16384,
        "holes": [(0x50001000, 0x50003000), (0x60005000, 0x6000B000)],
    },
    "arm64 64K": {"ram": "8G", "arch": "arm64", "page_size": 65536},
}


@pytest.mark.parametrize("name", MACHINES)
def test_three_generations_are_silent(name: str) -> None:
    """Where every kernel keeps its promises nobody speaks, on any machine."""
    machine = Machine(**MACHINES[name])
    kernel = machine.boot(cmdline="kho=on reserve_mem=128K:64K:oops log_buf_len=1M")
    for generation in range(3):
        folios = populate(kernel, generation)
        pfn = kernel.alloc_pages_exact(21, owner="range")
        kernel.kho_preserve_pages(pfn, 21)
        assert machine.check() == []
        kernel = kernel.kexec()
        assert kernel.is_kho_boot
        restore_some(kernel, folios)
        assert kernel.kho_restore_pages(pfn * machine.hardware.page_size, 21) == pfn
        start, _ = kernel.reserve_mem.find_by_name("oops") or (0, 0)
        machine.hardware.ram.write(start, b"by its owner", kernel.by("ramoops"))
    assert machine.check() == []


@pytest.mark.parametrize("cmdline", ["kho=off", "kho=on", "kho=on kho_scratch=16M,16M,16M"])
def test_without_anything_preserved(cmdline: str) -> None:
    """Kernels that preserve nothing, or cannot, are silent as well."""
    machine = Machine("256M")
    machine.boot(cmdline=cmdline).kexec().kexec()
    assert machine.check() == []


def test_successor_without_kho() -> None:
    """A successor that is told not to use KHO still takes over, and ends the chain."""
    machine = Machine("256M")
    kernel = machine.boot(cmdline="kho=on")
    folios = populate(kernel, 0)
    second = kernel.kexec(cmdline="kho=off")
    assert second.kho_restore_folio(folios[0].phys) is not None
    third = second.kexec(cmdline="kho=on")
    assert not third.is_kho_boot
    assert machine.check() == []


def test_crash_image() -> None:
    """A crash kernel is handed nothing, and nobody asks it for anything."""
    machine = Machine("1G")
    kernel = machine.boot(cmdline="kho=on crashkernel=128M", kernel_size="4M")
    folio = populate(kernel, 0)[1]
    config = kernel.config
    image = kernel.kexec_file_load(
        _image(machine, kernel), initrd_bytes=1 << 20, cmdline="kho=on", on_crash=True
    )
    kernel.kernel_kexec(image)
    machine.hardware.ram.write(folio.phys, b"dumped", INTRUDER)
    crash = machine.resume()
    assert crash.config == config
    assert not crash.is_kho_boot
    assert machine.check() == []


def _image(machine: Machine, kernel: Kernel) -> Any:
    from khosim.kernel.image import KernelImage

    return KernelImage.build(
        arch=machine.hardware.arch, page_size=machine.hardware.page_size, config=kernel.config
    )


def test_machine_from_an_image(tmp_path: Path) -> None:
    """A handover whose jump nobody saw is watched from the takeover on."""
    machine = Machine("128M")
    kernel = machine.boot(cmdline="kho=on reserve_mem=64K:4096:oops")
    folios = populate(kernel, 0)
    machine.load_successor(kernel)
    machine.save(tmp_path / "image")
    loaded = Machine.load(tmp_path / "image")
    successor = loaded.resume()
    assert successor.is_kho_boot
    restore_some(successor, folios)
    assert loaded.check() == []
    loaded.hardware.ram.write(folios[1].phys, b"!", INTRUDER)
    (found,) = loaded.check()
    assert (found.invariant, found.phys) == ("preserved-content", folios[1].phys)
    successor.kexec()
    assert len(loaded.check()) == 1


def test_a_new_cold_boot_starts_afresh() -> None:
    """What was handed over before a cold boot concerns nobody; what was broken stays told."""
    machine = Machine("64M")
    kernel = machine.boot(cmdline="kho=on")
    folio = populate(kernel, 0)[1]
    machine.load_successor(kernel)
    machine.hardware.ram.write(folio.phys, b"!", INTRUDER)
    assert len(machine.check()) == 1
    kernel = machine.boot(cmdline="kho=on")
    machine.hardware.ram.write(folio.phys, b"?", INTRUDER)
    populate(kernel, 1)
    kernel.kexec()
    assert len(machine.check()) == 1


def test_a_dead_kernel_is_not_asked() -> None:
    """After a panic in boot there is nobody to ask, and check still answers."""
    machine = Machine("64M")
    kernel = machine.boot(cmdline="kho=on")
    populate(kernel, 0)
    root = kernel.kho_out.tree.root
    machine.load_successor(kernel)
    for i in range(512):
        machine.hardware.ram.write_u64(root + 8 * i, (1 << 51) + 8 * i, INTRUDER)
    with pytest.raises(KernelPanic):
        machine.resume()
    assert {found.invariant for found in machine.check()} <= {"handover-intact"}


def test_less_memory_than_before() -> None:
    """What was preserved above the successor's ``mem=`` is reserved and restored all the same."""
    machine = Machine("512M")
    kernel = machine.boot(cmdline="kho=on", kernel_size="4M")
    limit = max(addr + size for addr, size in kernel.scratch_areas())
    limit = max(limit, kernel.kho_scratch_phys + 4096)
    folio = kernel.alloc_folio(5)
    while folio.phys <= limit:  # where the initrd was
        folio = kernel.alloc_folio(5)
    kernel.kho_preserve_folio(folio)
    successor = kernel.kexec(cmdline=f"kho=on mem={limit}")
    assert successor.kho_restore_folio(folio.phys) is not None
    assert successor.page(folio.pfn).zone == ""
    assert machine.check() == []


def test_memory_that_is_no_ram() -> None:
    """Pages of memblock's memory count only where the machine has RAM."""
    machine = Machine("64M")
    kernel = machine.boot(cmdline="kho=on")
    kernel.memblock.memory.end[-1] += 1 << 20
    assert machine.check() == []


def test_released_region() -> None:
    """A region that its owner gives up may be free, though it was preserved and never restored."""
    machine = Machine("128M")
    kernel = machine.boot(cmdline="kho=on reserve_mem=64K:4096:oops").kexec()
    assert kernel.reserve_mem.release_by_name("oops")
    assert machine.check() == []


def test_some_invariants_only() -> None:
    """An auditor asks about the invariants it was given."""
    wanted = [invariant for invariant in INVARIANTS if invariant.name == "page-budget"]
    machine = Machine("64M", checks=False)
    auditor = Auditor(machine.hardware, wanted)
    kernel = machine.boot(cmdline="kho=on")
    folio = kernel.alloc_folio(owner="loser")
    kernel.kho_preserve_pages(folio.pfn, 1)
    kernel.kho_preserve_folio(Folio(kernel, folio.pfn & -2, 1))
    assert auditor.check(kernel) == []
    kernel.pages.pages.clear(folio.pfn, folio.pfn + 1)
    assert [found.invariant for found in auditor.check(kernel)] == ["page-budget"]
    with pytest.raises(KhoSimError, match="checks=False"):
        machine.check()


def test_checking_changes_nothing() -> None:
    """A machine that is watched and one that is not end with the same bytes and messages."""
    machines = [Machine("128M", checks=checks) for checks in (True, False)]
    logs = []
    for machine in machines:
        kernel = machine.boot(cmdline="kho=on reserve_mem=64K:4096:oops")
        folios = populate(kernel, 0)
        if machine is machines[0]:
            machine.check()
        kernel = kernel.kexec()
        restore_some(kernel, folios)
        logs.append(kernel.messages)
    assert logs[0] == logs[1]
    one, other = (machine.hardware.ram for machine in machines)
    assert one.touched_ranges() == other.touched_ranges()
    for start, end in one.touched_ranges():
        assert one.read(start, end - start) == other.read(start, end - start)


@pytest.mark.parametrize("seed", range(40))
def test_hostile_bytes_between_kernels(seed: int) -> None:
    """Whatever stands in the handover, a kernel's own outcomes are the only ones."""
    chance = random.Random(seed)
    machine = Machine("64M")
    kernel = machine.boot(cmdline="kho=on reserve_mem=64K:4096:oops")
    populate(kernel, seed)
    pages = _handover_pages(kernel)
    machine.load_successor(kernel)
    image = kernel.kexec_image
    assert image is not None
    assert image.kho_scratch is not None
    pages.append(image.kho_scratch.mem)
    _spoil(machine, pages, chance)
    machine.check()
    with contextlib.suppress(KernelPanic):
        machine.resume()
    for found in machine.check():
        assert str(found)


@pytest.mark.parametrize("seed", range(40))
def test_hostile_bytes_in_a_running_kernel(seed: int) -> None:
    """The same bytes spoiled under a kernel that has not left yet, and another one to follow."""
    chance = random.Random(seed)
    machine = Machine("64M")
    kernel = machine.boot(cmdline="kho=on reserve_mem=64K:4096:oops")
    populate(kernel, seed)
    pages = [*_handover_pages(kernel), kernel.kho_scratch_phys & -4096]
    _spoil(machine, pages, chance)
    machine.check()
    with contextlib.suppress(KhoSimError):
        kernel.kexec()
    for found in machine.check():
        assert str(found)


def _handover_pages(kernel: Kernel) -> list[int]:
    handover = decode_handover(kernel.ram, kernel.kho_out.fdt_phys, kernel.arch.page_size)
    return list(handover.metadata_pages)


def _spoil(machine: Machine, pages: list[int], chance: random.Random) -> None:
    ram = machine.hardware.ram
    for _ in range(chance.randrange(1, 4)):
        page = chance.choice(pages)
        filled = [i for i in range(0, 4096, 8) if ram.read_u64(page + i)]
        offset = chance.choice(filled or [0])
        kind = chance.randrange(5)
        if kind == 0:
            ram.write(page + offset, bytes([chance.randrange(256)]), INTRUDER)
        elif kind == 1:
            ram.write_u64(page + offset, chance.getrandbits(64), INTRUDER)
        elif kind == 2:
            ram.write_u64(page + offset, 1 << chance.randrange(64), INTRUDER)
        elif kind == 3:
            ram.write_u64(page + offset, ram.read_u64(page + offset) ^ 1 << 12, INTRUDER)
        else:
            ram.write(page, b"\xff" * chance.choice([8, 64, 4096]), INTRUDER)


def test_a_terabyte_costs_what_is_touched() -> None:
    """A guest of 1 TiB, nearly all of it never written, is watched like any other."""
    machine = Machine("1200G")
    kernel = machine.boot(cmdline="kho=on")
    run = kernel.alloc_folios((1 << 40) >> 22, 10, owner="guest")[0]
    nr_folios = run[-1]
    pfns = run[0] + (np.arange(nr_folios, dtype=np.int64) << 10)
    kernel.kho_preserve_folios(pfns, 10)
    phys = (run[0] + (nr_folios << 9)) << 12
    machine.hardware.ram.write(phys, b"guest", (0, "guest"))
    machine.load_successor(kernel)
    machine.hardware.ram.write(phys + 5, b"!", INTRUDER)
    machine.resume()
    (found,) = machine.check()
    assert (found.invariant, found.phys, found.owner) == ("preserved-content", phys, "guest")


def test_no_checker_imports_a_kernel() -> None:
    """What judges a kernel shares no code with it."""
    for path in CHECKS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("khosim.kernel"), path
            elif isinstance(node, ast.Import):
                assert not any(name.name.startswith("khosim.kernel") for name in node.names), path


@pytest.mark.parametrize("where", ["", "0:1,1:1"])
@pytest.mark.parametrize("has_flag", [True, False])
def test_gigantic_pages_are_no_phantoms(where: str, has_flag: bool) -> None:
    """HugeTLB marks the tails of its pages noinit as well, and nobody handed those over."""
    machine = Machine("8G", nodes=2)
    huge = f"kho_scratch=64M,64M,64M hugepagesz=1G hugepages={where or 1}"
    release = find_release("7.3").evolve(hugetlb_outside_scratch=has_flag)
    kernel = machine.boot(release, cmdline=f"kho=on {huge}")
    folio = kernel.alloc_folio(3)
    kernel.kho_preserve_folio(folio)
    successor = kernel.kexec()
    assert len(successor.gigantic_pages) == 1 + bool(where)
    assert machine.check() == []
    successor.kho_restore_folio(folio.phys)
    assert machine.check() == []
