"""khosim held against real kernels, item by item: all the same, and every alteration found.

Counts expected here are taken from the captures' own files, by expressions that share nothing with
the code under test.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khosim.cli.main import main
from khosim.conform.conform import Report, conform_capture
from khosim.conform.items import Item
from khosim.conform.told_twice import string_get_size

GOLDEN = Path(__file__).parent / "golden"
CAPTURES = GOLDEN / "captures"
NAMES = ("arm64-16k", "fixed2g", "numa4g", "uma1g", "uma1g-7.2")
PLACED = re.compile(r"__memblock_reserve: .* flags=20 memblock_alloc_range_nid")
NODE_DATA = re.compile(r"NODE_DATA\(\d+\) allocated")
PRESERVED = re.compile(r"kho_preserved_memory_reserve\+")


def _facts(item: Item) -> tuple[bool | None, int, int]:
    return item.ok, item.same, item.total


def _items(report: Report, generation: str) -> dict[str, Item]:
    items = {item.name: item for item in report.generations[generation]}
    assert len(items) == len(report.generations[generation]), "two items of one name"
    return items


def _wrong(report: Report) -> set[tuple[str, str]]:
    return {
        (generation, item.name)
        for generation, items in report.generations.items()
        for item in items
        if item.ok is False
    }


def _copy(tmp_path: Path, name: str, generations: int = 3) -> Path:
    """A copy of a capture, or of its first generations."""
    target = tmp_path / name
    shutil.copytree(CAPTURES / name, target)
    facts = json.loads((target / "capture.json").read_text())
    facts["generations"] = facts["generations"][:generations]
    (target / "capture.json").write_text(json.dumps(facts))
    last = target / facts["generations"][-1]
    for nth in range(generations, 3):
        shutil.rmtree(target / f"gen{nth}")
    if generations < 3:
        (last / "handover.json").unlink()
        (last / "ram.npz").unlink()
    return target


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    """Every capture, compared once."""
    return {name: conform_capture(CAPTURES / name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_differs(reports: dict[str, Report], name: str) -> None:
    """Every item that a capture tells of is the same, and few are untold."""
    report = reports[name]
    assert _wrong(report) == set()
    untold = {
        item.name for items in report.generations.values() for item in items if item.ok is None
    }
    assert untold <= {"handover", "in/LUO", "kho_test: folios", "firmware/fdt", "successor"}
    for generation in ("gen0", "gen1"):
        assert _items(report, generation)["handover"].ok is True


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_those_of_the_capture(reports: dict[str, Report], name: str) -> None:
    """Allocations, preserved blocks, areas, records and table pages, counted from its files."""
    report = reports[name]
    for nth, generation in enumerate(("gen0", "gen1", "gen2")):
        folder = CAPTURES / name / generation
        items = _items(report, generation)
        log = (folder / "dmesg").read_text()
        assert items["replay"].total >= len(PLACED.findall(log)) - len(NODE_DATA.findall(log))
        nr_areas = len((folder / "kho/out/scratch_phys").read_text().split())
        assert _facts(items["scratch"]) == (True, nr_areas, nr_areas)
        if nth:
            before = json.loads((folder.parent / f"gen{nth - 1}" / "handover.json").read_text())
            nr_blocks = len(before["preserved"])
            assert len(PRESERVED.findall(log)) == nr_blocks
            assert _facts(items["preserved"]) == (True, nr_blocks, nr_blocks)
        if nth == 2:
            continue
        said = json.loads((folder / "handover.json").read_text())
        nr_tables = said["radix_nodes"]
        assert _facts(items["map pages"]) == (True, nr_tables, nr_tables)
        assert {key for key in items if key.startswith("subtree ")} == {
            f"subtree {key}" for key in said["subtrees"]
        }
        sessions = said["luo"]["sessions"]
        files = [file for session in sessions for file in session["files"]]
        assert _facts(items["LUO: memfd records"]) == (True, len(files), len(files))
        assert _facts(items["LUO: file blocks"]) == (True, len(sessions), len(sessions))
        # 16 bytes a folio, a page at least for each file that has any.
        page = report.capture.page_size
        nr_pages = sum(-(-16 * file["nr_folios"] // page) for file in files)
        assert _facts(items["LUO: folio entries"]) == (True, nr_pages, nr_pages)


def test_the_readme_tells_these_figures(reports: dict[str, Report]) -> None:
    """Sums over all captures, the blocks, tables and trees among them counted from their files."""
    readme = (GOLDEN.parent.parent / "README.md").read_text()
    rows = dict(re.findall(r"(?m)^  \| (.*?) \| ([\d,]+ of [\d,]+) \|$", readme))
    said = [
        json.loads(path.read_text())
        for name in NAMES
        for path in sorted((CAPTURES / name).glob("*/handover.json"))
    ]
    sessions = [session for one in said for session in one["luo"]["sessions"]]
    counted = {
        "preserved blocks, in": sum(len(one["preserved"]) for one in said),
        "the same blocks": sum(len(one["preserved"]) for one in said),
        "root FDTs and subtrees": sum(1 + len(one["subtrees"]) for one in said),
        "pages of the tree": sum(one["radix_nodes"] for one in said),
        "memfds of the real kernel": sum(len(session["files"]) for session in sessions),
    }
    generations = [items for one in reports.values() for items in one.generations.values()]
    found = [item for items in generations for item in items]
    for row, name in (
        ("boot-time allocations", "replay"),
        ("scratch areas", "scratch"),
        ("pages of LUO", "LUO: "),
    ):
        chosen = [item for item in found if item.name.startswith(name)]
        assert all(item.ok for item in chosen)
        counted[row] = sum(item.total for item in chosen)
    assert len(rows) == len(counted)
    for row, figure in rows.items():
        count = next(count for start, count in counted.items() if row.startswith(start))
        assert figure == f"{count:,} of {count:,}", row


def test_messages_are_counted(reports: dict[str, Report]) -> None:
    """A successor that revives two regions and finds live-update data says five things."""
    log = (CAPTURES / "numa4g/gen1/dmesg").read_text()
    said = re.findall(r"(?m)^(?:KHO: |Revived memory|luo: Retrieved).*", log)
    assert len(said) == 5
    assert _facts(_items(reports["numa4g"], "gen1")["messages"]) == (True, 5, 5)
    assert _facts(_items(reports["numa4g"], "gen0")["messages"]) == (True, 0, 0)


def test_older_formats_are_held_too() -> None:
    """A capture of kho-v1: its root FDT, chunks' blocks, messages; no tree and no LUO."""
    folder = GOLDEN / "kho-v1" / "uma1g-v1"
    report = conform_capture(folder)
    assert _wrong(report) == set()
    items = _items(report, "gen1")
    nr_blocks = len(json.loads((folder / "gen0/handover.json").read_text())["preserved"])
    assert _facts(items["preserved"]) == (True, nr_blocks, nr_blocks)
    assert items["root FDT"].note == "written front to back"
    assert not {"map pages", "LUO: blob"} & items.keys()


# -- alterations --------------------------------------------------------------------------------


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, (path, old)
    path.write_text(text.replace(old, new, 1))


def _flip(path: Path, at: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


TEXT_EDITS = [
    ("uma1g", "gen0/dmesg", "[0x000000003e37f000-0x000000003f37efff]",
     "[0x000000003e37e000-0x000000003f37dfff]", "gen0", "replay"),
    ("uma1g", "gen1/dmesg", "KHO: exec from: 7.3.4 (count 1)", "KHO: exec from: 7.3.4 (count 2)",
     "gen1", "messages"),
    ("uma1g", "gen1/dmesg", "Revived memory reservation 'oops'", "Revived memory reservation 'oop'",
     "gen1", "messages"),
    ("uma1g", "gen2/dmesg", "luo: Retrieved live update data, liveupdate number: 2",
     "luo: Retrieved live update data, liveupdate number: 3", "gen2", "messages"),
    ("uma1g", "gen1/cmdline", "log_buf_len=16M", "log_buf_len=8M", "gen1", "cmdline"),
    ("uma1g", "gen1/iomem", "3ffdffff : System RAM", "3ffcffff : System RAM", "gen1", "iomem"),
    ("numa4g", "gen1/zoneinfo", "present  131040", "present  131041", "gen1", "zoneinfo"),
    ("uma1g", "gen1/meminfo", "MemTotal:         945820", "MemTotal:         945824", "gen1",
     "meminfo"),
    ("uma1g", "gen1/buddyinfo", "219", "519", "gen1", "buddyinfo"),
    ("uma1g", "gen0/dmesg", "[mem 0x000000000009fc00-0x000000000009ffff]",
     "[mem 0x000000000009f400-0x000000000009ffff]", "gen0", "memory map"),
    ("fixed2g", "gen1/dmesg", "[mem 0x00000000fffc0000-0x00000000ffffffff]",
     "[mem 0x00000000fff80000-0x00000000ffffffff]", "gen1", "memory map"),
    ("fixed2g", "gen2/iomem", "fd00000000-ffffffffff", "fd00000000-fdffffffff", "gen2",
     "memory map"),
    ("uma1g", "gen2/cmdline", "reserve_mem=2M", "reserve_mem=3M", "gen2", "cmdline"),
    ("uma1g", "gen2/cmdline", "quiet", "qui\u00e9t", "gen2", "cmdline"),
    ("arm64-16k", "gen1/memblock/reserve_mem_param", "2.00 MiB", "2.50 MiB", "gen1",
     "memblock/reserve_mem_param"),
    ("arm64-16k", "gen2/memblock/reserve_mem_param", "oops", "ops", "gen2",
     "memblock/reserve_mem_param"),
    ("uma1g", "gen0/kho/out/scratch_phys", "0x", "0x1", "gen0", "scratch"),
    ("uma1g", "gen1/kho/out/scratch_len", "0xe400000", "0xe800000", "gen1", "scratch"),
    ("uma1g", "gen1/kho/out/scratch_len", "0xe400000", "1xe400000", "gen1", "scratch"),
    ("uma1g", "gen0/kho/out/scratch_phys", "\n", " 0x\n", "gen0", "scratch"),
    ("arm64-16k", "gen1/memblock/reserved", "0x00000000405b4000", "0x00000000405b0000", "gen1",
     "memblock arrays"),
    ("arm64-16k", "gen2/memblock/memory", "KHO_SCRATCH", "MIRROR", "gen2", "memblock arrays"),
    ("uma1g", "gen0/handover.json", '"mem_map": ', '"mem_map": 1', "gen0", "handover"),
    ("uma1g", "gen1/handover.json", '"token": 7', '"token": 9', "gen1", "handover"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "generation", "item"),
    TEXT_EDITS,
    ids=[f"{row[0]}-{row[1]}-{row[5]}-{nth}" for nth, row in enumerate(TEXT_EDITS)],
)
def test_one_altered_text_is_one_item(
    tmp_path: Path, name: str, file: str, old: str, new: str, generation: str, item: str
) -> None:
    """A text file altered in one place: exactly the item that it belongs to differs."""
    folder = _copy(tmp_path, name)
    _replace(folder / file, old, new)
    expected = {(generation, item)} if item else set()
    assert _wrong(conform_capture(folder)) == expected


BYTE_EDITS = [
    ("uma1g", "gen0/kho/out/fdt", 0x90, "gen0", "out/fdt"),
    ("uma1g", "gen1/kho/in/fdt", 0x100, "gen1", "in/fdt"),
    ("uma1g", "gen1/kho/in/sub_fdts/memblock", 0x80, "gen1", "in/memblock"),
    ("uma1g", "gen1/kho/in/sub_fdts/LUO", 0x12, "gen1", "in/LUO"),
    ("uma1g", "gen1/kho/in/sub_fdts/kho_test", 0xA0, "gen1", "in/kho_test"),
    ("uma1g", "gen2/kho/in/sub_fdts/kexec-metadata", 4, "gen2", "in/kexec-metadata"),
    ("uma1g", "gen0/kho/out/sub_fdts/memblock", 0x90, "gen0", "out/memblock"),
    ("uma1g", "gen0/kho/out/sub_fdts/LUO", 8, "gen0", "out/LUO"),
    ("uma1g", "gen1/kho/in/sub_fdts/LUO", 0, "gen1", "in/LUO"),
    ("uma1g", "gen2/kho/out/sub_fdts/LUO", 8, "gen2", "out/LUO"),
    ("arm64-16k", "gen2/kho/out/sub_fdts/LUO", 16, "gen2", "out/LUO"),
    ("arm64-16k", "gen2/kho/out/sub_fdts/LUO", 29, "gen2", "out/LUO"),
    ("uma1g", "gen2/kho/out/sub_fdts/memblock", 0x90, "gen2", "out/memblock"),
    ("uma1g", "gen2/kho/out/sub_fdts/kexec-metadata", 69, "gen2", "out/kexec-metadata"),
    ("uma1g", "gen2/kho/out/sub_fdts/kho_test", 0x30, "gen2", "out/kho_test"),
    ("arm64-16k", "gen1/firmware/fdt", 0x0, "gen1", "firmware/fdt"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "at", "generation", "item"), BYTE_EDITS)
def test_one_altered_byte_is_one_item(
    tmp_path: Path, name: str, file: str, at: int, generation: str, item: str
) -> None:
    """A binary file altered in one byte: exactly the item that it belongs to differs."""
    folder = _copy(tmp_path, name)
    _flip(folder / file, at)
    assert _wrong(conform_capture(folder)) == {(generation, item)}


@pytest.mark.parametrize(
    ("file", "old", "new", "generation", "item"),
    [
        ("gen0/kho/out/finalize", "1", "0", "gen0", "out/finalize"),
        ("gen2/kho/out/finalize", "0", "1", "gen2", "out/finalize"),
        ("gen2/kho/out/finalize", "0", "?", "gen2", "out/finalize"),
        ("gen1/dmesg.end", "Linux version", "Linux Version", "gen1", "dmesg.end"),
        ("gen0/dmesg", "i8042: PNP", "i8042: NPN", "gen0", "dmesg.end"),
    ],
)
def test_one_altered_file_of_an_older_kernel_is_one_item(
    tmp_path: Path, file: str, old: str, new: str, generation: str, item: str
) -> None:
    """The files that only captures of kho-v1 have are judged as well."""
    folder = tmp_path / "uma1g-v1"
    shutil.copytree(GOLDEN / "kho-v1" / "uma1g-v1", folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    for generation_folder in (folder / "gen0", folder / "gen1"):
        log = (generation_folder / "dmesg").read_text()
        (generation_folder / "dmesg.end").write_text(f"{log}kexec_core: Starting new kernel\n")
    assert _wrong(conform_capture(folder)) == set()
    _replace(folder / file, old, new)
    assert _wrong(conform_capture(folder)) == {(generation, item)}


@pytest.mark.parametrize("file", ["fdt", "sub_fdts/memblock"])
def test_what_was_finalized_is_held_without_pages(tmp_path: Path, file: str) -> None:
    """Where no page was captured, what the predecessor showed stands for what it handed over."""
    folder = tmp_path / "uma1g-v1"
    shutil.copytree(GOLDEN / "kho-v1" / "uma1g-v1", folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    for name in ("handover.json", "ram.npz"):
        (folder / "gen1" / name).unlink()
    item = f"in/{Path(file).name}"
    assert _items(conform_capture(folder), "gen2")[item].ok is True
    _flip(folder / "gen2/kho/in" / file, 0x40)
    assert _wrong(conform_capture(folder)) == {("gen2", item)}


def test_a_map_that_makes_no_sense_is_told(tmp_path: Path) -> None:
    """Two entries of the firmware's map that overlap: nothing is judged in silence."""
    folder = _copy(tmp_path, "uma1g", 2)
    _replace(folder / "gen0/dmesg", "[mem 0x000000003ffe0000-", "[mem 0x000000000ffe0000-")
    assert ("gen0", "memory map") in _wrong(conform_capture(folder))


@pytest.mark.parametrize("name", NAMES)
def test_a_capture_may_begin_with_a_successor(tmp_path: Path, name: str) -> None:
    """Where the first generations were not kept, what they handed over is not told."""
    folder = tmp_path / name
    shutil.copytree(CAPTURES / name, folder)
    facts = json.loads((folder / "capture.json").read_text())
    for generations in (["gen1", "gen2"], ["gen2"]):
        facts["generations"] = generations
        (folder / "capture.json").write_text(json.dumps(facts))
        report = conform_capture(folder)
        assert _wrong(report) == set()
        assert _items(report, generations[0])["replay"].ok is True


def test_a_cut_line_of_buddyinfo_is_told(tmp_path: Path) -> None:
    """A line with fewer orders than the other generations'."""
    folder = _copy(tmp_path, "uma1g", 2)
    path = folder / "gen1/buddyinfo"
    path.write_text(path.read_text()[:60] + "\n")
    assert _wrong(conform_capture(folder)) == {("gen1", "buddyinfo")}


def test_a_log_may_have_lost_its_beginning(tmp_path: Path) -> None:
    """The later log of a small buffer is not compared line by line."""
    folder = _copy(tmp_path, "uma1g", 2)
    lines = (folder / "gen0/dmesg").read_text().splitlines(keepends=True)
    (folder / "gen0/dmesg.end").write_text("".join(lines[40:]))
    item = _items(conform_capture(folder), "gen0")["dmesg.end"]
    assert (item.ok, item.note) == (None, "its beginning is lost")


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (10_239, "10.00 KiB"),
        (64 << 10, "64.0 KiB"),
        (999 << 10, "999 KiB"),
        ((1 << 20) - 1, "1024 KiB"),
        (5 << 30, "5.00 GiB"),
        (1_111_857_305_101, "1.01 TiB"),
    ],
)
def test_sizes_are_said_as_the_kernel_says_them(size: int, said: str) -> None:
    """string_get_size, with its odd extra figure where rounding carries into the tens."""
    assert string_get_size(size) == said


def test_an_altered_preserved_block_is_one_item(tmp_path: Path) -> None:
    """One preserved block of the log moved by a page: the item of preserved blocks, no other."""
    folder = _copy(tmp_path, "uma1g", 2)
    path = folder / "gen1/dmesg"
    lines = path.read_text().splitlines()
    at = [nth for nth, line in enumerate(lines) if PRESERVED.search(line)][300]
    line = lines[at]
    low, high = (int(word, 16) + 4096 for word in re.findall(r"0x([0-9a-f]{16})", line))
    lines[at] = re.sub(r"\[.*?\]", f"[{low:#018x}-{high:#018x}]", line)
    path.write_text("\n".join(lines) + "\n")
    report = conform_capture(folder)
    assert _wrong(report) == {("gen1", "preserved")}
    item = _items(report, "gen1")["preserved"]
    assert item.same == item.total - 1
    assert f"line {at + 1}:" in item.differences[0]


def _edit_page(folder: Path, phys: int, at: int) -> None:
    """Flip a bit in the page at ``phys`` of gen0's pages."""
    with np.load(folder / "gen0/ram.npz") as archive:
        pfn, data = archive["pfn"], archive["data"].copy()
    data[int(np.searchsorted(pfn, phys >> 12)), at] ^= 1
    np.savez_compressed(folder / "gen0/ram.npz", pfn=pfn, data=data)


@pytest.mark.parametrize("what", ["content", "record", "metadata", "leaf", "table", "behind"])
def test_an_altered_page_is_one_item(tmp_path: Path, what: str) -> None:
    """A bit flipped in a captured page: the two accounts differ, or a byte has no fact behind it.

    What follows from the page is not judged then, as the capture contradicts itself.
    """
    folder = _copy(tmp_path, "uma1g", 2)
    said = json.loads((folder / "gen0/handover.json").read_text())
    file = said["luo"]["sessions"][0]["files"][0]
    pages = {
        "content": (file["folios"][0][0] << 12, 5),
        "record": (file["data"], 8),
        "metadata": (said["subtrees"]["kexec-metadata"]["phys"], 5),
        "leaf": (_a_leaf(folder, said["mem_map"]), 8),
        "table": (said["mem_map"], 1),
        "behind": (file["data"], 4000),
    }
    _edit_page(folder, *pages[what])
    item = {"behind": "LUO: memfd records"}.get(what, "handover")
    assert _wrong(conform_capture(folder)) == {("gen0", item)}


def _a_leaf(folder: Path, root: int) -> int:
    """The first leaf of the tree: six levels down from the root by first entries."""
    with np.load(folder / "gen0/ram.npz") as archive:
        rows = dict(zip(archive["pfn"].tolist(), archive["data"], strict=True))
    for _ in range(5):
        words = rows[root >> 12].view("<u8")
        root = int(words[words.nonzero()[0][-1]])
    return root


@pytest.mark.parametrize("log", sorted(path.name for path in (GOLDEN / "logs").glob("*.txt")))
def test_a_capture_may_be_a_log_alone(tmp_path: Path, log: str) -> None:
    """Of seven other machines only the log was kept: nothing differs, most is not told."""
    path = GOLDEN / "logs" / log
    (tmp_path / "gen0").mkdir()
    shutil.copy(path, tmp_path / "gen0" / "dmesg")
    facts = {"release": "7.3.4", "generations": ["gen0"]}
    (tmp_path / "capture.json").write_text(json.dumps(facts))
    report = conform_capture(tmp_path)
    assert _wrong(report) == set()
    items = _items(report, "gen0")
    assert items["replay"].ok is True
    assert items["debugfs"].ok is None
    if "found kexec handover data" in path.read_text():
        assert "begins after it" in items["preserved"].note
    else:
        assert items["predecessor: inspected"].ok is True


def test_a_handover_of_another_writer_is_not_this_kernels(tmp_path: Path) -> None:
    """Pages that name another kernel as their writer: debugfs of this one is not held to them."""
    folder = _copy(tmp_path, "uma1g", 2)
    path = folder / "gen0/dmesg"
    path.write_text(path.read_text().replace("Linux version 7.3.4", "Linux version 7.3.5"))
    items = _items(conform_capture(folder), "gen0")
    assert items["debugfs out"].ok is None
    assert "7.3.4" in items["debugfs out"].note


# -- missing and broken files -------------------------------------------------------------------


def _run(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(["conform", str(folder)])
    out, err = capsys.readouterr()
    assert status in (0, 1, 2)
    if status == 2:
        assert err.startswith("khosim: ")
        assert err.count("\n") == 1
    return status, out + err


def test_every_missing_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without any one of its files a capture is refused, or the file is named as missing."""
    folder = _copy(tmp_path, "uma1g", 2)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) > 30
    for path in files:
        kept = path.read_bytes()
        path.unlink()
        status, out = _run(folder, capsys)
        assert status in (1, 2), path
        assert path.name in out, path
        path.write_bytes(kept)
    assert _run(folder, capsys)[0] == 0


def test_a_cut_log_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log cut at any of many places ends in a finding."""
    folder = _copy(tmp_path, "uma1g", 2)
    path = folder / "gen1/dmesg"
    data = path.read_bytes()
    complete = data.index(b"KHO: exec from")
    for size in range(0, complete, 7919):
        path.write_bytes(data[:size])
        assert _run(folder, capsys)[0] in (1, 2), size


def test_a_log_without_memblock_debug_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The item says what is missing from the log."""
    folder = _copy(tmp_path, "uma1g", 2)
    path = folder / "gen0/dmesg"
    lines = [line for line in path.read_text().splitlines() if "memblock" not in line]
    path.write_text("\n".join(line for line in lines if "MEMBLOCK" not in line))
    status, out = _run(folder, capsys)
    assert status == 1
    assert "memblock=debug" in out


@pytest.mark.parametrize(
    "file", ["gen1/kho/in/fdt", "gen1/kho/in/sub_fdts/memblock", "gen0/kho/out/fdt"]
)
def test_every_flipped_byte_of_a_tree_is_told(tmp_path: Path, file: str) -> None:
    """Any byte of a device tree that debugfs showed: one item differs, and it is that tree's."""
    from khosim.capture.folder import Capture
    from khosim.conform.debugfs_items import debugfs_items
    from khosim.conform.held import Held

    folder = _copy(tmp_path, "uma1g", 2)
    gen0, gen1 = Capture(folder).generations
    held = Held(gen0)
    side, name = file.split("/")[2], file.rpartition("/")[2]
    data = (folder / file).read_bytes()
    for at in range(len(data)):
        _flip(folder / file, at, 1 << at % 8)
        found = (
            debugfs_items(gen1, held, Held(gen1)) if "gen1" in file
            else debugfs_items(gen0, None, held)
        )  # fmt: skip
        assert [item.name for item in found if item.ok is False] == [f"{side}/{name}"], at
        (folder / file).write_bytes(data)


@pytest.mark.parametrize("kind", ["size", "order", "empty", "text", "cut"])
def test_broken_pages_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Pages of the wrong size, out of order, or no archive at all: a finding, no traceback."""
    folder = _copy(tmp_path, "uma1g", 2)
    path = folder / "gen0/ram.npz"
    with np.load(path) as archive:
        pfn, data = archive["pfn"], archive["data"]
    buffer = io.BytesIO()
    if kind == "size":
        np.savez(buffer, pfn=pfn, data=data[:, :2048])
    elif kind == "order":
        np.savez(buffer, pfn=pfn[::-1], data=data)
    elif kind == "cut":
        buffer.write(path.read_bytes()[:5000])
    else:
        buffer.write(b"" if kind == "empty" else b"no archive")
    path.write_bytes(buffer.getvalue())
    status, out = _run(folder, capsys)
    assert status == 1
    assert "gen0/ram.npz" in out


@pytest.mark.parametrize("text", ["{}", "[]", "{", "", '{"fdt_phys": -1}', '{"fdt_phys": "x"}'])
def test_broken_accounts_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """A handover.json that says nothing, or nonsense."""
    folder = _copy(tmp_path, "uma1g", 2)
    (folder / "gen0/handover.json").write_text(text)
    status, out = _run(folder, capsys)
    assert status == 1
    assert "handover.json" in out


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"release": "7.3.4", "generations": ["x"]}'])
def test_what_is_no_capture_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """One line and status 2."""
    (tmp_path / "capture.json").write_text(text)
    assert _run(tmp_path, capsys)[0] == 2
    assert _run(tmp_path / "nothing", capsys)[0] == 2


# -- the command --------------------------------------------------------------------------------


def test_the_command_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    """One object: per generation and item, whether it is the same, and the counts."""
    assert main(["conform", str(CAPTURES / "uma1g"), "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said["ok"] is True
    assert (said["release"], said["page_size"]) == ("7.3.4", 4096)
    assert said["generations"]["gen1"]["preserved"] == {"ok": True, "same": 627, "total": 627}
    assert said["generations"]["gen1"]["root FDT"]["note"] == "grown by each subtree"


def test_the_command_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each item, differences below it, a sum at the end."""
    folder = _copy(tmp_path, "uma1g", 2)
    _replace(folder / "gen1/cmdline", "quiet", "loud")
    status, out = _run(folder, capsys)
    assert status == 1
    lines = out.splitlines()
    at = next(nth for nth, line in enumerate(lines) if "DIFFERS cmdline" in line)
    assert "loud" in lines[at + 1]
    assert ", 1 differ, " in lines[-1]


def test_every_flipped_byte_of_a_handed_over_tree_is_told() -> None:
    """Any byte of the root FDT in a captured page: some item of that generation differs."""
    from khosim.capture.folder import Capture, CapturedGeneration
    from khosim.conform.handover_items import handover_items
    from khosim.conform.held import Held
    from khosim.kernel.arch import find_arch

    generation = Capture(CAPTURES / "uma1g").generations[1]
    pfn, data = generation.ram_pages
    arch = find_arch("x86_64", 4096)
    row = int(np.searchsorted(pfn, generation.handover["fdt_phys"] >> 12))
    for at in range(len(generation.handover["fdt"]) // 2):
        altered = CapturedGeneration(generation.path, 1, 4096)
        page = data[row, at]
        data[row, at] ^= 1 << at % 8
        altered.__dict__ |= {"ram_pages": (pfn, data), "handover": generation.handover}
        assert any(item.ok is False for item in handover_items(Held(altered), arch)), at
        data[row, at] = page
