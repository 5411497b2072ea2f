"""Replaying real boots: every address the same, every altered line found, no log a traceback.

Every number expected here is counted from the captures' own files, by expressions that share
nothing with the code under test.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from khosim.capture.folder import Capture
from khosim.cli.main import main
from khosim.conform.boot_facts import NodeBlock
from khosim.conform.dmesg_calls import (
    Add,
    Doubled,
    Dump,
    Free,
    Remove,
    Request,
    Reserve,
    Row,
    parse_calls,
)
from khosim.conform.final_state import compare_final_arrays
from khosim.conform.nodes import cleanup_meminfo
from khosim.conform.replay import Replay, replay_dmesg, replay_generation, replay_path
from khosim.conform.requests import alloc_contiguous
from khosim.conform.start import variants
from khosim.errors import InputError
from khosim.kernel.memblock import Memblock

CAPTURES = Path(__file__).parent / "golden" / "captures"
LOGS = Path(__file__).parent / "golden" / "logs"
NAMES = ("arm64-16k", "fixed2g", "numa4g", "uma1g", "uma1g-7.2")
PLACED = re.compile(
    r"\[0x([0-9a-f]{16})-0x([0-9a-f]{16})\] nid=-?\d+ flags=20 memblock_alloc_range"
)
PRESERVED = re.compile(r"\[0x([0-9a-f]{16})-0x[0-9a-f]{16}\] .* kho_preserved_memory_reserve")
RANGE = re.compile(r"\[0x([0-9a-f]{16})-0x([0-9a-f]{16})\]")


LINES = """\
memblock_alloc_try_nid_raw: 4096 bytes align=0x1000 nid=1 from=0x01000000 max_addr=0x1 f+0x1/0x2
memblock_phys_alloc_range: 24576 bytes align=0x1000 from=0x0 max_addr=0x100000 f+0x1/0x2
memblock_alloc_hugetlb: 1073741824 bytes, nid=0, exact_nid=1 alloc_bootmem+0x1/0x2
__memblock_reserve: [0x0000000000001000-0x0000000000001fff] nid=-1 flags=a0 f+0x1/0x2
memblock_phys_free: [0x0000000000002000-0x0000000000001fff] g.isra.0+0x1/0x2
memblock_add: [0x0000000000000000-0x000000000009fbff] e820__memblock_setup+0x63/0x86
memblock_add_node: [0x0000000000000000-0x0000000000000fff] nid=2 flags=1 h+0x1/0x2
memblock_remove: [0x0010000000000000-0x000ffffffffffffe] arm64_memblock_init+0x5c/0x24c
memblock: reserved is doubled to 256 at [0x00000001b2d32000-0x00000001b2d337ff]
MEMBLOCK configuration:
 memory size = 0x0000000000001000 reserved size = 0x0000000000000000
 memory.cnt  = 0x1
 memory[0x0]\t[0x0000000000001000-0x0000000000001fff], 0x1000 bytes on node 3 flags: 0x40
 reserved.cnt  = 0x0
"""


def _dmesg(name: str, generation: str) -> str:
    return (CAPTURES / name / generation / "dmesg").read_text()


def _shifted(line: str, by: int) -> str:
    """``line`` with both ends of its range moved by ``by`` bytes."""

    def move(found: re.Match[str]) -> str:
        low, high = (int(word, 16) + by for word in found.groups())
        return f"[{low:#018x}-{high:#018x}]"

    return RANGE.sub(move, line, count=1)


def _found(text: str, name: str, generation: str) -> list[int]:
    """The lines that the replay of an altered ``text`` reports."""
    capture = Capture(CAPTURES / name)
    one = capture.generation(generation)
    vars(one)["dmesg"] = text
    return [difference.line for difference in replay_generation(capture, one).differences]


def _altered(name: str, generation: str, number: int, by: int) -> list[int]:
    lines = _dmesg(name, generation).split("\n")
    lines[number - 1] = _shifted(lines[number - 1], by)
    return _found("\n".join(lines), name, generation)


def _numbers(text: str, wanted: str) -> list[int]:
    return [number for number, line in enumerate(text.split("\n"), 1) if re.search(wanted, line)]


# Real boots


@pytest.mark.parametrize("name", NAMES)
def test_every_allocation_of_a_capture_is_identical(name: str) -> None:
    """Each allocation, dump, scratch area and preserved block of every generation is the same."""
    path = CAPTURES / name
    replays = replay_path(path)
    assert [one.name for one in replays] == ["gen0", "gen1", "gen2"]
    for nth, one in enumerate(replays):
        assert one.differences == ()
        logged = len(PLACED.findall(_dmesg(name, one.name)))
        assert logged > 40
        assert (one.allocations, one.same) == (logged, logged)
        out = path / one.name / "kho" / "out"
        phys, sizes = (
            [int(word, 0) for word in (out / file).read_text().split()]
            for file in ("scratch_phys", "scratch_len")
        )
        assert list(one.scratch) == list(zip(phys, sizes, strict=True))
        if nth:
            handover = json.loads((path / f"gen{nth - 1}" / "handover.json").read_text())
            preserved = [block[0] for block in handover["preserved"]]
            said = [int(word, 16) for word in PRESERVED.findall(_dmesg(name, one.name))]
            assert said == preserved
            assert (one.preserved, one.nr_preserved) == (len(preserved), len(preserved))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("generation", ["gen0", "gen1"])
def test_a_lone_log_needs_no_capture(name: str, generation: str) -> None:
    """A log alone replays as well: what was handed over is read from its own dumps."""
    text = _dmesg(name, generation)
    one = replay_dmesg(text)
    assert one.differences == ()
    assert one.same == len(PLACED.findall(text))


@pytest.mark.parametrize("name", sorted(json.loads((LOGS / "scratch.json").read_text())))
def test_boots_of_other_machines_are_identical(name: str) -> None:
    """EFI, KASLR, crashkernel=, cma=, huge pages, movable_node, mem=, more nodes: all the same.

    Scratch is what debugfs showed in those boots. After a handover a lone log tells no borders
    between adjoining areas.
    """
    text = (LOGS / f"{name}.txt").read_text()
    one = replay_dmesg(text)
    assert one.differences == ()
    placed = len(re.findall(r"__memblock_reserve: .* memblock_alloc_(?:range_nid|hugetlb)", text))
    assert (one.allocations, one.same) == (placed, placed)
    shown = [tuple(area) for area in json.loads((LOGS / "scratch.json").read_text())[name]]
    if "found kexec handover data" in text:
        assert _union(one.scratch) == _union(shown)
        assert one.preserved == one.nr_preserved == len(PRESERVED.findall(text))
    else:
        assert list(one.scratch) == shown


def _union(areas: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for base, size in sorted(area for area in areas if area[1]):
        if joined and joined[-1][1] == base:
            joined[-1] = (joined[-1][0], base + size)
        else:
            joined.append((base, base + size))
    return joined


def test_final_arrays_are_those_of_the_running_kernel() -> None:
    """On arm64 memblock's arrays in debugfs are those that the replay leaves."""
    capture = Capture(CAPTURES / "arm64-16k")
    for generation in capture.generations:
        replay = replay_generation(capture, generation)
        assert compare_final_arrays(replay, generation) == []


def test_final_arrays_altered_are_noticed(tmp_path: Path) -> None:
    """A region moved, or flagged otherwise, in the running kernel's list is a difference."""
    whole = CAPTURES / "arm64-16k" / "gen0"
    for file, old, new in (
        ("reserved", "0x00000000ba784000", "0x00000000ba785000"),
        ("reserved", "b9ffffff    0 RSV_KERN", "b9ffffff    0 NONE"),
        ("memory", "bfffffff", "bfffefff"),
    ):
        folder = tmp_path / "arm64-16k"
        shutil.copytree(CAPTURES / "arm64-16k", folder)
        path = folder / "gen0" / "memblock" / file
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        capture = Capture(folder)
        replay = replay_generation(capture, capture.generation("gen0"))
        assert compare_final_arrays(replay, capture.generation("gen0"))
        shutil.rmtree(folder)
    assert whole.is_dir()


# One altered line


@pytest.mark.parametrize(
    ("name", "generation", "step"),
    [
        ("uma1g", "gen0", 5),
        ("numa4g", "gen1", 19),
        ("uma1g-7.2", "gen1", 11),
        ("arm64-16k", "gen0", 151),
    ],
)
def test_an_altered_allocation_is_the_only_difference(
    name: str, generation: str, step: int
) -> None:
    """An address changed in one allocation's line: that line is reported, and nothing else."""
    text = _dmesg(name, generation)
    numbers = _numbers(text, PLACED.pattern)[::step]
    capture = Capture(CAPTURES / name)
    one = capture.generation(generation)
    for nth, number in enumerate(numbers):
        lines = text.split("\n")
        was = lines[number - 1]
        lines[number - 1] = _shifted(was, (-0x40, 0x1000, 0x200000)[nth % 3])
        vars(one)["dmesg"] = "\n".join(lines)
        replay = replay_generation(capture, one)
        assert [difference.line for difference in replay.differences] == [number]
        real, simulated = (RANGE.search(line) for line in (lines[number - 1], was))
        assert real
        assert simulated
        assert replay.differences[0].real == int(real.group(1), 16)
        assert replay.differences[0].simulated == int(simulated.group(1), 16)
        assert (replay.allocations, replay.same) == (
            len(PLACED.findall(text)),
            replay.allocations - 1,
        )


@pytest.mark.parametrize(
    ("name", "generation", "line"),
    [
        ("uma1g", "gen0", r"memblock_add: .*0x000000003ffdffff"),
        ("uma1g", "gen0", r"memblock_phys_free: .*init_mem_mapping"),
        ("uma1g", "gen0", r"memblock_phys_free: .*start_kernel"),
        ("uma1g", "gen1", r"memblock_phys_free: .*kho_radix_destroy_tree\+0x1a"),
        ("uma1g", "gen1", r"reserve: .*reserve_real_mode"),
        ("uma1g", "gen1", r"0000000000a00000.*kho_preserved_memory_reserve"),
        ("numa4g", "gen0", r"NODE_DATA\(1\) allocated"),
        ("numa4g", "gen0", r"^ memory\[0x3\].*on node 1"),
        ("numa4g", "gen0", r"^ reserved\[0x5\].*on node 0"),
        ("numa4g", "gen1", r"^  node   0: .*0000000040000000"),
        ("numa4g", "gen1", r"bffe1b4c-.*acpi_reserve_initial_tables"),
        ("arm64-16k", "gen1", r"memblock_add: .*arm64_memblock_init"),
    ],
)
def test_any_other_altered_line_is_found(name: str, generation: str, line: str) -> None:
    """Frees, memory, dumps, nodes, reservations: the altered line is the one reported."""
    text = _dmesg(name, generation)
    number = _numbers(text, line)[0]
    lines = text.split("\n")
    range_ = re.search(r"0x([0-9a-f]+)-0x([0-9a-f]+)", lines[number - 1])
    assert range_
    moved = f"0x{int(range_[1], 16) + 0x2000:016x}-0x{int(range_[2], 16) + 0x2000:016x}"
    lines[number - 1] = lines[number - 1].replace(range_[0], moved)
    assert _found("\n".join(lines), name, generation) == [number]


def test_one_end_altered_is_found_too() -> None:
    """Only the first or only the last address of a line altered: that line is reported."""
    text = _dmesg("uma1g", "gen0")
    for wanted in (PLACED.pattern, r"^ reserved\[0x3\]", r"memblock_phys_free: .*init_mem"):
        number = _numbers(text, wanted)[0]
        for nth in (1, 2):
            lines = text.split("\n")
            found = RANGE.search(lines[number - 1])
            assert found
            word = f"{int(found[nth], 16) ^ 0x4000:016x}"
            lines[number - 1] = lines[number - 1].replace(found[nth], word, 1)
            assert _found("\n".join(lines), "uma1g", "gen0") == [number]


def test_a_missing_and_an_extra_line_are_found() -> None:
    """A preserved block's line taken out, or one put in, is a difference at that place."""
    text = _dmesg("uma1g", "gen1")
    number = _numbers(text, PRESERVED.pattern)[100]
    lines = text.split("\n")
    without = lines[: number - 1] + lines[number:]
    assert _found("\n".join(without), "uma1g", "gen1") == [number]
    twice = [*lines[:number], _shifted(lines[number - 1], 0x70000000), *lines[number:]]
    assert _found("\n".join(twice), "uma1g", "gen1") == [number + 1]


def test_altered_scratch_files_are_found(tmp_path: Path) -> None:
    """An area that debugfs shows elsewhere than khosim reserves it is a difference."""
    for file in ("scratch_phys", "scratch_len"):
        folder = tmp_path / file
        shutil.copytree(CAPTURES / "uma1g", folder)
        path = folder / "gen0" / "kho" / "out" / file
        words = path.read_text().split()
        words[0] = hex(int(words[0], 0) + 0x400000)
        path.write_text(" ".join(words))
        capture = Capture(folder)
        replay = replay_generation(capture, capture.generation("gen0"))
        assert [difference.call for difference in replay.differences] == [f"kho/out/{file}[0]"]


# Other shapes of logs


@pytest.mark.parametrize(
    ("prefix", "end"),
    [
        ("[    0.000000] ", "\n"),
        ("<6>[    0.012345] ", "\r\n"),
        ("[    0.000000][    T0] ", "\n"),
        ("kern  :info  : [    0.000000] ", "\n"),
        ("Nov 22 21:40:03 host kernel: ", "\n"),
    ],
)
def test_prefixes_make_no_difference(prefix: str, end: str) -> None:
    """Time stamps, levels, journalctl's columns and carriage returns change nothing."""
    text = _dmesg("numa4g", "gen1")
    replay = replay_dmesg("".join(prefix + line + end for line in text.split("\n")))
    assert replay.differences == ()
    assert replay.same == len(PLACED.findall(text))


def test_lines_of_others_in_between_make_no_difference() -> None:
    """Lines of other subsystems may stand anywhere, also within a dump and within an allocation."""
    lines = _dmesg("numa4g", "gen0").split("\n")
    noisy = "\n".join(
        f"{line}\nusb 1-1: [mem 0x0000000000000000-0x0000000000000fff]" for line in lines
    )
    replay = replay_dmesg(noisy)
    assert replay.differences == ()
    assert replay.same == replay.allocations == len(PLACED.findall(noisy))


def test_a_second_boot_in_the_log_is_not_read() -> None:
    """Of several boots in one text the first is replayed."""
    replay = replay_dmesg(_dmesg("uma1g", "gen0") + _dmesg("uma1g", "gen1"))
    assert (replay.differences, replay.facts.kho_boot) == ((), False)
    assert replay.same == len(PLACED.findall(_dmesg("uma1g", "gen0")))


# Wrong input


def test_a_cut_log_is_refused_or_reported() -> None:
    """Cut anywhere before the page allocator is up, a log is refused in one line."""
    text = _dmesg("uma1g", "gen1")
    end = text.index("SLUB:")
    for at in range(0, end, 3001):
        with pytest.raises(InputError) as refused:
            replay_dmesg(text[:at], place="log")
        assert "\n" not in str(refused.value)
        assert str(refused.value).startswith("log")


def test_a_log_without_its_beginning_is_refused() -> None:
    """A log that lost its first lines has no memory map to start from."""
    for name in ("uma1g", "arm64-16k"):
        lines = _dmesg(name, "gen0").split("\n")
        at = _numbers("\n".join(lines), r"NODE_DATA\(0\)")[0]
        with pytest.raises(InputError):
            replay_dmesg("\n".join(lines[at + 20 :]))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", bytes(range(256)) * 40, b"MEMBLOCK configuration:\n", b"\xff\xfe" * 500],
)
def test_what_is_no_log_is_one_line_and_status_2(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Empty files, garbage and other people's text: exit 2 and one line."""
    path = tmp_path / "log"
    path.write_bytes(content)
    assert main(["replay", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert str(path) in captured.err


def test_a_log_without_memblock_debug_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log of a boot without memblock=debug says so."""
    lines = _dmesg("uma1g", "gen0").split("\n")
    plain = [
        line for line in lines if not re.search(r"memblock_|MEMBLOCK|^ (memory|reserved)", line)
    ]
    path = tmp_path / "dmesg"
    path.write_text("\n".join(plain))
    assert main(["replay", str(path)]) == 2
    assert "memblock=debug" in capsys.readouterr().err


@pytest.mark.parametrize(
    "missing",
    ["gen1/dmesg", "gen0/ram.npz", "gen0/kho/out/scratch_phys", "gen1/kho/in/fdt", "capture.json"],
)
def test_a_capture_with_a_missing_file_is_refused(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A capture that lacks a file that the replay needs: exit 2 and its name."""
    folder = tmp_path / "uma1g"
    shutil.copytree(CAPTURES / "uma1g", folder)
    (folder / missing).unlink()
    assert main(["replay", str(folder)]) == 2
    assert missing in capsys.readouterr().err


def test_an_old_kernels_log_is_refused() -> None:
    """Kernels before 6.16 log reservations without flags; they have no KHO."""
    line = "memblock_reserve: [0x0000000000000000-0x0000000000000fff] setup_arch+0x1/0x2"
    with pytest.raises(InputError, match=r"6\.16"):
        replay_dmesg(line)


# The command


def test_the_command_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    """``--json`` has the counts, the differences and the scratch areas by generation."""
    assert main(["replay", str(CAPTURES / "uma1g"), "--json"]) == 0
    generations = json.loads(capsys.readouterr().out)["generations"]
    assert list(generations) == ["gen0", "gen1", "gen2"]
    gen0 = generations["gen0"]
    assert gen0["allocations"] == gen0["same"] == len(PLACED.findall(_dmesg("uma1g", "gen0")))
    assert gen0["different"] == []
    words = (CAPTURES / "uma1g/gen0/kho/out/scratch_phys").read_text().split()
    assert [area[0] for area in gen0["scratch"]] == [int(word, 0) for word in words]


def test_the_command_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table names generation, counts and each difference; a difference is status 1."""
    lines = _dmesg("uma1g", "gen0").split("\n")
    number = _numbers("\n".join(lines), PLACED.pattern)[7]
    lines[number - 1] = _shifted(lines[number - 1], 0x3000)
    path = tmp_path / "boot.log"
    path.write_text("\n".join(lines))
    assert main(["replay", str(path)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"boot\.log +47 +46 +1 ", out)
    assert f"line {number}: " in out


def test_one_generation_of_a_capture() -> None:
    """A generation's folder is replayed with its predecessor."""
    (one,) = replay_path(CAPTURES / "numa4g" / "gen1")
    assert (one.name, one.differences) == ("gen1", ())
    assert isinstance(one, Replay)
    phys = (CAPTURES / "numa4g/gen1/kho/out/scratch_phys").read_text().split()
    assert [base for base, _ in one.scratch] == [int(word, 0) for word in phys]


# Parts


def test_each_kind_of_line_is_read() -> None:
    """Requests, reservations, frees, memory, doublings and dumps, each with its fields."""
    raw, plain, huge, reserve, free, add, add_node, remove, doubled, dump = parse_calls(LINES)
    assert raw[1:8] == ("memblock_alloc_try_nid_raw", 4096, 4096, 1 << 24, 1, 1, False)
    assert isinstance(plain, Request)
    assert (plain.size, plain.end, plain.nid) == (24576, 1 << 20, -1)
    assert isinstance(huge, Request)
    assert (huge.size, huge.align, huge.nid, huge.exact) == (1 << 30, 1 << 30, 0, True)
    assert reserve == Reserve(4, 0x1000, 0x2000, -1, 0xA0, "f+0x1/0x2")
    assert free == Free(5, 0x2000, 0x2000, "g.isra.0+0x1/0x2")
    assert add == Add(6, 0, 0x9FC00, None, 0, "e820__memblock_setup+0x63/0x86")
    assert add_node == Add(7, 0, 0x1000, 2, 1, "h+0x1/0x2")
    assert isinstance(remove, Remove)
    assert (remove.end - remove.base) % (1 << 64) == (1 << 64) - 1
    assert doubled == Doubled(9, "reserved", 256, 0x1B2D32000, 0x1B2D33800)
    assert isinstance(dump, Dump)
    assert dump.whole
    assert dump.memory[0][1:] == (0x1000, 0x2000, 0x1000, 3, 0x40)


def test_node_ranges_are_cleaned_as_the_kernel_does() -> None:
    """Trimmed to memory, joined across holes that no other node lies in, the rest kept apart."""
    memblock = Memblock()
    memblock.memblock_add(0x1000, 0x9E000)
    memblock.memblock_add(0x100000, 0xBFEE0000)
    memblock.memblock_add(0x100000000, 0x40000000)
    blocks = (
        NodeBlock(0, 0xA0000, 0),
        NodeBlock(0x100000, 0xA0000000, 0),
        NodeBlock(0xA0000000, 0xC0000000, 1),
        NodeBlock(0x100000000, 0x140000000, 1),
        NodeBlock(0x1000000000, 0x2000000000, 1, True),
    )
    assert cleanup_meminfo(memblock, blocks) == [
        (0x1000, 0xA0000000, 0),
        (0xA0000000, 0x140000000, 1),
    ]
    crossed = (
        NodeBlock(0, 0x10000, 0),
        NodeBlock(0x10000, 0x20000, 1),
        NodeBlock(0x20000, 0x30000, 0),
    )
    assert [nid for _, _, nid in cleanup_meminfo(memblock, crossed)] == [0, 1, 0]


def test_an_altered_limit_of_a_request_is_found() -> None:
    """A request whose upper limit does not fit its answer: the request's line is reported."""
    text = _dmesg("uma1g", "gen0")
    number = _numbers(text, r"memblock_alloc_try_nid: 12582912 .*setup_log_buf")[0]
    lines = text.split("\n")
    lines[number - 1] = lines[number - 1].replace(
        "max_addr=0x0000000000000000", "max_addr=0x0000000020000000"
    )
    replay = replay_dmesg("\n".join(lines))
    assert [difference[0:1] + difference[2:] for difference in replay.differences] == [
        (number, 0x20000000, 0)
    ]


def test_a_torn_row_of_a_dump_is_mended() -> None:
    """Sizes that add up say that an end is wrong, and the rows around it say which."""
    rows = (
        Row(1, 0x1000, 0x3000, 0x2000, -1, 0),
        Row(2, 0x2800, 0x8000, 0x4000, -1, 0),  # starts inside the row before it
        Row(3, 0x9000, 0xA000, 0x1000, -1, 0),
    )
    assert variants(rows, 0x7000) == [[rows[0], rows[1]._replace(base=0x4000), rows[2]]]
    wrong_size = (rows[0], Row(2, 0x4000, 0x8000, 0x4400, -1, 0), rows[2])
    assert variants(wrong_size, 0x7000)[0][1].size == 0x4000
    either = (Row(1, 0x1000, 0x8000, 0x4000, -1, 0),)
    assert {(one.base, one.end) for (one,) in variants(either, 0x4000)} == {
        (0x1000, 0x5000),
        (0x4000, 0x8000),
    }


def test_contiguous_areas_go_where_cma_puts_them() -> None:
    """From 4 GiB upwards where that has room, else from the top down; ``cma=`` narrows it."""
    facts = replay_dmesg(_dmesg("numa4g", "gen0")).facts
    mib = 1 << 20
    memblock = Memblock()
    memblock.memblock_add_node(0x100000, 0xBFEE0000, 0)
    memblock.memblock_add_node(0x100000000, 0x40000000, 1)
    memblock.memblock_reserve(0x100000000, 0x1000)
    assert alloc_contiguous(memblock, facts, 64 * mib, -1) == 0x100200000
    assert alloc_contiguous(memblock, facts, 64 * mib, 0) == 0xBBE00000
    limited = dataclasses.replace(facts, cmdline="cma=32M@256M-1G")
    assert alloc_contiguous(memblock, limited, 32 * mib, -1) == 0x3E000000
    huge = dataclasses.replace(facts, cmdline="hugetlb_cma=1G")
    assert alloc_contiguous(memblock, huge, 1 << 30, 0) == 0x40000000


def test_a_kernel_without_nodes_has_all_on_node_0() -> None:
    """A log without any line about nodes replays, too: no region is told apart by its node."""
    lines = [
        line
        for line in _dmesg("uma1g", "gen0").split("\n")
        if not re.search(r"NUMA|Faking a node|NODE_DATA|nid=0 flags=20 memblock_alloc", line)
    ]
    text = "\n".join(line for line in lines if not re.search(r" nid=0 from=", line))
    second = _numbers(text, "MEMBLOCK configuration")[1]
    lines = text.split("\n")
    rows = _numbers(text, r"^ (memory|reserved)")
    drop = {number for number in rows if number > second} | {second}
    kept = [line for number, line in enumerate(lines, 1) if number not in drop]
    replay = replay_dmesg("\n".join(kept))
    assert not replay.facts.numa
    memblock = replay.memblock
    assert set(memblock.memory.nid) | set(memblock.reserved.nid) == {0}


def test_dumps_without_calls_are_no_log_to_replay() -> None:
    """A log that lost every line of a memblock call, and kept memblock's tables, is refused."""
    lines = _dmesg("uma1g", "gen0").splitlines()
    text = "\n".join(line for line in lines if "memblock" not in line)
    assert "MEMBLOCK configuration:" in text
    with pytest.raises(InputError, match="no memblock lines"):
        replay_dmesg(text)


@pytest.mark.parametrize("name", ["uma1g", "arm64-16k", "numa4g"])
def test_kernels_without_debugfs_are_replayed(tmp_path: Path, name: str) -> None:
    """Scratch is read from the log then, the root FDT from the pages: all is the same."""
    folder = tmp_path / name
    shutil.copytree(CAPTURES / name, folder, ignore=shutil.ignore_patterns("kho"))
    whole = replay_path(CAPTURES / name)
    for bare, usual in zip(replay_path(folder), whole, strict=True):
        assert not bare.differences
        assert (bare.same, bare.preserved) == (usual.same, usual.preserved)
        assert bare.scratch == usual.scratch
    assert not replay_path(folder / "gen1")[0].differences
