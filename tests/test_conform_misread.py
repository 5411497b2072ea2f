"""A capture whose two kernels have bitmaps of different sizes: a real map, read the other way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from khosim.cli.main import main

GOLDEN = Path(__file__).parent / "golden" / "kho-v1"
RESERVE = "__memblock_reserve: [{:#018x}-{:#018x}] nid=-1 flags=0 kho_memory_init+0x1ce/0x49a\n"
# The bitmaps of the captured kernel lie behind each other in the slab. Four objects behind that of
# order 4 is that of order 5, where bit 52 is set. The machine has 1 GiB: 4 times 4096 blocks of
# order 4.
FIRST_FATAL_BIT = 4 * 4096 + 52


def mixed(tmp_path, bits, lines, tail=""):
    """``uma1g-v1`` with a successor of the other bitmap size: its log up to the handover's end."""
    source = GOLDEN / "uma1g-v1"
    shutil.copytree(source / "gen0", tmp_path / "gen0")
    (tmp_path / "gen1").mkdir()
    log = (source / "gen1" / "dmesg").read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(log) if "kho_memory_init" in line)
    shutil.copy(source / "gen1" / "cmdline", tmp_path / "gen1" / "cmdline")
    (tmp_path / "gen1" / "dmesg").write_text("".join([*log[:first], *lines, tail]))
    facts = json.loads((source / "capture.json").read_text())
    facts |= {"generations": ["gen0", "gen1"], "preserve_bits": bits}
    (tmp_path / "capture.json").write_text(json.dumps(facts))
    return tmp_path


def items_of(path, capsys):
    """What conform says of the successor."""
    main(["conform", str(path), "--json"])
    return json.loads(capsys.readouterr().out)["generations"]["gen1"]


def read_with(bits):
    """What a kernel with bitmaps of ``bits`` reads from the captured pages, until it dies."""
    from test_matrix import dumb_reader

    blocks, _ = dumb_reader("uma1g-v1", bits // 8, lambda phys: phys < 1 << 30)
    return blocks


@pytest.mark.parametrize("at", [None, 5, -1])
def test_a_successor_that_dies_of_long_bitmaps(tmp_path, capsys, at):
    """Its reservations and its fault are those of the simulated one; a wrong one is noticed."""
    blocks = read_with(32768)
    assert blocks[-1] == [FIRST_FATAL_BIT << 16, 4]
    fault = 0xFFFFEA0000000000 + (FIRST_FATAL_BIT << 4) * 64 + 40
    lines = [RESERVE.format(phys, phys + (4096 << order) - 1) for phys, order in blocks]
    if at is not None:
        lines[at] = RESERVE.format(0x1000, 0x1FFF)
    tail = f"BUG: unable to handle page fault for address: {fault:x}\nOops: Oops: 0002 [#1] SMP\n"
    items = items_of(mixed(tmp_path, [4096, 32768], lines, tail), capsys)
    same = len(blocks) - (at is not None)
    for name in ("preserved", "successor: preserved"):
        # Behind the last bitmaps of the slab no pages were captured: a difference is not judged.
        assert (items[name]["same"], items[name]["total"]) == (same, len(blocks))
        assert items[name]["ok"] is (True if at is None else None)
    assert items["successor: dies"]["ok"] is True
    assert items["replay"]["ok"] is None
    assert items["files"]["ok"] is None


def test_another_death(tmp_path, capsys):
    """A fault somewhere else is a difference."""
    blocks = read_with(32768)
    lines = [RESERVE.format(phys, phys + (4096 << order) - 1) for phys, order in blocks]
    tail = "BUG: unable to handle page fault for address: ffffea0001234528\n"
    items = items_of(mixed(tmp_path, [4096, 32768], lines, tail), capsys)
    assert items["successor: dies"]["ok"] is False


def test_a_successor_that_reads_too_little(tmp_path, capsys):
    """Bitmaps of a page read as 512 bytes: what lies behind is not reserved."""
    page = GOLDEN / "uma1g-v1page"
    shutil.copytree(page / "gen0", tmp_path / "gen0")
    shutil.copytree(page / "gen1", tmp_path / "gen1")
    known = json.loads((page / "gen0" / "handover.json").read_text())
    # Of order n, 4096 blocks of each bitmap are read.
    lost = [
        (phys, order)
        for phys, order in known["preserved"]
        if (phys >> 12 + order) % 32768 >= 4096
    ]
    assert lost
    gone = {f"[{phys:#018x}-{phys + (4096 << order) - 1:#018x}]" for phys, order in lost}
    log = tmp_path / "gen1" / "dmesg"
    text = log.read_text().splitlines(keepends=True)
    kept = [
        line
        for line in text
        if not ("kho_memory_init" in line and any(where in line for where in gone))
    ]
    assert len(text) - len(kept) == len(lost)
    log.write_text("".join(kept))
    facts = json.loads((page / "capture.json").read_text())
    facts |= {"generations": ["gen0", "gen1"], "preserve_bits": [32768, 4096]}
    (tmp_path / "capture.json").write_text(json.dumps(facts))
    items = items_of(tmp_path, capsys)
    for name in ("preserved", "successor: preserved"):
        assert items[name]["ok"] is True
        assert items[name]["total"] == len(known["preserved"]) - len(lost)
    assert items["successor: folios"]["ok"] is None
