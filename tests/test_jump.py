"""A simulated successor of real kernels, and a simulated predecessor on their machines.

What a successor has to do is read from the captures' own files: the real successor's log and
debugfs, and the account of an independent program.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khosim import InputError, Machine
from khosim.capture.folder import Capture
from khosim.conform.conform import conform_capture
from khosim.conform.held import Held
from khosim.conform.jump import Jump
from khosim.conform.sizes import read_sizes
from khosim.conform.successor_items import predecessor_items, release_of, successor_items
from khosim.kernel.release import RELEASES

CAPTURES = Path(__file__).parent / "golden" / "captures"
OLD = Path(__file__).parent / "golden" / "kho-v1" / "uma1g-v1"
NAMES = ("arm64-16k", "fixed2g", "numa4g", "uma1g", "uma1g-7.2")
PRESERVED = re.compile(r"\[0x([0-9a-f]{16})-0x[0-9a-f]{16}\] .* kho_preserved_memory_reserve\+")


def _said(name: str, generation: int = 0) -> dict[str, Any]:
    text = (CAPTURES / name / f"gen{generation}" / "handover.json").read_text()
    said: dict[str, Any] = json.loads(text)
    return said


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("generation", [0, 1])
def test_a_real_handover_is_taken_over(name: str, generation: int) -> None:
    """Blocks, regions, scratch, blobs and metadata as the real successor had them; no violation."""
    machine = Machine.from_capture(CAPTURES / name, generation)
    blocks: list[int] = []
    page = machine.hardware.page_size

    def listen(event: Any) -> None:
        if event.symbol == "kho_preserved_memory_reserve":
            size = page << event.args["order"]
            first = event.args["phys"]
            blocks.extend(range(first, first + event.args["nr_blocks"] * size, size))

    machine.listen(listen)
    kernel = machine.boot()
    after = CAPTURES / name / f"gen{generation + 1}"
    log = (after / "dmesg").read_text()
    assert blocks == [int(found, 16) for found in PRESERVED.findall(log)]
    assert kernel.cmdline == (after / "cmdline").read_text().strip()
    shown = kernel.debugfs.read
    assert shown("out/scratch_phys") == (after / "kho/out/scratch_phys").read_bytes()
    assert shown("in/fdt") == (after / "kho/in/fdt").read_bytes()
    for subtree, blob in _said(name, generation)["subtrees"].items():
        assert shown(f"in/sub_fdts/{subtree}").hex() == blob["hex"]
    told = [line for line in kernel.messages if "KHO" in line]
    assert told == re.findall(r"(?m)^(?:KHO: |Revived ).*", log)
    assert machine.check() == []


@pytest.mark.parametrize("name", NAMES)
def test_real_folios_are_restored_with_their_content(name: str) -> None:
    """Each memfd's folios, restored one by one, hold what the real file held."""
    machine = Machine.from_capture(CAPTURES / name, "gen0")
    kernel = machine.boot()
    page = machine.hardware.page_size
    orders = {phys // page: order for phys, order in _said(name)["preserved"]}
    for session in _said(name)["luo"]["sessions"]:
        for file in session["files"]:
            content = b""
            for pfn, _flags, index in file["folios"]:
                assert len(content) == index * page
                folio = kernel.kho_restore_folio(pfn * page)
                assert folio is not None
                assert folio.order == orders[pfn]
                content += folio.read(0, page << folio.order)
            if file["nr_folios"]:
                assert hashlib.sha256(content[: file["size"]]).hexdigest() == file["sha256"]
    assert machine.check() == []


@pytest.mark.parametrize("name", ["numa4g", "arm64-16k"])
def test_the_simulation_goes_on_from_a_real_handover(name: str) -> None:
    """Real kernel, simulated kernel, simulated kernel: counted on, region kept with its content."""
    machine = Machine.from_capture(CAPTURES / name, 1)
    kernel = machine.boot()
    regions = list(kernel.reserve_mem.regions)
    assert regions
    kernel.ram.write(regions[0][1], b"still here", kernel.by(regions[0][0]))
    successor = kernel.kexec()
    assert successor.kho_in.kexec_count == 3
    assert successor.reserve_mem.regions == regions
    assert successor.ram.read(regions[0][1], 10) == b"still here"
    assert machine.check() == []


@pytest.mark.parametrize("name", ["uma1g", "fixed2g", "numa4g", "uma1g-7.2"])
def test_the_image_lies_where_the_real_one_lay(name: str) -> None:
    """Kernel and initrd of the successor at the addresses that its own files tell."""
    machine = Machine.from_capture(CAPTURES / name, 0)
    kernel = machine.boot()
    after = CAPTURES / name / "gen1"
    code = re.search(r"([0-9a-f]+)-[0-9a-f]+ : Kernel code", (after / "iomem").read_text())
    log = (after / "dmesg").read_text()
    ramdisk = re.search(r"RAMDISK: \[mem 0x([0-9a-f]+)-0x([0-9a-f]+)\]", log)
    assert code is not None
    assert ramdisk is not None
    assert kernel.kernel_range[0] == int(code[1], 16)
    assert kernel.initrd == (int(ramdisk[1], 16), int(ramdisk[2], 16) + 1)


def test_what_the_capture_does_not_tell_is_chosen(tmp_path: Path) -> None:
    """The last handover's successor without a log: sizes of the one before it, in scratch."""
    folder = tmp_path / "uma1g"
    shutil.copytree(CAPTURES / "uma1g", folder)
    facts = json.loads((folder / "capture.json").read_text())
    facts["generations"] = ["gen0"]
    (folder / "capture.json").write_text(json.dumps(facts))
    kernel = Machine.from_capture(folder, 0).boot()
    areas = [(start, start + size) for start, size in kernel.scratch_areas()]
    assert any(low <= kernel.kernel_range[0] < high for low, high in areas)
    (folder / "gen0/dmesg").write_text(
        "\n".join((folder / "gen0/dmesg").read_text().splitlines()[:13])
    )
    (folder / "gen0/iomem").unlink()
    kernel = Machine.from_capture(folder, 0).boot(cmdline="kho=on")
    assert kernel.kho_in.kexec_count == 1
    assert kernel.cmdline == "kho=on"


def test_sizes_given_win_over_the_captures() -> None:
    """An image of another size, and no initrd."""
    kernel = Machine.from_capture(CAPTURES / "uma1g", 0).boot(kernel_size="4M", initrd=0)
    assert kernel.config.kernel_bytes == 4 << 20
    assert kernel.initrd == (0, 0)


def test_generations_that_left_nothing_are_refused() -> None:
    """The last generation, and one that is not there."""
    for which, cause in ((2, "handed nothing over"), ("gen7", "no generation")):
        with pytest.raises(InputError, match=cause):
            Machine.from_capture(CAPTURES / "uma1g", which)


def test_images_that_do_not_fit_are_refused() -> None:
    """More than scratch has room for: one line."""
    machine = Machine.from_capture(CAPTURES / "uma1g", 0)
    with pytest.raises(InputError, match="fits into no scratch area"):
        machine.boot(initrd="1G")


def test_a_page_outside_of_the_machine_is_refused(tmp_path: Path) -> None:
    """A captured page where the memory map has no RAM."""
    folder = tmp_path / "uma1g"
    shutil.copytree(CAPTURES / "uma1g", folder)
    with np.load(folder / "gen0/ram.npz") as archive:
        pfn, data = archive["pfn"], archive["data"]
    pfn[-1] = 1 << 24
    np.savez(folder / "gen0/ram.npz", pfn=pfn, data=data)
    with pytest.raises(InputError, match="where no RAM is"):
        Machine.from_capture(folder, 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_items_of_a_simulated_successor(name: str) -> None:
    """Six items, all the same, counted from the account of an independent program."""
    report = conform_capture(CAPTURES / name)
    said = _said(name)
    found = {item.name: item for item in report.generations["gen1"]}
    counts = {
        "successor: preserved": len(said["preserved"]),
        "successor: debugfs": len(said["subtrees"]) + 2,
        "successor: regions": (CAPTURES / name / "gen1/cmdline").read_text().count("reserve_mem="),
    }
    for item, count in counts.items():
        assert (found[item].ok, found[item].total) == (True, count)
    for item in ("messages", "scratch", "folios"):
        assert found[f"successor: {item}"].ok is True
    files = [file for session in said["luo"]["sessions"] for file in session["files"]]
    assert found["successor: folios"].total >= sum(file["nr_folios"] for file in files)
    cold = {item.name: item for item in report.generations["gen0"]}
    assert cold["predecessor: inspected"].ok is True
    assert cold["predecessor: taken over"].ok is True


def test_a_wrong_successor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A successor that reserves one block less, and one that says another count."""
    from khosim.kernel.kho_in import KhoIn

    capture = Capture(CAPTURES / "uma1g")
    held = Held(capture.generations[0])
    reserve = KhoIn._reserve
    monkeypatch.setattr(KhoIn, "_reserve", lambda self, runs: reserve(self, runs[:-1]))
    items = {one.name: one for one in successor_items(capture, held, capture.generations[1])}
    assert items["successor: preserved"].ok is False
    assert items["successor: messages"].ok is True
    assert items["successor: folios"].ok is False


def test_a_predecessor_that_loses_a_block_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose map forgets folios does not pass."""
    from khosim.kernel.kho_out import KhoOut

    capture = Capture(CAPTURES / "uma1g")
    keep = KhoOut.preserve_folio

    def forget(self: KhoOut, pfn: int, order: int) -> None:
        if order != 3:
            keep(self, pfn, order)

    monkeypatch.setattr(KhoOut, "preserve_folio", forget)
    items = {one.name: one for one in predecessor_items(capture, capture.generations[0])}
    assert items["predecessor: inspected"].ok is False


def test_formats_without_a_release_are_said() -> None:
    """A capture of a format that no release here speaks: its items say so, and which are spoken."""
    capture = Capture(OLD)
    held = Held(capture.generations[0])
    compatible = json.loads((OLD / "gen0/handover.json").read_text())["compatible"]
    spoken = {release.kho_compatible for release in RELEASES.values()}
    assert (release_of(capture, compatible) is None) == (compatible not in spoken)
    items = list(successor_items(capture, held, capture.generations[1]))
    if compatible not in spoken:
        assert [(item.name, item.ok) for item in items] == [("successor", None)]
        assert "kho-v1" in items[0].note


def test_sizes_are_those_of_the_log(tmp_path: Path) -> None:
    """Kernel, brk, initrd and CPUs as two captures' own lines tell them, and a moved kernel's."""
    x86 = read_sizes(Capture(CAPTURES / "uma1g").generations[0], "x86_64")
    assert x86 is not None
    assert (x86.kernel_phys, x86.kernel_bytes, x86.brk_bytes) == (16 << 20, 0x7F4000, 0x10000)
    assert x86.initrd_bytes == 0x3FFE0000 - 0x3F37F000
    arm64 = read_sizes(Capture(CAPTURES / "arm64-16k").generations[0], "arm64")
    assert arm64 is not None
    assert arm64.kernel_bytes is not None
    assert arm64.initrd_bytes > 1 << 20
    kaslr = CAPTURES.parent / "logs" / "no-numa-7.2.txt"
    (tmp_path / "gen0").mkdir()
    shutil.copy(kaslr, tmp_path / "gen0" / "dmesg")
    (tmp_path / "capture.json").write_text('{"release": "7.2.13", "generations": ["gen0"]}')
    moved = read_sizes(Capture(tmp_path).generations[0], "x86_64")
    assert moved is not None
    assert moved.kernel_bytes == 0x3EDFD000 - 0x3E400000
    jump = Jump.find(Capture(CAPTURES / "uma1g"), 0)
    assert jump.sizes().initrd_bytes == 0x38800000 - 0x38086000
