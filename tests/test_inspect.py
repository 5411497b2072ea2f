"""``khosim inspect``: every kind of input, against what real kernels handed over."""

from __future__ import annotations

import json
import re
import shutil
import struct
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khosim.abi.fdt import dump_tree
from khosim.abi.fdt.text import dts_to_blob
from khosim.cli.main import main
from khosim.machine.image import save_image
from khosim.machine.memory_map import MemoryMap
from khosim.machine.ram import Ram

GOLDEN = Path(__file__).parent / "golden"
CAPTURES = GOLDEN / "captures"
NAMES = ("uma1g", "numa4g", "fixed2g", "uma1g-7.2", "arm64-16k")
CASES = [(name, generation) for name in NAMES for generation in ("gen0", "gen1")]
every_capture = pytest.mark.parametrize(("name", "generation"), CASES, ids=map("-".join, CASES))

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command: exit status, and what it printed to where the status says."""

    def run_(*argv: object) -> tuple[int, str]:
        status = main(["inspect", *map(str, argv)])
        said = capsys.readouterr()
        if status == 2:
            assert said.out == ""
            assert said.err.count("\n") == 1
            return status, said.err
        assert said.err == ""
        return status, said.out

    return run_


def known(name: str, generation: str) -> dict[str, Any]:
    """What an independent program decoded."""
    said: dict[str, Any] = json.loads((CAPTURES / name / generation / "handover.json").read_text())
    return said


@cache
def pages(name: str, generation: str) -> tuple[int, dict[int, bytes]]:
    """Page size, and pages by number."""
    with np.load(CAPTURES / name / generation / "ram.npz") as ram:
        rows = dict(zip(ram["pfn"].tolist(), map(bytes, ram["data"]), strict=True))
        return ram["data"].shape[1], rows


def raw_image(path: Path, *captures: tuple[str, str], base: int = 0, size: int = 6 << 30) -> Path:
    """A sparse RAM image with the pages of captures, later ones over earlier ones."""
    with path.open("wb") as file:
        file.truncate(size)
        for capture in captures:
            page_size, rows = pages(*capture)
            for pfn, data in rows.items():
                file.seek(pfn * page_size - base)
                file.write(data)
    return path


def npz(path: Path, rows: dict[int, bytes], page_size: int = 4096) -> Path:
    """An archive as a capture has it."""
    data = np.frombuffer(b"".join(rows[pfn] for pfn in sorted(rows)), dtype=np.uint8)
    np.savez(path, pfn=np.array(sorted(rows), dtype=np.uint64), data=data.reshape(-1, page_size))
    return path


# Every kind of memory, and the same answer


@pytest.mark.parametrize("name", NAMES)
def test_a_capture_says_what_an_independent_program_says(run: Run, name: str) -> None:
    """Each generation that hands something over, key by key; the last has nothing to say."""
    status, out = run(CAPTURES / name, "--json")
    assert status == 0
    assert json.loads(out) == {gen: known(name, gen) for gen in ("gen0", "gen1")}


@every_capture
def test_a_generation_and_its_pages_say_the_same(run: Run, name: str, generation: str) -> None:
    """By its folder and by the archive alone: the same values."""
    for path in (CAPTURES / name / generation, CAPTURES / name / generation / "ram.npz"):
        status, out = run(path, "--json")
        assert (status, json.loads(out)) == (0, known(name, generation))


@pytest.mark.parametrize("name", ["uma1g-v1", "uma1g-v1page"])
def test_older_formats_are_read(run: Run, name: str) -> None:
    """kho-v1 with either size of bitmaps: all but the boot parameters, which lie elsewhere."""
    status, out = run(GOLDEN / "kho-v1" / name, "--json")
    assert status == 0
    for generation, said in json.loads(out).items():
        path = GOLDEN / "kho-v1" / name / generation / "handover.json"
        wanted = json.loads(path.read_text())
        del wanted["kho_data"]
        assert said == wanted
    assert run(GOLDEN / "kho-v1" / name / "gen2")[0] == 0


@pytest.mark.parametrize("case", [("numa4g", "gen0"), ("arm64-16k", "gen1")], ids="-".join)
def test_a_raw_image_is_searched(run: Run, tmp_path: Path, case: tuple[str, str]) -> None:
    """The handover and the page size are found; an address and a size may be given."""
    path = raw_image(tmp_path / "ram", case)
    wanted = known(*case)
    address = hex(wanted["fdt_phys"])
    size = {"numa4g": "4K", "arm64-16k": "16K"}[case[0]]
    for options in ((), ("--fdt", address), ("--page-size", size)):
        status, out = run(path, "--json", *options)
        assert (status, json.loads(out)) == (0, wanted)


def test_an_image_may_begin_elsewhere(run: Run, tmp_path: Path) -> None:
    """Memory from 0x40000000 on, as on arm64's virt machine."""
    case = ("arm64-16k", "gen0")
    path = raw_image(tmp_path / "ram", case, base=1 << 30, size=2 << 30)
    status, out = run(path, "--json", "--base", "0x40000000")
    assert (status, json.loads(out)) == (0, known(*case))
    assert run(path, "--json")[0] == 1  # nothing is where the root FDT says


def test_the_latest_of_several_handovers_is_meant(run: Run, tmp_path: Path) -> None:
    """Memory still holds the root FDT of an earlier kernel; --fdt asks for that one."""
    first, second = ("uma1g", "gen0"), ("uma1g", "gen1")
    path = raw_image(tmp_path / "ram", first, second, size=1 << 30)
    status, out = run(path, "--json")
    assert (status, json.loads(out)) == (0, known(*second))
    _, table = run(path)
    assert f"handover at {known(*first)['fdt_phys']:#x}: kho-v4, kexec count 1" in table
    _, out = run(path, "--json", "--fdt", str(known(*first)["fdt_phys"]))
    assert json.loads(out)["fdt"] == known(*first)["fdt"]


@pytest.mark.parametrize("case", [("uma1g", "gen1"), ("arm64-16k", "gen0")], ids="-".join)
def test_an_elf_dump_is_memory(run: Run, tmp_path: Path, case: tuple[str, str]) -> None:
    """One segment per run of pages, at its physical address."""
    page_size, rows = pages(*case)
    runs: list[list[int]] = []
    for pfn in sorted(rows):
        if runs and runs[-1][-1] == pfn - 1:
            runs[-1].append(pfn)
        else:
            runs.append([pfn])
    at = 64 + 56 * len(runs)
    machine = 62 if page_size == 4096 else 183
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    raw = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 4, machine, 1, 0, 64, 0, 0, 64, 56, len(runs), 0, 0, 0
    )
    for pfns in runs:
        size = len(pfns) * page_size
        raw += struct.pack("<IIQQQQQQ", 1, 7, at, 0, pfns[0] * page_size, size, size, 0)
        at += size
    path = tmp_path / "vmcore"
    path.write_bytes(raw + b"".join(rows[pfn] for pfns in runs for pfn in pfns))
    status, out = run(path, "--json")
    assert (status, json.loads(out)) == (0, known(*case))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 10])
    status, out = run(path)
    assert status == 1
    assert "[vmcore-cut]" in out
    assert "10 bytes missing at the end of the file" in out


def test_a_saved_machine_is_memory(run: Run, tmp_path: Path) -> None:
    """khosim's own image of a machine at the jump."""
    _, rows = pages("uma1g", "gen1")
    ram = Ram(1 << 30)
    for pfn, data in rows.items():
        ram.write(pfn * 4096, data, (0, "test"))
    save_image(ram, MemoryMap.from_size("1G"), tmp_path / "machine")
    status, out = run(tmp_path / "machine", "--json")
    assert (status, json.loads(out)) == (0, known("uma1g", "gen1"))


def test_a_large_sparse_image_costs_what_it_holds(run: Run, tmp_path: Path) -> None:
    """5 GiB with the pages of a handover, some beyond 4 GiB: a moment, digests included."""
    path = raw_image(tmp_path / "ram", ("numa4g", "gen1"), size=5 << 30)
    assert known("numa4g", "gen1")["preserved"][0][0] > 4 << 30
    assert path.stat().st_blocks * 512 < 64 << 20
    began = time.process_time()
    assert run(path)[0] == 0
    assert time.process_time() - began < 0.3


# Blobs and debugfs


def test_a_lone_root_fdt_tells_what_it_can(run: Run) -> None:
    """Format, map and blobs; what only memory knows is null."""
    path = CAPTURES / "uma1g" / "gen1" / "kho" / "in" / "fdt"
    wanted = known("uma1g", "gen0")
    status, out = run(path, "--json")
    said = json.loads(out)
    assert status == 0
    assert {key: said[key] for key in ("compatible", "fdt", "mem_map")} == {
        key: wanted[key] for key in ("compatible", "fdt", "mem_map")
    }
    assert said["preserved"] is said["radix_nodes"] is said["fdt_phys"] is None
    assert {name: blob["phys"] for name, blob in said["subtrees"].items()} == {
        name: blob["phys"] for name, blob in wanted["subtrees"].items()
    }


def test_other_trees_are_named(run: Run) -> None:
    """A memblock blob, a test module's, and the boot tree by which arm64 is handed over."""
    blobs = CAPTURES / "numa4g" / "gen0" / "kho" / "out" / "sub_fdts"
    status, out = run(blobs / "memblock", "--json")
    assert (status, list(json.loads(out)["reserve_mem"])) == (0, ["trace", "oops"])
    assert run(blobs / "kho_test")[0] == 0
    status, out = run(CAPTURES / "arm64-16k" / "gen1" / "firmware" / "fdt", "--json")
    chosen = json.loads(out)["chosen"]["linux,kho-fdt"]
    assert (status, chosen) == (0, [known("arm64-16k", "gen0")["fdt_phys"], 16384])


def test_debugfs_is_told_side_by_side(run: Run) -> None:
    """The side that was handed over equals what the predecessor's memory says."""
    status, out = run(CAPTURES / "uma1g" / "gen1" / "kho", "--json")
    said = json.loads(out)
    assert status == 0
    handed = known("uma1g", "gen0")
    assert said["in"]["mem_map"] == handed["mem_map"]
    assert said["in"]["subtrees"]["memblock"] == handed["subtrees"]["memblock"]
    assert said["out"]["luo"]["liveupdate_num"] == 2
    assert len(said["out"]["scratch"]) == 3
    assert run(CAPTURES / "uma1g" / "gen2")[0] == 0


def test_every_byte_of_a_root_fdt_may_be_wrong(run: Run, tmp_path: Path) -> None:
    """A finding or a refusal, but for the middle of addresses, which only memory could tell."""
    sound = (CAPTURES / "uma1g" / "gen1" / "kho" / "in" / "fdt").read_bytes()
    path = tmp_path / "fdt"
    unnoticed = []
    for at in range(len(sound)):
        raw = bytearray(sound)
        raw[at] ^= 0xFF
        path.write_bytes(raw)
        status, _ = run(path)
        assert status in (0, 1, 2)
        if status == 0:
            unnoticed.append(at)
        elif at % 8 == 0:
            assert run(path, "--json")[0] == status
            assert run(path, "--dts")[0] == status
    middles = [
        match.start(1) + at
        for match in re.finditer(rb"\0\0\0\x08\0\0\0[\0\x20](.{8})", sound, re.DOTALL)
        for at in (2, 3, 4, 5)
    ]
    sizes = [sound.index(b"\xd2\0\0\0\0\0\0\0") + 1, sound.index(b"\xf0\0\0\0\0\0\0\0") + 1]
    sizes += [sizes[1] + 1]
    assert len(middles) == 20
    assert set(unnoticed) <= {*middles, *sizes}


def test_every_length_of_a_root_fdt_may_be_cut(run: Run, tmp_path: Path) -> None:
    """A cut blob is damaged, or too short to be one; none is taken for sound."""
    sound = (CAPTURES / "uma1g" / "gen1" / "kho" / "in" / "fdt").read_bytes()
    path = tmp_path / "fdt"
    for size in range(len(sound)):
        path.write_bytes(sound[:size])
        assert run(path)[0] == (2 if size < 4 else 1)


# Device tree source


def test_source_compiles_back(run: Run) -> None:
    """Each tree of ``--dts`` is the tree that was in memory."""
    status, out = run(CAPTURES / "numa4g" / "gen0", "--dts")
    assert status == 0
    wanted = known("numa4g", "gen0")
    blobs = [wanted["fdt"], *(blob["hex"] for blob in wanted["subtrees"].values())]
    trees = [bytes.fromhex(blob) for blob in blobs if blob.startswith("d00dfeed")]
    sources = out.split("/dts-v1/;")[1:]
    assert len(sources) == len(trees) == 3
    for source, tree in zip(sources, trees, strict=True):
        text = "/dts-v1/;" + source.rpartition("}")[0] + "};"
        assert dump_tree(dts_to_blob(text)).root == dump_tree(tree).root
    assert f"// gen0: LUO at {wanted['subtrees']['LUO']['phys']:#x}: 32 bytes" in out
    assert run(CAPTURES / "numa4g" / "gen2", "--dts")[0] == 0


# Tables


@pytest.mark.parametrize("path", [*(CAPTURES / name for name in NAMES), GOLDEN / "kho-v1/uma1g-v1"])
def test_tables_fit_in_80_columns(run: Run, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures, with every folio, and each folder of blobs."""
    monkeypatch.chdir(path)
    for argv in ((".", "--folios"), ("gen2",)):
        status, out = run(*argv)
        assert status == 0
        assert max(map(len, out.splitlines())) <= 80
        assert "nothing torn" in out


def test_a_table_has_the_facts(run: Run) -> None:
    """Blocks by order, regions, sessions, files with their digests, runs of folios."""
    _, out = run(CAPTURES / "uma1g" / "gen0", "--folios")
    wanted = known("uma1g", "gen0")
    orders = [order for _, order in wanted["preserved"]]
    for order in set(orders):
        count = orders.count(order)
        size = count * 4096 << order
        assert re.search(
            rf"^ +{order} +\d+[KM] +{count} +{count << order} +{size}$", out, re.MULTILINE
        )
    assert re.search(r"^  oops +0x39600000 +2097152$", out, re.MULTILINE)
    for session in wanted["luo"]["sessions"]:
        assert f"session {session['name']}: {len(session['files'])} files" in out
        for file in session["files"]:
            cells = [file["size"], file["pos"], f"{file['seals']:#x}", file["nr_folios"]]
            assert re.search(
                rf"^ +{file['token']:#x} +" + " +".join(map(str, cells)) + "$", out, re.MULTILINE
            )
            assert file.get("sha256", "") in out
    runs = re.findall(r"^ +(\d+) +0x([0-9a-f]+) +(\d+) +0 +0x3$", out, re.MULTILINE)
    folios = [
        [int(pfn, 16) + at, 3, int(index) + at]
        for index, pfn, count in runs
        for at in range(int(count))
    ]
    files = [file for session in wanted["luo"]["sessions"] for file in session["files"]]
    assert folios == [entry for file in files for entry in file["folios"]]
    assert len(runs) < len(folios)


def test_contents_may_be_left_alone(run: Run) -> None:
    """Without digests the rest is the same."""
    _, out = run(CAPTURES / "uma1g" / "gen0", "--json", "--no-content")
    files = [file for session in json.loads(out)["luo"]["sessions"] for file in session["files"]]
    assert [file.get("sha256") for file in files] == [None] * 5
    assert [file["size"] for file in files] == [12411, 2097152, 1, 0, 262144]


# Damage


def spoilt(tmp_path: Path, *changes: tuple[int, bytes | None]) -> Path:
    """The pages of a capture with bytes changed, or with a page missing."""
    rows = dict(pages("uma1g", "gen1")[1])
    for phys, data in changes:
        if data is None:
            del rows[phys // 4096]
        else:
            page = bytearray(rows[phys // 4096])
            page[phys % 4096 : phys % 4096 + len(data)] = data
            rows[phys // 4096] = bytes(page)
    return npz(tmp_path / "ram.npz", rows)


def test_damage_is_told_with_place_expectation_and_rest(run: Run, tmp_path: Path) -> None:
    """A seal that no kernel knows: where, what was expected, what was found, what is left."""
    record = known("uma1g", "gen1")["luo"]["sessions"][1]["files"][0]["data"]
    path = spoilt(tmp_path, (record + 16, b"\x06\x80"))
    status, out = run(path)
    assert status == 1
    assert (
        "torn: /LUO/sessions[1]/files[0]/seals [memfd-seals]\n"
        f"      at          {record + 16:#x}\n"
        "      expected    bits of 0x3f\n"
        "      found       0x8006\n"
        "      still read  everything else\n"
    ) in out
    assert out.endswith("1 thing torn\n")
    _, out = run(path, "--json")
    assert json.loads(out)["damage"] == [
        {
            "code": "memfd-seals",
            "phys": record + 16,
            "path": "/LUO/sessions[1]/files[0]/seals",
            "expected": "bits of 0x3f",
            "found": "0x8006",
            "still_read": "everything else",
        }
    ]


def test_a_missing_leaf_hides_blocks_and_nothing_else(run: Run, tmp_path: Path) -> None:
    """The rest of the map, the sessions and their digests are still there."""
    wanted = known("uma1g", "gen1")
    _, rows = pages("uma1g", "gen1")
    table = rows[wanted["mem_map"] // 4096]
    while True:  # down the first entry of each level: the tree has six
        child = next(word for (word,) in struct.iter_unpack("<Q", table) if word)
        if child % 4096 or child // 4096 not in rows:
            break
        last, table = child, rows[child // 4096]
    status, out = run(spoilt(tmp_path, (last, None)), "--json")
    said = json.loads(out)
    assert status == 1
    assert [(item["code"], item["path"]) for item in said["damage"]] == [
        ("radix-unreadable", "/preserved-memory-map")
    ]
    assert 0 < len(said["preserved"]) < len(wanted["preserved"])
    assert said["luo"] == wanted["luo"]


def leaf_byte(key: int) -> tuple[int, int]:
    """Address and value of the byte that holds a key's bit in the map of the spoilt capture."""
    _, rows = pages("uma1g", "gen1")
    page = known("uma1g", "gen1")["mem_map"]
    for level in (5, 4, 3, 2, 1):
        entry = (key >> (level - 1) * 9 + 15) % 512 * 8
        page = int.from_bytes(rows[page // 4096][entry : entry + 8], "little")
    at = key % 32768 // 8
    return page + at, rows[page // 4096][at]


def test_unpreserved_parts_are_named(run: Run, tmp_path: Path) -> None:
    """A map without a bit for a blob's page: the successor would use that page."""
    wanted = known("uma1g", "gen1")
    key = 1 << 52 | wanted["subtrees"]["kexec-metadata"]["phys"] // 4096
    at, byte = leaf_byte(key)
    assert byte >> key % 8 & 1
    path = spoilt(tmp_path, (at, bytes([byte & ~(1 << key % 8)])))
    status, out = run(path, "--json")
    said = json.loads(out)
    assert status == 1
    assert [(item["code"], item["path"]) for item in said["damage"]] == [
        ("not-preserved", "/kexec-metadata")
    ]
    assert len(said["preserved"]) == len(wanted["preserved"]) - 1


def test_a_page_in_two_blocks_is_damage(run: Run, tmp_path: Path) -> None:
    """One more bit, for 2 MiB over the page of a blob."""
    phys = known("uma1g", "gen1")["subtrees"]["kexec-metadata"]["phys"]
    key = 1 << 52 - 9 | phys >> 21
    at, byte = leaf_byte(key)
    status, out = run(spoilt(tmp_path, (at, bytes([byte | 1 << key % 8]))), "--json")
    damage = json.loads(out)["damage"]
    assert status == 1
    assert {item["code"] for item in damage} == {"map-overlap"}
    assert f"[{phys:#x}-{phys + 4096:#x}) in two blocks" in [item["found"] for item in damage]


def test_a_root_that_no_kernel_writes_is_damage(run: Run, tmp_path: Path) -> None:
    """A boot CPU in the header of the root FDT in memory."""
    at = known("uma1g", "gen1")["fdt_phys"] + 31
    status, out = run(spoilt(tmp_path, (at, b"\1")), "--json")
    assert status == 1
    assert [(item["code"], item["phys"]) for item in json.loads(out)["damage"]] == [
        ("fdt-reserved", at - 3)
    ]


def test_names_from_memory_cannot_drive_a_terminal(run: Run, tmp_path: Path) -> None:
    """Control characters in a session's name are shown, not sent."""
    _, rows = pages("uma1g", "gen1")
    pfn = next(pfn for pfn, data in rows.items() if data[16:21] == b"vm-a\0")
    status, out = run(spoilt(tmp_path, (pfn * 4096 + 16, b"\x1b[2J\r")))
    assert status == 0
    assert r"session \x1b[2J\r: 2 files" in out


# Wrong input


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """A capture of one's own, to be spoilt."""
    return Path(shutil.copytree(CAPTURES / "uma1g", tmp_path / "uma1g"))


def test_a_missing_file_is_a_finding_or_a_refusal(run: Run, capture: Path) -> None:
    """Every file of a capture in turn: never a traceback, and ``ram.npz`` is missed."""
    for path in sorted(path for path in capture.rglob("*") if path.is_file()):
        aside = capture.parent / "aside"
        path.rename(aside)
        status, out = run(capture, "--no-content")
        if path.name == "ram.npz":
            assert status == 1
            assert "gen0/ram.npz" in out or "gen1/ram.npz" in out
        else:
            assert status == (2 if path.name == "capture.json" else 0)
        aside.rename(path)


@pytest.mark.parametrize("size", [0, 1, 100, 5000, 29000])
def test_a_cut_archive_is_refused(run: Run, capture: Path, size: int) -> None:
    """By itself and as part of its generation and its capture."""
    path = capture / "gen1" / "ram.npz"
    path.write_bytes(path.read_bytes()[:size])
    for target in (capture, capture / "gen1", path):
        status, err = run(target)
        assert status == 2
        assert "ram.npz" in err


def test_a_page_that_is_missing_or_changed_is_noticed(run: Run, tmp_path: Path) -> None:
    """Each page of the handover itself, taken away: a finding, or no handover at all."""
    wanted = known("uma1g", "gen1")
    content = {
        pfn for s in wanted["luo"]["sessions"] for f in s["files"] for pfn, _, _ in f["folios"]
    }
    _, rows = pages("uma1g", "gen1")
    for pfn in sorted(set(rows) - content):
        status, _ = run(spoilt(tmp_path, (pfn * 4096, None)), "--no-content")
        assert status == (2 if pfn * 4096 == wanted["fdt_phys"] else 1)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"hello", "no handover in it"),
        (bytes(1 << 16), "no handover in it"),
        (b"PK\x03\x04", "damaged"),
        (b"KHOSIMGE", "cut off"),
        (b"\x7fELF", "cut off"),
        (b"KDUMP   ", "makedumpfile -E"),
    ],
)
def test_files_of_other_kinds_are_refused(
    run: Run, tmp_path: Path, content: bytes, word: str
) -> None:
    """One line that says what the file is not."""
    (tmp_path / "file").write_bytes(content)
    status, err = run(tmp_path / "file")
    assert status == 2
    assert word in err


def test_paths_and_options_that_make_no_sense_are_refused(run: Run, tmp_path: Path) -> None:
    """Missing paths, strange folders, options for another kind of input."""
    gen0 = CAPTURES / "uma1g" / "gen0"
    fdt = gen0 / "kho" / "out" / "fdt"
    for argv, word in (
        ((tmp_path / "nothing",), "No such file"),
        ((tmp_path,), "neither a capture"),
        (("a\0b",), "null byte"),
        ((gen0, "--fdt", "0x7fff0000"), "not in this image"),
        ((gen0, "--fdt", "here"), "--fdt"),
        ((gen0, "--fdt", "1E"), "no physical address"),
        ((gen0, "--base", "4K"), "means nothing"),
        ((gen0, "--page-size", "8K"), "not one of 4K, 16K, 64K"),
        ((CAPTURES / "uma1g", "--fdt", "4K"), "means nothing"),
        ((gen0 / "kho", "--fdt", "4K"), "means nothing"),
        ((gen0 / "ram.npz", "--page-size", "16K"), "pages of 16384"),
        ((fdt, "--fdt", "0", "--base", "3"), "not a page"),
        ((gen0, "--json", "--dts"), "not allowed with"),
        ((), "required"),
    ):
        status, err = run(*argv)
        assert status == 2
        assert word in err


def test_an_address_without_a_tree_is_told(run: Run) -> None:
    """--fdt at some other page: expected a magic, found something else."""
    wanted = known("uma1g", "gen0")
    status, out = run(CAPTURES / "uma1g" / "gen0", "--fdt", hex(wanted["mem_map"]))
    assert status == 1
    assert "[fdt-magic]" in out
    assert "nothing of this tree" in out
