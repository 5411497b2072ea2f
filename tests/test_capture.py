"""Kernel logs, /proc/iomem and capture folders, read from what real kernels left behind."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khosim.capture.dmesg import parse_dmesg
from khosim.capture.folder import Capture
from khosim.capture.iomem import parse_iomem
from khosim.errors import InputError
from khosim.machine.memory_map import (
    ACPI_DATA,
    ACPI_NVS,
    RAM,
    RESERVED,
    UNUSABLE,
    MemoryMap,
    NodeRange,
    Region,
)

CAPTURES = Path(__file__).parent / "golden" / "captures"
X86 = ("uma1g", "numa4g", "fixed2g", "uma1g-7.2")
NAMES = (*X86, "arm64-16k")
GIB = 1 << 30


@pytest.mark.parametrize("name", NAMES)
def test_every_generation_sees_the_same_machine(name: str) -> None:
    """The log of each generation gives the memory map of the first: kernels go, it stays."""
    capture = Capture(CAPTURES / name)
    assert [generation.name for generation in capture.generations] == ["gen0", "gen1", "gen2"]
    for generation in capture.generations:
        assert generation.boot_log.memory_map == capture.memory_map()
        assert generation.boot_log.release == capture.release
        assert generation.boot_log.command_line == generation.cmdline


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("uma1g", MemoryMap.from_size("1G")),
        ("uma1g-7.2", MemoryMap.from_size("1G")),
        ("fixed2g", MemoryMap.from_size("2G")),
        ("numa4g", MemoryMap.from_size("4G", nodes=["2560M", "1536M"])),
        ("arm64-16k", MemoryMap.from_size("2G", arch="arm64")),
    ],
)
def test_a_size_gives_the_captured_machine(name: str, made: MemoryMap) -> None:
    """The map made from a size is the one that QEMU gave the real kernel, entry for entry."""
    assert Capture(CAPTURES / name).memory_map() == made


def test_numa_nodes_of_a_log() -> None:
    """Nodes are those of the firmware's SRAT, last addresses inclusive there."""
    nodes = Capture(CAPTURES / "numa4g").memory_map().node_ranges
    assert nodes == (
        NodeRange(0, 0xA0000, 0),
        NodeRange(0x100000, 0xA0000000, 0),
        NodeRange(0xA0000000, 0xC0000000, 1),
        NodeRange(0x100000000, 0x140000000, 1),
    )


@pytest.mark.parametrize("name", X86)
def test_iomem_agrees_with_the_log(name: str) -> None:
    """/proc/iomem shows the log's RAM, less page 0, which the kernel keeps for itself."""
    capture = Capture(CAPTURES / name)
    for generation in capture.generations:
        ram = generation.iomem.memory_map.ram_ranges
        assert ram[0] == (0x1000, 0x9FC00)
        assert ram[1:] == capture.memory_map().ram_ranges[1:]
        assert [name for _, _, name in generation.iomem.inside_ram] == [
            "Kernel code",
            "Kernel rodata",
            "Kernel data",
            "Kernel bss",
        ]


def test_iomem_of_arm64() -> None:
    """Scratch areas split RAM in /proc/iomem of a successor; the machine has one piece."""
    capture = Capture(CAPTURES / "arm64-16k")
    for generation in capture.generations:
        read = generation.iomem
        assert read.memory_map.arch == "arm64"
        assert read.memory_map.ram_ranges == ((0x40000000, 0xC0000000),)
        assert {name for _, _, name in read.inside_ram} == {
            "Kernel code",
            "Kernel data",
            "reserved",
        }


def test_scratch_areas() -> None:
    """Scratch areas come in the kernel's order, with the empty one."""
    generation = Capture(CAPTURES / "uma1g").generation("gen0")
    assert generation.scratch_areas == (
        (0x2B000000, 0xE400000),
        (0x39800000, 0),
        (0x1D400000, 0xDC00000),
    )


@pytest.mark.parametrize("name", NAMES)
def test_handover_and_pages_belong_together(name: str) -> None:
    """The page that holds the root FDT in ram.npz has the bytes of handover.json."""
    capture = Capture(CAPTURES / name)
    for generation in capture.generations[:2]:
        pfn, data = generation.ram_pages
        phys, fdt = generation.handover["fdt_phys"], bytes.fromhex(generation.handover["fdt"])
        row = np.searchsorted(pfn, phys // capture.page_size)
        assert pfn[row] == phys // capture.page_size
        offset = phys % capture.page_size
        assert data[row, offset : offset + len(fdt)].tobytes() == fdt
    last = capture.generations[-1]
    assert not last.has("handover.json")
    with pytest.raises(InputError, match=r"gen2/handover.json: No such file"):
        _ = last.handover
    with pytest.raises(InputError, match=r"gen2/ram.npz: No such file"):
        _ = last.ram_pages


# Logs of other machines

CLASSIC = """\
[    0.000000] Linux version 6.12.1-host (builder@host) #1 SMP
[    0.000000] Command line: BOOT_IMAGE=/vmlinuz root=/dev/sda1 kho=on
[    0.000000] BIOS-provided physical RAM map:
[    0.000000] BIOS-e820: [mem 0x0000000000000000-0x000000000009ffff] usable
[    0.000000] BIOS-e820: [mem 0x00000000000a0000-0x00000000000fffff] reserved
[    0.000000] BIOS-e820: [mem 0x0000000000100000-0x000000007fffffff] usable
[    0.000000] BIOS-e820: [mem 0x0000000080000000-0x000000008000ffff] ACPI data
[    0.000000] BIOS-e820: [mem 0x0000000080010000-0x000000008001ffff] ACPI NVS
[    0.000000] BIOS-e820: [mem 0x0000000080020000-0x000000008002ffff] unusable
[    0.000000] BIOS-e820: [mem 0x0000000080030000-0x000000008003ffff] type 20
[    0.000000] BIOS-e820: [mem 0x0000000100000000-0x000000017fffffff] usable
[    0.000000] user-defined physical RAM map:
[    0.000000] user: [mem 0x0000000000000000-0x000000000009ffff] usable
[    0.004139] ACPI: SRAT: Node 0 PXM 0 [mem 0x00000000-0x7fffffff]
[    0.004140] ACPI: SRAT: Node 2 PXM 2 [mem 0x100000000-0x17fffffff] hotplug
[    0.010000] Initmem setup node 0 [mem 0x0000000000001000-0x000000007fffffff]
[    0.010000] Initmem setup node 1 as memoryless
"""
CLASSIC_MAP = MemoryMap(
    (
        Region(0, 0xA0000, RAM),
        Region(0xA0000, 0x100000, RESERVED),
        Region(0x100000, 0x80000000, RAM),
        Region(0x80000000, 0x80010000, ACPI_DATA),
        Region(0x80010000, 0x80020000, ACPI_NVS),
        Region(0x80020000, 0x80030000, UNUSABLE),
        Region(0x80030000, 0x80040000, "type 20"),
        Region(0x100000000, 0x180000000, RAM),
    ),
    (NodeRange(0, 0x80000000, 0), NodeRange(0x100000000, 0x180000000, 2)),
    "x86_64",
    (1,),
)


@pytest.mark.parametrize("prefix", ["", "<6>", "Nov 22 21:40:03 host kernel: "])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_older_words_and_any_prefix(prefix: str, line_end: str) -> None:
    """Older wordings, time stamps, log levels, journals and serial consoles are all read."""
    log = parse_dmesg(line_end.join(prefix + line for line in CLASSIC.splitlines()))
    assert log.memory_map == CLASSIC_MAP
    assert log.memory_map.memoryless_nodes == (1,)
    assert log.release == "6.12.1-host"
    assert log.command_line == "BOOT_IMAGE=/vmlinuz root=/dev/sda1 kho=on"


def test_the_first_of_several_boots() -> None:
    """A console log that goes on through a kexec is read up to it."""
    second = CLASSIC.replace("6.12.1-host", "6.13.0").replace("17fffffff", "1ffffffff")
    assert parse_dmesg(CLASSIC + second).memory_map == CLASSIC_MAP


def test_arm64_log_with_nodes() -> None:
    """Without e820 the early node ranges are the map, pieces of one node joined."""
    log = parse_dmesg(
        "[    0.000000] Booting Linux on physical CPU 0x0000000000 [0x000f0510]\n"
        "[    0.000000] Kernel command line: kho=on\n"
        "[    0.000000] Early memory node ranges\n"
        "[    0.000000]   node   0: [mem 0x0000000040000000-0x000000004fffffff]\n"
        "[    0.000000]   node   0: [mem 0x0000000050000000-0x000000007fffffff]\n"
        "[    0.000000]   node   1: [mem 0x0000000080000000-0x00000000bfffffff]\n"
        "[    0.000000] Initmem setup node 0 [mem 0x0000000040000000-0x000000007fffffff]\n"
    )
    assert log.memory_map.ram_ranges == ((0x40000000, 0xC0000000),)
    assert log.memory_map.node_ranges == (
        NodeRange(0x40000000, 0x80000000, 0),
        NodeRange(0x80000000, 0xC0000000, 1),
    )
    assert log.command_line == "kho=on"
    assert log.release is None


def test_arm64_log_with_a_memblock_dump() -> None:
    """Where even those are missing, memblock's first dump serves."""
    dump = (
        "MEMBLOCK configuration:\n memory size = 0x80000000 reserved size = 0x1000\n"
        " memory.cnt  = 0x2\n"
        " memory[0x0]\t[0x0000000040000000-0x000000007fffffff], 0x40000000 bytes flags: 0x0\n"
        " memory[0x1]\t[0x0000000100000000-0x000000013fffffff], 0x40000000 bytes on node 0 "
        "flags: 0x0\n"
        " reserved[0x0]\t[0x0000000040000000-0x0000000040000fff], 0x1000 bytes flags: 0x0\n"
    )
    log = parse_dmesg("Linux version 7.3.4 (aarch64-linux-gnu-gcc)\n" + dump + dump)
    assert log.memory_map.ram_ranges == ((GIB, 2 * GIB), (4 * GIB, 5 * GIB))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "no BIOS-e820 lines"),
        ("\0\xff garbage", "no BIOS-e820 lines"),
        ("Booting Linux on physical CPU 0x0\n", "beginning is missing"),
        ("BIOS-e820: [mem 0x0-0x9ffff] reserved\n", "none at all"),
        ("BIOS-e820: [mem 0x5000000-0x4000000] usable\n", "empty"),
        ("BIOS-e820: [mem 0x0-0xffffffffffffffff] usable\n", "above 16T"),
        (CLASSIC.replace("0000100000-0x", "0000090000-0x"), "begins before"),
        (CLASSIC.replace("Node 2", "Node 99"), "node: 99"),
    ],
)
def test_logs_that_make_no_sense(text: str, cause: str) -> None:
    """What is no log, or a torn or impossible one, is refused by the name of its file."""
    with pytest.raises(InputError, match=rf"^boot\.log: .*{cause}"):
        parse_dmesg(text, place="boot.log")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "no 'System RAM'"),
        ("00000000-00000fff : Reserved\n", "no 'System RAM'"),
        ("00000000-00000000 : System RAM\n  00000000-00000000 : Kernel code\n", "as root"),
        ("hello\n", r"iomem:1: 'hello' is not a line"),
        ("00001000-0009fbff : System RAM\n00100000-zz : System RAM\n", "iomem:2"),
        ("00100000-000fffff : System RAM\n", "empty"),
        ("00001000-0009fbff : System RAM\n", "too few"),
    ],
)
def test_iomem_that_makes_no_sense(text: str, cause: str) -> None:
    """So is /proc/iomem that was read by a user, or is something else."""
    with pytest.raises(InputError, match=cause):
        parse_iomem(text)


# Folders that are damaged


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small capture to damage."""
    path = tmp_path / "capture"
    (path / "gen0" / "kho" / "out").mkdir(parents=True)
    facts = {"release": "7.3.4", "arch": "x86_64", "page_size": 4096, "generations": ["gen0"]}
    (path / "capture.json").write_text(json.dumps(facts), encoding="utf-8")
    shutil.copy(CAPTURES / "uma1g" / "gen0" / "dmesg", path / "gen0" / "dmesg")
    return path


def test_not_a_capture(tmp_path: Path) -> None:
    """No folder, a file, and a folder without capture.json are three different things."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"gone: no such folder"):
        Capture(tmp_path / "gone")
    with pytest.raises(InputError, match=r"file: not a folder"):
        Capture(tmp_path / "file")
    with pytest.raises(InputError, match=r"capture.json: No such file"):
        Capture(tmp_path)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"generations": ["gen0"]}', "release"),
        (b'{"release": "7.3", "generations": []}', "generations"),
        (b'{"release": "7.3", "generations": "gen0"}', "generations"),
        (b'{"release": "7.3", "generations": ["../gen0"]}', "not a folder name"),
        (b'{"release": "7.3", "generations": [1]}', "not a folder name"),
        (b'{"release": "7.3", "generations": ["gen7"]}', "gen7: no such folder"),
        (b'{"release": "7.3", "generations": ["gen0"], "arch": "vax"}', "arch"),
        (b'{"release": "7.3", "generations": ["gen0"], "arch": [1]}', "arch"),
        (b'{"release": "7.3", "generations": ["gen0"], "page_size": 512}', "page_size"),
        (b'{"release": "7.3", "generations": ["gen0"], "page_size": true}', "page_size"),
    ],
)
def test_damaged_capture_json(folder: Path, change: bytes, cause: str) -> None:
    """Each thing wrong with capture.json is named."""
    (folder / "capture.json").write_bytes(change)
    with pytest.raises(InputError, match=cause):
        Capture(folder)


def npz(**arrays: Any) -> bytes:
    """An npz archive as bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


PFN = np.array([1, 5], dtype=np.uint64)
PAGES = np.zeros((2, 4096), dtype=np.uint8)
NO_HEADER = io.BytesIO()
with zipfile.ZipFile(NO_HEADER, "w") as no_header:
    no_header.writestr("pfn.npy", b"raw")
    no_header.writestr("data.npy", b"raw")
BAD_NPZ = {
    "empty": (b"", "ram.npz"),
    "no archive": (b"PK not really", "ram.npz"),
    "cut": (npz(pfn=PFN, data=PAGES)[:-40], "ram.npz"),
    "damaged": (npz(pfn=PFN, data=PAGES).replace(b"\x93NUMPY", b"\x93NUMPX"), "ram.npz"),
    "no header": (NO_HEADER.getvalue(), "without its header"),
    "one array": (npz(pfn=PFN), "no array"),
    "objects": (npz(pfn=np.array([{}]), data=PAGES), "damaged"),
    "signed": (npz(pfn=PFN.astype(np.int64), data=PAGES), "pfn is int64"),
    "page size": (npz(pfn=PFN, data=PAGES[:, :100]), "not 2 pages of 4096"),
    "count": (npz(pfn=PFN[:1], data=PAGES), "not 1 pages"),
    "order": (npz(pfn=PFN[::-1], data=PAGES), "ascending"),
    "lone array": (npz(pfn=PFN, data=PAGES)[:0] + b"\x93NUMPY\x01\x00", "ram.npz"),
}


@pytest.mark.parametrize("kind", BAD_NPZ)
def test_damaged_ram_pages(folder: Path, kind: str) -> None:
    """Each thing wrong with ram.npz is one error that names the file."""
    content, cause = BAD_NPZ[kind]
    (folder / "gen0" / "ram.npz").write_bytes(content)
    with pytest.raises(InputError, match=cause):
        _ = Capture(folder).generation(0).ram_pages


def test_damaged_scratch_files(folder: Path) -> None:
    """Scratch files that hold no numbers, or not as many of them, are named."""
    generation = Capture(folder).generations[0]
    out = folder / "gen0" / "kho" / "out"
    with pytest.raises(InputError, match=r"scratch_phys: No such file"):
        _ = generation.scratch_areas
    (out / "scratch_phys").write_text("0x1000\nfrog\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"scratch_phys: .*frog"):
        _ = generation.scratch_areas
    (out / "scratch_phys").write_text("0x1000\n0x2000\n", encoding="utf-8")
    (out / "scratch_len").write_text("0x1000\n", encoding="utf-8")
    with pytest.raises(InputError, match="2 addresses but 1 lengths"):
        _ = generation.scratch_areas


def test_other_generations_and_architectures(folder: Path) -> None:
    """An unknown generation, and a log of another architecture, are told apart from the rest."""
    capture = Capture(folder)
    assert capture.generation("gen0") is capture.generation(0)
    with pytest.raises(InputError, match="no generation 'gen9'; there are gen0"):
        capture.generation("gen9")
    shutil.copy(CAPTURES / "arm64-16k" / "gen0" / "dmesg", folder / "gen0" / "dmesg")
    with pytest.raises(InputError, match="arm64 kernel"):
        Capture(folder).memory_map()
