"""The guest's memory in files, and captures written from it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khosim.capture.folder import Capture
from khosim.cli.main import main
from khosim.errors import InputError, RamFault
from khosim.inspect.memory import Memory, inspect_memory
from khosim.lab.folder import GenerationFiles, plain_log, ram_npz, write_capture
from khosim.lab.guest_ram import GuestRam, RecordingReader, layout

GOLDEN = Path(__file__).parent / "golden" / "captures"
GIB = 1 << 30


def _where(sizes: list[int], offset: int) -> int:
    """Where a byte of all nodes' memory, end to end, lies: below 3 GiB, or from 4 GiB on."""
    assert offset < sum(sizes)
    return offset if offset < 3 * GIB else offset + GIB


@given(st.lists(st.integers(1, 5 * 1024).map(lambda mib: mib << 20), min_size=1, max_size=4))
def test_nodes_lie_end_to_end(sizes: list[int]) -> None:
    """Every byte of every node's file is where a count from the first one puts it."""
    done = 0
    for size, segments in zip(sizes, layout(sizes), strict=True):
        covered = 0
        for start, end, offset in segments:
            assert start < end
            assert offset == covered
            assert start == _where(sizes, done + offset)
            assert end - 1 == _where(sizes, done + offset + end - start - 1)
            covered += end - start
        assert covered == size
        done += size


def _ram(tmp_path: Path, sizes: list[int]) -> GuestRam:
    paths = [tmp_path / f"ram{n}" for n in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        with open(path, "wb") as file:
            file.truncate(size)
    return GuestRam(paths, sizes)


def test_reads_and_writes_cross_files(tmp_path: Path) -> None:
    """Nodes adjoin: what lies over their border is written to both files and read from both."""
    ram = _ram(tmp_path, [16 << 20, 16 << 20])
    data = bytes(range(200))
    ram.write((16 << 20) - 100, data)
    assert ram.read((16 << 20) - 100, 200) == data
    assert ram.view((16 << 20) - 100, 200).tobytes() == data
    assert (tmp_path / "ram0").read_bytes()[-100:] == data[:100]
    assert (tmp_path / "ram1").read_bytes()[:100] == data[100:]
    assert ram.read(0, 0) == b""


def test_the_hole_is_no_memory(tmp_path: Path) -> None:
    """Between 3 GiB and 4 GiB there is nothing; the rest is beyond."""
    ram = _ram(tmp_path, [4 * GIB])
    ram.write(4 * GIB, b"high")
    assert ram.read(4 * GIB, 4) == b"high"
    with pytest.raises(RamFault):
        ram.read(3 * GIB, 1)
    with pytest.raises(RamFault):
        ram.read(3 * GIB - 1, 2)
    with pytest.raises(RamFault):
        ram.write(5 * GIB - 1, b"xx")


def test_a_recorder_knows_what_was_read(tmp_path: Path) -> None:
    """Pages that were read, even by a byte, and no others; a search leaves no mark."""
    ram = _ram(tmp_path, [16 << 20])
    ram.write(0x5000, b"\xd0\x0d\xfe\xed")
    reader = RecordingReader(ram)
    assert list(reader.pages_with(b"\xd0\x0d\xfe\xed")) == [0x5000]
    assert reader.pfns == set()
    reader.read(0x1FFF, 2)
    reader.view(0x7000, 4096)
    reader.read(0x9000, 0)
    with pytest.raises(RamFault):
        reader.read(1 << 40, 1)
    assert reader.pfns == {1, 2, 7}


@pytest.fixture(scope="module")
def golden_ram(tmp_path_factory: pytest.TempPathFactory) -> GuestRam:
    """A guest's memory with the pages of a real handover in it."""
    folder = tmp_path_factory.mktemp("ram")
    ram = _ram(folder, [GIB])
    pfn, data = Capture(GOLDEN / "uma1g").generation("gen0").ram_pages
    for at, page in zip(pfn.tolist(), data, strict=True):
        ram.write(at * 4096, page.tobytes())
    return ram


def test_a_handover_is_decoded_from_guest_memory(golden_ram: GuestRam) -> None:
    """As an independent program decoded it; the pages read are those that it kept."""
    golden = Capture(GOLDEN / "uma1g").generation("gen0")
    reader = RecordingReader(golden_ram)
    report = inspect_memory(Memory("x", "x", reader, 4096), fdt_phys=golden.handover["fdt_phys"])
    said = report.to_json()
    assert {key: said[key] for key in golden.handover} == golden.handover
    kept = set(golden.ram_pages[0].tolist())
    # The page of FLBs is one that the golden captures left out.
    assert len(reader.pfns - kept) <= 1
    assert kept - reader.pfns == set()


def test_a_written_capture_is_read_back(golden_ram: GuestRam, tmp_path: Path) -> None:
    """Facts, files, pages and the decoded handover; inspect finds the same in it."""
    golden = Capture(GOLDEN / "uma1g")
    fdt_phys = golden.generation(0).handover["fdt_phys"]
    reader = RecordingReader(golden_ram)
    report = inspect_memory(Memory("x", "x", reader, 4096), fdt_phys=fdt_phys)
    generations = []
    for real in golden.generations:
        one = GenerationFiles(real.name)
        for path in real.path.rglob("*"):
            if path.is_file() and path.name not in ("ram.npz", "handover.json"):
                one.files[str(path.relative_to(real.path))] = path.read_bytes()
        generations.append(one)
    generations[0].add_handover(report, reader)
    out = tmp_path / "capture"
    facts = {"release": "7.3.4", "arch": "x86_64", "page_size": 4096}
    write_capture(out, facts, generations, {"console": b"hello"})
    read = Capture(out)
    assert read.release == "7.3.4"
    assert [one.name for one in read.generations] == ["gen0", "gen1", "gen2"]
    assert read.generation(0).handover["preserved"] == golden.generation(0).handover["preserved"]
    assert read.generation(1).scratch_areas == golden.generation(1).scratch_areas
    pfn, data = read.generation(0).ram_pages
    assert set(pfn.tolist()) == reader.pfns
    assert data[0].tobytes() == golden_ram.read(int(pfn[0]) * 4096, 4096)
    assert (out / "console").read_bytes() == b"hello"
    assert [path.name for path in tmp_path.iterdir()] == ["capture"]


def test_a_written_capture_replays(golden_ram: GuestRam, tmp_path: Path) -> None:
    """A log as syslog(2) gives it, cleaned and written, is one that replay agrees with."""
    golden = Capture(GOLDEN / "uma1g").generation(0)
    one = GenerationFiles("gen0")
    raw = b"".join(b"<6>" + line + b"\n" for line in golden.bytes_of("dmesg").splitlines())
    one.files["dmesg"] = plain_log(raw)
    assert one.files["dmesg"] == golden.bytes_of("dmesg").rstrip(b"\n") + b"\n"
    for name in ("iomem", "cmdline", "kho/out/scratch_phys", "kho/out/scratch_len"):
        one.files[name] = golden.bytes_of(name)
    out = tmp_path / "capture"
    write_capture(out, {"release": "7.3.4"}, [one], {})
    assert main(["replay", str(out)]) == 0


def test_a_capture_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """A file that cannot be written leaves nothing behind."""
    one = GenerationFiles("gen0", {"a": b"", "a/b": b""})
    with pytest.raises(InputError, match="capture: "):
        write_capture(tmp_path / "capture", {}, [one], {})
    assert list(tmp_path.iterdir()) == []


def test_a_capture_never_overwrites(tmp_path: Path) -> None:
    """What is there stays."""
    (tmp_path / "capture").mkdir()
    with pytest.raises(InputError, match="is there already"):
        write_capture(tmp_path / "capture", {}, [], {})


def test_pages_are_saved_in_order(tmp_path: Path) -> None:
    """Sorted page frames and their bytes, as numpy reads them."""
    ram = _ram(tmp_path, [16 << 20])
    ram.write(0x3000, b"three")
    reader = RecordingReader(ram)
    reader.read(0x3000, 1)
    reader.read(0x1000, 1)
    saved = np.load(io.BytesIO(ram_npz(reader)))
    assert saved["pfn"].tolist() == [1, 3]
    assert saved["pfn"].dtype == np.uint64
    assert saved["data"][1, :5].tobytes() == b"three"
    assert saved["data"].shape == (2, 4096)
